"""What a training wrote: the curves of all its pieces, joined where it was resumed."""

import csv
from pathlib import Path

from ssl_exit.errors import InputError
from ssl_exit.training.run import LOGS


def read_curve(out: Path, name: str = "loss") -> list[tuple[int, float]]:
    """Steps and values of one logged quantity; what an interrupted piece did beyond its last checkpoint is left out.

    Args:
        out: folder of the training, with logger "csv".
        name: "loss", "final", "exits" or "knn".

    Raises:
        InputError: no such logs.
    """
    files = sorted((out / LOGS).glob("from-epoch-*/metrics.csv"))
    if not files:
        raise InputError(f"{str(out)!r} holds no CSV logs of a training")
    joined: list[tuple[int, float]] = []
    for file in files:
        with file.open() as f:
            piece = [(int(row["step"]), float(row[name])) for row in csv.DictReader(f) if row.get(name)]
        joined = [point for point in joined if not piece or point[0] < piece[0][0]] + piece
    return joined

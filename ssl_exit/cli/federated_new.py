"""ssl-exit federated new"""

from pathlib import Path

from ssl_exit.errors import InputError


def federated_new(folder: str) -> None:
    """Write a Flower app that fits a model where the images are; `flwr run FOLDER` runs it.

    Args:
        folder: for the app, new or empty.
    """
    from importlib.resources import as_file, files
    from shutil import copytree, ignore_patterns

    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{folder!r} exists and holds something; choose a new folder")
    with as_file(files("ssl_exit.federated") / "template") as template:
        copytree(template, place, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__"))
    print(f"written to {folder}: read README.md there, edit pyproject.toml, then flwr run {folder}")

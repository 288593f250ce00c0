"""A model and what it did to images as one HTML file: no network, no script."""

import base64
import datetime
import io
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ssl_exit import __version__
from ssl_exit.cascade.cascade import describe
from ssl_exit.data.image_files import ImageFiles, SomeImages, Unreadable
from ssl_exit.data.images import open_images
from ssl_exit.exits.final import FinalClusters
from ssl_exit.exits.thresholds import trade_off
from ssl_exit.files import atomic_file
from ssl_exit.fitting.record import record
from ssl_exit.measure.evaluation import Evaluation
from ssl_exit.model import Model
from ssl_exit.report.gallery import gallery
from ssl_exit.report.tables import break_even

SAMPLE = 2_000  # images that galleries are chosen from and the curve is drawn with
PICTURES = 1_400  # in all galleries together, of about 2.6 kB each
SIDE = 64  # pixels of one
MOST_CLUSTERS = 60  # with a gallery
MOST_CLASSES = 30  # columns of the table of clusters and classes
LISTED = 20  # images that could not be used
KINDS = {
    "nearest": "nearest to the centroid",
    "first": "left first",
    "last": "went to the end",
    "border": "border cases",
}


@dataclass(frozen=True)
class Picture:
    """One image of a gallery.

    Attributes:
        source: the image as a data URI.
        text: what stands for it, and is shown on a pointer's touch.
    """

    source: str
    text: str


@dataclass(frozen=True)
class ClusterView:
    """One cluster: number, images, share of all, and rows of pictures by what they show."""

    number: int
    size: int
    share: float
    rows: dict[str, list[Picture]]


def write_report(
    file: Path, model: Model, images: ImageFiles, evaluation: Evaluation, labels: np.ndarray | None = None
) -> None:
    """Write the page; it appears complete or not at all.

    Args:
        file: where, as .html.
        model: a fitted one.
        images: those of the evaluation.
        evaluation: of them.
        labels: of all images that were clustered, (N,), for the sizes of clusters; None: those of the evaluation.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ssl_exit.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("page.html").render(**_contents(model, images, evaluation, labels))
    with atomic_file(file) as draft:
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")


def _contents(model: Model, images: ImageFiles, evaluation: Evaluation, labels: np.ndarray | None) -> dict[str, Any]:
    result = evaluation.result
    labels = result.labels if labels is None else labels
    sample = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(result.labels >= 0))[:SAMPLE])
    distances, curve = _looked_at(model, SomeImages(images, sample.tolist()))
    k = model.settings.k
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    shown = np.argsort(-sizes, kind="stable")[:MOST_CLUSTERS]
    views = list(_views(images, evaluation, sample, distances, sizes, shown))
    skipped = sorted(result.skipped.items())
    return {
        "title": f"{int(sizes.sum()):,} images in {k} clusters",
        "model": model,
        "certificate": model.check(),
        "evaluation": evaluation,
        "exits": [row for row in evaluation.exits if row.share > 0 or row.name == "end"],
        "n_closed": sum(row.share == 0 and row.name != "end" for row in evaluation.exits),
        "curve": _curve(*curve, evaluation),
        "views": sorted(views, key=lambda view: view.number),
        "kinds": KINDS,
        "sizes": sizes.tolist(),
        "confusion": _confusion(images, evaluation, k),
        "break_even": break_even(evaluation.teaching_seconds, evaluation.break_even)
        if evaluation.teaching_seconds
        else "",
        "skipped": [(images.paths[i], reason) for i, reason in skipped[:LISTED]],
        "n_skipped": len(skipped),
        "machine": _machine(model),
        "hashes": model.hashes(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _looked_at(model: Model, images: ImageFiles) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Distances to the final centroids, (n, K), or minus logits; cost and agreement along the threshold path."""
    source = open_images(images, images.preprocessing)
    order, cascade = np.arange(len(source)), model.cascade

    def batches() -> Iterator[Any]:
        return source.batches(order, model.settings.batch_size)

    distances = np.full((len(source), model.settings.k), np.inf, dtype=np.float32)
    for each in describe(cascade.tapped, batches()):
        final = cascade.final
        near = final.squared_distances(each.features) if isinstance(final, FinalClusters) else -each.features
        distances[each.indices.numpy()] = near.cpu().numpy()
    recorded, _ = record(cascade, batches())
    return distances, trade_off(model.path, recorded, cascade.costs)


def _views(
    images: ImageFiles,
    evaluation: Evaluation,
    sample: np.ndarray,
    distances: np.ndarray,
    sizes: np.ndarray,
    shown: np.ndarray,
) -> Iterator[ClusterView]:
    result, names = evaluation.result, [row.name for row in evaluation.exits]
    labels, exits, scores = (part[sample] for part in (result.labels, result.exits, result.scores))
    n = int(np.clip(PICTURES // (len(KINDS) * max(1, len(shown))), 3, 12))
    for cluster in shown.tolist():
        chosen = gallery(cluster, labels, exits, scores, distances, n)
        rows = {}
        for kind in KINDS:
            pictures = (
                _picture(images, int(sample[i]), f"{images.paths[sample[i]]}, left at {names[exits[i]]}")
                for i in getattr(chosen, kind)
            )
            rows[kind] = [picture for picture in pictures if picture]
        yield ClusterView(cluster, int(sizes[cluster]), float(sizes[cluster] / max(1, sizes.sum())), rows)


def _picture(images: ImageFiles, position: int, text: str) -> Picture | None:
    """A small JPEG of an image file; None where it can no longer be read."""

    def encoded(image: Image.Image) -> str:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    source = images.read(position, encoded)
    return None if isinstance(source, Unreadable) else Picture(source, text)


def _curve(costs: np.ndarray, agreements: np.ndarray, evaluation: Evaluation) -> str:
    """Cost and agreement of every threshold setting, with the one in use, as SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "ssl_exit"}):
        fig = Figure(figsize=(5, 3.1), layout="constrained")
        ax = fig.subplots()
        order = np.argsort(costs)
        ax.plot(costs[order], agreements[order], color="#2457a6", lw=2, label="threshold settings")
        here: dict[str, Any] = {"ms": 9, "mfc": "white", "mec": "black", "mew": 2, "label": "setting in use"}
        ax.plot(evaluation.cost_macs, evaluation.agreement, "o", **here)
        ax.axvline(1, color="0.6", lw=1, ls=(0, (4, 3)))
        ax.text(0.995, 0.02, "full encoder", transform=ax.get_xaxis_transform(), rotation=90, ha="right", color="0.35")
        ax.set(xlabel="cost (multiply-adds, full encoder = 1)", ylabel="agreement with the full encoder")
        ax.set_xlim(0, 1.05)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(loc="lower center", frameon=False)
        text = io.StringIO()
        fig.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


@dataclass(frozen=True)
class Confusion:
    """Images by cluster and class.

    Attributes:
        classes: names of the columns, the largest classes.
        rows: cluster, and for every class the images and their share of the cluster.
        n_left_out: classes that have no column.
    """

    classes: list[str]
    rows: list[tuple[int, list[tuple[int, float]]]]
    n_left_out: int


def _confusion(images: ImageFiles, evaluation: Evaluation, k: int) -> Confusion | None:
    if images.targets is None or len(images.classes) == 0:
        return None
    labels, targets = evaluation.result.labels, images.targets
    counts = np.zeros((k, len(images.classes)), dtype=np.int64)
    np.add.at(counts, (labels[labels >= 0], targets[labels >= 0]), 1)
    order = np.sort(np.argsort(-counts.sum(0), kind="stable")[:MOST_CLASSES])
    rows = [
        (cluster, [(int(n), float(n / max(1, counts[cluster].sum()))) for n in counts[cluster, order]])
        for cluster in np.argsort(-counts.sum(1), kind="stable")[:MOST_CLUSTERS].tolist()
    ]
    return Confusion([images.classes[i] for i in order], sorted(rows), len(images.classes) - len(order))


def _machine(model: Model) -> dict[str, str]:
    device = model.cascade.device
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": gpu or f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads",
        "ssl_exit": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "faiss-cpu", "numpy")},
    }

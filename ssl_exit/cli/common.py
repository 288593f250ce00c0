"""What several commands share."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.errors import InputError, printable
from ssl_exit.files import atomic_file, check_file

if TYPE_CHECKING:
    from ssl_exit.cascade.result import ExitResult
    from ssl_exit.clusterer import ExitClusterer
    from ssl_exit.data.image_files import ImageFiles
    from ssl_exit.measure.evaluation import Evaluation


def encoder_spec(
    name: str, weights: str | None, options: dict[str, Any] | None = None, prefix: str | None = None
) -> EncoderSpec:
    """The encoder that a command was given.

    Raises:
        InputError: one without weights.
    """
    if weights is None and name.startswith("transformers:"):
        weights = "DEFAULT"
    spec = EncoderSpec(name, weights, options, prefix)
    if weights is None and not spec.imported:
        raise InputError(f"encoder {name!r} needs --weights: a weights file, or DEFAULT to download")
    return spec


def preprocessing_for(spec: EncoderSpec, **options: Any) -> Preprocessing:
    """The preprocessing from options; for those that are None, that of the weights, or torchvision's usual."""
    trained = spec.preprocessing()
    result = replace(
        trained or Preprocessing(224), **{name: value for name, value in options.items() if value is not None}
    )
    if trained and result != trained:
        warnings.warn(f"the weights were trained with {trained}, and are used with {result}", stacklevel=2)
    return result


def list_skipped(skipped: Mapping[int, str], paths: Sequence[str]) -> None:
    """Print every image that could not be used, with the reason, to stderr."""
    for position, reason in sorted(skipped.items()):
        print(f"skipped {printable(paths[position])}: {printable(reason)}", file=sys.stderr)


def label_images(c: "ExitClusterer", images: "ImageFiles", data: Path, out: Path | None) -> tuple[dict[int, str], str]:
    """Cluster image files and write their labels as they come; a run that was stopped is continued.

    Args:
        c: a fitted clusterer.
        images: of `data`.
        data: folder, part of what a run that is continued must have in common.
        out: file for labels; None: standard output.

    Returns:
        Position and reason of images that could not be used, and a line on what was done.
    """
    from ssl_exit.report.label_file import HEAD, LabelFile, print_labels

    totals = _Totals()
    if out is None:
        print(",".join(HEAD))
        done = 0
        for result in c.stream(images):
            print_labels(sys.stdout, images.paths[done : done + len(result.labels)], result, c.exit_names_)
            totals.add(result, done)
            done += len(result.labels)
        return totals.skipped, str(totals)
    key = json.dumps([c.model_.hashes(), str(data.resolve())])
    with LabelFile(out, images.paths, c.exit_names_, key, list(images.versions())) as labels:
        before = labels.n_rows
        if before:
            print(f"continuing behind {before} rows of a run that was stopped", file=sys.stderr)
        for result in c.stream(images, labels.n_rows):
            totals.add(result, labels.n_rows)
            labels.add(result)
    behind = f" (behind the {before} rows of a run that was stopped)" if before else ""
    return totals.skipped, f"{totals}{behind}; written to {out}"


class _Totals:
    """What became of the images so far."""

    def __init__(self) -> None:
        self.skipped: dict[int, str] = {}
        self.cost, self.clustered = 0.0, 0

    def add(self, result: "ExitResult", start: int) -> None:
        good = result.labels >= 0
        self.cost, self.clustered = self.cost + float(result.cost[good].sum()), self.clustered + int(good.sum())
        self.skipped |= {start + position: reason for position, reason in result.skipped.items()}

    def __str__(self) -> str:
        mean = self.cost / self.clustered if self.clustered else 0
        at = f" at mean cost {mean:.3f} of the full encoder's multiply-adds" if self.clustered else ""
        return f"{self.clustered} images clustered{at}, {len(self.skipped)} skipped"


def evaluate_held_out(c: "ExitClusterer", images: "ImageFiles", most: int) -> "tuple[Evaluation, ImageFiles]":
    """Early exit beside the full encoder on images that fit() held out, at most so many; and those images."""
    from ssl_exit.data.image_files import SomeImages
    from ssl_exit.fitting.calibrate import hold_out

    held, fitted = hold_out(len(images), c.model_.settings)
    sample = SomeImages(images, sorted((held if len(held) else fitted)[:most].tolist()))
    return c.evaluate(sample, sample.targets), sample


def check_embeddings(file: Path) -> None:
    """Refuse a file for final features that is not to be, before the work is done.

    Raises:
        InputError: it ends in another format, or is no regular file.
    """
    if file.suffix != ".npy":
        raise InputError(f"final features are written as .npy; got {str(file)!r}")
    check_file(file)


def write_embeddings(file: Path, c: "ExitClusterer", images: "ImageFiles") -> None:
    """Write final features, (N, F) float32; the file appears complete or not at all."""
    import numpy as np

    features = c.embed(images)
    with atomic_file(file) as draft, draft.open("wb") as f:
        np.save(f, features)


def write_json(file: Path, content: Any) -> None:
    """Write JSON; the file appears complete or not at all."""
    with atomic_file(file) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n")

"""Models on disk: a folder of safetensors and JSON. Nothing in it is executed when it is read.

model.json            parameters, exit points, certificate, and a checksum of every file
encoder.safetensors   the encoder's weights
exits.safetensors     rules, final centroids, thresholds, stage times
"""

import copy
import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_exit.cascade import Cascade, ExitResult
from ssl_exit.clusterer import ExitClusterer
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.graph import as_module
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import Certificate
from ssl_exit.exits.kmeans import FinalClusters
from ssl_exit.exits.rules import rule_named

FORMAT = 1
FILES = ("encoder.safetensors", "exits.safetensors")
_REBUILT = ("encoder", "preprocessing", "exits")  # parameters that JSON holds in another form


def save(clusterer: ExitClusterer, folder: Path) -> None:
    """Write a fitted clusterer; the folder appears whole or not at all (see `ExitClusterer.save`).

    Raises:
        InputError: the folder exists and is not a model.
    """
    if folder.exists() and not (folder / "model.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not a model; give a new folder")
    cascade = clusterer.cascade_
    encoder = clusterer.encoder_
    arrays = {f"rules.{k}": v for k, v in cascade.rules.state_dict().items()}
    arrays |= {"final.centroids": cascade.final.centroids, "thresholds": cascade.thresholds}
    arrays |= {"stage_seconds": torch.from_numpy(clusterer.stage_seconds_)}
    arrays |= {"exit_seconds": torch.from_numpy(clusterer.exit_seconds_)}
    params = {k: v for k, v in clusterer.get_params(deep=False).items() if k not in _REBUILT}
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": version("ssl-exit"),
        "encoder": {"spec": clusterer.spec_.name if clusterer.spec_ else None, "class": type(encoder).__name__},
        "params": params,
        "preprocessing": clusterer.preprocessing.to_dict() if clusterer.preprocessing else None,
        "image": list(clusterer.image_shape_),
        "exits": [point.name for point in clusterer.exit_points_],
        "descriptor": [d.kind for d in cascade.tapped.descriptors],
        "accumulate": cascade.tapped.accumulate,
        "features": "the encoder's output" if cascade.tapped.output.layout == "vector" else "average of the output",
        "certificate": clusterer.certificate_.to_dict(),
        "skipped": clusterer.skipped_,
        "n_fit": clusterer.n_fit_,
        "n_sample": clusterer.n_sample_,
    }
    with _whole_folder(folder) as draft:
        for name, tensors in zip(FILES, (encoder.state_dict(), arrays), strict=True):
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, draft / name)
        about["sha256"] = {name: _sha256(draft / name) for name in FILES}
        about["checksum"] = _checksum(about)
        (draft / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def load(
    folder: str | Path, encoder: nn.Module | Sequence[nn.Module] | None = None, device: str = "auto"
) -> ExitClusterer:
    """Read a model that `ExitClusterer.save` wrote.

    Args:
        folder: the model.
        encoder: a module of the same architecture, for models whose encoder was given as a module; it is
            copied, and filled with the saved weights. Models saved with an EncoderSpec build their own; for
            "module:function" that imports the module from the Python path.
        device: where to run: "auto" or what torch.device takes.

    Raises:
        InputError: the folder is no model, truncated, changed since it was written, of a newer format, or
            needs an encoder.
    """
    folder = Path(folder)
    about = _read_about(folder)
    for name in FILES:
        if not (folder / name).is_file() or _sha256(folder / name) != about["sha256"][name]:
            raise InputError(f"model {str(folder)!r}: {name} is missing, truncated or changed since it was saved")
    weights, arrays = (load_file(folder / name) for name in FILES)
    spec = EncoderSpec(about["encoder"]["spec"]) if about["encoder"]["spec"] else None
    if encoder is None:
        if spec is None:
            raise InputError(
                f"model {str(folder)!r} was fitted with a {about['encoder']['class']} given as a module: "
                "load(folder, encoder=that module)"
            )
        encoder = spec.build()
    rebuilt = copy.deepcopy(as_module(encoder)).eval()
    try:
        rebuilt.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the encoder given does not fit model {str(folder)!r}: {error}") from error

    c = ExitClusterer(
        spec or encoder,
        exits=about["exits"],
        preprocessing=Preprocessing(**about["preprocessing"]) if about["preprocessing"] else None,
        **about["params"] | {"device": device},
    )
    c.encoder_, c.spec_ = rebuilt, spec
    c.image_shape_ = tuple(about["image"])
    c.cascade_ = _cascade(c, arrays, about)
    c.certificate_ = Certificate(**about["certificate"])
    c.stage_seconds_, c.exit_seconds_ = arrays["stage_seconds"].numpy(), arrays["exit_seconds"].numpy()
    c.skipped_ = {int(position): reason for position, reason in about["skipped"].items()}
    c.n_fit_, c.n_sample_ = about["n_fit"], about["n_sample"]
    return c


def _cascade(c: ExitClusterer, arrays: dict[str, Tensor], about: dict[str, Any]) -> Cascade:
    tapped = TappedEncoder.build(
        c.encoder_,
        about["exits"],
        torch.zeros(1, *c.image_shape_),
        descriptor=about["descriptor"],
        accumulate=about["accumulate"],
        normalize=c.normalize,
    )
    rules = [rule_named(c.rule)(dim, c.n_clusters) for dim in tapped.seen]
    cascade = Cascade(tapped.eval(), rules, FinalClusters(arrays["final.centroids"], c.spherical))
    cascade.rules.load_state_dict({k[6:]: v for k, v in arrays.items() if k.startswith("rules.")})
    cascade.thresholds.copy_(arrays["thresholds"])
    return cascade.to(c._device())


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "model.json").read_text())
    except FileNotFoundError as error:
        raise InputError(f"{str(folder)!r} is no model: it has no model.json; see ExitClusterer.save") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {str(folder)!r}: model.json cannot be read ({error}); it is truncated or damaged"
        ) from error
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise InputError(f"{str(folder)!r} is no model of ssl_exit: model.json names no format")
    if about["format"] > FORMAT:
        raise InputError(
            f"model {str(folder)!r} has format {about['format']}, written by ssl_exit {about.get('version')}; this "
            f"version reads up to {FORMAT}: upgrade ssl_exit"
        )
    if about.pop("checksum", None) != _checksum(about):
        raise InputError(f"model {str(folder)!r}: model.json was changed since it was saved; save the model again")
    return about


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _checksum(about: dict[str, Any]) -> str:
    """Of the JSON itself, against damage; it is no signature."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A draft beside the folder that takes its place when all is written, and vanishes if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = draft.with_name(draft.name + "-old")
    try:
        yield draft
        draft.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A draft beside a file that takes its place when all is written, and vanishes if anything fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def write_labels(file: Path, names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> None:
    """Write one row an image, in input order: path, label, exit, score.

    An image that could not be used has label -1 and neither exit nor score.
    """
    with whole_file(file) as draft, draft.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(("path", "label", "exit", "score"))
        for name, label, exit_, score in zip(names, result.labels, result.exits, result.scores, strict=True):
            used = label >= 0
            rows.writerow((name, label, exit_names[exit_] if used else "", f"{score:.6f}" if used else ""))

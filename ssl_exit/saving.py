"""Saving a model, and reading it back."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ssl_exit.building import cut
from ssl_exit.cascade import Cascade
from ssl_exit.clusterer import ExitClusterer
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.compiling import can_compile
from ssl_exit.encoders.graph import as_module
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import Certificate
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.exits.registry import build_rules
from ssl_exit.fingerprint import module_hash
from ssl_exit.parameters import FIXED, check_parameters, usable_device
from ssl_exit.placement import ExitChoice
from ssl_exit.storage import WEIGHTS, read_model, write_model
from ssl_exit.timing import StageTimes, stage_times

SETTINGS = 100  # of the threshold path that are saved
REBUILT = ("encoder", "preprocessing")  # parameters that a saved model holds in another form


def save(c: ExitClusterer, folder: Path) -> None:
    """Write a fitted clusterer (see `ExitClusterer.save`); `load` reads it.

    Raises:
        InputError: the folder exists and holds anything else.
    """
    tapped = c.cascade_.tapped
    few = np.unique(np.linspace(0, len(c.threshold_path_) - 1, SETTINGS).round().astype(int))
    exits = c.cascade_.exits_state() | {
        "path": torch.from_numpy(c.threshold_path_[few]),
        "path_disagreement": torch.from_numpy(c.path_disagreement_[few]),
        "fit_images": torch.from_numpy(c.fit_images_.view(np.int64)),
    }
    exits |= {f"times.{k}": torch.from_numpy(v.copy()) for k, v in vars(c.times_).items()}
    about = {
        "encoder": {"spec": c.spec_.name if c.spec_ else None, "class": type(c.encoder_).__name__},
        "params": {k: v for k, v in c.get_params(deep=False).items() if k not in REBUILT} | c._fitted_with,
        "preprocessing": c.preprocessing.to_dict() if c.preprocessing else None,
        "image": c.image_shape_,
        "device": c.cascade_.thresholds.device.type,
        "exits": [point.name for point in c.exit_points_],
        "descriptor": [descriptor.kind for descriptor in tapped.descriptors],
        "accumulate": tapped.accumulate,
        "features": "the encoder's output" if tapped.output.layout == "vector" else "average of the output",
        "certificate": c._certificate.to_dict(),
        "exit_choices": [asdict(choice) for choice in c.exit_choices_],
        "skipped": c.skipped_,
        "n_fit": c.n_fit_,
        "n_sample": c.n_sample_,
    }
    write_model(folder, about, c.encoder_.state_dict(), exits)


def load(
    folder: str | Path,
    encoder: nn.Module | Sequence[nn.Module] | None = None,
    device: str = "auto",
    *,
    audit: float | None = None,
    compile: bool | None = None,
) -> ExitClusterer:
    """Read a model that `ExitClusterer.save` wrote.

    Args:
        folder: the model.
        encoder: a module of the same architecture, for models whose encoder was given as a module; it is
            copied, and filled with the saved weights. Models saved with an EncoderSpec build their own; for
            "module:function" that imports the module from the Python path.
        device: where to run: "auto" or what torch.device takes.
        audit, compile: other values than those the model was fitted with.

    Raises:
        InputError: the folder is no model, truncated, changed since it was written, of a newer format, or
            needs an encoder; or an audit that cannot be.
    """
    folder = Path(folder)
    about, weights, exits = read_model(folder)
    spec = about["encoder"]["spec"]
    if encoder is None and spec is None:
        raise InputError(
            f"model {str(folder)!r} was fitted with a {about['encoder']['class']} given as a module: "
            "load(folder, encoder=that module)"
        )
    filled = copy.deepcopy(EncoderSpec(spec).build() if encoder is None else as_module(encoder)).cpu().eval()
    try:
        filled.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the encoder given does not fit model {str(folder)!r}: {error}") from error
    changed = {"device": device, "audit": audit, "compile": compile}
    c = ExitClusterer(
        filled if spec is None else EncoderSpec(spec, str(folder / WEIGHTS)),
        preprocessing=Preprocessing(**about["preprocessing"]) if about["preprocessing"] else None,
        **about["params"] | {name: value for name, value in changed.items() if value is not None},
    )
    check_parameters(c.get_params(deep=False))
    example = torch.zeros(1, *about["image"])
    tapped = cut(filled, c.get_params(deep=False), about["exits"], example, about["descriptor"], about["accumulate"])
    rules = build_rules(c.rule, tapped.seen, c.n_clusters, c.rule_options)
    final: Final = FinalClasses(c.n_clusters)
    if not c.supervised:
        final = FinalClusters(exits["final.centroids"], c.spherical)
    c.cascade_ = Cascade(tapped, rules, final, AcrossExits(c.patience, c.ensemble))
    c.cascade_.rules.load_state_dict({k[6:]: v for k, v in exits.items() if k.startswith("rules.")})
    c.cascade_.thresholds.copy_(exits["thresholds"])
    c.cascade_.times = StageTimes(**{k[6:]: v.numpy() for k, v in exits.items() if k.startswith("times.")})
    c.cascade_.to(usable_device(c.device))
    device_ = c.cascade_.thresholds.device
    c.cascade_.compiles = c.compile and can_compile(device_)
    if about["device"] != device_.type:  # what was measured there says nothing of here
        c.cascade_.times = stage_times(c.cascade_, torch.randn(min(c.batch_size, 16), *about["image"]))
    c.encoder_, c.spec_ = filled, EncoderSpec(spec) if spec else None
    c._fitted_with = {name: getattr(c, name) for name in FIXED}
    c._cut_from = module_hash(filled)
    c.image_shape_ = tuple(about["image"])
    c._certificate = Certificate.from_dict(about["certificate"])
    c.fit_images_ = exits["fit_images"].numpy().view(np.uint64)
    c._watch()
    c.skipped_ = {int(position): reason for position, reason in about["skipped"].items()}
    c.exit_choices_ = [ExitChoice(**choice) for choice in about["exit_choices"]]
    c.threshold_path_, c.path_disagreement_ = exits["path"].numpy(), exits["path_disagreement"].numpy()
    c.n_fit_, c.n_sample_ = about["n_fit"], about["n_sample"]
    if c.certificate_.void:
        warnings.warn(f"model {str(folder)!r}: the certificate is {c.certificate_}", stacklevel=2)
    return c

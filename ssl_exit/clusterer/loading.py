"""Saved models as estimators."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ssl_exit.clusterer.estimator import ExitClusterer
from ssl_exit.data.preprocessing import Transform
from ssl_exit.storage import WEIGHTS, Supplied, load_model


def load(
    folder: str | Path,
    encoder: nn.Module | Sequence[nn.Module] | None = None,
    device: str = "auto",
    *,
    trust: str | None = None,
    front: nn.Module | None = None,
    head: Callable[[Any], Any] | None = None,
    transform: Transform | None = None,
    audit: float | None = None,
    compile: bool | None = None,
) -> ExitClusterer:
    """Read a model that `ExitClusterer.save` wrote; no code of others runs unless you name it in `trust`.

    Args:
        folder: the model.
        encoder: a module of the same architecture, for models whose encoder was passed as a module; it is
            copied, and filled with the saved weights. Models saved with an EncoderSpec build their own.
        device: where to run: "auto" or what torch.device takes.
        trust: the "module:function" of a model whose encoder is built by code of yours: the one that may be imported
            from the Python path and called.
        front: a module of the same architecture as the front, for models with one of your own.
        head: that of the fit, for models with one of your own; a module is filled with the saved weights.
        transform: that of the fit, for models whose preprocessing is a `Transform`.
        audit, compile: other values than those the model was fitted with.

    Raises:
        InputError: the folder is no model, truncated, changed since it was written, of a newer format, needs an
            encoder, or names code that is not trusted; or an audit that cannot be.
    """
    changes: dict[str, dict[str, Any]] = {
        "calibration": {} if audit is None else {"audit": audit},
        "runtime": {} if compile is None else {"compile": compile},
    }
    model = load_model(folder, Supplied(encoder, front, head, transform, trust), device, **changes)
    network = replace(model.spec, weights=str(Path(folder) / WEIGHTS)) if model.spec and head is None else model.encoder
    parameters = model.settings.parameters() | {"front": replace(model.settings.front, network=front)}
    c = ExitClusterer(network, **parameters, preprocessing=model.preprocessing)
    c._hold(model)
    return c

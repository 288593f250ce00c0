"""Ways of training and kinds of views by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.registry import keyword_options
from ssl_exit.settings import Optimization
from ssl_exit.training.contrastive import MoCo, SimCLR
from ssl_exit.training.distillation import SelfDistillation
from ssl_exit.training.module import ExitTraining
from ssl_exit.training.views import DrawingViews, PhotoViews, light_views, moco_views, simclr_views

METHODS: dict[str, type[ExitTraining]] = {"simclr": SimCLR, "moco": MoCo, "distill": SelfDistillation}
VIEWS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "simclr": simclr_views,
    "moco": moco_views,
    "light": light_views,
    "drawing": lambda size: DrawingViews(),
}


def build_training(
    method: str,
    tapped: TappedEncoder,
    preprocessing: Preprocessing,
    *,
    views: str = "auto",
    optimization: Optimization | None = None,
    options: Mapping[str, Any] | None = None,
) -> ExitTraining:
    """A way of training by name.

    Args:
        method: "simclr", "moco" or "distill".
        tapped: the encoder and its exits.
        preprocessing: size of the views, and how they are standardised.
        views: "simclr", "moco", "light" or "drawing"; "auto": those of the method, "light" for "distill".
        optimization: see `Optimization`.
        options: keyword arguments of the method, such as {"temperature": 0.2}.

    Raises:
        InputError: no such method, views or option, or a value out of range.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {sorted(METHODS)}; got {method!r}")
    views = {"distill": "light"}.get(method, method) if views == "auto" else views
    if views not in VIEWS:
        raise InputError(f"views must be 'auto' or one of {sorted(VIEWS)}; got {views!r}")
    known = sorted(keyword_options(METHODS[method]))
    for option in options or {}:
        if option not in known:
            raise InputError(f"method {method!r} has no option {option!r}; it has {known}")
    make = VIEWS[views](preprocessing.size)
    if isinstance(make, PhotoViews) and not (options or {}).get("mirror", True):
        make = replace(make, flip=0.0)
    return METHODS[method](tapped, make, preprocessing, optimization or Optimization(), **dict(options or {}))

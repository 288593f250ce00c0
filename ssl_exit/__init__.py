"""Label-free early exit for clustering with self-supervised encoders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssl_exit.errors import InputError

if TYPE_CHECKING:
    from ssl_exit.clusterer import ExitClusterer, load
    from ssl_exit.data.preprocessing import Preprocessing, Transform
    from ssl_exit.encoders.build import EncoderSpec
    from ssl_exit.encoders.graph import list_exits
    from ssl_exit.exits.rules import ExitRule
    from ssl_exit.settings import Calibration, Clusters, Exits, Front, Rule, Runtime

__version__ = "0.5.0"
__all__ = ["Calibration", "Clusters", "EncoderSpec", "ExitClusterer", "ExitRule", "Exits", "Front", "InputError",
           "Preprocessing", "Rule", "Runtime", "Transform", "__version__", "list_exits", "load"]  # fmt: skip

_MODULES = {
    "ExitClusterer": "clusterer",
    "load": "clusterer",
    "Preprocessing": "data.preprocessing",
    "Transform": "data.preprocessing",
    "EncoderSpec": "encoders.build",
    "list_exits": "encoders.graph",
    "ExitRule": "exits.rules",
} | dict.fromkeys(("Calibration", "Clusters", "Exits", "Front", "Rule", "Runtime"), "settings")


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `ssl-exit --help` must not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

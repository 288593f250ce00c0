"""The parameters of the estimator: names, defaults, nested names, and checks."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, fields, replace
from numbers import Number
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from torch import nn

from ssl_exit.data.preprocessing import Preprocessing, Transform
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.inference import usable_device
from ssl_exit.errors import InputError
from ssl_exit.exits.final import centroids_in
from ssl_exit.exits.registry import check_rule
from ssl_exit.settings import GROUPS, Calibration, Clusters, Exits, Front, Rule, Runtime, Settings
from ssl_exit.settings.clustering import is_head

_DEFAULT = Settings()


@dataclass(eq=False, repr=False)
class Parameters(BaseEstimator):
    """What `ExitClusterer` is made with; see there."""

    encoder: nn.Module | Sequence[nn.Module] | EncoderSpec
    n_clusters: int | np.ndarray | Any = _DEFAULT.n_clusters
    exits: Exits | str | Sequence[str] = _DEFAULT.exits
    rule: Rule | str = _DEFAULT.rule
    front: Front | str | nn.Module | None = None
    max_disagreement: float = _DEFAULT.max_disagreement
    confidence: float = _DEFAULT.confidence
    batch_size: int = _DEFAULT.batch_size
    device: str | torch.device = _DEFAULT.device
    random_state: int = _DEFAULT.random_state
    _: KW_ONLY
    clusters: Clusters = _DEFAULT.clusters
    calibration: Calibration | str = _DEFAULT.calibration
    runtime: Runtime = _DEFAULT.runtime
    preprocessing: Preprocessing | Transform | None = None

    def __sklearn_clone__(self) -> Self:
        """scikit-learn's clone; a fitted k-means or head stays fitted, since it is the parameter."""
        kept = ("n_clusters", "clusters")
        own = self.get_params(deep=False)
        return type(self)(**{k: deepcopy(v) if k in kept else clone(v, safe=False) for k, v in own.items()})

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name; with `deep`, the fields of groups too, as "rule__name"."""
        params = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, group in GROUPS.items() if deep else []:
            own = group.of(params[name])
            params |= {f"{name}__{f.name}": getattr(own, f.name) for f in fields(own)}  # type: ignore[arg-type]
        return params

    def set_params(self, **params: Any) -> Self:
        """Change parameters, fields of groups by nested names such as `rule__name`.

        Raises:
            InputError: an unknown name, or a field of a group that cannot have this value.
        """
        known = {f.name for f in fields(self)}
        known |= {f"{name}__{f.name}" for name, group in GROUPS.items() for f in fields(group)}  # type: ignore[arg-type]
        for name in params:
            if name not in known:
                raise InputError(f"ExitClusterer has no parameter {name!r}; it has {sorted(known)}")
        new = {name: value for name, value in params.items() if "__" not in name}
        for name, group in GROUPS.items():
            changes = {key.partition("__")[2]: value for key, value in params.items() if key.startswith(name + "__")}
            if changes:
                new[name] = replace(group.of(new.get(name, getattr(self, name))), **changes)  # type: ignore[type-var]
        for name, value in new.items():
            setattr(self, name, value)
        return self

    def settings(self) -> Settings:
        """All parameters but encoder and preprocessing, checked.

        Raises:
            InputError: the first value that is not legal, by name.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Settings)}
        values |= {name: group.of(values[name]) for name, group in GROUPS.items()} | {"device": str(self.device)}
        if is_head(self.n_clusters):
            values |= {"n_clusters": "auto", "clusters": replace(values["clusters"], head=self.n_clusters)}
        elif not isinstance(self.n_clusters, (Number, str, type(None))):
            centroids, spherical = centroids_in(self.n_clusters)
            values["n_clusters"], rows = len(centroids), tuple(map(tuple, centroids.tolist()))
            clusters = values["clusters"]
            spherical = clusters.spherical if spherical is None else spherical
            values["clusters"] = replace(clusters, centroids=rows, spherical=spherical)
        settings = Settings(**values)
        if not isinstance(self.preprocessing, (Preprocessing, Transform, type(None))):
            raise InputError(
                f"preprocessing must be an ssl_exit.Preprocessing or None; got {type(self.preprocessing).__name__}: "
                "wrap any other function of a PIL image as ssl_exit.Transform(name, function)"
            )
        check_rule(settings.rule.name, settings.rule.options)
        usable_device(settings.device)
        return settings

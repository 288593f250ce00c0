"""Stages, exits and thresholds joined: a record, and what every exit says of images that do not leave."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.result import NOT_FINITE
from ssl_exit.cascade.times import StageTimes
from ssl_exit.data.images import Batch
from ssl_exit.data.transfer import on_device
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.final import Final
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import NEVER


@dataclass(frozen=True, eq=False)
class Cascade:
    """Stages, exits and thresholds; a value.

    Attributes:
        tapped: the staged encoder and its descriptors, on the device in use.
        rules: a fitted rule for each exit, E.
        final: the label function on final features, such as the final clusters.
        across: patience and ensembling over exits.
        thresholds: leave at exit e with label k if score >= thresholds[e, k]; (E, K) float32, inf = never; read-only.
        times: of stages and exits, as measured.
    """

    tapped: TappedEncoder
    rules: tuple[ExitRule, ...]
    final: Final
    across: AcrossExits
    thresholds: np.ndarray
    times: StageTimes | None = None

    def __post_init__(self) -> None:
        thresholds = np.array(self.thresholds, dtype=np.float32)
        thresholds.flags.writeable = False
        object.__setattr__(self, "thresholds", thresholds)

    @classmethod
    def closed(cls, tapped: TappedEncoder, rules: Sequence[ExitRule], final: Final, across: AcrossExits) -> "Cascade":
        """A cascade whose thresholds let nothing exit, on the device of the encoder."""
        device = tapped.device
        never = np.full((len(rules), final.n_clusters), NEVER)
        return cls(tapped, tuple(rule.to(device) for rule in rules), final.to(device), across, never)

    @property
    def device(self) -> torch.device:
        return self.tapped.device

    @property
    def exit_names(self) -> list[str]:
        """Names for the numbers in `ExitResult.exits`: the exit points, and "end"."""
        return [*(point.name for point in self.tapped.staged.exit_points), "end"]

    @property
    def costs(self) -> np.ndarray:
        """Multiply-adds spent when leaving at each exit and at the end / the full encoder's, (E + 1,); every exit
        does its work."""
        return exit_costs(self.tapped, self.rules, self.final)

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides where an image leaves and with which label."""
        return {
            "exits": self.exit_names[:-1],
            "descriptors": [(d.kind, d.normalize) for d in self.tapped.descriptors],
            "accumulate": self.tapped.accumulate,
            "patience": self.across.patience,
            "ensemble": self.across.ensemble,
            "precision": str(self.tapped.dtype),
            "final": [type(self.final).__name__, getattr(self.final, "spherical", None)],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the encoder, by name: rules, what gives the final label, thresholds."""
        named = {f"rules.{i}.{k}": v for i, rule in enumerate(self.rules) for k, v in rule.state_dict().items()}
        named |= {f"final.{k}": v for k, v in self.final.state_dict().items()}
        return named | {"thresholds": torch.from_numpy(self.thresholds.copy())}

    def timed(self, times: StageTimes) -> "Cascade":
        """The same cascade with measured times."""
        return replace(self, times=times)

    def at(self, thresholds: np.ndarray) -> "Cascade":
        """The same cascade with other thresholds, (E, K)."""
        return replace(self, thresholds=thresholds)


def exit_costs(
    tapped: TappedEncoder, rules: Sequence[ExitRule], final: Final, used: np.ndarray | None = None
) -> np.ndarray:
    """Multiply-adds spent when leaving at each exit and at the end / the full encoder's, (E + 1,).

    Args:
        tapped, rules, final: of a cascade.
        used: exits that do their work, (E,) bool; None: all.
    """
    full = sum(tapped.staged.macs) + final.macs
    own = np.array([d.macs + rule.macs for d, rule in zip(tapped.descriptors, rules, strict=True)], dtype=np.int64)
    own = own if used is None else own * used
    return np.cumsum(np.array(tapped.staged.macs) + np.append(own, final.macs)) / full


@dataclass(frozen=True)
class Described:
    """Images walked through all stages.

    Attributes:
        indices: positions of usable images, (N,) int64.
        descriptors: of all exits side by side, (N, dim).
        features: final features, (N, F).
        skipped: position and reason of each image that could not be used.
    """

    indices: Tensor
    descriptors: Tensor
    features: Tensor
    skipped: dict[int, str]


def describe(tapped: TappedEncoder, batches: Iterable[Batch]) -> Iterator[Described]:
    """Descriptors and final features, batch by batch, on the encoder's device; images whose pixels or final features
    are not finite are skipped."""
    for batch in on_device(batches, tapped.device):
        if len(batch.indices) == 0:
            empty = torch.empty(0, tapped.dim), torch.empty(0, tapped.output.dim)
            yield Described(batch.indices, *empty, batch.skipped)
            continue
        finite = finite_images(batch.images)  # before an encoder changes them in place
        with torch.inference_mode():
            descriptors, features = tapped(tapped.enter(batch.images))
            usable = finite.to(features.device) & features.isfinite().all(1)
            rows = usable.cpu()
            if not rows.all():
                descriptors, features = descriptors[usable], features[usable]
        skipped = batch.skipped | dict.fromkeys(batch.indices[~rows].tolist(), NOT_FINITE)
        yield Described(batch.indices[rows], descriptors, features, skipped)


def finite_images(images: Tensor) -> Tensor:
    """Which images have finite pixels only: (N, C, H, W) -> (N,) bool."""
    flat = images.flatten(1)
    if images.device.type == "cpu" and flat.sum(1).isfinite().all():  # a tenth of the time; finite pixels may overflow
        return torch.ones(len(images), dtype=torch.bool)
    return flat.isfinite().all(1)

"""An encoder made ready for a fit: with the user's head, cut at its exit points, checked and timed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.cascade.times import stage_times
from ssl_exit.encoders.front import FrontDescriptor
from ssl_exit.encoders.head import with_head
from ssl_exit.encoders.inference import usable_device
from ssl_exit.encoders.opaque import features_of
from ssl_exit.encoders.repeatable import check_repeatable as check_encoder
from ssl_exit.encoders.stages import WIDEST
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.settings import Settings


def headed_encoder(encoder: nn.Module, example: Tensor, settings: Settings) -> tuple[nn.Module, Settings]:
    """The encoder with the user's head, whose labels are the classes of the supervised mode."""
    n_labels = None if settings.n_clusters == "auto" else settings.n_clusters
    headed = with_head(encoder, settings.clusters.head, n_labels)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        n_logits = features_of(headed(example.clone()), example).shape[1]
    clusters = replace(settings.clusters, supervised=True, head=None)
    return headed, replace(settings, n_clusters=n_logits if n_labels is None else n_labels, clusters=clusters)


@dataclass(frozen=True)
class Cutter:
    """Cuts the encoder into stages, with descriptors, on the device in use."""

    encoder: nn.Module
    example: Tensor
    settings: Settings

    def __call__(
        self,
        points: str | Sequence[str],
        descriptor: str | Sequence[str],
        accumulate: bool = True,
        fronts: Sequence[FrontDescriptor] = (),
    ) -> TappedEncoder:
        tapped = TappedEncoder.build(
            self.encoder,
            points,
            self.example,
            descriptor=descriptor,
            accumulate=accumulate,
            normalize=self.settings.exits.normalize,
            fronts=fronts,
        )
        ready = tapped.for_inference(self.settings.runtime.precision, self.example.shape[1:])
        return ready.to(usable_device(self.settings.device))

    def only(self, tapped: TappedEncoder, kept: Sequence[int]) -> TappedEncoder:
        """Some of the exits of a cut alone, with the same descriptors."""
        points, kinds = tapped.staged.exit_points, [descriptor.kind for descriptor in tapped.descriptors]
        return self([points[i].name for i in kept], [kinds[i] for i in kept], tapped.accumulate)

    @property
    def across(self) -> AcrossExits:
        return AcrossExits(self.settings.exits.patience, self.settings.exits.ensemble)

    def timed(self, cascade: Cascade) -> Cascade:
        """With measured times; where the multiply-adds of the encoder cannot be counted, as many as its time is worth
        by that of the fronts."""
        times = stage_times(cascade.tapped, cascade.rules, cascade.final, self.example)
        staged = cascade.tapped.staged
        fronts = [d for d in cascade.tapped.descriptors if isinstance(d, FrontDescriptor)]
        if sum(staged.macs) == 0 and fronts:
            rate = max(1, sum(front.macs for front in fronts)) / times.exit_seconds[: len(fronts)].sum()
            staged.macs = [*staged.macs[:-1], max(1, round(rate * times.stage_seconds[-1]))]
        return cascade.timed(times)


def check_repeatable(encoder: nn.Module, tapped: TappedEncoder, example: Tensor, settings: Settings) -> None:
    def features(images: Tensor) -> Tensor:
        return tapped.final_features(tapped.enter(images))

    def own_features(images: Tensor) -> Tensor:
        return tapped.output(features_of(encoder(images), images))

    with torch.random.fork_rng(devices=[]):  # an encoder that draws random numbers draws from the global generator
        check_encoder(encoder, features, own_features, example, settings.runtime.precision)


def check_fronts(tapped: TappedEncoder, settings: Settings) -> None:
    """Raise InputError, before fronts are taught, where exits behind them cannot be what was asked for."""
    check_patience(settings, len(tapped.seen))
    if settings.exits.accumulate and not tapped.accumulate and len(tapped.fronts) > 1:
        raise InputError(
            f"descriptors of the exits have more than {WIDEST} entries and cannot accumulate; with several fronts set "
            'descriptor="average", name fewer exits, or set accumulate=False'
        )


def check_patience(settings: Settings, n_exits: int) -> None:
    if settings.exits.patience > n_exits:
        raise InputError(
            f"patience {settings.exits.patience} lets nothing leave at {n_exits} exits; lower it or name more exits"
        )

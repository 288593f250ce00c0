"""A staged encoder together with the descriptor at each of its exit points."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ssl_exit.encoders.descriptors import Descriptor, layout_of
from ssl_exit.encoders.front import FrontDescriptor
from ssl_exit.encoders.graph import eval_mode
from ssl_exit.encoders.inference import PRECISIONS, for_inference
from ssl_exit.encoders.stages import WIDEST, StagedEncoder, behind, split
from ssl_exit.encoders.tracing import ADVICE
from ssl_exit.errors import InputError


class TappedEncoder(nn.Module):
    """Stages, and the descriptors computed between them.

    Attributes:
        staged: the encoder, cut at its exit points; before them, one stage that changes nothing for each front.
        fronts: networks on the images, the descriptors of the first exits.
        descriptors: one for each exit point, fronts included.
        output: pools the encoder's output to final features, (N, F): vectors as they are, maps and tokens by
            their average.
        accumulate: whether an exit sees the descriptors of all earlier exits beside its own.
        dtype: in which stages take images.
        channels_last: whether they take them in that memory format.
    """

    _anchor: Tensor

    def __init__(
        self,
        staged: StagedEncoder,
        descriptors: Sequence[Descriptor | FrontDescriptor],
        output: Descriptor,
        accumulate: bool,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.staged = staged
        self.descriptors = list(descriptors)
        self.fronts = nn.ModuleList(d for d in descriptors if isinstance(d, FrontDescriptor))
        self.output = output
        self.accumulate = accumulate
        self.dtype, self.channels_last = dtype, channels_last
        ends = [0]
        for descriptor in self.descriptors:
            ends.append(ends[-1] + descriptor.dim)
        self.columns = [slice(0 if accumulate else a, b) for a, b in pairwise(ends)]
        self.dim = ends[-1]
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # tells the device

    @classmethod
    def build(
        cls,
        encoder: nn.Module | Sequence[nn.Module],
        exits: Sequence[str] | str,
        example: Tensor,
        *,
        descriptor: str | Sequence[str] = "auto",
        accumulate: bool = True,
        normalize: bool = False,
        fronts: Sequence[FrontDescriptor] = (),
    ) -> "TappedEncoder":
        """Cut an encoder and choose its descriptors; parameters are shared with it.

        Args:
            encoder: the network, or a list of modules that are its stages.
            exits: names of exit points in the encoder, or "auto"; none if there are fronts.
            example: images as the encoder takes them, (N, C, H, W).
            descriptor: "average", "pyramid", "tokens" or "flatten"; a list of those, one an exit; or "auto": the
                pyramid for maps and tokens for sequences if all descriptors together have at most 4,096 entries,
                else the average.
            accumulate: let each exit see the descriptors of earlier exits too (see `columns`); where they would
                have more than 4,096 entries, each exit sees its own.
            normalize: divide each descriptor by its L2 norm, except features of fronts.
            fronts: to stand before the encoder.

        Raises:
            InputError: from `split`, or a descriptor that does not fit.
        """
        staged = split(encoder, exits, example)
        if not staged.exit_points and exits == "auto":
            raise InputError(
                "the encoder has no exit point between 5 % and 95 % of its cost: more than one tensor is alive there. "
                f"{ADVICE}; or name exits yourself, see list_exits(encoder, example)"
            )
        image = (example.shape[-2], example.shape[-1])
        shapes = [point.shape for point in staged.exit_points]
        layouts = [layout_of(shape, image) for shape in shapes]
        if descriptor == "auto":
            rich = ["tokens" if layout == "tokens" else "pyramid" for layout in layouts]
            kinds = rich
            if sum(Descriptor(*args).dim for args in zip(rich, shapes, layouts, strict=True)) > WIDEST:
                kinds = ["average"] * len(shapes)
        else:
            kinds = [descriptor] * len(shapes) if isinstance(descriptor, str) else list(descriptor)
            if len(kinds) != len(shapes):
                raise InputError(f"got {len(kinds)} descriptors for {len(shapes)} exits; expected one for each exit")
        descriptors: list[Descriptor | FrontDescriptor] = [*fronts]
        descriptors += [Descriptor(*args, normalize) for args in zip(kinds, shapes, layouts, strict=True)]
        accumulate = accumulate and sum(d.dim for d in descriptors[len(fronts) :]) <= WIDEST
        with torch.no_grad(), eval_mode(staged):
            shape = _checked_output(staged(example[:1])).shape[1:]
        layout = layout_of(tuple(shape), image)
        staged = behind(len(fronts), example.shape[1:], staged)
        return cls(staged, descriptors, Descriptor("average", tuple(shape), layout), accumulate)

    def for_inference(self, precision: str, image: Sequence[int]) -> "TappedEncoder":
        """A copy rewritten for speed (see `for_inference`); this one is left unchanged.

        Batch norms are folded and maps laid out channels last if the encoder then still computes the same in float32,
        on two images of noise; one whose code depends on strides, such as `x.view(...)` of a map, runs as it is.

        Args:
            precision: "float32" or "bfloat16".
            image: shape of an image, (C, H, W).

        Raises:
            InputError: the encoder does not run in that precision.
        """
        noise = torch.randn(2, *image, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = self._copied("float32", rewrite=False).final_features(noise.clone())
            fast = self._copied("float32", rewrite=True)
            try:
                features = fast.final_features(fast.enter(noise))
                same = bool((features - expected).norm() <= 1e-3 * expected.norm() + 1e-6)
            except RuntimeError:
                same = False
            copied = self._copied(precision, rewrite=same)
            try:
                copied(copied.enter(noise))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"the encoder does not run in {precision} ({reason}); use float32") from error
        return copied

    def _copied(self, precision: str, *, rewrite: bool) -> "TappedEncoder":
        dtype = PRECISIONS[precision]
        stages = [for_inference(stage, dtype, rewrite=rewrite) for stage in self.staged.stages]
        staged = StagedEncoder(stages, self.staged.exit_points, self.staged.macs)
        descriptors = [d.for_inference(precision) if isinstance(d, FrontDescriptor) else d for d in self.descriptors]
        return TappedEncoder(staged, descriptors, self.output, self.accumulate, dtype, rewrite).eval()

    def enter(self, images: Tensor) -> Tensor:
        """Images, (N, C, H, W) float32 on any device, as the first stage takes them."""
        maps = self.channels_last and images.dim() == 4
        layout = torch.channels_last if maps else torch.contiguous_format
        there = images.to(self.device, non_blocking=True)
        return there.to(self.dtype).contiguous(memory_format=layout)  # both in one call take twice as long

    @property
    def device(self) -> torch.device:
        return self._anchor.device

    @property
    def seen(self) -> list[int]:
        """Entries of the descriptor that each exit sees."""
        return [columns.stop - columns.start for columns in self.columns]

    def final_features(self, images: Tensor) -> Tensor:
        """Final features, (N, F), without any descriptor."""
        return self.output(self.staged(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """All descriptors side by side, (N, dim), and final features, (N, F)."""
        described = [torch.empty(len(images), 0, device=images.device)]  # there may be no exit
        *stages, last = self.staged.stages
        x = images
        for stage, descriptor in zip(stages, self.descriptors, strict=True):
            x = stage(x)
            described.append(descriptor(x))
        return torch.cat(described, dim=1), self.output(last(x))


def _checked_output(features: Tensor) -> Tensor:
    """What the encoder returned for one image.

    Raises:
        InputError: it is no dense tensor of real numbers with one row an image and at least one feature.
    """
    usable = isinstance(features, Tensor) and features.is_floating_point() and features.dim() >= 2
    if not usable or features.layout != torch.strided or features.is_meta or len(features) != 1 or not features.numel():
        got = type(features).__name__
        if isinstance(features, Tensor):
            kind = "meta" if features.is_meta else str(features.layout).removeprefix("torch.")
            got = f"a {kind} tensor of shape {tuple(features.shape)} and dtype {features.dtype}"
        raise InputError(
            f"the encoder must return, for each image, one row of at least one floating-point feature in a dense "
            f"tensor, (N, ...); for one image it returned {got}"
        )
    return features

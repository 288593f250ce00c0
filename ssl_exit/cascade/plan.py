"""What a cascade runs while certain exits let images leave: segments, costs, and which of them are compiled."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.cascade.cascade import Cascade, exit_costs
from ssl_exit.encoders.compiling import call_compiled, can_compile, compile_for_inference, warn_uncompiled


class Segment(nn.Module):
    """Stages run as one, and the exit at their end, or the end of the encoder.

    Attributes:
        stages: their indices.
        exit: the index of the exit at which images may leave; None at the end of the encoder.
        described: exits whose descriptor is computed on the way, because this exit or a later one sees it.
        asked: exits whose rule answers on the way; the last is `exit`.
    """

    thresholds: Tensor

    def __init__(
        self, cascade: Cascade, stages: range, exit_: int | None, described: Sequence[int], asked: Sequence[int]
    ) -> None:
        super().__init__()
        self.stages, self.exit, self.described, self.asked = stages, exit_, described, asked
        tapped = cascade.tapped
        descriptors = [tapped.descriptors[i] if i in described else None for i in stages]
        rules = [cascade.rules[i] if i in asked else None for i in stages]
        modules = list(tapped.staged.stages)[stages.start : stages.stop]
        self._steps = list(zip(stages, modules, descriptors, rules, strict=True))
        self._output, self._accumulate = tapped.output, tapped.accumulate
        self._final, self._across = cascade.final, cascade.across
        self._state = cascade.across.width(cascade.final.n_clusters)
        row = cascade.thresholds[slice(0) if exit_ is None else exit_].copy()
        self.register_buffer("thresholds", torch.from_numpy(row).to(cascade.device), persistent=False)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One run.

        Args:
            x: the tensor at the exit point before, (N, ...).
            memory: what exits know of each other (see `AcrossExits`) and descriptors so far, (N, width + d).

        Returns:
            The first two after this segment; labels, scores and who leaves here, (N,) each. At the end of the
            encoder all leave, with score 1, or NaN where the label is -1.
        """
        state, seen = (memory[:, : self._state], memory[:, self._state :]) if self._state else (None, memory)
        for i, stage, descriptor, rule in self._steps:
            x = stage(x)
            if descriptor is not None:
                own = descriptor(x)
                seen = torch.cat([seen, own], dim=1) if self._accumulate else own
            if rule is not None:
                if state is None:
                    labels, scores = rule(seen)
                else:
                    labels, scores, state = self._across.decide(rule, rule.logits(seen), state, i)
        carried = seen if self._accumulate else seen[:, :0]
        memory = carried if state is None else torch.cat([state, carried], dim=1)
        if self.exit is None:
            labels = self._final(self._output(x))
            scores = torch.where(labels >= 0, 1.0, torch.nan)
            return x, memory, labels, scores, torch.ones_like(labels, dtype=torch.bool)
        return x, memory, labels, scores, scores >= self.thresholds.index_select(0, labels)


class Plan:
    """A cascade cut into segments at its live exits: those that let an image leave.

    Exits at which nothing can leave, and that no later live exit builds on, do no work; their stages are joined to the
    next. Made from a cascade, of which it keeps compiled programs.

    Attributes:
        cascade: what is run.
        segments: one after another.
        used: whether each exit works, (E,) bool.
        costs: multiply-adds spent when leaving at each exit and at the end / the full encoder's, (E + 1,).
        compiled: whether full batches run through torch.compile; turned off, with a warning, where that fails.
    """

    def __init__(self, cascade: Cascade, live: Sequence[bool] | None = None, *, compile: bool = False) -> None:
        """Make a plan.

        Args:
            cascade: what to run.
            live: exits that let images leave, (E,); None: those whose thresholds do. None of them: the full encoder.
            compile: run full batches through torch.compile where it works.
        """
        self.cascade = cascade
        here: np.ndarray = np.array((cascade.thresholds <= 1).any(1) if live is None else live, dtype=bool)
        depends = cascade.tapped.accumulate or cascade.across.active
        self.used: np.ndarray = np.logical_or.accumulate(here[::-1])[::-1] if depends else here
        self.costs = exit_costs(cascade.tapped, cascade.rules, cascade.final, self.used)
        self.segments = []
        start = 0
        for exit_ in [*np.flatnonzero(here).tolist(), None]:
            stages = range(start, (len(here) if exit_ is None else exit_) + 1)
            described = [i for i in stages if i < len(here) and self.used[i]]
            asked = described if cascade.across.active else [i for i in described if i == exit_]
            self.segments.append(Segment(cascade, stages, exit_, described, asked))
            start = stages.stop
        self.compiled = compile and can_compile(cascade.device)
        for segment in self.segments if self.compiled else []:
            compile_for_inference(segment, cascade.device)

    @classmethod
    def of_full_encoder(cls, cascade: Cascade, *, compile: bool = False) -> "Plan":
        """A plan in which nothing leaves early and no exit works."""
        return cls(cascade, [False] * len(cascade.rules), compile=compile)

    def enter(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, (N, C, H, W), as the first segment takes them, and their empty memory, (N, width)."""
        x, across = self.cascade.tapped.enter(images), self.cascade.across
        return x, across.begin(len(x), self.cascade.final.n_clusters, x.device)

    def call(self, segment: Segment, x: Tensor, memory: Tensor, *, full_batch: bool) -> tuple[Tensor, ...]:
        """Run one segment (see `Segment.forward`); compiled for a full batch, where the plan compiles."""
        if full_batch and self.compiled:
            try:
                return call_compiled(segment, x, memory)
            except Exception as error:  # whatever the compiler raises; what the images raise is raised again below
                result = segment.forward(x, memory)
                warn_uncompiled(error)
                self.compiled = False
                return result
        return segment.forward(x, memory)

    def compacting_pays(self, segment: Segment, before: int, after: int) -> bool:
        """Whether to move survivors together before a segment: `after` of `before` images go on."""
        times = self.cascade.times
        return times is None or times.compacting_pays(segment.stages, before, after)

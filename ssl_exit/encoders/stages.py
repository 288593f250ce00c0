"""Splitting an encoder at exit points into stages that resume where the last one stopped."""

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from ssl_exit.encoders.constants import PerImage
from ssl_exit.encoders.graph import ExitPoint, TracedEncoder, as_module, constant_name, stage_nodes, trace
from ssl_exit.encoders.opaque import OpaqueEncoder, multiply_adds
from ssl_exit.errors import InputError

MOST_EXITS = 8  # that "auto" considers
WIDEST = 4096  # entries of an (accumulated) descriptor; its covariance then takes 134 MB in float64


class StagedEncoder(nn.Module):
    """An encoder cut at its exit points; running all stages equals running the encoder, bit for bit.

    Attributes:
        stages: one module a stage; it takes the tensor at one exit point to the tensor at the next.
        exit_points: the points between the stages, one fewer than the stages.
        macs: multiply-adds per image of each stage.
    """

    def __init__(self, stages: Sequence[nn.Module], exit_points: Sequence[ExitPoint], macs: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.exit_points = list(exit_points)
        self.macs = list(macs)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def split(encoder: nn.Module | Sequence[nn.Module], exits: Sequence[str] | str, example: Tensor) -> StagedEncoder:
    """Cut an encoder into stages; they share its parameters.

    Args:
        encoder: the network, or a list of modules that are its stages.
        exits: names of exit points ("layer2" means its last node), "auto", or none: one stage, for which the encoder
            need not be traceable.
        example: images as the encoder takes them, (N, C, H, W).

    Raises:
        InputError: an exit that is not a legal exit point, or an encoder that cannot be traced.
    """
    try:
        traced = trace(encoder, example)
    except InputError:
        if len(exits):
            raise
        module = as_module(encoder)
        whole = module if isinstance(module, OpaqueEncoder) else OpaqueEncoder(module)
        return StagedEncoder([whole], [], [multiply_adds(whole, example)])
    if exits == "auto":
        chosen = choose_exits(traced.points)
    elif isinstance(exits, str):
        raise InputError(f'exits must be "auto" or a list of names; got {exits!r}')
    else:
        chosen = sorted({traced.resolve(name) for name in exits})
    points = [traced.points[i] for i in chosen]
    nodes = [traced.nodes[i] for i in chosen]
    stages = [_stage_module(traced, body) for body in stage_nodes(traced, nodes)]
    at = [0] + [round(point.cost * traced.macs) for point in points] + [traced.macs]
    return StagedEncoder(stages, points, [b - a for a, b in pairwise(at)])


def behind(n_fronts: int, image_shape: Sequence[int], staged: StagedEncoder) -> StagedEncoder:
    """The same encoder with an exit point at its input for each front: images pass them unchanged, at no cost."""
    names = ["front"] if n_fronts == 1 else [f"front{i}" for i in range(1, n_fronts + 1)]
    points = [ExitPoint(name, tuple(image_shape), 0.0) for name in names]
    stages = [*(nn.Identity() for _ in names), *staged.stages]
    return StagedEncoder(stages, [*points, *staged.exit_points], [0] * n_fronts + staged.macs)


def choose_exits(points: Sequence[ExitPoint], most: int = MOST_EXITS) -> list[int]:
    """Indices of at most `most` exit points spread evenly over the cost between 5 % and 95 %.

    Near each place, within half the distance to the next, the point with the smallest tensor is taken: describing and
    moving it is cheaper. Of points at one cost (a convolution, its normalisation, its activation) the last is taken.
    Vectors of more than `WIDEST` entries (maps flattened for a classifier) are left out.
    """
    narrow = [i for i, point in enumerate(points) if len(point.shape) > 1 or point.shape[0] <= WIDEST]
    last_at_cost = {round(points[i].cost, 4): i for i in narrow}
    usable = [i for cost, i in last_at_cost.items() if 0.05 <= cost <= 0.95]
    targets = [(j + 1) / (most + 1) for j in range(most)]

    def worth(i: int, target: float) -> tuple[float, float]:
        far = abs(points[i].cost - target)
        return (math.prod(points[i].shape), far) if far <= 0.5 / (most + 1) else (math.inf, far)

    return sorted({min(usable, key=lambda i: worth(i, t)) for t in targets}) if usable else []


def _stage_module(traced: TracedEncoder, body: list[fx.Node]) -> nn.Module:
    """A module that runs `body`, taking the one tensor that enters it."""
    inside = set(body)
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}  # nodes, or constants
    entering = [n for node in body for n in node.all_input_nodes if n in traced.dependent and n not in inside]
    images = graph.placeholder("x")
    copies.update(dict.fromkeys(entering, images))

    def constant(value: Any, name: str) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(constant(entry, name) for entry in value)
        if isinstance(value, Tensor):
            return graph.get_attr(name)
        if not isinstance(value, PerImage):
            return value
        n = graph.call_method("size", (images, 0))
        if isinstance(value.unit, Tensor):
            return graph.call_method("expand", (graph.get_attr(name), n, *[-1] * (value.unit.dim() - 1)))
        return graph.call_function(operator.mul, (n, value.unit))

    def copy(node: fx.Node) -> Any:
        if node in traced.constants and node not in copies:
            copies[node] = constant(traced.constants[node].value, constant_name(node))
        elif node not in copies:
            for source in node.all_input_nodes:
                copy(source)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        return copies[node]

    for node in body:
        copy(node)
    if body[-1].op != "output":
        graph.output(copies[body[-1]])
    return fx.GraphModule(traced.root, graph)

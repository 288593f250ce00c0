"""Exit points: the places of an encoder's graph at which exactly one tensor crosses.

The encoder is traced with torch.fx and named as torchvision's feature extraction names nodes. A node is
a legal exit point if, once it has run, it is the only value alive that depends on the images. A node that
does not depend on them (a parameter, a constant made from parameters) belongs to every stage that uses it. What depends
on their height and width only, such as rotary position embeddings, is computed once and is a constant of the stages.
"""

import copy
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssl_exit.encoders.chain import Chain
from ssl_exit.encoders.counting import NoFusedAttention, flop_counter
from ssl_exit.encoders.head import Head
from ssl_exit.encoders.huggingface import chained
from ssl_exit.encoders.opaque import OpaqueEncoder
from ssl_exit.errors import InputError


@dataclass(frozen=True)
class ExitPoint:
    """A place between two layers at which one tensor, with the batch in dimension 0, crosses.

    Attributes:
        name: the node's qualified name, as torchvision's feature extraction spells it.
        shape: the tensor's shape without the batch, e.g. (C, H, W).
        cost: multiply-adds spent once this point is reached / those of the full encoder, in [0, 1].
    """

    name: str
    shape: tuple[int, ...]
    cost: float


@dataclass(frozen=True)
class TracedEncoder:
    """An encoder's graph, the names of its nodes and what each node costs.

    Attributes:
        root: the encoder itself, or a shallow copy with constants; stages made from the graph share its parameters.
        graph: the graph with the images as its only placeholder.
        names: qualified name of each node.
        points: legal exit points, in the order in which they run.
        nodes: the graph node of each legal exit point.
        dependent: the nodes that depend on the images.
        constants: values of nodes that depend on their height and width only; tensors are buffers of `root` by the
            name `constant_name` gives.
        macs: multiply-adds per image of the full encoder.
    """

    root: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]
    points: list[ExitPoint]
    nodes: list[fx.Node]
    dependent: set[fx.Node]
    constants: dict[fx.Node, Any]
    macs: int

    def resolve(self, name: str) -> int:
        """Index into `points` of an exit by name; a module's name means its last node.

        Raises:
            InputError: no such node, or one at which more than one tensor crosses.
        """
        matches = [n for n in self.names.values() if n == name]
        matches = matches or [n for n in self.names.values() if n.startswith(name + ".")]
        legal = [point.name for point in self.points]
        if matches and matches[-1] in legal:
            return legal.index(matches[-1])
        order = list(self.names.values())
        if matches:
            at = order.index(matches[-1])
            nearest = sorted(legal, key=lambda n: abs(order.index(n) - at))[:3]
            why = "is not an exit point: more than one tensor is alive there, or it lies outside the stages"
        else:
            nearest = get_close_matches(name, legal, n=3, cutoff=0.0)
            why = "names no node"
        raise InputError(
            f"exit {name!r} {why} of {type(self.root).__name__}; nearest legal: {nearest}; "
            "list_exits(encoder, example) shows all"
        )


def list_exits(encoder: nn.Module | Sequence[nn.Module], example: Tensor) -> list[ExitPoint]:
    """The legal exit points of an encoder, in the order in which they run.

    Args:
        encoder: the network, images to features; or a list of modules, run in order, whose joints are
            the exit points (for networks that cannot be traced). It is left unchanged.
        example: images as the encoder takes them, (N, C, H, W); only the first is used.

    Raises:
        InputError: the encoder's graph cannot be traced, or the encoder rejects the example.
    """
    return trace(encoder, example).points


def as_module(encoder: nn.Module | Sequence[nn.Module] | Callable[[Tensor], Any]) -> nn.Module:
    """The encoder itself, out of what torch.compile and parallel training wrap around it; a vision model of
    transformers as a chain of its layers; the modules of a list one after another; or a callable as a module.

    Raises:
        InputError: none of these.
    """
    if isinstance(encoder, nn.Module):
        return chained(_unwrapped(encoder))
    if callable(encoder) and not isinstance(encoder, type):
        return OpaqueEncoder(encoder)
    if not isinstance(encoder, Sequence) or not encoder or not all(isinstance(m, nn.Module) for m in encoder):
        raise InputError(
            "an encoder is a torch.nn.Module, a list of them, or with a front any callable from images to features; "
            f"got {encoder!r}"
        )
    return Chain(encoder)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's; the backbone of a
    LightningModule."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile's OptimizedModule, whose class is private
            module = module.get_submodule("_orig_mod")
        elif not any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):
            return module
        elif isinstance(getattr(module, "backbone", None), nn.Module):
            module = module.get_submodule("backbone")
        else:
            warnings.warn(
                f"{type(module).__name__} has no `backbone` and is taken as the encoder, with any projection head; "
                "pass the part of it that gives the features",
                stacklevel=4,
            )
            return module


def trace(encoder: nn.Module | Sequence[nn.Module], example: Tensor) -> TracedEncoder:
    """Trace an encoder, find its legal exit points and count multiply-adds (see `list_exits`)."""
    root = as_module(encoder)
    if isinstance(root, OpaqueEncoder):
        raise InputError("a callable that is no torch.nn.Module has no exit points; put a front before it")
    if isinstance(root, torch.jit.ScriptModule):
        raise InputError(
            "a module of torch.jit has no exit points; pass the one it was made from, or put a front before it"
        )
    if not isinstance(example, Tensor) or example.dim() < 2 or len(example) == 0:
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise InputError(f"the example must be a tensor of images, (N, C, H, W), with N >= 1; got {got}")
    with eval_mode(root):
        graph, names = _symbolic_graph(root)
        dependent = _depends_on_images(graph)
        module = fx.GraphModule(root, graph)
        shaped = _depends_on_shape(graph, dependent)
        two, three = (_Meter(module, shaped) for _ in range(2))
        for meter, n in ((two, 2), (three, 3)):
            meter.measure(example[:1].expand(n, *example.shape[1:]).clone())
    constants = {node: value for node, value in two.values.items() if _same(value, three.values.get(node))}
    dependent -= constants.keys()
    if tensors := {constant_name(node): value for node, value in constants.items() if isinstance(value, Tensor)}:
        root = copy.copy(root)
        root._buffers = {**root._buffers, **tensors}
    macs = sum(flops for _, flops in two.seen.values()) // 4  # a multiply-add is two operations, and two images ran
    spent = 0
    points, nodes = [], []
    crossing = _single_crossings(graph, dependent)
    for node in graph.nodes:
        shape, flops = two.seen.get(node, (None, 0))
        spent += flops // 4
        other = three.seen.get(node, (None, 0))[0]
        if node in crossing and shape and other and shape[0] == 2 and other[0] == 3 and shape[1:] == other[1:]:
            points.append(ExitPoint(names[node], shape[1:], spent / max(macs, 1)))
            nodes.append(node)
    return TracedEncoder(root, graph, names, points, nodes, dependent, constants, macs)


def constant_name(node: fx.Node) -> str:
    """Name of the buffer that holds the value of a node."""
    return f"constant_{node.name}"


class eval_mode:
    """Hold a module in eval mode for a while; every submodule gets its own mode back."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode


def _symbolic_graph(root: nn.Module) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """The fx graph of a module with every optional input bound to its default, and its node names."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    optional = [p for p in parameters[1:] if p.default is not inspect.Parameter.empty]
    from torchvision.models.feature_extraction import NodePathTracer  # takes as long to import as torch

    tracer = NodePathTracer(**_tracer_options(root))
    try:
        graph = tracer.trace(root, concrete_args={p.name: p.default for p in optional})
    except Exception as error:  # fx re-raises whatever the encoder's own code met
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_tracing_code(f.filename)]
        where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "its own code"
        raise InputError(
            f"{type(root).__name__} cannot be traced by torch.fx: {error} (at {where}). Expected a forward() free of "
            "control flow that depends on the images. Put a front before it (front='auto'), behind which it need not "
            "be cut; or pass the stages as a list of modules, run in order"
        ) from error
    names = dict(tracer.node_to_qualname)
    _, *bound = [node for node in graph.nodes if node.op == "placeholder"]
    checks = [node for node in graph.nodes if "has been specialized" in str(node.args) and node.op == "call_function"]
    conditions = [source for node in checks for source in node.all_input_nodes if source not in bound]
    for node in [*checks, *conditions, *bound]:
        graph.erase_node(node)
        names.pop(node, None)
    for node in graph.nodes:
        if node.op == "output" and not isinstance(node.args[0], fx.Node):
            raise InputError(f"the encoder must return one tensor; {type(root).__name__} returns {node.args[0]!r}")
    return graph, {node: name for node, name in names.items() if node.op not in ("output", "placeholder")}


def _is_tracing_code(filename: str) -> bool:
    return any(
        part in filename for part in ("torch/fx/", "torch/_", "torch/nn/modules/module", "ssl_exit/encoders/graph")
    )


def _tracer_options(root: nn.Module) -> dict[str, Any]:
    """What torchvision, and timm where the encoder is timm's, hold to be leaves of the graph."""
    from torchvision.models import feature_extraction

    options: dict[str, Any] = feature_extraction._set_default_tracer_kwargs(None)
    options["leaf_modules"] = [*options["leaf_modules"], Head]
    if isinstance(root, Chain):
        options["leaf_modules"] = [*options["leaf_modules"], *{type(m) for m in root.parts()}]
    elif any(type(part).__module__.startswith("timm.") for part in root.modules()):
        timm_layers = sys.modules["timm.layers"]
        options["leaf_modules"] = [*options["leaf_modules"], *timm_layers.get_notrace_modules()]
        options["autowrap_functions"] = tuple(timm_layers.get_notrace_functions())
    return options


def _depends_on_images(graph: fx.Graph) -> set[fx.Node]:
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    return dependent


def _depends_on_shape(graph: fx.Graph, dependent: set[fx.Node]) -> set[fx.Node]:
    """Of the nodes that depend on the images, those that do so by shape, type and device only."""
    shaped: set[fx.Node] = set()
    for node in graph.nodes:
        if node in dependent and node.op in ("call_function", "call_method", "call_module"):
            reads = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
            reads = reads or (node.op == "call_method" and node.target in ("size", "dim"))
            if reads or all(source in shaped for source in node.all_input_nodes if source in dependent):
                shaped.add(node)
    return shaped


def _same(one: Any, other: Any) -> bool:
    """Whether values of batches of two sizes make a constant; types and devices do not, which a model changes."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other)) and not any(isinstance(v, Tensor) for v in one)
    return isinstance(one, (bool, int, float)) and one == other


def _single_crossings(graph: fx.Graph, dependent: set[fx.Node]) -> set[fx.Node]:
    """Nodes after which no other node that depends on the images has a user yet to run."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    crossing = set()
    latest_use = -1  # of every dependent node that ran before
    for i, node in enumerate(graph.nodes):
        if node not in dependent:
            continue
        own = max((order[user] for user in node.users), default=-1)
        beyond = any(user.op != "output" for user in node.users)  # the output itself is the end, not an exit
        if latest_use <= i < own and node.op != "placeholder" and beyond:
            crossing.add(node)
        latest_use = max(latest_use, own)
    return crossing


class _Meter(fx.Interpreter):
    """Runs a graph once and records, per node, the shape of its tensor and its floating-point operations; and the
    values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.seen: dict[fx.Node, tuple[tuple[int, ...] | None, int]] = {}
        self.values: dict[fx.Node, Any] = {}

    def measure(self, images: Tensor) -> None:
        try:
            with torch.no_grad(), NoFusedAttention():
                self.run(images)
        except Exception as error:
            raise InputError(
                f"the encoder cannot take images of shape {tuple(images.shape[1:])} and dtype {images.dtype}: {error}. "
                "Use images as the encoder expects them (size, channels, dtype)"
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        with flop_counter() as counter:
            value = super().run_node(n)
        shape = tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None
        self.seen[n] = (shape, counter.get_total_flops())
        if n in self.wanted:
            self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def stage_nodes(traced: TracedEncoder, exits: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The image-dependent nodes of each stage, for exits in the order in which they run."""
    boundary = set(exits)
    stage: list[fx.Node] = []
    for node in traced.graph.nodes:
        if node in traced.dependent and node.op != "placeholder":
            stage.append(node)
        if node in boundary:
            yield stage
            stage = []
    yield stage

"""Exit points: the places of an encoder's graph at which exactly one tensor crosses.

A node of the graph is a legal exit point if, once it has run, it is the only value alive that depends on the images. A
node that does not depend on them (a parameter, a constant made from parameters) belongs to every stage that uses it.
What depends on their height, width and number only, such as shapes and rotary position embeddings, is a constant of the
stages.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssl_exit.encoders.chain import Chain
from ssl_exit.encoders.constants import Constant, constant_of, tensor_in
from ssl_exit.encoders.counting import NoFusedAttention, flop_counter
from ssl_exit.encoders.huggingface import chained
from ssl_exit.encoders.opaque import OpaqueEncoder
from ssl_exit.encoders.tracing import ADVICE, first_line, symbolic_graph
from ssl_exit.errors import InputError

SHAPE_ONLY = {"size", "dim", "new_zeros", "new_ones", "new_full", torch.zeros_like, torch.ones_like, torch.full_like}


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
        constants: values of nodes that depend on their height, width and number only; tensors are buffers of `root` by
            the name `constant_name` gives.
        macs: multiply-adds per image of the full encoder.
    """

    root: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]
    points: list[ExitPoint]
    nodes: list[fx.Node]
    dependent: set[fx.Node]
    constants: dict[fx.Node, Constant]
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
    one = example[:1]
    another = 1 - one if one.is_floating_point() else one.flip(-1)
    with eval_mode(root):
        graph, names, read = symbolic_graph(root)
        dependent = _depends_on_images(graph)
        module = fx.GraphModule(copied := _with_constants(root, read), graph)
        two, three = (_Meter(module, _depends_on_shape(graph, dependent)) for _ in range(2))
        for meter, images in ((two, one.repeat_interleave(2, 0)), (three, another.repeat_interleave(3, 0))):
            try:
                meter.measure(images)
            except Exception as error:  # whatever the encoder's own code raises
                raise _refusal(root, images, error) from error
    found = {node: constant_of(two.values[node], three.values[node]) for node in dependent & two.values.keys()}
    constants = {node: constant for node, constant in found.items() if constant and node.users}
    dependent -= constants.keys()
    tensors = {constant_name(node): tensor_in(constant.value) for node, constant in constants.items()}
    root = _with_constants(copied, {name: tensor for name, tensor in tensors.items() if tensor is not None})
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


def _with_constants(root: nn.Module, tensors: dict[str, Any]) -> nn.Module:
    """A shallow copy with more buffers; the module itself if there are none."""
    if not tensors:
        return root
    root = copy.copy(root)
    root._buffers = {**root._buffers, **tensors}
    return root


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
            attribute = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
            read = node.args[0] if node.args and (attribute or node.target in SHAPE_ONLY) else None
            if all(source in shaped for source in node.all_input_nodes if source in dependent and source is not read):
                shaped.add(node)
    return shaped


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
    """Runs a graph once and records, per node, the shape of its tensor and its floating-point operations; and values
    that may be constants: of some nodes, and all that are no tensors."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # in the messages of errors
        self.wanted = wanted
        self.seen: dict[fx.Node, tuple[tuple[int, ...] | None, int]] = {}
        self.values: dict[fx.Node, Any] = {}

    def measure(self, images: Tensor) -> None:
        with torch.no_grad(), NoFusedAttention():
            self.run(images)

    def run_node(self, n: fx.Node) -> Any:
        with flop_counter() as counter:
            value = super().run_node(n)
        shape = tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None
        self.seen[n] = (shape, counter.get_total_flops())
        if n in self.wanted or not isinstance(value, Tensor):
            self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _refusal(root: nn.Module, images: Tensor, error: Exception) -> InputError:
    """Why a graph does not run: the encoder itself does not take the images, or not the graph."""
    try:
        with torch.no_grad():
            root(images.clone())
    except Exception as own:  # whatever the encoder's own code raises
        return InputError(
            f"the encoder cannot take images of shape {tuple(images.shape[1:])} and dtype {images.dtype}: "
            f"{first_line(own)}. Use images as the encoder expects them (size, channels, dtype)"
        )
    return InputError(
        f"{type(root).__name__} cannot be cut: its graph, as torch.fx traces it, does not run on {len(images)} images "
        f"({first_line(error)}). {ADVICE}"
    )


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

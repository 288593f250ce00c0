"""An encoder as a graph of torch.fx, with the names that torchvision's feature extraction gives nodes."""

import copy
import inspect
import sys
import traceback
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from ssl_exit.encoders.chain import Chain
from ssl_exit.encoders.head import Head
from ssl_exit.errors import InputError

ADVICE = (
    "Put a front before it (front='auto'), behind which it need not be cut; or pass the stages as a list of modules, "
    "run in order"
)


class SymbolicGraph(NamedTuple):
    """What tracing gives.

    Attributes:
        graph: with the images as its only placeholder.
        names: qualified name of each node but the images and the output.
        constants: tensors that the graph reads from attributes which the module itself does not have.
    """

    graph: fx.Graph
    names: dict[fx.Node, str]
    constants: dict[str, Any]


def symbolic_graph(root: nn.Module) -> SymbolicGraph:
    """The graph of a module, every optional input bound to its default. The module is left as it is.

    Raises:
        InputError: it cannot be traced, or returns more than one tensor.
    """
    parameters = list(inspect.signature(root.forward).parameters.values())
    optional = [p for p in parameters[1:] if p.default is not inspect.Parameter.empty]
    from torchvision.models.feature_extraction import NodePathTracer  # takes as long to import as torch

    tracer = NodePathTracer(**_tracer_options(root))
    twin = _twin(root)
    try:
        graph = tracer.trace(twin, concrete_args={p.name: p.default for p in optional})
    except Exception as error:  # fx re-raises whatever the encoder's own code met
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_tracing_code(f.filename)]
        where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "its own code"
        reason = first_line(error)
        if isinstance(error, TraceError) or "Proxy" in reason:
            reason = "values of the images, or numbers that follow from them, decide what its code does"
        raise InputError(f"{type(root).__name__} cannot be cut: {reason} (at {where}). {ADVICE}") from error
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
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    constants = {name: getattr(twin, name) for name in read if "." not in name and not hasattr(root, name)}
    inner = {node: name for node, name in names.items() if node.op not in ("output", "placeholder")}
    return SymbolicGraph(graph, inner, constants)


def first_line(error: Exception) -> str:
    """What an error says, without what frameworks add to it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _SharedTensors(TorchFunctionMode):
    """Within it, copy.deepcopy shares tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _twin(root: nn.Module) -> nn.Module:
    """A copy that shares all tensors: caches that forward() fills while it is traced hold nodes, not tensors, and would
    be in the way of the next call."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*root.parameters(), *root.buffers()]}
    try:
        with _SharedTensors():
            return copy.deepcopy(root, shared)
    except Exception as error:  # whatever the encoder's attributes raise
        raise InputError(
            f"{type(root).__name__} cannot be copied: {first_line(error)}. Expected a module that copy.deepcopy takes"
        ) from error


def _is_tracing_code(filename: str) -> bool:
    ours = ("torch/fx/", "torch/_", "torch/nn/modules/module", "ssl_exit/encoders/tracing")
    return any(part in filename for part in ours)


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

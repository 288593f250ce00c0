"""What runs: the device, and copies of stages rewritten for speed (batch norms folded, channels last, bfloat16)."""

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ssl_exit.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode(False)  # a parameter made in it cannot be moved to another device and used there
@torch.no_grad()
def for_inference(stage: nn.Module, dtype: torch.dtype, *, rewrite: bool) -> nn.Module:
    """A copy of a stage in eval mode.

    Args:
        stage: stays as it is.
        dtype: of weights and activations; the statistics of nn.BatchNorm stay in float32.
        rewrite: fold batch norms and lay weights out channels last. A stage whose code looks at strides or inside its
            modules may then compute something else, or fail: to be tried.
    """
    fast = copy.deepcopy(stage).eval().requires_grad_(False)
    if not rewrite:
        return _cast(fast, dtype)
    if isinstance(fast, fx.GraphModule):
        _fold_in_graph(fast)
    _fold_in_sequences(fast)
    fast = _cast(fast, dtype)
    for parameter in fast.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return fast


def _cast(stage: nn.Module, dtype: torch.dtype) -> nn.Module:
    stage = stage.to(dtype)
    for module in stage.modules():
        if isinstance(module, NORMS):
            module.float()
    return stage


def _fold_in_graph(stage: fx.GraphModule) -> None:
    """Replace a convolution and the batch norm behind it by one convolution, where nothing else uses either."""
    modules = dict(stage.named_modules(remove_duplicate=False))
    nodes = [node for node in stage.graph.nodes if node.op == "call_module"]
    uses = Counter(id(modules[str(node.target)]) for node in nodes)
    for node in nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = stage.get_submodule(str(before.target)), modules[str(node.target)]
        once = uses[id(modules[str(before.target)])] == uses[id(norm)] == 1
        if once and _foldable(convolution, norm):
            fused = fuse_conv_bn_eval(convolution, norm)  # type: ignore[type-var]
            parent, _, name = str(before.target).rpartition(".")
            setattr(stage.get_submodule(parent), name, fused)  # set_submodule came with torch 2.5
            node.replace_all_uses_with(before)
            stage.graph.erase_node(node)
    stage.recompile()
    stage.delete_all_unused_submodules()


def _fold_in_sequences(stage: nn.Module) -> None:
    """The same inside nn.Sequential modules that tracing leaves whole, such as torchvision's Conv2dNormActivation."""
    uses = Counter(id(child) for parent in stage.modules() for child in parent._modules.values())
    for parent in list(stage.modules()):
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        for i in reversed(range(len(parent) - 1)):
            convolution, norm = parent[i], parent[i + 1]
            if uses[id(convolution)] == uses[id(norm)] == 1 and _foldable(convolution, norm):
                parent[i] = fuse_conv_bn_eval(convolution, norm)  # type: ignore[type-var, arg-type]
                parent[i + 1] = nn.Identity()  # what is counted from the front stays in its place


def _foldable(convolution: nn.Module, norm: nn.Module) -> bool:
    return type(convolution) in CONVOLUTIONS and type(norm) in NORMS and bool(norm.track_running_stats)


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        InputError: it does not exist or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device

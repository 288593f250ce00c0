"""Encoders that come as a chain of modules, which are their stages."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class Chain(nn.Module):
    """Modules run in order and never traced into: stages of the user's.

    Attributes:
        order: names of the modules, dotted as in a module of modules; "stage0", "stage1", ... if they have none.
    """

    def __init__(self, modules: Sequence[nn.Module] | Mapping[str, nn.Module]) -> None:
        super().__init__()
        named = modules if isinstance(modules, Mapping) else {f"stage{i}": m for i, m in enumerate(modules)}
        self.order = list(named)
        for name, module in named.items():
            *path, leaf = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, module)

    def parts(self) -> list[nn.Module]:
        """The modules in order; one that stands here twice is there twice."""
        return [self.get_submodule(name) for name in self.order]

    def forward(self, x: Tensor) -> Tensor:
        for module in self.parts():
            x = module(x)
        return x

"""Exit rules by name. A rule of your own registers itself when its module is imported (see docs/extend.md)."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_exit.errors import InputError
from ssl_exit.exits import (  # noqa: F401  a rule registers where its class is made
    branchynet,
    centroid,
    e2cm,
    eenet,
    mahalanobis,
    means,
    mlp,
    own_clusters,
    sdn,
)
from ssl_exit.exits.combined import CombinedRule
from ssl_exit.exits.rules import RULES, ExitRule


def rule_classes(name: str) -> list[type[ExitRule]]:
    """The class of a rule, or the classes of those joined as "a+b".

    Raises:
        InputError: no rule of that name.
    """
    names = str(name).split("+")
    for each in names:
        if each not in RULES:
            raise InputError(
                f"rule {each!r} does not exist; choose one of {sorted(RULES)}, or two joined as 'a+b'; a rule of your "
                "own is known once the module that defines it is imported"
            )
    return [RULES[each] for each in names]


def keyword_options(cls: type) -> set[str]:
    """Names of the options a class takes: the keyword arguments of it and of the classes it derives from."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names |= {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return names


def check_rule(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise InputError if there is no such rule or if it takes no such options."""
    classes = rule_classes(name)
    known = set[str]().union(*(keyword_options(rule) for rule in classes))
    for option in options or {}:
        if option not in known:
            raise InputError(f"rule {name!r} has no option {option!r}; it has {sorted(known) or 'none'}")


def build_rules(
    name: str, dims: Sequence[int], n_clusters: int, options: Mapping[str, Any] | None = None
) -> list[ExitRule]:
    """Unfitted rules, one for each exit.

    Args:
        name: of a rule; "a+b" combines two (see `CombinedRule`).
        dims: entries of the descriptor at each exit.
        n_clusters: K.
        options: keyword arguments of the rule; of two that are combined, each takes those it knows.

    Raises:
        InputError: no such rule, or an option that it does not have or cannot use.
    """
    check_rule(name, options)

    def build(rule: type[ExitRule], dim: int) -> ExitRule:
        return rule(dim, n_clusters, **{k: v for k, v in (options or {}).items() if k in keyword_options(rule)})

    classes = rule_classes(name)
    each = [[build(rule, dim) for rule in classes] for dim in dims]
    return [parts[0] if len(parts) == 1 else CombinedRule(parts) for parts in each]

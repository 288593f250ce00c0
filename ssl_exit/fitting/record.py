"""What every exit says of held-out images, without leaving."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.cascade import Cascade, Described, describe
from ssl_exit.data.images import Batch
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded


@dataclass(frozen=True)
class Logits:
    """Of every exit, with the full encoder's label; those of shards join with `+`.

    Attributes:
        values: (n, E, width), 0 beyond a rule's own width.
        final: (n,) int64.
    """

    values: Tensor
    final: Tensor

    def __len__(self) -> int:
        return len(self.final)

    def __add__(self, other: "Logits") -> "Logits":
        return Logits(torch.cat([self.values, other.values]), torch.cat([self.final, other.final]))

    def of_each(self, rules: tuple[ExitRule, ...]) -> list[Tensor]:
        """One tensor an exit, (n, rule.width)."""
        return [self.values[:, i, : rule.width] for i, rule in enumerate(rules)]


@torch.inference_mode()
def _each_exit(cascade: Cascade, described: Described) -> list[Tensor]:
    columns = zip(cascade.rules, cascade.tapped.columns, strict=True)
    return [rule.logits(described.descriptors[:, seen]) for rule, seen in columns]


def record_logits(cascade: Cascade, batches: Iterable[Batch]) -> tuple[Logits, dict[int, str]]:
    """Logits of every exit, and position and reason of images that could not be used."""
    width = max(rule.width for rule in cascade.rules)
    values, final, skipped = [torch.empty(0, len(cascade.rules), width)], [torch.empty(0, dtype=torch.int64)], {}
    for described in describe(cascade.tapped, batches):
        skipped.update(described.skipped)
        if len(described.indices):
            each = [torch.nn.functional.pad(z, (0, width - z.shape[1])) for z in _each_exit(cascade, described)]
            logits = torch.stack(each, dim=1).cpu()
            good = logits.isfinite().flatten(1).all(1)
            values.append(logits[good])
            final.append(cascade.final(described.features).cpu()[good])
    return Logits(torch.cat(values).clone(), torch.cat(final).clone()), skipped


def record(cascade: Cascade, batches: Iterable[Batch]) -> tuple[Recorded, dict[int, str]]:
    """Labels and scores of every exit, and position and reason of images that could not be used."""
    result, skipped = Recorded.empty(len(cascade.rules)), {}
    parts = [result]
    for described in describe(cascade.tapped, batches):
        skipped.update(described.skipped)
        if len(described.indices):
            labels, scores = cascade.across.decide_all(cascade.rules, _each_exit(cascade, described))
            final = cascade.final(described.features)
            parts.append(Recorded(labels.cpu().numpy(), scores.cpu().numpy(), final.cpu().numpy()))
    return Recorded.joined(parts), skipped


def fit_temperatures(
    rules: tuple[ExitRule, ...], across: AcrossExits, logits: Logits
) -> tuple[tuple[ExitRule, ...], Recorded]:
    """Copies of the rules with temperatures fitted to logits, and what they say of those images."""
    if len(logits) == 0:
        return tuple(copy.deepcopy(rules)), Recorded.empty(len(rules))
    own = tuple(copy.deepcopy(rule).cpu() for rule in rules)
    each = logits.of_each(own)
    for rule, z in zip(own, each, strict=True):
        rule.fit_temperature(z, logits.final)
    labels, scores = across.decide_all(own, each)
    device = next(rules[0].buffers()).device
    return tuple(rule.to(device) for rule in own), Recorded(labels.numpy(), scores.numpy(), logits.final.numpy())


def mean_probabilities(rules: tuple[ExitRule, ...], logits: Logits) -> np.ndarray:
    """Mean probabilities at each exit by final cluster, (E, K, K), a row a cluster; uniform without images."""
    k = rules[0].n_clusters
    means = torch.full((len(rules), k, k), 1 / k)
    for i, (rule, z) in enumerate(zip(rules, logits.of_each(rules), strict=True)):
        p = copy.deepcopy(rule).cpu().log_probabilities(z).exp()
        for cluster in logits.final.unique():
            means[i, cluster] = p[logits.final == cluster].mean(0)
    return means.numpy()

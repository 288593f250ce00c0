"""Batch sizes, orders and parts that must not change an answer, and encoders that do not answer the same twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.trial import Attack, clusterer, digits, fitted, must
from ssl_exit import InputError
from ssl_exit.encoders.small import digits_encoder


def batchings(place: Path) -> Attack:
    """Batch sizes, orders and parts: labels and exits stay."""
    images = digits()
    cases = []
    for how in ({}, {"rule": "mlp", "ensemble": True}, {"rule": "e2cm", "patience": 2}):
        c = fitted(images[:1200], **how)
        alone = [c.run(image[None]) for image in images[1200:1500]]
        cases.append((c, np.array([one.labels[0] for one in alone]), np.array([one.exits[0] for one in alone])))

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        c, labels, exits = cases[rng.integers(len(cases))]
        order = rng.permutation(300)[: rng.integers(2, 300)]
        some = images[1200 + order]
        c.batch_size = int(rng.integers(1, 400))
        kind = ["run", "stream"][rng.integers(2)]
        if kind == "run":
            results = [c.run(some)]
        else:
            begin = int(rng.integers(len(some)))
            results = [c.run(some[:begin])] if begin else []
            results += c.stream(some, begin)
        must(np.array_equal(np.concatenate([r.labels for r in results]), labels[order]), "the labels are the same")
        must(np.array_equal(np.concatenate([r.exits for r in results]), exits[order]), "the exits are the same")
        return kind, "same labels and exits"

    return attack


class Odd(nn.Module):
    """An encoder whose features pass through a function of them and of the number of calls."""

    def __init__(self, function: Callable[[Tensor, int], Any]) -> None:
        super().__init__()
        self.encoder, self.function, self.calls = digits_encoder(), function, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.function(self.encoder(x).flatten(1), self.calls)


def encoders(place: Path) -> Attack:
    """Encoders that answer otherwise each time, or give what is no row of features an image."""
    images = digits()
    unsteady: dict[str, Callable[[Tensor, int, float], Any]] = {
        "dropout": lambda z, n, a: nn.functional.dropout(z, 0.1 + 0.8 * a),
        "noise": lambda z, n, a: z + (0.2 + a) * z.std() * torch.randn_like(z),
        "counter": lambda z, n, a: z + n * (0.5 + a) * z.std(),
        "batch statistics": lambda z, n, a: (z - z.mean(0)) / (z.std(0, correction=0) + 1e-3),
        "batch maximum": lambda z, n, a: z / z.abs().amax(),
        "position": lambda z, n, a: z + (1 + a) * torch.arange(len(z))[:, None],
        "alternating": lambda z, n, a: z if n % 2 else -z,
    }
    wrong: dict[str, Callable[[Tensor, int, float], Any]] = {
        "no features": lambda z, n, a: z[:, :0],
        "2N rows": lambda z, n, a: torch.cat([z, z]),
        "one row": lambda z, n, a: z.mean(0, keepdim=True),
        "meta": lambda z, n, a: z.to("meta"),
        "sparse": lambda z, n, a: z.to_sparse(),
        "integers": lambda z, n, a: z.int(),
        "complex": lambda z, n, a: z.to(torch.complex64),
        "text": lambda z, n, a: "features",
        "None": lambda z, n, a: None,
        "scalar": lambda z, n, a: z.sum(),
        "all NaN": lambda z, n, a: z * torch.nan,
        "error": lambda z, n, a: z.reshape(7, 11, 13),
        "numpy": lambda z, n, a: z.numpy(),
    }
    steady: dict[str, Callable[[Tensor, int, float], Any]] = {
        "plain": lambda z, n, a: z,
        "scaled": lambda z, n, a: z * (1e-6 + 1e6 * a),
        "double": lambda z, n, a: z.double(),
        "constant part": lambda z, n, a: torch.cat([z, torch.full_like(z[:, :3], a)], 1),
        "4-D": lambda z, n, a: z[:, :, None, None],
        "one feature": lambda z, n, a: z[:, :1],
    }
    ways = {name: (way, "refused") for name, way in (unsteady | wrong).items()}
    ways |= {name: (way, "fitted") for name, way in steady.items()}

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        kind = list(ways)[rng.integers(len(ways))]
        way, expected = ways[kind]
        amount = float(rng.uniform())
        torch.manual_seed(int(rng.integers(1000)))
        encoder: Any = Odd(lambda z, n: way(z, n, amount)).eval()
        front = "auto" if rng.integers(4) == 0 else None
        stages = encoder if front else [encoder, nn.Flatten()]
        how = {"device": "cpu", "max_disagreement": 0.1, "confidence": 0.5, "n_clusters": 3, "batch_size": 100}
        how |= {"front": "auto", "front_epochs": 1} if front else {"exits": ["stage0"]}
        try:
            c = clusterer(stages, **how).fit(images[:600])
            evaluation = c.evaluate(images[600:1100])
        except InputError:
            must(expected == "refused", f"{kind} is an encoder as others are")
            return kind, "refused"
        must(expected == "fitted", f"{kind} was fitted")
        must(evaluation.agreement > 0.8, f"agreement {evaluation.agreement} where 0.9 is certified")
        return kind, "fitted"

    return attack

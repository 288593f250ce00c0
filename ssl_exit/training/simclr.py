"""SimCLR, with the contrastive loss at the exits too where that is asked for.

What is minimised over encoder f and projection heads g_e, for two views x', x'' of every image:

    NTXent(g(f(x')), g(f(x''))) + w * mean_e NTXent(g_e(d_e(x')), g_e(d_e(x'')))

with NTXent of Chen et al. (arXiv 2002.05709, equation 1) and d_e the descriptor at exit e. With w = 0 it is
plain SimCLR.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from tqdm.auto import tqdm

from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError


def train_simclr(
    tapped: TappedEncoder,
    images: Tensor,
    augment: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    temperature: float = 0.2,
    exit_weight: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train an encoder in place; no labels are used.

    Args:
        tapped: the encoder and its exits; it is left in eval mode.
        images: (N, C, H, W) float, on the encoder's device.
        augment: a batch of images to a batch of random views of them.
        epochs: passes over the images.
        batch_size: images a step; each gives two views.
        learning_rate: peak of a one-cycle schedule for AdamW.
        temperature: of NTXent.
        exit_weight: w above.
        seed: of the order of images, the views and the heads.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: no epochs, fewer images than a batch holds, or a loss that is not finite.
    """
    if epochs < 1:
        raise InputError(f"epochs must be at least 1; got {epochs}")
    if len(images) < batch_size:
        raise InputError(f"{len(images)} images do not fill one batch of {batch_size}; lower batch_size")
    with seeded(seed):
        with torch.no_grad():
            features = tapped.eval()(images[:2])[1].shape[1]
        exits = tapped.descriptors if exit_weight else []
        heads = nn.ModuleList([_head(features), *(_head(d.dim) for d in exits)]).to(images.device)
        loss_of = NTXentLoss(temperature)
        steps = epochs * (len(images) // batch_size)
        parameters = [*tapped.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        ends = list(accumulate((d.dim for d in exits), initial=0))

        def projections(views: Tensor) -> Iterator[Tensor]:
            described, output = tapped(views)
            inputs = [output, *(described[:, a:b] for a, b in pairwise(ends))]
            return (head(x) for head, x in zip(heads, inputs, strict=True))

        tapped.train()
        bar = tqdm(total=steps, desc="train SimCLR", unit="step", disable=None if progress else True)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(batch_size):
                if len(chosen) < batch_size:
                    continue
                views = torch.cat([augment(images[chosen]), augment(images[chosen])])
                final, *early = (loss_of(*z.chunk(2)) for z in projections(views))
                loss = final + (exit_weight * sum(early) / len(early) if early else 0)
                if not math.isfinite(loss.item()):
                    raise InputError(f"the loss became {loss.item()} at step {bar.n}; lower learning_rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
        bar.close()
        tapped.eval()


def _head(dim: int) -> SimCLRProjectionHead:
    return SimCLRProjectionHead(dim, hidden_dim=128, output_dim=64)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed for a while; the global generators go on afterwards as if nothing had been."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

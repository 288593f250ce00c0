r"""Self-distillation: every exit learns the final clusters of the same image, the final layer is held to its own.

A round begins with a frozen copy of the encoder, the teacher. FAISS k-means on its final features gives centroids c_k
(matched to those of the round before, so that cluster k stays cluster k), and every image x a soft assignment

    t(x) = sharp(mean of softmax(cos(f(y), c) / T) over y),        sharp(p) = p^s / sum_k p_k^s

where y runs over the nearest neighbours of x (itself among them, up to 50,000 images) by the teacher's features, and
over their mirror images where `mirror` is set. What is minimised over the encoder f and a head h_e on the descriptor
d_e of each exit, for a view x' of the image:

    w H((1 - b) t(x) + b sharp(m(x')), softmax(cos(f(x'), p) / T')) + mean_e H(t(x), softmax(h_e(d_e(x'))))

with H the cross-entropy, w = final_weight, s = sharpness, b = mutual, m(x') = mean_e softmax(h_e(d_e(x'))), through
which no gradient flows, and p_k = c_k - mean_j c_j: centroids of a contrastive encoder point nearly the same way, and
k-means finds again only clusters that have moved apart. With b > 0 the final layer also gives way to its exits, and
keeps of an assignment what they can learn (deep mutual learning, Zhang et al., arXiv 1706.00384); with s > 1 it is
drawn away from the borders between clusters, where exits and end differ. Neighbours keep clusters true to the features
meanwhile (as in SCAN, Van Gansbeke et al., 2005.12320).

With exit_loss="eenet", EENets' objective takes the place of the mean over exits: heads have a confidence branch and the
loss counts what each exit costs (`EENetRule`), the targets being the clusters of largest t. As there, the first half of
a round trains the answers alone; unlike there the encoder is trained too, so the end is no constant.

No labels are used. Sources: self-distillation of exits, Zhang et al. (arXiv 1905.08094); k-means and training in turn,
DeepCluster, Caron et al. (1807.05520); EENets, Demir & Akbas (2409.05336).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.data.images import ImageSource
from ssl_exit.errors import InputError
from ssl_exit.exits.eenet import FIRST_STAGE, cost_aware_loss
from ssl_exit.exits.kmeans import kmeans, match_clusters
from ssl_exit.exits.rules import likeliest_temperature
from ssl_exit.training.loader import FullBatches
from ssl_exit.training.module import ExitTraining, frozen_copy

EXIT_LOSSES = ("soft", "eenet", "none")
BATCH = 512  # images the teacher sees at a time
BANK = 50_000  # images among which neighbours are sought
CLUSTERED = 256  # images a cluster that k-means sees, and at least 10,000


def _unchanged(pixels: Tensor) -> Tensor:
    return pixels


def _mirrored(pixels: Tensor) -> Tensor:
    return pixels.flip(3)


class SelfDistillation(ExitTraining):
    """Exits learn the final clusters (see above).

    Args:
        common: see `ExitTraining`; `light_views` suit it.
        n_clusters: K.
        rounds: of k-means and training in turn, of equally many epochs.
        exit_loss: "soft", "eenet", or "none": the final layer alone.
        final_weight: w; 0 lets the final layer follow what exits make of the layers below.
        final_temperature: T'; the lower, the less clusters move apart.
        temperature: T; None finds, in every round, the one at which an image's soft assignment best foretells the
            label of a view of it.
        mutual: b, in [0, 1).
        neighbours: images whose assignments are averaged, the image itself counted; 1: its own alone. They are sought
            among at most 50,000 images, each with each.
        sharpness: s.
        mirror: whether an image and its mirror image mean the same; photographs mostly do, writing does not.
        hidden: units of the heads' hidden layer.
        tradeoff: lambda of "eenet", what the full encoder's cost is worth in nats.

    Raises:
        InputError: numbers out of range.
    """

    n_views = 1
    centroids: Tensor
    temperature: Tensor

    def __init__(
        self,
        *common: Any,
        n_clusters: int = 10,
        rounds: int = 1,
        exit_loss: str = "soft",
        final_weight: float = 2.0,
        temperature: float | None = None,
        final_temperature: float = 0.1,
        mutual: float = 0.95,
        mirror: bool = True,
        hidden: int = 128,
        tradeoff: float = 1.0,
        neighbours: int = 50,
        sharpness: float = 3.0,
    ) -> None:
        super().__init__(*common)
        if exit_loss not in EXIT_LOSSES:
            raise InputError(f"exit_loss must be one of {EXIT_LOSSES}; got {exit_loss!r}")
        heat = 1.0 if temperature is None else temperature
        counts = {"n_clusters": n_clusters, "rounds": rounds, "hidden": hidden, "neighbours": neighbours}
        above = {"temperature": heat, "final_temperature": final_temperature, "sharpness": sharpness}
        weights = {"final_weight": final_weight, "tradeoff": tradeoff}
        if min(counts.values()) < 1 or min(above.values()) <= 0 or min(weights.values()) < 0:
            raise InputError(
                f"self-distillation needs {', '.join(counts)} >= 1, {', '.join(above)} > 0, "
                f"{' and '.join(weights)} >= 0; got {counts | above | weights}"
            )
        self.n_clusters, self.rounds, self.exit_loss = n_clusters, rounds, exit_loss
        if not 0 <= mutual < 1:
            raise InputError(f"mutual must lie in [0, 1); got {mutual}")
        named = {"exit_loss": exit_loss, "mutual": mutual, "mirror": mirror, "temperature": temperature}
        self.options = counts | above | weights | named
        self.mutual = mutual
        self.neighbours, self.sharpness = neighbours, sharpness
        self.final_temperature = final_temperature
        self.final_weight, self.tradeoff, self.mirror = final_weight, tradeoff, mirror
        self.fixed_temperature, self.answers_alone = temperature, False
        self.register_buffer("temperature", torch.tensor(heat))
        width = n_clusters + (exit_loss == "eenet")
        exits = [] if exit_loss == "none" else self.tapped.seen
        self.heads = nn.ModuleList(_head(dim, hidden, width) for dim in exits)
        self.teacher = frozen_copy(self.tapped)
        self.register_buffer("centroids", torch.zeros(n_clusters, self.tapped.output.dim))
        macs = torch.tensor(self.tapped.staged.macs, dtype=torch.float64).cumsum(0)
        self.costs = (macs / macs[-1]).float()

    def attach(self, source: ImageSource, positions: np.ndarray, seed: int) -> None:
        self.source, self.positions, self.seed = source, positions, seed
        self.batches = FullBatches(source)
        self.targets = torch.zeros(0, self.n_clusters)

    def on_train_epoch_start(self) -> None:
        epochs = self.trainer.max_epochs or 1
        if self.rounds > epochs:
            raise InputError(f"{self.rounds} rounds do not fit into {epochs} epochs; a round is at least one")
        begins = [r * epochs // self.rounds for r in range(self.rounds + 1)]
        current = max(r for r in range(self.rounds) if begins[r] <= self.current_epoch)
        if self.current_epoch == begins[current]:
            self._begin_round()
        elif self.targets is None or len(self.targets) == 0:  # resumed in the middle of a round
            self.targets = self._soft_assignments()
        self.answers_alone = self.current_epoch < begins[current] + FIRST_STAGE * (
            begins[current + 1] - begins[current]
        )

    def losses(self, target: Tensor, views: Sequence[Tensor]) -> dict[str, Tensor]:
        described, output = self.tapped(views[0])
        outputs = [head(described[:, c]) for head, c in zip(self.heads, self.tapped.columns, strict=False)]
        with torch.autocast(self.device.type, enabled=False):
            prototypes = F.normalize(self.centroids - self.centroids.mean(0), dim=1)
            logits = F.normalize(output.float(), dim=1) @ prototypes.T / self.final_temperature
            if not outputs:
                return {"loss": F.cross_entropy(logits, target)}
            exits = self._at_exits([z.float() for z in outputs], logits, target)
            answers = [z.detach().float()[:, : self.n_clusters].softmax(1) for z in outputs]
            follow = self._sharp(torch.stack(answers).mean(0))
            final = F.cross_entropy(logits, torch.lerp(target, follow, self.mutual))
        return {"loss": self.final_weight * final + exits, "final": final, "exits": exits}

    def _at_exits(self, outputs: list[Tensor], logits: Tensor, target: Tensor) -> Tensor:
        k = self.n_clusters
        if self.exit_loss == "soft" or self.answers_alone:
            return torch.stack([F.cross_entropy(z[:, :k], target) for z in outputs]).mean()
        label = target.argmax(dim=1, keepdim=True)
        answers = [z[:, :k].softmax(1).gather(1, label)[:, 0] for z in outputs]
        confidences = [z[:, k].sigmoid() for z in outputs]
        end = logits.softmax(1).gather(1, label)[:, 0]
        costs = self.costs.to(logits.device)
        return cost_aware_loss(answers, confidences, end, costs, self.tradeoff) / len(outputs)

    def _begin_round(self) -> None:
        """A new teacher, its clusters, its temperature and its answers; the same in every process."""
        first = bool((self.centroids == 0).all())
        self.teacher.load_state_dict(self.tapped.state_dict())
        for buffer in self.teacher.buffers():  # batch statistics are each process's own
            buffer.copy_(self._shared(buffer))
        few = np.random.default_rng(self.seed).permutation(self.positions)[: max(10_000, CLUSTERED * self.n_clusters)]
        features = torch.cat([one.cpu() for one in self._teach(few)])
        centroids = kmeans(features.numpy(), self.n_clusters, spherical=True, seed=self.seed)
        matched = torch.from_numpy(centroids)
        if not first:
            before, now = ((features @ c.T).argmax(1).numpy() for c in (self.centroids.cpu(), matched))
            counts = np.zeros((self.n_clusters, self.n_clusters), dtype=np.int64)
            np.add.at(counts, (before, now), 1)
            matched = matched[torch.from_numpy(match_clusters(counts))]
        self.centroids.copy_(self._shared(matched.to(self.device)))
        if self.fixed_temperature is None:
            viewed = torch.cat([one.cpu() for one in self._teach(few, self.views)])
            c = self.centroids.cpu()
            likeliest = likeliest_temperature(features @ c.T, (viewed @ c.T).argmax(1))
            self.temperature.copy_(self._shared(torch.tensor(likeliest, device=self.device)))
        self.targets = self._soft_assignments()

    def _shared(self, value: Tensor) -> Tensor:
        """The first process's value."""
        return value if self._trainer is None else self.trainer.strategy.broadcast(value)

    def _soft_assignments(self) -> Tensor:
        """The teacher's answer on every image to train on; rows of others stay 0: (N, K)."""
        targets = torch.zeros(len(self.source), self.n_clusters)
        ways: list[Callable[[Tensor], Tensor]] = [_unchanged, _mirrored] if self.mirror else [_unchanged]
        for way in ways:
            start = 0
            for features in self._teach(self.positions, way):
                soft = (features @ self.centroids.T / self.temperature).softmax(1)
                targets[self.positions[start : start + len(soft)]] += soft.cpu() / len(ways)
                start += len(soft)
        if self.neighbours > 1:
            targets[self.positions] = self._among_neighbours(targets)
        return self._sharp(targets)

    def _among_neighbours(self, targets: Tensor) -> Tensor:
        """The mean target of the nearest neighbours of every image to train on: (N, K) -> (n, K)."""
        import faiss

        bank = np.random.default_rng(self.seed).permutation(self.positions)[:BANK]
        index = faiss.IndexFlatIP(self.tapped.output.dim)
        for features in self._teach(bank):
            index.add(features.cpu().numpy())
        means = []
        for features in self._teach(self.positions):
            _, near = index.search(features.cpu().numpy(), min(self.neighbours, len(bank)))
            means.append(targets[torch.from_numpy(bank[near])].mean(1))
        return torch.cat(means)

    def _sharp(self, p: Tensor) -> Tensor:
        """Probabilities, (N, K), to the power of `sharpness`; rows of zeros stay."""
        sharp = p.pow(self.sharpness)
        return sharp / sharp.sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)

    def _teach(self, positions: np.ndarray, way: Callable[[Tensor], Tensor] = _unchanged) -> Iterator[Tensor]:
        """The teacher's final features of images seen in some way, of unit length, batch by batch: (B, F) float32."""
        self.teacher.eval()
        for batch in self.batches(positions, BATCH):
            images = self.prepared(way(batch.images.to(self.device)))
            with torch.no_grad(), self._precision():
                features = self.teacher.final_features(images)
            yield F.normalize(features.float(), dim=1)

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()


def _head(dim: int, hidden: int, width: int) -> nn.Module:
    """A small head on a descriptor of dim entries, standardised first."""
    return nn.Sequential(
        nn.BatchNorm1d(dim, affine=False),
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, width),
    )

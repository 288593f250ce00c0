r"""Self-distillation: every exit learns the final clusters of the same image, the final layer is held to its own.

A round begins with a frozen copy of the encoder, the teacher. FAISS k-means on its final features gives centroids c_k
(matched to those of the round before, so that cluster k stays cluster k), and every image x a soft assignment

    t(x) = softmax(cos(f(x), c) / T),        averaged over x and its mirror image where `mirror` is set.

What is minimised over the encoder f and a head h_e on the descriptor d_e of each exit, for a view x' of the image:

    w H(t(x), softmax(cos(f(x'), c) / T)) + mean_e H(t(x), softmax(h_e(d_e(x'))))

with H the cross-entropy and w = final_weight; or, with exit_loss="eenet", EENets' objective in place of the mean over
exits: heads have a confidence branch and the loss counts what each exit costs (`EENetRule`), the targets being the
clusters of largest t. No labels are used. Sources: self-distillation of exits, Zhang et al. (arXiv 1905.08094); k-means
and training in turn, DeepCluster, Caron et al. (1807.05520); EENets, Demir & Akbas (2409.05336).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.data.pixels import Pixels
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.eenet import cost_aware_loss
from ssl_exit.exits.kmeans import kmeans, match_clusters
from ssl_exit.training.module import ExitTraining, Optimization, frozen_copy

EXIT_LOSSES = ("soft", "eenet", "none")
BATCH = 512  # images the teacher sees at a time
CLUSTERED = 256  # images a cluster that k-means sees, and at least 10,000


class SelfDistillation(ExitTraining):
    """Exits learn the final clusters (see above).

    Args:
        tapped, views, preprocessing, optimization: see `ExitTraining`; `light_views` suit it.
        n_clusters: K.
        rounds: of k-means and training in turn, of equally many epochs.
        exit_loss: "soft", "eenet", or "none": the final layer alone.
        final_weight: w; 0 lets the final layer follow what exits make of the layers below.
        temperature: T.
        mirror: whether an image and its mirror image mean the same; photographs mostly do, writing does not.
        hidden: units of the heads' hidden layer.
        tradeoff: lambda of "eenet", what the whole encoder's cost is worth in nats.

    Raises:
        InputError: numbers out of range.
    """

    n_views = 1
    centroids: Tensor

    def __init__(
        self,
        tapped: TappedEncoder,
        views: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
        optimization: Optimization,
        *,
        n_clusters: int = 10,
        rounds: int = 1,
        exit_loss: str = "soft",
        final_weight: float = 2.0,
        temperature: float = 0.1,
        mirror: bool = True,
        hidden: int = 128,
        tradeoff: float = 1.0,
    ) -> None:
        super().__init__(tapped, views, preprocessing, optimization)
        if exit_loss not in EXIT_LOSSES:
            raise InputError(f"exit_loss must be one of {EXIT_LOSSES}; got {exit_loss!r}")
        if min(n_clusters, rounds, hidden) < 1 or temperature <= 0 or min(final_weight, tradeoff) < 0:
            raise InputError(
                "self-distillation needs n_clusters, rounds and hidden >= 1, temperature > 0, final_weight and "
                f"tradeoff >= 0; got {n_clusters}, {rounds}, {hidden}, {temperature}, {final_weight} and {tradeoff}"
            )
        self.n_clusters, self.rounds, self.exit_loss = n_clusters, rounds, exit_loss
        self.final_weight, self.temperature, self.tradeoff = final_weight, temperature, tradeoff
        self.mirror = mirror
        width = n_clusters + (exit_loss == "eenet")
        exits = [] if exit_loss == "none" else tapped.seen
        self.heads = nn.ModuleList(_head(dim, hidden, width) for dim in exits)
        self.teacher = frozen_copy(tapped)
        self.register_buffer("centroids", torch.zeros(n_clusters, tapped.output.dim))
        macs = torch.tensor(tapped.staged.macs, dtype=torch.float64).cumsum(0)
        self.costs = (macs / macs[-1]).float()

    def attach(self, pixels: Pixels, positions: np.ndarray, seed: int) -> None:
        self.pixels, self.positions, self.seed = pixels, positions, seed
        self.targets = torch.zeros(0, self.n_clusters)

    def on_train_epoch_start(self) -> None:
        epochs = self.trainer.max_epochs or 1
        began = [r * epochs // self.rounds for r in range(self.rounds)]
        if self.current_epoch in began:
            self._begin_round()
        elif len(self.targets) == 0:  # resumed in the middle of a round
            self.targets = self._soft_assignments()

    def losses(self, positions: Tensor, views: Sequence[Tensor]) -> dict[str, Tensor]:
        described, output = self.tapped(views[0])
        outputs = [head(described[:, c]) for head, c in zip(self.heads, self.tapped.columns, strict=False)]
        with torch.autocast(self.device.type, enabled=False):
            target = self.targets[positions.to(self.targets.device)].to(output.device)
            logits = F.normalize(output.float(), dim=1) @ self.centroids.T / self.temperature
            final = F.cross_entropy(logits, target)
            if not outputs:
                return {"loss": final}
            exits = self._at_exits([z.float() for z in outputs], logits, target)
        return {"loss": self.final_weight * final + exits, "final": final, "exits": exits}

    def _at_exits(self, outputs: list[Tensor], logits: Tensor, target: Tensor) -> Tensor:
        if self.exit_loss == "soft":
            return torch.stack([F.cross_entropy(z, target) for z in outputs]).mean()
        label = target.argmax(dim=1, keepdim=True)
        answers = [z[:, : self.n_clusters].softmax(1).gather(1, label)[:, 0] for z in outputs]
        confidences = [z[:, self.n_clusters].sigmoid() for z in outputs]
        end = logits.softmax(1).gather(1, label)[:, 0]
        costs = self.costs.to(logits.device)
        return cost_aware_loss(answers, confidences, end, costs, self.tradeoff) / len(outputs)

    def _begin_round(self) -> None:
        """A new teacher, its clusters and its answers."""
        first = bool((self.centroids == 0).all())
        self.teacher.load_state_dict(self.tapped.state_dict())
        few = np.random.default_rng(self.seed).permutation(self.positions)[: max(10_000, CLUSTERED * self.n_clusters)]
        features = torch.cat([f.cpu() for f in self._teach(few, mirrored=False)])
        centroids, _ = kmeans(features.numpy(), self.n_clusters, spherical=True, seed=self.seed)
        found = torch.from_numpy(centroids)
        if not first:
            before = features @ self.centroids.cpu().T
            now = features @ found.T
            counts = np.zeros((self.n_clusters, self.n_clusters), dtype=np.int64)
            np.add.at(counts, (before.argmax(1).numpy(), now.argmax(1).numpy()), 1)
            found = found[torch.from_numpy(match_clusters(counts))]
        self.centroids.copy_(found)
        self.targets = self._soft_assignments()

    def _soft_assignments(self) -> Tensor:
        """The teacher's answer on every image to train on; rows of others stay 0: (N, K)."""
        targets = torch.zeros(len(self.pixels), self.n_clusters)
        ways = (False, True) if self.mirror else (False,)
        for mirrored in ways:
            at = 0
            for features in self._teach(self.positions, mirrored):
                soft = (features @ self.centroids.T / self.temperature).softmax(1)
                targets[self.positions[at : at + len(soft)]] += soft.cpu() / len(ways)
                at += len(soft)
        return targets

    def _teach(self, positions: np.ndarray, mirrored: bool) -> Iterator[Tensor]:
        """The teacher's final features of images, of unit length, batch by batch: (B, F) float32."""
        self.teacher.eval()
        for at in range(0, len(positions), BATCH):
            _, pixels = self.pixels[positions[at : at + BATCH]]
            pixels = pixels.to(self.device)
            with torch.no_grad():
                features = self.teacher(self.prepared(pixels.flip(3) if mirrored else pixels))[1]
            yield F.normalize(features.float(), dim=1)


def _head(dim: int, hidden: int, width: int) -> nn.Module:
    """A small head on a descriptor of dim entries, standardised first."""
    return nn.Sequential(
        nn.BatchNorm1d(dim, affine=False),
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, width),
    )

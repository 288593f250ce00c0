"""How well an encoder's neighbours share a class, while it is trained; classes serve nothing else."""

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from torch import Tensor

from ssl_exit.data.images import ImageSource
from ssl_exit.training.loader import FullBatches

NEIGHBOURS, TEMPERATURE = 200, 0.1  # as in lightly's benchmarks (Wu et al., arXiv 1805.01978)
BANK = 20_000  # images among which neighbours are sought, at most
BATCH = 512


class NeighbourMonitor(pl.Callback):
    """Every few epochs, the accuracy of weighted nearest neighbours on images kept out of training, as "knn".

    Args:
        source: images with classes.
        positions: of images among which neighbours are sought.
        held: of images to classify.
        every: epochs.
    """

    def __init__(self, source: ImageSource, positions: np.ndarray, held: np.ndarray, every: int) -> None:
        self.source, self.held, self.every = source, held, every
        self.bank = np.random.default_rng(0).permutation(positions)[:BANK]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            module.log("knn", self.accuracy(module), prog_bar=True, rank_zero_only=True)

    def accuracy(self, module: pl.LightningModule) -> float:
        """Share of the held images whose neighbours name their class."""
        targets = self.source.targets
        assert targets is not None
        bank = self._features(module, self.bank)
        predicted = knn_accuracy_predictions(bank, self._features(module, self.held), targets[self.bank])
        return float((predicted == targets[self.held]).mean())

    def _features(self, module: pl.LightningModule, positions: np.ndarray) -> Tensor:
        batches = FullBatches(self.source)(positions, BATCH)
        return torch.cat([module.features(batch.images.to(module.device)) for batch in batches])  # type: ignore[operator]


def knn_accuracy_predictions(bank: Tensor, queries: Tensor, classes: np.ndarray) -> np.ndarray:
    """Classes that neighbours by cosine name, (Q,).

    Args:
        bank: features, (N, F).
        queries: features, (Q, F).
        classes: of the bank, (N,) int.
    """
    of_bank = torch.from_numpy(classes).to(bank.device)
    known = F.normalize(bank, dim=1).T
    ranked = [
        knn_predict(q, known, of_bank, int(classes.max()) + 1, min(NEIGHBOURS, len(bank)), TEMPERATURE)[:, 0]
        for q in F.normalize(queries, dim=1).split(BATCH)
    ]
    return torch.cat(ranked).cpu().numpy()

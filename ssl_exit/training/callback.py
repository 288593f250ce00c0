"""Centroid exits while any Lightning module trains a backbone: what they would save, after every few epochs."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from ssl_exit.cascade.cascade import describe, exit_costs
from ssl_exit.data.images import Batch, open_images
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.final import FinalClusters
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule, FitData
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.exits.thresholds import Recorded, threshold_path, trade_off

BACKBONES = ("backbone", "encoder", "encoder_q", "online_encoder", "student_backbone")  # where modules keep theirs
BATCH = 256
FIT, SHAPE = 0.6, 0.2  # shares of the images that rules and thresholds are fitted to; the others are measured


class CentroidExits(pl.Callback):
    """Fits centroid exits to the backbone every few epochs, and logs what they would save.

    Works with any LightningModule, such as lightly's and solo-learn's: images come from `images`, never from the
    batches of the training, whose weights, modes, gradients, batch statistics and random states stay untouched.

    Logged, all of images that neither rules nor thresholds were fitted to, with one threshold an exit:

    - `exits/cost_at_98`, `exits/cost_at_95`: the least cost (multiply-adds / the full backbone's, the work of all exits
      included) at which 98 % (95 %) of the labels agree with the final clusters of the full backbone.
    - `exits/agreement_at_half`: the most agreement at a cost of at most 0.5.
    - `exits/agreement/NAME`: the agreement of every exit alone, if all images left there.

    Parameters:
        images: what the backbone is trained on, without random views: a folder, tensor, Dataset, ... (see
            `open_images`). A DataLoader brings its workers.
        preprocessing: of folders, PIL and uint8 images. Default None.
        n_clusters: K, the number of final clusters. Default 10.
        every: epochs between two fits; the last epoch is always followed by one. Default 5.
        n_images: images used, at most, drawn by `seed`. Default 5,000.
        backbone: name of the backbone in the module, such as "model.encoder"; None looks for `BACKBONES`.
        seed: of the images drawn and of k-means. Default 0.

    Attributes:
        history: what was logged, and "epoch", counted from 1; it is saved in checkpoints.

    Raises:
        InputError: parameters or images that cannot be used or, when training starts, a module without a backbone or
            a backbone without exit points.

    Examples:
        >>> import torch
        >>> callback = CentroidExits(torch.rand(200, 3, 32, 32), every=1)
        >>> trainer = pl.Trainer(max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        images: Any,
        preprocessing: Preprocessing | None = None,
        *,
        n_clusters: int = 10,
        every: int = 5,
        n_images: int = 5_000,
        backbone: str | None = None,
        seed: int = 0,
    ) -> None:
        if n_clusters < 1 or every < 1 or seed < 0:
            raise InputError(
                f"n_clusters and every must be >= 1 and seed >= 0; got n_clusters={n_clusters}, every={every}, "
                f"seed={seed}"
            )
        self.source = open_images(images, preprocessing)
        self.positions = np.random.default_rng(seed).permutation(len(self.source))[:n_images]
        if FIT * len(self.positions) < n_clusters:
            raise InputError(
                f"{len(self.positions)} images are too few for {n_clusters} clusters: of three fifths of them each "
                "needs one at least; give more images, or fewer clusters"
            )
        self.n_clusters, self.every, self.backbone, self.seed = n_clusters, every, backbone, seed
        self.history: list[dict[str, float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be used before anything is trained."""
        with isolate_rng():
            self._tapped(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if not trainer.is_global_zero or (epoch % self.every and epoch != trainer.max_epochs):
            return
        with isolate_rng():  # a Dataset or a backbone may draw random numbers
            tapped = self._tapped(pl_module).to(pl_module.device)
            logged = exit_metrics(tapped, self.source.batches(self.positions, BATCH), self.n_clusters, self.seed)
        if not logged:
            warnings.warn(f"epoch {epoch}: too few images have finite features; no exits were fitted", stacklevel=2)
            return
        self.history.append({"epoch": epoch} | logged)
        pl_module.log_dict(logged, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    @property
    def state_key(self) -> str:
        """Callbacks with other settings keep other states."""
        return self._generate_state_key(n_clusters=self.n_clusters, backbone=self.backbone, seed=self.seed)

    def _tapped(self, module: pl.LightningModule) -> TappedEncoder:
        """A copy of the backbone, in float32 on the CPU, cut at its candidate exit points."""
        backbone = copy.deepcopy(backbone_of(module, self.backbone)).cpu().float().eval()
        example = first_images(self.source, self.positions, BATCH).images.cpu()
        return TappedEncoder.build(backbone, "auto", example).for_inference("float32", example.shape[1:])


def backbone_of(module: nn.Module, name: str | None = None) -> nn.Module:
    """The backbone of a module that trains one.

    Args:
        module: what holds it.
        name: where; dots lead into submodules. None: the first of `BACKBONES` that there is.

    Raises:
        InputError: it is not there.
    """
    for each in BACKBONES if name is None else (name,):
        try:
            return module.get_submodule(each)
        except AttributeError:
            continue
    children = [child for child, _ in module.named_children()]
    sought = f"no submodule {name!r}" if name else f"none of {', '.join(BACKBONES)}"
    raise InputError(f'{type(module).__name__} has {sought}; it has {children}: name its encoder, as backbone="..."')


def exit_metrics(tapped: TappedEncoder, batches: Iterable[Batch], n_clusters: int, seed: int) -> dict[str, float]:
    """What centroid exits at all exit points of an encoder would save, by the names that `CentroidExits` logs.

    Args:
        tapped: on the device to use.
        batches: images in random order; the first fit clusters and rules, the next thresholds, the last are measured.
        n_clusters: K.
        seed: of k-means.

    Returns:
        Metrics by name; none where too few images have finite features.
    """
    described = list(describe(tapped, batches))
    x = torch.cat([each.descriptors.cpu() for each in described])  # (N, dim)
    features = torch.cat([each.features.cpu() for each in described])  # (N, F)
    finite = x.isfinite().all(1)
    x, features = x[finite], features[finite]
    fit, shape = round(FIT * len(x)), round((FIT + SHAPE) * len(x))
    if fit < n_clusters or shape == len(x):
        return {}
    final = FinalClusters.fit(features[:fit], n_clusters, spherical=True, seed=seed)
    labels = final(features)
    rules = build_rules("centroid", tapped.seen, n_clusters)
    answers = []
    for rule, columns in zip(rules, tapped.columns, strict=True):
        _fit(rule, x[:fit, columns], labels[:fit], seed)
        rule.fit_temperature(rule.logits(x[fit:shape, columns]), labels[fit:shape])
        answers.append(rule(x[fit:, columns]))
    said, scores = (torch.stack(one, dim=1) for one in zip(*answers, strict=True))  # (n, E) each
    parts = zip(*(one.split([shape - fit, len(x) - shape]) for one in (said, scores, labels[fit:])), strict=True)
    shaping, measured = (Recorded(*(one.numpy() for one in part)) for part in parts)

    costs = exit_costs(tapped, rules, final)
    path = threshold_path(shaping, costs, n_clusters, per_cluster=False)
    cost, agreement = trade_off(path, measured, costs)
    names = [point.name for point in tapped.staged.exit_points]
    alone = (measured.labels == measured.final[:, None]).mean(0)
    return {
        "exits/cost_at_98": float(cost[agreement >= 0.98].min()),
        "exits/cost_at_95": float(cost[agreement >= 0.95].min()),
        "exits/agreement_at_half": float(max(agreement[cost <= 0.5], default=np.nan)),
        **{f"exits/agreement/{name}": float(share) for name, share in zip(names, alone, strict=True)},
    }


def _fit(rule: ExitRule, x: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
    """Fit a closed-form rule to descriptors, (n, D), and final clusters, (n,)."""
    statistics = ClusterStatistics.empty(rule.n_clusters, x.double().mean(0), scatter=rule.needs_scatter)
    statistics.add(x, labels)
    rule.fit(FitData(statistics, x, labels, x.new_empty(len(x), 0), seed))

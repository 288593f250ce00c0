"""What all ways of training share: views made on the device, an optimiser, a schedule."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from lightly.models.utils import deactivate_requires_grad
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ssl_exit.data.images import ImageSource, open_images
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.settings import Optimization
from ssl_exit.training.loader import open_training_images

Module = TypeVar("Module", bound=nn.Module)
MODAL = (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout, F.batch_norm)


class Training(pl.LightningModule):
    """Base of everything that is trained without labels.

    A subclass defines `losses`. Batches come from an `EpochLoader`; views are computed where the network is,
    outside of autocast.

    Attributes:
        views: a batch of images, (B, C, H, W), to a batch of random views of them.
        optimization: how parameters are updated.
        n_views: drawn of every image.
        targets: of all images, (N, ...), by position; None where `losses` takes positions.
        options: of the method, by name; a checkpoint is continued only where they are the same.
    """

    n_views = 2
    targets: Tensor | None = None

    def __init__(self, views: Callable[[Tensor], Tensor], optimization: Optimization) -> None:
        super().__init__()
        self.views, self.optimization = views, optimization
        self.options: dict[str, Any] = {}

    @property
    def stepped(self) -> list[TappedEncoder]:
        """Encoders that every step runs, to be compiled."""
        return []

    @abstractmethod
    def losses(self, target: Tensor, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is minimised, "loss", and whatever else is worth a curve.

        Args:
            target: rows of `targets`, or positions of the images in the data, (B,) int64.
            views: as the network takes them, (B, C, H, W) each.
        """

    def open(self, data: Any, num_workers: int, processes: int) -> ImageSource:
        """Images to train on, for so many processes."""
        return open_images(data, None, num_workers)

    def check(self, images: Tensor) -> None:
        """Raise InputError if images, (N, C, H, W), are none that can be trained on."""

    def attach(self, source: ImageSource, positions: np.ndarray, seed: int) -> None:
        """Called once before training, with all images, the positions of those to train on, and a seed."""

    def prepared(self, images: Tensor) -> Tensor:
        """Images or views as the network takes them."""
        return images.to(torch.float32, memory_format=torch.channels_last)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        positions, images = batch
        return positions if self.targets is None else self.targets[positions], images

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, list[Tensor]]:
        target, pixels = batch
        return target, [self.prepared(self.views(pixels)) for _ in range(self.n_views)]

    def training_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> Tensor:
        losses = self.losses(*batch)
        self.log_dict(losses, prog_bar=True, batch_size=len(batch[0]))
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        how = self.optimization
        parameters = [p for p in self.parameters() if p.requires_grad]
        steps = int(self.trainer.estimated_stepping_batches)
        if how.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, how.learning_rate, momentum=how.momentum, weight_decay=how.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(parameters, how.learning_rate, weight_decay=how.weight_decay)
        if how.schedule == "cosine":
            schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        else:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, how.learning_rate, total_steps=steps, cycle_momentum=False
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ExitTraining(Training):
    """Base of all ways to train an encoder and its exits.

    Attributes:
        tapped: the encoder and its exits; it is trained in place.
        preprocessing: whose mean and deviation standardise views; also the size of images that are decoded.

    Raises:
        InputError: an encoder that cannot be trained (see `check_trainable`).
    """

    def __init__(
        self,
        tapped: TappedEncoder,
        views: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
        optimization: Optimization,
    ) -> None:
        super().__init__(views, optimization)
        check_trainable(tapped)
        self.tapped, self.preprocessing = tapped, preprocessing

    @property
    def stepped(self) -> list[TappedEncoder]:
        return [self.tapped]

    def open(self, data: Any, num_workers: int, processes: int) -> ImageSource:
        return open_training_images(data, self.preprocessing, num_workers, processes)

    def check(self, images: Tensor) -> None:
        """Raise InputError if images are not pixels, or have another number of channels than mean and std."""
        if images.is_floating_point() and not 0 <= images.min().item() <= images.max().item() <= 1:
            raise InputError(
                "floating-point training images must lie in [0, 1]: views are drawn before they are standardised"
            )
        channels = images.shape[1]
        if channels != len(self.preprocessing.mean):
            raise InputError(
                f"the images have {channels} channels and mean and std {len(self.preprocessing.mean)}: set one entry "
                "for each channel"
            )

    def prepared(self, images: Tensor) -> Tensor:
        """Images or views in [0, 1] (or uint8) as the encoder takes them."""
        x = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return self.preprocessing.normalize(x.div_(255) if images.dtype == torch.uint8 else x)

    def features(self, pixels: Tensor) -> Tensor:
        """Final features of images, without gradients and in eval mode: (B, C, H, W) -> (B, F) float32."""
        was = self.tapped.training
        self.tapped.eval()
        with torch.no_grad():  # the class's own method: an instance may be compiled for batches of one shape
            features = TappedEncoder.final_features(self.tapped, self.prepared(pixels))
        self.tapped.train(was)
        return features.float()


def check_trainable(tapped: TappedEncoder) -> None:
    """Refuse an encoder whose graph would train as if it were in eval mode.

    Raises:
        InputError: it calls F.dropout or F.batch_norm, whose mode was fixed when it was traced.
    """
    for stage in tapped.staged.stages:
        nodes: Iterable[fx.Node] = stage.graph.nodes if isinstance(stage, fx.GraphModule) else []
        fixed = {node.target.__name__ for node in nodes if node.target in MODAL}
        if fixed:
            raise InputError(
                f"the encoder calls {sorted(fixed)} as functions; its graph fixes their training mode: use modules "
                "(nn.Dropout, nn.BatchNorm2d), or pass the encoder as a list of modules"
            )


def frozen_copy(module: Module) -> Module:
    """A copy in eval mode that no optimiser changes."""
    duplicate = copy.deepcopy(module).eval()
    deactivate_requires_grad(duplicate)
    return duplicate

"""Parameters of training."""

from dataclasses import dataclass
from typing import Literal

from ssl_exit.settings.groups import Group, option

Method = Literal["simclr", "moco", "distill"]


@dataclass(frozen=True)
class Optimization(Group):
    """How parameters are updated in training; the defaults are those of lightly's CIFAR-10 benchmark.

    Attributes:
        optimizer: sgd or adamw.
        learning_rate: its peak, for the batch size in use (lightly's benchmark: 0.06 for each 128 images).
        momentum: of sgd.
        weight_decay: on all parameters.
        schedule: cosine, from the peak to 0; or one_cycle, which rises to it first (arXiv 1708.07120).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = option(0.06, "(0, inf)")
    momentum: float = option(0.9, "[0, 1)")
    weight_decay: float = option(5e-4, "[0, inf)")
    schedule: Literal["cosine", "one_cycle"] = "cosine"


@dataclass(frozen=True)
class TrainingRun(Group):
    """How a training is run.

    Attributes:
        epochs: passes over the images.
        batch_size: images a step, of all devices together.
        monitor_share: of the images, kept out of training to see how well nearest neighbours classify them; used where
            images have classes (one sub-folder a class).
        monitor_every: epochs between two such looks.
        precision: auto (bfloat16 where hardware has it), 32-true, bf16-mixed or 16-mixed.
        compile: compile the encoder by torch.compile: half a minute at the start, then faster steps.
        device: auto, cpu or cuda.
        devices: number of devices; with more than one, DistributedDataParallel, negatives gathered from all.
        num_workers: processes that decode images, where these are not in memory.
        logger: csv, tensorboard or none.
        seed: of everything random.
    """

    epochs: int = option(200, "[1, inf)")
    batch_size: int = option(128, "[2, inf)")
    monitor_share: float = option(0.05, "[0, 1)")
    monitor_every: int = option(5, "[1, inf)")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = option(1, "[1, inf)")
    num_workers: int = option(0, "[0, inf)")
    logger: Literal["csv", "tensorboard", "none"] = "csv"
    seed: int = option(0, "[0, inf)")

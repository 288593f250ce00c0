"""Training encoders that exit early; needs pytorch-lightning, which `import ssl_exit` alone does not load."""

from ssl_exit.settings import Optimization
from ssl_exit.training.callback import CentroidExits
from ssl_exit.training.contrastive import MoCo, SimCLR
from ssl_exit.training.distillation import SelfDistillation
from ssl_exit.training.logs import read_curve
from ssl_exit.training.methods import build_training
from ssl_exit.training.module import ExitTraining
from ssl_exit.training.run import train

__all__ = [
    "CentroidExits",
    "ExitTraining",
    "MoCo",
    "Optimization",
    "SelfDistillation",
    "SimCLR",
    "build_training",
    "read_curve",
    "train",
]

"""The estimator users hold: its parameters, its fitted attributes, and its methods."""

from ssl_exit.clusterer.estimator import ExitClusterer
from ssl_exit.clusterer.loading import load

__all__ = ["ExitClusterer", "load"]

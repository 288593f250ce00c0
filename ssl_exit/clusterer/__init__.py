"""The estimator users hold: its parameters, its fitted attributes, and its methods."""

from ssl_exit.clusterer.estimator import ExitClusterer, load

__all__ = ["ExitClusterer", "load"]

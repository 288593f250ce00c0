"""Label-free early exit for clustering with self-supervised encoders."""

from ssl_exit.clusterer import ExitClusterer
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.graph import list_exits
from ssl_exit.saving import load

__all__ = ["EncoderSpec", "ExitClusterer", "Preprocessing", "list_exits", "load"]

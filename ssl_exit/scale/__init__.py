"""Corpora that one process does not read: a fitted model applied to columns of images by Ray Data, Spark or Daft."""

from ssl_exit.scale.columns import LabelColumns
from ssl_exit.scale.ray_data import label_dataset, label_files

__all__ = ["LabelColumns", "label_dataset", "label_files"]

"""Corpora that one process does not read: a model fitted by many processes or jobs, and applied to columns of images by
Ray Data, Spark or Daft."""

from ssl_exit.fitting.parts import PartWritten, StoredShard, merge_parts
from ssl_exit.fitting.shards import DistributedShard
from ssl_exit.scale.columns import LabelColumns, audit_of
from ssl_exit.scale.ray_data import label_dataset, label_files

__all__ = ["DistributedShard", "LabelColumns", "PartWritten", "StoredShard", "audit_of", "label_dataset", "label_files",
           "merge_parts"]  # fmt: skip

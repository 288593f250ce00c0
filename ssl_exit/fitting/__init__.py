"""Fitting in separate steps on plain values: sample, count, place, record, calibrate.

Whatever one shard of the images computes merges with `+`: samples keep the lowest keys, statistics and counts add up,
logits and records join. docs/scale.md shows a fit on three shards.
"""

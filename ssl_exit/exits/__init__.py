"""The mathematics of exits: k-means, statistics, rules, thresholds and the certificate."""

from ssl_exit.exits import centroid, means, own_clusters  # registers the rules by name

__all__ = ["centroid", "means", "own_clusters"]

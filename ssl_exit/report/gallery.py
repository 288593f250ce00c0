"""Which images of a cluster to show."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gallery:
    """Images of one cluster worth a look, as rows of the arrays they were chosen from, each the most telling first.

    Attributes:
        nearest: to the cluster's centroid.
        first: those that left at the earliest exits with the largest scores.
        last: those that went to the end, nearest to the centroid first.
        border: those whose two nearest centroids are about equally far.
    """

    nearest: list[int]
    first: list[int]
    last: list[int]
    border: list[int]


def gallery(
    cluster: int, labels: np.ndarray, exits: np.ndarray, scores: np.ndarray, distances: np.ndarray, n: int
) -> Gallery:
    """At most n images of a cluster of each kind.

    Args:
        cluster: its number.
        labels: final cluster of every image, (N,).
        exits: where it left, (N,); the largest number is the end of the encoder.
        scores: how sure it was there, (N,); NaN at the end.
        distances: to the final centroids, or minus the logits in the supervised mode, (N, K).
        n: images wanted of each kind.
    """
    members = np.flatnonzero(labels == cluster)
    own = distances[members, cluster]
    two = np.sort(distances[members], axis=1)[:, :2]
    margin = two[:, -1] - two[:, 0]
    end = distances.shape[1] and exits[members] == exits.max(initial=0)
    sure = np.nan_to_num(scores[members], nan=0.0)

    def top(rows: np.ndarray, *keys: np.ndarray) -> list[int]:
        order = np.lexsort([key[rows] for key in reversed(keys)])
        return members[np.flatnonzero(rows)[order]][:n].tolist()

    every = np.ones(len(members), dtype=bool)
    return Gallery(
        nearest=top(every, own),
        first=top(~end, exits[members], -sure),
        last=top(end, own),
        border=top(every, margin),
    )

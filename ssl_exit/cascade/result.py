"""What became of each image."""

from dataclasses import dataclass

import numpy as np

NOT_FINITE = "pixels or features are NaN or infinite"


@dataclass(frozen=True)
class ExitResult:
    """What became of each image, in input order.

    Attributes:
        labels: final cluster, (N,) int64; -1 for an image that could not be used.
        exits: index of the exit it left at, (N,) int64; the number of exits means the end.
        scores: its score there, (N,) float32; 1 at the end, NaN for an image that could not be used.
        cost: multiply-adds that its exit takes, exits' own included / those of the full encoder, (N,) float64; NaN
            for an image that could not be used. Where a single batch is not compacted, more is computed.
        skipped: position and reason of every image that could not be used.
        audited: label of the full encoder for images that left early and went on to the end all the same, (N,) int64;
            -1 for all others.
    """

    labels: np.ndarray
    exits: np.ndarray
    scores: np.ndarray
    cost: np.ndarray
    skipped: dict[int, str]
    audited: np.ndarray

    @property
    def n_skipped(self) -> int:
        """Number of images that could not be used."""
        return len(self.skipped)

"""What a model was fitted to, and why it has the exits it has."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ExitChoice:
    """Why a candidate exit was kept or left out.

    Attributes:
        name: of the exit point.
        cost: of leaving here, with all candidates in place / the full encoder's.
        own_work: of that, what the exit itself costs.
        agreement: of its label with the full encoder's, all held-out images.
        saving: how much more the cascade would cost without this exit, for one that is kept; how much less it would
            cost with it, for one that is left out (negative: more).
        kept: whether it stays.
    """

    name: str
    cost: float
    own_work: float
    agreement: float
    saving: float
    kept: bool

    def __str__(self) -> str:
        verdict = "kept, saves" if self.kept else "left out, would save"
        return (
            f"{self.name}: {verdict} {self.saving:.1%} of the full encoder's cost after its own work of "
            f"{self.own_work:.1%}; its label agrees on {self.agreement:.1%} of held-out images"
        )


@dataclass(frozen=True)
class ClusterCount:
    """How well a number of clusters suits the features.

    Attributes:
        n_clusters: K.
        silhouette: of k-means, in [-1, 1].
        stability: adjusted Rand index between k-means of two halves of the images, at most 1.
    """

    n_clusters: int
    silhouette: float
    stability: float

    @property
    def merit(self) -> float:
        """Silhouette x stability."""
        return self.silhouette * self.stability


@dataclass(frozen=True)
class Teaching:
    """How a front was taught.

    Attributes:
        seconds: of teaching and of what it needs of the full encoder.
        epochs: passes over the images.
        agreement: of the front alone with the full encoder, on images kept out of teaching.
        saving: share of those images that it could answer at the disagreement asked for.
    """

    seconds: float
    epochs: int
    agreement: float
    saving: float

    def __str__(self) -> str:
        return (
            f"taught {self.epochs} epochs in {self.seconds:,.0f} s; its label agrees on {self.agreement:.1%} of images "
            f"kept out, {self.saving:.1%} of them could leave"
        )


@dataclass(frozen=True, eq=False)
class Provenance:
    """What a model was fitted to.

    Attributes:
        images: content hashes of the images that rules were fitted to or exits chosen by, uint64.
        skipped: position and reason of images that fit() could not use.
        n_fit: images behind the statistics, mirrored ones counted too.
        n_sample: of those, images that k-means saw.
        choices: why each candidate exit was kept or left out; empty where none was judged.
        teaching: of each front.
        counts: with n_clusters="auto", numbers of clusters that were tried.
        inertia: sum of squared distances of the images that k-means saw to their nearest final centroid; NaN where it
            saw none.
        shaped: content hashes of the images that shaped the thresholds, uint64; not saved.
        calibration_skipped: position and reason of images that calibration did not use; not saved.
    """

    images: np.ndarray
    skipped: dict[int, str]
    n_fit: int
    n_sample: int
    choices: tuple[ExitChoice, ...] = ()
    teaching: tuple[Teaching, ...] = ()
    counts: tuple[ClusterCount, ...] = ()
    inertia: float = float("nan")
    shaped: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    calibration_skipped: dict[int, str] = field(default_factory=dict)

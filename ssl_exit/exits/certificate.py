"""The certificate: disagreement with the whole encoder at most eps, with confidence 1 - delta."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import beta, binom

from ssl_exit.exits.thresholds import Recorded, simulate


@dataclass(frozen=True)
class Certificate:
    """What was shown of the thresholds in use, on held-out images that did not shape them.

    Attributes:
        max_disagreement: eps, the share of images whose label may differ from the whole encoder's.
        confidence: 1 - delta, the probability, over the draw of the held-out images, that the claim holds.
        n: held-out images on which settings were tried.
        disagreements: of those, how many got another label than the whole encoder's.
        bound: Clopper-Pearson upper bound on the share of disagreement, at `confidence`, for a setting fixed
            in advance.
        early: share of those images that left before the end.
        settings: how many settings of the path were accepted; with none, nothing exits early.
    """

    max_disagreement: float
    confidence: float
    n: int
    disagreements: int
    bound: float
    early: float
    settings: int

    def __str__(self) -> str:
        if self.settings == 0:
            needed = fewest_images(self.max_disagreement, self.confidence)
            why = f"at least {needed} are needed" if self.n < needed else "even the surest setting disagrees too often"
            return (
                f"no image may exit early: {self.n} held-out images certify no setting at disagreement <= "
                f"{self.max_disagreement:.2%} with confidence {self.confidence:.0%} ({why}; give calibrate() more "
                "images, raise max_disagreement or lower confidence)"
            )
        return (
            f"disagreement <= {self.max_disagreement:.2%} with confidence {self.confidence:.0%} "
            f"({self.disagreements} of {self.n} held-out images disagree, {self.early:.1%} exit early)"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify(
    path: np.ndarray, recorded: Recorded, max_disagreement: float, confidence: float
) -> tuple[np.ndarray, Certificate]:
    """Walk a path of settings and keep the last one accepted before the first that is not.

    Fixed-sequence testing (Angelopoulos et al., "Learn then Test", arXiv 2110.01052, section 3): the
    hypothesis "disagreement > eps" of each setting is rejected while P(Bin(n, eps) <= disagreements) <= delta;
    the first that cannot be rejected ends the walk, so the error rate of the whole walk is delta.

    Args:
        path: thresholds of each setting, (S, E, K), the first of which lets nothing exit.
        recorded: held-out images that did not shape the path.
        max_disagreement: eps.
        confidence: 1 - delta.

    Returns:
        The thresholds to use, (E, K), and their certificate.
    """
    n = len(recorded)
    accepted, errors, early, settings = path[0], 0, 0.0, 0
    allowed = most_disagreements(n, max_disagreement, confidence)
    for thresholds in path[1:]:
        labels, exits = simulate(recorded, thresholds)
        disagreements = int((labels != recorded.final).sum())
        if disagreements > allowed:
            break
        accepted, errors, early = thresholds, disagreements, float((exits < path.shape[1]).mean())
        settings += 1
    bound = upper_bound(errors, n, confidence)
    return accepted, Certificate(max_disagreement, confidence, n, errors, bound, early, settings)


def most_disagreements(n: int, max_disagreement: float, confidence: float) -> int:
    """The most disagreements among n images that still certify eps: P(Bin(n, eps) <= k) <= delta; -1 if none."""
    delta = 1 - confidence
    k = int(binom.ppf(delta, n, max_disagreement))
    while k >= 0 and binom.cdf(k, n, max_disagreement) > delta:
        k -= 1
    return k


def fewest_images(max_disagreement: float, confidence: float) -> int:
    """The fewest images, none of which disagrees, that certify eps: (1 - eps)^n <= delta."""
    return int(np.ceil(np.log(1 - confidence) / np.log1p(-max_disagreement)))


def upper_bound(disagreements: int, n: int, confidence: float) -> float:
    """Clopper-Pearson upper bound on a share (Clopper & Pearson, Biometrika 1934), one-sided."""
    return 1.0 if disagreements >= n else float(beta.ppf(confidence, disagreements + 1, n - disagreements))

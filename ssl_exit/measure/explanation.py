"""Why images do or do not exit: scores against thresholds, exit by exit, and what less agreement would release."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ssl_exit.exits.certificate import Certificate, most_disagreements
from ssl_exit.exits.thresholds import Recorded, simulate

BINS = 10
LOWER = (0.99, 0.98, 0.95, 0.9, 0.8)  # agreements that are tried beside the one in use
SUREST = 0.01  # share of images, by score, that should agree if a rule knows anything


@dataclass(frozen=True)
class ExitScores:
    """What one exit says of the images that reach it.

    Attributes:
        name: of the exit point.
        reached: images that come so far.
        left: of those, how many leave here.
        histogram: of the scores of those that reach it, in ten bins of equal width over [0, 1].
        threshold: least, median and largest threshold over the clusters; None = never.
        surest: agreement of the 1 % of all images with the largest scores here.
        released: for each lower agreement, images that would leave here.
    """

    name: str
    reached: int
    left: int
    histogram: list[int]
    threshold: tuple[float | None, float | None, float | None]
    surest: float
    released: dict[float, int]


@dataclass(frozen=True)
class Explanation:
    """Why images do or do not exit.

    Attributes:
        n: images that could be used.
        exits: one entry an exit.
        leaving: share of images that exit early as things stand.
        released: for each lower agreement, the share that would.
        reason: why nothing exits, and what to do; None where something does.
    """

    n: int
    exits: list[ExitScores]
    leaving: float
    released: dict[float, float]
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def explain(
    names: list[str],
    recorded: Recorded,
    thresholds: np.ndarray,
    path: np.ndarray,
    path_disagreement: np.ndarray,
    certificate: Certificate,
) -> Explanation:
    """Compare scores with thresholds.

    Args:
        names: of the exits, E.
        recorded: what every exit says of n images, without leaving.
        thresholds: in use, (E, K).
        path: settings that were considered, (S, E, K), surest first.
        path_disagreement: share of the certifying images each of them gives another label, (S,).
        certificate: what was asked and shown.
    """
    n, e = len(recorded), len(names)
    exits = simulate(recorded, thresholds)[1]
    would = {}
    for asked in LOWER:
        if certificate.guarantee == "overall" and certificate.n and asked < 1 - certificate.max_disagreement:
            setting = _certified(path_disagreement, certificate, 1 - asked)
            would[asked] = simulate(recorded, path[setting])[1]
    agrees = recorded.labels == recorded.final[:, None]
    rows = []
    for i, name in enumerate(names):
        scores = recorded.scores[:, i]
        here = exits >= i
        finite = np.sort(thresholds[i])
        three = (finite[0], finite[len(finite) // 2], finite[-1])
        least, median, most = (float(t) if np.isfinite(t) else None for t in three)
        top = np.argsort(-np.nan_to_num(scores, nan=-1.0), kind="stable")[: max(1, round(SUREST * n))]
        rows.append(
            ExitScores(
                name=name,
                reached=int(here.sum()),
                left=int((exits == i).sum()),
                histogram=np.histogram(scores[here & np.isfinite(scores)], bins=BINS, range=(0, 1))[0].tolist(),
                threshold=(least, median, most),
                surest=float(agrees[top, i].mean()),
                released={asked: int((leaves == i).sum()) for asked, leaves in would.items()},
            )
        )
    leaving = float((exits < e).mean())
    released = {asked: float((leaves < e).mean()) for asked, leaves in would.items()}
    return Explanation(n, rows, leaving, released, _reason(rows, leaving, released, recorded, thresholds, certificate))


def _certified(path_disagreement: np.ndarray, certificate: Certificate, max_disagreement: float) -> int:
    """The setting that would be certified: the last before the first that disagrees too often (see `certify`)."""
    allowed = most_disagreements(certificate.n, max_disagreement, certificate.confidence)
    fails = np.flatnonzero(np.round(path_disagreement[1:] * certificate.n) > allowed)
    return int(fails[0]) if len(fails) else len(path_disagreement) - 1


def _reason(
    rows: list[ExitScores],
    leaving: float,
    released: dict[float, float],
    recorded: Recorded,
    thresholds: np.ndarray,
    certificate: Certificate,
) -> str | None:
    if leaving > 0:
        return None
    asked = certificate.max_disagreement
    if certificate.n == 0:
        return "no image exits: nothing was held out (holdout=0), so no threshold was set; call calibrate(images)"
    needed = certificate.fewest
    if certificate.n < needed:
        return (
            f"no image exits: {certificate.n} images certify nothing; a disagreement of {asked:.1%} with confidence "
            f"{certificate.confidence:.0%} needs at least {needed}: calibrate on more images, allow more disagreement, "
            "or ask for less confidence"
        )
    best = max(rows, key=lambda row: row.surest)
    if best.surest < 1 - asked:
        return (
            f"no image exits: even the surest {SUREST:.0%} at {best.name} agree with the full encoder on only "
            f"{best.surest:.1%}, and {1 - asked:.1%} is asked. The exits know too little of the final clusters: try "
            'rule="mlp", deeper exits, another number of clusters, an encoder trained for early exits, or a larger '
            "max_disagreement"
        )
    finite = thresholds[np.isfinite(thresholds)]
    if len(finite) and np.nanmax(recorded.scores) < finite.min():
        return (
            f"no image exits: the largest score is {np.nanmax(recorded.scores):.3f} and the lowest threshold "
            f"{finite.min():.3f}. These images are unlike those that set the thresholds, or were prepared differently: "
            "check the preprocessing, or calibrate on images like these"
        )
    if certificate.settings > 0:
        return (
            "no image exits: thresholds were certified, but every one of these images scores below its own. They are "
            "harder than, or unlike, those that set the thresholds: check the preprocessing, or calibrate on images "
            "like these"
        )
    easier = [level for level, share in released.items() if share > 0]
    remedy = (
        f"max_disagreement={1 - easier[0]:.2f} would release {released[easier[0]]:.1%}"
        if easier
        else ("no agreement that was tried would release any")
    )
    return (
        f"no image exits: no setting keeps a disagreement of {asked:.1%} with confidence "
        f"{certificate.confidence:.0%} on {certificate.n} held-out images; {remedy}. More held-out images leave a "
        "smaller safety margin; "
        'rule="mlp" makes exits surer'
    )

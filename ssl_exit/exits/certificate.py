"""Certificates: how often labels differ from the whole encoder's, shown on held-out images without labels.

Which promise is made is the `guarantee`, with eps = max_disagreement and delta = 1 - confidence:

    "overall"      Of all images at most eps disagree, with probability 1 - delta over the draw of the held-out images.
    "cluster"      Of the images of every final cluster at most eps disagree; all at once with probability 1 - delta.
    "exit"         Of the images that leave at an exit with a label at most eps disagree, for every exit and label; all
                   at once with probability 1 - delta.
    "expectation"  The share that disagrees is at most eps on average over draws of the held-out images; a single draw
                   may be above.

All of them hold for images drawn like the held-out ones, and independently; copies of an image count once. They do not
hold after a drift (see `ssl_exit.drift`), nor where held-out images resemble each other more than those to come do,
such as frames of one film.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import beta, binom

from ssl_exit.exits.thresholds import NEVER, Recorded, simulate
from ssl_exit.fingerprint import Fingerprint

SURE = 2.0  # standard deviations by which an exit and label should pass to be tried
GUARANTEES = ("overall", "cluster", "exit", "expectation")


@dataclass(frozen=True)
class Part:
    """One of the shares that a finer certificate is about.

    Attributes:
        exit: index of the exit images leave at; None for all.
        cluster: the label they leave with; where `exit` is None, the whole encoder's label.
        n: such images among those that certify.
        disagreements: of those.
        bound: Clopper-Pearson upper bound on the share, at the confidence of all parts together.
    """

    exit: int | None
    cluster: int
    n: int
    disagreements: int
    bound: float


@dataclass(frozen=True)
class Certificate:
    """What was shown of the thresholds in use, on held-out images that did not shape them.

    Attributes:
        max_disagreement: eps, the share of images whose label may differ from the whole encoder's.
        confidence: 1 - delta, the probability, over the draw of the held-out images, that the claim holds.
        guarantee: which claim (see above).
        n: held-out images on which settings were tried.
        disagreements: of those, how many got another label than the whole encoder's.
        bound: Clopper-Pearson upper bound on the share of disagreement, at `confidence`, for a setting fixed
            in advance.
        early: share of those images that left before the end.
        settings: how many settings of the path were accepted; with none, nothing exits early.
        cost: mean cost of those images / the whole encoder's.
        cost_without: the least of a setting whose share seen is at most eps over all images, with no margin for chance:
            the difference is what certainty costs.
        tests: how many parts share delta.
        parts: of the finer guarantees, those where images may leave.
        fingerprint: what the claim is about.
        void: why it no longer holds; empty while it does.
    """

    max_disagreement: float
    confidence: float
    guarantee: str
    n: int
    disagreements: int
    bound: float
    early: float
    settings: int
    cost: float
    cost_without: float
    tests: int = 1
    parts: list[Part] = field(default_factory=list)
    fingerprint: Fingerprint | None = None
    void: str = ""

    def __str__(self) -> str:
        if self.void:
            return f"void, {self.void}; call calibrate() again. It said: {self._claim()}"
        return self._claim()

    def _claim(self) -> str:
        eps, sure = f"{self.max_disagreement:.2%}", f"with confidence {self.confidence:.0%}"
        if self.settings == 0:
            needed, least = self.fewest, min([part.n for part in self.parts], default=self.n)
            why = "even the surest setting disagrees too often"
            if self.guarantee == "exit":
                why = f"of those that leave at an exit with a label at least {needed} are needed"
            elif self.guarantee == "cluster" and least < needed:
                why = f"at least {needed} are needed of every cluster, and one has {least}"
            elif self.n < needed:
                why = f"at least {needed} are needed"
            return (
                f"no image may exit early: {self.n} held-out images certify no setting at disagreement <= {eps} {sure}"
                f"{WHERE[self.guarantee]} ({why}; give calibrate() more images, raise max_disagreement or lower "
                "confidence)"
            )
        claim = f"disagreement <= {eps} {sure}{WHERE[self.guarantee]}"
        if self.guarantee == "expectation":
            claim = f"expected disagreement <= {eps}"
        return f"{claim} ({self.disagreements} of {self.n} held-out images disagree, {self.early:.1%} exit early)"

    @property
    def fewest(self) -> int:
        """Held-out images without which nothing can be certified; of "cluster", in each; of "exit", in one of them."""
        if self.guarantee == "expectation":
            return fewest_on_average(self.max_disagreement)
        return fewest_images(self.max_disagreement, 1 - (1 - self.confidence) / self.tests)

    def checked(self, now: Fingerprint) -> "Certificate":
        """The same, void if what it is about is no longer what it was; images and version may be anything."""
        assert self.fingerprint is not None
        then = self.fingerprint
        changed = [what for name, what in PARTS.items() if getattr(then, name) != getattr(now, name)]
        return replace(self, void=f"{' and '.join(changed)} changed since it was issued" if changed else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Certificate":
        """What `to_dict` gave."""
        parts = [Part(**part) for part in given["parts"]]
        fingerprint = Fingerprint(**given["fingerprint"]) if given["fingerprint"] else None
        return cls(**given | {"parts": parts, "fingerprint": fingerprint})


PARTS = {"encoder": "encoder", "preprocessing": "preprocessing", "exits": "thresholds, rules or clusters"}
WHERE = {"overall": "", "cluster": " in every cluster", "exit": " at every exit and label", "expectation": ""}


def certify(
    path: np.ndarray,
    recorded: Recorded,
    costs: np.ndarray,
    max_disagreement: float,
    confidence: float,
    guarantee: str = "overall",
) -> tuple[np.ndarray, Certificate]:
    """Walk a path of settings and keep the cheapest of those accepted before the first that is not.

    Fixed-sequence testing (Angelopoulos et al., "Learn then Test", arXiv 2110.01052, section 3): the hypothesis
    "disagreement > eps" of each setting is rejected while P(Bin(n, eps) <= disagreements) <= delta; the first that
    cannot be rejected ends the walk, so the error rate of the whole walk is delta. For the finer guarantees every part
    is such a walk at delta / number of parts (union bound), and the first to end ends all.

    "expectation" is conformal risk control (Angelopoulos et al., arXiv 2208.02814, theorem 1): a setting is accepted
    while (losses + 1) / (n + 1) <= eps, an image's loss being whether it disagreed at this setting or any before, so
    that losses only grow along the path.

    Args:
        path: thresholds of each setting, (S, E, K), the first of which lets nothing exit.
        recorded: held-out images that did not shape the path.
        costs: cost of leaving at each exit and, last, of the whole encoder, (E + 1,).
        max_disagreement: eps.
        confidence: 1 - delta.
        guarantee: one of GUARANTEES.

    Returns:
        The thresholds to use, (E, K), and their certificate.
    """
    n, (_, e, k) = len(recorded), path.shape
    tests = {"cluster": k, "exit": max(1, int((path < NEVER).any(0).sum()))}.get(guarantee, 1)
    passes = _test(guarantee, recorded, k, e, max_disagreement, (1 - confidence) / tests)
    accepted, settings, walking, least, without = 0, 0, True, np.inf, float(n) * costs[-1]
    for i, thresholds in enumerate(path[1:], start=1):
        labels, exits = simulate(recorded, thresholds)
        wrong = labels != recorded.final
        walking = walking and passes(thresholds, labels, exits, wrong)
        cost = float(costs[exits].sum())
        if walking and (thresholds < NEVER).any():
            settings += 1
            if cost <= least:
                accepted, least = i, cost
        if wrong.sum() <= max_disagreement * n:
            without = min(without, cost)
        elif not walking:
            break
    labels, exits = simulate(recorded, path[accepted])
    wrong = labels != recorded.final
    certificate = Certificate(
        max_disagreement=max_disagreement,
        confidence=confidence,
        guarantee=guarantee,
        n=n,
        disagreements=int(wrong.sum()),
        bound=upper_bound(int(wrong.sum()), n, confidence),
        early=float((exits < e).mean()) if n else 0.0,
        settings=settings,
        cost=float(costs[exits].mean()) if n else 1.0,
        cost_without=without / n if n else 1.0,
        tests=tests,
        parts=_parts(guarantee, path[accepted], labels, exits, wrong, recorded.final, (1 - confidence) / tests),
    )
    return path[accepted], certificate


Passes = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], bool]


def _test(guarantee: str, recorded: Recorded, k: int, e: int, eps: float, delta: float) -> Passes:
    """Whether a setting passes at level delta a part, from its thresholds, labels, exits and which of them disagree."""
    n, ever = len(recorded), np.zeros(len(recorded), dtype=bool)

    def overall(thresholds: np.ndarray, labels: np.ndarray, exits: np.ndarray, wrong: np.ndarray) -> bool:
        return bool(binom.cdf(wrong.sum(), n, eps) <= delta)

    def cluster(thresholds: np.ndarray, labels: np.ndarray, exits: np.ndarray, wrong: np.ndarray) -> bool:
        of_each = np.bincount(recorded.final, minlength=k)
        errors = np.bincount(recorded.final[wrong], minlength=k)
        return bool((binom.cdf(errors, of_each, eps) <= delta).all())

    def exit_(thresholds: np.ndarray, labels: np.ndarray, exits: np.ndarray, wrong: np.ndarray) -> bool:
        leaving, errors = _cells(labels, exits, wrong, e, k)
        open_ = thresholds < NEVER
        return bool((binom.cdf(errors, leaving, eps) <= delta)[open_].all())

    def expectation(thresholds: np.ndarray, labels: np.ndarray, exits: np.ndarray, wrong: np.ndarray) -> bool:
        np.logical_or(ever, wrong, out=ever)
        return bool((ever.sum() + 1) / (n + 1) <= eps)

    return {"overall": overall, "cluster": cluster, "exit": exit_, "expectation": expectation}[guarantee]


def _parts(
    guarantee: str,
    thresholds: np.ndarray,
    labels: np.ndarray,
    exits: np.ndarray,
    wrong: np.ndarray,
    final: np.ndarray,
    delta: float,
) -> list[Part]:
    each: list[tuple[int | None, int, np.ndarray]] = []
    if guarantee == "cluster":
        each = [(None, c, final == c) for c in range(thresholds.shape[1])]
    elif guarantee == "exit":
        each = [(x, c, (exits == x) & (labels == c)) for x, c in np.argwhere(thresholds < NEVER).tolist()]
    return [
        Part(x, c, m := int(at.sum()), d := int(wrong[at].sum()), upper_bound(d, m, 1 - delta)) for x, c, at in each
    ]


def _cells(labels: np.ndarray, exits: np.ndarray, wrong: np.ndarray, e: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """How many images leave at each exit with each label, and how many of those disagree: (E, K) each."""
    early = exits < e
    cell = exits[early] * k + labels[early]
    leaving = np.bincount(cell, minlength=e * k)
    errors = np.bincount(cell[wrong[early]], minlength=e * k)
    return leaving.reshape(e, k), errors.reshape(e, k)


def close_thin_cells(
    path: np.ndarray, recorded: Recorded, n: int, max_disagreement: float, confidence: float
) -> np.ndarray:
    """A path for the guarantee "exit": exits and labels that n further images would hardly certify let nothing leave.

    Exit by exit, since who reaches an exit depends on those before.

    Args:
        path: thresholds of each setting, (S, E, K).
        recorded: the images that shaped it; the others are like them.
        n: images that will certify.
        max_disagreement: eps.
        confidence: 1 - delta.
    """
    _, e, k = path.shape
    delta = (1 - confidence) / (e * k)
    scale = n / max(1, len(recorded))
    closed = path.copy()
    for thresholds in closed:
        here = np.ones(len(recorded), dtype=bool)
        for x in range(e):
            labels = recorded.labels[:, x]
            leaving = here & (recorded.scores[:, x] >= thresholds[x, labels])
            expected = scale * np.bincount(labels[leaving], minlength=k)
            wrong = labels[leaving] != recorded.final[leaving]
            errors = scale * (0.5 + np.bincount(labels[leaving], weights=wrong, minlength=k))
            most = np.ceil(errors + SURE * np.sqrt(errors))
            likely = binom.cdf(most, np.floor(expected), max_disagreement) <= delta
            thresholds[x, ~likely] = NEVER
            here &= ~(leaving & likely[labels])
    return closed


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


def fewest_on_average(max_disagreement: float) -> int:
    """The fewest images, none of which disagrees, with which eps holds in expectation: 1 / (n + 1) <= eps."""
    return int(np.ceil(1 / max_disagreement)) - 1


def upper_bound(disagreements: int, n: int, confidence: float) -> float:
    """Clopper-Pearson upper bound on a share (Clopper & Pearson, Biometrika 1934), one-sided."""
    return 1.0 if disagreements >= n else float(beta.ppf(confidence, disagreements + 1, n - disagreements))

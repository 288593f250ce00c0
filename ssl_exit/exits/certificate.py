"""Certificates: how often labels differ from the full encoder's, shown on held-out images without labels.

Which promise is made is the `guarantee`, with eps = max_disagreement and delta = 1 - confidence:

    "overall"      Of all images at most eps disagree, with probability 1 - delta over the draw of the held-out images.
    "cluster"      Of the images of every final cluster at most eps disagree; all at once with probability 1 - delta.
    "exit"         Of the images that leave at an exit with a label at most eps disagree, for every exit and label; all
                   at once with probability 1 - delta.
    "expectation"  The share that disagrees is at most eps on average over draws of the held-out images; a single draw
                   may be above.

All of them hold for images drawn like the held-out ones, and independently; copies of an image count once. They do not
hold after a drift (see `ssl_exit.exits.audit`), nor where held-out images resemble each other more than those to come
do, such as frames of one film.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from ssl_exit.exits.thresholds import NEVER, Recorded, simulate
from ssl_exit.settings import Guarantee

SURE = 2.0  # standard deviations by which an exit and label should pass to be tried
GUARANTEES = get_args(Guarantee)


@dataclass(frozen=True)
class Part:
    """One of the shares that a finer certificate is about.

    Attributes:
        exit: index of the exit images leave at; None for all.
        cluster: the label they leave with; where `exit` is None, the full encoder's label.
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
        max_disagreement: eps, the share of images whose label may differ from the full encoder's.
        confidence: 1 - delta, the probability, over the draw of the held-out images, that the claim holds.
        guarantee: which claim (see above).
        n: held-out images on which settings were tried.
        disagreements: of those, how many got another label than the full encoder's.
        bound: Clopper-Pearson upper bound on the share of disagreement, at `confidence`, for a setting fixed
            in advance.
        early: share of those images that left before the end.
        settings: how many settings of the path were accepted; with none, or where the cheapest of them would cost more
            than the full encoder, nothing exits early.
        cost: mean cost of those images / the full encoder's.
        cost_without: the least of a setting whose share seen is at most eps over all images, with no margin for chance:
            the difference is what certainty costs.
        tests: number of parts that share delta.
        parts: of the finer guarantees, those where images may leave.
        issued_for: hashes of what the claim is about, by name: encoder, preprocessing, exits, images, version.
        void: why it no longer holds; empty while it does.
    """

    max_disagreement: float
    confidence: float
    guarantee: Guarantee | Literal["mixture", "client"]
    n: int
    disagreements: int
    bound: float
    early: float
    settings: int
    cost: float
    cost_without: float
    tests: int = 1
    parts: list[Part] = field(default_factory=list)
    issued_for: dict[str, str] | None = None
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
            elif self.guarantee == "client":
                why = f"every client must certify it by itself, which takes {needed} images or more"
            elif self.n < needed:
                why = f"at least {needed} are needed"
            return (
                f"no image may exit early: {self.n} held-out images certify no setting at disagreement <= {eps} {sure}"
                f"{WHERE[self.guarantee]} ({why}; call calibrate() with more images, raise max_disagreement or lower "
                "confidence)"
            )
        if self.early == 0:
            return (
                f"no image exits early: what {self.n} held-out images certify at disagreement <= {eps} {sure}"
                f"{WHERE[self.guarantee]} would cost more than the full encoder (raise max_disagreement, or fit with "
                "exits or a front that cost less)"
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

    def checked(self, now: Mapping[str, str]) -> "Certificate":
        """The same, void if what it is about has other hashes now; images and version may be anything."""
        then = self.issued_for or {}
        changed = [what for name, what in PARTS.items() if then.get(name) != now[name]]
        return replace(self, void=f"{' and '.join(changed)} changed since it was issued" if changed else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


PARTS = {"encoder": "encoder", "preprocessing": "preprocessing", "exits": "thresholds, rules or clusters"}
WHERE = {"overall": "", "cluster": " in every cluster", "exit": " at every exit and label", "expectation": "",
         "mixture": " over the images of all clients", "client": " at every client"}  # fmt: skip


@dataclass(frozen=True)
class SettingCounts:
    """What every setting of a path does to held-out images, in numbers that add up over shards.

    Attributes:
        left: images that leave at each exit with each label, (S, E, K) int64.
        wrong: of those, the ones whose label disagrees, (S, E, K) int64.
        of_cluster: images of every final cluster, by the full encoder's label, (K,) int64.
        wrong_of_cluster: of those, the ones that get another label, (S, K) int64.
        ever_wrong: images that get another label at this setting or any before, (S,) int64.
    """

    left: np.ndarray
    wrong: np.ndarray
    of_cluster: np.ndarray
    wrong_of_cluster: np.ndarray
    ever_wrong: np.ndarray

    @classmethod
    def count(cls, path: np.ndarray, recorded: Recorded) -> "SettingCounts":
        """Simulate every setting, thresholds (S, E, K), on recorded images."""
        s, e, k = path.shape
        left, wrong = np.zeros((s, e, k), dtype=np.int64), np.zeros((s, e, k), dtype=np.int64)
        wrong_of_cluster, ever_wrong = np.zeros((s, k), dtype=np.int64), np.zeros(s, dtype=np.int64)
        ever = np.zeros(len(recorded), dtype=bool)
        for i, thresholds in enumerate(path):
            labels, exits = simulate(recorded, thresholds)
            disagrees, early = labels != recorded.final, exits < e
            cell = exits * k + labels
            left[i] = np.bincount(cell[early], minlength=e * k).reshape(e, k)
            wrong[i] = np.bincount(cell[disagrees], minlength=e * k).reshape(e, k)
            wrong_of_cluster[i] = np.bincount(recorded.final[disagrees], minlength=k)
            ever |= disagrees
            ever_wrong[i] = ever.sum()
        return cls(left, wrong, np.bincount(recorded.final, minlength=k), wrong_of_cluster, ever_wrong)

    def __add__(self, other: "SettingCounts") -> "SettingCounts":
        """The counts of both sets of images, for the same path."""
        return SettingCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.of_cluster.sum())

    @property
    def disagreements(self) -> np.ndarray:
        """Images that get another label than the full encoder's, (S,)."""
        return self.wrong_of_cluster.sum(1)

    def cost(self, costs: np.ndarray) -> np.ndarray:
        """Mean cost of every setting, (S,), with that of leaving at each exit and at the end, (E + 1,); 1 without
        images."""
        at_exit = self.left.sum(2)
        at_end = self.n - at_exit.sum(1, keepdims=True)
        return np.hstack([at_exit, at_end]) @ costs / self.n if self.n else np.ones(len(at_exit))


def certify(
    path: np.ndarray,
    counts: SettingCounts,
    costs: np.ndarray,
    max_disagreement: float,
    confidence: float,
    guarantee: Guarantee | Literal["mixture", "client"] = "overall",
    passes: np.ndarray | None = None,
    tests: int = 1,
) -> tuple[int, Certificate]:
    """Walk a path of settings and keep the cheapest of those accepted before the first that is not; the first setting,
    with which nothing exits, if none of them costs less than the full encoder.

    Fixed-sequence testing (Angelopoulos et al., "Learn then Test", arXiv 2110.01052, section 3): the hypothesis
    "disagreement > eps" of each setting is rejected while P(Bin(n, eps) <= disagreements) <= delta; the first that
    cannot be rejected ends the walk, so the error rate of the whole walk is delta. For the finer guarantees every part
    is such a walk at delta / number of parts (union bound), and the first to end ends all.

    "expectation" is conformal risk control (Angelopoulos et al., arXiv 2208.02814, theorem 1): a setting is accepted
    while (losses + 1) / (n + 1) <= eps, an image's loss being whether it disagreed at this setting or any before, so
    that losses only grow along the path.

    Args:
        path: thresholds of each setting, (S, E, K), the first of which lets nothing exit.
        counts: of held-out images that did not shape the path.
        costs: cost of leaving at each exit and, last, of the full encoder, (E + 1,).
        max_disagreement: eps.
        confidence: 1 - delta.
        guarantee: one of GUARANTEES, or of `ssl_exit.exits.mixture`.
        passes: which settings pass, (S,) bool, where another test than this one's says so.
        tests: number of parts that shared delta in it.

    Returns:
        The index of the setting to use, and its certificate.
    """
    n, k = counts.n, path.shape[2]
    tests = {"cluster": k, "exit": max(1, int((path < NEVER).any(0).sum()))}.get(guarantee, tests)
    delta = (1 - confidence) / tests
    opens: np.ndarray = np.asarray((path < NEVER).any((1, 2)))
    cost, wrong = counts.cost(costs), counts.disagreements
    passes = _passes(path, counts, guarantee, max_disagreement, delta) if passes is None else passes.copy()
    passes[0] = True  # nothing exits
    end = len(path) if passes.all() else int(passes.argmin())
    accepted = np.flatnonzero(opens[:end])
    chosen = int(accepted[len(accepted) - 1 - cost[accepted][::-1].argmin()]) if len(accepted) else 0
    pays = chosen > 0 and cost[chosen] < 1
    chosen = chosen if pays else 0  # where nothing exits, no exit works either
    within = wrong <= max_disagreement * n
    beyond = np.flatnonzero(~within[end:])
    stop = end + int(beyond[0]) if len(beyond) else len(path)
    certificate = Certificate(
        max_disagreement=max_disagreement,
        confidence=confidence,
        guarantee=guarantee,
        n=n,
        disagreements=int(wrong[chosen]),
        bound=upper_bound(int(wrong[chosen]), n, confidence),
        early=float(counts.left[chosen].sum() / n) if n else 0.0,
        settings=len(accepted),
        cost=float(cost[chosen]) if pays else 1.0,
        cost_without=float(cost[:stop][within[:stop]].min()) if n else 1.0,
        tests=tests,
        parts=_parts(guarantee, path[chosen], counts, chosen, delta),
    )
    return chosen, certificate


def _passes(path: np.ndarray, counts: SettingCounts, guarantee: str, eps: float, delta: float) -> np.ndarray:
    """Which settings pass at level delta a part, (S,) bool."""
    from scipy.special import bdtr  # the binomial distribution

    if guarantee == "expectation":
        return (counts.ever_wrong + 1) / (counts.n + 1) <= eps
    if guarantee == "cluster":
        return (bdtr(counts.wrong_of_cluster, counts.of_cluster, eps) <= delta).all(1)
    if guarantee == "exit":
        return ((bdtr(counts.wrong, counts.left, eps) <= delta) | (path == NEVER)).all((1, 2))
    return np.asarray(bdtr(counts.disagreements, counts.n, eps) <= delta)


def _parts(guarantee: str, thresholds: np.ndarray, counts: SettingCounts, setting: int, delta: float) -> list[Part]:
    each: list[tuple[int | None, int, int, int]] = []
    if guarantee == "cluster":
        pairs = zip(counts.of_cluster.tolist(), counts.wrong_of_cluster[setting].tolist(), strict=True)
        each = [(None, c, n, d) for c, (n, d) in enumerate(pairs)]
    elif guarantee == "exit":
        left, wrong = counts.left[setting], counts.wrong[setting]
        each = [(x, c, int(left[x, c]), int(wrong[x, c])) for x, c in np.argwhere(thresholds < NEVER).tolist()]
    return [Part(x, c, n, d, upper_bound(d, n, 1 - delta)) for x, c, n, d in each]


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
    from scipy.special import bdtr

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
            likely = bdtr(np.minimum(most, expected // 1), (expected // 1).astype(np.int64), max_disagreement) <= delta
            thresholds[x, ~likely] = NEVER
            here &= ~(leaving & likely[labels])
    return closed


def most_disagreements(n: int, max_disagreement: float, confidence: float) -> int:
    """The most disagreements among n images that still certify eps: P(Bin(n, eps) <= k) <= delta; -1 if none."""
    from scipy.special import bdtr

    return int(np.searchsorted(bdtr(np.arange(n + 1), n, max_disagreement), 1 - confidence, side="right")) - 1


def fewest_images(max_disagreement: float, confidence: float) -> int:
    """The fewest images, none of which disagrees, that certify eps: (1 - eps)^n <= delta."""
    return int(np.ceil(np.log(1 - confidence) / np.log1p(-max_disagreement)))


def fewest_on_average(max_disagreement: float) -> int:
    """The fewest images, none of which disagrees, with which eps holds in expectation: 1 / (n + 1) <= eps."""
    return int(np.ceil(1 / max_disagreement)) - 1


def upper_bound(disagreements: int, n: int, confidence: float) -> float:
    """Clopper-Pearson upper bound on a share (Clopper & Pearson, Biometrika 1934), one-sided."""
    from scipy.special import betaincinv

    return 1.0 if disagreements >= n else float(betaincinv(disagreements + 1, n - disagreements, confidence))

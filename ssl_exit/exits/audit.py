"""The drift audit: does what was certified still hold of the images that come in?

A random share q of the images that leave early goes on to the end as well. For image t let Y_t = 1/q where it was
audited and its label differs from the full encoder's, else 0: its mean is the share of disagreement over all images,
which is what the audit watches, whichever the guarantee. Against "that share is at most eps" one bets with wealth

    W_t = W_{t-1} (1 + lambda (Y_t - eps)),        0 < lambda < 1 / eps,

a nonnegative supermartingale while the claim holds, so that it ever reaches 1 / alpha with probability at most alpha
(Ville): over any length of stream. (Betting: Waudby-Smith & Ramdas, arXiv 2010.09686.) Wealth is spread over a few
lambdas, and over moments at which betting begins, one every BLOCK images with weights 1 / (j + 1)(j + 2): a drift after
a long calm is found nearly as fast as one at the start.
"""

from collections import deque

import numpy as np

from ssl_exit.errors import InputError

BLOCK = 500  # images between two moments at which betting begins
RECENT = 4  # blocks from which the disagreement is estimated
BETS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # lambda / q: how many times its wealth a bet gains by a disagreement


class DriftAudit:
    """Watches one stream of images.

    Attributes:
        max_disagreement: eps.
        share: q, of the images that leave early.
        false_alarm: alpha, the probability of an alarm, ever, while the claim holds.
        images: seen so far.
        audited: of those.
        disagreements: of the audited.
        alarm: how many images had been seen when wealth reached 1 / alpha; None before.

    Raises:
        InputError: numbers out of range.
    """

    def __init__(self, max_disagreement: float, share: float, false_alarm: float = 0.01) -> None:
        if not (0 < max_disagreement < 1 and 0 < share <= 1 and 0 < false_alarm < 1):
            raise InputError(
                "an audit needs max_disagreement and false_alarm in (0, 1) and a share in (0, 1]; got "
                f"{max_disagreement}, {false_alarm} and {share}"
            )
        self.max_disagreement, self.share, self.false_alarm = max_disagreement, share, false_alarm
        self.images = self.audited = self.disagreements = 0
        self.alarm: int | None = None
        stakes = np.array([bet * share for bet in BETS if bet * share * max_disagreement < 1])  # lambda
        self._lost = np.log1p(-stakes * max_disagreement)
        self._won = np.log1p(stakes * (1 / share - max_disagreement))
        self._running = np.full(len(stakes), -np.inf)  # log wealth of what has begun
        self._largest = 0.0
        self._recent: deque[list[int]] = deque(maxlen=RECENT)  # of the last blocks: images and disagreements

    @property
    def evidence(self) -> float:
        """The largest wealth so far: against the claim, 1 / alpha raises the alarm."""
        return float(np.exp(min(self._largest, 700.0)))

    def choose(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Which of n images go on to the end wherever they leave, (n,) bool."""
        return rng.random(n) < self.share

    def take(self, labels: np.ndarray, audited: np.ndarray, rng: np.random.Generator) -> bool:
        """Take in images in random order, since a folder comes class by class.

        Args:
            labels: of the images, (N,) int64; -1 for one that could not be used.
            audited: label of the full encoder for those that left early and went on all the same; -1 for others.
            rng: of the order.

        Returns:
            Whether this raised the alarm.
        """
        before = self.alarm
        rows = rng.permutation(np.flatnonzero(labels >= 0))
        self.update(audited[rows] >= 0, audited[rows] != labels[rows])
        return before is None and self.alarm is not None

    def update(self, audited: np.ndarray, disagree: np.ndarray) -> None:
        """Take in images in the order of the stream.

        Args:
            audited: which left early and went on all the same, (N,) bool.
            disagree: which of those got another label at the end, (N,) bool.
        """
        from scipy.special import logsumexp

        done = 0
        while done < len(audited):
            if self.images % BLOCK == 0:
                self._begin(self.images // BLOCK)
                self._recent.append([0, 0])
            rows = slice(done, done + min(BLOCK - self.images % BLOCK, len(audited) - done))
            wrong = audited[rows] & disagree[rows]
            gains = np.where(wrong[:, None], self._won, self._lost).cumsum(axis=0)
            begun = 1 + self.images // BLOCK
            wealth = logsumexp(self._running + gains, axis=1) - np.log(len(self._running))
            wealth = np.logaddexp(wealth, -np.log(begun + 1))  # what has not begun yet: sum of the weights to come
            self._running = self._running + gains[-1]
            self._largest = max(self._largest, float(wealth.max()))
            above = np.flatnonzero(wealth >= -np.log(self.false_alarm))
            if self.alarm is None and len(above):
                self.alarm = self.images + int(above[0]) + 1
            self.images += len(wrong)
            self._recent[-1][0] += len(wrong)
            self._recent[-1][1] += int(wrong.sum())
            self.audited += int(audited[rows].sum())
            self.disagreements += int(wrong.sum())
            done = rows.stop

    def __str__(self) -> str:
        seen = (
            f"{self.disagreements} of {self.audited} audited images disagree with the full encoder, among "
            f"{self.images} images; evidence {self.evidence:.3g}"
        )
        if self.alarm is None:
            return f"no drift found ({seen} of {1 / self.false_alarm:.0f})"
        images, disagreements = np.sum(self._recent, axis=0)
        estimate = disagreements / self.share / images
        return (
            f"agreement has fallen below what was certified: after {self.alarm} images the evidence reached "
            f"{1 / self.false_alarm:.0f} ({seen}; disagreement of the last {images} about {estimate:.1%}, "
            f"certified {self.max_disagreement:.1%}). The images have changed: call calibrate() on new ones"
        )

    def _begin(self, block: int) -> None:
        """Let the bets of a block begin, with weight 1 / (j + 1)(j + 2)."""
        self._running = np.logaddexp(self._running, -np.log((block + 1.0) * (block + 2.0)))

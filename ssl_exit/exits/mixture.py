"""Certificates from the counts of several clients, whose images are drawn from different distributions.

    "mixture"  Of the images of all clients together, each as often as it has images that certify, at most eps disagree,
               with probability 1 - delta.
    "client"   Of the images of every client at most eps disagree; all at once with probability 1 - delta.

Client i draws n_i images, each of which disagrees with probability p_i. The sum X of these unequal Bernoulli variables
has a lighter lower tail than the binomial with the mean probability p = sum n_i p_i / n: P(X <= c) <= P(Bin(n, p) <= c)
for c <= n p - 1 (Hoeffding, Annals of Mathematical Statistics 1956, theorem 4). So the binomial test of
`ssl_exit.exits.certificate` holds for the mixture, where it accepts no more than n eps - 1 disagreements.

Both take the images of a client to be drawn independently. "mixture" takes those of different clients to be
independent too: where clients hold copies of the same images, use "client". Neither claims anything of clients that
gave no counts.
"""

from collections.abc import Sequence

import numpy as np

from ssl_exit.exits.certificate import SettingCounts


def mixture_passes(each: Sequence[SettingCounts], max_disagreement: float, delta: float, trim: int = 0) -> np.ndarray:
    """Which settings pass for the images of all clients together, (S,) bool.

    With `trim` clients that may say anything, at every setting those are left out that speak most for it, by
    n eps - disagreements, and a setting must pass with them too.

    Args:
        each: counts of every client.
        max_disagreement: eps.
        delta: 1 - confidence.
        trim: number of clients left out.
    """
    from scipy.special import bdtr

    n, wrong = _columns(each)

    def passes(n: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        total, disagreements = np.broadcast_to(n, wrong.shape).sum(1), wrong.sum(1)
        light = disagreements <= total * max_disagreement - 1
        return np.asarray(light & (bdtr(disagreements, total, max_disagreement) <= delta))

    if not trim:
        return passes(n, wrong)
    kept = np.argsort(wrong - max_disagreement * n, axis=1, kind="stable")[:, trim:]
    return passes(n, wrong) & passes(n[kept], np.take_along_axis(wrong, kept, axis=1))


def client_passes(each: Sequence[SettingCounts], max_disagreement: float, delta: float) -> np.ndarray:
    """Which settings pass at every client, (S,) bool: one walk a client at delta / number of clients (union bound)."""
    from scipy.special import bdtr

    n, wrong = _columns(each)
    return np.asarray((bdtr(wrong, n, max_disagreement) <= delta / max(1, len(each))).all(1))


def _columns(each: Sequence[SettingCounts]) -> tuple[np.ndarray, np.ndarray]:
    """Images of every client, (M,), and how many of them disagree at every setting, (S, M)."""
    return np.array([counts.n for counts in each]), np.stack([counts.disagreements for counts in each], axis=1)

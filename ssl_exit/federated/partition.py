"""Images divided among clients, for experiments."""

import numpy as np

from ssl_exit.errors import InputError


def dirichlet_split(targets: np.ndarray, n_clients: int, alpha: float, seed: int = 0) -> list[np.ndarray]:
    """Positions of the images of every client: the images of each class are shared out by proportions from a Dirichlet
    distribution (Hsu, Qi & Brown, arXiv 1909.06335), so that small alpha makes clients unlike each other.

    Args:
        targets: classes, (N,) int.
        n_clients: M.
        alpha: > 0; infinity shares every class out evenly.
        seed: of the draw.

    Returns:
        M arrays of positions, rising; every image is in one. A client without any is given one of the largest's.
    """
    classes = np.asarray(targets)
    if not (alpha > 0 and 1 <= n_clients <= len(classes)):
        raise InputError(f"a split needs alpha > 0 and 1 to {len(classes)} clients; got {alpha} and {n_clients}")
    rng = np.random.default_rng(seed)
    owner = np.empty(len(classes), dtype=np.int64)
    for value in np.unique(classes):
        positions = rng.permutation(np.flatnonzero(classes == value))
        shares = np.full(n_clients, 1 / n_clients) if np.isinf(alpha) else rng.dirichlet(np.full(n_clients, alpha))
        ends = np.round(np.cumsum(shares)[:-1] * len(positions)).astype(int)
        for client, part in enumerate(np.split(positions, ends)):
            owner[part] = client
    for client in range(n_clients):
        if not (owner == client).any():
            largest = int(np.bincount(owner, minlength=n_clients).argmax())
            owner[np.flatnonzero(owner == largest)[0]] = client
    return [np.flatnonzero(owner == client) for client in range(n_clients)]

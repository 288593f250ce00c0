"""k-means over clients: a start from their own centroids, and Lloyd's steps by sums and counts."""

import math

import numpy as np

from ssl_exit.exits.kmeans import kmeans


def start_from(centroids: np.ndarray, sizes: np.ndarray, n_clusters: int, *, spherical: bool, seed: int) -> np.ndarray:
    """Cluster the centroids of all clients, each as heavy as it has images: one-shot federated clustering (Dennis, Li &
    Smith, k-FED, arXiv 2103.00697), with weighted k-means in place of its farthest-first start.

    Args:
        centroids: of all clients, (M, F); directions if `spherical`.
        sizes: images of each, (M,).
        n_clusters: K <= M.

    Returns:
        Centroids, (K, F) float32.
    """
    order = np.lexsort([*centroids.T, sizes])  # the same ones, whatever the order of the clients
    return kmeans(centroids[order], n_clusters, spherical=spherical, seed=seed, weights=sizes[order])


def lloyd_step(
    sums: np.ndarray, counts: np.ndarray, pool: np.ndarray, sizes: np.ndarray, *, spherical: bool
) -> np.ndarray:
    """The next centroids: the mean of the images nearest to each, which is exact however clients divide them.

    A cluster that no image is nearest to moves to the client's centroid of most weight x squared distance to all
    centroids that have images.

    Args:
        sums: of the images nearest to each centroid, (K, F) float64.
        counts: of those, (K,).
        pool: centroids of all clients' own k-means, (M, F).
        sizes: images of each of those, (M,).
        spherical: whether centroids are directions.

    Returns:
        Centroids, (K, F) float32.
    """
    centroids = sums / np.maximum(counts, 1)[:, None]
    there = counts > 0
    for k in np.flatnonzero(~there):
        near = np.square(pool[:, None] - centroids[None, there]).sum(2).min(1) if there.any() else np.ones(len(pool))
        centroids[k] = pool[int((near * sizes).argmax())]
        there[k] = True
    if spherical:
        centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return centroids.astype(np.float32)


def trimmed(sums: np.ndarray, counts: np.ndarray, trim: float) -> np.ndarray:
    """Sums over clients, or, with a share `trim` > 0 of clients cut at either end, the coordinate-wise trimmed mean of
    their means (Yin et al., arXiv 1803.01498) times the number of images.

    Args:
        sums: of each client and cluster, (M, K, ...) float64.
        counts: images behind each sum, (M, K).
        trim: in [0, 0.5).

    Returns:
        (K, ...).
    """
    if trim == 0:
        return np.asarray(sums.sum(0))
    from scipy.stats import trim_mean

    result = np.zeros(sums.shape[1:])
    for k, total in enumerate(counts.sum(0)):
        has = counts[:, k] > 0
        if total:
            m = int(has.sum())
            means = (sums[has, k].T / counts[has, k]).T
            cut = min(math.ceil(trim * m), (m - 1) // 2)
            result[k] = trim_mean(means, (cut + 0.5) / m, axis=0) * total  # which rounds down
    return result

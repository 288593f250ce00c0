"""k-means by FAISS, and the matching of one set of clusters to another."""

import numpy as np

from ssl_exit.errors import InputError


def kmeans(
    x: np.ndarray,
    n_clusters: int,
    *,
    spherical: bool = False,
    restarts: int = 5,
    iterations: int = 50,
    seed: int = 0,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Lloyd's k-means on all of `x`; of several starts the best objective wins.

    FAISS refills a cluster that runs empty by splitting a large one, so every centroid is used.

    Args:
        x: points, (N, D); for spherical k-means of unit length.
        n_clusters: K.
        spherical: keep centroids at unit length (cosine instead of Euclidean distance).
        restarts: independent starts.
        iterations: Lloyd steps a start.
        seed: of the first start; the others follow.
        weights: of the points, (N,), at least 0 and not all 0; None: all alike.

    Returns:
        Centroids, (K, D) float32.

    Raises:
        InputError: more clusters than points, or points that are not finite.
    """
    import faiss

    x = np.ascontiguousarray(x, dtype=np.float32)
    if not 1 <= n_clusters <= len(x):
        raise InputError(
            f"k-means needs 1 <= n_clusters <= number of points; got n_clusters={n_clusters} and {len(x)} points: "
            "lower n_clusters or use more images"
        )
    if not np.isfinite(x).all():
        raise InputError("k-means needs finite points; remove those that are NaN or infinite")
    clustering = faiss.Kmeans(
        x.shape[1],
        n_clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),  # never subsample: which points were seen is the caller's choice
    )
    clustering.train(x, None if weights is None else np.ascontiguousarray(weights, dtype=np.float32))
    centroids = clustering.centroids
    assert centroids is not None
    return centroids


def match_clusters(counts: np.ndarray) -> np.ndarray:
    """The one-to-one assignment that keeps the most images (Hungarian method).

    Args:
        counts: images in cluster i of the first clustering and j of the second, (K, K).

    Returns:
        For each cluster of the first clustering its partner in the second, (K,).
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(counts, maximize=True)
    partner = np.empty(len(counts), dtype=np.int64)
    partner[rows] = columns
    return partner

"""How many final clusters: those that are compact, far apart, and found again in other images."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ssl_exit.provenance import ClusterCount

CANDIDATES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 25, 32, 40, 50, 64, 80, 100)
IMAGES = 4_000  # looked at
PER_CLUSTER = 20  # of them at least, for a candidate to be tried
JUDGED = 2_000  # images of a silhouette: it compares all pairs
SPLITS = 4
RESTARTS = 4  # of k-means, each begun by k-means++


def choose_n_clusters(
    features: Tensor,
    *,
    spherical: bool,
    seed: int,
    candidates: Sequence[int] = CANDIDATES,
    progress: bool = False,
) -> list[ClusterCount]:
    """Judge numbers of clusters by silhouette x stability; the best comes out as the one with the largest product.

    The silhouette (Rousseeuw 1987) is the mean over images of (b - a) / max(a, b), a and b the mean distances to the
    images of the own and of the nearest other cluster. Stability (Ben-Hur, Elisseeff and Guyon 2002; Lange et al. 2004)
    is the adjusted Rand index of what k-means on two random halves of the images says of all of them, mean of four
    splits. Either alone prefers few clusters; k-means of too many clusters is not found again.

    Args:
        features: final features, (N, F), finite.
        spherical: compare directions.
        seed: of splits and k-means.
        candidates: numbers to try, where there are 20 images a cluster.
        progress: show a progress bar on a terminal.

    Returns:
        One row a candidate, in order; empty with fewer than 40 images.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score
    from tqdm import tqdm

    points = (F.normalize(features, dim=1) if spherical else features).numpy()
    tried = [k for k in candidates if k * PER_CLUSTER <= len(points)]
    few = points[:JUDGED]
    rows = []
    for k in tqdm(tried, "number of clusters", disable=None if progress else True, leave=False):
        kmeans = KMeans(k, n_init=RESTARTS, random_state=seed)
        labels = kmeans.fit_predict(few)
        silhouette = silhouette_score(few, labels) if len(np.unique(labels)) > 1 else 0.0
        agreements = []
        for split in range(SPLITS):
            order = np.random.default_rng((seed, split)).permutation(len(points))
            answers = [kmeans.fit(half).predict(points) for half in np.array_split(points[order], 2)]
            agreements.append(adjusted_rand_score(*answers))
        rows.append(ClusterCount(k, float(silhouette), float(np.mean(agreements))))
    return rows

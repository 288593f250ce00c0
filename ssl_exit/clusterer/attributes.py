"""What a fitted estimator shows: attributes that end in an underscore, each read from its model."""

from dataclasses import replace

import numpy as np
from sklearn.exceptions import NotFittedError
from torch import nn

from ssl_exit.cascade.times import StageTimes
from ssl_exit.clusterer.parameters import Parameters
from ssl_exit.encoders.graph import ExitPoint
from ssl_exit.exits.certificate import Certificate
from ssl_exit.exits.final import FinalClusters
from ssl_exit.model import Model
from ssl_exit.provenance import ClusterCount, ExitChoice


class Fitted(Parameters):
    """Fitted attributes of `ExitClusterer`; they raise NotFittedError before fit()."""

    model_: Model

    @property
    def encoder_(self) -> nn.Module:
        """A copy of the encoder, in float32 on the CPU."""
        return self._fitted().encoder

    @property
    def certificate_(self) -> Certificate:
        """What calibration showed, void if what it is about has changed (see `Model.check`)."""
        return replace(self._fitted(), preprocessing=self.preprocessing).check(watch=True)

    @property
    def exit_choices_(self) -> list[ExitChoice]:
        """With exits="auto", why each candidate was kept or left out."""
        return list(self._fitted().provenance.choices)

    @property
    def skipped_(self) -> dict[int, str]:
        """Position and reason of images that fit() could not use."""
        return self._fitted().provenance.skipped

    @property
    def times_(self) -> StageTimes:
        """Measured seconds of stages and exits."""
        times = self._fitted().cascade.times
        assert times is not None
        return times

    @property
    def exit_points_(self) -> list[ExitPoint]:
        """The exit points in use."""
        return self._fitted().cascade.tapped.staged.exit_points

    @property
    def exit_names_(self) -> list[str]:
        """Names for the numbers in ExitResult.exits: the exit points, and "end"."""
        return self._fitted().cascade.exit_names

    @property
    def cluster_counts_(self) -> list[ClusterCount]:
        """With n_clusters="auto", silhouette and stability of every number of clusters that was tried."""
        return list(self._fitted().provenance.counts)

    @property
    def inertia_(self) -> float:
        """Sum of squared distances of the images that k-means saw to their nearest final centroid."""
        return self._fitted().provenance.inertia

    @property
    def cluster_centers_(self) -> np.ndarray:
        """Final centroids, (K, F) float32.

        Raises:
            AttributeError: in the supervised mode, where there are none.
        """
        final = self._fitted().cascade.final
        if not isinstance(final, FinalClusters):
            raise AttributeError("in the supervised mode there are classes, and no centroids")
        return final.centroids.cpu().numpy()

    def _fitted(self) -> Model:
        self._check_fitted()
        return self.model_

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise NotFittedError("this ExitClusterer is not fitted yet; call fit(data) first")

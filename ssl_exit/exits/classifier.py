"""An exit rule as a classifier of scikit-learn, to try rules on descriptors with its tools."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule, FitData
from ssl_exit.exits.statistics import ClusterStatistics


class RuleClassifier(ClassifierMixin, BaseEstimator):
    """Fit one exit rule to descriptors and labels; it is what stands at an exit of `ExitClusterer`, without a network.

    Parameters:
        rule: name of an exit rule (docs/rules.md). Default "centroid".
        options: keyword arguments of the rule. Default None.
        random_state: of rules that draw. Default 0.

    Attributes:
        classes_: labels, (K,), in the order of the columns of `predict_proba`.
        rule_: the fitted `ExitRule`, at temperature 1.

    Examples:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.model_selection import cross_val_score
        >>> X, y = load_digits(return_X_y=True)
        >>> bool(cross_val_score(RuleClassifier(), X, y).mean() > 0.9)
        True
    """

    rule_: ExitRule

    def __init__(self, rule: str = "centroid", options: Mapping[str, Any] | None = None, random_state: int = 0) -> None:
        self.rule, self.options, self.random_state = rule, options, random_state

    def fit(self, X: Any, y: Any) -> "RuleClassifier":
        """Fit the rule to descriptors, (N, D), and labels, (N,)."""
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, rows = np.unique(y, return_inverse=True)
        x, labels = torch.from_numpy(X.copy()), torch.from_numpy(rows)
        (self.rule_,) = build_rules(self.rule, [x.shape[1]], len(self.classes_), self.options)
        statistics = ClusterStatistics.empty(len(self.classes_), x.double().mean(0), scatter=self.rule_.needs_scatter)
        statistics.add(x, labels)
        soft = torch.nn.functional.one_hot(labels, len(self.classes_)).float()
        with torch.random.fork_rng(devices=[]):
            data = FitData(statistics, x, labels, soft, self.random_state)
            type(self.rule_).fit_all([self.rule_], [data], np.array([0.5, 1.0]))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels of descriptors, (N, D) -> (N,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of every label, (N, D) -> (N, K); the score of the rule is the largest, unless it has its own."""
        return self._log_probabilities(X).exp().numpy()

    def _log_probabilities(self, X: Any) -> Tensor:
        check_is_fitted(self)
        x = torch.from_numpy(validate_data(self, X, reset=False, dtype=np.float32).copy())
        with torch.inference_mode():
            return self.rule_.log_probabilities(self.rule_.logits(x))

"""Heads of the user's: what encoder and head say is what exits agree with."""

import pickle

import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import nn

from ssl_exit import Clusters, ExitClusterer, Front, InputError, Runtime, load
from ssl_exit.encoders.graph import as_module
from ssl_exit.encoders.head import Head, with_head
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.training.run import seeded

QUIET = {"runtime": Runtime(progress=False), "device": "cpu", "max_disagreement": 0.2, "confidence": 0.5}


@pytest.fixture(scope="module")
def encoder(digits):
    with seeded(0):
        return digits_encoder().eval()


@pytest.fixture(scope="module")
def features(encoder, digits):
    with torch.no_grad():
        return torch.cat([encoder(images) for images in digits.split(256)])


def probe(features) -> LogisticRegression:
    high = (features[:, :2] > features[:, :2].median(0).values).long().numpy()
    return LogisticRegression(max_iter=50).fit(features.numpy(), high[:, 0] + 2 * high[:, 1])


def linear() -> nn.Linear:
    with seeded(1):
        return nn.Linear(128, 5)


@pytest.mark.parametrize("kind", ["module", "callable", "labels", "classifier"])
def test_what_encoder_and_head_say_is_the_reference(kind, encoder, features, digits, tmp_path):
    layer, classifier = linear(), probe(features)
    with torch.no_grad():
        logits = layer(features)
    heads = {
        "module": (layer, logits.argmax(1)),
        "callable": (lambda x: layer(x).detach(), logits.argmax(1)),
        "labels": (lambda x: layer(x).argmax(1), logits.argmax(1)),
        "classifier": (classifier, torch.from_numpy(classifier.predict_proba(features.numpy())).argmax(1)),
    }
    head, expected = heads[kind]
    if kind == "labels":
        c = ExitClusterer(encoder, n_clusters=5, clusters=Clusters(head=head), **QUIET)
    else:
        c = ExitClusterer(encoder, n_clusters=head, **QUIET)
    c.fit(digits[:700])
    assert c.model_.settings.n_clusters == (4 if kind == "classifier" else 5)
    assert (c.predict_full(digits) == expected.numpy()).mean() > 0.998  # rounding of a batch
    assert (c.predict(digits[700:]) == expected[700:].numpy()).mean() > 0.75
    c.save(tmp_path / "model")
    again = load(tmp_path / "model", encoder, head=head)
    assert (again.run(digits).scores == c.run(digits).scores).all()
    assert not again.certificate_.void
    with pytest.raises(InputError, match=r"was fitted with a head: load\(folder, head="):
        load(tmp_path / "model", encoder)


def test_a_certificate_is_about_one_head(encoder, features, digits, tmp_path):
    """Another classifier, or the same one fitted again after the fit, is not what it is about."""
    classifier = probe(features)
    c = ExitClusterer(encoder, n_clusters=classifier, **QUIET).fit(digits[:700])
    before = c.predict_full(digits)
    c.save(tmp_path / "model")
    assert not pickle.loads(pickle.dumps(c)).certificate_.void
    classifier.coef_ *= -1
    assert (c.predict_full(digits) == before).all()
    assert not c.certificate_.void
    with pytest.warns(UserWarning, match="certificate is void, encoder changed"):
        assert load(tmp_path / "model", encoder, head=classifier).certificate_.void

    def other(x):
        return x[:, :5]

    c = ExitClusterer(encoder, n_clusters=lambda x: x[:, :5], **QUIET).fit(digits[:700])
    c.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="certificate is void"):
        load(tmp_path / "model", encoder, head=other)


def test_scikit_learns_clone_keeps_what_is_fitted(encoder, features):
    classifier, kmeans = probe(features), KMeans(3, n_init=1).fit(features.double().numpy())
    for c in (ExitClusterer(encoder, classifier), ExitClusterer(encoder, clusters=Clusters(head=classifier))):
        assert (clone(c).settings().clusters.head.coef_ == classifier.coef_).all()
    copied = clone(ExitClusterer(encoder, n_clusters=kmeans, max_disagreement=0.1))
    assert copied.settings().n_clusters == 3
    assert copied.max_disagreement == 0.1
    assert copied.encoder is not encoder


def test_a_loaded_model_with_a_head_is_fitted_again_without_classes(encoder, digits, tmp_path):
    layer = linear()
    ExitClusterer(encoder, n_clusters=layer, **QUIET).fit(digits[:700]).save(tmp_path / "model")
    again = load(tmp_path / "model", encoder, device="cpu", head=layer)
    expected = again.predict_full(digits)
    assert (again.fit(digits[:700], torch.zeros(700, dtype=int).numpy() + 100).predict_full(digits) == expected).all()


def test_behind_a_front_and_on_a_list_of_stages(encoder, digits):
    layer = linear()
    behind = ExitClusterer(lambda x: encoder(x).detach(), layer, front=Front("auto", epochs=1, width=4), **QUIET)
    stages = ExitClusterer([*encoder.children()], layer, **QUIET)
    answers = [c.fit(digits[:400]).predict_full(digits[:400]) for c in (behind, stages)]
    with torch.no_grad():
        expected = layer(encoder(digits[:400])).argmax(1).numpy()
    assert (answers[0] == expected).mean() > 0.99
    assert (answers[1] == expected).mean() > 0.99


def test_a_fitted_model_with_a_head_can_be_a_settings_value(encoder, digits):
    c = ExitClusterer(encoder, n_clusters=linear(), **QUIET)
    assert c.get_params()["n_clusters"] is c.n_clusters
    with pytest.raises(InputError, match="are two answers"):
        ExitClusterer(encoder, 5, clusters=Clusters(head=linear(), centroids=((0.0,) * 128,)), **QUIET)


@pytest.mark.parametrize(
    ("head", "n_labels", "message"),
    [
        (lambda x: x.argmax(1), None, r"a head gives logits, \(N, K\), of 6 images, or labels"),
        (lambda x: x.argmax(1), 2, "expected 0 to 1"),
        (lambda x: x[:3], None, "a head gives logits"),
        (lambda x: "nothing", None, "a head gives logits"),
        (lambda x: x.no_such, None, r"the head fails on features of shape \(6, 5\) \(AttributeError"),
        (LogisticRegression(), None, "the head fails .* not fitted yet"),
        (LogisticRegression().fit([[0.0], [1.0]], [0, 1]), None, "the head fails .* 5 features, but"),
    ],
)
def test_answers_that_are_neither_labels_nor_logits_are_refused(head, n_labels, message):
    features = torch.eye(6)[:, torch.arange(5)]
    with pytest.raises(InputError, match=message):
        Head(head, n_labels)(features)


def test_features_that_are_not_finite_have_no_logits_and_do_not_reach_a_callable():
    features = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])

    def head(x):
        assert x.isfinite().all()
        return x

    for each in (head, nn.Identity()):
        assert with_head(as_module(nn.Identity()), each).head(features).isnan().any(1).tolist() == [False, True]

    class Labels(nn.Module):
        def forward(self, x):
            return x[:, 1].nan_to_num().long()

    assert with_head(as_module(nn.Identity()), Labels(), 2).head(features).isnan().all(1).tolist() == [False, True]

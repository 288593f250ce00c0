"""ExitClusterer: what it promises to those who hold it."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_clusterer
from sklearn.exceptions import NotFittedError
from torch import nn

from ssl_exit import Preprocessing, load
from ssl_exit.cascade.times import StageTimes
from ssl_exit.errors import InputError
from ssl_exit.exits.rules import RULES
from ssl_exit.exits.thresholds import simulate
from ssl_exit.fitting.record import record
from tests import conftest
from tests.conftest import batches_of, untrained

CIFAR = Preprocessing(32, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262))


@pytest.fixture(scope="module")
def encoder(rgb_digits):
    return untrained("resnet20", rgb_digits)


def clusterer(encoder, **changes):
    settings = {"n_clusters": 5, "max_disagreement": 0.2, "confidence": 0.5, "batch_size": 64}
    return conftest.clusterer(encoder, **settings | changes)


def test_agreement_on_unseen_real_images_is_near_what_was_asked(simclr_spec, cifar):
    pixels, _ = cifar
    order = np.random.default_rng(0).permutation(len(pixels))
    c = conftest.clusterer(simclr_spec, CIFAR, max_disagreement=0.1, confidence=0.5)
    c.fit(pixels[order[:1400]])
    result, full = c.run(pixels[order[1400:]]), c.predict_full(pixels[order[1400:]])
    assert abs((result.labels == full).mean() - 0.9) < 0.05
    assert result.cost.mean() < 0.85
    assert len(np.unique(full)) == 10


def test_the_encoder_is_left_as_it_was(rgb_digits):
    encoder = untrained("resnet20", rgb_digits).train()
    before = copy.deepcopy(encoder.state_dict())
    clusterer(encoder).fit(rgb_digits[:300])
    assert encoder.training
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_fit_is_reproducible_and_seeds_matter(encoder, rgb_digits):
    one, two = (clusterer(encoder, seed=1).fit(rgb_digits[:500]) for _ in range(2))
    np.testing.assert_array_equal(one.predict(rgb_digits[500:600]), two.predict(rgb_digits[500:600]))
    np.testing.assert_array_equal(one.cluster_centers_, two.cluster_centers_)
    other = clusterer(encoder, seed=2).fit(rgb_digits[:500])
    assert not np.array_equal(one.cluster_centers_, other.cluster_centers_)


def test_streaming_beyond_the_sample_equals_all_at_once(encoder, rgb_digits, monkeypatch):
    """Statistics must not depend on how images are cut into sample and stream."""
    exits = {"exits": ["layer1", "layer2.0", "layer2", "layer3.0"]}
    whole = clusterer(encoder, **exits).fit(rgb_digits[:600])
    monkeypatch.setattr("ssl_exit.fitting.sample.SAMPLE", 100)
    monkeypatch.setattr("ssl_exit.fitting.sample.SAMPLE_BYTES", 1)
    small = clusterer(encoder, **exits).fit(rgb_digits[:600])
    assert (small.model_.provenance.n_sample, whole.model_.provenance.n_sample) == (5, 480)
    assert small.model_.provenance.n_fit == whole.model_.provenance.n_fit == 480

    rule = whole.model_.cascade.rules[3]
    monkeypatch.setattr("ssl_exit.exits.final.FinalClusters.fit", lambda *_, **__: whole.model_.cascade.final)
    streamed = clusterer(encoder, **exits).fit(rgb_digits[:600]).model_.cascade.rules[3]
    torch.testing.assert_close(streamed.bias, rule.bias, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(streamed.weight, rule.weight, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
def test_every_rule_and_descriptor_runs(encoder, rgb_digits):
    for rule in [*RULES, "centroid+sdn"]:
        options = {"epochs": 0} if rule in ("sdn", "branchynet", "eenet", "mlp", "centroid+sdn") else None
        for accumulate in (True, False):
            c = clusterer(
                encoder,
                rule=rule,
                rule_options=options,
                exits=["layer1", "layer2"],
                descriptor="average",
                accumulate=accumulate,
                normalize=True,
            )
            labels = c.fit(rgb_digits[:300]).predict(rgb_digits[300:340])
            assert labels.shape == (40,)
            assert set(labels) <= set(range(5))


def test_calibrate_on_other_images_and_other_wishes(encoder, rgb_digits):
    c = clusterer(encoder, holdout=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.fit(rgb_digits[:400])
    assert (c.run(rgb_digits[:50]).exits == len(c.exit_points_)).all()
    c.calibrate(rgb_digits[400:700], max_disagreement=0.3)
    assert c.certificate_.n == 225  # three quarters
    loose = c.run(rgb_digits[700:]).cost.mean()
    c.calibrate(rgb_digits[400:700], max_disagreement=0.05)
    assert loose < c.run(rgb_digits[700:]).cost.mean()
    assert (c.max_disagreement, c.confidence) == (0.05, 0.5)


def test_too_few_images_exit_nothing_and_say_why(encoder, rgb_digits):
    c = clusterer(encoder, max_disagreement=0.01, confidence=0.95)
    with pytest.warns(UserWarning, match=r"of 400 images 60 .* at least 299: give at least 1994 images"):
        c.fit(rgb_digits[:400])
    result = c.run(rgb_digits[400:500])
    assert (result.exits == len(c.exit_points_)).all()
    np.testing.assert_array_equal(result.labels, c.predict_full(rgb_digits[400:500]))


def test_an_interrupted_fit_or_calibration_loses_nothing(encoder, rgb_digits, monkeypatch):
    c = clusterer(encoder).fit(rgb_digits[:400])
    before, state = c.predict(rgb_digits[400:500]), c.certificate_
    model = c.model_
    for target in ("ssl_exit.fitting.fit.collect", "ssl_exit.fitting.calibrate.certify"):
        with monkeypatch.context() as patch:
            patch.setattr(target, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                c.fit(rgb_digits[400:800])
            if "certify" in target:
                with pytest.raises(KeyboardInterrupt):
                    c.calibrate(rgb_digits[400:800], max_disagreement=0.4)
    assert c.certificate_ == state
    assert c.max_disagreement == 0.2
    assert c.model_ is model
    np.testing.assert_array_equal(c.predict(rgb_digits[400:500]), before)


def test_broken_pixels_are_left_out_of_the_fit_and_reported(encoder, rgb_digits):
    images = rgb_digits[:400].clone()
    images[[10, 20]] = float("nan")
    c = clusterer(encoder)
    with pytest.warns(UserWarning, match="could not be used"):
        c.fit(images)
    assert sorted(c.skipped_) == [10, 20]
    held = np.random.default_rng(0).permutation(400)[:80]
    assert c.model_.provenance.n_fit == 320 - 2 + np.isin([10, 20], held).sum()
    with pytest.warns(UserWarning, match="2 of 400 images could not be used, such as position 10"):
        labels = c.predict(images)
    assert (np.flatnonzero(labels < 0) == [10, 20]).all()
    with pytest.warns(UserWarning, match="2 of 400"):
        assert (c.predict_full(images)[[10, 20]] == -1).all()


def test_encoders_whose_output_is_a_map(rgb_digits):
    body = nn.Sequential(*(nn.Conv2d(i, o, 3) for i, o in ((3, 8), (8, 8), (8, 8), (8, 8), (8, 6))))
    c = clusterer(body).fit(rgb_digits[:300, :, ::2, ::2])
    assert c.cluster_centers_.shape == (5, 6)
    full = clusterer(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())).fit(rgb_digits[:300, :, ::2, ::2])
    np.testing.assert_allclose(c.cluster_centers_, full.cluster_centers_, atol=1e-4)


def test_manual_stages_give_the_same_clusters(rgb_digits):
    encoder = untrained("resnet20", rgb_digits)

    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool = encoder.layer3, nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.pool(self.body(x)).flatten(1) if len(x) >= 0 else x

    head = nn.Sequential(encoder.conv1, encoder.bn1, nn.ReLU(), encoder.layer1)
    c = clusterer([head, encoder.layer2, Tail()], exits=["stage0", "stage1"]).fit(rgb_digits[:300])
    traced = clusterer(encoder, exits=["layer1", "layer2"]).fit(rgb_digits[:300])
    np.testing.assert_array_equal(c.predict(rgb_digits[300:400]), traced.predict(rgb_digits[300:400]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_clusters": 0}, r"n_clusters must be a whole number in \[1, inf\) or 'auto'; got 0"),
        ({"n_clusters": 2.5}, "n_clusters must be a whole number"),
        ({"n_clusters": 500}, "n_clusters=500 and 80 points"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_disagreement": 0}, r"max_disagreement must be a number in \(0, 1\)"),
        ({"confidence": 1}, r"confidence must be a number in \(0, 1\)"),
        ({"holdout": 1}, r"holdout must be a number in \[0, 1\)"),
        ({"max_disagreement": "0.1"}, "max_disagreement must be a number"),
        ({"seed": None}, r"random_state \(--seed\) must be a whole number"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"rule": "best"}, "rule 'best' does not exist"),
        ({"rule": "sdn", "rule_options": {"depth": 2}}, "rule 'sdn' has no option 'depth'"),
        ({"rule": "sdn", "rule_options": {"hidden": -1}}, "hidden=-1"),
        ({"thresholds": "best"}, "thresholds must be one of"),
        ({"cost": "money"}, "cost must be one of"),
        ({"rule": "sdn", "rule_options": {"hidden": "64"}}, "hidden='64'"),
        ({"rule_options": "hidden"}, r"options \(--rule_options\) must be a dictionary by name or None"),
        ({"patience": 0}, "patience must be a whole number"),
        ({"patience": 9}, "patience 9 lets nothing leave at 8 exits"),
        ({"preprocessing": nn.Identity()}, "must be an ssl_exit.Preprocessing or None; got Identity"),
        ({"descriptor": "best"}, "descriptor must be one of"),
        ({"exits": ["layer7"]}, "names no node of CifarResNet"),
        ({"exits": []}, "no exit point"),
    ],
)
def test_wrong_parameters_are_refused(encoder, rgb_digits, changes, message):
    with pytest.raises(InputError, match=message):
        clusterer(encoder, **changes).fit(rgb_digits[:100])


def test_wrong_images_and_unfitted_use_are_refused(encoder, rgb_digits):
    c = clusterer(encoder)
    for call in (c.predict, c.predict_full, c.run, c.evaluate, c.calibrate, c.trade_off, c.explain):
        with pytest.raises(NotFittedError, match=r"call fit\(data\) first"):
            call(rgb_digits[:10])
    with pytest.raises(InputError, match="cannot take images of shape"):
        c.fit(rgb_digits[:100, :1])
    with pytest.raises(InputError, match="no image has finite pixels"):
        c.fit(torch.full((60, 3, 32, 32), torch.nan))
    c.fit(rgb_digits[:100])
    with pytest.raises(InputError, match="takes images of shape"):
        c.predict(rgb_digits[:10, :, :16])
    with pytest.raises(InputError, match="targets must have shape"):
        c.evaluate(rgb_digits[:10], np.zeros(9))
    with pytest.raises(InputError, match="start must be the position of an image"):
        next(c.stream(rgb_digits[:10], -5))


@pytest.mark.parametrize("rewritten", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_encoder_may_change_its_images_in_place(rgb_digits, rewritten):
    """As one that begins with nn.ReLU(inplace=True): both ways see the images as they were given."""

    class Shift(nn.Module):
        def forward(self, x):
            return x.add_(0.3).frac_()

    class Strided(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], -1)  # no channels last: images are not copied into it

    body = untrained("resnet20", rgb_digits)
    maps = [body.conv1, body.bn1, nn.ReLU(), body.layer1, body.layer2, body.layer3]
    encoder = nn.Sequential(Shift(), body) if rewritten else nn.Sequential(Shift(), *maps, Strided())
    images, before = rgb_digits[:500], rgb_digits[:500].clone()
    c = clusterer(encoder).fit(images)
    assert c.model_.cascade.tapped.channels_last == rewritten
    found = c.evaluate(images[400:], [0] * 100)  # a list of targets is as good as an array
    np.testing.assert_array_equal(found.full_labels, c.predict_full(images[400:]))
    np.testing.assert_array_equal(found.result.labels, c.predict(images[400:]))
    assert torch.equal(images, before)


def test_drawing_goes_on_as_if_no_image_had_been_read(encoder, rgb_digits):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    clusterer(encoder).fit(list(rgb_digits[:100])).predict(list(rgb_digits[:20]))
    assert torch.equal(torch.rand(3), expected)


def test_scikit_learn_knows_its_parameters(encoder):
    c = clusterer(encoder, n_clusters=7)
    assert clone(c, safe=False).get_params(deep=False)["n_clusters"] == 7
    assert "n_clusters=7" in repr(c)
    assert is_clusterer(c)


def test_an_encoder_without_parameters(rgb_digits):
    """Fixed filters, such as a scattering transform."""
    net = nn.Sequential(nn.AvgPool2d(2), nn.Softmax2d(), nn.AvgPool2d(2), nn.Flatten())
    c = clusterer(net, exits=["0"]).fit(rgb_digits[:400])
    assert set(c.predict(rgb_digits[400:500]).tolist()) <= set(range(5))


def test_fit_predict(encoder, rgb_digits):
    c = clusterer(encoder)
    np.testing.assert_array_equal(c.fit_predict(rgb_digits[:200]), c.predict(rgb_digits[:200]))


@pytest.fixture(scope="module")
def classifier(encoder):
    """An encoder that answers with one logit a class."""
    torch.manual_seed(0)
    return nn.Sequential(encoder, nn.BatchNorm1d(64, affine=False, momentum=None), nn.Linear(64, 5)).eval()


def test_supervised_exits_agree_with_the_classifier(classifier, rgb_digits):
    c = clusterer(classifier, supervised=True, max_disagreement=0.3).fit(rgb_digits[:800])
    with torch.no_grad():
        answers = classifier(rgb_digits[800:]).argmax(1).numpy()
    np.testing.assert_array_equal(c.predict_full(rgb_digits[800:]), answers)
    result = c.run(rgb_digits[800:])
    assert (result.exits < len(c.exit_points_)).any()
    assert (result.labels == answers).mean() > 0.6
    found = c.evaluate(rgb_digits[800:], answers)
    assert found.metrics["acc_full"] == 1
    assert found.metrics["acc"] == found.agreement  # plain accuracy, nothing is matched
    assert c.model_.provenance.n_sample == 0
    with pytest.raises(AttributeError, match="there are classes, and no centroids"):
        _ = c.cluster_centers_


def test_supervised_exits_learn_the_classes_that_are_given(classifier, rgb_digits):
    with torch.no_grad():
        answers = classifier(rgb_digits).argmax(1).numpy()
    other = (answers + 1) % 5  # classes by other names
    exits = {"exits": ["layer1", "layer2", "layer3.0"], "supervised": True, "confidence": 0.5}
    traced = [f"0.{name}" for name in exits["exits"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing can exit
        c = clusterer(classifier, **exits | {"exits": traced}).fit(rgb_digits[:800], other[:800])
    recorded, _ = record(c.model_.cascade, batches_of(rgb_digits[800:], 64))
    assert (recorded.labels[:, -1] == other[800:]).mean() > (recorded.labels[:, -1] == answers[800:]).mean() + 0.3


@pytest.mark.parametrize("y", [np.zeros(9, dtype=int), np.full(100, 5), np.full(100, -1), np.zeros(100)])
def test_wrong_classes_are_refused(classifier, rgb_digits, y):
    with pytest.raises(InputError, match="y must hold one class from 0 to 4 for each of the 100 images"):
        clusterer(classifier, supervised=True).fit(rgb_digits[:100], y)


def test_classes_without_logits_are_refused(encoder, rgb_digits):
    with pytest.raises(InputError, match="it gives 64 numbers and n_clusters is 5"):
        clusterer(encoder, supervised=True).fit(rgb_digits[:100])


def test_labels_given_outside_the_supervised_mode_change_nothing(encoder, rgb_digits):
    one = clusterer(encoder, exits=["layer1"]).fit(rgb_digits[:200])
    two = clusterer(encoder, exits=["layer1"]).fit(rgb_digits[:200], np.arange(200))
    np.testing.assert_array_equal(one.predict(rgb_digits[200:300]), two.predict(rgb_digits[200:300]))


def test_patience_and_ensembling_give_the_same_labels_however_images_are_batched(encoder, rgb_digits):
    exits = ["layer1.0", "layer1", "layer2.0", "layer2", "layer3.0"]
    c = clusterer(encoder, exits=exits, patience=2, ensemble=True).fit(rgb_digits[:800])
    conftest.leaving_everywhere(c, rgb_digits[:800])
    unseen = rgb_digits[800:]
    recorded, _ = record(c.model_.cascade, batches_of(unseen, 64))
    labels, taken = simulate(recorded, c.model_.cascade.thresholds)
    assert len(np.unique(taken)) >= 3
    for batch_size in (1, 7, 64, 500):
        c.batch_size = batch_size
        result = c.run(unseen)
        np.testing.assert_array_equal(result.labels, labels)
        np.testing.assert_array_equal(result.exits, taken)
    cascade = c.model_.cascade.at(np.zeros_like(c.model_.cascade.thresholds))  # patience alone
    c.model_ = replace(c.model_, cascade=cascade)
    assert c.run(unseen).exits.min() == 1  # one exit cannot agree twice


def test_exits_that_depend_on_each_other_all_stay(encoder, rgb_digits):
    for changes in ({"patience": 2}, {"ensemble": True}):
        c = clusterer(encoder, **changes).fit(rgb_digits[:300])
        assert c.exit_choices_ == []
        assert len(c.exit_points_) == 8


@pytest.mark.parametrize("thresholds", ["search", "exit", "cbt"])
def test_nothing_held_out_lets_nothing_exit_and_explain_says_so(encoder, rgb_digits, thresholds):
    c = clusterer(encoder, exits=["layer2"], thresholds=thresholds, holdout=0).fit(rgb_digits[:200])
    found = c.explain(rgb_digits[200:260])
    assert found.leaving == 0
    assert found.released == {}
    assert "nothing was held out (holdout=0)" in found.reason


def test_whole_maps_as_descriptors(encoder, rgb_digits):
    c = clusterer(encoder, rule="e2cm_released", descriptor="flatten", thresholds="exit", exits=["layer2", "layer3.0"])
    c.fit(rgb_digits[:300])
    rule = c.model_.cascade.rules[0]
    assert rule.dim == 32 * 16 * 16
    assert rule.macs == (5 + 1) * rule.dim
    assert c.predict(rgb_digits[300:340]).shape == (40,)


def test_thresholds_one_an_exit_or_one_a_cluster(encoder, rgb_digits):
    exits = ["layer1", "layer2", "layer3.0"]
    one_an_exit = clusterer(encoder, exits=exits, thresholds="exit").fit(rgb_digits[:600]).model_.cascade.thresholds
    assert (one_an_exit == one_an_exit[:, :1]).all()
    by_class = clusterer(encoder, exits=exits, thresholds="cbt").fit(rgb_digits[:600]).model_.cascade.thresholds
    assert (by_class == by_class[:1]).all()


def test_mirrored_images_are_counted_but_not_clustered(encoder, rgb_digits):
    plain, both = (clusterer(encoder, exits=["layer2"], mirror=m).fit(rgb_digits[:300]) for m in (False, True))
    assert (plain.model_.provenance.n_fit, both.model_.provenance.n_fit) == (240, 480)
    assert plain.model_.provenance.n_sample == both.model_.provenance.n_sample == 240
    np.testing.assert_array_equal(plain.cluster_centers_, both.cluster_centers_)
    assert not torch.allclose(plain.model_.cascade.rules[0].weight, both.model_.cascade.rules[0].weight)
    again = clusterer(encoder, exits=["layer2"], mirror=True).fit(rgb_digits[:300])
    np.testing.assert_array_equal(both.predict(rgb_digits[300:400]), again.predict(rgb_digits[300:400]))


def test_exits_that_do_not_pay_are_left_out_and_the_reason_is_kept(encoder, rgb_digits):
    c = clusterer(encoder, max_disagreement=0.1).fit(rgb_digits[:800])
    kept = [choice.name for choice in c.exit_choices_ if choice.kept]
    assert kept == c.exit_names_[:-1]
    assert 0 < len(kept) < len(c.exit_choices_)
    assert all("left out, would save" in str(choice) for choice in c.exit_choices_ if not choice.kept)
    named = clusterer(encoder, max_disagreement=0.1, exits=kept).fit(rgb_digits[:800])
    assert named.exit_choices_ == []
    np.testing.assert_array_equal(named.predict(rgb_digits[800:]), c.predict(rgb_digits[800:]))


def test_time_as_the_cost_that_is_saved(encoder, rgb_digits, monkeypatch):
    """Where the last stage takes nearly all the time, an exit before it is all that pays."""
    exits = ["layer1.0", "layer3.0"]

    def times(*_):
        stages, exits = np.array([[0.05, 0.05, 0.9]]), np.array([[0.2, 0.0, 0.0]])
        return StageTimes(np.array([1]), stages, exits, np.zeros((1, 2)))

    monkeypatch.setattr("ssl_exit.fitting.cut.stage_times", times)
    by_time = clusterer(encoder, exits=exits, cost="time").fit(rgb_digits[:800])
    exits_taken = by_time.run(rgb_digits[800:]).exits
    assert (exits_taken == 1).mean() > (
        clusterer(encoder, exits=exits).fit(rgb_digits[:800]).run(rgb_digits[800:]).exits == 1
    ).mean()


def test_a_stream_gives_what_run_gives_part_by_part(encoder, rgb_digits, monkeypatch):
    c = clusterer(encoder, batch_size=16).fit(rgb_digits[:800])
    images = rgb_digits[800:].clone()
    images[70] = torch.nan
    with pytest.warns(UserWarning, match="1 of 200 images could not be used"):
        whole = c.run(images)
    monkeypatch.setattr("ssl_exit.clusterer.estimator.PART", 4)
    for start in (0, 37):
        parts = list(c.stream(images, start))
        assert [len(part.labels) for part in parts[:-1]] == [64] * (len(parts) - 1)
        for name in ("labels", "exits", "cost"):
            together = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(together, getattr(whole, name)[start:])
    assert [list(part.skipped) for part in c.stream(images)] == [[], [6], [], []]


@pytest.mark.slow
def test_bfloat16_answers_in_bfloat16_and_says_how_far_from_float32(encoder, rgb_digits, tmp_path):
    half = clusterer(encoder, precision="bfloat16").fit(rgb_digits[:800])
    images = rgb_digits[800:]
    with torch.no_grad():
        features = nn.functional.normalize(encoder(images)).numpy()
    in_float32 = (features @ half.cluster_centers_.T).argmax(1)
    found = half.evaluate(images)
    np.testing.assert_array_equal(found.full_labels, half.predict_full(images))
    assert found.agreement_float32 == (in_float32 == found.full_labels).mean() > 0.9
    assert half.model_.cascade.tapped.dtype == torch.bfloat16
    assert next(half.encoder_.parameters()).dtype == torch.float32
    half.save(tmp_path / "model")
    loaded = load(tmp_path / "model", encoder, device="cpu")
    np.testing.assert_array_equal(loaded.predict(images), half.predict(images))
    assert not loaded.certificate_.void
    other = clusterer(encoder).fit(rgb_digits[:800]).model_.cascade
    loaded.model_ = replace(loaded.model_, cascade=replace(loaded.model_.cascade, tapped=other.tapped))
    assert loaded.certificate_.void
    with pytest.raises(InputError, match="precision must be one of"):
        clusterer(encoder, precision="float16").fit(images)


@pytest.mark.slow
def test_compiled_full_batches_give_the_same(encoder, rgb_digits):
    """Stages at one shape: the flush is padded, and a batch of another size runs uncompiled."""
    exits = ["layer1.1", "layer2.1"]
    plain = clusterer(encoder, exits=exits).fit(rgb_digits[:800])
    fast = clusterer(encoder, exits=exits, compile=True).fit(rgb_digits[:800])
    sizes = []
    for segment in fast.model_.plan.segments:
        segment.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for n in (200, 30, 1):
        np.testing.assert_array_equal(fast.predict(rgb_digits[800 : 800 + n]), plain.predict(rgb_digits[800 : 800 + n]))
    assert fast.model_.plan.compiled
    assert set(sizes) == {64}


def test_a_compiler_that_fails_is_a_warning(encoder, rgb_digits, monkeypatch):
    c = clusterer(encoder, exits=["layer2.1"], compile=True)
    monkeypatch.setattr("ssl_exit.cascade.plan.can_compile", lambda _: True)
    c.fit(rgb_digits[:400])

    def broken(*_):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr("ssl_exit.cascade.plan.call_compiled", broken)
    with pytest.warns(UserWarning, match=r"does not work here \(no such compiler\)"):
        labels = c.predict(rgb_digits[400:600])
    assert not c.model_.plan.compiled
    np.testing.assert_array_equal(labels, c.predict(rgb_digits[400:600]))


def test_explain_says_who_leaves_where(encoder, rgb_digits):
    c = clusterer(encoder, exits=["layer1", "layer2", "layer3.0"]).fit(rgb_digits[:800])
    found = c.explain(rgb_digits[800:])
    result = c.run(rgb_digits[800:])
    assert [row.left for row in found.exits] == [int((result.exits == e).sum()) for e in range(3)]
    assert [row.reached for row in found.exits] == [int((result.exits >= e).sum()) for e in range(3)]
    assert found.leaving == (result.exits < 3).mean()
    assert found.reason is None
    with pytest.raises(InputError, match="none of the 2 images can be used"):
        c.explain(torch.full((2, 3, 32, 32), torch.nan))

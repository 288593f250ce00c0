"""What a certificate is about: hashes of images and weights, overlap found by content, and what voids it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_exit import EncoderSpec, load
from ssl_exit.data.hashes import SeenImages, image_hashes, images_hash, tensors_hash, unseen
from ssl_exit.data.images import Batch
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from tests.conftest import clusterer

SPEC = EncoderSpec("ssl_exit.encoders.small:digits_encoder")
SETTINGS = {"max_disagreement": 0.3, "confidence": 0.8}


def changed(c, **fields):
    """Put a model with another cascade in the place of the fitted one."""
    c.model_ = replace(c.model_, cascade=replace(c.model_.cascade, **fields))


@pytest.fixture
def fitted(digits):
    torch.manual_seed(0)
    return clusterer(SPEC, **SETTINGS).fit(digits[:900])


def test_hashes_know_contents_and_nothing_else(digits):
    hashes = image_hashes(digits[:50])
    assert hashes.dtype == np.uint64
    assert len(np.unique(hashes)) == 50
    np.testing.assert_array_equal(image_hashes(digits[:50].flip(0)), hashes[::-1])
    changed = digits[:1].clone()
    changed[0, 0, 3, 3] += 1e-6
    assert image_hashes(changed) != hashes[:1]
    assert images_hash(hashes) == images_hash(hashes[::-1]) != images_hash(hashes[1:])
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    assert tensors_hash(tensors) == tensors_hash(dict(reversed(tensors.items())))
    for other in ({"c": tensors["a"]}, {"a": torch.arange(6.0).reshape(2, 3)}, {"a": torch.arange(6)}):
        assert tensors_hash(tensors) != tensors_hash({"b": tensors["b"]} | other)


def test_images_used_before_are_left_out_with_the_reason(digits):
    seen = {"early": SeenImages([image_hashes(digits[:10])]), "late": SeenImages([image_hashes(digits[20:22])])}
    into = []
    given = [Batch(torch.arange(40), digits[:40], {99: "broken"}), Batch(torch.empty(0, dtype=torch.int64), digits[:0])]
    first, second = unseen(given, seen, into)
    kept = [*range(10, 20), *range(22, 40)]
    assert first.indices.tolist() == kept
    torch.testing.assert_close(first.images, digits[kept])
    assert first.skipped == {99: "broken"} | dict.fromkeys(range(10), "early") | dict.fromkeys((20, 21), "late")
    assert len(second.indices) == 0
    np.testing.assert_array_equal(np.concatenate(into), image_hashes(digits[kept]))
    assert not SeenImages().among(image_hashes(digits[:3])).any()


def test_calibrating_on_images_that_fit_used_is_refused(fitted, digits, tmp_path):
    before = fitted.certificate_
    mixed = torch.cat([digits[900:1200], digits[:900]])
    fitted.save(tmp_path / "model")
    for c in (fitted, load(tmp_path / "model", device="cpu")):
        with pytest.raises(InputError, match=r"765 of the 1200 images were used in fit\(\) already, such as position"):
            c.calibrate(mixed)
        assert c.certificate_ == before
        c.calibrate(digits[900:])  # and others are not
        assert c.certificate_.issued_for["images"] != before.issued_for["images"]


def test_copies_within_the_images_certify_nothing(digits):
    """Each image twice: a held-out image whose copy was fitted on, shaped thresholds or certified is left out."""
    torch.manual_seed(0)
    c = clusterer(SPEC, **SETTINGS)
    with pytest.warns(UserWarning, match="an image of the same content"):
        c.fit(torch.cat([digits[:900], digits[:900]]))
    order = np.random.default_rng(0).permutation(1800) % 900
    held, used = order[:360], set(order[360:])
    assert c.certificate_.n == len(set(held[90:]) - used - set(held[:90]))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda c: changed(c, thresholds=np.full_like(c.model_.cascade.thresholds, 0.7)),
            "thresholds, rules or clusters",
        ),
        (lambda c: c.model_.cascade.final.centroids.neg_(), "thresholds, rules or clusters"),
        (lambda c: next(c.encoder_.parameters()).data.add_(1e-3), "encoder"),
        (lambda c: setattr(c, "preprocessing", Preprocessing(8, (0.5,), (1.0,))), "preprocessing"),
    ],
)
def test_what_changes_afterwards_voids_it(fitted, digits, tmp_path, change, what):
    assert fitted.certificate_.void == ""
    change(fitted)
    assert str(fitted.certificate_).startswith(f"void, {what} changed since it was issued; call calibrate() again")
    fitted.save(tmp_path / "model")
    with pytest.warns(UserWarning, match=f"the certificate is void, {what} changed"):
        loaded = load(tmp_path / "model", device="cpu")
    loaded.calibrate(digits[900:])
    assert loaded.certificate_.void == ""


def test_a_certificate_after_new_weights_is_about_what_a_load_will_run(fitted, digits, tmp_path):
    """calibrate() cuts the encoder anew if its weights changed."""
    before = fitted.predict_full(digits[:200])
    with torch.no_grad():
        for parameter in fitted.encoder_.parameters():
            parameter.mul_(torch.randn_like(parameter))
    fitted.calibrate(digits[900:])
    assert fitted.certificate_.void == ""
    now = fitted.predict_full(digits[:200])
    assert (now != before).any()
    fitted.save(tmp_path / "model")
    loaded = load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(loaded.predict_full(digits[:200]), now)
    assert loaded.certificate_ == fitted.certificate_


def test_other_settings_than_certified_are_noticed(fitted):
    assert fitted.certificate_.void == ""
    changed(fitted, across=AcrossExits(patience=2))
    assert fitted.certificate_.void == "thresholds, rules or clusters changed since it was issued"


def test_another_architecture_of_the_same_weights_is_noticed(digits, tmp_path):
    def encoder(activation):
        torch.manual_seed(0)
        convolutions = [torch.nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8, 8)]
        layers = [layer for conv in convolutions for layer in (conv, activation())]
        return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    clusterer(encoder(torch.nn.ReLU), **SETTINGS).fit(digits[:900]).save(tmp_path / "model")
    assert load(tmp_path / "model", encoder(torch.nn.ReLU), device="cpu").certificate_.void == ""
    with pytest.warns(UserWarning, match="the certificate is void, encoder changed"):
        load(tmp_path / "model", encoder(torch.nn.GELU), device="cpu")


def test_the_certificate_travels(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "model.json").read_text())["certificate"]
    assert saved["void"] == ""
    for name in ("max_disagreement", "confidence", "n", "disagreements", "bound", "issued_for"):
        assert saved[name] is not None
    assert set(saved["issued_for"]) == {"encoder", "preprocessing", "exits", "images", "version"}
    assert load(tmp_path / "model", device="cpu").certificate_ == fitted.certificate_

"""Models on disk: whole or not at all, checked when read, and nothing in them is executed."""

import copy
import json
import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ssl_exit import EncoderSpec, ExitClusterer, Preprocessing, load, storage
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.errors import InputError
from ssl_exit.training.run import seeded
from tests import conftest

SETTINGS = {"max_disagreement": 0.2, "confidence": 0.5}
CURRENT = f'"format": {storage.FORMAT}'.encode()


@pytest.fixture(scope="module")
def clusterer(digits):
    torch.manual_seed(0)
    prepare = Preprocessing(8, (0.0,), (1.0,))
    return conftest.clusterer(digits_encoder(), prepare, **SETTINGS).fit(digits[:900])


@pytest.fixture
def model(clusterer, tmp_path):
    clusterer.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_model_answers_alike(clusterer, model, digits):
    loaded = load(model, encoder=digits_encoder(), device="cpu")
    one, two = clusterer.run(digits[900:]), loaded.run(digits[900:])
    for name in ("labels", "exits", "scores", "cost"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert loaded.certificate_ == clusterer.certificate_
    assert loaded.exit_points_ == clusterer.exit_points_
    assert loaded.preprocessing == clusterer.preprocessing
    for name, seconds in vars(clusterer.times_).items():
        np.testing.assert_array_equal(getattr(loaded.times_, name), seconds)
    loaded.calibrate(digits[900:], max_disagreement=0.3)
    assert loaded.trade_off(digits[:50])[0].shape[0] > 100


def test_saving_a_loaded_model_again_gives_the_same_model(model, tmp_path):
    load(model, encoder=digits_encoder(), device="cpu").save(tmp_path / "again")
    about, again = (json.loads((folder / "model.json").read_text()) for folder in (model, tmp_path / "again"))
    assert about["sha256"] == again["sha256"]
    assert about["settings"] == again["settings"]


def test_a_full_disk_is_an_error_of_the_system_and_the_old_model_stays(clusterer, model):
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes a file
    try:
        with pytest.raises(OSError, match=r"encoder.safetensors' cannot be written \(.*File too large"):
            clusterer.save(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    assert os.listdir(model.parent) == ["model"]


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(clusterer, model, monkeypatch):
    read, other = storage._read_about, copy.deepcopy(clusterer)
    other.model_ = replace(
        other.model_, cascade=other.model_.cascade.at(np.full_like(other.model_.cascade.thresholds, 0.75))
    )

    def replaced(folder):
        about = read(folder)
        if not seen:
            other.save(folder)
        seen.append(about)
        return about

    seen = []
    monkeypatch.setattr(storage, "_read_about", replaced)
    with pytest.warns(UserWarning, match="void"):
        loaded = load(model, encoder=digits_encoder(), device="cpu")
    assert len(seen) == 2
    np.testing.assert_array_equal(loaded.model_.cascade.thresholds, other.model_.cascade.thresholds)


def test_a_spec_with_options_builds_its_own_encoder(digits, tmp_path):
    spec = EncoderSpec(
        "timm:vit_tiny_patch16_224", options={"img_size": 16, "patch_size": 4, "in_chans": 1, "depth": 3}
    )
    images = nn.functional.interpolate(digits[:700], size=16)
    c = conftest.clusterer(spec, **SETTINGS).fit(images[:600])
    c.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert (again.run(images[600:]).scores == c.run(images[600:]).scores).all()
    assert not again.certificate_.void
    assert again.encoder.options == spec.options
    assert (again.fit(images[:600]).predict(images[600:]) == c.predict(images[600:])).all()
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    about["encoder"]["spec"]["options"]["depth"] = 60_000
    about["checksum"] = storage._checksum({k: v for k, v in about.items() if k != "checksum"})
    (tmp_path / "model" / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"the weights are not those of timm:vit_tiny_patch16_224"):
        load(tmp_path / "model")


def test_a_model_of_transformers_needs_its_folder_no_longer(rgb_digits, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    with seeded(0):
        transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    c = conftest.clusterer(EncoderSpec(f"transformers:{tmp_path / 'vit'}", "DEFAULT"), **SETTINGS)
    c.fit(rgb_digits[:600]).save(tmp_path / "model")
    shutil.rmtree(tmp_path / "vit")
    again = load(tmp_path / "model")
    assert again.exit_names_ == c.exit_names_
    assert (again.run(rgb_digits[600:]).scores == c.run(rgb_digits[600:]).scores).all()
    assert (again.fit(rgb_digits[:600]).predict(rgb_digits[600:]) == c.predict(rgb_digits[600:])).all()


def test_a_spec_builds_its_own_encoder(digits, tmp_path):
    spec = EncoderSpec("ssl_exit.encoders.small:digits_encoder")
    c = conftest.clusterer(spec, rule="prototypes", **SETTINGS).fit(digits[:900])
    c.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(digits[900:]), c.predict(digits[900:]))


def test_parameters_changed_after_fit_are_not_saved_where_the_model_is_made_of_them(clusterer, digits, tmp_path):
    c = copy.copy(clusterer).set_params(
        n_clusters=3, exits__patience=2, rule="mlp", batch_size=50, exits__normalize=True
    )
    c.calibrate(digits[900:])
    c.save(tmp_path / "model")
    loaded = load(tmp_path / "model", encoder=digits_encoder(), device="cpu")
    assert (loaded.n_clusters, loaded.exits.patience, loaded.rule.name, loaded.batch_size) == (10, 1, "centroid", 50)
    assert not loaded.certificate_.void
    np.testing.assert_array_equal(loaded.predict(digits[900:]), c.predict(digits[900:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "mlp", "rule_options": {"epochs": 1, "hidden": 8}},
        {"rule": "centroid+sdn", "rule_options": {"epochs": 1}, "thresholds": "cbt"},
        {"rule": "e2cm", "patience": 2, "ensemble": True, "thresholds": "exit"},
        {"supervised": True, "n_clusters": 128},
        {"spherical": False, "rule": "eenet", "rule_options": {"epochs": 1}, "accumulate": False},
    ],
)
@pytest.mark.filterwarnings("ignore:no image may exit early")
def test_every_kind_of_model_comes_back_as_it_was(changes, digits, tmp_path):
    torch.manual_seed(0)
    c = conftest.clusterer(digits_encoder(), **SETTINGS | changes).fit(digits[:900])
    c.save(tmp_path / "model")
    loaded = load(tmp_path / "model", encoder=digits_encoder(), device="cpu")
    one, two = c.run(digits[900:]), loaded.run(digits[900:])
    for name in ("labels", "exits", "scores", "cost"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert loaded.exit_choices_ == c.exit_choices_
    assert len(loaded.model_.path) == len(loaded.model_.path_disagreement) <= 100
    kept, whole = loaded.explain(digits[900:]), c.explain(digits[900:])
    assert [row.left for row in kept.exits] == [row.left for row in whole.exits]
    assert kept.released.keys() == whole.released.keys()


def test_a_loaded_model_can_be_fitted_again_from_the_saved_weights(digits, tmp_path):
    with seeded(1):
        spec = EncoderSpec("ssl_exit.encoders.small:digits_encoder")
        c = conftest.clusterer(spec, **SETTINGS).fit(digits[:900])
    c.save(tmp_path / "model")
    loaded = load(tmp_path / "model", device="cpu")
    assert loaded.exits.points == "auto"  # and not the exits that were found
    again = loaded.fit(digits[:900])
    np.testing.assert_array_equal(again.predict_full(digits[900:]), c.predict_full(digits[900:]))


def test_skipped_images_and_numpy_parameters_are_saved(digits, tmp_path):
    images = digits[:900].clone()
    images[[2, 10, 300]] = torch.nan
    c = ExitClusterer(digits_encoder(), n_clusters=np.int64(5), max_disagreement=0.2, confidence=0.5)
    c.set_params(device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="3 of 900 images could not be used"):
        c.fit(images)
    assert sorted(c.skipped_) == [2, 10, 300]
    c.save(tmp_path / "model")
    assert load(tmp_path / "model", encoder=digits_encoder()).skipped_ == c.skipped_


def test_no_pickle_in_the_folder(model):
    assert sorted(f.name for f in model.iterdir()) == ["encoder.safetensors", "exits.safetensors", "model.json"]
    json.loads((model / "model.json").read_text())


def test_a_model_is_replaced_whole_and_other_folders_are_left_alone(clusterer, model, tmp_path):
    clusterer.save(model)
    assert len(list(tmp_path.iterdir())) == 1  # no drafts left behind
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not just a model"):
        clusterer.save(other)
    assert (other / "chapter1.tex").read_text() == "years of work"
    weights = tmp_path / "trained"  # of the name that weights in a model have
    weights.mkdir()
    (weights / storage.WEIGHTS).write_bytes(b"a week of training")
    with pytest.raises(InputError, match="exists and is not just a model"):
        clusterer.save(weights)
    assert (weights / storage.WEIGHTS).read_bytes() == b"a week of training"
    (model / "labels.csv").write_text("mine")
    with pytest.raises(InputError, match="exists and is not just a model"):
        clusterer.save(model)
    assert (model / "labels.csv").exists()


def test_an_interrupted_save_leaves_the_old_model(clusterer, model, tmp_path, monkeypatch):
    before = {f.name: f.read_bytes() for f in model.iterdir()}
    monkeypatch.setattr(storage, "_checksum", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for folder in (model, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            clusterer.save(folder)
    assert {f.name: f.read_bytes() for f in model.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def damage(model, name, change):
    file = model / name
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("exits.safetensors", lambda b: b[:-100], "truncated or changed"),
        ("exits.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "truncated or changed"),
        ("encoder.safetensors", lambda b: b + b" ", "truncated or changed"),
        ("model.json", lambda b: b[:200], "cannot be read"),
        ("model.json", lambda b: b"[]", "names no format"),
        ("model.json", lambda b: b.replace(b'"disagreements": ', b'"disagreements": 1'), "was changed"),
        ("model.json", lambda b: b.replace(CURRENT, b'"format": 99'), "format 99.*upgrade"),
        ("model.json", lambda b: b.replace(CURRENT, b'"format": 1'), f"reads format {storage.FORMAT}: fit it again"),
    ],
)
def test_damaged_tampered_and_newer_models_are_refused(model, name, change, message):
    damage(model, name, change)
    with pytest.raises(InputError, match=message):
        load(model, encoder=digits_encoder())


def test_other_wrong_ways_to_load(model, tmp_path):
    with pytest.raises(InputError, match="is no model"):
        load(tmp_path)
    with pytest.raises(InputError, match="encoder=that module"):
        load(model)
    with pytest.raises(InputError, match="does not fit"):
        load(model, encoder=torch.nn.Conv2d(1, 1, 1))
    (model / "encoder.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        load(model, encoder=digits_encoder())

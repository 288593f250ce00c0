"""A model folder runs no code, whatever stands in it (docs/trust.md)."""

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_exit import EncoderSpec, InputError, load, storage
from ssl_exit.cli import main
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.files import file_hash
from tests import conftest

SETTINGS = {"max_disagreement": 0.2, "confidence": 0.5}
PLANTED = "import pathlib\npathlib.Path('ran').touch()\nfrom ssl_exit.encoders.small import digits_encoder as build\n"


@pytest.fixture(scope="module")
def clusterer(digits):
    torch.manual_seed(0)
    return conftest.clusterer(digits_encoder(), **SETTINGS).fit(digits[:900])


@pytest.fixture
def model(clusterer, tmp_path, monkeypatch):
    """A model, and beside it, in the current folder and on the path, modules that write a file when they run."""
    clusterer.save(tmp_path / "model")
    for name in ("planted", "timm_planted"):
        (tmp_path / f"{name}.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path / "model"
    sys.modules.pop("planted", None)


def forge(model, change):
    """Change model.json as an attacker would, with a checksum that is right."""
    about = json.loads((model / "model.json").read_text())
    about.pop("checksum")
    change(about)
    about["checksum"] = storage._checksum(about)
    (model / "model.json").write_text(json.dumps(about))


def named_library(model) -> bool:
    return any(prefix in (model / "model.json").read_text() for prefix in ("timm:", "transformers:"))


def named(spec):
    return lambda about: about["encoder"].update(spec={"name": spec, "options": None})


@pytest.mark.parametrize("spec", ["planted:build", "os:abort", "ssl_exit.cli:main", "ssl_exit.storage:load_model"])
def test_a_model_names_no_code_that_runs(model, spec, tmp_path):
    forge(model, named(spec))
    with pytest.raises(InputError, match=f"asks to import and call '{spec}'.*trust='{spec}'"):
        load(model)
    with pytest.raises(InputError, match="asks to import"):
        load(model, trust="planted:other")
    assert not (tmp_path / "ran").exists()


def test_what_the_caller_names_runs(model, tmp_path):
    forge(model, named("planted:build"))
    c = load(model, trust="planted:build", device="cpu")
    assert (tmp_path / "ran").exists()
    assert c.encoder.name == "planted:build"


def test_what_was_planted_is_not_kept(model, digits, tmp_path):
    forge(model, named("planted:build"))
    c = load(model, encoder=digits_encoder(), device="cpu")
    assert not isinstance(c.encoder, EncoderSpec)
    c.fit(digits[:900])
    c.save(tmp_path / "again")
    load(model, encoder=digits_encoder()).save(tmp_path / "third")
    assert not (tmp_path / "ran").exists()
    for folder in ("again", "third"):
        assert json.loads((tmp_path / folder / "model.json").read_text())["encoder"]["spec"] is None


def test_predict_and_evaluate_do_not_import_from_the_current_folder(model, image_folder, capsys, monkeypatch, tmp_path):
    forge(model, named("planted:build"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    for name in ("predict", "evaluate"):
        command = [name, "--model", str(model), "--data", str(image_folder), "--out", str(tmp_path / "out")]
        for words, message in (([], "--trust planted:build"), (["--trust", "planted:build"], "No module named")):
            with pytest.raises(SystemExit) as stop:
                main([*command, *words])
            assert stop.value.code == 2
            error = capsys.readouterr().err
            assert message in error
            assert len(error.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("encoder"),
        lambda about: about.update(sha256={}),
        lambda about: about.update(image=[1, "8", None]),
        lambda about: about.update(exits=["nowhere"]),
        lambda about: about.update(macs=None),
        lambda about: about["macs"].pop(),
        lambda about: about.update(macs=[[1]] * len(about["macs"])),
        lambda about: about["certificate"].update(issued_for=7),
        lambda about: about["certificate"].update(n="x"),
        lambda about: about["settings"]["front"].update(depth="x" * 100_000),
        lambda about: about["settings"].update(n_clusters=about["settings"]["n_clusters"] + 1),
        lambda about: about["settings"].update(n_clusters=10**12),
        lambda about: about["settings"].update(rule={"name": "os:abort"}),
        lambda about: about.update(preprocessing={"size": 10**9}),
        lambda about: about.update(preprocessing={"size": 8, "mean": [float("nan")], "std": [1.0]}),
        lambda about: about.update(certificate={}),
        lambda about: about.update(skipped={"one": 1}),
        lambda about: about.update(fronts=[{"network": {"channels": 1, "width": 10**6}, "image_shape": [1, 8, 8]}]),
        lambda about: about["encoder"].update(spec={"name": "timm:no_such_model"}),
        lambda about: about["encoder"].update(spec=["list"]),
        lambda about: about["encoder"].update(spec={"name": "transformers:no_such/model"}),
        lambda about: about["encoder"].update(spec={"name": "transformers:.", "options": {"hidden_size": 8}}),
    ],
)
def test_a_forged_description_is_one_clear_error(model, change):
    forge(model, change)
    with pytest.raises(InputError) as refused:
        load(model, encoder=None if named_library(model) else digits_encoder())
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({"times.stages": tensors["times.stages"][:, 1:]}),
        lambda tensors: tensors.update({"times.sizes": tensors["times.sizes"].flip(0)}),
        lambda tensors: tensors.update({"final.centroids": tensors["final.centroids"].bool()}),
        lambda tensors: tensors.update({"final.centroids": tensors["final.centroids"][:, :-1].clone()}),
        lambda tensors: tensors.update({"thresholds": tensors["thresholds"][1:].clone()}),
    ],
)
def test_forged_tensors_are_one_clear_error(model, change, digits):
    tensors = load_file(model / storage.EXITS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, model / storage.EXITS)
    sha256 = file_hash(model / storage.EXITS)
    forge(model, lambda about: about["sha256"].update({storage.EXITS: sha256}))
    with pytest.raises(InputError):
        load(model, encoder=digits_encoder(), device="cpu").predict(digits[900:])


def test_what_else_decides_a_label_is_part_of_the_certificate(digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = conftest.clusterer(digits_encoder(), front="auto", front_epochs=1, **SETTINGS).fit(digits[:900])
    c.save(tmp_path / "model")
    assert not load(tmp_path / "model", encoder=digits_encoder(), device="cpu").certificate_.void
    forge(tmp_path / "model", lambda about: about["fronts"][0].update(side=4))
    with pytest.warns(UserWarning, match="void"):
        load(tmp_path / "model", encoder=digits_encoder(), device="cpu")
    forge(tmp_path / "model", lambda about: about["fronts"][0]["network"].update(depth=10**18))
    with pytest.raises(InputError, match="its weights are not those of"):
        load(tmp_path / "model", encoder=digits_encoder(), device="cpu")


def test_options_of_an_encoder_are_bounded_by_its_weights():
    shapes = {"weight": torch.Size([8, 8]), "nothing": torch.Size([10**9, 0])}
    spec = EncoderSpec("timm:vit_tiny_patch16_224", options={"depth": 60_000})
    with pytest.raises(ValueError, match="the weights are not those of"):
        storage._check_options(spec, shapes)
    with storage._bounded(3, 100):
        torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(ValueError, match="more modules than"), storage._bounded(3, 100):
        torch.nn.Sequential(*[torch.nn.Identity() for _ in range(4)])
    with pytest.raises(ValueError, match="more numbers in buffers"), storage._bounded(3, 100):
        torch.nn.Module().register_buffer("mask", torch.empty(101, device="meta"), persistent=False)
    torch.nn.Sequential(*[torch.nn.Identity() for _ in range(4)])


def test_a_deeply_nested_description_is_one_clear_error(model):
    (model / "model.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read"):
        load(model, encoder=digits_encoder())


def test_loading_and_fitting_leave_the_global_random_state(digits, tmp_path):
    import random

    import numpy as np

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    c = conftest.clusterer(EncoderSpec("digits_cnn"), **SETTINGS).fit(digits[:900])
    c.save(tmp_path / "model")
    load(tmp_path / "model").predict(digits[900:])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    np.testing.assert_array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002

"""Encoders by name and weights files."""

import argparse
import json
import re
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import omegaconf
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from ssl_exit import EncoderSpec, Preprocessing
from ssl_exit.encoders import weights
from ssl_exit.encoders.small import resnet18_cifar, resnet18_lightly, resnet18_sololearn, resnet20_cifar
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def needs_arguments(width: int) -> nn.Module:
    return nn.Linear(width, width)


def not_a_module() -> int:
    return 3


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet18", 512), ("mobilenet_v3_small", 1024), ("vit_b_32", 768), ("swin_t", 768), ("timm:convnext_atto", 320)],
)
def test_classifiers_are_removed(name, features):
    with torch.no_grad():
        assert EncoderSpec(name).build()(torch.zeros(1, 3, 224, 224)).shape == (1, features)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_weights_with_a_classifier_fill_an_encoder_without(tmp_path, suffix):
    torch.manual_seed(3)
    whole = torchvision.models.resnet18().eval()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(whole.state_dict(), file)
    else:
        torch.save({"state_dict": whole.state_dict()} if suffix == ".ckpt" else whole.state_dict(), file)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = EncoderSpec("resnet18", str(file)).build()(images)
        torch.testing.assert_close(whole.fc(features), whole(images))


def test_keys_and_shapes_that_do_not_fit_are_listed(tmp_path):
    state = resnet20_cifar().state_dict()
    state["extra.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    del state["bn1.bias"]
    save_file(state, tmp_path / "w.safetensors")
    message = (
        r"keys \['bn1.bias'\]; unexpected keys \['extra.weight'\]; shapes and types \['conv1.weight: \(8, 3, 3, 3\)"
    )
    with pytest.raises(InputError, match=message):
        EncoderSpec("resnet20_cifar", str(tmp_path / "w.safetensors")).build()


def test_files_that_hold_no_weights_are_refused_and_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name in ("evil.pt", "list.pt", "cut.safetensors", "absent.pt"):
        with pytest.raises(InputError, match=name):
            EncoderSpec("resnet20_cifar", str(tmp_path / name)).build()
    assert not (tmp_path / "ran").exists()


def test_a_file_that_grows_when_it_is_unpacked_is_refused(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "plain.pt")
    EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "plain.pt")).build()
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
        bomb.writestr("plain/data/99", bytes(10**7), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed entries, which torch never writes"):
        EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "bomb.pt")).build()


def test_long_names_take_no_more_memory_than_they_are_long(tmp_path):
    state = {f"backbone.{key}": value for key, value in tiny().state_dict().items()}
    torch.save(state | {"." * 20_000: torch.zeros(1)}, tmp_path / "w.pt")
    tracemalloc.start()
    try:
        EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "w.pt")).build()
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("last", "depth"), [(str, 3), (lambda i: (i,), 3), (lambda i: f"{i}" + "x" * 10_000, 1)])
def test_files_that_describe_very_many_tensors_are_refused(tmp_path, monkeypatch, last, depth):
    state = {last(i): torch.zeros(1) for i in range(20)}
    for _ in range(depth - 1):
        state = dict.fromkeys(map(str, range(20)), state)
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    monkeypatch.setattr(weights, "ENTRIES", 1000)
    with pytest.raises(InputError, match="holds more than 1000 entries"):
        weights.read_state_dict(tmp_path / "w.pt")


def test_messages_about_files_of_many_names_are_short(tmp_path):
    torch.save({f"{'x' * 1000}{i}": torch.zeros(1) for i in range(100)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="unexpected keys") as refused:
        EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "w.pt")).build()
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_not_dense_are_refused(tmp_path, change, kind):
    state = {f"backbone.{key}": value for key, value in tiny().state_dict().items()}
    other = {"head.weight": change(torch.zeros(2, 2))}
    torch.save(state | other, tmp_path / "beside.pt")
    EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "beside.pt")).build()
    torch.save(state | other | {"backbone.2.weight": change(state["backbone.2.weight"])}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=rf"\['2.weight: {kind}, not a dense tensor'\]"):
        EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "w.pt")).build()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    save_file({key: value.to(dtype) for key, value in tiny().state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"{dtype}, not torch.float32"):
        EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "w.safetensors")).build()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_used_with_a_warning(tmp_path, dtype):
    state = tiny().state_dict()
    save_file({key: value.to(dtype) for key, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=f"{dtype}; used as float32"):
        encoder = EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "w.safetensors")).build()
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(value, state[key].to(dtype).float())


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet99", None, "no encoder 'resnet99'"),
        ("timm:nothing", None, "timm has no model"),
        ("no.such.module:f", None, "cannot be built"),
        ("tests.encoders.test_build:absent", None, "cannot be built"),
        ("tests.encoders.test_build:needs_arguments", None, "called without arguments"),
        ("squeezenet1_0", None, "no linear classifier"),
        ("tests.encoders.test_build:not_a_module", None, "returned int"),
        ("resnet20_cifar", "DEFAULT", "no weights to download"),
        ("tests.encoders.test_build:tiny", "DEFAULT", "no weights to download"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, weights, message):
    with pytest.raises(InputError, match=message):
        EncoderSpec(name, weights).build()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", Preprocessing(224, crop=224 / 232)),
        ("timm:vit_small_patch16_224", Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9)),
        ("timm:vit_small_patch14_dinov2", Preprocessing(518)),
        ("timm:no_such_model", None),
        ("resnet20_cifar", None),
    ],
)
def test_weights_to_download_say_how_images_are_preprocessed(name, expected):
    assert EncoderSpec(name, "DEFAULT").preprocessing() == expected
    assert EncoderSpec(name).preprocessing() is None


def test_a_function_of_ones_own():
    assert len(EncoderSpec("tests.encoders.test_build:tiny").build()) == 3


def same(encoder: nn.Module, other: nn.Module) -> bool:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(encoder.eval()(images), other.eval()(images))


def nested(**modules: nn.Module) -> dict[str, torch.Tensor]:
    return nn.ModuleDict(modules).state_dict()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("resnet18_cifar", resnet18_cifar),
        ("resnet18_sololearn", resnet18_sololearn),
        ("resnet18_lightly", resnet18_lightly),
    ],
)
def test_checkpoints_of_other_projects(tmp_path, name, build):
    """solo-learn's and lightly's modules: an encoder under "backbone.", its moving average and heads beside it."""
    torch.manual_seed(1)
    encoder, average = build(), build()
    state = nested(momentum_backbone=average, backbone=encoder, projector=nn.Linear(512, 8), backbone_momentum=average)
    torch.save({"state_dict": state, "epoch": 3, "loops": {}}, tmp_path / "w.ckpt")
    assert same(EncoderSpec(name, str(tmp_path / "w.ckpt")).build(), encoder)


def test_a_checkpoint_that_lightning_wrote(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 3})
            self.model = resnet20_cifar()
            self.head = nn.Linear(64, 2)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "w.ckpt")).build(), module.model)


def test_an_encoder_that_is_there_twice_under_unknown_names(tmp_path):
    second = resnet20_cifar()
    torch.save(nested(first=resnet20_cifar(), second=second), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"under 'first\.' and under 'second\.': name the one you want"):
        EncoderSpec("resnet20_cifar", str(tmp_path / "w.pt")).build()
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "w.pt"), prefix="second.").build(), second)
    with pytest.raises(InputError, match=r"no keys under 'third\.'; of .* 114 keys .*'first\.' 114, 'second\.' 114"):
        EncoderSpec("resnet20_cifar", str(tmp_path / "w.pt"), prefix="third.").build()


def test_checkpoints_of_dino_vissl_and_mae(tmp_path):
    """Student and teacher side by side, the student's wrapped once more; the teacher is what DINO evaluates."""
    torch.manual_seed(2)
    student, teacher = resnet20_cifar(), resnet20_cifar()
    wrapped = {f"module.{key}": value for key, value in nested(backbone=student, head=nn.Linear(2, 2)).items()}
    arguments = argparse.Namespace(arch="vit_small", patch_size=8)
    states = {"student": wrapped, "teacher": nested(backbone=teacher, head=nn.Linear(2, 2))}
    torch.save({**states, "epoch": 3, "args": arguments}, tmp_path / "dino.pth")
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "dino.pth")).build(), teacher)
    spec = EncoderSpec("resnet20_cifar", str(tmp_path / "dino.pth"), prefix="student.module.backbone.")
    assert same(spec.build(), student)
    trunk = {f"_feature_blocks.{key}": value for key, value in student.state_dict().items()}
    vissl = {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}, "iteration": 7}
    torch.save(vissl, tmp_path / "vissl.torch")
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "vissl.torch")).build(), student)
    torch.save({"model": student.state_dict(), "args": arguments}, tmp_path / "mae.pth")
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "mae.pth")).build(), student)


def test_hyper_parameters_that_are_only_data_are_read_past(tmp_path):
    encoder = resnet20_cifar()
    config = omegaconf.OmegaConf.create({"lr": 0.1, "layers": [1, 2], "name": "x", "on": True, "none": None})
    given = {"cfg": config, "extra": argparse.Namespace(x=1), "out": Path("runs"), "type": type(config)}
    torch.save({"state_dict": nested(backbone=encoder), "hyper_parameters": given}, tmp_path / "w.ckpt")
    known = set(torch.serialization.get_safe_globals())
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "w.ckpt")).build(), encoder)
    assert set(torch.serialization.get_safe_globals()) == known


@pytest.mark.parametrize("value", ["???", "${absent}", "${oc.env:ABSENT}", "${lr"])
def test_configurations_whose_values_cannot_be_had_are_read_past(tmp_path, value):
    config = omegaconf.OmegaConf.create({"lr": 0.1})
    config._get_node("lr")._val = value
    encoder = tiny()
    torch.save({"state_dict": None, "model": encoder.state_dict(), "hyper_parameters": config}, tmp_path / "w.ckpt")
    with pytest.raises(InputError, match="holds no state dict"):
        EncoderSpec("tests.encoders.test_build:tiny", str(tmp_path / "w.ckpt")).build()
    torch.save({"model": encoder.state_dict(), "hyper_parameters": config}, tmp_path / "w.ckpt")
    assert weights.read_state_dict(tmp_path / "w.ckpt").keys() == {f"model.{key}" for key in encoder.state_dict()}
    torch.save(config, tmp_path / "config.ckpt")
    with pytest.raises(InputError, match="holds no state dict"):
        weights.read_state_dict(tmp_path / "config.ckpt")


def test_mappings_whose_methods_are_overwritten_are_read(tmp_path):
    torch.save(OrderedDict(tiny().state_dict()), tmp_path / "w.pt")
    overwritten = b"X\x05\x00\x00\x00itemsK\x03X\x03\x00\x00\x00getK\x03"
    with zipfile.ZipFile(tmp_path / "w.pt") as plain, zipfile.ZipFile(tmp_path / "forged.pt", "w") as forged:
        for entry in plain.infolist():
            content = plain.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.removesuffix(b".") + b"}(" + overwritten + b"ub."
            forged.writestr(entry.filename, content)
    assert weights.read_state_dict(tmp_path / "forged.pt").keys() == tiny().state_dict().keys()


def test_options_of_timm():
    spec = EncoderSpec("timm:vit_tiny_patch16_224", options={"img_size": 32, "in_chans": 1})
    with torch.no_grad():
        assert spec.build()(torch.zeros(2, 1, 32, 32)).shape == (2, 192)
    assert EncoderSpec(spec.name, "DEFAULT", spec.options).preprocessing().size == 32


def test_weights_of_timm_at_another_resolution_are_resampled(tmp_path):
    name = "timm:vit_tiny_patch16_224"
    torch.save(EncoderSpec(name, options={"img_size": 48}).build().state_dict(), tmp_path / "w.pt")
    encoder = EncoderSpec(name, str(tmp_path / "w.pt"), {"img_size": 32}).build()
    assert encoder.pos_embed.shape == (1, 5, 192)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20_cifar", {"width": 3}, "takes no options; got ['width']"),
        ("resnet18", {"width": 3}, "does not take the options {'width': 3}"),
        ("timm:vit_tiny_patch16_224", {"nothing": 3}, "does not take the options {'nothing': 3}"),
        ("timm:resnet18", {"checkpoint_path": "w.pt"}, "cannot be given the options ['checkpoint_path']"),
        ("resnet18", {"num_classes": 3}, "cannot be given the options ['num_classes']"),
        ("resnet18", {"groups": 10**9}, "numbers up to 65536"),
        ("resnet18", {"norm_layer": nn.BatchNorm2d}, "are strings, booleans, numbers"),
        ("transformers:ViTModel", {"_name_or_path": "x"}, "has no options ['_name_or_path']"),
        ("transformers:ViTModel", {"attn_implementation": "hub/kernel"}, "has no options ['attn_implementation']"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        EncoderSpec(name, options=options).build()


def test_a_function_of_ones_own_with_options():
    assert EncoderSpec("tests.encoders.test_build:needs_arguments", options={"width": 3}).build().in_features == 3


@pytest.fixture
def transformers_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "dinov2")
    how = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    how |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "image_processor_type": "BitImageProcessor"}
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(json.dumps(how))
    return tmp_path / "dinov2", model


def test_a_folder_of_transformers(transformers_folder, tmp_path):
    folder, model = transformers_folder
    images = torch.randn(3, 3, 16, 16)
    spec = EncoderSpec(f"transformers:{folder}", "DEFAULT")
    with torch.no_grad():
        expected = model(images).pooler_output
        torch.testing.assert_close(spec.build()(images), expected)
        random = EncoderSpec(f"transformers:{folder}").build()
        assert not torch.allclose(random(images), expected)
        weights = EncoderSpec(f"transformers:{folder}", str(folder / "model.safetensors")).build()
        torch.testing.assert_close(weights(images), expected)
    assert spec.preprocessing() == Preprocessing(16, (0.5,) * 3, (0.25,) * 3, 0.8)
    recipe = spec.recipe()
    assert recipe.name == "transformers:Dinov2Model"
    assert recipe.options["num_hidden_layers"] == 2
    assert [v.shape for v in recipe.build().state_dict().values()] == [v.shape for v in random.state_dict().values()]


def test_a_folder_that_is_no_model_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="cannot be had"):
        EncoderSpec(f"transformers:{tmp_path}", "DEFAULT").build()


def test_checkpoints_of_this_library(tmp_path):
    encoder = resnet20_cifar()
    tapped = TappedEncoder.build(encoder, "auto", torch.zeros(1, 3, 32, 32))
    state = nested(tapped=tapped, key_tapped=TappedEncoder.build(resnet20_cifar(), "auto", torch.zeros(1, 3, 32, 32)))
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    assert same(EncoderSpec("resnet20_cifar", str(tmp_path / "w.ckpt")).build(), encoder)


def test_stems_for_small_images():
    x = torch.zeros(1, 3, 32, 32)
    assert resnet18_cifar().conv1(x).shape[2:] == (32, 32)
    solo = resnet18_sololearn()
    assert solo.conv1(x).shape[2:] == (34, 34)
    assert isinstance(solo.maxpool, nn.Identity)
    assert resnet18_lightly().eval()(x).shape == (1, 512)


def test_keys_that_do_not_fit_under_a_prefix_are_listed(tmp_path):
    state = nested(backbone=resnet20_cifar(), projector=nn.Linear(2, 2))
    del state["backbone.bn1.bias"]
    state["backbone.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    message = r"under 'backbone.': missing keys \['bn1.bias'\]; unexpected keys \['extra'\]"
    with pytest.raises(InputError, match=message):
        EncoderSpec("resnet20_cifar", str(tmp_path / "w.pt")).build()


def test_a_checkpoint_with_objects_in_it_says_how_to_keep_its_weights(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": Exotic()}, tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"would run code in it.*export its state dict as safetensors"):
        EncoderSpec("resnet20_cifar", str(tmp_path / "w.ckpt")).build()


class Exotic:
    """What a project saves beside its weights."""

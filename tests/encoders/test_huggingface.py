"""Vision models of transformers: cut at their layers, with the features they give themselves."""

import re
import warnings

import numpy as np
import pytest
import torch

from ssl_exit import load
from ssl_exit.encoders.graph import as_module, list_exits
from ssl_exit.encoders.stages import split
from tests.conftest import clusterer

transformers = pytest.importorskip("transformers", minversion="5.6")

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
VIT |= {"patch_size": 8}
MAPS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
MODELS = {
    "Dinov2": VIT,
    "Dinov2WithRegisters": VIT | {"num_register_tokens": 2},
    "DINOv3ViT": VIT | {"num_register_tokens": 2},
    "ViT": VIT,
    "CLIPVision": VIT,
    "SiglipVision": VIT,
    "ResNet": MAPS | {"embedding_size": 8, "layer_type": "basic"},
    "ConvNext": MAPS,
    "ConvNextV2": MAPS,
}


def model_of(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_features_are_the_models_own_and_exits_have_the_names_of_its_layers(name, rgb_digits):
    model = model_of(name)
    images = rgb_digits[:6]
    names = [point.name for point in list_exits(model, images)]
    (second,) = [name for name in names if re.search(r"(layers?|stages)\.1$", name)]  # releases call them otherwise
    assert model.get_submodule(second)
    staged = split(model, [second], images)
    assert {id(p) for p in staged.parameters()} <= {id(p) for p in model.parameters()}
    with torch.no_grad():
        expected = model(pixel_values=images).pooler_output.flatten(1)
        torch.testing.assert_close(staged(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(staged(images[:1]), expected[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Dinov2", "DINOv3ViT", "ConvNextV2"])
def test_they_are_clustered_saved_and_loaded(name, rgb_digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = clusterer(model_of(name), n_clusters=3, max_disagreement=0.3, confidence=0.5).fit(rgb_digits[:400])
    c.save(tmp_path / "model")
    other = type(c.encoder)(c.encoder.config)
    again = load(tmp_path / "model", encoder=other, device="cpu")
    np.testing.assert_array_equal(again.predict(rgb_digits[400:500]), c.predict(rgb_digits[400:500]))
    assert not again.certificate_.void


def test_other_models_stay_as_they_are():
    module = torch.nn.Linear(2, 2)
    assert as_module(module) is module

"""Vision models of Hugging Face's transformers (version 5) as chains of their layers.

torch.fx traces none of them. Each is embeddings, a list of layers, and what makes `pooler_output` of the last one; the
features are that output.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.chain import Chain
from ssl_exit.errors import InputError

OTHER_ENTRIES = {  # of configurations, that say nothing of the architecture or choose code
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
}


class Part(nn.Module):
    """Some modules of a model, and how they are applied."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], model: nn.Module, names: str) -> None:
        super().__init__()
        self.function = function
        for name in names.split():
            self.add_module(name, getattr(model, name, None))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Layer(nn.Module):
    """One layer, without a mask."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.masked = "attention_mask" in inspect.signature(module.forward).parameters

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.module(hidden, attention_mask=None) if self.masked else self.module(hidden)
        return result if isinstance(result, Tensor) else result[0]


class RotaryLayer(nn.Module):
    """A layer of DINOv3: its position embeddings follow from the number of patches of a square image."""

    def __init__(self, module: nn.Module, rope: nn.Module, config: Any) -> None:
        super().__init__()
        self.module, self.rope = module, rope
        self.patch, self.others = config.patch_size, 1 + config.num_register_tokens

    def forward(self, hidden: Tensor) -> Tensor:
        patches = hidden.shape[1] - self.others
        side = math.isqrt(patches)
        if side * side != patches:
            raise InputError(f"DINOv3 takes square images here; these have {patches} patches")
        pixels = hidden.new_empty(1, 1, side * self.patch, side * self.patch)
        result = self.module(hidden, position_embeddings=self.rope(pixels))
        return result if isinstance(result, Tensor) else result[0]


class Family(NamedTuple):
    """How models of one class are cut.

    Attributes:
        layers: where the list of layers is, or, in two words, was before.
        modules: names of the modules before and behind the layers, in two words or groups.
        before: images to what enters the first layer.
        behind: what leaves the last layer to features.
    """

    layers: str
    modules: tuple[str, str]
    before: Callable[[Any, Tensor], Tensor]
    behind: Callable[[Any, Tensor], Tensor]


def _embedded(part: Any, images: Tensor) -> Tensor:
    return part.embeddings(images)


def _embedded_and_normed(part: Any, images: Tensor) -> Tensor:
    return part.pre_layrnorm(part.embeddings(images))


def _stem(part: Any, images: Tensor) -> Tensor:
    return part.embedder(images)


def _first_of_normed(part: Any, hidden: Tensor) -> Tensor:
    return (part.layernorm if hasattr(part, "layernorm") else part.norm)(hidden)[:, 0]


def _first_normed(part: Any, hidden: Tensor) -> Tensor:
    return part.post_layernorm(hidden[:, 0])


def _vit(part: Any, hidden: Tensor) -> Tensor:
    normed = part.layernorm(hidden)
    return normed if part.pooler is None else part.pooler(normed)


def _siglip(part: Any, hidden: Tensor) -> Tensor:
    normed = part.post_layernorm(hidden)
    return normed if part.head is None else part.head(normed)


def _average(part: Any, hidden: Tensor) -> Tensor:
    return part.pooler(hidden).flatten(1)


def _average_normed(part: Any, hidden: Tensor) -> Tensor:
    return part.layernorm(hidden.mean((-2, -1)))


_DINOV2 = Family("encoder.layer", ("embeddings", "layernorm"), _embedded, _first_of_normed)
_CONVNEXT = Family("encoder.stages", ("embeddings", "layernorm"), _embedded, _average_normed)
_CLIP = Family("encoder.layers", ("embeddings pre_layrnorm", "post_layernorm"), _embedded_and_normed, _first_normed)
FAMILIES = {
    "Dinov2Model": _DINOV2,
    "Dinov2WithRegistersModel": _DINOV2,
    "DINOv3ViTModel": Family("model.layer", ("embeddings", "norm"), _embedded, _first_of_normed),
    "ViTModel": Family("layers encoder.layer", ("embeddings", "layernorm pooler"), _embedded, _vit),
    "CLIPVisionModel": _CLIP,
    "SiglipVisionModel": Family("encoder.layers", ("embeddings", "post_layernorm head"), _embedded, _siglip),
    "ResNetModel": Family("encoder.stages", ("embedder", "pooler"), _stem, _average),
    "ConvNextModel": _CONVNEXT,
    "ConvNextV2Model": _CONVNEXT,
}


def chained(model: nn.Module) -> nn.Module:
    """A vision model of transformers as a chain whose parts are named as its own layers; any other module as it is."""
    family = FAMILIES.get(type(model).__name__) if type(model).__module__.startswith("transformers.") else None
    if family is None:
        return model
    modules = dict(model.named_modules())
    place = next(name for name in family.layers.split() if name in modules)
    rope = getattr(model, "rope_embeddings", None)
    before, behind = family.modules
    named: dict[str, nn.Module] = {"embeddings": Part(family.before, model, before)}
    for i, layer in enumerate(modules[place].children()):
        named[f"{place}.{i}"] = Layer(layer) if rope is None else RotaryLayer(layer, rope, model.config)
    return Chain(named | {"pooled": Part(family.behind, model, behind)})


def from_pretrained(source: str, options: Mapping[str, Any], download: bool) -> nn.Module:
    """The vision model in a folder that save_pretrained wrote, or of a name on the hub; with random weights unless
    `download`.

    Raises:
        InputError: its class is none of `FAMILIES`.
    """
    kind, config = _configured(source, options)
    return _class(kind).from_pretrained(source, config=config) if download else _class(kind)(config)


def from_config(kind: str, options: Mapping[str, Any]) -> nn.Module:
    """A model of a class with random weights, by the entries of its configuration.

    Raises:
        InputError: an entry that is not of the architecture.
    """
    model = _class(kind)
    known = set(model.config_class().to_dict()) - OTHER_ENTRIES
    if unknown := sorted(key for key in options if key not in known or key.startswith("_")):
        raise InputError(f"{kind} has no options {unknown}")
    return model(model.config_class(**options))


def converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the names of a weights file of transformers as one with the model's own.

    Raises:
        ValueError: keys are missing in it.
    """
    how = {"config": model.config, "state_dict": state, "output_loading_info": True}
    filled, about = type(model).from_pretrained(None, **how)  # type: ignore[attr-defined]
    if missing := about["missing_keys"]:
        raise ValueError(f"missing keys {missing}")
    return filled.state_dict()


def recipe_of(source: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of the `EncoderSpec` that needs neither folder nor hub."""
    if source in FAMILIES:
        return f"transformers:{source}", dict(options)
    kind, config = _configured(source, options)
    default = type(config)().to_dict()
    known = {key for key in default if not key.startswith("_")} - OTHER_ENTRIES
    return f"transformers:{kind}", {k: v for k, v in config.to_dict().items() if k in known and v != default[k]}


def preprocessing_of(source: str) -> Preprocessing | None:
    """What the folder's or the hub's preprocessor_config.json says of images, if there is one."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        how, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return None
    sides, crop = how.get("size") or {}, how.get("crop_size") or {}
    if isinstance(sides, int):
        sides = {"shortest_edge": sides}
    short = sides.get("shortest_edge") or sides.get("height") or 224
    size = crop.get("height", short) if isinstance(crop, dict) and how.get("do_center_crop") else short
    mean, std = (tuple(how.get(f"image_{name}") or ()) for name in ("mean", "std"))
    return Preprocessing(size, mean or (0.0,) * 3, std or (1.0,) * 3, min(1.0, size / short))


def _configured(source: str, options: Mapping[str, Any]) -> tuple[str, Any]:
    """Name of the class, and configuration, of the vision part of a model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    for kind in FAMILIES:
        if type(config) is _class(kind).config_class:
            config.update(dict(options))
            return kind, config
    raise InputError(
        f"transformers:{source} is a {type(config).__name__}, which is not cut into stages; supported: "
        f"{', '.join(FAMILIES)}; any other model can be passed in Python, behind a front"
    )


def _class(kind: str) -> Any:
    import transformers

    return getattr(transformers, kind)

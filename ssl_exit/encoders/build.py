"""Encoders by name, with weights: what is saved with a model so that it can build its own encoder again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ssl_exit.data.preprocessing import Preprocessing, preprocessing_of_weights
from ssl_exit.encoders.architectures import library_of
from ssl_exit.encoders.huggingface import chained, recipe_of
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.weights import fill, n_matching
from ssl_exit.errors import InputError, shown

LARGEST = 1 << 16  # number in options: a model of someone else's must not ask for a billion layers
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class EncoderSpec:
    """How to build an encoder again: its name and options, saved with a model beside the weights.

    Attributes:
        name: one of this library's for small images (resnet20_cifar, resnet56_cifar, resnet18_cifar,
            resnet18_sololearn, resnet18_lightly, digits_cnn), an architecture of torchvision or, with the prefix
            "timm:", of timm, each without its classifier; "transformers:" and a folder that save_pretrained wrote, or a
            name on the hub; or "module:function", which is imported from the Python path and called with the options.
        weights: a .safetensors, .pt, .pth or .ckpt file with a state dict, of the encoder alone or of a module that
            holds it under a prefix, such as "backbone." (lightly, solo-learn, Lightning checkpoints) or
            "teacher.backbone." (DINO); "DEFAULT" downloads torchvision's, timm's or transformers'; None leaves the
            weights as the architecture starts them.
        options: arguments of the architecture, numbers, strings and lists of them, such as {"img_size": 224} for a
            vision transformer of timm.
        prefix: of the encoder's keys in the weights file; None (default) finds it.

    Raises:
        InputError: options that are no plain values.
    """

    name: str
    weights: str | None = None
    options: Mapping[str, Any] | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"the name of an encoder is a string; got {shown(self.name)}")
        options = self.options or {}
        if not isinstance(options, Mapping) or not all(isinstance(k, str) and _plain(v) for k, v in options.items()):
            raise InputError(
                f"options of an encoder are strings, booleans, numbers up to {LARGEST} and lists or dictionaries of "
                f"them, by name; got {shown(self.options)}"
            )

    @property
    def imported(self) -> bool:
        """Whether the name is a "module:function"."""
        return ":" in self.name and not self.name.startswith(("timm:", "transformers:"))

    @property
    def foreign(self) -> bool:
        """Whether building it runs code that is neither this library's, torchvision's, timm's nor transformers'."""
        return self.imported and not self.name.startswith(digits_encoder.__module__ + ":")

    def build(self) -> nn.Module:
        """The encoder, in eval mode.

        Raises:
            InputError: an unknown name or options, an unreadable file, or keys that are missing or unexpected.
        """
        download = self.weights == "DEFAULT"
        module, classifier, convert = library_of(self.name).build(self.name, self.options or {}, download)
        encoder = chained(module)
        if self.weights is not None and not download:
            file = Path(self.weights)
            if encoder is not module and n_matching(encoder, file) > n_matching(module, file):
                module = encoder  # weights that this library wrote
            fill(module, file, self.name, classifier=classifier, prefix=self.prefix, convert=convert)
        return encoder.eval()

    def recipe(self) -> "EncoderSpec":
        """The same architecture without weights, and without a file or a name on the hub that must still be there."""
        if self.name.startswith("transformers:"):
            name, options = recipe_of(self.name.partition(":")[2], self.options or {})
            return EncoderSpec(name, options=options)
        return replace(self, weights=None, prefix=None)

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing the weights were trained with, where they name it (files that `ssl-exit train` wrote) or
        the architecture's are known: those that torchvision downloads, and timm's and transformers' (interpolation may
        differ)."""
        if self.weights is None:
            return None
        saved = preprocessing_of_weights(self.weights)
        if saved or (self.weights != "DEFAULT" and not self.name.startswith(("timm:", "transformers:"))):
            return saved
        return library_of(self.name).preprocessing(self.name, self.options or {})


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= LARGEST and all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(entry) for key, entry in value.items())
    return isinstance(value, PLAIN) and not (isinstance(value, (int, float)) and not abs(value) <= LARGEST)

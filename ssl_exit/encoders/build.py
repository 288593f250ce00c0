"""Encoders by name, and weights files: an architecture, its classifier removed, filled strictly."""

import importlib
import importlib.util
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_exit.data.preprocessing import Preprocessing, preprocessing_of_weights
from ssl_exit.encoders.small import (
    digits_encoder,
    resnet18_cifar,
    resnet18_lightly,
    resnet18_sololearn,
    resnet20_cifar,
    resnet56_cifar,
)
from ssl_exit.errors import InputError

OWN: dict[str, tuple[Callable[[], nn.Module], str | None]] = {  # and a classifier whose keys may be left over
    "resnet20_cifar": (resnet20_cifar, "linear"),
    "resnet56_cifar": (resnet56_cifar, "linear"),
    "resnet18_cifar": (resnet18_cifar, "fc"),
    "resnet18_sololearn": (resnet18_sololearn, "fc"),
    "resnet18_lightly": (resnet18_lightly, None),
    "digits_cnn": (digits_encoder, None),
}
OWN_STAGES = re.compile(r"staged\.stages\.\d+\.")  # in checkpoints of `train`
PREFIXES = (
    "backbone.",
    "encoder.",
    "tapped.",
    "module.",
    "model.",
    "encoder_q.",
    "module.encoder_q.",
    "student.",
    "",
)  # preferred, where several would do


@dataclass(frozen=True)
class EncoderSpec:
    """How to build an encoder again: its name, saved with a model beside the weights.

    Attributes:
        name: one of `OWN` (this library's, for small images), an architecture of torchvision or, with the prefix
            "timm:", of timm, each without its classifier; or "module:function", which is imported from the
            Python path and called without arguments.
        weights: a .safetensors, .pt, .pth or .ckpt file with a state dict, of the encoder alone or of a module that
            holds it under a prefix, such as "backbone." (lightly, solo-learn, Lightning checkpoints); "DEFAULT"
            downloads torchvision's or timm's; None leaves the weights as the architecture starts them.
    """

    name: str
    weights: str | None = None

    @property
    def imported(self) -> bool:
        """Whether the name is a "module:function"."""
        return ":" in self.name and not self.name.startswith("timm:")

    @property
    def foreign(self) -> bool:
        """Whether building it runs code that is neither this library's, torchvision's nor timm's."""
        return self.imported and not self.name.startswith(digits_encoder.__module__ + ":")

    def build(self) -> nn.Module:
        """The encoder, in eval mode.

        Raises:
            InputError: an unknown name, an unreadable file, or keys that are missing or unexpected.
        """
        download = self.weights == "DEFAULT"
        encoder, classifier = self._architecture(download)
        if self.weights is not None and not download:
            _fill(encoder, classifier, Path(self.weights), self.name)
        return encoder.eval()

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing the weights were trained with, where they name it: files that `ssl-exit train` wrote, and
        weights that torchvision and timm download (interpolation may differ)."""
        if self.weights != "DEFAULT":
            return preprocessing_of_weights(self.weights)
        if self.name.startswith("timm:") and importlib.util.find_spec("timm"):
            import timm

            config = timm.get_pretrained_cfg(self.name[5:])
            return Preprocessing(config.input_size[-1], config.mean, config.std, config.crop_pct) if config else None
        import torchvision

        if self.name in torchvision.models.list_models(torchvision.models):
            how = torchvision.models.get_model_weights(self.name)["DEFAULT"].transforms()
            (size,), (short,) = how.crop_size, how.resize_size
            return Preprocessing(size, how.mean, how.std, size / short)
        return None

    def _architecture(self, download: bool) -> tuple[nn.Module, str | None]:
        """The architecture without its classifier, and the classifier's name (its keys may be left over)."""
        if download and (self.imported or self.name in OWN):
            raise InputError(f"{self.name!r} has no weights to download; name a weights file")
        if self.imported:
            return _imported(self.name), None
        if self.name in OWN:
            build, classifier = OWN[self.name]
            return build(), classifier
        if self.name.startswith("timm:"):
            if importlib.util.find_spec("timm") is None:
                raise InputError(f"encoder {self.name!r} needs timm: pip install timm")
            import timm

            if not timm.is_model(self.name[5:]):
                raise InputError(f"timm has no model {self.name[5:]!r}; see timm.list_models()")
            model = timm.create_model(self.name[5:], pretrained=download, num_classes=0)
            classifier = timm.get_pretrained_cfg_value(self.name[5:], "classifier")
            return model, classifier if isinstance(classifier, str) else None
        import torchvision

        if self.name not in torchvision.models.list_models(torchvision.models):
            raise InputError(
                f"no encoder {self.name!r}: expected one of {sorted(OWN)}, a torchvision classification architecture, "
                "timm:NAME, or module:function"
            )
        model = torchvision.models.get_model(self.name, weights="DEFAULT" if download else None)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(f"{self.name!r} ends in no linear classifier that could be removed; use module:function")
        classifier = linear[-1]
        parent, _, leaf = classifier.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
        return model, classifier


def _imported(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        encoder = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"encoder {name!r} cannot be built: {error}; expected module:function, called without arguments"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise InputError(f"encoder {name!r} must return a torch.nn.Module; it returned {type(encoder).__name__}")
    return encoder


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file; nothing in the file is executed.

    Raises:
        InputError: the file is missing, truncated, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _check_stored(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weights file {str(file)!r} is damaged, or holds more than tensors and is not read, because that would "
            "run code in it; export its state dict as safetensors where it was written"
        ) from error
    except Exception as error:
        raise InputError(f"weights file {str(file)!r} cannot be read: {error}; expected a state dict") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights file {str(file)!r} holds no state dict (names to tensors)")
    return state


def _check_stored(file: Path) -> None:
    """Refuse a torch file whose content would take more memory than the file: torch stores without compressing."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise InputError(
            f"weights file {str(file)!r} holds compressed entries, which torch never writes, and is not unpacked"
        )


def _castable(stored: Tensor, own: Tensor) -> bool:
    """Whether weights of one type may fill those of another: floating point of 16 bits or more, or the same type."""
    floats = stored.is_floating_point() and own.is_floating_point() and stored.element_size() > 1
    return floats or stored.dtype == own.dtype


def _fill(encoder: nn.Module, classifier: str | None, file: Path, name: str) -> None:
    own = encoder.state_dict()
    state, prefix = _under_prefix(read_state_dict(file), set(own))
    if classifier:
        state = {key: value for key, value in state.items() if not key.startswith(classifier + ".") or key in own}
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    both = [key for key in own if key in state]
    other = [key for key in both if state[key].shape != own[key].shape]
    misfits = [f"{key}: {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in other]
    misfits += [f"{k}: {state[k].dtype}, not {own[k].dtype}" for k in both if not _castable(state[k], own[k])]
    if missing or unexpected or misfits:
        where = f" under {prefix!r}" if prefix else ""
        raise InputError(
            f"weights file {str(file)!r} does not fit {name}{where}: missing keys {missing}; unexpected keys "
            f"{unexpected}; shapes and types {misfits}"
        )
    if others := sorted({str(state[k].dtype) for k in both if state[k].dtype != own[k].dtype}):
        warnings.warn(f"weights file {str(file)!r} holds {', '.join(others)}; used as float32", stacklevel=4)
    encoder.load_state_dict(state, strict=False)


def _under_prefix(state: dict[str, Tensor], own: set[str]) -> tuple[dict[str, Tensor], str]:
    """The part of a state dict that is the encoder's, its prefix removed, and that prefix.

    Of all prefixes under which keys occur the one is taken under which most of the encoder's own keys are; of several
    that are equal (an encoder and its moving average), the most usual. What lies beside it, such as projection
    heads, is left out.
    """
    state = {OWN_STAGES.sub("", key): value for key, value in state.items()}
    parts = {key[: i + 1] for key in state for i, letter in enumerate(key) if letter == "."} | {""}

    def merit(prefix: str) -> tuple[int, int, int]:
        usual = PREFIXES.index(prefix) if prefix in PREFIXES else len(PREFIXES)
        return sum(prefix + key in state for key in own), -usual, -len(prefix)

    best, second, *_ = *sorted(parts, key=merit, reverse=True), ""
    if merit(best)[0] == merit(second)[0] > 0 and best not in PREFIXES:
        raise InputError(
            f"the weights file holds the encoder under {best!r} and under {second!r}: keep the one you want alone"
        )
    prefix = best
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}, prefix

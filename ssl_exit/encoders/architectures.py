"""Architectures by name: this library's, torchvision's, timm's, transformers', and functions of the user's."""

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.small import (
    digits_encoder,
    resnet18_cifar,
    resnet18_lightly,
    resnet18_sololearn,
    resnet20_cifar,
    resnet56_cifar,
)
from ssl_exit.encoders.weights import Convert
from ssl_exit.errors import InputError

Options = Mapping[str, Any]
OWN: dict[str, tuple[Callable[[], nn.Module], str | None]] = {  # and a classifier whose keys may be left over
    "resnet20_cifar": (resnet20_cifar, "linear"),
    "resnet56_cifar": (resnet56_cifar, "linear"),
    "resnet18_cifar": (resnet18_cifar, "fc"),
    "resnet18_sololearn": (resnet18_sololearn, "fc"),
    "resnet18_lightly": (resnet18_lightly, None),
    "digits_cnn": (digits_encoder, None),
}
RESERVED = {  # arguments that are this library's to set, or that read files and networks
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "progress",
    "weights",
    "weights_backbone",
}


class Built(NamedTuple):
    """A network without its classifier.

    Attributes:
        module: the network.
        classifier: name of what was removed; its keys may be left over in a weights file.
        convert: a state dict in another form of the same architecture to this one's.
    """

    module: nn.Module
    classifier: str | None = None
    convert: Convert | None = None


class Library(ABC):
    """Where architectures come from."""

    @abstractmethod
    def build(self, name: str, options: Options, download: bool) -> Built:
        """A network, with the weights that belong to the name if `download`.

        Raises:
            InputError: no such name or options, or weights that cannot be had.
        """

    def preprocessing(self, name: str, options: Options) -> Preprocessing | None:
        """Of the images that the weights which belong to the name were trained on, if known."""
        return None


class Own(Library):
    """This library's, for small images."""

    def build(self, name: str, options: Options, download: bool) -> Built:
        _no_download(name, download)
        if options:
            raise InputError(f"encoder {name!r} takes no options; got {sorted(options)}")
        build, classifier = OWN[name]
        return Built(build(), classifier)


class Imported(Library):
    """ "module:function" from the Python path, called with the options."""

    def build(self, name: str, options: Options, download: bool) -> Built:
        _no_download(name, download)
        module, _, function = name.partition(":")
        try:
            encoder = getattr(importlib.import_module(module), function)(**options)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise InputError(
                f"encoder {name!r} cannot be built: {error}; expected module:function, called "
                + ("with the encoder's options" if options else "without arguments")
            ) from error
        if not isinstance(encoder, nn.Module):
            raise InputError(f"encoder {name!r} must return a torch.nn.Module; it returned {type(encoder).__name__}")
        return Built(encoder)


class Torchvision(Library):
    """Classification architectures of torchvision."""

    def build(self, name: str, options: Options, download: bool) -> Built:
        from torchvision import models

        if name not in models.list_models(models):
            raise InputError(
                f"no encoder {name!r}: expected one of {sorted(OWN)}, a torchvision classification architecture, "
                "timm:NAME, transformers:NAME_OR_FOLDER, or module:function"
            )
        weights = models.get_model_weights(name)["DEFAULT"] if download else None
        file = weights.url.rpartition("/")[2] if weights else ""
        model = _made(name, lambda: models.get_model(name, weights=weights, **options), options, file)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(f"{name!r} ends in no linear classifier that could be removed; use module:function")
        parent, _, leaf = linear[-1].rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
        return Built(model, linear[-1])

    def preprocessing(self, name: str, options: Options) -> Preprocessing | None:
        from torchvision import models

        if name not in models.list_models(models):
            return None
        how = models.get_model_weights(name)["DEFAULT"].transforms()
        (size,), (short,) = how.crop_size, how.resize_size
        return Preprocessing(size, how.mean, how.std, size / short)


class Timm(Library):
    """timm's, by the name behind "timm:"."""

    def build(self, name: str, options: Options, download: bool) -> Built:
        _needs("timm", name)
        import timm

        if not timm.is_model(name[5:]):
            raise InputError(f"timm has no model {name[5:]!r}; see timm.list_models()")
        arguments = {"pretrained": download, "num_classes": 0, **options}
        hub = timm.get_pretrained_cfg_value(name[5:], "hf_hub_id")
        file = f"model.safetensors of {hub} on the Hugging Face hub" if hub else ""
        model = _made(name, lambda: timm.create_model(name[5:], **arguments), options, file)
        classifier = timm.get_pretrained_cfg_value(name[5:], "classifier")
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        return Built(model, classifier if isinstance(classifier, str) else None, convert)

    def preprocessing(self, name: str, options: Options) -> Preprocessing | None:
        if importlib.util.find_spec("timm") is None:
            return None
        import timm

        config = timm.get_pretrained_cfg(name[5:])
        if config is None:
            return None
        size = options.get("img_size", config.input_size[-1])
        return Preprocessing(size, config.mean, config.std, config.crop_pct)


class Transformers(Library):
    """Vision models of Hugging Face's transformers: a folder or a name on the hub behind "transformers:", or the name
    of a class, whose configuration the options are."""

    def build(self, name: str, options: Options, download: bool) -> Built:
        _needs("transformers", name)
        from ssl_exit.encoders.huggingface import FAMILIES, converted, from_config, from_pretrained

        source = name.partition(":")[2]
        if source not in FAMILIES:
            file = f"the files of {source}, or another folder that save_pretrained wrote,"
            module = _made(name, lambda: from_pretrained(source, options, download), options, file)
            return Built(module, convert=converted)
        _no_download(name, download)
        return Built(_made(name, lambda: from_config(source, options), options), convert=converted)

    def preprocessing(self, name: str, options: Options) -> Preprocessing | None:
        from ssl_exit.encoders.huggingface import preprocessing_of

        return preprocessing_of(name.partition(":")[2]) if importlib.util.find_spec("transformers") else None


def library_of(name: str) -> Library:
    """Where a name belongs."""
    if name.startswith("timm:"):
        return Timm()
    if name.startswith("transformers:"):
        return Transformers()
    if ":" in name:
        return Imported()
    return Own() if name in OWN else Torchvision()


def _needs(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"encoder {name!r} needs {package}: pip install {package}")


def _no_download(name: str, download: bool) -> None:
    if download:
        raise InputError(f"{name!r} has no weights to download; name a weights file")


def _made(name: str, make: Callable[[], nn.Module], options: Options, file: str = "") -> nn.Module:
    """What a function of another library makes, its failures in one line.

    Args:
        name: of the encoder.
        make: the function.
        options: of the encoder.
        file: with its weights, in words.

    Raises:
        InputError: options it does not take, or weights that cannot be downloaded.
    """
    if reserved := sorted(set(options) & RESERVED):
        raise InputError(f"encoder {name!r} cannot be given the options {reserved}")
    try:
        return make()
    except InputError:
        raise
    except Exception as error:  # of any type: it may come from reading files or the network
        if options and isinstance(error, (TypeError, ValueError, AssertionError, AttributeError)):
            raise InputError(f"encoder {name!r} does not take the options {dict(options)}: {error}") from error
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise InputError(
            f"encoder {name!r} cannot be had ({reason}); where the network cannot be reached, download "
            f"{file or 'its weights'} elsewhere and name {'it' if file else 'the file'} (--weights FILE)"
        ) from error

"""What several commands share."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.errors import InputError, printable
from ssl_exit.files import atomic_file


def encoder_spec(
    name: str, weights: str | None, options: dict[str, Any] | None = None, prefix: str | None = None
) -> EncoderSpec:
    """The encoder that a command was given.

    Raises:
        InputError: one without weights.
    """
    if weights is None and name.startswith("transformers:"):
        weights = "DEFAULT"
    spec = EncoderSpec(name, weights, options, prefix)
    if weights is None and not spec.imported:
        raise InputError(f"encoder {name!r} needs --weights: a weights file, or DEFAULT to download")
    return spec


def preprocessing_for(spec: EncoderSpec, **options: Any) -> Preprocessing:
    """The preprocessing from options; for those that are None, that of the weights, or torchvision's usual."""
    trained = spec.preprocessing()
    result = replace(
        trained or Preprocessing(224), **{name: value for name, value in options.items() if value is not None}
    )
    if trained and result != trained:
        warnings.warn(f"the weights were trained with {trained}, and are used with {result}", stacklevel=2)
    return result


def list_skipped(skipped: Mapping[int, str], paths: Sequence[str]) -> None:
    """Print every image that could not be used, with the reason, to stderr."""
    for position, reason in sorted(skipped.items()):
        print(f"skipped {printable(paths[position])}: {printable(reason)}", file=sys.stderr)


def write_json(file: Path, content: Any) -> None:
    """Write JSON; the file appears complete or not at all."""
    with atomic_file(file) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n")

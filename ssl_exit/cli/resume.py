"""A folder of results that a later run of the same command continues."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_exit.errors import InputError
from ssl_exit.files import atomic_file

if TYPE_CHECKING:
    from ssl_exit.data.image_files import ImageFiles

ABOUT = "run.json"
ANYHOW = ("device", "num_workers", "progress", "compile")  # settings that may differ when a run is continued


class ResumableFolder:
    """What was asked for and what is done, in a file in the folder.

    Args:
        folder: a new or empty one, or one that was begun by the same command.
        asked: all that results depend on, as JSON can hold it.

    Raises:
        InputError: the folder holds anything else, or results of other options.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps({**asked, "settings": _lasting(asked["settings"])}))
        self.file = folder / ABOUT
        if self.file.is_file() and any(file != self.file for file in folder.iterdir()):
            try:
                self.content = json.loads(self.file.read_text())
                before = self.content["asked"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{str(self.file)!r} is damaged; remove the folder {str(folder)!r}") from error
            if changed := sorted(name for name in wanted if before.get(name) != wanted[name]):
                raise InputError(
                    f"{str(folder)!r} holds results of other {', '.join(changed)}; choose a new folder (--out)"
                )
        elif folder.exists() and (not folder.is_dir() or any(file != self.file for file in folder.iterdir())):
            raise InputError(f"{str(folder)!r} exists and holds something else; choose a new folder (--out)")
        else:
            self.content = {"asked": wanted}
            self._write()

    def is_of(self, step: str, images: "ImageFiles", by: Any = None) -> bool:
        """Whether a step was done with these images, as they are now, by the same model, told by its hashes."""
        return bool(self.content.get(step) == _digest(images, by))

    def note(self, step: str, images: "ImageFiles", by: Any = None) -> None:
        """Remember that a step was done with these images, by a model of these hashes."""
        self.content[step] = _digest(images, by)
        self._write()

    def _write(self) -> None:
        with atomic_file(self.file) as draft:
            draft.write_text(json.dumps(self.content, indent=1) + "\n")


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, grouped, without those that may differ when a run is continued."""
    kept = {name: value for name, value in settings.items() if name not in ANYHOW}
    return {name: _lasting(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _digest(images: "ImageFiles", by: Any) -> str:
    digest = hashlib.sha256(json.dumps(by, sort_keys=True).encode())
    for path, version in zip(images.paths, images.versions(), strict=True):
        digest.update(f"{path}\0{version}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()

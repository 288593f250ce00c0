"""Files and folders that appear complete or not at all, at whatever moment the process is killed.

What is written goes to a hidden draft beside its place, locked by the process that writes it, and takes that place in
one step. A draft that nobody locks was left by a process that died; the next one that writes to the same place removes
it.
"""

import ctypes
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ssl_exit.errors import InputError

try:
    import fcntl
except ImportError:  # no locks, as on Windows: drafts of processes that died stay
    fcntl = None  # type: ignore[assignment]

OLD = "-old"  # ends the name of a folder that is being replaced where two folders cannot be exchanged in one step
_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux's renameat2


def check_file(file: Path) -> None:
    """Refuse to write over anything but a regular file.

    Raises:
        InputError: it is a folder, a device or the like.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{str(file)!r} exists and is no regular file; choose another name")


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A draft beside a file that replaces it when the block ends, and is removed if anything fails; it has the
    permissions that the umask leaves."""
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(file)
    while True:
        draft = _hidden(file, file.suffix)
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if lock(handle, draft):
            break
        os.close(handle)
    mode = os.fstat(handle).st_mode & 0o777
    try:
        yield draft
        draft.chmod(mode)
        os.replace(draft, file)
    finally:
        os.close(handle)
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A draft beside a folder that replaces it when the block ends, and is removed if anything fails; it and the files
    in it have the permissions that the umask leaves."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    while True:
        draft = _hidden(folder)
        draft.mkdir()
        if (handle := _locked(draft)) is not None:
            break
    mode = draft.stat().st_mode & 0o666
    try:
        yield draft
        for file in draft.iterdir():
            file.chmod(mode)
        if not folder.exists():
            draft.rename(folder)
        elif not _exchange(draft, folder):
            _replace(draft, folder)
    finally:
        os.close(handle)
        shutil.rmtree(draft, ignore_errors=True)  # where two folders were exchanged, the old one


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors by name as safetensors, from whatever device and however they share memory.

    Raises:
        OSError: the file cannot be written, such as on a full disk.
    """
    try:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, file, metadata)
    except SafetensorError as error:
        raise OSError(f"{str(file)!r} cannot be written ({error})") from error


def remove_abandoned(target: Path) -> None:
    """Remove drafts beside a file or folder that no process locks; a folder that a kill left under its hidden name
    between two steps gets its own name back."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}-") + rf"[0-9a-f]{{8}}({OLD}|{re.escape(target.suffix)})?")
    left = sorted((e.name for e in os.scandir(target.parent) if pattern.fullmatch(e.name)), reverse=True)
    for path in (target.with_name(name) for name in left):
        remove_unlocked(path, target if path.name.endswith(OLD) else None)


def remove_unlocked(path: Path, instead: Path | None = None) -> None:
    """Remove a draft, a file or a folder, that no process locks; or give it this name, if nothing has it."""
    if fcntl is None:
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # it has gone, or is nothing that was made here
    try:
        if not lock(handle, path):
            return
        if instead is not None and not instead.exists():
            path.rename(instead)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:  # a folder that may not be written to: it stays
        pass
    finally:
        os.close(handle)


def _hidden(target: Path, suffix: str = "") -> Path:
    """A name for a draft."""
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}{suffix}")


def _locked(path: Path) -> int | None:
    """A handle that locks a file or folder until it is closed or the process dies; None where another has it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if lock(handle, path):
        return handle
    os.close(handle)
    return None


def lock(handle: int, path: Path) -> bool:
    """Lock what is open, until it is closed or the process dies; False where another has it, or where it is no longer
    what stands at its path."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_ino == path.stat(follow_symlinks=False).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the system and the file system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0


def _replace(draft: Path, folder: Path) -> None:
    """Put a draft in the place of a folder in two steps; `remove_abandoned` undoes the first one after a kill."""
    old, handle = draft.with_name(draft.name + OLD), _locked(folder)
    try:
        folder.rename(old)
        try:
            draft.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)

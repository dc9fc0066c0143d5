"""Save and load checkpoints: one file each, durable, and sealed, so that damage never loads without a word.

    save_checkpoint({"epoch": 3, "model_state_dict": model.state_dict()}, "best.pt")
    checkpoint = load_checkpoint("best.pt")

A file is what `torch.save` writes plus a seal: its last 64 bytes, the comment of the zip archive, are the SHA-256 of
all bytes before them. `torch.load` reads it as ever.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or must not be used. Says which file, what is wrong, and what to do."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Save `checkpoint` durably at `path`: any nest of dicts, lists and tuples of tensors and plain values.

    NumPy's scalars become Python's. The new file is loaded with `weights_only=True` before it replaces an older one.
    Raises CheckpointError for values that could not be loaded, OSError if the disk is full; the older file then stays.
    """
    plain = _without_numpy(checkpoint if isinstance(checkpoint, dict) else dict(checkpoint))

    def write(file: BinaryIO) -> None:
        try:
            torch.save(plain, file)
            _seal(file)
            file.flush()
            torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # torch's zip writer hides in it what `file.write` raised, such as a full disk
            raise error.__context__ or error from None
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not saved: {_reason(error, file)}; convert it to tensors and plain values, as by float(…)"
            ) from error

    write_durably(path, write)


def load_checkpoint(
    path: str | os.PathLike, map_location: Any = "cpu", *, require_seal: bool = False
) -> dict[str, Any]:
    """Check the seal of the file at `path` and return its content, tensors on `map_location` (as in `torch.load`).

    A file of plain `torch.save` has no seal: it loads with a warning, but not if `require_seal`. Raises
    FileNotFoundError if there is no file, CheckpointError if it is damaged or holds more than tensors and plain values.
    """
    with open(path, "rb") as file:
        sealed = _is_sealed(file)
        if require_seal and not sealed:
            raise CheckpointError(f"{path}: has no seal, so damage would not show; use a file of save_checkpoint")
        file.seek(0)
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of many kinds, for archives that are no checkpoint and for absent devices
            raise CheckpointError(f"{path}: not loaded: {_reason(error, file)}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, expected a dict")
    if not sealed:
        warnings.warn(f"{path}: has no seal, so damage would not show; save it by save_checkpoint", stacklevel=2)
    return checkpoint


def _seal(file: BinaryIO) -> None:
    """Append the SHA-256 of `file`, a zip archive that was just written, as the archive's comment."""
    file.seek(-2, os.SEEK_END)  # the length of the comment ends the archive
    file.write((64).to_bytes(2, "little"))
    size = file.tell()
    seal = _sha256(file, size)
    file.seek(size)
    file.write(seal)


def _is_sealed(file: BinaryIO) -> bool:
    """Return whether `file` is sealed; False for a zip archive without a comment. Raises CheckpointError for others."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 22, 0))  # the record that ends a zip archive has 22 bytes if there is no comment
    end = file.read()
    if end.startswith(b"PK\5\6") and end.endswith(b"\0\0"):
        return False
    if _sha256(file, size - 64) == file.read():
        return True
    raise CheckpointError(f"{file.name}: damaged, or not a checkpoint: its seal does not match; use another file")


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes of `file`, as 64 hexadecimal digits, and leave the file there."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(max(0, min(size - file.tell(), 1 << 20))):
        digest.update(block)
    return digest.hexdigest().encode()


def _without_numpy(value: Any) -> Any:
    """Return `value` with the NumPy scalars in it and its dicts, lists and tuples turned into Python's."""
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the `_metadata` of a state dict
        result.clear()
        for key, item in value.items():
            result[_without_numpy(key)] = _without_numpy(item)
        return result
    if type(value) in (list, tuple):
        return type(value)(_without_numpy(item) for item in value)
    numpy = sys.modules.get("numpy")  # None: not imported, so there is no such value
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def _reason(error: Exception, file: BinaryIO) -> str:
    """Return in one line why torch refused the values in `file`, but not its advice to load them all the same."""
    if isinstance(error, pickle.UnpicklingError):
        names = set()
        with contextlib.suppress(Exception):  # of many kinds, for a malformed file
            file.seek(0)
            names = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        return f"it holds {', '.join(sorted(names)) or 'more than tensors and plain values'}"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def write_durably(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path` and on the disk. If it raises, undo all.

    The file that `write` gets has a name and can be read, too.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Make `folder` and what is missing above it, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    for path in missing:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and its entries are the system's care
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed calls of `write_durably` left in `folder`."""
    for path in folder.glob(".*.unfinished"):
        path.unlink(missing_ok=True)


def step_path(folder: str | os.PathLike, step: int) -> Path:
    """Return where the checkpoint of optimizer step `step` is or will be: `folder/step-00000469.pt`."""
    return Path(folder) / f"step-{step:08d}.pt"


def saved_steps(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """Return the steps that have a checkpoint in `folder`, each with its path, the oldest first (by number)."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    found = ((re.fullmatch(r"step-(\d{8,})\.pt", path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in found if match)


def save_step(checkpoint: Mapping[str, Any], folder: str | os.PathLike, step: int, keep: int = 3) -> Path:
    """Save `checkpoint` at `step_path(folder, step)`, then remove all but the newest `keep`; return the path.

    Those beyond `step` stay and do not count: they are damaged ones that `load_latest` passed over.
    """
    path = step_path(folder, step)
    make_folder(path.parent)
    save_checkpoint(checkpoint, path)
    for _, old in [found for found in saved_steps(folder) if found[0] <= step][:-keep]:
        with contextlib.suppress(OSError):  # a file that cannot be removed costs room, not the run
            old.unlink()
    remove_unfinished(path.parent)
    return path


def load_latest(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and content of the newest intact checkpoint in `folder`, on the CPU; None if there is none.

    Damaged ones are reported by warnings. If all are, raises CheckpointError: a run must not start over in silence.
    """
    problems: list[str] = []
    for _, path in reversed(saved_steps(folder)):
        try:
            checkpoint = load_checkpoint(path, require_seal=True)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; continuing from {path.name}", stacklevel=2)
        return path, checkpoint
    if problems:
        raise CheckpointError(f"{problems[0]} (none of the {len(problems)} checkpoints in {folder} can be used)")
    return None


def load_initial_weights(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Start `model` from the weights in the checkpoint at `path`; return the names of those that stay as they are.

    A weight is loaded if the file has one of the same name and shape. Raises ValueError if no weight fits.
    """
    loaded, own = load_checkpoint(path), model.state_dict()
    weights = loaded.get("model_state_dict", loaded)  # or a bare state dict
    fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise ValueError(f"{path}: none of its weights fits the model")
    model.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def weights_hash(state_dict: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes in `state_dict`, in order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        else:  # what a module's `get_extra_state` returned
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()

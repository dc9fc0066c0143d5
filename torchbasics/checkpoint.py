"""Checkpoints that are durable or were never written, verified before torch reads them; and the run directory.

    save_checkpoint({"epoch": 3, "model_state_dict": model.state_dict(), …}, "runs/a/checkpoints/step-00001407.pt")
    checkpoint = load_checkpoint("runs/a/checkpoints/step-00001407.pt")

Beside each file lies a record, `step-00001407.pt.json`, with its size and SHA-256. The files are ordinary torch files
of tensors and plain values: `torch.load(path, weights_only=True)` reads them too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickletools
import re
import stat
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1
# Exact types: a subclass, such as numpy.float64, would be written under its own name, and refused by safe loading.
PLAIN = (str, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter)
# What torch.save names to rebuild those, in the pickle inside its file; storages and data types come on top.
REBUILT = {f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")} | {
    "collections OrderedDict",
    "collections Counter",
    "torch Size",
}
CHECKPOINT = r"(step-\d{8,}|best)\.pt"
RECORD = re.compile(rf"(?P<file>{CHECKPOINT})\.json")
TEMPORARY = re.compile(rf"\.({CHECKPOINT}(\.json)?|run\.json|metrics\.jsonl)\.\d+\.tmp")


class CheckpointError(ValueError):
    """A checkpoint that must not be used, or cannot be: says which file, what is wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------- one file, durably


class _HashingFile(io.RawIOBase):
    """Passes on what is written, and knows its size and SHA-256: the record tells what was meant to reach the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)


def write_durably(
    path: str | os.PathLike, write: Callable[[BinaryIO], object], before_replace: Callable[[], object] | None = None
) -> None:
    """Lets `write` fill a temporary file, then puts it in the place of `path`: whole, and on the disk, or not at all.

    Temporary file in the same folder → flush → fsync → `before_replace()` → os.replace → fsync of the folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_replace is not None:
            before_replace()
        if path.is_dir() and not path.is_symlink():  # what stands there is no file of ours: put aside, not removed
            os.rename(path, path.with_name(f"{path.name}.{os.getpid()}.aside"))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and its entries are the system's care
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> list[Path]:
    """Makes `folder` and what is missing above it, durably; returns those that it made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _fsync_folder(path.parent)
    return missing


def _remove_stale(folder: Path) -> None:
    """Removes what killed saves left in the run's own `folder`: temporary files, and records without their file."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            temporary, record = TEMPORARY.fullmatch(path.name), RECORD.fullmatch(path.name)
            if temporary or (record and not (folder / record["file"]).exists()):
                path.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON to `path`, durably."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_durably(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------------------------------- the record of a file


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _record_bytes(entries: list[dict]) -> bytes:
    """The record's one spelling; it carries its own hash, so that any changed bit of it shows."""
    body = json.dumps(entries, sort_keys=True)
    return json.dumps({"files": entries, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True).encode()


def _read_record(path: Path) -> list[dict]:
    """The sizes and hashes that `path` may have: one, or two while a file of this name was being replaced."""
    try:
        with _open_regular(_record_path(path)) as file:
            content = file.read(100_000)
        entries = json.loads(content)["files"]
        if _record_bytes(entries) != content:
            raise ValueError("its own hash does not match")
        return [{"size": int(entry["size"]), "sha256": str(entry["sha256"])} for entry in entries]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: its record {path.name}.json is missing, so its content cannot be checked; use another checkpoint"
        ) from None
    except PermissionError as error:
        raise CheckpointError(f"{_record_path(path)}: cannot be read ({error.strerror}); permit it") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{_record_path(path)}: damaged record ({_first_line(error)}); use another checkpoint"
        ) from None


def _open_regular(path: Path) -> BinaryIO:
    """Opens a regular file only: a pipe would wait for ever, a link could lead anywhere."""
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")


# ------------------------------------------------------------------------------------------------------- save and load


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Saves `checkpoint` (tensors, and plain values in dicts, lists and tuples) as a torch file at `path`, durably.

    It needs the keys `epoch`, `model_state_dict`, `optimizer_state_dict` and `loss`, and may have any others; `format`
    is added. When it returns, the file and its record are on the disk; when it raises (OSError: disk full, …;
    TypeError: a value that safe loading would refuse; CheckpointError: a key is missing), what was there before is
    still there and loads.
    """
    path = Path(path)
    checkpoint = check_schema({"format": FORMAT, **checkpoint}, path)
    _check_plain(checkpoint, "checkpoint")
    entry: dict = {}

    def write(file: BinaryIO) -> None:
        hashing = _HashingFile(file)
        try:
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's zip writer hides in it what `write` raised: a full disk, a dead worker
            raise error.__context__ or error from None
        entry.update(size=hashing.size, sha256=hashing.sha256.hexdigest())

    def record_first() -> None:
        # The record allows the new content and the one it replaces: at whichever instant a kill comes, it is true.
        # Only what is intact now may stay allowed.
        entries = [entry]
        if path.exists() and _record_path(path).exists():
            with contextlib.suppress(CheckpointError, OSError):
                entries.append(_verified(path))
        content = _record_bytes(entries)
        write_durably(_record_path(path), lambda file: file.write(content))

    write_durably(path, write, before_replace=record_first)


def load_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote, after its size and SHA-256 were found right, and with `weights_only=True`.

    Raises FileNotFoundError if there is none, CheckpointError if it is damaged, unrecorded or not a checkpoint, and
    ValueError for a device that this machine has not.
    """
    path = Path(path)
    if isinstance(map_location, (str, torch.device)):
        try:
            torch.empty(0, device=map_location)
        except Exception as error:  # of many kinds; torch's loading would say that the file is at fault
            raise ValueError(f"map_location={str(map_location)!r}: {_first_line(error)}; use 'cpu'") from error
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with _open_regular(path) as file:
            _check_content(path, file)
            _check_archive(path, file)
            file.seek(0)
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch or the system say of the file: it is not usable
        reason = _first_line(error)
        if type(error).__name__ == "UnpicklingError":
            reason = "holds more than tensors and plain values"
        elif isinstance(error, zipfile.BadZipFile) or "weights_only" in str(error):
            # torch's texts on what that refused say how to load it all the same
            reason = "not a file of save_checkpoint"
        raise CheckpointError(f"{path}: unreadable ({reason}); use another checkpoint") from error
    return check_schema(checkpoint, path)


def _verified(path: Path) -> dict:
    with _open_regular(path) as file:
        return _check_content(path, file)


def _check_content(path: Path, file: BinaryIO) -> dict:
    entries = _read_record(path)
    size = os.fstat(file.fileno()).st_size
    if size not in [entry["size"] for entry in entries]:
        raise CheckpointError(
            f"{path}: damaged: {size:,} bytes, its record says {entries[0]['size']:,}; use another checkpoint"
        )
    found = {"size": size, "sha256": _sha256(file)}
    if found not in entries:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the recorded one; use another checkpoint")
    return found


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Refuses what torch would unpack to more than the file has, read in one of two ways, or build from other calls.

    `weights_only` alone lets through a compressed gigabyte of zeros, and `bytearray(10**10)`.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise CheckpointError(f"{path}: is a TorchScript program, not a checkpoint; use a checkpoint")
        if len({member.filename for member in members}) < len(members):
            raise CheckpointError(f"{path}: has two entries of one name; use another checkpoint")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path}: would unpack to more than its own size; use another checkpoint")
        pickles = [archive.read(member) for member in members if member.filename.endswith("data.pkl")]
    for code, name, _ in (found for content in pickles for found in pickletools.genops(content)):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4") or (
            code.name == "GLOBAL" and name not in REBUILT and not _is_of_tensors(str(name))
        ):
            raise CheckpointError(
                f"{path}: unreadable (holds more than tensors and plain values); use another checkpoint"
            )


def _is_of_tensors(name: str) -> bool:
    """Whether a pickle's global is a kind of storage or a data type of torch."""
    module, _, attribute = name.partition(" ")
    storage = module in ("torch", "torch.storage") and attribute.endswith("Storage")
    return storage or (module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype))


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_plain(value: Any, where: str) -> None:
    """What `weights_only` loading would refuse is refused before it is written, by name."""
    if type(value) in (dict, OrderedDict, Counter):  # a Counter is in MultiStepLR's state
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where}: a key must be a string or an int, got {type(key).__name__}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in PLAIN:
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only: "
            "convert it, e.g. by float(…) or dict(…)"
        )
    elif isinstance(value, torch.Tensor) and (
        value.layout != torch.strided or value.is_quantized or value.is_meta or vars(value)
    ):
        raise TypeError(f"{where} is a tensor that is sparse, quantized, on `meta` or has attributes; save a plain one")


SCHEMA: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "epoch": int,
    "model_state_dict": dict,
    "optimizer_state_dict": dict,
    "loss": (float, int, type(None)),
}


def check_schema(checkpoint: Any, path: str | os.PathLike) -> dict[str, Any]:
    """Returns `checkpoint` if it has the keys and types of our format, else raises CheckpointError naming the key."""
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, expected a dict with {', '.join(SCHEMA)}")
    if checkpoint.get("format", FORMAT) != FORMAT:  # first: another format may have other keys
        raise CheckpointError(
            f"{path}: format {checkpoint['format']!r}, this version of torchbasics reads {FORMAT}; "
            "use the version that wrote it, or a newer one"
        )
    for key, kind in SCHEMA.items():
        if key not in checkpoint:
            raise CheckpointError(f"{path}: the key {key!r} is missing; not a checkpoint of this format")
        if not isinstance(checkpoint[key], kind):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(checkpoint[key]).__name__}; not a checkpoint of this format"
            )
    for name, tensor in checkpoint["model_state_dict"].items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: model_state_dict[{name!r}] is a {type(tensor).__name__}, expected a tensor")
    return checkpoint


def load_weights_file(path: str | os.PathLike, plain: bool = False) -> dict:
    """A verified checkpoint; with `plain` also a state_dict that has no record, as {"model_state_dict": tensors}.

    The content of such a file is not verified, but never anything other than tensors. Raises CheckpointError.
    """
    path = Path(path)
    if os.path.lexists(_record_path(path)) or not path.exists():
        return load_checkpoint(path)
    if not plain:
        raise CheckpointError(
            f"{path}: its record {path.name}.json is missing; bring that too if it is a checkpoint of train_mnist, "
            "or give --model NAME if it is a plain state_dict"
        )
    try:
        with _open_regular(path.resolve()) as file:  # whoever names a link means what it leads to
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("model_state_dict", state)
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("names and tensors only")
    except Exception as error:  # torch's own text begins with how to load it all the same
        reason = getattr(error, "strerror", None) or f"damaged, or no state_dict ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}; use another file") from error
    return {"model_state_dict": state}


def bare_model(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside the wrappers of DataParallel, DistributedDataParallel and torch.compile, at any nesting."""
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    inner: Any = model
    while True:
        if isinstance(inner, wrappers):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def bare_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`model`'s state dict under the plain model's names: no `module.`, no `_orig_mod.` of a compiled part."""
    return _without(("_orig_mod",), bare_model(model).state_dict())


def bare_name(name: str, wrappers: tuple[str, ...] = ("_orig_mod",)) -> str:
    """A parameter's or buffer's `name` in the plain model."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _without(wrappers: tuple[str, ...], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with the wrappers' parts taken out of its names, wherever they stand; as it is if two would collide."""
    bare = {bare_name(name, wrappers): state[name] for name in state}
    return bare if len(bare) == len(state) else dict(state)


def load_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str = "checkpoint") -> None:
    """Loads `state` into `model`; wrappers' prefixes on either side don't matter.

    Raises CheckpointError, which names the first key that differs, before anything is changed.
    """
    bare_model(model).load_state_dict(fitting_weights(model, state, where))


def fitting_weights(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str = "checkpoint"
) -> dict[str, torch.Tensor]:
    """`state` under the names that the bare `model` has for it. Raises as `load_weights`, and loads nothing."""
    names = bare_model(model).state_dict()
    own, given = _without(("_orig_mod",), names), _without(("_orig_mod",), state)
    if own.keys() != given.keys():  # a name `module` may be the model's own, so it is taken away only if need be
        own, given = _without(("_orig_mod", "module"), own), _without(("_orig_mod", "module"), given)
    problem = _first_difference(own, given)
    if problem:
        raise CheckpointError(f"{where}: of another model: {problem}; build the model that it was saved from")
    return {name: given[bare] for name, bare in zip(names, own, strict=True)}


def _first_difference(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    for name, tensor in own.items():
        if name not in given:
            return f"{name!r} is missing"
        if tensor.shape != given[name].shape:
            return f"{name!r} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        if tensor.dtype != given[name].dtype:
            return f"{name!r} is {given[name].dtype}, expected {tensor.dtype}"
    return next((f"{name!r} is unknown" for name in given if name not in own), "")


# ------------------------------------------------------------------------------------------- the checkpoints of one run


class CheckpointFolder:
    """The folder of one run's checkpoints: `step-00000469.pt` …, of which the last `keep` stay, and `best.pt`."""

    NAME = re.compile(r"step-(\d{8,})\.pt")

    def __init__(self, folder: str | os.PathLike, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep

    @property
    def best(self) -> Path:
        """Where the best checkpoint is or will be."""
        return self.folder / "best.pt"

    def steps(self) -> list[tuple[int, Path]]:
        """Steps and paths of what is there, oldest first, by number (never by file time)."""
        if not self.folder.is_dir():
            return []
        found = ((self.NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or will be."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, checkpoint: Mapping[str, Any]) -> Path:
        """Saves under the checkpoint's step, then removes the oldest beyond `keep`. Returns the path."""
        _make_folder(self.folder)
        path = self.path(checkpoint["step"])
        save_checkpoint(checkpoint, path)
        self._prune(checkpoint["step"])
        return path

    def save_best(self, checkpoint: Mapping[str, Any]) -> None:
        """Saves as `best.pt`; the former one stays until the new one is whole."""
        _make_folder(self.folder)
        save_checkpoint(checkpoint, self.best)

    def _prune(self, newest: int) -> None:
        # Those beyond `newest` don't count: they are damaged ones that were passed over, and would push out the intact.
        for _, path in [found for found in self.steps() if found[0] <= newest][: -self.keep]:
            with contextlib.suppress(OSError):  # a file that cannot be removed costs room, not the run
                path.unlink()
                _record_path(path).unlink()
        _remove_stale(self.folder)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest intact checkpoint; None if there is none at all.

        A damaged one is reported by a warning and the one before it used. CheckpointError if all are damaged: a run
        must not silently start again where it had been further.
        """
        problems = []
        for _, path in reversed(self.steps()):
            try:
                checkpoint = load_checkpoint(path)
            except (CheckpointError, OSError) as error:
                problems.append(_first_line(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; going on from {path.name}", stacklevel=2)
            return path, checkpoint
        if problems:
            raise CheckpointError(f"{problems[0]} (none of the {len(problems)} checkpoints in {self.folder} is intact)")
        return None


# -------------------------------------------------------------------------------------------------- the run directory


class RunDirectory:
    """One run's directory: `run.json`, `metrics.jsonl`, `checkpoints/`; held by one process at a time.

    Raises ValueError if it is used already and neither `resume` nor `overwrite` is given, if another process holds it,
    or if it cannot be written, before anything in it is changed.
    """

    def __init__(self, path: str | os.PathLike, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.info: dict[str, Any] = {}
        self._made: list[Path] = []
        if resume and not (self.path / "run.json").is_file():
            raise ValueError(f"{self.path}: nothing to resume here (no run.json); give the directory of an earlier run")
        try:
            self._made = _make_folder(self.path)
            self._lock = _hold(self.path / ".lock")
            try:
                self._open(resume, overwrite)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise ValueError(f"{self.path}: cannot write there ({error.strerror}); choose another --output") from None

    def _open(self, resume: bool, overwrite: bool) -> None:
        used = [name for name in ("run.json", "metrics.jsonl", "checkpoints") if (self.path / name).exists()]
        if resume:
            self.info = _read_json(self.path / "run.json")
        elif used and not overwrite:
            raise ValueError(
                f"{self.path}: holds an earlier run ({used[0]}); use --resume to go on, --overwrite to replace it "
                "or another --output"
            )
        elif used:
            self._clear()
        _remove_stale(self.path)
        _remove_stale(self.checkpoints)

    def _clear(self) -> None:
        """Removes what a run writes, by our own names only."""
        ours = re.compile(rf"{CHECKPOINT}(\.json)?")
        if self.checkpoints.is_dir():
            for path in [path for path in self.checkpoints.iterdir() if ours.fullmatch(path.name)]:
                path.unlink()
            with contextlib.suppress(OSError):  # something else is in it
                self.checkpoints.rmdir()
        for name in ("metrics.jsonl", "run.json"):
            (self.path / name).unlink(missing_ok=True)

    def write_info(self, **more: Any) -> None:
        """Adds `more` to `run.json`."""
        self.info.update(more)
        write_json(self.path / "run.json", self.info)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Makes `metrics.jsonl` hold exactly `rows`, one line each: as it was saved, whatever a killed run left."""
        content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        write_durably(self.path / "metrics.jsonl", lambda file: file.write(content))

    def close(self) -> None:
        """Lets the directory go; if it was made for this run and nothing was written, it is removed."""
        with contextlib.suppress(OSError):
            if self._made and os.listdir(self.path) == [".lock"]:
                (self.path / ".lock").unlink()
                for path in self._made:
                    path.rmdir()
        self._made = []
        _let_go(self._lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({_first_line(error)}); cannot resume this run") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object; cannot resume this run")
    return value


_held: dict[str, io.TextIOBase] = {}


def _hold(path: Path) -> str:
    """Takes an exclusive lock on `path`, which dies with this process; ValueError if another has it.

    A record lock (`lockf`): unlike `flock` it is not inherited by forked loader workers that may outlive a killed run.
    It does not keep out this process itself; `_held` does.
    """
    name = str(path.resolve())
    taken = ValueError(f"{path.parent}: another run is using this directory; wait for it or choose another --output")
    if name in _held:
        raise taken
    handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (stays open as long as the lock is held)
    try:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):  # its last holder has just removed it
            raise FileNotFoundError(errno.ENOENT, "removed")
    except ImportError:  # Windows
        _lock_windows(handle, taken)
    except OSError as error:
        handle.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):  # not held: the file system cannot lock
            raise
        raise taken from None
    _held[name] = handle
    return name


def _lock_windows(handle: Any, taken: ValueError) -> None:
    import msvcrt  # type: ignore[import-not-found,unused-ignore]

    try:
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        handle.close()
        raise taken from None


def _let_go(name: str) -> None:
    handle = _held.pop(name, None)
    if handle is not None:
        handle.close()

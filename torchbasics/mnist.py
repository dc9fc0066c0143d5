"""MNIST, Fashion-MNIST and KMNIST: found or downloaded, and verified before one pixel is used.

The files are the four IDX files that torchvision keeps in `<data_dir>/<Name>/raw`; torchvision downloads them, from its
mirrors. Its own check accepts a truncated file, so the reading and checking is done here.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
PARTS = {True: "train", False: "t10k"}
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST = 60_000 * 28 * 28 + 16  # bytes of the largest of the files: a compressed one must not unpack to more


class DataError(ValueError):
    """Data that cannot be used: says which file, which field, and what to do."""


class NotKept(DataError):
    """What would be downloaded cannot be written where it should go."""


def mnist_files(name: str, data_dir: str | os.PathLike, train: bool = True) -> tuple[Path, Path]:
    """Where the image and the label file of data set `name` belong."""
    if name not in FOLDERS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(FOLDERS)}")
    raw = Path(data_dir) / FOLDERS[name] / "raw"
    return raw / f"{PARTS[train]}-images-idx3-ubyte", raw / f"{PARTS[train]}-labels-idx1-ubyte"


def is_present(name: str, data_dir: str | os.PathLike) -> bool:
    """Whether any of the data set's files is there, whole or damaged (a damaged one is reported, not passed by)."""
    return any(len(missing_files(name, data_dir, train)) < 2 for train in (True, False))


def missing_files(name: str, data_dir: str | os.PathLike, train: bool = True) -> list[Path]:
    """Which of a part's two files are not there at all."""
    paths = mnist_files(name, data_dir, train)
    return [path for path in paths if not os.path.lexists(path) and not os.path.lexists(_zipped(path))]


def read_mnist(name: str, data_dir: str | os.PathLike, train: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads one part: images uint8 (N, 1, 28, 28) and labels int64 (N,), each file verified (MNIST's by its hash too).

    Raises FileNotFoundError if a file is missing, DataError if one is damaged (file and field are named).
    """
    images_path, labels_path = (_found(path) for path in mnist_files(name, data_dir, train))
    images = _read_idx(images_path, magic=0x0803, md5=MNIST_MD5 if name == "mnist" else {})
    labels = _read_idx(labels_path, magic=0x0801, md5=MNIST_MD5 if name == "mnist" else {})
    if images.shape[1:] != (28, 28):
        raise _damaged(images_path, f"images are {images.shape[1]}×{images.shape[2]}, expected 28×28")
    if len(images) != len(labels):
        raise _damaged(labels_path, f"{len(labels)} labels for {len(images)} images")
    if int(labels.max()) >= 10:
        raise _damaged(labels_path, f"label {int(labels.max())} at index {int(labels.argmax())}, expected 0 to 9")
    return images.unsqueeze(1), labels.long()


def download_mnist(name: str, data_dir: str | os.PathLike, timeout: float = 30.0) -> None:
    """Downloads data set `name` through torchvision, checks it and puts it under `data_dir`, one process at a time.

    Raises ConnectionError if it cannot be had, NotKept if it cannot be kept. A file appears under its final name only
    when it is whole, and what is there already is left as it is.
    """
    raw = mnist_files(name, data_dir)[0].parent
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(raw / ".lock"):
            # looked for only now: another process may have brought it while this one waited
            missing = [path for train in (True, False) for path in missing_files(name, data_dir, train)]
            if missing:
                with tempfile.TemporaryDirectory(dir=raw, prefix=".download-") as temporary:
                    _download_into(name, temporary, timeout)
                    for path in missing:
                        os.replace(Path(temporary) / FOLDERS[name] / "raw" / path.name, path)
    except ConnectionError as error:
        raise ConnectionError(f"{data_dir}: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotKept(f"{data_dir}: cannot be written ({reason}); choose another --data-dir") from None


def import_torchvision() -> ModuleType:
    """torchvision, imported when first needed (it is slow), with the usual cause of failure in words."""
    try:
        import torchvision
    except Exception as error:  # ImportError without it; RuntimeError where it was built for another torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportError(
            f"torchvision does not work with torch {torch.__version__} ({reason}); "
            "install a matching pair: pip install --upgrade torch torchvision"
        ) from error
    return torchvision


def _download_into(name: str, folder: str, timeout: float) -> None:
    torchvision = import_torchvision()
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # torchvision sets none: without it a silent server would hold us for ever
    to_terminal = sys.stderr is not None and sys.stderr.isatty()  # torchvision shows its progress anywhere
    try:
        with contextlib.nullcontext() if to_terminal else contextlib.redirect_stderr(io.StringIO()):
            getattr(torchvision.datasets, FOLDERS[name])(folder, download=True)
        for train in (True, False):
            read_mnist(name, folder, train)
    except (DataError, FileNotFoundError) as error:  # its path is of a folder that is going to be removed: leave it out
        reason = str(error).split("raw" + os.sep)[-1].split(";")[0]
        raise ConnectionError(f"{name} could not be downloaded: what came is not usable: {reason}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ConnectionError(f"{name} could not be downloaded: {reason}") from error
    finally:
        socket.setdefaulttimeout(waited)


@contextlib.contextmanager
def _one_at_a_time(lock_file: Path) -> Iterator[None]:
    """An advisory lock, gone with its holder. The file stays: whoever removed it could let two in at once."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes would each download their own copy, and the last one's is kept
        yield
        return
    with open(lock_file, "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _zipped(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _read_idx(path: Path, magic: int, md5: dict[str, str]) -> torch.Tensor:
    """The uint8 tensor in an IDX file: big-endian magic number (type 8, number of dimensions), sizes, values."""
    content = _read_bytes(path)
    header = 4 + 4 * (magic & 0xFF)
    if len(content) < header:
        raise _damaged(path, f"{len(content)} bytes, shorter than its header of {header}")
    found, *sizes = struct.unpack(f">{header // 4}I", content[:header])
    if found != magic:
        raise _damaged(path, f"magic number {found:#010x}, expected {magic:#010x}")
    if not math.prod(sizes):
        raise _damaged(path, f"its header says that it is empty (sizes {sizes})")
    if header + math.prod(sizes) != len(content):
        raise _damaged(path, f"{len(content):,} bytes, its header says {header + math.prod(sizes):,} (sizes {sizes})")
    expected = md5.get(path.name.removesuffix(".gz"))
    if expected and hashlib.md5(content, usedforsecurity=False).hexdigest() != expected:
        raise _damaged(path, f"MD5 sum is not {expected}: its content was changed")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].clone().view(sizes)


def _found(path: Path) -> Path:
    """`path`, or its compressed form where only that is there."""
    for form in (path, _zipped(path)):
        if os.path.lexists(form):
            return form
    raise FileNotFoundError(f"{path}: no such file; allow the download, or name the right --data-dir")


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise _damaged(path, "not a regular file")
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"unreadable: {error}") from None
    if len(content) > LARGEST:
        raise _damaged(path, f"holds more than the {LARGEST:,} bytes of the largest such file")
    return content


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: damaged: {problem}; delete the file, or its folder to download all again")

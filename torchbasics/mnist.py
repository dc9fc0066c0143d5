"""MNIST, Fashion-MNIST and KMNIST: found or downloaded, and verified before a pixel is used.

Each is four files in `<data_dir>/<Name>/raw`, where torchvision keeps them. torchvision downloads them too, but its own
check accepts a truncated file, so they are read and verified here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import socket
import struct
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: each process downloads its own copy, and the last one stays
    fcntl = None  # type: ignore[assignment]

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}  # fmt: skip
MNIST_MD5 = {  # of the four files, which have the same names in each data set
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class DataError(ValueError):
    """Data that cannot be used. The message says which file, what is wrong with it and what to do."""


def mnist_files(name: str, data_dir: str | os.PathLike) -> list[Path]:
    """Return where the four files of a data set belong, in the order of MNIST_MD5."""
    if name not in FOLDERS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(FOLDERS)}")
    return [Path(data_dir) / FOLDERS[name] / "raw" / file for file in MNIST_MD5]


def is_present(name: str, data_dir: str | os.PathLike) -> bool:
    """Return whether any of the four files is there, whole or damaged."""
    return any(path.exists() for path in mnist_files(name, data_dir))


def read_mnist(
    name: str, data_dir: str | os.PathLike, train: bool = True, download: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 1, 28, 28), and labels, int64 (N,), of the training or the test part.

    Every file is verified, those of MNIST by their MD5. Raises DataError if one is damaged, FileNotFoundError if one is
    missing and `download` is False, and otherwise what `download_mnist` raises.
    """
    images, labels = mnist_files(name, data_dir)[:2] if train else mnist_files(name, data_dir)[2:]
    missing = [path for path in (images, labels) if not path.exists()]
    if missing and not download:
        raise FileNotFoundError(f"{missing[0]} is missing; allow the download, or name the right data directory")
    if missing:
        download_mnist(name, data_dir)
    is_mnist = name == "mnist"
    return _read_idx(images, (28, 28), is_mnist).unsqueeze(1), _read_idx(labels, (), is_mnist).long()


def _read_idx(path: Path, shape: tuple[int, ...], is_mnist: bool) -> Tensor:
    """Return the values of an IDX file, uint8 (N, *shape), after comparing its header and its MD5, if that is known."""
    content = bytearray(path.read_bytes())
    start = 8 + 4 * len(shape)  # the header: magic number, N, shape, each a big-endian int32
    count, rest = divmod(len(content) - start, math.prod(shape))
    header = struct.pack(f">{start // 4}i", 0x801 + len(shape), count, *shape)
    damaged = count < 1 or rest or content[:start] != header
    if is_mnist and not damaged:  # of the others no MD5 is known
        damaged = hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_MD5[path.name]
    if damaged:
        raise DataError(f"{path} is damaged (size, header or MD5); delete the file to have it downloaded again")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(count, *shape)


def download_mnist(name: str, data_dir: str | os.PathLike) -> None:
    """Download the missing files of data set `name` by torchvision; one process does so, others wait for it.

    A file gets its name when it is whole. What exists stays as it is. Raises ConnectionError if the download fails, any
    other OSError if `data_dir` cannot be written.
    """
    torchvision = import_torchvision()
    files = mnist_files(name, data_dir)
    raw = files[0].parent
    raw.mkdir(parents=True, exist_ok=True)
    # the lock file stays, since removing it could let two processes in
    with open(raw / ".lock", "a") as lock, tempfile.TemporaryDirectory(dir=raw, prefix=".download-") as folder:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [path for path in files if not path.exists()]  # another process may have brought them meanwhile
        waited = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30.0)  # torchvision sets none, and would wait for a silent server for ever
        try:
            if missing:
                with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # its progress
                    getattr(torchvision.datasets, FOLDERS[name])(folder, download=True)
        except Exception as error:  # RuntimeError, URLError, OSError, ...
            reason = (str(error).strip(" .\n") or type(error).__name__).splitlines()[-1]
            raise ConnectionError(
                f"{name} could not be downloaded: {reason}; check the network, or put its files into {raw}"
            ) from error
        finally:
            socket.setdefaulttimeout(waited)
        for path in missing:
            os.replace(Path(folder) / FOLDERS[name] / "raw" / path.name, path)


def import_torchvision() -> ModuleType:
    """Return torchvision, imported late because that is slow; explain the usual failure."""
    try:
        import torchvision
    except Exception as error:  # ImportError without it, RuntimeError if it was built for another torch
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImportError(
            f"torchvision does not work with torch {torch.__version__} ({reason}); "
            "install a matching pair: pip install --upgrade torch torchvision"
        ) from error
    return torchvision

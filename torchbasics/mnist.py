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
}
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class DataError(ValueError):
    """Data that cannot be used. The message says which file, what is wrong with it and what to do."""


def mnist_files(name: str, data_dir: str | os.PathLike, train: bool = True) -> tuple[Path, Path]:
    """Return where the images and the labels of one part belong."""
    if name not in FOLDERS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(FOLDERS)}")
    raw = Path(data_dir) / FOLDERS[name] / "raw"
    part = "train" if train else "t10k"
    return raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"


def is_present(name: str, data_dir: str | os.PathLike) -> bool:
    """Return whether any of the four files is there, whole or damaged."""
    return any(path.exists() for train in (True, False) for path in mnist_files(name, data_dir, train))


def read_mnist(
    name: str, data_dir: str | os.PathLike = "./data", train: bool = True, download: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 (N, 1, 28, 28), and labels, int64 (N,), of the training or the test part.

    Every file is verified, those of MNIST by their MD5. Raises DataError if one is damaged, FileNotFoundError if one is
    missing and `download` is False, and otherwise what `download_mnist` raises.
    """
    images_path, labels_path = mnist_files(name, data_dir, train)
    missing = [path for path in (images_path, labels_path) if not path.exists()]
    if missing and not download:
        raise FileNotFoundError(f"{missing[0]} is missing; allow the download, or name the right data directory")
    if missing:
        download_mnist(name, data_dir)
    md5 = MNIST_MD5 if name == "mnist" else {}
    images = _read_idx(images_path, (28, 28), md5.get(images_path.name))  # (N, 28, 28)
    labels = _read_idx(labels_path, (), md5.get(labels_path.name))  # (N,)
    return images.unsqueeze(1), labels.long()


def _read_idx(path: Path, shape: tuple[int, ...], md5: str | None) -> Tensor:
    """Return the values of an IDX file, uint8 (N, *shape), after comparing its header and its MD5 (if given)."""
    content = bytearray(path.read_bytes())
    start = 8 + 4 * len(shape)  # the header: magic number, N, shape, each a big-endian uint32
    count, rest = divmod(len(content) - start, math.prod(shape))
    problem = ""
    if count < 1 or rest or content[:start] != struct.pack(f">{start // 4}I", 0x801 + len(shape), count, *shape):
        problem = f"its header does not fit its size of {len(content):,} bytes"
    elif md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        problem = f"its MD5 is not {md5}"
    if problem:
        raise DataError(f"{path} is damaged: {problem}; delete the file to have it downloaded again")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(count, *shape)


def download_mnist(name: str, data_dir: str | os.PathLike) -> None:
    """Download the missing files of data set `name` by torchvision; one process does so, others wait for it.

    A file gets its name when it is whole. What exists stays as it is. Raises ConnectionError if the download fails, any
    other OSError if `data_dir` cannot be written.
    """
    torchvision = import_torchvision()
    files = [path for train in (True, False) for path in mnist_files(name, data_dir, train)]
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

"""The MNIST family: what is read, what is refused and in which words, and that a download is all or nothing."""

from __future__ import annotations

import hashlib
import socket
import struct
import sys
import tempfile
import threading
import time
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from torchbasics import mnist
from torchbasics.mnist import DataError, download_mnist, is_present, read_mnist


def idx(magic: int, sizes: tuple[int, ...], values: bytes) -> bytes:
    """Return an IDX file by its definition: big-endian magic number and sizes, then the values."""
    return struct.pack(f">I{len(sizes)}I", magic, *sizes) + values


def images_file(count: int) -> bytes:
    return idx(0x0803, (count, 28, 28), bytes((7 * i + 3) % 256 for i in range(count * 784)))


def labels_file(count: int) -> bytes:
    return idx(0x0801, (count,), bytes(i % 10 for i in range(count)))


def write_set(root: str | Path, name: str = "kmnist", train: int = 12, test: int = 5) -> Path:
    """Write a whole data set of few images; return the folder of its four files."""
    raw = Path(root) / mnist.FOLDERS[name] / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images_file(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels_file(count))
    return raw


class TempCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def refused(self, expected: type[Exception], call: Callable[[], object], *words: str) -> None:
        with self.assertRaises(expected) as caught:
            call()
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))


class Reading(TempCase):
    def test_images_and_labels_have_the_values_of_the_files(self) -> None:
        for name in ("fashion-mnist", "kmnist"):
            write_set(self.root, name)
            for train, count in ((True, 12), (False, 5)):
                images, labels = read_mnist(name, self.root, train, download=False)
                self.assertEqual((images.dtype, labels.dtype), (torch.uint8, torch.int64))
                expected = torch.tensor([(7 * i + 3) % 256 for i in range(count * 784)], dtype=torch.uint8)
                self.assertTrue(torch.equal(images, expected.view(count, 1, 28, 28)))
                self.assertEqual(labels.tolist(), [i % 10 for i in range(count)])

    def test_a_missing_file_is_named_if_no_download_is_wanted(self) -> None:
        raw = write_set(self.root)
        (raw / "train-labels-idx1-ubyte").unlink()
        words = str(raw / "train-labels-idx1-ubyte"), "is missing"
        self.refused(FileNotFoundError, lambda: read_mnist("kmnist", self.root, download=False), *words)
        self.assertEqual(len(read_mnist("kmnist", self.root, train=False, download=False)[1]), 5)

    def test_an_unknown_name_is_answered_with_the_known_ones(self) -> None:
        self.refused(ValueError, lambda: read_mnist("emnist", self.root), "'emnist'", "mnist, fashion-mnist, kmnist")

    def test_a_set_is_present_if_one_file_is_there_even_a_damaged_one(self) -> None:
        self.assertFalse(is_present("kmnist", self.root))
        for path in write_set(self.root).glob("*images*"):
            path.unlink()
        (self.root / "KMNIST" / "raw" / "train-labels-idx1-ubyte").unlink()
        (self.root / "KMNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"")
        self.assertTrue(is_present("kmnist", self.root))


class Damage(TempCase):
    IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"

    def test_a_damaged_file_is_refused_by_name(self) -> None:
        for file, content in (
            (self.IMAGES, images_file(12)[:-1]),
            (self.IMAGES, images_file(12)[:-784]),
            (self.IMAGES, images_file(12) + b"\0"),
            (self.IMAGES, b""),
            (self.IMAGES, labels_file(12 * 784 + 8)),  # of the right size
            (self.IMAGES, idx(0x0D03, (12, 28, 28), bytes(12 * 784))),  # of another type of number
            (self.IMAGES, idx(0x0803, (12, 32, 28), bytes(12 * 32 * 28))),
            (self.IMAGES, idx(0x0803, (0, 28, 28), b"")),
            (self.LABELS, labels_file(12) + b"\0"),
            (self.LABELS, idx(0x0801, (0,), b"")),
        ):
            with self.subTest(file=file, size=len(content)):
                raw = write_set(self.root)
                (raw / file).write_bytes(content)
                words = f"{raw / file} is damaged", "delete the file"
                self.refused(DataError, lambda: read_mnist("kmnist", self.root), *words)

    def test_one_flipped_bit_of_mnist_is_noticed(self) -> None:
        raw = write_set(self.root, "mnist")
        sums = {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in mnist.MNIST_MD5}
        with mock.patch.object(mnist, "MNIST_MD5", sums):
            self.assertEqual(len(read_mnist("mnist", self.root)[0]), 12)
            for file, position in ((self.IMAGES, 5000), (self.LABELS, 12)):
                content = bytearray((raw / file).read_bytes())
                content[position] ^= 1  # a valid pixel or label still, so that only the sum can tell
                (raw / file).write_bytes(content)
                words = str(raw / file), "is damaged", "MD5"
                self.refused(DataError, lambda: read_mnist("mnist", self.root), *words)
                write_set(self.root, "mnist")

    def test_a_damaged_file_is_not_downloaded_again(self) -> None:
        raw = write_set(self.root)
        (raw / self.IMAGES).write_bytes(b"")
        with mock.patch.object(mnist, "download_mnist") as download:
            self.refused(DataError, lambda: read_mnist("kmnist", self.root))
        download.assert_not_called()


def fill_well(raw: Path) -> None:
    write_set(raw.parents[1])


class Downloading(TempCase):
    """With a torchvision whose KMNIST calls a function of the test with the folder for the raw files."""

    def use(self, fill: Callable[[Path], object]) -> None:
        class KMNIST:
            def __init__(self, root: str, download: bool = False) -> None:
                assert download
                raw = Path(root) / "KMNIST" / "raw"
                raw.mkdir(parents=True)
                fill(raw)

        torchvision = types.SimpleNamespace(datasets=types.SimpleNamespace(KMNIST=KMNIST))
        patch = mock.patch.object(mnist, "import_torchvision", lambda: torchvision)
        patch.start()
        self.addCleanup(patch.stop)

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.root / "KMNIST" / "raw").iterdir() if path.name != ".lock")

    def test_absent_files_are_downloaded_once(self) -> None:
        fill = mock.Mock(side_effect=fill_well)
        self.use(fill)
        self.assertEqual(len(read_mnist("kmnist", self.root)[0]), 12)
        self.assertEqual(len(read_mnist("kmnist", self.root, train=False)[0]), 5)
        fill.assert_called_once()
        names = [f"{part}-{kind}-ubyte" for part in ("t10k", "train") for kind in ("images-idx3", "labels-idx1")]
        self.assertEqual(self.files(), names)

    def test_what_exists_stays_and_only_the_rest_is_downloaded(self) -> None:
        raw = write_set(self.root)
        (raw / "t10k-images-idx3-ubyte").unlink()
        (raw / "train-labels-idx1-ubyte").write_bytes(idx(0x0801, (12,), bytes([9] * 12)))
        self.use(fill_well)
        self.assertEqual(len(read_mnist("kmnist", self.root, train=False)[0]), 5)
        self.assertEqual(read_mnist("kmnist", self.root)[1].tolist(), [9] * 12)

    def test_a_failed_download_is_one_line_and_leaves_nothing(self) -> None:
        def fill(raw: Path) -> None:
            (raw / "train-images-idx3-ubyte").write_bytes(images_file(12)[:100])
            raise RuntimeError("Error downloading train-images:\nTried https://a/, got:\n<urlopen error no network>\n")

        self.use(fill)
        words = "kmnist could not be downloaded: <urlopen error no network>", str(self.root / "KMNIST" / "raw")
        self.refused(ConnectionError, lambda: read_mnist("kmnist", self.root), *words)
        self.assertEqual(self.files(), [])

    def test_a_folder_that_cannot_be_written_is_no_matter_of_the_network(self) -> None:
        (self.root / "KMNIST").write_bytes(b"")
        with self.assertRaises(OSError) as caught:
            download_mnist("kmnist", self.root)
        self.assertNotIsInstance(caught.exception, ConnectionError)
        self.assertIn("KMNIST", str(caught.exception))

    def test_a_silent_server_has_a_time_limit_and_others_sockets_keep_theirs(self) -> None:
        seen: list[float | None] = []

        def fill(raw: Path) -> None:
            seen.append(socket.getdefaulttimeout())
            fill_well(raw)

        self.use(fill)
        self.addCleanup(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(71)
        download_mnist("kmnist", self.root)
        self.assertEqual((seen, socket.getdefaulttimeout()), ([30.0], 71))

    @unittest.skipIf(mnist.fcntl is None, "no locks here")
    def test_a_second_process_waits_for_the_first_and_uses_its_files(self) -> None:
        calls, inside, go_on = [], threading.Event(), threading.Event()

        def fill(raw: Path) -> None:
            calls.append(raw)
            inside.set()
            go_on.wait(20)
            fill_well(raw)

        self.use(fill)
        # threads stand for processes: the lock belongs to the open file
        threads = [threading.Thread(target=download_mnist, args=("kmnist", self.root), daemon=True) for _ in range(2)]
        threads[0].start()
        self.assertTrue(inside.wait(20))
        threads[1].start()
        time.sleep(0.1)
        self.assertTrue(threads[1].is_alive())
        go_on.set()
        for thread in threads:
            thread.join(20)
        self.assertEqual((len(calls), len(self.files())), (1, 4))


class Torchvision(TempCase):
    def test_a_missing_torchvision_is_explained(self) -> None:
        with mock.patch.dict(sys.modules, {"torchvision": None}):
            words = f"does not work with torch {torch.__version__}", "pip install --upgrade torch torchvision"
            self.refused(ImportError, lambda: download_mnist("kmnist", self.root), *words)

    def test_a_torchvision_for_another_torch_is_explained(self) -> None:
        finder = mock.Mock()
        finder.find_spec.side_effect = RuntimeError("operator torchvision::nms does not exist\nmore lines")
        with mock.patch.dict(sys.modules), mock.patch.object(sys, "meta_path", [finder]):
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            self.refused(ImportError, mnist.import_torchvision, "torchvision::nms does not exist", "pip install")


if __name__ == "__main__":
    unittest.main()

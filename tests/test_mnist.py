"""The MNIST family: what is read, what is refused and in which words, and that a download is all or nothing."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from torchbasics import data, mnist
from torchbasics.mnist import DataError, download_mnist, is_present, missing_files, mnist_files, read_mnist

NAMES = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


def idx(magic: int, sizes: tuple[int, ...], values: bytes) -> bytes:
    """An IDX file written by its definition: big-endian magic number, big-endian sizes, the values."""
    return struct.pack(f">I{len(sizes)}I", magic, *sizes) + values


def images_file(count: int) -> bytes:
    return idx(0x0803, (count, 28, 28), bytes((7 * i + 3) % 256 for i in range(count * 784)))


def labels_file(count: int) -> bytes:
    return idx(0x0801, (count,), bytes(i % 10 for i in range(count)))


def write_set(root: str | Path, name: str = "kmnist", train: int = 12, test: int = 5) -> Path:
    """Writes a whole fake data set; returns the folder of its four files."""
    raw = Path(root) / {"mnist": "MNIST", **NAMES}[name] / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images_file(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels_file(count))
    return raw


class TestCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def one_line(self, error: BaseException, *words: str) -> None:
        text = str(error)
        self.assertNotIn("\n", text)
        for word in words:
            self.assertIn(word, text)


class Reading(TestCase):
    def test_right_tensors(self) -> None:
        for name in NAMES:
            write_set(self.root, name)
            for train, count in ((True, 12), (False, 5)):
                images, labels = read_mnist(name, self.root, train)
                self.assertEqual((images.dtype, labels.dtype), (torch.uint8, torch.int64))
                self.assertEqual(tuple(images.shape), (count, 1, 28, 28))
                expected = torch.tensor([(7 * i + 3) % 256 for i in range(count * 784)], dtype=torch.uint8)
                self.assertTrue(torch.equal(images.flatten(), expected))
                self.assertEqual(labels.tolist(), [i % 10 for i in range(count)])

    def test_compressed_files_are_read_too(self) -> None:
        raw = write_set(self.root)
        expected = read_mnist("kmnist", self.root)
        for path in list(raw.iterdir()):
            (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        images, labels = read_mnist("kmnist", self.root)
        self.assertTrue(torch.equal(images, expected[0]) and torch.equal(labels, expected[1]))

    def test_unknown_name(self) -> None:
        with self.assertRaisesRegex(
            ValueError, "unknown data set 'emnist'; choose one of mnist, fashion-mnist, kmnist"
        ):
            mnist_files("emnist", self.root)

    def test_missing_is_not_damaged(self) -> None:
        self.assertFalse(is_present("kmnist", self.root))
        self.assertEqual(len(missing_files("kmnist", self.root)), 2)
        with self.assertRaises(FileNotFoundError) as caught:
            read_mnist("kmnist", self.root)
        self.one_line(caught.exception, "train-images-idx3-ubyte: no such file", "--data-dir")
        write_set(self.root)
        self.assertTrue(is_present("kmnist", self.root))
        self.assertEqual(missing_files("kmnist", self.root), [])

    def test_one_damaged_file_counts_as_present(self) -> None:
        raw = write_set(self.root)
        for path in raw.iterdir():
            path.unlink()
        (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
        self.assertTrue(is_present("kmnist", self.root))


class Damage(TestCase):
    """Each damaged file is refused in one line that names it and what is wrong with it."""

    def refused(self, file: str, content: bytes | None, *words: str, name: str = "kmnist") -> None:
        raw = write_set(self.root, name)
        if content is not None:
            (raw / file).write_bytes(content)
        with self.assertRaises(DataError) as caught:
            read_mnist(name, self.root)
        self.one_line(caught.exception, str(raw / file), "delete the file", *words)

    IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"

    def test_truncated(self) -> None:
        self.refused(self.IMAGES, images_file(12)[:-1], "9,423 bytes, its header says 9,424")
        self.refused(self.LABELS, labels_file(12)[:-3], "17 bytes, its header says 20")

    def test_longer_than_its_header_says(self) -> None:
        self.refused(self.LABELS, labels_file(12) + b"\0", "21 bytes, its header says 20")

    def test_shorter_than_a_header(self) -> None:
        self.refused(self.IMAGES, images_file(12)[:15], "15 bytes, shorter than its header of 16")

    def test_empty(self) -> None:
        self.refused(self.IMAGES, b"", "0 bytes, shorter than its header of 16")

    def test_magic_number(self) -> None:
        self.refused(self.IMAGES, labels_file(784 * 12 + 8), "magic number 0x00000801, expected 0x00000803")
        self.refused(self.LABELS, images_file(1), "magic number 0x00000803, expected 0x00000801")
        self.refused(self.IMAGES, idx(0x0D03, (12, 28, 28), bytes(12 * 784)), "magic number 0x00000d03")

    def test_dimensions_whose_product_overflows(self) -> None:
        huge = 2**32 - 1
        self.refused(self.IMAGES, idx(0x0803, (huge, huge, huge), bytes(100)), f"its header says {huge**3 + 16:,}")
        # 2**64 elements are 0 modulo 2**64: an integer of 64 bits would find that the sizes fit
        self.refused(self.IMAGES, idx(0x0803, (2**31, 2**31, 4), b""), f"its header says {2**64 + 16:,}")

    def test_no_samples(self) -> None:
        self.refused(self.IMAGES, idx(0x0803, (0, 28, 28), b""), "empty (sizes [0, 28, 28])")
        self.refused(self.IMAGES, idx(0x0803, (0, 2**32 - 1, 2**32 - 1), b""), "empty (sizes [0, 4294967295, 429")
        self.refused(self.LABELS, idx(0x0801, (0,), b""), "empty")

    def test_image_size(self) -> None:
        self.refused(self.IMAGES, idx(0x0803, (12, 32, 27), bytes(12 * 32 * 27)), "images are 32×27, expected 28×28")

    def test_label_out_of_range(self) -> None:
        for bad in (10, 255):
            content = idx(0x0801, (12,), bytes([1] * 7 + [bad] + [0] * 4))
            self.refused(self.LABELS, content, f"label {bad} at index 7, expected 0 to 9")

    def test_counts_differ(self) -> None:
        self.refused(self.LABELS, labels_file(11), "11 labels for 12 images")

    def test_a_folder_instead_of_a_file(self) -> None:
        for name in (self.IMAGES, self.IMAGES + ".gz"):
            raw = write_set(self.root)
            (raw / self.IMAGES).unlink()
            (raw / name).mkdir()
            self.refused_as_it_is(raw / name, "not a regular file")
            (raw / name).rmdir()

    def refused_as_it_is(self, path: Path, *words: str) -> None:
        with self.assertRaises(DataError) as caught:
            read_mnist("kmnist", self.root)
        self.one_line(caught.exception, str(path), *words)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs named pipes")
    def test_a_pipe_does_not_hang(self) -> None:
        for name in (self.IMAGES, self.IMAGES + ".gz"):
            raw = write_set(self.root)
            (raw / self.IMAGES).unlink()
            os.mkfifo(raw / name)
            self.refused_as_it_is(raw / name, "not a regular file")
            (raw / name).unlink()

    def test_a_dangling_link(self) -> None:
        raw = write_set(self.root)
        (raw / self.IMAGES).unlink()
        (raw / self.IMAGES).symlink_to(self.root / "nowhere")
        self.refused_as_it_is(raw / self.IMAGES, "not a regular file")

    def compressed(self, content: bytes, *words: str) -> None:
        raw = write_set(self.root)
        (raw / self.IMAGES).unlink()
        path = raw / (self.IMAGES + ".gz")
        path.write_bytes(content)
        self.refused_as_it_is(path, *words)

    def test_gzip_with_damage(self) -> None:
        good = gzip.compress(images_file(12))
        self.compressed(good[:-9], "unreadable: ")
        self.compressed(good + b"garbage", "unreadable: ")
        self.compressed(b"no gzip at all", "unreadable: ")
        self.compressed(good[:40] + bytes([good[40] ^ 1]) + good[41:], "unreadable: ")
        self.compressed(gzip.compress(images_file(12)[:-1]), "9,423 bytes, its header says 9,424")

    def test_gzip_bomb_is_not_unpacked(self) -> None:
        with mock.patch.object(mnist, "LARGEST", 100_000):
            bomb = gzip.compress(bytes(30_000_000))
            self.assertLess(len(bomb), 100_000)
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.compressed(bomb, "more than the 100,000 bytes")
            self.assertLess(tracemalloc.get_traced_memory()[1], 2_000_000)  # the peak, in bytes

    def test_raw_file_beyond_all_measure_is_not_read(self) -> None:
        raw = write_set(self.root)
        with open(raw / self.IMAGES, "r+b") as file:
            file.truncate(1 << 40)  # sparse: a terabyte that takes no room
        self.refused_as_it_is(raw / self.IMAGES, "more than the 47,040,016 bytes")

    def test_mnist_itself_is_checked_by_md5(self) -> None:
        self.refused(self.IMAGES, None, "MD5 sum is not 6bbc9ace898e44ae57da46a324031adb", name="mnist")

    def test_md5_of_the_right_content_passes(self) -> None:
        raw = write_set(self.root, "mnist")
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in raw.iterdir()}
        with mock.patch.object(mnist, "MNIST_MD5", sums):
            self.assertEqual(len(read_mnist("mnist", self.root)[0]), 12)
            for path in list(raw.iterdir()):
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
            self.assertEqual(len(read_mnist("mnist", self.root)[0]), 12)
            # 255 stays a valid pixel, so nothing but the sum can find this
            changed = raw / "train-images-idx3-ubyte.gz"
            changed.write_bytes(gzip.compress(images_file(12)[:-1] + b"\xff"))
            self.refused_in("mnist", changed, "MD5")

    def refused_in(self, name: str, path: Path, *words: str) -> None:
        with self.assertRaises(DataError) as caught:
            read_mnist(name, self.root)
        self.one_line(caught.exception, str(path), *words)

    def test_a_damaged_file_is_reported_not_downloaded_anew(self) -> None:
        raw = write_set(self.root)
        (raw / self.IMAGES).write_bytes(b"")
        with mock.patch.object(data, "download_mnist") as download, self.assertRaises(DataError):
            data.load_images("kmnist", self.root)
        download.assert_not_called()


def fake_torchvision(fill: Callable[[Path], None]) -> types.ModuleType:
    """A torchvision whose data set KMNIST calls `fill` with the folder of the raw files when it is told to download."""

    class KMNIST:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            assert download
            raw = Path(root) / "KMNIST" / "raw"
            raw.mkdir(parents=True)
            fill(raw)

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(KMNIST=KMNIST)  # type: ignore[attr-defined]
    return module


def fill_well(raw: Path) -> None:
    write_set(raw.parents[1])


class Downloading(TestCase):
    def use(self, fill: Callable[[Path], None]) -> None:
        patch = mock.patch.object(mnist, "import_torchvision", lambda: fake_torchvision(fill))
        patch.start()
        self.addCleanup(patch.stop)

    def left(self) -> list[str]:
        return sorted(path.name for path in (self.root / "KMNIST" / "raw").iterdir())

    def test_whole_files_arrive(self) -> None:
        self.use(fill_well)
        download_mnist("kmnist", self.root)
        self.assertEqual(
            [name for name in self.left() if name != ".lock"],
            sorted(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
        )
        self.assertEqual(read_mnist("kmnist", self.root)[1].tolist(), [i % 10 for i in range(12)])

    def test_load_images_downloads_what_is_absent(self) -> None:
        calls: list[Path] = []

        def fill(raw: Path) -> None:
            calls.append(raw)
            fill_well(raw)

        self.use(fill)
        images = data.load_images("kmnist", self.root)
        self.assertEqual((tuple(images.inputs.shape), images.classes), ((12, 1, 28, 28), mnist.CLASSES["kmnist"]))
        self.assertEqual(len(data.load_images("kmnist", self.root, train=False)), 5)
        self.assertEqual(len(calls), 1)
        with self.assertRaises(FileNotFoundError):
            data.load_images("fashion-mnist", self.root, download=False)

    def test_what_a_killed_download_left_out_is_fetched_and_the_rest_kept(self) -> None:
        raw = write_set(self.root)
        (raw / "t10k-images-idx3-ubyte").unlink()
        own = raw / "train-labels-idx1-ubyte"
        own.write_bytes(idx(0x0801, (12,), bytes([9] * 12)))
        self.use(fill_well)
        self.assertEqual(len(data.load_images("kmnist", self.root, train=False)), 5)
        self.assertEqual(data.load_images("kmnist", self.root).targets.tolist(), [9] * 12)

    def nothing_left(self, *words: str) -> None:
        with self.assertRaises(ConnectionError) as caught:
            download_mnist("kmnist", self.root)
        self.one_line(caught.exception, "kmnist could not be downloaded", *words)
        self.assertEqual(self.left(), [".lock"])

    def test_a_truncated_download_leaves_nothing(self) -> None:
        def fill(raw: Path) -> None:
            write_set(raw.parents[1])
            (raw / "t10k-labels-idx1-ubyte").write_bytes(labels_file(5)[:-1])

        self.use(fill)
        self.nothing_left("t10k-labels-idx1-ubyte", "12 bytes, its header says 13")

    def test_a_download_without_a_file_leaves_nothing(self) -> None:
        self.use(lambda raw: (write_set(raw.parents[1]) / "t10k-labels-idx1-ubyte").unlink())
        self.nothing_left("t10k-labels-idx1-ubyte: no such file")

    def test_an_error_of_the_network_is_one_line(self) -> None:
        def fill(raw: Path) -> None:
            (raw / "train-images-idx3-ubyte").write_bytes(images_file(12)[:100])
            raise RuntimeError("Error downloading train-images:\nTried https://a/, got:\n<urlopen error no network>\n")

        self.use(fill)
        self.nothing_left("<urlopen error no network>")

    def test_a_full_disk_while_putting_the_files_in_place(self) -> None:
        self.use(fill_well)
        with (
            mock.patch.object(os, "replace", side_effect=OSError(28, "No space left on device")),
            self.assertRaises(DataError) as caught,
        ):
            download_mnist("kmnist", self.root)
        self.one_line(caught.exception, "No space left on device", "--data-dir")
        self.assertEqual(self.left(), [".lock"])

    def test_a_file_in_the_way(self) -> None:
        (self.root / "KMNIST").write_bytes(b"")
        with self.assertRaises(DataError) as caught:
            download_mnist("kmnist", self.root)
        self.one_line(caught.exception, str(self.root), "cannot be written", "--data-dir")

    def test_the_timeout_of_sockets_is_set_and_put_back(self) -> None:
        seen: list[float | None] = []

        def fill(raw: Path) -> None:
            seen.append(socket.getdefaulttimeout())
            fill_well(raw)

        self.use(fill)
        before = socket.getdefaulttimeout()
        download_mnist("kmnist", self.root, timeout=7.0)
        self.assertEqual(seen, [7.0])
        self.assertEqual(socket.getdefaulttimeout(), before)

    @unittest.skipUnless(sys.platform != "win32", "needs fcntl")
    def test_a_second_one_waits_and_does_not_download_again(self) -> None:
        calls, inside, go_on = [], threading.Event(), threading.Event()

        def fill(raw: Path) -> None:
            calls.append(raw)
            inside.set()
            self.assertTrue(go_on.wait(20))
            fill_well(raw)

        self.use(fill)
        threads = [threading.Thread(target=download_mnist, args=("kmnist", self.root), daemon=True) for _ in range(2)]
        threads[0].start()
        self.assertTrue(inside.wait(20))
        threads[1].start()
        time.sleep(0.1)
        self.assertTrue(threads[1].is_alive())  # it waits for the lock
        go_on.set()
        for thread in threads:
            thread.join(20)
            self.assertFalse(thread.is_alive())
        self.assertEqual(len(calls), 1)
        self.assertEqual(len(read_mnist("kmnist", self.root)[0]), 12)


class Torchvision(unittest.TestCase):
    def test_missing(self) -> None:
        with mock.patch.dict(sys.modules, {"torchvision": None}), self.assertRaises(ImportError) as caught:
            mnist.import_torchvision()
        self.assertRegex(
            str(caught.exception), "torchvision does not work with torch .*pip install --upgrade torch torchvision"
        )
        self.assertNotIn("\n", str(caught.exception))

    def test_built_for_another_torch(self) -> None:
        class Finder:
            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> None:
                if name == "torchvision":
                    raise RuntimeError("operator torchvision::nms does not exist\nmore lines")

        loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
        with mock.patch.dict(sys.modules), mock.patch.object(sys, "meta_path", [Finder, *sys.meta_path]):
            for name in loaded:
                del sys.modules[name]
            with self.assertRaises(ImportError) as caught:
                mnist.import_torchvision()
        self.assertIn("(operator torchvision::nms does not exist)", str(caught.exception))
        self.assertIn("pip install", str(caught.exception))

    def test_missing_at_a_download_is_not_a_matter_of_the_network(self) -> None:
        with (
            tempfile.TemporaryDirectory() as root,
            mock.patch.dict(sys.modules, {"torchvision": None}),
            self.assertRaises(ImportError),
        ):
            download_mnist("kmnist", root)


if __name__ == "__main__":
    unittest.main()

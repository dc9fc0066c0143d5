"""What make_loaders makes of a data set's name: parts, facts, limits, and what it says of its choice."""

from __future__ import annotations

import math
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.test_train_mnist import MNIST_LIKE, few_digits, write_fashion, write_images
from torchbasics import loaders, mnist
from torchbasics.data import load_images
from torchbasics.loaders import make_loaders


def batches(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


def images(loader: Any) -> list[bytes]:
    return [image.numpy().tobytes() for inputs, _ in loader for image in inputs]


class LoadersCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        no_network = ConnectionError("mnist could not be downloaded: no route to host")
        for patch in (
            mock.patch("torchbasics.digits.draw_digits", few_digits),
            mock.patch("torchbasics.data.download_mnist", side_effect=no_network),
        ):
            patch.start()
            self.addCleanup(patch.stop)


class InMemory(LoadersCase):
    def test_parts_and_facts(self) -> None:
        data = make_loaders("digits", batch_size=32, val_size=40, augment=False)
        self.assertEqual([len(part) for part in (data.train, data.val, data.test)], [7, 1, 1])
        self.assertEqual([sum(len(y) for _, y in part) for part in data[:3]], [200, 40, MNIST_LIKE["t10k"]])
        self.assertEqual(data.facts["samples"], (200, 40, 80))
        self.assertEqual(
            (data.facts["dataset"], data.facts["classes"], data.notice), ("digits", tuple("0123456789"), "")
        )
        self.assertEqual((data.facts["in_channels"], data.facts["image_size"]), (1, 28))
        training = torch.cat([x for x, _ in batches(data.train)])
        self.assertLess(abs(float(training.mean())), 1e-3)  # normalised by the statistics of the training images
        self.assertLess(abs(float(training.std()) - 1), 1e-3)
        self.assertEqual(set(images(data.train)) & set(images(data.val)), set())
        self.assertEqual([part.batches.batch_size for part in data[:3]], [32, 250, 250])

    def test_the_seed_decides_split_and_order(self) -> None:
        one, same, other = (make_loaders("digits", val_size=40, batch_size=32, seed=seed) for seed in (1, 1, 2))
        self.assertEqual(images(one.train), images(same.train))
        self.assertNotEqual(sorted(images(one.val)), sorted(images(other.val)))
        self.assertEqual(images(one.test), images(same.test))

    def test_augmentation_is_of_training_only(self) -> None:
        plain, shaken = (make_loaders("digits", val_size=40, batch_size=32, augment=flag) for flag in (False, True))
        self.assertNotEqual(images(plain.train), images(shaken.train))
        self.assertEqual(images(plain.val), images(shaken.val))

    def test_how_far_augmentation_goes(self) -> None:
        common: dict[str, Any] = {"batch_size": 32, "val_size": 40}
        affine = make_loaders("digits", **common, rotation=0.0, shift=0.3, scaling=0.2).train.augment
        self.assertEqual((affine.radians, affine.shift, affine.scale), (0.0, 0.3, 0.2))
        affine = make_loaders("digits", **common).train.augment  # as train_mnist's options are by default
        self.assertEqual((round(math.degrees(affine.radians), 9), affine.shift, affine.scale), (10.0, 0.1, 0.1))
        still = make_loaders("digits", **common, rotation=0.0, shift=0.0, scaling=0.0)
        plain = make_loaders("digits", **common, augment=False)
        (x, _), (y, _) = next(iter(still.train)), next(iter(plain.train))
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)

    def test_the_test_images_are_the_test_set(self) -> None:
        write_fashion(self.folder)
        data = make_loaders("fashion-mnist", self.folder, 32, val_size=40)
        train, test = (load_images("fashion-mnist", self.folder, train=part) for part in (True, False))
        found = torch.cat([inputs for inputs, _ in data.test])
        self.assertTrue(torch.equal(found.mul(data.facts["std"][0]).add(data.facts["mean"][0]).mul(255).round().byte(),
                                    test.inputs))  # fmt: skip
        self.assertTrue(torch.equal(torch.cat([targets for _, targets in data.test]), test.targets))
        self.assertFalse(torch.equal(train.inputs[: len(test.inputs)], test.inputs))

    def test_limits(self) -> None:
        data = make_loaders("digits", val_size=40, batch_size=8, limit_batches=3, limit_evaluation=1)
        self.assertEqual([len(batches(part)) for part in data[:3]], [3, 1, 1])
        with self.assertRaisesRegex(ValueError, "--batch-size 201 is larger than the 200 training samples"):
            make_loaders("digits", val_size=40, batch_size=201)
        self.assertEqual(len(make_loaders("digits", val_size=40, batch_size=200).train), 1)

    def test_fashion_mnist_from_files(self) -> None:
        raw = write_fashion(self.folder)
        data = make_loaders("fashion-mnist", self.folder, 32, val_size=40)
        self.assertEqual((data.facts["classes"][0], data.facts["samples"]), ("t-shirt", (200, 40, 80)))
        next(raw.iterdir()).unlink()
        with self.assertRaises(ConnectionError):  # a named data set is never replaced
            make_loaders("fashion-mnist", self.folder, 32, val_size=40)

    def test_auto_where_nothing_can_be_kept(self) -> None:
        (self.folder / "file").write_text("")
        with mock.patch("torchbasics.data.download_mnist", mnist.download_mnist):
            data = make_loaders("auto", self.folder / "file" / "data", 32, val_size=40)
            self.assertEqual(data.facts["dataset"], "digits")
            self.assertIn("and it cannot be written: training on digits", data.notice)
            with self.assertRaisesRegex(ValueError, "cannot be written .Not a directory.; choose another --data-dir"):
                make_loaders("mnist", self.folder / "file" / "data", 32, val_size=40)

    def test_auto(self) -> None:
        data = make_loaders("auto", self.folder, 32, val_size=40)
        self.assertEqual(data.facts["dataset"], "digits")
        self.assertRegex(data.notice, f"^NOTICE: no MNIST in {self.folder} and no network: .* not on MNIST.$")
        (self.folder / "MNIST" / "raw").mkdir(parents=True)
        with mock.patch.object(loaders, "is_present", lambda *_: True), self.assertRaises(ConnectionError):
            make_loaders("auto", self.folder, 32, val_size=40)  # damaged files are no reason to draw

    def test_processes_have_parts_of_one_batch(self) -> None:
        whole = make_loaders("digits", val_size=40, batch_size=33)
        parts = []
        for rank in range(3):
            with (
                mock.patch("torchbasics.distributed.rank", lambda rank=rank: rank),
                mock.patch("torchbasics.distributed.world_size", lambda: 3),
            ):
                parts.append(make_loaders("digits", val_size=40, batch_size=33))
        for name in ("train", "val", "test"):
            own = [batches(getattr(part, name)) for part in parts]
            together = [torch.cat([x for x, _ in step]) for step in zip(*own, strict=True)]
            for mine, (expected, _) in zip(together, batches(getattr(whole, name)), strict=True):
                self.assertTrue(torch.equal(mine, expected), name)


class Folders(LoadersCase):
    def test_limits(self) -> None:
        write_images(self.folder, 40)
        data = make_loaders("folder", self.folder, 4, val_size=12, limit_batches=2, limit_evaluation=1, image_size=16)
        self.assertEqual([len(batches(part)) for part in data[:3]], [2, 1, 1])

    def test_a_class_without_images(self) -> None:
        write_images(self.folder, 20)
        (self.folder / "zebras").mkdir()
        with self.assertRaisesRegex(ValueError, "no images of zebras; add some, or remove the folder"):
            make_loaders("folder", self.folder, 4, val_size=5)

    def test_one_folder_is_split(self) -> None:
        write_images(self.folder, 40)
        data = make_loaders("folder", self.folder, 8, val_size=10, augment=False, image_size=16)
        self.assertEqual(data.facts["samples"], (30, 10, 10))
        self.assertEqual((data.facts["classes"], data.facts["image_size"]), (("class0", "class1"), 16))
        self.assertEqual(next(iter(data.train))[0].shape, (8, 1, 16, 16))
        self.assertIs(data.test, data.val)
        self.assertEqual(data.notice, "NOTICE: no test/ folder: the last figures are on the validation images.")
        self.assertEqual(len({*images(data.train), *images(data.val)}), 40)  # none is in both

    def test_its_own_parts(self) -> None:
        for seed, part in enumerate(("train", "val", "test")):
            write_images(self.folder / part, 10 + 2 * seed, seed=seed)
        data = make_loaders("folder", self.folder, 4, image_size=16)
        self.assertEqual((data.facts["samples"], data.notice), ((10, 12, 14), ""))

    def test_the_mode_of_the_training_images_is_that_of_all(self) -> None:
        for part, mode in (("train", "L"), ("val", "RGB"), ("test", "RGB")):
            write_images(self.folder / part, 12, mode=mode)
        data = make_loaders("folder", self.folder, 4, image_size=16)
        self.assertEqual([next(iter(loader))[0].shape[1] for loader in data[:3]], [1, 1, 1])

    def test_what_does_not_fit(self) -> None:
        write_images(self.folder / "train", 10)
        write_images(self.folder / "val", 12, classes=3)
        with self.assertRaisesRegex(ValueError, "train/, val/ and test/ have different classes"):
            make_loaders("folder", self.folder, 4)
        with self.assertRaisesRegex(ValueError, "--batch-size 40 is larger than the 9 training samples"):
            make_loaders("folder", self.folder / "train", 40)  # 5000 for validation are too much: a tenth is taken


if __name__ == "__main__":
    unittest.main()

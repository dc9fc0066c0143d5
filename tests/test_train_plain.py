"""scripts/train_plain.py: it learns, and needs little."""

from __future__ import annotations

import ast
import os
import re
import tempfile
import unittest
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torchbasics.digits import draw_digits

from .common import SCRIPTS, load_script, run_main


def few_digits(count: int, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Draw 1,200 digits for training and 200 for the test."""
    return draw_digits(count // 50, seed, **options)


class TrainPlain(unittest.TestCase):
    def test_it_learns_and_says_that_the_images_are_drawn(self) -> None:
        threads, random_state = torch.get_num_threads(), torch.get_rng_state()
        self.addCleanup(torch.set_num_threads, threads)
        self.addCleanup(torch.set_rng_state, random_state)
        torch.set_num_threads(1)
        no_network = mock.patch("torchbasics.mnist.download_mnist", side_effect=ConnectionError("no route to host"))
        with tempfile.TemporaryDirectory() as folder, no_network:
            with mock.patch("torchbasics.digits.draw_digits", few_digits):
                argv = ("--data-dir", folder, "--epochs", "3", "--lr", "0.003", "--batch-size", "32")
                code, out, err = run_main(load_script("train_plain").main, *argv)
            self.assertEqual((code, err, os.listdir(folder)), (0, "", []))
        notice, start, *lines = out.splitlines()
        self.assertEqual(start, "training on 1,200 images, cpu")
        self.assertRegex(notice, "^NOTICE: no MNIST in .*no route to host.* drawn")
        line = r"epoch (\d): training loss (\d\.\d{4}), test accuracy (\d+\.\d\d)%, \d+\.\d s"
        epochs = [re.fullmatch(line, text).groups() for text in lines]  # type: ignore[union-attr]
        losses = [float(loss) for _, loss, _ in epochs]
        self.assertEqual([epoch for epoch, _, _ in epochs], ["1", "2", "3"])
        self.assertLess(losses[0], 2.3)  # better than guessing, on average of the first epoch
        self.assertTrue(losses[0] > losses[1] > losses[2], losses)
        self.assertGreater(float(epochs[-1][2]), 80)  # guessing: 10

    def test_it_needs_nothing_but_torch_and_load_mnist(self) -> None:
        imports = {
            ast.unparse(node)
            for node in ast.walk(ast.parse((SCRIPTS / "train_plain.py").read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        standard = {"from __future__ import annotations", "from pathlib import Path"}
        standard |= {"import argparse", "import sys", "import time"}
        ours = {"import torch", "from torch import nn", "from torchbasics import load_mnist"}
        self.assertEqual(imports, standard | ours)


if __name__ == "__main__":
    unittest.main()

"""The README is true: its programs run, its commands parse, and its figures and lists are those of the code."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import tempfile
import unittest
from typing import Any
from unittest import mock

import torch
from torch import nn

import torchbasics as tb

from .common import ROOT, SCRIPTS, load_script, run_main
from .test_package import ALONE, MODULES, all_siblings

README = (ROOT / "README.md").read_text(encoding="utf-8")


class Readme(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        self.addCleanup(torch.set_rng_state, torch.get_rng_state())
        os.chdir(folder.name)

    def test_its_programs_run_one_after_the_other(self) -> None:
        blocks = re.findall(r"```python\n(.*?)```", README, re.S)
        self.assertEqual(len(blocks), README.count("```python"))
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for block in blocks:
                exec(block, names)
            images = names["images"][:200]
            model = nn.Sequential(nn.Flatten(), nn.Linear(784, 784), nn.Unflatten(1, (1, 28, 28)))
            loader = tb.TensorLoader(images, torch.zeros(200), batch_size=50)
            trainer = names["Autoencoder"](model, None, torch.optim.Adam(model.parameters()))
            losses = trainer.fit(loader, loader, num_epochs=2)["val_loss"]
        self.assertLess(names["history"]["val_loss"][-1], math.log(10))  # better than guessing
        self.assertLess(losses[1], losses[0])
        self.assertEqual(out.getvalue().count("\n"), 2 + 2)  # a line for each epoch
        self.assertEqual(os.listdir(), [])

    def test_its_commands_have_options_that_the_scripts_know(self) -> None:
        commands = re.findall(r"\bscripts/(\w+)\.py((?: +-[^`\n]*)?)", README)
        self.assertLessEqual({"train_mnist", "train_ddp"}, {name for name, _ in commands})
        for name, options in dict.fromkeys(commands):
            words = shlex.split(options)
            with self.subTest(name, words=words):
                # What stands before --help is checked first. (`record` of torchrun wants a real stderr.)
                with mock.patch("faulthandler.enable"):
                    code, text, err = run_main(load_script(name).main, *words, "--help")
                self.assertEqual((code, err), (0, ""))
                known = set(re.findall(r"--[\w-]+", text))
                self.assertLessEqual({word for word in words if word.startswith("--")}, known)
        sources = [path.read_text(encoding="utf-8") for path in (*SCRIPTS.glob("*.py"), *MODULES.values())]
        for option in set(re.findall(r"`(?:python \S+ )?(--\w[\w-]*)", README)):
            self.assertTrue(option == "--help" or any(f'"{option}"' in source for source in sources), option)

    def test_its_list_of_scripts_is_complete(self) -> None:
        table = re.findall(r"^\| (`.*?`) \|", README, re.M)
        listed = set(re.findall(r"`(\w+)`", " ".join(table)))
        self.assertEqual(listed, {path.stem for path in SCRIPTS.glob("*.py")})

    def test_what_it_says_about_lengths_and_imports_is_so(self) -> None:
        lines = re.search(r"`train_plain` \| .* in (\d+) lines", README)
        assert lines is not None
        self.assertEqual(int(lines[1]), len((SCRIPTS / "train_plain.py").read_text(encoding="utf-8").splitlines()))
        copying = README.partition("## Copying")[2].partition("##")[0]
        alone, beside = re.search(r"relatively\.(.*)import nothing of ours.*needs(.*)beside it", copying, re.S).groups()  # type: ignore[union-attr]
        self.assertEqual(set(re.findall(r"`(\w+)`", alone)), set(ALONE))
        self.assertEqual(set(re.findall(r"`(\w+)`", beside)), all_siblings("trainer"))


class Files(unittest.TestCase):
    def test_links_lead_to_files_that_exist(self) -> None:
        for page in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
            text = (ROOT / page).read_text(encoding="utf-8")
            for link in re.findall(r"\]\(([^)#]+)", text):
                self.assertTrue(link.startswith("https://") or (ROOT / link).exists(), (page, link))
        self.assertIn("## [Unreleased]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))

if __name__ == "__main__":
    unittest.main()

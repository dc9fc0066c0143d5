"""README and docs are true: their programs and commands run, and their figures and lists are those of the code."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import runpy
import shlex
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import torchbasics as tb
from torchbasics.data import Images, Splits

from .common import ROOT, SCRIPTS, load_script, run_main
from .test_package import ALONE, MODULES, all_siblings

DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(path.read_text(encoding="utf-8") for path in DOCS)


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
            logged: list[dict[str, float]] = []
            names["wandb"] = types.SimpleNamespace(log=lambda values, step: logged.append(values))
            names["trainer"].fit(names["train_loader"], names["val_loader"], num_epochs=3)
            model = nn.Bilinear(4, 3, 2)
            image, text = torch.randn(40, 4), torch.randn(40, 3)
            batch = {"image": image, "text": text, "label": (image[:, 0] * text[:, 0] > 0).long()}
            trainer = names["TwoInputs"](model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.1))
            losses = trainer.fit([batch], [batch], num_epochs=2)["val_loss"]
        self.assertLess(names["history"]["val_loss"][-1], math.log(10))  # better than guessing
        self.assertLess(losses[1], losses[0])
        self.assertEqual(out.getvalue().count("\n"), 3 + 2)  # a line for each epoch
        self.assertEqual([values["val_loss"] for values in logged], names["history"]["val_loss"][2:])
        self.assertEqual(os.listdir(), [])

    def test_commands_of_the_pages_run(self) -> None:
        """With few drawn digits and two batches an epoch; those for several processes are parsed only."""
        images, labels = tb.draw_digits(400)
        part = Images(images, labels, tuple("0123456789"))
        commands = re.findall(r"^    (?:python|torchrun) .*?\bscripts/(\w+)\.py(.*)$", PAGES, re.M)
        self.assertLessEqual({"train_mnist", "train_ddp"}, {name for name, _ in commands})
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        for name, options in dict.fromkeys(commands):
            words = shlex.split(options)
            with self.subTest(name, words=words), mock.patch("faulthandler.enable"):  # `record` wants a real stderr
                script = load_script(name)
                few = ["--epochs", "1", "--limit-batches", "2", "--model", "simplenet", "--batch-size", "32"]
                with mock.patch.object(tb, "load_splits", lambda *_, **__: Splits(part, part, part, "digits", "")):
                    if name == "train_ddp":
                        script.make_parser().parse_args(words)
                        continue
                    if "--resume" in words:
                        run = words[words.index("--resume") + 1]
                        self.assertEqual(run_main(script.main, *few, "--output", run)[::2], (0, ""))
                        few = []
                    self.assertEqual(run_main(script.main, *words, *few)[::2], (0, ""))
        for one, other in re.findall(r"^    diff (\S+) (\S+)$", PAGES, re.M):
            self.assertEqual(*[Path(path).read_text(encoding="utf-8") for path in (one, other)])

    def test_commands_in_sentences_have_options_that_exist(self) -> None:
        """Each is parsed as by its own program, which then stops; `python -m unittest` has nothing to parse."""

        def parse_only(parser: argparse.ArgumentParser, argv: Any = None, namespace: Any = None) -> None:
            _, unknown = parser.parse_known_args(argv, namespace)
            parser.exit(status=len(unknown), message=f"unknown: {unknown}")

        commands = re.findall(r"`python (scripts/\w+\.py|-m tests\.\w+)(.*?)`", PAGES, re.S)
        self.assertLessEqual({"scripts/tensor_demo.py", "-m tests.benchmark", "-m tests.faults"}, set(dict(commands)))
        for program, options in commands:
            argv = mock.patch("sys.argv", [program, *shlex.split(options)])
            parse = mock.patch("argparse.ArgumentParser.parse_args", parse_only)
            with self.subTest(program, options=options), argv, parse:
                if program.startswith("-m "):
                    ended = run_main(lambda _, name=program[3:]: runpy.run_module(name, run_name="__main__"))
                else:
                    ended = run_main(lambda _, name=Path(program).stem: load_script(name).main())
                self.assertEqual(ended[::2], (0, "unknown: []"))

    def test_every_option_that_is_named_exists(self) -> None:
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
        pattern = r"relative imports\.(.*)import nothing of ours.*needs(.*)beside it"
        alone, beside = re.search(pattern, copying, re.S).groups()  # type: ignore[union-attr]
        self.assertEqual(set(re.findall(r"`(\w+)`", alone)), set(ALONE))
        self.assertEqual(set(re.findall(r"`(\w+)`", beside)), all_siblings("trainer"))


class Files(unittest.TestCase):
    def test_links_lead_to_files_that_exist(self) -> None:
        for page in (*ROOT.glob("*.md"), *DOCS):
            text = page.read_text(encoding="utf-8")
            for link in re.findall(r"\]\(([^)#]+)", text):
                self.assertTrue(link.startswith("https://") or (page.parent / link).exists(), (page, link))
        self.assertIn("## [Unreleased]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))

if __name__ == "__main__":
    unittest.main()

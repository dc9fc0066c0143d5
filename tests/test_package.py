"""The package as something to copy: what imports what, that a copy works, and the names that it offers."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
from collections.abc import Iterator
from pathlib import Path

import torchbasics as tb

from .common import ROOT, SCRIPTS

PACKAGE = ROOT / "torchbasics"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
ALONE = (
    "models", "digits", "mnist", "device", "optim", "early_stopping", "checkpoint", "monitors", "memory", "cli", "demo",
    "distributed",
)  # fmt: skip
# The rows L1 to L16 of the coverage.
NAMES = """
    SimpleNet NeuralNetwork MLP CNN MNISTNet EnsembleModel CustomLoss init_weights freeze unfreeze
    count_parameters count_parameters_by_layer Trainer evaluate compute_accuracy predict EarlyStopping
    warmup_lr_scheduler warmup_cosine_scheduler GradientMonitor MemoryTracker check_nan_inf
    set_seed pick_device check_pytorch_environment load_mnist get_transforms CustomDataset pad_collate split_dataset
    save_checkpoint load_checkpoint NonFiniteLoss Interrupted CheckpointError DataError
"""


def nodes_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Return what a file imports at any depth: (modules beside it, relatively; packages, by name)."""
    siblings: set[str] = set()
    packages: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            (siblings if node.level else packages).update(name.partition(".")[0] for name in names)
    return siblings, packages


def all_siblings(name: str) -> set[str]:
    """Return the modules that one needs beside it, those that they need included."""
    needed: set[str] = set()
    new = {name}
    while new:
        needed |= new
        new = {sibling for module in new for sibling in imports_of(MODULES[module])[0]} - needed
    return needed - {name}


def run_python(code: str, folder: str | Path) -> str:
    """Return what `code` prints in a fresh process in `folder`, which is first on its search path."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise AssertionError(done.stderr)
    return done.stdout


class Imports(unittest.TestCase):
    def test_the_modules_to_copy_as_single_files_import_no_sibling(self) -> None:
        for name in ALONE:
            self.assertEqual(imports_of(MODULES[name])[0], set(), name)
        self.assertIn("checkpoint", imports_of(MODULES["run"])[0])  # this test sees imports at all

    def test_trainer_needs_at_most_six_siblings_theirs_included(self) -> None:
        self.assertLessEqual(len(all_siblings("trainer")), 6)

    def test_the_package_imports_itself_relatively_and_otherwise_only_the_torch_stack(self) -> None:
        for path in PACKAGE.glob("*.py"):
            names = imports_of(path)[1] - sys.stdlib_module_names
            self.assertLessEqual(names, {"torch", "torchvision", "PIL", "numpy"}, path.name)

    def test_scripts_never_import_each_other(self) -> None:
        scripts = {path.stem: path for path in SCRIPTS.glob("*.py")}
        for name, path in scripts.items():
            self.assertEqual(imports_of(path)[1] & ({*scripts, "scripts", "tests"} - {"profile"}), set(), name)

    def test_the_package_touches_no_private_attribute_of_torch(self) -> None:
        for path in PACKAGE.glob("*.py"):
            own = set(re.findall(r"(?:def |class |self\.|^|cls\.)(_[a-z]\w*)", path.read_text(encoding="utf-8"), re.M))
            names: set[str] = set()
            for node in nodes_of(path):
                if isinstance(node, ast.Attribute):
                    names.add(node.attr)
                elif isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                    text = f"{getattr(node, 'module', '')}." + ".".join(alias.name for alias in node.names)
                    names |= set(text.split("."))
                elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                    names |= {str(argument.value) for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
            private = {name for name in names if re.match("_[^_]", name)}
            # `_metadata` is part of every state dict, `_orig_mod` of the names in one; the others are Python's.
            allowed = {"_orig_mod", "_metadata", "_fields", "_getframe", "_exit"}
            self.assertEqual(private - own - allowed, set(), path.name)


class Copied(unittest.TestCase):
    def test_copies_of_the_package_and_of_its_single_modules_work_under_other_names(self) -> None:
        program = f"""
            import sys, torch
            import mylib
            from mylib import distributed, data
            import {", ".join(f"my_{name}" for name in ALONE)}
            images, labels = mylib.draw_digits(300)
            loader = mylib.TensorLoader(images, labels, 50, shuffle=True)
            model = mylib.SimpleNet()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            trainer = mylib.Trainer(model, torch.nn.CrossEntropyLoss(), optimizer, checkpoint_dir="run")
            history = trainer.fit(loader, loader, num_epochs=2, verbose=False)
            assert history["train_loss"][1] < history["train_loss"][0] < 2.4, history
            weights = my_checkpoint.load_checkpoint("run/best.pt")["model_state_dict"]
            my_models.SimpleNet().load_state_dict(weights)
            print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"torchbasics", "torchvision", "PIL"}}))
        """
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(PACKAGE, Path(folder, "mylib"), ignore=shutil.ignore_patterns("__pycache__"))
            for name in ALONE:
                shutil.copy(MODULES[name], Path(folder, f"my_{name}.py"))
            self.assertEqual(run_python(program, folder), "[]\n")  # neither ours nor the slow ones were imported

    def test_a_script_named_profile_does_not_break_the_profiler_of_python(self) -> None:
        code = "import cProfile, profile\ncProfile.run('1 + 1')\nprint(profile.__name__, profile.Profile.__name__)"
        printed = run_python(code, SCRIPTS)
        self.assertIn("function calls", printed)
        self.assertEqual(printed.splitlines()[-1], "profile Profile")


class Names(unittest.TestCase):
    def test_every_name_of_the_library_can_be_imported(self) -> None:
        for name in NAMES.split():
            self.assertTrue(callable(getattr(tb, name)), name)
        self.assertRegex(tb.__version__, r"^\d+\.\d+\.\d+")


if __name__ == "__main__":
    unittest.main()

"""What imports what, and what no file may call. Read from the sources, so it holds for code that no test runs, too."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "torchbasics"
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MAY_IMPORT = {
    "trainer": {
        "checkpoint", "cuda_graph", "distributed", "device", "nonfinite", "evaluation", "position", "interrupts",
        "optim", "parallel",
    },
    "cuda_graph": {"evaluation", "optim"},
    "evaluation": {"device", "distributed", "position"},
    "distributed": {"shared_memory"},
    "parallel": {"checkpoint", "distributed", "shared_memory"},
    # what the training scripts share stands on all of the rest
    "loaders": {"data", "mnist"},
    "options": {"checkpoint", "cuda_graph", "loaders", "models", "optim", "trainer"},
    "report": {"checkpoint", "device", "distributed", "loaders", "models", "options", "trainer"},
    "position": {"device"},
    "data": {"digits", "distributed", "images", "mnist"},
}
LATE_ONLY = {"torchvision", "PIL"}  # slow, or there only with torchvision: inside functions
FORBIDDEN_MODULES = {"pickle", "shelve", "marshal", "dill", "joblib", "cloudpickle", "requests"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "extractall", "unpack_archive", "system", "popen"}
FORBIDDEN_KEYWORDS = {("weights_only", "False"), ("shell", "True"), ("allow_pickle", "True")}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names, in full: `from torchbasics import data` names torchbasics.data."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "torchbasics" + (f".{node.module}" if node.module else "") if node.level else node.module or ""
        return [f"{module}.{alias.name}" for alias in node.names] if module == "torchbasics" else [module]
    return []


def siblings(path: Path) -> set[str]:
    names = [name for node in ast.walk(tree_of(path)) for name in imported(node)]
    return {name.split(".")[1] for name in names if name.startswith("torchbasics.")}


def at_import(tree: ast.AST) -> list[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += [child, *at_import(child)]
    return found


def forbidden(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        found += [name for name in imported(node) if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            owner = (
                node.func.value.id
                if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
                else ""
            )
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if (
                name in FORBIDDEN_CALLS
                or method in {"extractall", "unpack_archive"}
                or (owner == "os" and method in {"system", "popen"})
            ):
                found.append(f"{name or method}() in line {node.lineno}")
            values = [
                (word.arg, repr(word.value.value))
                for word in node.keywords
                if word.arg and isinstance(word.value, ast.Constant)
            ]
            found += [
                f"{word}={value} in line {node.lineno}" for word, value in values if (word, value) in FORBIDDEN_KEYWORDS
            ]
            if owner == "pickle":
                found.append(f"pickle.{method} in line {node.lineno}")
            if (owner, method) == ("torch", "load") and ("weights_only", "True") not in values:
                found.append(f"torch.load without weights_only=True in line {node.lineno}")
    return found


class Imports(unittest.TestCase):
    def test_there_is_something_to_read(self) -> None:
        self.assertLessEqual(
            {"checkpoint", "data", "device", "mnist", "optim", "trainer"}, {path.stem for path in MODULES}
        )
        self.assertIn("train_mnist", {path.stem for path in SCRIPTS})

    def test_modules_are_leaves(self) -> None:
        for path in MODULES:
            self.assertLessEqual(siblings(path), MAY_IMPORT.get(path.stem, set()), path.name)
        self.assertIn("distributed", siblings(PACKAGE / "trainer.py"))  # so that this test sees imports at all
        self.assertIn("mnist", siblings(PACKAGE / "data.py"))

    def test_the_torch_stack_is_the_only_dependency(self) -> None:
        allowed = {*sys.stdlib_module_names, "torch", "torchbasics", *LATE_ONLY}
        for path in [*MODULES, PACKAGE / "__init__.py"]:
            names = {name.split(".")[0] for node in ast.walk(tree_of(path)) for name in imported(node)}
            self.assertEqual(names - allowed, set(), path.name)

    def test_torchvision_is_imported_late(self) -> None:
        for path in [*MODULES, PACKAGE / "__init__.py"]:
            names = {name.split(".")[0] for node in at_import(tree_of(path)) for name in imported(node)}
            self.assertEqual(names & LATE_ONLY, set(), path.name)

    def test_scripts_do_not_import_each_other(self) -> None:
        stems = {path.stem for path in SCRIPTS} - set(sys.stdlib_module_names)
        for path in SCRIPTS:
            names = {name.split(".")[0] for node in ast.walk(tree_of(path)) for name in imported(node)}
            self.assertEqual(names & (stems | {"scripts", "tests"}), set(), path.name)

    def test_the_package_does_not_import_torchvision(self) -> None:
        code = "import sys, torchbasics; print(sorted({'torchvision', 'PIL', 'tests'} & set(sys.modules)))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "[]"), done.stderr)


class Calls(unittest.TestCase):
    def test_nothing_that_runs_foreign_code(self) -> None:
        for path in MODULES:
            self.assertEqual(forbidden(tree_of(path)), [], path.name)
        for path in SCRIPTS:  # a demo may show what can be pickled; nothing may be unpickled
            self.assertEqual(forbidden(tree_of(path)), [], path.name)

    def test_this_test_sees_what_it_forbids(self) -> None:
        for line in (
            "import pickle",
            "from pickle import loads",
            "import dill as d",
            "eval('1')",
            "exec(code)",
            "tar.extractall(path)",
            "torch.load(f, weights_only=False)",
            "torch.load(f)",
            "subprocess.run(c, shell=True)",
            "os.system('ls')",
            "__import__('os')",
            "np.load(f, allow_pickle=True)",
            "pickle.loads(b)",
            "pickle.Unpickler(f)",
        ):
            self.assertTrue(forbidden(ast.parse(line)), line)
        for line in (
            "model.eval()",
            "torch.load(f, weights_only=True)",
            "import torch",
            "re.compile('a')",
            "torch.compile(model)",
        ):
            self.assertEqual(forbidden(ast.parse(line)), [], line)

    def test_imports_at_any_depth_are_seen(self) -> None:
        tree = ast.parse(
            "try:\n    import torchvision\nexcept ImportError:\n    pass\n"
            "class A:\n    import PIL\ndef f():\n    import numpy"
        )
        self.assertEqual([name for node in at_import(tree) for name in imported(node)], ["torchvision", "PIL"])
        relative = ast.parse("from . import data\nfrom .mnist import x\nfrom torchbasics import digits")
        self.assertEqual(
            [name for node in ast.walk(relative) for name in imported(node)],
            ["torchbasics.data", "torchbasics.mnist", "torchbasics.digits"],
        )


if __name__ == "__main__":
    unittest.main()

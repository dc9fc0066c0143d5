"""scripts/export.py: every format computes what the network computes, or is not kept; what it says is true."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import types
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import torchbasics as tb
from tests.scripts import load_script
from torchbasics.loaders import Loaders

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "export.py"
MEAN, STD = (0.15,), (0.3,)
QUANTIZES = importlib.util.find_spec("torch.ao.quantization") is not None
ENGINE = torch.backends.quantized.engine != "none"
OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(12, 4)
    def forward(self, x):
        return self.layer(x.flatten(1))
def not_a_module():
    return 3
"""


script = load_script("export")
HOME: Path  # holds best.pt, a checkpoint of MODEL
MODEL: nn.Module


def setUpModule() -> None:
    """A small network that knows drawn digits, as a checkpoint."""
    global HOME, MODEL
    torch.set_num_threads(1)
    HOME = Path(tempfile.mkdtemp())
    unittest.addModuleCleanup(shutil.rmtree, HOME)
    inputs, targets = tb.draw_digits(3000, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODEL = tb.make_model("simplenet")
    optimizer = torch.optim.Adam(MODEL.parameters(), lr=3e-3)
    for _ in range(8):
        for images, labels in tb.TensorLoader(inputs, targets, 50, mean=MEAN, std=STD):
            optimizer.zero_grad()
            nn.functional.cross_entropy(MODEL(images), labels).backward()
            optimizer.step()
    MODEL.eval()
    save(HOME / "best.pt", MODEL)
    fewer = mock.patch.object(script, "DRAWN", 500)
    fewer.start()
    unittest.addModuleCleanup(fewer.stop)
    unittest.addModuleCleanup(sys.modules.pop, script.__name__)


def save(path: Path, network: nn.Module, **changed: Any) -> None:
    metadata = {"model": "simplenet", "dataset": "digits", "classes": tuple("0123456789"), "in_channels": 1,
                "image_size": 28, "mean": MEAN, "std": STD} | changed
    tb.save_checkpoint({"epoch": 1, "model_state_dict": network.state_dict(), "optimizer_state_dict": {}, "loss": 0.1,
                        "metadata": metadata}, path)


def test_inputs(count: int = 500) -> tuple[Tensor, Tensor]:
    """The script's test images, normalised by hand."""
    images, targets = tb.draw_digits(count, seed=1)
    return (images.float() / 255 - MEAN[0]) / STD[0], targets


def here(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """In the place of `run_fresh`: the same functions, without the seconds of a new process."""
    return {**script.run_artifact(job), "imported": []}


def changed_outputs(change: Any) -> Any:
    """A `run_fresh` whose outputs, {batch size: logits}, are changed."""
    def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
        told = here(job, folder)
        outputs = torch.load(job["outputs"], weights_only=True)
        change(outputs)
        torch.save(outputs, job["outputs"])
        return told

    return run


class ExportCase(unittest.TestCase):
    """Runs main() into a folder of its own; in this process unless `fresh`."""

    fresh = False

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.output = self.folder / "out"
        if not self.fresh:
            self.patch("run_fresh", here)
        self.pretend(onnx=False, torchao=False)

    def patch(self, name: str, value: Any) -> None:
        patch = mock.patch.object(script, name, value)
        patch.start()
        self.addCleanup(patch.stop)

    def pretend(self, **extras: bool) -> None:
        """Extras that are there, or are not, whatever this machine has."""
        absent = {name for extra, there in extras.items() if not there for name in script.EXTRAS[extra]}
        real = importlib.util.find_spec
        self.patch("installed", lambda *names: not absent & set(names) and all(
            name in sys.modules or real(name) is not None for name in names))

    def run_main(self, *argv: str, checkpoint: Path | None = None) -> tuple[int, str, str]:
        file = checkpoint or (None if "--model" in argv else HOME / "best.pt")
        source = ("--checkpoint", str(file)) if file else ()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            try:
                code = script.main([*source, "--output", str(self.output), *argv])
            except SystemExit as stop:
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    def export(self, *formats: str, extra: tuple[str, ...] = (), code: int = 0) -> dict[str, dict[str, Any]]:
        """Rows by format, after a run that must end with `code`."""
        named = [word for name in formats for word in ("--format", name)]
        got, out, err = self.run_main(*named, *extra, "--json")
        self.assertEqual(got, code, out + err)
        return {row["format"]: row for row in json.loads(out)["rows"]}

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.output / "model.json").read_text())

    def refuse(self, *argv: str, text: str, checkpoint: Path | None = None) -> None:
        code, out, err = self.run_main(*argv, checkpoint=checkpoint)
        self.assertEqual((code, out), (2, ""), err)
        self.assertRegex(err, rf"\Aerror: .*{text}.*\n\Z")
        self.assertFalse((self.output / "model.json").exists())


class TestFreshProcess(ExportCase):
    """What runs in another process really does, and knows nothing of this project."""

    fresh = True

    def test_pt2_runs_where_the_package_cannot_be_imported(self) -> None:
        decoy = self.folder / "decoy" / "torchbasics"
        decoy.mkdir(parents=True)
        (decoy / "__init__.py").write_text("raise RuntimeError('imported')")
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(decoy.parent)}):
            row = self.export("pt2", extra=("--benchmark",))["pt2"]
        self.assertEqual((row["result"], row["agreement"]), ("ok", 1.0))
        self.assertLess(row["max_rel_difference"], 1e-6)
        self.assertGreater(row["load_ms"], 0)
        self.assertEqual(list(row["latency_ms"]), ["1", "64"])

    def test_a_file_that_needs_the_class_or_does_not_load_fails(self) -> None:
        def whole_module(task: Any, folder: Path) -> Any:
            torch.save(task.model, folder / "model.pt2")  # a pickle: no exported program
            return script.Made(folder / "model.pt2")

        with mock.patch.dict(script.FORMATS, pt2=whole_module):
            row = self.export("pt2", code=1)["pt2"]
        self.assertRegex(row["result"], "^FAILED: does not run in a fresh process")
        self.assertFalse((self.output / "model.pt2").exists())

    def test_a_process_that_does_not_end_is_stopped(self) -> None:
        self.patch("RUNNER", "import time; time.sleep(60)")
        self.patch("PATIENCE", 0.2)
        self.assertRegex(self.export("pt2", code=1)["pt2"]["result"], "^FAILED: did not finish within 0.2 s")

    def test_a_process_that_imports_the_package_fails(self) -> None:
        self.patch("RUNNER", script.RUNNER.replace("import torch\n", "import torch, torchbasics\n"))
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
            row = self.export("pt2", code=1)["pt2"]
        self.assertEqual(row["result"], "FAILED: imports the network's Python class")


class TestManifest(ExportCase):
    def test_says_what_goes_in_and_what_is_listed(self) -> None:
        self.export("pt2")
        manifest, content = self.manifest(), (self.output / "model.pt2").read_bytes()
        entry = manifest["artifacts"][0]
        self.assertEqual({key: entry[key] for key in ("file", "format", "sha256", "size")}, {
            "file": "model.pt2", "format": "pt2", "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)})
        self.assertEqual({key: manifest[key] for key in manifest if key not in ("artifacts", "versions")}, {
            "schema": 1, "model": "simplenet", "dataset": "digits", "classes": list("0123456789"),
            "input": {"shape": ["batch", 1, 28, 28], "dtype": "float32"},
            "normalisation": {"mean": list(MEAN), "std": list(STD)},
            "source": {"checkpoint": "best.pt",
                       "sha256": hashlib.sha256((HOME / "best.pt").read_bytes()).hexdigest()}})
        self.assertEqual(manifest["versions"]["torch"], torch.__version__)
        self.assertEqual(sorted(path.name for path in self.output.iterdir()), ["model.json", "model.pt2"])

    def test_the_file_alone_gives_the_logits_at_any_batch_and_holds_no_path_and_no_image(self) -> None:
        self.export("pt2")
        program = torch.export.load(self.output / "model.pt2")
        for count in (1, 5, 64):
            inputs = test_inputs(count)[0]
            torch.testing.assert_close(program.module()(inputs), MODEL(inputs), rtol=0, atol=1e-5)
        content = (self.output / "model.pt2").read_bytes()
        for trace in (str(ROOT).encode(), b"models.py"):
            self.assertNotIn(trace, content)
        self.assertFalse(program.example_inputs[0][0].any())
        self.assertLess(len(content), 109_386 * 4 + 40_000)

    def test_runs_into_one_folder_add_up(self) -> None:
        self.export("pt2")
        self.export("torchscript")
        self.export("pt2")
        self.assertEqual([entry["file"] for entry in self.manifest()["artifacts"]],
                         ["model.torchscript.pt", "model.pt2"])
        (self.output / "model.torchscript.pt").unlink()  # what is gone is no longer listed
        self.export("pt2")
        self.assertEqual([entry["file"] for entry in self.manifest()["artifacts"]], ["model.pt2"])

    def test_another_network_does_not_come_into_the_folder(self) -> None:
        self.export("pt2")
        before = {path.name: path.read_bytes() for path in self.output.iterdir()}
        with torch.no_grad():
            other = tb.make_model("simplenet")
        save(self.folder / "other.pt", other)
        for argv, checkpoint, what in ((("--format", "torchscript"), self.folder / "other.pt", "source"),
                                       (("--batch", "3"), None, "input")):
            code, _, err = self.run_main(*argv, checkpoint=checkpoint)
            self.assertEqual(code, 2)
            self.assertIn(f"is of another export ({what})", err)
        self.assertEqual({path.name: path.read_bytes() for path in self.output.iterdir()}, before)

    def test_a_foreign_model_json_is_not_overwritten(self) -> None:
        self.output.mkdir()
        for text in ("{", "[]", '{"artifacts": 3}', '{"artifacts": []}'):
            (self.output / "model.json").write_text(text)
            code, _, err = self.run_main("--format", "pt2")
            self.assertEqual((code, (self.output / "model.json").read_text()), (2, text))
            self.assertIn("not a model.json of this script", err)


class TestParity(ExportCase):
    """A file that computes something else is found out and not kept."""

    def fails(self, pattern: str, name: str = "pt2") -> None:
        rows = self.export(name, "torchscript", code=1)
        self.assertRegex(rows[name]["result"], f"^FAILED: .*{pattern}")
        self.assertEqual([path.name for path in self.output.glob("model.*pt2")], [])

    def test_one_broken_weight(self) -> None:
        real = script.FORMATS["pt2"]

        def broken(task: Any, folder: Path) -> Any:
            with torch.no_grad():
                task.model.output.weight[3, 5] += 0.05
                made = real(task, folder)
                task.model.output.weight[3, 5] -= 0.05
            return made

        with mock.patch.dict(script.FORMATS, pt2=broken):
            rows = self.export("pt2", "torchscript", code=1)
        self.assertRegex(rows["pt2"]["result"], "differs by .* of the largest logit")
        self.assertEqual(rows["torchscript"]["result"], "ok")  # the others go on
        self.assertEqual([entry["format"] for entry in self.manifest()["artifacts"]], ["torchscript"])

    def test_wrong_at_one_batch_size_only(self) -> None:
        for size in ("1", "2", "7", "64", "all"):
            with self.subTest(size=size):
                self.patch("run_fresh", changed_outputs(lambda outputs, size=size: outputs[size].mul_(1.001)))
                self.export("pt2", code=1)

    def test_nan_and_another_shape(self) -> None:
        self.patch("run_fresh", changed_outputs(lambda outputs: outputs["7"].fill_(float("nan"))))
        self.assertIsNone(self.export("pt2", code=1)["pt2"]["max_abs_difference"])  # JSON knows no infinity
        self.patch("run_fresh", changed_outputs(lambda outputs: outputs.update(all=outputs["all"][:, :9])))
        self.export("pt2", code=1)

    def test_a_batch_that_the_export_fixed(self) -> None:
        self.patch("export_program", lambda task, model: torch.export.export(model, (script.example(task),)))
        self.fails("")

    @unittest.skipUnless(QUANTIZES and ENGINE, "this torch has no quantization of its own")
    def test_int8_that_lost_its_accuracy(self) -> None:
        def forget(outputs: dict[str, Tensor]) -> None:
            outputs["all"][:30] = outputs["all"][:30].roll(1, dims=1)  # 6% of 500

        self.patch("run_fresh", changed_outputs(forget))
        row = self.export("int8-dynamic", code=1)["int8-dynamic"]
        self.assertRegex(row["result"], r"9\d.\d\d% of the classes agree")
        save(self.folder / "mnist.pt", MODEL, dataset="mnist")  # without labels the classes alone tell
        code, _, err = self.run_main("--format", "int8-dynamic", checkpoint=self.folder / "mnist.pt")
        self.assertEqual(code, 1, err)
        self.patch("run_fresh", changed_outputs(lambda outputs: outputs["1"].neg_()))  # the rest is right
        self.export("int8-dynamic", code=1)

    def test_difference_by_hand(self) -> None:
        expected = torch.tensor([[4.0, -8.0], [1.0, 0.5]])
        outputs = torch.tensor([[4.0, -9.0], [1.0, 1.0]])
        self.assertEqual(script.difference(outputs, expected), (1.0, 0.5))
        self.assertEqual(script.difference(outputs[:1], expected), (float("inf"),) * 2)


class TestFormats(ExportCase):
    def test_table_of_the_plain_ones(self) -> None:
        code, out, err = self.run_main("--format", "pt2", "--format", "torchscript", "--format", "pruned")
        self.assertEqual((code, err), (0, ""))
        for row in ("eager ", "pt2 ", "torchscript ", "pruned "):
            self.assertRegex(out, rf"(?m)^{row}.*%")
        self.assertIn("torchscript: legacy", out)
        self.assertIn("500 drawn digits", out)
        accuracy = tb.compute_accuracy(MODEL, [test_inputs()])
        self.assertGreater(accuracy, 0.8)
        self.assertRegex(out, rf"(?m)^pt2 .* 100.00% +{accuracy:.2%} +\+0.00")

    def test_default_is_pt2_and_onnx_only_where_it_can_be(self) -> None:
        self.assertEqual(list(self.export()), ["eager", "pt2"])

    def test_batch_of_one_size(self) -> None:
        row = self.export("pt2", "torchscript", extra=("--batch", "3", "--benchmark"))["pt2"]
        self.assertEqual((row["agreement"], list(row["latency_ms"])), (1.0, ["3"]))
        self.assertEqual(self.manifest()["input"]["shape"], [3, 1, 28, 28])
        program = torch.export.load(self.output / "model.pt2").module()
        program(torch.zeros(3, 1, 28, 28))
        with self.assertRaises((RuntimeError, AssertionError)):
            program(torch.zeros(4, 1, 28, 28))

    def test_aoti_without_a_compiler_is_skipped(self) -> None:
        with mock.patch.dict(os.environ, {"CXX": "no-such-compiler -O2"}):
            code, out, err = self.run_main("--format", "aoti", "--format", "pt2")
        self.assertEqual(code, 3)
        self.assertRegex(err, r"\Aaoti: SKIP: needs a C\+\+ compiler, and there is no no-such-compiler.*\n\Z")
        self.assertRegex(out, "(?m)^pt2 ")

    def test_aoti_with_a_compiler(self) -> None:
        """Twin of the real thing, which takes ten seconds and more: the compiler is played by torch.export."""
        compiled = mock.patch("torch._inductor.aoti_compile_and_package",
                              lambda program, package_path: torch.export.save(program, package_path))
        loaded = mock.patch("torch._inductor.aoti_load_package", lambda file: torch.export.load(file).module())
        with mock.patch.dict(os.environ, {"CXX": sys.executable}), compiled, loaded:
            row = self.export("aoti")["aoti"]
        self.assertEqual((row["result"], row["file"]), ("ok", "model.aoti.pt2"))
        self.assertIn(torch.__version__, row["note"])

    def test_one_that_fails_does_not_stop_the_others(self) -> None:
        def fail(task: Any, folder: Path) -> Any:
            raise RuntimeError("out of\nluck")

        with mock.patch.dict(script.FORMATS, pt2=fail):
            code, out, err = self.run_main("--format", "pt2", "--format", "torchscript")
        self.assertEqual((code, err), (1, "pt2: FAILED: out of luck\n"))
        self.assertRegex(out, "(?m)^torchscript ")

    def test_fastest(self) -> None:
        measured = ("eager", "", 2.0, 4.0), ("a", "ok", 1.0, 8.0), ("b", "FAILED", 0.1, 0.1)
        rows = [{"format": name, "result": result, "latency_ms": {"1": [one, 9.0], "64": [many, 9.0]}}
                for name, result, one, many in measured]
        first, second = script.fastest(rows)
        self.assertRegex(first, "batch 1, .*: a, 1.00 ms, 2.0 times")
        self.assertRegex(second, "batch 64, .*: eager, 4.00 ms, 1.0 times")

    def test_latency_is_median_and_95th_percentile(self) -> None:
        clock = iter([t for i in range(90) for t in (100.0 * i, 100.0 * i + (i - 9) / 1000)])  # 10 calls not counted
        with mock.patch.object(script.time, "perf_counter", lambda: next(clock)):
            p50, p95 = script.time_calls(lambda inputs: None, torch.zeros(64))
        self.assertAlmostEqual(p50, 41, places=3)
        self.assertAlmostEqual(p95, 77, places=3)


class TestPruned(ExportCase):
    def weights(self) -> dict[str, Tensor]:
        return dict(torch.export.load(self.output / "model.pruned.pt2").state_dict)

    def test_the_smallest_weights_of_all_layers_are_zero_and_nothing_else_changes(self) -> None:
        rows = self.export("pt2", "pruned", extra=("--sparsity", "0.4"))
        state, pruned = MODEL.state_dict(), self.weights()
        self.assertEqual(pruned.keys(), state.keys())  # no weight_orig, no weight_mask
        every = torch.cat([value.flatten() for name, value in state.items() if name.endswith("weight")]).abs()
        limit = every.sort().values[round(0.4 * len(every)) - 1]
        for name, value in state.items():
            kept = value if name.endswith("bias") else torch.where(value.abs() > limit, value, 0.0)
            torch.testing.assert_close(pruned[name], kept, rtol=0, atol=0)
        self.assertIn("40.0% of all layers' weights are zero", rows["pruned"]["note"])
        self.assertLess(abs(rows["pruned"]["size"] - rows["pt2"]["size"]), 2000)  # not smaller …
        self.assertLess(rows["pruned"]["gzip"], 0.8 * rows["pt2"]["gzip"])  # … until compressed
        inputs, targets = test_inputs()
        logits = torch.export.load(self.output / "model.pruned.pt2").module()(inputs)
        self.assertEqual(rows["pruned"]["accuracy"], int((logits.argmax(1) == targets).sum()) / 500)

    def test_one_layer(self) -> None:
        self.export("pruned", extra=("--prune-layer", "hidden.0", "--sparsity", "0.5"))
        zeros = {name: float((value == 0).float().mean()) for name, value in self.weights().items()}
        self.assertAlmostEqual(zeros.pop("hidden.0.weight"), 0.5, places=4)
        self.assertEqual(set(zeros.values()), {0.0})

    def test_fine_tuning_heals_and_keeps_the_zeros(self) -> None:
        draw, images = tb.draw_digits, tb.draw_digits(1500, seed=0)
        with mock.patch.object(script.tb, "draw_digits", lambda count, seed=0: tuple(
                part[:count] for part in (images if count > 500 else draw(count, seed)))):
            row = self.export("pruned", extra=("--sparsity", "0.9", "--fine-tune", "2"))["pruned"]
        weights = [value for name, value in self.weights().items() if name.endswith("weight")]
        zeros = sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)
        self.assertAlmostEqual(zeros, 0.9, places=3)
        words = row["note"].split("accuracy ")[1].replace("%", "").split()
        pruned, tuned = float(words[2]), float(words[4])
        self.assertGreater(tuned, pruned + 2)

    def test_the_network_itself_stays(self) -> None:
        rows = self.export("pruned", "pt2", extra=("--sparsity", "0.9"))
        self.assertEqual(rows["pt2"]["max_abs_difference"], 0.0)

    def test_refusals(self) -> None:
        self.refuse("--format", "pruned", "--prune-layer", "relu", text="expected one of hidden.0, hidden.1, output")
        save(self.folder / "mnist.pt", MODEL, dataset="mnist")
        draw = tb.draw_digits
        with mock.patch.object(script.tb, "draw_digits", lambda count, seed=0: draw(min(count, 600), seed)):
            self.refuse("--format", "pruned", "--fine-tune", "1", text="needs the network's training images",
                        checkpoint=self.folder / "mnist.pt")


@unittest.skipUnless(QUANTIZES and ENGINE, "this torch has no quantization of its own")
class TestInt8ByTorch(ExportCase):
    def test_dynamic(self) -> None:
        row = self.export("int8-dynamic")["int8-dynamic"]
        self.assertEqual((row["result"], row["file"]), ("ok", "model.int8-dynamic.pt"))
        self.assertTrue(0 < row["max_rel_difference"] < 0.1)  # rounded, but not far
        self.assertLess(row["size_ratio"], 0.35)

    def test_static_quantises_the_whole_network(self) -> None:
        row = self.export("int8-static")["int8-static"]
        self.assertEqual((row["result"], row["file"]), ("ok", "model.int8-static.pt"))
        self.assertLess(abs(row["accuracy_change"]), 0.01)
        self.assertLess(row["size_ratio"], 0.35)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = str(torch.jit.load(self.output / "model.int8-static.pt").inlined_graph)
        self.assertEqual(graph.count("quantized::linear"), 3)
        self.assertNotIn("aten::linear", graph)

    def test_ranges_come_from_the_calibration_images(self) -> None:
        quantize = mock.Mock(side_effect=script.quantize_fx)
        self.patch("quantize_fx", quantize)
        self.export("int8-static", extra=("--calibration", "70"))
        images, _ = tb.draw_digits(70, seed=0)
        expected = (images.float() / 255 - MEAN[0]) / STD[0]
        torch.testing.assert_close(quantize.call_args.args[0].data.calibration, expected)

    def test_a_network_without_linear_layers(self) -> None:
        (self.folder / "own_conv.py").write_text(
            "import torch\ndef net(): return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.Flatten())\n")
        with mock.patch.object(sys, "path", [str(self.folder), *sys.path]):
            code, _, err = self.run_main(
                "--model", "own_conv:net", "--input-shape", "1,2,2", "--format", "int8-dynamic")
        sys.modules.pop("own_conv", None)
        self.assertEqual((code, err), (1, "int8-dynamic: FAILED: the network has no linear layer; use int8-static\n"))


class TestExtras(ExportCase):
    """What an extra does: said when it is absent, played by a fake, and real where it is installed."""

    def test_absent_and_asked_for_by_name(self) -> None:
        for argv in (("--format", "onnx"), ("--format", "int8-static", "--quantizer", "torchao")):
            code, _, err = self.run_main(*argv)
            self.assertEqual(code, 3)
            packages = "onnx onnxscript onnxruntime" if "onnx" in argv else "torchao"
            self.assertEqual(err, f"{argv[1]}: SKIP: needs another package: pip install {packages}\n")
            self.assertFalse((self.output / "model.json").exists())

    def test_absent_and_not_asked_for(self) -> None:
        with mock.patch.dict(script.FORMATS, {"onnx": script.to_onnx, "pt2": script.to_pt2}, clear=True):
            rows = self.export("all", code=0)
        self.assertRegex(rows["onnx"]["result"], "^SKIP: .*pip install onnx")
        self.assertEqual(rows["pt2"]["result"], "ok")

    def test_a_torch_without_quantization(self) -> None:
        self.patch("installed", lambda *names: False)
        rows = self.export("int8-static", "int8-dynamic", code=3)
        for name in ("int8-static", "int8-dynamic"):
            self.assertRegex(rows[name]["result"], "^SKIP: .*pip install torchao")

    def test_onnx_by_a_fake(self) -> None:
        asked: dict[str, Any] = {}

        def fake_export(program: Any, inputs: Any, file: str, **options: Any) -> None:
            asked.update(options)
            torch.export.save(program, file + ".pt2")
            os.replace(file + ".pt2", file)

        class Session:
            def __init__(self, file: str, settings: Any, providers: list[str]) -> None:
                with open(file, "rb") as opened:
                    self.program = torch.export.load(io.BytesIO(opened.read())).module()

            def get_inputs(self) -> list[Any]:
                return [types.SimpleNamespace(name="input")]

            def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
                return [self.program(torch.from_numpy(feed["input"])).detach().numpy()]

        checker = mock.Mock()
        fakes = {"onnx": types.SimpleNamespace(checker=checker), "onnxscript": types.SimpleNamespace(),
                 "onnxruntime": types.SimpleNamespace(SessionOptions=types.SimpleNamespace, InferenceSession=Session)}
        self.pretend()
        self.patch("version", lambda name: f"{name} 1")
        with mock.patch.dict(sys.modules, fakes), mock.patch("torch.onnx.export", fake_export):
            rows = self.export()  # the default has it now
        self.assertEqual((rows["onnx"]["result"], rows["onnx"]["max_abs_difference"]), ("ok", 0.0))
        self.assertEqual((asked["dynamo"], asked["external_data"], asked["input_names"]), (True, False, ["input"]))
        checker.check_model.assert_called_once()
        self.assertEqual(self.manifest()["versions"]["onnxruntime"], "onnxruntime 1")

    def test_torchao_by_a_fake(self) -> None:
        seen: list[Tensor] = []

        def prepare(module: nn.Module, quantizer: Any) -> nn.Module:
            module.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
            return module

        def convert(module: Any) -> Any:
            module._forward_hooks.clear()
            module.register_parameter("float_weight", nn.Parameter(torch.zeros(100_000)))  # as convert_pt2e leaves them
            return module

        names = ("torchao", "torchao.quantization", "torchao.quantization.pt2e",
                 "torchao.quantization.pt2e.quantize_pt2e", "torchao.quantization.pt2e.quantizer",
                 "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        fakes = {name: mock.MagicMock() for name in names}
        fakes[names[3]].prepare_pt2e, fakes[names[3]].convert_pt2e = prepare, convert
        self.pretend()
        self.patch("version", lambda name: f"{name} 1")
        with mock.patch.dict(sys.modules, fakes):
            rows = self.export("int8-static", "int8-dynamic", extra=("--calibration", "130"))
        self.assertEqual([len(part) for part in seen], [100, 30])
        self.assertEqual(rows["int8-static"]["file"], "model.int8-static.pt2")
        self.assertLess(rows["int8-static"]["size"], 109_386 * 4 + 60_000)  # without what nothing uses
        fakes["torchao.quantization"].quantize_.assert_called_once()
        self.assertEqual(rows["int8-dynamic"]["file"], "model.int8-dynamic.pt2")


def there(extra: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in script.EXTRAS[extra])


class TestRealExtras(ExportCase):
    fresh = True

    def setUp(self) -> None:
        super().setUp()
        self.pretend()

    @unittest.skipUnless(there("onnx"), "needs onnx, onnxscript and onnxruntime: pip install 'torchbasics[onnx]'")
    def test_onnx(self) -> None:
        row = self.export("onnx")["onnx"]
        self.assertEqual((row["result"], row["agreement"]), ("ok", 1.0))
        self.assertEqual(sorted(path.name for path in self.output.iterdir()), ["model.json", "model.onnx"])

    @unittest.skipUnless(there("torchao"), "needs torchao: pip install 'torchbasics[quant]'")
    def test_torchao(self) -> None:
        rows = self.export("int8-dynamic", "int8-static")
        for name in ("int8-dynamic", "int8-static"):
            self.assertEqual(rows[name]["result"], "ok")
            self.assertGreater(rows[name]["max_abs_difference"], 0)
            self.assertLess(rows[name]["size_ratio"], 0.6)


class TestSources(ExportCase):
    def test_a_plain_state_dict_with_its_model_named(self) -> None:
        torch.save(MODEL.state_dict(), self.folder / "plain.pt")
        self.refuse("--format", "pt2", text=r"its record plain.pt.json is missing.*--model NAME",
                    checkpoint=self.folder / "plain.pt")
        code, _, err = self.run_main("--model", "simplenet", "--format", "pt2", checkpoint=self.folder / "plain.pt")
        self.assertEqual((code, err), (0, ""))
        manifest = self.manifest()
        self.assertEqual((manifest["dataset"], manifest["normalisation"]),
                         ("mnist", {"mean": [0.1307], "std": [0.3081]}))
        self.assertIsNone(manifest["artifacts"][0]["accuracy"])  # drawn digits are not its test set

    def test_damaged_and_hostile_files_are_refused_in_one_line(self) -> None:
        class Command:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(marker),)

        marker, names = self.folder / "ran", {"cut.pt": "damaged", "flipped.pt": "SHA-256", "missing.pt": "no such"}
        content = bytearray((HOME / "best.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (self.folder / "cut.pt").write_bytes(content[:1000])
        (self.folder / "flipped.pt").write_bytes(content)
        for name in ("cut.pt", "flipped.pt"):
            shutil.copy(HOME / "best.pt.json", self.folder / f"{name}.json")
        torch.save({"model_state_dict": Command()}, self.folder / "pickle.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), self.folder / "script.pt")
        for name, text in names.items():
            self.refuse(text=text, checkpoint=self.folder / name)
        for name in ("pickle.pt", "script.pt"):
            self.refuse(text="its record", checkpoint=self.folder / name)
            self.refuse("--model", "simplenet", text="no state_dict", checkpoint=self.folder / name)
        self.assertFalse(marker.exists())

    def test_another_models_weights(self) -> None:
        self.refuse("--model", "cnn", text="of another model: .* is missing", checkpoint=HOME / "best.pt")

    def test_metadata_that_cannot_be_right(self) -> None:
        for name, value in {"image_size": 10**6, "std": (0.0,), "mean": (0.1, 0.2), "model": "resnet"}.items():
            save(self.folder / "odd.pt", MODEL, **{name: value})
            self.refuse(text="metadata", checkpoint=self.folder / "odd.pt")

    def test_a_model_of_ones_own(self) -> None:
        (self.folder / "own_export_net.py").write_text(OWN)
        self.addCleanup(sys.modules.pop, "own_export_net", None)
        with mock.patch.object(sys, "path", [str(self.folder), *sys.path]):
            argv = ("--model", "own_export_net:Net", "--input-shape", "3,2,2", "--format", "pt2")
            code, out, err = self.run_main(*argv)
            self.assertEqual((code, err), (0, ""))
            manifest, net = self.manifest(), sys.modules["own_export_net"].Net()
            shutil.rmtree(self.output)
            for name, text in {"own_export_net:Other": "no attribute", "no_such_module:f": "No module named",
                               "own_export_net:not_a_module": "returned a int"}.items():
                self.refuse("--model", name, text=text)
            self.refuse("--model", "own_export_net:Net", text="takes no input of shape .*give --input-shape")
        self.assertEqual((manifest["model"], manifest["dataset"], manifest["classes"], manifest["input"]["shape"]),
                         ("own_export_net:Net", None, list("0123"), ["batch", 3, 2, 2]))
        self.assertIn("1,024 inputs of noise", out)
        self.assertEqual(net.layer.weight.shape, (4, 12))

    def test_bad_arguments(self) -> None:
        for argv, text in {("--batch", "0"): "--batch", ("--format", "gguf"): "invalid choice",
                           ("--sparsity", "1.5"): "--sparsity", ("--input-shape", "1,x"): "--input-shape",
                           ("--verify-data", str(self.folder), "--model", "simplenet"): "is missing"}.items():
            save(self.folder / "mnist.pt", MODEL, dataset="mnist")
            self.refuse(*argv, text=text, checkpoint=self.folder / "mnist.pt")
        self.refuse("--model", "simplenet", text="give --checkpoint FILE")
        self.refuse("--model", "resnet", text="expected mnistnet", checkpoint=HOME / "best.pt")
        self.output.write_text("a file")
        code, _, err = self.run_main("--format", "pt2")
        self.assertEqual(code, 2)
        self.assertIn("is not a folder", err)

    def test_the_networks_own_data(self) -> None:
        save(self.folder / "mnist.pt", MODEL, dataset="mnist")
        inputs, targets = test_inputs(120)

        def loaders(name: str, folder: str, batch_size: int, **options: Any) -> Loaders:
            self.assertEqual((name, folder, options["augment"]), ("mnist", "somewhere", False))
            facts = {"classes": classes, "in_channels": 1}
            return Loaders([(inputs[:32], targets[:32])] * 3, held_out, test, facts, "")

        self.patch("make_loaders", loaders)
        self.patch("missing_files", lambda *_: [])
        test: list[Any] = [(inputs, targets)]
        classes, held_out = tuple("0123456789"), [test[0]]
        named = ("--format", "pt2", "--verify-data", "somewhere")
        code, out, err = self.run_main(*named, "--json", checkpoint=self.folder / "mnist.pt")
        self.assertEqual((code, err), (0, ""))
        result = json.loads(out)
        self.assertEqual((result["inputs"], result["data"]), (120, "mnist test images"))
        self.assertEqual(result["rows"][1]["accuracy"], int((MODEL(inputs).argmax(1) == targets).sum()) / 120)
        shutil.rmtree(self.output)
        held_out = test  # as of a folder without test/: the network may have been trained on these
        code, out, err = self.run_main(*named, "--json", checkpoint=self.folder / "mnist.pt")
        self.assertEqual((code, err), (0, ""))
        result = json.loads(out)
        self.assertEqual(result["data"], "mnist images; there is no test/ folder to judge on")
        self.assertEqual([row["accuracy"] for row in result["rows"]], [None, None])
        shutil.rmtree(self.output)
        classes = tuple("abc")
        self.refuse(*named, text="has other classes", checkpoint=self.folder / "mnist.pt")


if __name__ == "__main__":
    unittest.main()

"""scripts/export.py: every file computes what the model computes, or is not kept; the lines that it prints run."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import types
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import torchbasics as tb
from tests.common import load_script, run_main
from torchbasics import cli

script = load_script("export")
MEAN, STD = (0.15,), (0.3,)
HOME: Path  # holds best.pt, a checkpoint of MODEL
MODEL: nn.Module
INPUTS: Tensor  # (300, 1, 28, 28), what the script compares on
TARGETS: Tensor
ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
BUSY = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
QUANTIZES = torch.backends.quantized.engine != "none" and importlib.util.find_spec("torch.ao.quantization") is not None


def setUpModule() -> None:
    """Train a small model on drawn digits in about a second, and save it."""
    global HOME, MODEL, INPUTS, TARGETS
    torch.set_num_threads(1)
    HOME = Path(tempfile.mkdtemp())
    unittest.addModuleCleanup(shutil.rmtree, HOME)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODEL = tb.make_model({"model": "simplenet"})
    loader = tb.TensorLoader(*tb.draw_digits(2000, seed=3), 50, shuffle=True, mean=MEAN, std=STD)
    optimizer = torch.optim.Adam(MODEL.parameters(), lr=3e-3)
    for _ in range(6):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(MODEL(inputs), targets).backward()
            optimizer.step()
    MODEL.eval().requires_grad_(False)
    save(HOME / "best.pt")
    drawn, TARGETS = tb.draw_digits(300, seed=1)
    INPUTS = (drawn / 255 - MEAN[0]) / STD[0]
    for name, value in {"DRAWN": 300, "CALIBRATION": 100}.items():
        patch = mock.patch.object(script, name, value)
        patch.start()
        unittest.addModuleCleanup(patch.stop)


def save(path: Path, **changes: Any) -> None:
    metadata = {"model": "simplenet", "dropout": 0.2, "dataset": "digits", "classes": tuple("0123456789"),
                "num_classes": 10, "in_channels": 1, "image_size": 28, "mean": MEAN, "std": STD}  # fmt: skip
    tb.save_checkpoint({"model_state_dict": MODEL.state_dict(), "metadata": metadata | changes}, path)


def run_here(lines: list[str], batches: list[Tensor], folder: Path) -> tuple[list[Tensor], float]:
    """Run the four lines as `run_fresh` does, without the seconds of a new process."""
    variables: dict[str, Any] = {}
    outputs = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec("\n".join(lines[:2]), variables)
        for batch in batches:
            variables["inputs"] = batch.numpy() if "onnxruntime" in variables else batch
            exec(lines[3], variables)
            outputs.append(torch.as_tensor(variables["outputs"]))
    return outputs, 0.001


def changing(change: Callable[[list[Tensor]], object]) -> Any:
    """Return a `run_fresh` whose outputs are changed."""

    def run(lines: list[str], batches: list[Tensor], folder: Path) -> tuple[list[Tensor], float]:
        outputs, call_time = run_here(lines, batches, folder)
        change(outputs)
        return outputs, call_time

    return run


class Embedded(nn.Module):
    """A model of token numbers (B, T); the smaller of its two tables decides which numbers are valid."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.output = nn.Embedding(50, 8), nn.Embedding(16, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output((self.tokens(tokens) + self.places(tokens)).mean(1))


class Branching(nn.Module):
    """A model whose branch depends on the values of its inputs (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x) * 2


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


class ExportCase(unittest.TestCase):
    """Runs main() into a folder of its own; the files run in this process unless `fresh`."""

    fresh = False

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.output = self.folder / "out"
        own: Any = types.ModuleType("own_export_models")
        own.Embedded, own.encoder, own.three = Embedded, encoder, lambda: 3
        own.conv = lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten())
        own.tiny = lambda: nn.Linear(4, 3)
        own.Branching = Branching
        own.pair = lambda: nn.LSTM(4, 3, batch_first=True)
        sys.modules[own.__name__] = own  # patch.dict would also take out what torch imports meanwhile
        self.addCleanup(sys.modules.pop, own.__name__)
        self.patch(mock.patch.object(sys, "path", [*sys.path]))
        if not self.fresh:
            self.patch(mock.patch.object(script, "run_fresh", run_here))

    def patch(self, patch: Any) -> None:
        patch.start()
        self.addCleanup(patch.stop)

    def main(self, *argv: Any) -> tuple[int, str, str]:
        source = () if {"--model", "--checkpoint"} & set(argv) else ("--checkpoint", HOME / "best.pt")
        arguments = [*source, "--output", self.output, *argv]
        return run_main(functools.partial(cli.run, script.main), *map(str, arguments))

    def export(self, *argv: Any) -> tuple[dict[str, list[str]], str]:
        """Return the cells of each row by format, and all that was printed."""
        code, out, err = self.main(*argv)
        self.assertEqual((code, err), (0, ""))
        rows = re.findall(r"(?m)^([\w-]+) +(\d+\.\d\d .*)$", out)
        return {name: [name, *cells.split()] for name, cells in rows}, out

    def fails(self, *argv: Any, code: int = 1) -> tuple[str, str]:
        """Return stdout and the one line on stderr."""
        found, out, err = self.main(*argv)
        self.assertEqual(found, code, err)
        self.assertRegex(err, r"\Aerror: [^\n]{10,620}\n\Z")
        return out, err

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.output.iterdir())


class FreshProcess(ExportCase):
    fresh = True

    def test_a_file_runs_without_the_package_and_one_that_needs_the_class_is_not_kept(self) -> None:
        decoy = self.folder / "decoy" / "torchbasics"
        decoy.mkdir(parents=True)
        (decoy / "__init__.py").write_text("raise RuntimeError('imported')")
        pickled = script.Format("model.pt", lambda job, file: torch.save(job.model, file))
        environment = mock.patch.dict(os.environ, {"PYTHONPATH": str(decoy.parent)})
        with environment, mock.patch.dict(script.FORMATS, torchscript=pickled):
            out, err = self.fails("--format", "pt2", "torchscript")
        self.assertRegex(out, r"(?m)^pt2 .* 100.00% ")
        self.assertRegex(err, "torchscript: does not run in a fresh process")
        self.assertEqual(self.kept(), ["model.pt2"])

    @unittest.skipUnless(shutil.which(os.environ.get("CXX", "g++")), "needs a C++ compiler")
    @unittest.skipIf(BUSY, "compiling would take minutes on a machine as busy as this")
    def test_machine_code_of_a_tiny_model(self) -> None:
        # What these switch off compiles for longer than the model: headers, optimisation.
        faster = torch._inductor.config.patch({
            "aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"})  # fmt: skip
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(self.folder / "cache")), faster:
            argv = ("--model", "own_export_models:tiny", "--input-shape", "4", "--format", "aoti")
            code, out, err = self.main(*argv)  # torch may warn of an absent GPU
        self.assertEqual(code, 0, err)
        self.assertRegex(out, r"(?m)^aoti .* 100.00% ")
        self.assertEqual(self.kept(), ["model.aoti.pt2"])


class Lines(ExportCase):
    def test_the_four_lines_printed_run_and_give_what_the_model_gives_at_other_batch_sizes(self) -> None:
        formats = ["pt2", "torchscript", "pruned"] + (["int8-dynamic", "int8-static"] if QUANTIZES else [])
        _, out = self.export("--format", *formats)
        texts = re.findall(r"\n# ([\w-]+).*\n(.*\n.*\n.*\n.*)", out)
        self.assertEqual([name for name, _ in texts], formats)
        expected = MODEL(INPUTS[:5])
        for name, text in texts:
            variables: dict[str, Any] = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is deprecated
                exec(text, variables)
            self.assertEqual(variables["outputs"].shape, (1, 10))
            limit = 1e-5 if name in ("pt2", "torchscript") else 0.2
            found = variables["model"](INPUTS[:5])
            torch.testing.assert_close(found, expected, rtol=0, atol=limit * float(expected.abs().max()))

    @unittest.skipUnless(ONNX, "needs onnx, onnxscript and onnxruntime: pip install 'torchbasics[onnx]'")
    def test_onnx_has_an_axis_named_batch_and_no_second_file(self) -> None:
        import onnx

        rows, out = self.export("--format", "onnx")
        self.assertEqual((rows["onnx"][3], self.kept()), ("100.00%", ["model.onnx"]))
        graph = onnx.load(self.output / "model.onnx").graph
        for value in (*graph.input, *graph.output):
            self.assertEqual(value.type.tensor_type.shape.dim[0].dim_param, "batch")
        exec(out[out.index("\n# onnx") :], {})


class Comparison(ExportCase):
    """A file that computes something else is found out and not kept."""

    def test_one_wrong_weight_is_noticed_and_the_other_formats_go_on(self) -> None:
        def broken(job: Any, file: Path) -> None:
            other = copy.deepcopy(job.model)
            other.output.weight[3, 5] += 0.05
            script.to_torchscript(job, file, other)

        with mock.patch.dict(script.FORMATS, onnx=script.Format("broken.pt", broken)):
            _, err = self.fails("--format", "onnx", "torchscript")
        self.assertRegex(err, r"onnx: differs from the model by .* of the largest output.*not kept")
        self.assertEqual(self.kept(), ["model.torchscript.pt"])

    def test_a_difference_at_one_batch_size_is_enough(self) -> None:
        # batches of 1, 7 and 64 images
        for number, factor in (0, 1.001), (1, 1.001), (2, 1.001), (1, math.nan):
            changed = changing(lambda parts, number=number, factor=factor: parts[number].mul_(factor))
            with mock.patch.object(script, "run_fresh", changed):
                self.assertIn("differs", self.fails("--format", "torchscript")[1])

    def test_an_export_of_one_batch_size_only_is_noticed(self) -> None:
        with mock.patch.object(script, "export_program", lambda model, example: torch.export.export(model, (example,))):
            self.fails("--format", "pt2")
        self.assertEqual(self.kept(), [])

    @unittest.skipUnless(QUANTIZES, "this torch has no quantization")
    def test_int8_may_round_but_not_give_other_classes(self) -> None:
        with mock.patch.object(script, "run_fresh", changing(lambda parts: [part.mul_(0.9) for part in parts])):
            self.export("--format", "int8-dynamic")
        (self.output / "model.int8-dynamic.pt").unlink()
        swapped = changing(lambda parts: [swap_near_classes(part) for part in parts])
        with mock.patch.object(script, "run_fresh", swapped):
            _, err = self.fails("--format", "int8-dynamic")
        difference, same = re.findall(r"by (0\.\d+) of .* to (\d+\.\d\d)%; not kept", err)[0]
        self.assertLess(float(difference), script.ROUGH)
        self.assertLess(float(same), 98)

    def test_differences_by_hand(self) -> None:
        expected, outputs = torch.tensor([[4.0, -8.0], [1.0, 0.5]]), torch.tensor([[4.0, -9.0], [1.0, 1.5]])
        self.assertEqual(script.compare(outputs, expected), (0.125, 0.5))
        self.assertEqual(script.compare(outputs[:, :1], expected[:, :1]), (0.0, None))  # one output is no class
        self.assertTrue(math.isnan(script.compare(outputs[:1], expected)[0]))


def swap_near_classes(logits: Tensor) -> None:
    """Swap the two best logits (B, C) of each image where they differ by less than 3."""
    values, indices = logits.topk(2)
    near = (values[:, 0] - values[:, 1] < 3)[:, None]
    logits.scatter_(1, indices, torch.where(near, values.flip(1), values))


class Formats(ExportCase):
    def weights(self) -> dict[str, Tensor]:
        return dict(torch.export.load(self.output / "model.pruned.pt2").state_dict)

    def test_pruning_sets_the_smallest_weights_of_all_layers_to_zero_and_changes_nothing_else(self) -> None:
        rows, out = self.export("--format", "pruned", "pt2", "--sparsity", "0.4")
        state, pruned = MODEL.state_dict(), self.weights()
        self.assertEqual(pruned.keys(), state.keys())
        every = torch.cat([value.flatten() for name, value in state.items() if name.endswith("weight")]).abs()
        limit = every.sort().values[round(0.4 * len(every)) - 1]
        for name, value in state.items():
            kept = value if name.endswith("bias") else torch.where(value.abs() > limit, value, 0.0)
            torch.testing.assert_close(pruned[name], kept, rtol=0, atol=0)
        logits = torch.export.load(self.output / "model.pruned.pt2").module()(INPUTS)
        self.assertEqual(rows["pruned"][4], f"{int((logits.argmax(1) == TARGETS).sum()) / 300:.2%}")
        self.assertEqual((rows["pruned"][1], rows["pt2"][2]), (rows["pt2"][1], "0.0e+00"))  # as large; not shared
        self.assertIn("\n# pruned: 40% zeros", out)

    def test_one_layer_is_pruned_by_name(self) -> None:
        self.export("--format", "pruned", "--prune-layer", "hidden.0", "--sparsity", "0.5")
        zeros = {name: float((value == 0).double().mean()) for name, value in self.weights().items()}
        self.assertAlmostEqual(zeros.pop("hidden.0.weight"), 0.5, places=4)
        self.assertEqual(set(zeros.values()), {0.0})
        (self.output / "model.pruned.pt2").unlink()
        _, err = self.fails("--format", "pruned", "--prune-layer", "relu")
        self.assertIn("expected one of hidden.0, hidden.1, output", err)

    @unittest.skipUnless(QUANTIZES, "this torch has no quantization")
    def test_int8_is_small_and_static_int8_has_no_float_layer(self) -> None:
        self.export("--format", "int8-dynamic", "int8-static")
        for name in self.kept():
            self.assertLess((self.output / name).stat().st_size, 0.35 * 4 * 109_386)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = str(torch.jit.load(self.output / "model.int8-static.pt").inlined_graph)
        self.assertEqual(graph.count("quantized::linear"), 3)
        self.assertNotIn("aten::linear", graph)

    @unittest.skipUnless(QUANTIZES, "this torch has no quantization")
    def test_a_format_that_torch_cannot_make_ends_in_one_line_and_the_others_go_on(self) -> None:
        argv = ("--model", "own_export_models:encoder", "--input-shape", "5,8")
        _, err = self.fails(*argv, "--format", "int8-dynamic", "torchscript")
        self.assertRegex(err, r"error: int8-dynamic: torch cannot make it of this model \(.+\)")
        self.assertEqual(self.kept(), ["model.torchscript.pt"])
        _, err = self.fails("--model", "own_export_models:conv", "--input-shape", "1,2,2", "--format", "int8-dynamic")
        self.assertEqual(err, "error: int8-dynamic: the model has no linear layer; use int8-static\n")

    def test_a_branch_that_depends_on_the_inputs_is_one_line_for_each_format(self) -> None:
        argv = ("--model", "own_export_models:Branching", "--input-shape", "4", "--format", "pt2", "torchscript")
        with self.assertNoLogs("torch.fx.experimental.symbolic_shapes", "WARNING"):
            code, _, err = self.main(*argv)
        self.assertEqual((code, self.kept()), (1, []))
        lines = err.splitlines()
        self.assertEqual(len(lines), 2, err)
        self.assertRegex(lines[0], r"^error: pt2: torch cannot make it of this model \(which branch .* torch.cond\)$")
        self.assertRegex(lines[1], r"^error: torchscript: differs from the model .*; not kept$")  # it kept one branch

    def test_models_of_token_numbers(self) -> None:
        argv = ("--model", "own_export_models:Embedded", "--input-shape", "6", "--format", "torchscript")
        _, out = self.export(*argv, "--input-dtype", "int64")
        self.assertIn("inputs = torch.zeros([1, 6], dtype=torch.int64)\n", out)
        self.assertRegex(out, r"(?m)^torchscript .* 100.00% ")
        (self.output / "model.torchscript.pt").unlink()
        _, err = self.fails(*argv, code=2)
        self.assertRegex(err, r"does not take float32 inputs of shape \(batch, 6\): .*--input-shape and --input-dtype")

    def test_a_missing_package_is_named_and_the_other_formats_go_on(self) -> None:
        with mock.patch.object(importlib.util, "find_spec", lambda name: None):
            _, err = self.fails("--format", "onnx", "torchscript", code=3)
        self.assertEqual(err, "error: onnx: needs other packages: pip install 'torchbasics[onnx]'\n")
        self.assertEqual(self.kept(), ["model.torchscript.pt"])


class Sources(ExportCase):
    def test_the_test_images_of_the_models_data_set_are_compared_on_and_training_images_calibrate(self) -> None:
        raw = self.folder / "data" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        parts = {"t10k": tb.draw_digits(120, seed=8), "train": tb.draw_digits(150, seed=9)}
        for name, (images, labels) in parts.items():
            header = struct.pack(">4I", 0x803, len(images), 28, 28)
            (raw / f"{name}-images-idx3-ubyte").write_bytes(header + bytes(images.flatten().tolist()))
            header = struct.pack(">2I", 0x801, len(images))
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(labels.tolist()))
        save(self.folder / "fashion.pt", dataset="fashion-mnist")
        argv = ("--checkpoint", self.folder / "fashion.pt", "--format", "torchscript")
        with mock.patch.object(script, "make_job", mock.Mock(side_effect=script.make_job)) as make:
            rows, out = self.export(*argv, "--data-dir", self.folder / "data")
            found = script.make_job(*make.call_args.args)
        self.assertIn("compared on 120 fashion-mnist test images", out)
        (images, labels), (some, _) = parts["t10k"], parts["train"]
        accuracy = float((MODEL((images / 255 - MEAN[0]) / STD[0]).argmax(1) == labels).double().mean())
        self.assertEqual(rows["torchscript"][4], f"{accuracy:.2%}")
        torch.testing.assert_close(found.calibration, (some[:100] / 255 - MEAN[0]) / STD[0])
        (self.output / "model.torchscript.pt").unlink()
        rows, _ = self.export(*argv)  # drawn digits have no accuracy in fashion
        self.assertEqual(rows["torchscript"][4], "-")
        (self.output / "model.torchscript.pt").unlink()
        self.fails(*argv, "--data-dir", self.folder, code=2)

    def test_it_says_how_to_prepare_an_image_and_which_classes_come_out(self) -> None:
        _, out = self.export("--format", "torchscript")
        self.assertRegex(out, r"\ninputs are \(pixels / 255 - mean\) / std, with mean \(0.15,\) and std \(0.3,\)\n")
        self.assertIn("\noutputs are scores of 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n", out)
        (self.output / "model.torchscript.pt").unlink()
        path, names = self.folder / "folder.pt", ("a\x1b", *"bcdefghijk")
        save(path, resize=32, interpolation="bilinear", classes=names)
        _, out = self.export("--checkpoint", path, "--format", "torchscript")
        self.assertIn("; first resize the shorter side to 32 (bilinear), then crop the middle 28×28\n", out)
        self.assertIn("\noutputs are scores of 11 classes: a\\x1b, b, c, d, e, f, g, h, i, j, …\n", out)

    @unittest.skipUnless(QUANTIZES, "this torch has no quantization")
    def test_int8_static_says_on_what_it_was_calibrated(self) -> None:
        _, out = self.export("--format", "int8-static")
        self.assertIn("\n# int8-static: by torch.ao, as TorchScript, calibrated on drawn digits\n", out)
        (self.output / "model.int8-static.pt").unlink()
        _, out = self.export("--model", "own_export_models:tiny", "--input-shape", "4", "--format", "int8-static")
        self.assertIn("calibrated on noise\n", out)

    def test_our_models_need_no_torchvision(self) -> None:
        self.patch(mock.patch.dict(sys.modules, {name: None for name in sys.modules if name.startswith("torchvision")},
                                   torchvision=None))  # fmt: skip
        broken = load_script("export")
        argv = ["--checkpoint", str(HOME / "best.pt"), "--output", str(self.output), "--format", "torchscript"]
        with mock.patch.object(broken, "run_fresh", run_here):
            self.assertEqual(run_main(broken.main, *argv)[0], 0)

    def test_a_reader_that_has_gone_is_no_failed_format(self) -> None:
        with mock.patch.object(script, "export_one", side_effect=BrokenPipeError), self.assertRaises(BrokenPipeError):
            script.main(["--checkpoint", str(HOME / "best.pt"), "--output", "gone"])

    def test_a_file_that_exists_is_not_overwritten(self) -> None:
        self.output.mkdir()
        (self.output / "model.pt2").write_text("mine")
        _, err = self.fails("--format", "torchscript", "pt2", code=2)
        self.assertIn("model.pt2 exists", err)
        self.assertEqual((self.kept(), (self.output / "model.pt2").read_text()), (["model.pt2"], "mine"))

    def test_checkpoints_without_our_metadata_and_bad_models_end_in_one_line(self) -> None:
        tb.save_checkpoint({"model_state_dict": MODEL.state_dict()}, self.folder / "own.pt")
        own = ("--checkpoint", self.folder / "own.pt")
        for argv, text in {
            own: "its metadata has no model; train with Trainer(metadata={'model': …}), or give --model",
            (*own, "--model", "simplenet"): "give --input-shape",
            (*own, "--model", "mlp", "--input-shape", "1,28,28"): "weights are not those of mlp",
            ("--model", "own_export_models:other", "--input-shape", "4"): "no attribute 'other'",
            ("--model", "own_export_models:three", "--input-shape", "4"): "gave a int",
            ("--model", "own_export_models:pair", "--input-shape", "5,4"): "returns a tuple",
            ("--model", "simplenet"): "give --checkpoint",
            ("--format", "pt2", "--sparsity", "0.5"): "--sparsity and --prune-layer are for --format pruned",
            ("--input-dtype", "int64"): "--input-dtype int64: the images that this model is compared on are float32",
            ("--checkpoint", self.folder / "absent.pt"): "absent.pt",
            ("--format", "gguf"): "gguf",
        }.items():
            self.assertIn(text, self.fails(*argv, code=2)[1])
        rows, _ = self.export(*own, "--model", "simplenet", "--input-shape", "1,28,28", "--format", "torchscript")
        self.assertEqual(rows["model"][:3], ["model", "0.44", "-"])  # 109,386 numbers of 4 bytes

    def test_help_fits_on_two_screens(self) -> None:
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}), contextlib.suppress(SystemExit):
            _, out, _ = self.main("--help")
        self.assertLess(10, len(out.splitlines()))
        self.assertLessEqual(len(out.splitlines()), 100)


if __name__ == "__main__":
    unittest.main()

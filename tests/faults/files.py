"""Hostile checkpoints, damaged data, NaN, a server that lies, strange names: rows 8, 13 to 15, 17 and 18."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchbasics as tb
from tests.faults.runs import (
    ROOT,
    SMALL,
    Row,
    Shared,
    kill_at,
    one_error,
    remove,
    start,
    training,
)
from tests.faults.saves import forge_bytes
from tests.scripts import load_script
from tests.test_mnist import idx, images_file, labels_file, write_set
from tests.test_train_mnist import write_images
from torchbasics import mnist
from torchbasics.data import SeededImageFolder, load_images

MEGABYTE = 1 << 20


def measured(work: Callable[[], Any]) -> Any:
    """For a child: does `work`, prints its error as JSON, and by how many bytes memory grew at its peak."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 3000 * MEGABYTE,) * 2)  # so a bomb hits this process
        Path("/proc/self/clear_refs").write_text("5")
        before, kind, text = status("VmRSS"), "", ""
        try:
            work()
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        print(json.dumps({"kind": kind, "text": text, "grown": status("VmHWM") - before}))

    return run


def one_line_of(text: str, *words: str) -> list[str]:
    """Problems unless `text` is one line of printable characters with all `words` in it."""
    problems = [] if text.isprintable() else [f"not one printable line: {text!r}"]
    return problems + [f"{word!r} is not in {text[:300]!r}" for word in words if word not in text]


# -------------------------------------------------------------------------------------------------------------- row 8


def plain_state(**more: Any) -> dict[str, Any]:
    """A checkpoint like any other."""
    weights = {"weight": torch.zeros(280, 250)}
    return {"format": 1, "epoch": 1, "loss": 0.5, "model_state_dict": weights, "optimizer_state_dict": {}, **more}


def saved(value: Any, **options: Any) -> bytes:
    box = io.BytesIO()
    torch.save(value, box, **options)
    return box.getvalue()


class Reduced:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def rewritten(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file with its members changed, and perhaps compressed."""
    box = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(box, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return box.getvalue()


def zip_bomb(numbers: int, real: bool, compression: int = zipfile.ZIP_DEFLATED, sizes: int = 9) -> bytes:
    """A tensor of so many float32, all zero, packed as small as it goes; or, if not `real`, just said to be there.

    `sizes`: how many of the places that say so are changed, from the end.
    """

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("data.pkl"):
            parts = content.split(b"J" + struct.pack("<i", 70_000))
            kept = b"J" + struct.pack("<i", 70_000)
            first = max(len(parts) - sizes, 1)
            return (b"J" + struct.pack("<i", numbers)).join([kept.join(parts[:first]), *parts[first:]])
        return bytes(4 * numbers) if real and "/data/" in name else content

    return rewritten(saved(plain_state(model_state_dict={"weight": torch.zeros(70_000)})), change, compression)


def duplicated(command: Any) -> bytes:
    """A zip file with two pickles: a good one, then one that runs a command."""
    good, bad = saved(plain_state()), saved(plain_state(extra=command))
    with zipfile.ZipFile(io.BytesIO(bad)) as other:
        pickled = other.read(next(name for name in other.namelist() if name.endswith("data.pkl")))
    box = io.BytesIO(good)
    with warnings.catch_warnings(), zipfile.ZipFile(box, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data.pkl")), pickled)
    return box.getvalue()


def duplicated_data() -> bytes:
    """A zip file with two contents for one tensor: which is meant?"""
    box = io.BytesIO(saved(plain_state()))
    with warnings.catch_warnings(), zipfile.ZipFile(box, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(next(name for name in archive.namelist() if "/data/" in name), bytes(280_000))
    return box.getvalue()


def tar_file(command: Any) -> bytes:
    """The format of torch before 0.1.10."""
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(command, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return box.getvalue()


def torchscript() -> bytes:
    """A program, not weights."""
    box = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), box)
    return box.getvalue()


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(280, 250), 0.1, 0, torch.qint8)


def hostile_files(sentinel: Path) -> dict[str, Callable[[], bytes]]:
    """Name → what makes the file's content."""
    command = Reduced(os.system, f"touch {sentinel}")
    call = Reduced(Path.touch, sentinel)
    indices = torch.tensor([[0, 10**12]])

    def weight(tensor: Tensor) -> bytes:
        return saved(plain_state(model_state_dict={"weight": tensor}))

    return {
        "a command": lambda: saved(plain_state(extra=command)),
        "a command alone": lambda: saved(command),
        "a call": lambda: saved(plain_state(model_state_dict=call)),
        "a command, legacy format": lambda: saved(plain_state(extra=command), _use_new_zipfile_serialization=False),
        "a plain pickle with a command": lambda: pickle.dumps(command, protocol=2),
        "tar format": lambda: tar_file(command),
        "TorchScript": torchscript,
        "zip bomb": lambda: zip_bomb(1 << 28, True),
        "zip bomb, LZMA": lambda: zip_bomb(1 << 25, True, zipfile.ZIP_LZMA),
        "more numbers than there are": lambda: zip_bomb(1 << 28, False, zipfile.ZIP_STORED),
        "a tensor larger than its storage": lambda: zip_bomb(1 << 28, False, zipfile.ZIP_STORED, sizes=1),
        "duplicate entries": lambda: duplicated(command),
        "duplicate tensor data": duplicated_data,
        "quantized": lambda: weight(quantized()),
        "sparse": lambda: weight(torch.eye(250).to_sparse()),
        "sparse CSR": lambda: weight(torch.eye(250).to_sparse_csr()),
        "sparse with wild indices": lambda: weight(
            torch.sparse_coo_tensor(indices, torch.ones(2), (10**13,), check_invariants=False)
        ),
        "a huge bytearray": lambda: saved(plain_state(extra=Reduced(bytearray, 2_000_000_000))),
        "an expanded tensor": lambda: weight(torch.zeros(1).expand(1 << 31)),
        "meta tensors": lambda: weight(torch.empty(10**12, device="meta")),
    }


def hostile(row: Row) -> None:
    """Row 8: refused, no command runs, memory stays below twice the file and 300 MB."""
    sentinel = row.new("owned")
    names = list(hostile_files(sentinel))
    quick = ("a command", "TorchScript", "zip bomb", "duplicate entries", "sparse", "a huge bytearray")
    for name in names if not row.quick else [name for name in names if name in quick]:
        path = row.new("hostile") / "best.pt"
        path.parent.mkdir()
        maker = start(lambda n=name, p=path: forge_bytes(p, hostile_files(sentinel)[n]()), row.new("maker"))
        if maker.wait():
            row.case(name, f"could not be made: {maker.err[-300:]}")
            continue
        problems = load_refused(row, path, lambda p=path: into_a_model(p))
        row.case(name, problems, ["its command was run"] * sentinel.exists())
        shutil.rmtree(path.parent)
    outside, inside = row.new("outside"), row.new("inside")
    outside.mkdir(), inside.mkdir()
    forge_bytes(outside / "best.pt", saved(plain_state()))
    shutil.copy(outside / "best.pt.json", inside)
    (inside / "best.pt").symlink_to(outside / "best.pt")
    row.case("a symbolic link out of the directory", load_refused(row, inside / "best.pt", None))
    if row.quick:
        return
    hostile_to_scripts(row, sentinel)


def into_a_model(path: Path) -> None:
    """As a script does: load, then put the weights into the model."""
    state = tb.load_checkpoint(path)["model_state_dict"]
    tb.load_weights(nn.Linear(250, 280, bias=False), state, str(path))


def load_refused(row: Row, path: Path, work: Callable[[], Any] | None) -> list[str]:
    """Problems unless loading raises a CheckpointError in one line, within its memory."""
    child = start(measured(work or (lambda: tb.load_checkpoint(path))), row.new("loads"))
    if child.wait(60):
        return [f"exit code {child.code}: {child.err[-300:]!r}"]
    found = json.loads(child.out)
    problems = [] if found["kind"] == "CheckpointError" else [f"not refused: {found['kind']}: {found['text'][:200]}"]
    problems += one_line_of(found["text"], str(path)) if found["kind"] else []
    if found["grown"] > 2 * path.stat().st_size + 300 * MEGABYTE:
        problems.append(f"took {found['grown'] / MEGABYTE:,.0f} MB for a file of {path.stat().st_size:,} bytes")
    return problems


def hostile_to_scripts(row: Row, sentinel: Path) -> None:
    """The same through the scripts that load files."""
    content = hostile_files(sentinel)["a command"]()
    run = row.new()
    start(training(*SMALL, "--output", run, hook=kill_at(9)), run).wait()
    for _, path in tb.CheckpointFolder(run / "checkpoints").steps():
        forge_bytes(path, content)
    child = start(training("--resume", run), run)
    child.wait()
    row.case("--resume", one_error(child, "more than tensors", codes=(2,)), ["a command was run"] * sentinel.exists())
    predict = ROOT / "scripts" / "predict.py"
    if not predict.exists():
        return row.skip("no scripts/predict.py")
    script = load_script("predict")
    write_images(row.folder / "digits", 2)
    image = next((row.folder / "digits").rglob("*.png"))
    plain = row.new("weights.pt")
    plain.write_bytes(content)
    for name, options in {
        "predict, with a record": ("--checkpoint", path),
        "predict, without": ("--checkpoint", plain, "--model", "mlp"),
    }.items():
        child = start(training(*options, image, script=script), row.new("predict"))
        child.wait()
        row.case(name, one_error(child, codes=(1, 2)), ["a command was run"] * sentinel.exists())


# ------------------------------------------------------------------------------------------------------------- row 13

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def damaged_idx() -> dict[str, tuple[str, bytes, str]]:
    """Name → file, content, and the word that names the field."""
    images, labels, zipped = images_file(12), labels_file(12), gzip.compress(images_file(12), mtime=0)
    middle = bytearray(zipped)
    middle[len(middle) // 2] ^= 1
    cases = {f"images cut to {n}": (IMAGES, images[:n], "bytes") for n in (0, 1, 3, 4, 7, 15, 16, 17, 783, 9000, 9423)}
    cases |= {f"labels cut to {n}": (LABELS, labels[:n], "bytes") for n in (0, 1, 3, 4, 7, 8, 19)}
    cases |= {
        "header larger than the file": (IMAGES, idx(0x0803, (60_000, 28, 28), images[16:]), "its header says"),
        "labels' header larger": (LABELS, idx(0x0801, (60_000,), labels[8:]), "its header says"),
        "overflowing dimensions": (IMAGES, idx(0x0803, (2**32 - 1,) * 3, images[16:]), "sizes"),
        "product 0 modulo 2^64": (IMAGES, idx(0x0803, (2**31, 2**31, 4), images[16:]), "sizes"),
        "no image": (IMAGES, idx(0x0803, (0, 28, 28), b""), "empty"),
        "images of 14×56": (IMAGES, idx(0x0803, (12, 14, 56), images[16:]), "14×56, expected 28×28"),
        "another magic number": (IMAGES, struct.pack(">I", 0x0D03) + images[4:], "magic number"),
        "little-endian": (IMAGES, images[3::-1] + images[4:], "magic number"),
        "label 255": (LABELS, labels[:-1] + b"\xff", "label 255 at index 11"),
        "label 10": (LABELS, labels[:10] + b"\x0a" + labels[11:], "label 10 at index 2"),
        "counts that differ": (LABELS, labels_file(11), "11 labels for 12 images"),
        "gzip, garbage tail": (IMAGES + ".gz", zipped + b"garbage", "unreadable"),
        "gzip, cut": (IMAGES + ".gz", zipped[:-9], "unreadable"),
        "gzip, without its sum": (IMAGES + ".gz", zipped[:-8], "unreadable"),
        "gzip, a flipped bit": (IMAGES + ".gz", bytes(middle), "unreadable"),
        "gzip, no gzip": (IMAGES + ".gz", images, "unreadable"),
        "gzip, twice the data": (IMAGES + ".gz", zipped + zipped, "its header says"),
        "gzip, bomb": (IMAGES + ".gz", gzip.compress(bytes(100_000_000), 9), "more than"),
    }
    return cases


def optimised(module: types.ModuleType) -> types.ModuleType:
    """`module` as `python -O` would have it: without its assertions."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    copied = types.ModuleType(module.__name__)
    sys.modules[f"{module.__name__}_optimised"] = copied
    exec(compile(source, str(module.__file__), "exec", optimize=2), copied.__dict__)
    return copied


def damaged_data(row: Row) -> None:
    """Row 13: each damaged file is refused in one line that names it and the field; the same without assertions."""
    modules = {"": mnist, "python -O: ": optimised(mnist)}
    for prefix, module in modules.items():
        for name, (file, content, word) in damaged_idx().items():
            raw = write_set(row.new("data"))
            if file.endswith(".gz"):
                (raw / file[:-3]).unlink()
            (raw / file).write_bytes(content)
            problems = ["was accepted"]
            try:
                module.read_mnist("kmnist", raw.parents[1])
            except module.DataError as error:
                problems = one_line_of(str(error), file, word)
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            row.case(prefix + name, problems)
            shutil.rmtree(raw.parents[1])
    if not row.quick and __debug__:
        command = [sys.executable, "-O", "-m", "tests.faults", "--row", "13", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        found = json.loads(done.stdout)[0] if done.stdout else {"count": 1, "failures": [done.stderr[-300:]]}
        row.count += found["count"]
        row.failures += [f"under python -O: {failure}" for failure in found["failures"]]


# ------------------------------------------------------------------------------------------------------------- row 14


def bad_images(row: Row) -> None:
    """Row 14: images cut, empty, huge, in odd modes, links in a circle, pipes: named, or read; never a hang."""
    from PIL import Image

    source = row.new("images")
    write_images(source, 6)
    good = sorted((source / "class0").iterdir())[-1]
    content = good.read_bytes()
    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(side + 1))), (b"IEND", b"")
    huge = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    drawn = (row.rng.randrange(len(content) - 20) for _ in range(row.pick(40, 2)))
    lengths = sorted({0, 1, 8, len(content) // 2, *drawn})
    bad: dict[str, Callable[[Path], Any]] = {
        f"cut to {length}": lambda path, n=length: path.write_bytes(content[:n]) for length in lengths
    }
    bad |= {
        "20,000 × 20,000": lambda path: path.write_bytes(huge),
        "text": lambda path: path.write_text("<img>"),
        "an EPS file": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\nshowpage\n"),
        "a link to itself": lambda path: path.symlink_to(path),
        "links in a circle": lambda path: (path.symlink_to("other.png"), (path.parent / "other.png").symlink_to(path)),
        "a link to nothing": lambda path: path.symlink_to("nothing.png"),
        "a directory": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
    }
    for name, put in bad.items():
        folder = row.new("bad")
        shutil.copytree(source, folder)
        path = folder / "class0" / good.name
        path.unlink()
        put(path)

        def read(folder: Path = folder) -> None:
            data = SeededImageFolder(folder)
            for index in range(len(data)):
                data[index]

        child = start(measured(read), row.new("read"))
        code = child.wait(8)
        failed = {"kind": f"exit code {code}", "text": child.err[-200:], "grown": 0}
        found = json.loads(child.out) if code == 0 else failed
        problems = one_line_of(found["text"], path.stem if "circle" not in name else "class0", "not a readable image")
        problems += [f"{found['kind']}"] * (found["kind"] != "DataError")
        problems += ["took too much memory"] * (found["grown"] > 300 * MEGABYTE)
        row.case(name, problems)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "PA"):
        ending = {"CMYK": "tif", "YCbCr": "jpg", "F": "tif", "I": "tif", "PA": "tif"}.get(mode, "png")
        folder = row.new("mode")
        shutil.copytree(source, folder)
        try:
            Image.new("L", (28, 28), 77).convert(mode.replace("PA", "P")).save(folder / "class0" / f"odd.{ending}")
        except (OSError, ValueError) as error:
            row.skip(f"mode {mode} cannot be written ({error})")
            continue
        data = SeededImageFolder(folder)
        sizes = {(image.size, image.mode) for image, _ in (data[index] for index in range(len(data)))}
        row.case(f"mode {mode}", [] if sizes == {((28, 28), "L")} else [f"gave {sizes}"])
    loop = row.new("loop")
    shutil.copytree(source, loop)
    (loop / "loop").symlink_to(loop)
    row.case("a folder that leads back", [] if len(SeededImageFolder(loop)) == 6 else ["counted images twice"])
    for workers in row.pick((0, 2), ()):
        folder = row.new("script")
        write_images(folder, 40)
        path = folder / "class1" / "007.png"
        path.write_bytes(content[:50])
        options = ("--dataset", "folder", "--data-dir", folder, "--batch-size", 8, "--num-workers", workers)
        child = start(training(*SMALL, *options, "--output", row.new("out")), row.new("script-said"))
        child.wait()
        row.case(f"a run with {workers} workers", one_error(child, str(path), codes=(1, 2)), child.group_gone(10))


# ------------------------------------------------------------------------------------------------------------- row 15


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(bad: int = -1, value: float = math.nan) -> list[tuple[Tensor, Tensor]]:
    """Six batches of 8; one value of batch `bad` is `value`."""
    generator = torch.Generator().manual_seed(5)
    made = [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(6)]
    if bad >= 0:
        made[bad][0][3, 2] = value
    return made


class Trained:
    """A training on `batches`, and what came of it."""

    def __init__(
        self, folder: Path, train: list, val: list, criterion: Any = None, epochs: int = 1, **options: Any
    ) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        self.error = ""
        self.trainer = tb.Trainer(
            model, criterion or nn.CrossEntropyLoss(), optimizer, checkpoint_dir=folder / "checkpoints", **options
        )
        try:
            self.trainer.fit(train, val, epochs, verbose=False)
        except tb.NonFiniteLoss as error:
            self.error = str(error)

    def finite(self) -> bool:
        return all(bool(weight.isfinite().all()) for weight in self.trainer.model.parameters())

    def same_weights(self, other: Trained) -> bool:
        pairs = zip(self.trainer.model.state_dict().items(), other.trainer.model.state_dict().items(), strict=True)
        return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs if "num_batches" not in a)


def not_finite(row: Row) -> None:
    """Row 15: NaN and infinity in a batch, a loss, a metric, a gradient: stopped or skipped at once, best untouched."""

    def work() -> None:
        torch.set_num_threads(1)
        inner = Row(15, "", row.seed, row.quick, row.new("inner"))
        inner.folder.mkdir()
        for value in (math.nan, math.inf, -math.inf):
            for bad in inner.rng.sample(range(6), inner.pick(6, 2)):
                in_a_batch(inner, bad, value)
                in_a_loss(inner, bad, value)
            in_a_metric(inner, value)
            in_a_gradient(inner, value)
        far_too_large(inner)
        print(json.dumps([inner.count, inner.failures]))

    child = start(work, row.new("not-finite"))
    if child.wait():
        raise RuntimeError(child.err)
    row.count, row.failures = json.loads(child.out)


def in_a_batch(row: Row, bad: int, value: float) -> None:
    good = batches()
    for policy in ("stop", "skip"):
        folder = row.new("batch")
        done = Trained(folder, batches(bad, value), good, nan_policy=policy)
        if policy == "stop":
            problems = stopped(done, folder, bad)
            problems += ["the batch is not named as what was bad"] * ("given" not in done.error.split("made the")[-1])
        else:
            without = Trained(row.new("without"), good[:bad] + good[bad + 1 :], good)
            problems = [] if done.same_weights(without) else ["not as without that batch"]
            problems += [f"{done.trainer.skipped} skipped"] * (done.trainer.skipped != 1) + [done.error]
        row.case(f"{value} in batch {bad}, {policy}", problems)


def stopped(done: Trained, folder: Path, bad: int) -> list[str]:
    """Problems unless it stopped within the step, said where, and saved nothing that is not finite."""
    problems = one_line_of(done.error, f"batch {bad + 1},")
    problems += [f"stopped after {done.trainer.step} steps"] * (done.trainer.step > bad)
    problems += ["the weights are not finite"] * (not done.finite())
    for path in (folder / "checkpoints").glob("*.pt"):
        weights = tb.load_checkpoint(path)["model_state_dict"]
        problems += [f"{path.name} is not finite"] * (not all(bool(w.isfinite().all()) for w in weights.values()))
    return problems


def far_too_large(row: Row) -> None:
    """A value of 1e30 gives a finite loss, but an infinite running variance: that is not saved either."""
    folder = row.new("large")
    done = Trained(folder, batches(3, 1e30), batches(), save_every=2)
    row.case("a value of 1e30", stopped(done, folder, 9)[1:], [] if "running statistic" in done.error else [done.error])


def in_a_loss(row: Row, bad: int, value: float) -> None:
    good = batches()

    def criterion(number: list[int]) -> Callable:
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            number[0] += 1
            return nn.functional.cross_entropy(outputs, targets) + (value if number[0] == bad + 1 else 0)

        return loss

    folder = row.new("loss")
    row.case(f"a loss of {value}, stop", stopped(Trained(folder, good, good, criterion([0])), folder, bad))
    done = Trained(row.new("loss"), good, good, criterion([0]), nan_policy="skip")
    without = Trained(row.new("without"), good[:bad] + good[bad + 1 :], good)
    problems = [] if done.same_weights(without) else ["not as without that batch"]
    row.case(f"a loss of {value}, skip", problems, done.error)


def in_a_metric(row: Row, value: float) -> None:
    """The validation of the second and third epoch is not finite: best stays that of another epoch, all goes on."""
    good, seen = batches(), [0]

    class Validation(list):
        def __iter__(self) -> Any:
            seen[0] += 1
            return iter(batches(0, value) if seen[0] in (1, 3) else good)

    folder = row.new("metric")
    stopper = tb.EarlyStopping(2)
    done = Trained(folder, good, Validation(good), epochs=4, early_stopping=stopper)
    trainer = done.trainer
    losses = trainer.history["val_loss"]
    best = min((loss, epoch) for epoch, loss in enumerate(losses) if math.isfinite(loss))
    saved_best = tb.load_checkpoint(folder / "checkpoints" / "best.pt")
    found = trainer.best_score, trainer.best_epoch
    problems = [f"best is {found}, expected {best}"] * (found != best)
    problems += [f"stopper's best is {stopper.best_score}"] * (stopper.best_score != best[0])
    problems += ["best.pt is another epoch's"] * (saved_best["loss"] != best[0])
    problems += ["did not go on"] * (len(losses) != 4) + ["nothing was bad"] * math.isfinite(losses[0])
    row.case(f"a validation of {value}", problems, done.error)


def in_a_gradient(row: Row, value: float) -> None:
    """The loss is finite, its gradient is not: nothing of it is saved."""
    folder, good = row.new("gradient"), batches()
    seen = [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen[0] += outputs.requires_grad
        if seen[0] == 6 and outputs.requires_grad:
            outputs.register_hook(lambda gradient: gradient + value)
        return nn.functional.cross_entropy(outputs, targets)

    done = Trained(folder, good, [good[0]], loss, epochs=2, save_every=3)
    problems = [] if done.error else ["was not seen"]
    for path in (folder / "checkpoints").glob("*.pt"):
        weights = tb.load_checkpoint(path)["model_state_dict"]
        problems += [f"{path.name} is not finite"] * (not all(bool(w.isfinite().all()) for w in weights.values()))
    seen[0] = 0
    skipping = Trained(row.new("gradient"), good, good, loss, nan_policy="skip")
    problems += [skipping.error] + [f"{skipping.trainer.skipped} skipped"] * (skipping.trainer.skipped != 1)
    row.case(f"a gradient of {value}", problems, [] if skipping.finite() else ["the weights are not finite"])


# ------------------------------------------------------------------------------------------------------------- row 17

MODES = (
    *("good", "truncated", "short", "empty", "flipped", "refused", "silent"),
    *("truncated at first", "flipped at first"),
)


def serve(content: dict[str, bytes], mode: str, port: Shared) -> None:
    """For a child: a server that gives `content`, but does as `mode` says."""
    asked: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            body, first = content[name], name not in asked
            asked[name] = 1
            bad = mode.split()[0] if first or "first" not in mode else "good"
            if bad == "silent":
                time.sleep(30)
            if bad == "flipped":
                body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
            sent = {"truncated": body[: len(body) // 2], "short": body[:-10], "empty": b""}.get(bad, body)
            self.send_response(500 if bad == "refused" else 200)
            self.send_header("Content-Length", str(len(body) if bad == "truncated" else len(sent)))
            self.end_headers()
            for i in range(0, len(sent), 1000):
                self.wfile.write(sent[i : i + 1000])
                time.sleep(0.001)  # so that several are under way at once

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_address[1]
    server.serve_forever()


def downloads(row: Row) -> None:
    """Row 17: 8 processes download at once from a server that cuts, flips, refuses or is silent; one is killed."""
    import torchvision

    raw = write_set(row.new("source"), "fashion-mnist", 200, 100)
    plain = {path.name: path.read_bytes() for path in raw.iterdir()}
    content = {f"{name}.gz": gzip.compress(value) for name, value in plain.items()}
    kind = torchvision.datasets.FashionMNIST
    before = kind.mirrors, kind.resources
    kind.resources = [(name, hashlib.md5(value).hexdigest()) for name, value in content.items()]
    try:
        for mode in row.pick(MODES, ("truncated at first", "flipped")):
            port = Shared()
            server = start(lambda m=mode, p=port: serve(content, m, p), row.new("server"))
            end = time.monotonic() + 10
            while not port.value and time.monotonic() < end:
                time.sleep(0.01)
            kind.mirrors = [f"http://127.0.0.1:{port.value}/"]
            for killed in row.pick((False, True), (False,)):
                together(row, mode, plain, killed)
            server.kill_group()
            server.wait()
    finally:
        kind.mirrors, kind.resources = before


def together(row: Row, mode: str, plain: dict[str, bytes], killed: bool) -> None:
    """Eight at once: each has the data, or says that it could not be had; what is there is right."""
    folder = row.new("data")

    def work() -> int:
        try:
            mnist.download_mnist("fashion-mnist", folder, timeout=0.3 if mode == "silent" else 10)
            return int(len(load_images("fashion-mnist", folder, download=False)) != 200)
        except ConnectionError as error:
            print(error)
            return 3

    children = [start(work, row.new("download")) for _ in range(8)]
    if killed:
        time.sleep(row.rng.uniform(0, 0.2))
        children[row.rng.randrange(8)].signal(signal.SIGKILL)
    codes = [child.wait(60) for child in children]
    raised = [child.err[-200:] for child in children if child.code == 70][:1]
    problems = [f"exit codes {codes}: {raised}"] * (not {*codes} <= {0, 3, -9})
    problems += ["one that was told to have it failed"] * (mode == "good" and 3 in codes)
    problems += ["nobody has it"] * ((mode == "good" or "first" in mode) and 0 not in codes)
    problems += ["it cannot have come"] * (mode in ("truncated", "short", "flipped", "refused") and 0 in codes)
    problems += [p for c in children if c.code == 3 for p in one_line_of(c.out.strip(), "could not be downloaded")][:1]
    raw = folder / "FashionMNIST" / "raw"
    for path in raw.glob("*ubyte*") if raw.exists() else ():
        problems += [f"{path.name} is not right"] * (path.read_bytes() != plain.get(path.name))
    row.case(f"{mode}{', one killed' if killed else ''}", problems)
    shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- row 18

NAMES = (
    "<img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "two\nlines",
    "a\rb\tc\x08d",
    "naïve 漢字 🎈",
    "right\u202eleft",
    "next\u2028line\x85",
    os.fsdecode(b"\xff\xfe"),
    "'; rm -rf ~; $(reboot) `x` \"",
)


def inert(text: str, what: str) -> list[str]:
    """Problems if a terminal could obey any character of `text`."""
    bad = sorted({c for c in text if not c.isprintable() and c != "\n"})
    return [f"{what} has {bad!r}"] if bad else []


def strange_names(row: Row) -> None:
    """Row 18: classes, files and directories with names that a terminal, JSON or a page might obey."""
    names = row.some(list(NAMES), 5)
    data = row.new("data")
    for i, name in enumerate(names):
        write_images(row.folder / "plain", 8, classes=1)
        shutil.copytree(row.folder / "plain" / "class0", data / name)
        for path in sorted((data / name).iterdir())[:1]:
            path.rename(path.with_name(f"{name[:20].replace('/', '')}{i}.png"))
    options = ("--dataset", "folder", "--data-dir", data, "--model", "simplenet", "--epochs", 1, "--batch-size", 8)
    run = row.new("run")
    child = start(training(*options, "--output", run), run)
    code = child.wait()
    problems = [f"exit code {code}: {child.err[-300:]!r}"] * bool(code)
    row.case("classes", problems, inert(child.out + child.err, "the output"))
    if code == 0:
        info = json.loads((run / "run.json").read_text())
        row.case("run.json", [] if set(info["result"]["accuracy_by_class"]) == set(names) else ["other class names"])
        by_class = [line for line in child.out.splitlines() if line.startswith("by class: ")]
        row.case("the line of the classes", [] if len(by_class) == 1 else child.out)
        resumed = start(training("--resume", run, "--debug"), run.with_name("again"))
        row.case("resumed", f"{resumed.err[-300:]}" if resumed.wait() else "", inert(resumed.out, "the output"))
        predicted(row, run, data)
    for name in names:
        broken = row.new("broken")
        write_images(broken, 16)
        (broken / "class0" / f"{name.replace('/', '')}.png").write_text("no image")
        output = row.folder / f"out{name.replace('/', '')}"
        child = start(training(*options, "--data-dir", broken, "--output", output), row.new("said"))
        child.wait()
        problems = one_error(child, "not a readable image", codes=(1, 2))
        row.case(f"a file named {name!a}", problems, inert(child.err, "it"))
        remove(output)
        child = start(training(*SMALL[:-1], "--epochs", 1, "--output", output), row.new("said"))
        code = child.wait()
        problems = [f"exit code {code}: {child.err[-200:]!r}"] * bool(code)
        row.case(f"a directory named {name!a}", problems, inert(child.out + child.err, "the output"))
        child = start(training(*SMALL, "--output", output), row.new("said"))
        child.wait()
        row.case(f"refused, named {name!a}", one_error(child, "earlier run", codes=(2,)), inert(child.err, "it"))


def predicted(row: Row, run: Path, data: Path) -> None:
    """The same names through predict, as text and as JSON."""
    if not (ROOT / "scripts" / "predict.py").exists():
        return row.skip("no scripts/predict.py")
    script = load_script("predict")
    images = sorted(data.rglob("*.png"))[: row.pick(40, 6)]
    for options in ((), ("--json",)):
        command = ("--checkpoint", run / "checkpoints" / "best.pt", *options, *images)
        child = start(training(*command, script=script), row.new("predict"))
        code = child.wait()
        problems = [f"exit code {code}: {child.err[-300:]!r}"] * bool(code) + inert(child.out + child.err, "the output")
        if options and not code:
            try:
                json.loads(child.out)
            except ValueError:
                problems += [f"no JSON: {line!r}" for line in child.out.splitlines() if not is_json(line)][:1]
        row.case(f"predict {' '.join(options)}", problems)


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

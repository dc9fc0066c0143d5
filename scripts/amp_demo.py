"""Mixed precision: what fp32, bf16 and fp16 can hold, what autocast does, why fp16 needs a scaler, and what is gained.

    python scripts/amp_demo.py
    python scripts/amp_demo.py --device cuda --section training.times

Every value is compared with one that follows from the bits of the formats, from float64, or from counting by hand; the
exit code is 1 if one is wrong. Times are measured, so they are printed without an expectation.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics.demo import Sections, show
from torchbasics.device import autocast, bf16_is_native, device_name, synchronize

BATCH, STEPS, LR, WEIGHT_DECAY = 32, 8, 1e-3, 0.01  # of the trainings that are compared
LOSS_WITHIN = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.005}  # of float64's, relative

section = Sections(__doc__)


class Format(NamedTuple):
    """A floating-point format of IEEE 754's kind: one bit for the sign, then these."""

    dtype: torch.dtype
    exponent_bits: int
    fraction_bits: int

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number."""
        return 2.0**-self.fraction_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        return (2 - self.eps) * 2.0**self.bias

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all its bits; below, the spacing stays the same down to 0."""
        return 2.0 ** (1 - self.bias)


FORMATS = {
    "fp32": Format(torch.float32, 8, 23),
    "bf16": Format(torch.bfloat16, 8, 7),
    "fp16": Format(torch.float16, 5, 10),
}


@section("types.range", "P1")
def types_range() -> None:
    """bf16 has the exponent of fp32, so its range. fp16 has the finer spacing, and ends at 65504."""
    for name, f in FORMATS.items():
        info = torch.finfo(f.dtype)
        show(f"{name}: bits of sign, exponent, fraction", info.bits, 1 + f.exponent_bits + f.fraction_bits)
        show(f"{name}: eps", info.eps, f.eps, rtol=0, atol=0)
        show(f"{name}: largest", info.max, f.largest, rtol=0, atol=0)
        show(f"{name}: smallest normal", info.smallest_normal, f.smallest_normal, rtol=0, atol=0)
        last_bit = torch.tensor(1, dtype=torch.int32 if info.bits == 32 else torch.int16).view(f.dtype)
        show(f"{name}: smallest", float(last_bit), f.smallest_normal * f.eps, rtol=0, atol=0)


@section("types.spacing", "P1")
def types_spacing(device: torch.device) -> None:
    """Whatever is smaller than half of the spacing is rounded away; what leaves the range is infinite or 0."""
    for name, f in FORMATS.items():
        one, eps, largest = (torch.tensor(value, dtype=f.dtype, device=device) for value in (1.0, f.eps, f.largest))
        show(f"{name}: 1 + eps", float(one + eps), 1 + f.eps, rtol=0, atol=0)
        show(f"{name}: 1 + eps / 2", float(one + eps / 2), 1.0, rtol=0, atol=0)
        show(f"{name}: largest * 2", float(largest * 2), math.inf)
        small, total = one / 4096, one * 0
        for _ in range(4096):
            total = total + small
        # The sum stands still where half of its spacing is 1/4096: at 2 ** (fraction bits + 1) / 4096.
        show(f"{name}: 1/4096, added 4096 times", float(total), min(1.0, 2.0 ** (f.fraction_bits + 1) / 4096))
        show(f"{name}: the same by sum(), which adds in fp32", float(small.repeat(4096).sum()), 1.0)
    for label, value, name, expected in (
        ("65520", 65520.0, "fp16", math.inf),  # halfway from 65504 to what would be next
        ("65520", 65520.0, "bf16", 65536.0),  # no overflow, but coarse
        ("2049", 2049.0, "fp16", 2048.0),
        ("257", 257.0, "bf16", 256.0),
        ("2**-25", 2.0**-25, "fp16", 0.0),
        ("2**-25", 2.0**-25, "bf16", 2.0**-25),
    ):
        stored = float(torch.tensor(value, dtype=FORMATS[name].dtype, device=device))
        show(f"{label} in {name}", stored, expected, rtol=0, atol=0)


@section("autocast.dtypes", "P1")
def autocast_dtypes(device: torch.device) -> None:
    """Products and convolutions run in low precision, losses in fp32; the rest takes what comes. Weights stay fp32."""
    x, weight = torch.ones(8, 4, device=device), torch.ones(3, 4, device=device)
    images, kernel = torch.ones(2, 3, 8, 8, device=device), torch.ones(5, 3, 3, 3, device=device)
    targets = torch.arange(8, device=device) % 3
    for name in ("bf16", "fp16"):
        low = FORMATS[name].dtype
        with autocast(device, name):
            scores = F.linear(x, weight)  # (8, 3)
            show(f"{name}: linear", scores.dtype, low)
            show(f"{name}: conv2d", F.conv2d(images, kernel).dtype, low)
            show(f"{name}: relu of the linear layer's output", scores.relu().dtype, low)
            show(f"{name}: that output + an fp32 tensor", (scores + x[:, :1]).dtype, torch.float32)
            show(f"{name}: cross_entropy", F.cross_entropy(scores, targets).dtype, torch.float32)
            show(f"{name}: mse_loss", F.mse_loss(scores, scores).dtype, torch.float32)
        show(f"{name}: the weight", weight.dtype, torch.float32)


@section("scaler.underflow", "P1")
def scaler_underflow(device: torch.device) -> None:
    """A gradient of 2**-26 is 0 in fp16, unless the loss is scaled up before and the gradient down after backward."""

    def gradient(precision: str, scale: float | None) -> float:
        layer = nn.Linear(1, 1, bias=False, device=device)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, enabled=scale is not None)
        with autocast(device, precision):
            output = layer(torch.ones(1, 1, device=device))  # its derivative by the weight is 1
        scaler.scale(output.float().sum() * 2.0**-26).backward()
        scaler.unscale_(torch.optim.SGD(layer.parameters(), lr=0.1))
        return float(layer.weight.grad)  # type: ignore[arg-type]

    show("fp16", gradient("fp16", None), 0.0, rtol=0, atol=0)
    show("fp16, loss times 65536", gradient("fp16", 65536.0), 2.0**-26, rtol=0, atol=0)
    show("bf16 needs no scaler", gradient("bf16", None), 2.0**-26, rtol=0, atol=0)


@section("scaler.trace", "P1")
def scaler_trace(device: torch.device) -> None:
    """At an overflow the step is skipped, with its schedule, and the scale halved. Good steps in a row double it."""
    model = nn.Linear(4, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = tb.Trainer(
        model, nn.CrossEntropyLoss(), optimizer, device, schedule, scheduler_interval="step", precision="fp16"
    )
    # In place of the Trainer's own scaler (65536, doubled after 2000 steps), so that eight batches show everything.
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3)
    scales, steps, moved, rates = [], [], [], []
    for number in range(1, 9):
        inputs = torch.randn(8, 4)
        if number == 4:
            inputs = torch.full((8, 4), 1e4)  # its gradient, times the scale, is beyond 65504
        before = model.weight.detach().clone()
        trainer.train_one_epoch([(inputs, torch.arange(8) % 3)])
        scales.append(trainer.scaler.get_scale())
        steps.append(trainer.step)
        moved.append(not torch.equal(before, model.weight))
        rates.append(optimizer.param_groups[0]["lr"])
    show("scale after each batch", scales, [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 1024.0, 2048.0, 2048.0])
    show("optimizer steps taken", steps, [1, 2, 3, 3, 4, 5, 6, 7])
    show("did the weights move?", moved, [True, True, True, False, True, True, True, True])
    show("learning rate", rates, [0.1 / 2**step for step in (1, 2, 3, 3, 4, 5, 6, 7)])


def make_trainer(device: torch.device, precision: str) -> tb.Trainer:
    """Return a Trainer of a SimpleNet that has the same weights in every precision."""
    tb.set_seed(0)
    model = tb.SimpleNet().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    return tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, device, precision=precision)


def digits() -> list[tuple[Tensor, Tensor]]:
    """Return STEPS batches of drawn digits: images (BATCH, 1, 28, 28), mean 0 and deviation 1; labels (BATCH,)."""
    images, labels = tb.draw_digits(STEPS * BATCH)
    inputs = images.float()
    inputs = (inputs - inputs.mean()) / inputs.std()
    return list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))


def losses_in_float64(batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the losses of the same training in float64 on the CPU: the layers and AdamW written out by formula."""
    tb.set_seed(0)
    weights = [p.detach().double().requires_grad_() for p in tb.SimpleNet().parameters()]
    means = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    losses = []
    for step, (images, labels) in enumerate(batches, start=1):
        x = images.double().flatten(1)  # (B, 784)
        x = (x @ weights[0].T + weights[1]).clamp(min=0)  # (B, 128)
        x = (x @ weights[2].T + weights[3]).clamp(min=0)  # (B, 64)
        x = x @ weights[4].T + weights[5]  # (B, 10)
        loss = (x.logsumexp(1) - x[torch.arange(len(x)), labels]).mean()
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g, mean, square in zip(weights, gradients, means, squares, strict=True):
                mean.mul_(0.9).add_(0.1 * g)
                square.mul_(0.999).add_(0.001 * g * g)
                w.mul_(1 - LR * WEIGHT_DECAY)
                w.sub_(LR * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8))
    return losses


@section("training.losses", "P1")
def training_losses(device: torch.device) -> None:
    """The same training in three precisions stays near the same in float64; weights and optimizer stay fp32."""
    batches = digits()
    expected = losses_in_float64(batches)
    in_fp32: list[float] = []
    for precision, within in LOSS_WITHIN.items():
        trainer = make_trainer(device, precision)
        losses = [trainer.train_one_epoch([batch])[0] for batch in batches]
        show(f"{precision}: losses", losses, expected, rtol=within, atol=0)
        in_fp32 = losses if precision == "fp32" else in_fp32
        if precision != "fp32":
            show(f"{precision}: losses other than those in fp32", losses != in_fp32, True)
        state = [value for values in trainer.optimizer.state.values() for value in values.values()]
        dtypes = {tensor.dtype for tensor in (*trainer.model.parameters(), *state)}
        show(f"{precision}: dtypes of weights and optimizer", list(dtypes), [torch.float32])


@section("training.memory", "P1")
def training_memory(device: torch.device) -> None:
    """Activations take half the memory; copies of weights and inputs in low precision are kept for backward, too."""
    size, features, width, classes = 256, 32, 1024, 10
    model = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes)).to(device)
    inputs, targets = torch.randn(size, features, device=device), torch.arange(size, device=device) % classes
    for precision in FORMATS:
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor.detach())
            return saved[-1]

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, precision):
            F.cross_entropy(model(inputs), targets)
        there = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), inputs, targets)}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        found = sum(size for address, size in storages.items() if address not in there)
        # Backward needs the output of the ReLU, and in fp32 the log-probabilities and the number of targets.
        in_loss = size * classes * 4 + 4
        expected = size * width * 4 + in_loss
        if precision != "fp32":  # and copies of the inputs and of the second weight
            expected = size * width * 2 + in_loss + (size * features + width * classes) * 2
        show(f"{precision}: bytes kept for backward", found, expected)


@section("training.times", "P1")
def training_times(device: torch.device) -> None:
    """bf16 and fp16 are faster only where the hardware computes in them, and products are large enough to matter."""
    batches = digits()
    trainers = {precision: make_trainer(device, precision) for precision in FORMATS}
    seconds: dict[str, list[float]] = {precision: [] for precision in FORMATS}
    began = time.perf_counter()
    for batch in batches:  # in turn, so that whatever else the machine does hits all alike
        for precision, trainer in trainers.items():
            synchronize(device)
            start = time.perf_counter()
            trainer.train_one_epoch([batch])
            synchronize(device)
            seconds[precision].append(time.perf_counter() - start)
    whole = time.perf_counter() - began
    show("all steps together are within the whole loop", 0 < sum(map(sum, seconds.values())) <= whole, True)
    fp32 = statistics.median(seconds["fp32"][2:])  # the first two warm up
    print(f"    {device_name(device)}; bf16 is {'native' if bf16_is_native(device) else 'emulated'} here")
    for precision, times in seconds.items():
        step = statistics.median(times[2:])
        print(f"    {precision}: {step * 1e3:.3f} ms a step of {BATCH} images, {fp32 / step:.2f} times as fast as fp32")


def main(argv: list[str] | None = None) -> int:
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())

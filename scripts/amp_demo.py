"""Mixed precision: what fp32, bf16 and fp16 can hold, what autocast does, why fp16 needs a scaler, and what is gained.

    python scripts/amp_demo.py
    python scripts/amp_demo.py --device cuda --section training.measured

Try: in scaler.trace, change growth_interval=3 to growth_interval=2. Then the scale doubles after every two good steps,
and the line of scales turns to ✗.
"""

# Lessons are checked by running them. mypy: torch types the attributes of layers as "Tensor | Module".
# mypy: ignore-errors

from __future__ import annotations

import math
import statistics
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/

import torch
from torch import nn
from torch.nn import functional as F

import torchbasics as tb
from torchbasics.demo import Sections, show
from torchbasics.device import autocast, bf16_is_native, synchronize

section = Sections(__doc__)


@section("types.range", "P1")
def types_range() -> None:
    """fp16 has fine steps and ends at 65504; bf16 has the range of fp32.

    A number is sign, exponent and fraction. fp32 has 1 + 8 + 23 bits, bf16
    1 + 8 + 7, fp16 1 + 5 + 10: exponent bits give range, fraction bits
    precision."""

    def limits(exponent_bits: int, fraction_bits: int) -> list[float]:
        bias = 2 ** (exponent_bits - 1) - 1
        eps = 2.0**-fraction_bits  # from 1 to the next number
        return [eps, (2 - eps) * 2.0**bias, 2.0 ** (1 - bias)]

    for dtype, bits in ((torch.float32, (8, 23)), (torch.bfloat16, (8, 7)),
                        (torch.float16, (5, 10))):
        info = torch.finfo(dtype)
        found = [info.eps, info.max, info.smallest_normal]
        show(found, limits(*bits), rtol=0, atol=0)
        last = torch.tensor(info.max, dtype=dtype)
        show((last * 2).item(), math.inf)  # beyond the range
    show(torch.finfo(torch.float16).max, 65504.0)


@section("types.spacing", "P1")
def types_spacing(device: torch.device) -> None:
    """What is smaller than half a step is rounded away.

    Near 1 the steps are 2**-10 in fp16 and 2**-7 in bf16; near 2048 those of
    fp16 are 2. So sums of many small values are made in fp32."""

    def stored(value: float, dtype: torch.dtype) -> float:
        return torch.tensor(value, dtype=dtype, device=device).item()

    show([stored(v, torch.float16) for v in (2049.0, 65520.0, 2.0**-25)], [2048.0, math.inf, 0.0], rtol=0, atol=0)
    show([stored(v, torch.bfloat16) for v in (257.0, 65520.0, 2.0**-25)], [256.0, 65536.0, 2.0**-25], rtol=0, atol=0)
    show(stored(0.1, torch.float16), struct.unpack("e", struct.pack("e", 0.1))[0], rtol=0, atol=0)
    small = torch.tensor(1 / 4096, device=device)
    sums = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        total = torch.zeros((), dtype=dtype, device=device)
        for _ in range(4096):
            total += small.to(dtype)
        sums.append(total.item())
    # The sum stands still where 1/4096 is half a step: at 0.5 the steps of
    # fp16 are 2**-11 = 2/4096, at 1/16 those of bf16 are the same.
    show(sums, [1.0, 0.5, 1 / 16])
    # sum() adds in fp32 and rounds at the end.
    show(small.half().repeat(4096).sum(), 1.0)


@section("autocast.dtypes", "P1")
def autocast_dtypes(device: torch.device) -> None:
    """Under autocast products and convolutions run in low precision, losses in fp32.

    Other operations take what comes, and weights stay fp32."""
    layer = nn.Linear(4, 3).to(device)
    conv = nn.Conv2d(3, 5, 3).to(device)
    x = torch.ones(8, 4, device=device)
    images = torch.ones(2, 3, 8, 8, device=device)
    targets = torch.arange(8, device=device) % 3
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype=low):
            scores = layer(x)  # (8, 3)
            dtypes = [scores.dtype, conv(images).dtype, scores.relu().dtype]
            show(dtypes, [low, low, low])
            show((scores + x[:, :1]).dtype, torch.float32)  # the wider of two
            show(F.cross_entropy(scores, targets).dtype, torch.float32)
            show(F.mse_loss(scores, scores).dtype, torch.float32)
    show((layer.weight.dtype, layer(x).dtype), (torch.float32, torch.float32))


@section("scaler.underflow", "P1")
def scaler_underflow(device: torch.device) -> None:
    """Small gradients are 0 in fp16, unless the loss is scaled up before.

    GradScaler multiplies the loss, and divides the gradients before the step.
    bf16 has the range of fp32 and needs none of this."""

    def gradient(dtype: torch.dtype, scale: float) -> float:
        layer = nn.Linear(1, 1, bias=False, device=device)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        with torch.autocast(device.type, dtype=dtype):
            output = layer(torch.ones(1, 1, device=device))
        # the derivative of this loss by the weight is 2**-26
        scaler.scale(output.float().sum() * 2.0**-26).backward()
        scaler.unscale_(torch.optim.SGD(layer.parameters(), lr=0.1))
        return layer.weight.grad.item()

    show(gradient(torch.float16, scale=1.0), 0.0, rtol=0, atol=0)
    show(gradient(torch.float16, scale=65536.0), 2.0**-26, rtol=0, atol=0)
    show(gradient(torch.bfloat16, scale=1.0), 2.0**-26, rtol=0, atol=0)


@section("scaler.trace", "P1")
def scaler_trace(device: torch.device) -> None:
    """At an overflow the step is skipped and the scale halved.

    Good steps in a row double it. So the scale finds its own size."""
    model = nn.Linear(4, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = tb.Trainer(
        model, nn.CrossEntropyLoss(), optimizer, device, schedule,
        scheduler_interval="step", precision="fp16")
    # The Trainer's own scaler starts at 65536 and doubles after 2000 steps.
    trainer.scaler = torch.amp.GradScaler(
        device.type, init_scale=1024.0, growth_interval=3)
    scales, moved, rates = [], [], []
    for number in range(1, 9):
        x = torch.randn(8, 4)
        if number == 4:  # its gradient times 1024 is beyond 65504
            x = torch.full((8, 4), 1e4)
        before = model.weight.detach().clone()
        trainer.train_one_epoch([(x, torch.arange(8) % 3)])
        scales.append(trainer.scaler.get_scale())
        moved.append(not torch.equal(before, model.weight))
        rates.append(optimizer.param_groups[0]["lr"])
    show(scales, [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 1024.0, 2048.0, 2048.0])
    show(moved, [True, True, True, False, True, True, True, True])
    # The Trainer does not move the schedule at a skipped step.
    show(rates, [0.1 / 2**steps for steps in (1, 2, 3, 3, 4, 5, 6, 7)])
    show(trainer.step, 7)


@section("training.losses", "P1")
def training_losses(device: torch.device) -> None:
    """All three precisions train alike; weights and optimizer stay fp32.

    A loop in float64, without autocast and the Trainer, says what is exact."""
    images, labels = tb.draw_digits(8 * 32)
    x = (images.float() - images.float().mean()) / images.float().std()
    # 8 steps of 32 images
    batches = list(zip(x.split(32), labels.split(32), strict=True))

    def model_and_optimizer():
        torch.manual_seed(0)
        model = tb.SimpleNet().to(device)
        return model, torch.optim.SGD(model.parameters(), lr=0.2)

    model, optimizer = model_and_optimizer()
    model.cpu().double()  # some accelerators have no float64
    exact = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.double()), y)
        loss.backward()
        optimizer.step()
        exact.append(loss.item())

    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        model, optimizer = model_and_optimizer()
        trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, device,
                             precision=precision)
        losses[precision] = [trainer.train_one_epoch([b])[0] for b in batches]
        show({p.dtype for p in model.parameters()}, {torch.float32})
    show(losses["fp32"], exact, rtol=1e-4, atol=0)
    show(losses["bf16"], exact, rtol=0.02, atol=0)
    show(losses["fp16"], exact, rtol=0.005, atol=0)
    # Rounding adds up: fp32 stays nearest by far.
    off = {}
    for precision, values in losses.items():
        pairs = zip(values, exact, strict=True)
        off[precision] = max(abs(value - other) for value, other in pairs)
        print(f"{precision}: off by {off[precision]:.1e} at most")
    show(len({tuple(values) for values in losses.values()}), 3)  # all differ
    show(10 * off["fp32"] < min(off["bf16"], off["fp16"]), True)


@section("training.memory", "P1")
def training_memory(device: torch.device) -> None:
    """Half the bytes for what backward keeps, but copies of the weights, too."""
    layers = nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 10)
    model = nn.Sequential(*layers).to(device)

    def kept_bytes(precision: str) -> int:
        with autocast(device, precision):
            estimate = tb.MemoryTracker.estimate_model_memory(
                model, None, (256, 32))
        return estimate["activations"]

    # The output of the ReLU is kept, and the scores.
    show(kept_bytes("fp32"), 256 * (1024 + 10) * 4)
    copies = (256 * 32 + 10 * 1024) * 2  # of x and of the second weight
    show(kept_bytes("bf16"), 256 * (1024 + 10) * 2 + copies)
    show(kept_bytes("fp16"), 256 * (1024 + 10) * 2 + copies)


@section("training.measured", "P1")
def training_measured(device: torch.device) -> None:
    """Low precision is faster only where the hardware computes in it."""
    layers = nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(256, 512, device=device)
    y = torch.arange(256, device=device) % 10
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": [], "fp16": []}
    losses = {}
    for _ in range(5):  # in turn, so that a busy machine hits all alike
        for precision, times in seconds.items():
            synchronize(device)
            start = time.perf_counter()
            with autocast(device, precision):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            synchronize(device)
            times.append(time.perf_counter() - start)
            losses[precision] = loss.item()
    for precision, times in seconds.items():
        step = 1000 * statistics.median(times)
        print(f"{precision}: {step:.2f} ms, loss {losses[precision]:.4f}")
    kind = "native" if bf16_is_native(device) else "emulated"
    print(f"{tb.device_name(device)}: bf16 is {kind}")
    show([losses["bf16"], losses["fp16"]], [losses["fp32"]] * 2, rtol=0.02, atol=0)
    show(len(set(losses.values())), 3)  # three precisions, three roundings


def main(argv: list[str] | None = None) -> int:
    """Run the lessons that the arguments name and return the exit code."""
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())

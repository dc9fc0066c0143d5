"""Networks, from one linear layer to transfer and compilation: lessons that print their code and check what they show.

    python scripts/nn_demo.py
    python scripts/nn_demo.py --section loss.cross_entropy --section train.by_hand

Try: in train.by_hand, change lr=0.2 to lr=1.1 in the first optimizer. Each step multiplies the error of the bias by
1 - 2 * lr = -1.2, so it overshoots and grows, and the lines that show the result turn to ✗.
"""

# Lessons are checked by running them. mypy: torch types the attributes of layers as "Tensor | Module".
# mypy: ignore-errors

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import torchbasics as tb
from torchbasics.demo import Sections, show, show_error, skip

section = Sections(__doc__)


@section("layer.linear", "N1")
def layer_linear() -> None:
    """A linear layer computes x @ W.T + b.

    It holds its parameters: weights W, one row for each output, and a bias b
    for each output. They start at random; training changes them."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():  # set them by hand, to know what comes out
        layer.weight.copy_(torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    # Each of the B rows of a batch is a sample and is treated alone.
    x = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # (B, 3)
    # 1 - 3 + 10 and 2 + 2 + 20, then 2 - 6 + 10 and 4 + 4 + 20
    show(layer(x), [[8.0, 24.0], [6.0, 28.0]])
    # 3 weights and a bias for each of the 2 outputs
    show(sum(p.numel() for p in layer.parameters()), 2 * (3 + 1))
    show_error(lambda: layer(x[:, :2]), RuntimeError, "cannot be multiplied")


@section("layer.activation", "N1")
def layer_activation() -> None:
    """Between linear layers stands a function that is not linear.

    Without it two layers do no more than one, however many units they have."""
    x = torch.tensor([-1.0, 0.0, 2.0])
    show(nn.ReLU()(x), [0.0, 0.0, 2.0])  # negative values become 0
    show(nn.Sigmoid()(x), [1 / (1 + math.exp(-v)) for v in (-1, 0, 2)])
    show(nn.Tanh()(x), [math.tanh(v) for v in (-1, 0, 2)])
    first, second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
    one_matrix = second.weight @ first.weight  # (2, 3)
    show(second(first(x)), one_matrix @ x)
    show(torch.allclose(second(first(x).relu()), one_matrix @ x), False)


@section("model.sequential", "N2")
def model_sequential(device: torch.device) -> None:
    """Sequential chains layers; an OrderedDict gives them names."""
    hidden, output = nn.Linear(4, 3), nn.Linear(3, 2)
    plain = nn.Sequential(hidden, nn.ReLU(), output).to(device)
    show(list(plain.state_dict()), ["0.weight", "0.bias", "2.weight", "2.bias"])
    layers = OrderedDict(hidden=hidden, relu=nn.ReLU(), output=output)
    named = nn.Sequential(layers)
    show([name for name, _ in named.named_children()], ["hidden", "relu", "output"])
    # .to(device) moves all parameters, so the inputs must be there as well.
    x = torch.randn(2, 4, device=device)  # (B, 4)
    units = (x @ hidden.weight.T + hidden.bias).clamp(min=0)
    by_hand = units @ output.weight.T + output.bias  # (B, 2)
    show(plain(x), by_hand, atol=1e-4)
    show(named(x), by_hand, atol=1e-4)


@section("model.own", "N2")
def model_own() -> None:
    """A model of your own is a class: layers in __init__, their use in forward.

    A module finds the layers that are its attributes. In a Python list they
    are hidden: the optimizer gets nothing, .to() and state_dict() miss them.
    ModuleList is a list that registers what it holds."""

    class Stack(nn.Module):
        def __init__(self, container: type) -> None:
            super().__init__()
            self.layers = container([nn.Linear(4, 3), nn.Linear(3, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    model = Stack(nn.ModuleList)
    print(model)
    names = [name for name, _ in model.named_parameters()]
    show(names, [f"layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")])
    show(list(Stack(list).parameters()), [])
    show(model(torch.randn(5, 4)).shape, (5, 2))


@section("predict.softmax", "N9")
def predict_softmax() -> None:
    """softmax turns a classifier's outputs, the logits, into probabilities.

    The largest one names the class, and how sure the model is."""
    logits = torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 5.0]])
    probabilities = logits.softmax(dim=1)  # (B, classes)
    total = math.exp(2) + math.exp(1) + math.exp(0.1)
    show(probabilities[0], [math.exp(v) / total for v in (2, 1, 0.1)])
    confidence, predicted = probabilities.max(dim=1)
    show(predicted, [0, 2])  # logits.argmax(dim=1) gives it, too
    show(confidence, [math.exp(2) / total, math.exp(5) / (2 + math.exp(5))])


@section("loss.regression", "N4")
def loss_regression() -> None:
    """A loss is one number to lower: how far predictions are from targets.

    Squared errors make outliers heavy, absolute errors do not. SmoothL1 is
    squared below 1 and straight above. A loss of your own is any function or
    module that returns one number, as tb.CustomLoss does."""
    prediction = torch.tensor([1.0, 2.0, 6.0])
    target = torch.tensor([1.0, 2.5, 3.0])
    # the errors: 0, -0.5 and 3
    show(nn.MSELoss()(prediction, target), (0 + 0.5**2 + 3**2) / 3)
    show(nn.L1Loss()(prediction, target), (0 + 0.5 + 3) / 3)
    # d * d / 2 below 1, |d| - 1/2 above
    show(nn.SmoothL1Loss()(prediction, target), (0 + 0.125 + 2.5) / 3)

    def own(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        error = prediction - target
        return error.square().mean() + 0.5 * error.abs().mean()

    show(own(prediction, target), 9.25 / 3 + 0.5 * 3.5 / 3)
    show(tb.CustomLoss(weight=0.5)(prediction, target), 9.25 / 3 + 0.5 * 3.5 / 3)


@section("loss.cross_entropy", "N4")
def loss_cross_entropy() -> None:
    """CrossEntropyLoss takes logits and class numbers.

    It is the mean of -log(probability of the right class): 0 if the model is
    sure and right, large if it is sure and wrong."""
    logits = torch.tensor([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]])
    targets = torch.tensor([0, 2])  # (B,), int64
    first = math.log(math.exp(2) + math.exp(1) + math.exp(0.1)) - 2
    second = math.log(math.exp(0.5) + math.exp(2.5) + math.exp(0.3)) - 0.3
    show(nn.CrossEntropyLoss()(logits, targets), (first + second) / 2)
    # in two steps: NLLLoss takes log-probabilities
    show(nn.NLLLoss()(logits.log_softmax(dim=1), targets), (first + second) / 2)
    # A model that knows nothing loses log(10) on ten classes: what the first
    # batch of a new classifier should show.
    show(F.cross_entropy(torch.zeros(1, 10), torch.tensor([3])), math.log(10))
    # The classic mistake: softmax before the loss, which has one already. It
    # runs, but even a perfect model would keep losing.
    sure, target = torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0])
    show(F.cross_entropy(sure, target), 0.0)
    show(F.cross_entropy(sure.softmax(1), target), math.log(math.e + 2) - 1)
    # Smoothing of 0.1 spreads a tenth of the target over all classes, so that
    # no logit must grow for ever.
    p = torch.tensor([[0.7, 0.2, 0.1]])
    smoothed = -0.9 * math.log(0.7) - 0.1 * math.log(0.7 * 0.2 * 0.1) / 3
    show(F.cross_entropy(p.log(), target, label_smoothing=0.1), smoothed)


@section("loss.binary", "N4")
def loss_binary() -> None:
    """For yes or no: BCELoss takes probabilities, BCEWithLogitsLoss logits.

    Prefer the second: it also survives large logits."""
    logits, targets = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    yes, no = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    expected = -(math.log(yes) + math.log(1 - no)) / 2
    show(nn.BCELoss()(logits.sigmoid(), targets), expected)
    show(nn.BCEWithLogitsLoss()(logits, targets), expected)
    large, zero = torch.tensor([300.0]), torch.tensor([0.0])
    show(nn.BCEWithLogitsLoss()(large, zero), 300.0)
    # sigmoid(300) is 1 in float32, and the log of 0 is cut at -100.
    show(nn.BCELoss()(large.sigmoid(), zero), 100.0)


@section("optimizer.steps", "N5")
def optimizer_steps() -> None:
    """An optimizer changes the weights by their gradients, to lower the loss.

    SGD steps against the gradient: w - lr * g. Momentum adds 0.9 times the last
    step. Adam, RMSprop and Adagrad divide the gradient by its usual size. Adam's
    steps are about lr. RMSprop's mean starts at 0, so that its first step is ten
    times lr. Adam, with its lr of 1e-3, is the usual start."""

    def descend(optimizer_class: type, **options) -> nn.Parameter:
        w = nn.Parameter(torch.zeros(2))
        optimizer = optimizer_class([w], lr=0.1, **options)
        for slope in (1, 2):  # in place of backward()
            w.grad = slope * torch.tensor([1.0, -1000.0])
            optimizer.step()
        return w

    show(descend(torch.optim.SGD), [-0.3, 300.0])
    way = 0.1 + (0.9 * 0.1 + 0.2)
    show(descend(torch.optim.SGD, momentum=0.9), [-way, 1000 * way])
    # Adam: running means of g and of g * g, made up for their start at 0
    mean = (0.9 * 0.1 * 1 + 0.1 * 2) / (1 - 0.9**2)
    square = (0.999 * 0.001 * 1 + 0.001 * 4) / (1 - 0.999**2)
    second = 0.1 * mean / math.sqrt(square)  # the first step is 0.1
    show(descend(torch.optim.Adam), [-0.1 - second, 0.1 + second])
    # AdamW: the same, and each step takes lr * 0.01 of the weight
    way = 0.1 * (1 - 0.1 * 0.01) + second
    show(descend(torch.optim.AdamW), [-way, way])
    # RMSprop: the running mean of g * g, from 0
    way = 0.1 / math.sqrt(0.01) + 0.2 / math.sqrt(0.99 * 0.01 + 0.01 * 4)
    show(descend(torch.optim.RMSprop), [-way, way])
    # Adagrad: the sum of g * g, so it slows down
    way = 0.1 / math.sqrt(1) + 0.2 / math.sqrt(1 + 4)
    show(descend(torch.optim.Adagrad), [-way, way])


@section("optimizer.decay", "N5")
def optimizer_decay() -> None:
    """Weight decay pulls weights to zero; AdamW does so in proportion.

    SGD and Adam add decay * w to the gradient. Adam then divides by its size,
    so any decay pulls alike. AdamW shrinks the weight itself."""

    def step(optimizer: type, decay: float, gradient: float = 0.0) -> float:
        w = torch.tensor(2.0, requires_grad=True)
        w.grad = torch.tensor(gradient)  # 0: nothing but the decay acts
        optimizer([w], lr=0.1, weight_decay=decay).step()
        return w.item()

    show(step(torch.optim.SGD, 0.5), 2 - 0.1 * (0.5 * 2), rtol=1e-6)
    show(step(torch.optim.Adam, 0.5), 2 - 0.1, rtol=1e-6)
    show(step(torch.optim.Adam, 0.01), 2 - 0.1, rtol=1e-6)  # the same
    show(step(torch.optim.AdamW, 0.01), 2 * (1 - 0.1 * 0.01), rtol=1e-6)
    # Adam's first step of lr comes on top, whatever the gradient's size.
    show(step(torch.optim.AdamW, 0.01, gradient=5.0), 2 * (1 - 0.1 * 0.01) - 0.1, rtol=1e-6)


@section("optimizer.lbfgs", "N5")
def optimizer_lbfgs() -> None:
    """LBFGS learns the curvature from its steps: for small, smooth problems.

    It evaluates the loss several times in a step, so it takes a closure."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (w[0] - 3) ** 2 + 2 * (w[1] - 4) ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    # The gradient at (1, -2) is (-2, -24). The first step is g / sum(|g|).
    show(w, [1 + 2 / 26, -2 + 24 / 26], rtol=1e-5)
    for _ in range(10):
        optimizer.step(closure)
    show(w, [3.0, 4.0], atol=1e-3)


@section("train.by_hand", "M1")
def train_by_hand(device: torch.device) -> None:
    """Training is five steps, again and again. Trainer does the same.

    Here a line is fitted to points on y = 3 x + 2."""
    x = torch.linspace(-1, 1, 65, device=device)[:, None]  # (65, 1)
    y = 3 * x + 2
    model = nn.Linear(1, 1).to(device)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for epoch in range(101):
        outputs = model(x)  # 1. predict
        loss = F.mse_loss(outputs, y)  # 2. compare
        optimizer.zero_grad()  # 3. clear the old gradients
        loss.backward()  # 4. compute the new ones
        optimizer.step()  # 5. change the weights
        losses.append(loss.item())
        if epoch % 20 == 0:
            print(f"epoch {epoch:3}: loss {losses[-1]:.2e}")
    show((model.weight.item(), model.bias.item()), (3.0, 2.0), atol=1e-4)
    # A loader is anything that gives batches: here a list of one.
    optimizer = torch.optim.SGD(other.parameters(), lr=0.2)
    trainer = tb.Trainer(other, nn.MSELoss(), optimizer, device)
    history = trainer.fit([(x, y)], num_epochs=101, verbose=False)
    show(history["train_loss"] == losses, True)  # bit for bit


@section("train.symmetry", "M2")
def train_symmetry() -> None:
    """Weights must start at random: equal units stay equal for ever.

    Units with equal weights get equal gradients. However many there are, the
    layer can do no more than one of them. XOR needs two."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])

    def learn(model: nn.Sequential) -> tuple[int, bool]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        trainer = tb.Trainer(model, nn.MSELoss(), optimizer)
        history = trainer.fit([(x, y)], num_epochs=300, verbose=False)
        units = model[0].weight.detach().round(decimals=4).unique(dim=0)
        return len(units), history["train_loss"][-1] < 0.01

    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    equal = copy.deepcopy(model)
    for parameter in equal.parameters():
        nn.init.constant_(parameter, 0.5)
    # how many of the 8 units differ, and whether XOR was learnt
    show(learn(equal), (1, False))
    show(learn(model), (8, True))


@section("train.one_batch", "M5")
def train_one_batch(device: torch.device) -> None:
    """First test of a new model: can it learn one batch by heart?

    If it cannot, something is wrong: the loss, the labels, a layer without
    gradient, or the learning rate. GradientMonitor reports the last."""
    images, labels = tb.draw_digits(32)  # uint8 (32, 1, 28, 28)
    x, y = (images / 255).to(device), labels.to(device)

    def learn(lr: float, clip: float = math.inf, start: float = 1.0):
        torch.manual_seed(0)
        model = tb.SimpleNet().to(device)  # 784 pixels, 128, 64 and 10 units
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        monitor = tb.GradientMonitor(model, optimizer, every=1)
        # The rate rises from start * lr to lr in 50 steps.
        schedule = tb.warmup_lr_scheduler(optimizer, 50, start)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            # scales the gradient down if its norm is above `clip`
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
        for problem, where in monitor.problems.items():
            print(f"{problem}, first in {where}")
        learnt = torch.equal(model(x).argmax(1), y)
        return learnt, "too high" in monitor.problems

    # whether it learnt the batch, and whether the rate was reported
    show(learn(lr=0.1), (True, False))
    show(learn(lr=0.4), (False, True))
    # Remedies: a lower rate, as above, a limit for the gradient's norm, or
    # warm-up, which makes the first steps small.
    show(learn(lr=0.4, clip=0.5), (True, False))
    show(learn(lr=0.4, start=0.01), (True, False))


@section("train.accumulate", "P4", "W7")
def train_accumulate() -> None:
    """If a batch does not fit into memory, cut it up: backward adds to .grad.

    A loss is a mean, so weight each part by its share of the targets: 1/8 for
    8 parts of 4 samples. Padded texts hold unequal numbers of tokens, and the
    mean of their means would give short texts too much weight."""
    model = nn.Linear(3, 5)
    x, y = torch.randn(32, 3), torch.randint(5, (32,))

    def by_parts(size: int, weights: list[float]) -> torch.Tensor:
        model.zero_grad()
        for i, weight in enumerate(weights):
            part = slice(i * size, (i + 1) * size)
            (F.cross_entropy(model(x[part]), y[part]) * weight).backward()
        return model.weight.grad

    # by hand, for each sample: (probabilities - right class) times x
    error = (model(x).softmax(1) - F.one_hot(y, 5)).detach()
    show(by_parts(4, [1 / 8] * 8), error.T @ x / 32)

    # Now 4 texts of up to 8 tokens; the loss ignores class -100, the padding.
    tokens = [8, 1, 4, 3]
    for text, count in enumerate(tokens):
        y[8 * text + count : 8 * text + 8] = -100
    whole = error[y >= 0].T @ x[y >= 0] / 16
    show(by_parts(8, [count / 16 for count in tokens]), whole)
    off = ((by_parts(8, [1 / 4] * 4) - whole).norm() / whole.norm()).item()
    print(f"the mean of means is off by {off:.0%}")
    show(off > 0.1, True)

    # Trainer counts the targets: its step over 4 parts is -lr * whole.
    expected = model.weight.detach() - 0.1 * whole
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, accumulate=4)
    trainer.train_one_epoch(list(zip(x.split(8), y.split(8), strict=True)))
    show((model.weight - expected).abs().max(), 0.0)


@section("layer.convolution", "N1")
def layer_convolution() -> None:
    """A convolution slides small weights, the kernel, over its input.

    The same few weights everywhere: few parameters, and a pattern is found
    wherever it is. n values become (n + 2 padding - kernel) // stride + 1."""
    signal = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])  # (B, C, length)
    layer = nn.Conv1d(1, 1, kernel_size=3, bias=False)
    layer.weight.data = torch.tensor([[[1.0, 0.0, -1.0]]])
    show(layer(signal), [[[1 - 4.0, 2 - 8.0]]])

    image = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])
    layer = nn.Conv2d(1, 1, kernel_size=2, bias=False)
    layer.weight.data = torch.tensor([[[[1.0, 0.0], [0.0, -1.0]]]])
    # each pixel minus the one below and to the right
    show(layer(image), [[[[1 - 16.0, 2 - 32.0]]]])

    # 8 kernels of 5 * 5 on each of 3 channels
    layer = nn.Conv2d(3, 8, kernel_size=5, padding=1, stride=2)
    show(tb.count_parameters(layer), 8 * (3 * 5 * 5 + 1))
    show(layer(torch.zeros(4, 3, 28, 28)).shape, (4, 8, 13, 13))  # (28 + 2 - 5) // 2 + 1

    # Pooling summarises windows, without parameters. The adaptive one takes
    # the size of the output: images may differ in size.
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]])
    show(nn.MaxPool2d(2)(x), [[[[6.0, 8.0]]]])
    show(nn.AvgPool2d(2)(x), [[[[3.5, 5.5]]]])
    show(nn.AdaptiveAvgPool2d(1)(x), [[[[4.5]]]])


@section("layer.norm", "N1", "N3")
def layer_norm() -> None:
    """BatchNorm brings each feature to mean 0 and deviation 1.

    In training it uses the batch and keeps running averages. After
    model.eval() it uses those, so that a prediction does not depend on what
    else is in the batch. Forgetting eval() is a common mistake."""
    layer = nn.BatchNorm1d(1)
    x = torch.tensor([[1.0], [2.0], [6.0]])  # (B, features)
    # mean 3, squared deviations 4 + 1 + 9 = 14
    spread = math.sqrt(14 / 3 + 1e-5)  # 1e-5 avoids a division by 0
    show(layer(x), [[-2 / spread], [-1 / spread], [3 / spread]])
    # Running averages start at mean 0 and variance 1 and move by a tenth;
    # this variance is 14 / (3 - 1).
    show((layer.running_mean, layer.running_var), ([0.3], [0.9 + 0.7]))
    by_running = [[(v - 0.3) / math.sqrt(1.6 + 1e-5)] for v in (1, 2, 6)]
    show(layer.eval()(x), by_running)
    layer.train()
    show_error(lambda: layer(x[:1]), ValueError, "more than 1 value per channel")

    # In images each channel is a feature: mean 2 and 20, variance 1 and 100.
    images = torch.tensor([[[[1.0, 3.0]], [[10.0, 30.0]]]])  # (B, C, H, W)
    layer = nn.BatchNorm2d(2)
    show(layer(images), [[[[-1.0, 1.0]], [[-1.0, 1.0]]]], atol=1e-4)
    show(tb.count_parameters(layer), 2 + 2)  # a scale and a shift for each

    # LayerNorm evens out each sample over its features. So it works for one
    # sample too, and training and evaluation are alike.
    x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    layer = nn.LayerNorm(2)
    show(layer(x), [[-1.0, 1.0], [-1.0, 1.0]], atol=1e-4)
    show(tb.count_parameters(layer), 2 + 2)


@section("layer.dropout", "N1", "N3")
def layer_dropout() -> None:
    """Dropout sets values to 0 at random, but only in training.

    So no unit can rely on one other. The rest is scaled up by 1 / (1 - p),
    which keeps the mean; evaluation changes nothing."""
    layer, x = nn.Dropout(0.25), torch.ones(100_000)
    dropped = layer(x)
    show(dropped.unique(), [0.0, 1 / 0.75])
    show((dropped == 0).float().mean(), 0.25, atol=0.01)
    show(torch.equal(layer.eval()(x), x), True)
    # Neighbouring pixels say nearly the same: Dropout2d drops channels.
    maps = nn.Dropout2d(0.5)(torch.ones(8, 16, 3, 3))
    show(maps.flatten(2).unique(dim=2).shape, (8, 16, 1))
    show(maps.unique(), [0.0, 2.0])
    # each of the 8 images loses other channels
    show(len(maps[:, :, 0, 0].unique(dim=0)), 8)


@section("layer.embedding", "N1")
def layer_embedding() -> None:
    """An embedding is a table: an index looks up a row, which is learnt."""
    layer = nn.Embedding(10, 4, padding_idx=0)
    vectors = layer(torch.tensor([[3, 7], [3, 0]]))  # (B, T) to (B, T, 4)
    row3, row7 = layer.weight[3].tolist(), layer.weight[7].tolist()
    show(vectors.tolist() == [[row3, row7], [row3, [0.0] * 4]], True)
    vectors.sum().backward()
    # Gradients reach the rows that were used; token 3 was used twice, and
    # the row for padding stays 0.
    show(layer.weight.grad[:, 0], [0.0, 0, 0, 2, 0, 0, 0, 1, 0, 0])


@section("layer.attention", "N1")
def layer_attention() -> None:
    """Attention mixes the values of all positions, by weights it computes.

    Each position asks with its query; the weights are the softmax of its
    products with all keys. Several heads do so on their share of the values."""
    layer = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
    x = torch.randn(1, 3, 4)  # (B, T, E)
    output, _ = layer(x, x, x)
    # By hand: one matrix makes queries, keys and values; head 1 takes the
    # first half of each, head 2 the rest; a last layer mixes the heads.
    qkv = x[0] @ layer.in_proj_weight.T + layer.in_proj_bias  # (T, 3 * E)
    heads = []
    for half in (slice(0, 2), slice(2, 4)):
        q, k, v = (part[:, half] for part in qkv.chunk(3, dim=1))
        weights = (q @ k.T / math.sqrt(2)).softmax(dim=1)  # (T, T)
        heads.append(weights @ v)
    mixed = torch.cat(heads, dim=1)  # (T, E)
    show(output[0], mixed @ layer.out_proj.weight.T + layer.out_proj.bias)
    show(tb.count_parameters(layer), 4 * (4 * 4 + 4))

    # A Transformer layer: attention, then two linear layers for each position.
    # Around each is a shortcut, x + ..., and a LayerNorm, so that dozens of
    # layers can be stacked.
    layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=8,
                                       dropout=0.0, batch_first=True)
    attended = layer.norm1(x + layer.self_attn(x, x, x)[0])
    hidden = layer.linear1(attended).relu()  # (B, T, 8)
    show(layer(x)[0], layer.norm2(attended + layer.linear2(hidden))[0])
    attention, feedforward, norms = 4 * (4 * 4 + 4), 8 * 5 + 4 * 9, 2 * (4 + 4)
    show(tb.count_parameters(layer), attention + feedforward + norms)


@section("layer.recurrent", "N1")
def layer_recurrent() -> None:
    """A recurrent layer goes through a sequence and carries a state along.

    Gates between 0 and 1 decide what of the state is kept, and what is new."""
    x = torch.randn(2, 5, 4)  # (B, T, inputs)
    lstm = nn.LSTM(4, 3, batch_first=True)
    h = c = torch.zeros(2, 3)  # hidden state and cell
    for t in range(5):
        gates = x[:, t] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
        gates = gates + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        take, keep, new, let_out = gates.chunk(4, dim=1)
        c = keep.sigmoid() * c + take.sigmoid() * new.tanh()
        h = let_out.sigmoid() * c.tanh()
    output, (hidden, cell) = lstm(x)  # of all times, and the last state
    show(output[:, -1], h)
    show(cell[0], c)
    show(torch.equal(output[:, -1], hidden[0]), True)
    gate = 3 * 4 + 3 * 3 + 2 * 3  # from input and state, and two biases
    show(tb.count_parameters(lstm), 4 * gate)

    gru = nn.GRU(4, 3, batch_first=True)  # three gates, and no cell
    show(tb.count_parameters(gru), 3 * gate)
    h = torch.zeros(2, 3)
    for t in range(5):
        inputs = x[:, t] @ gru.weight_ih_l0.T + gru.bias_ih_l0
        states = h @ gru.weight_hh_l0.T + gru.bias_hh_l0
        reset, keep = (inputs + states)[:, :6].sigmoid().chunk(2, dim=1)
        new = (inputs[:, 6:] + reset * states[:, 6:]).tanh()
        h = keep * h + (1 - keep) * new
    show(gru(x)[0][:, -1], h)


@section("model.package", "N2")
def model_package() -> None:
    """Networks to start from: NeuralNetwork, MLP, SimpleNet, CNN and MNISTNet.

    They give logits (B, classes). Their sizes are sums over their layers."""

    def linear(n: int, m: int) -> int:
        return m * (n + 1)

    def conv(n: int, m: int) -> int:
        return m * (n * 3 * 3 + 1) + 2 * m  # 3 * 3 kernels, and a BatchNorm

    def check(model: nn.Module, *size: int) -> tuple[int, torch.Size]:
        # two samples, whose logits must differ: unique drops equal rows
        logits = model(torch.randn(2, *size)).unique(dim=0)
        return tb.count_parameters(model), logits.shape

    size = linear(784, 30) + linear(30, 20) + linear(20, 10)
    show(check(tb.NeuralNetwork(784, 10), 784), (size, (2, 10)))
    # with two BatchNorms of 16 features
    size = linear(784, 16) + linear(16, 16) + linear(16, 10) + 2 * (16 + 16)
    show(check(tb.MLP(784, 16, 10), 784), (size, (2, 10)))
    size = linear(784, 128) + linear(128, 64) + linear(64, 10)
    show(check(tb.SimpleNet(), 1, 28, 28), (size, (2, 10)))
    model = tb.SimpleNet()
    print(model)
    names = [name for name, _ in model.named_parameters()]
    layers = ("hidden.0", "hidden.1", "output")
    show(names, [f"{layer}.{p}" for layer in layers for p in ("weight", "bias")])
    x = torch.randn(2, 1, 28, 28)
    units = model.hidden[0](x.flatten(1)).relu()  # (B, 128)
    units = model.hidden[1](units).relu()  # (B, 64)
    show((model(x) - model.output(units)).abs().max(), 0.0)
    # two poolings leave 7 * 7 pixels, in 64 channels
    size = conv(1, 32) + conv(32, 64)
    size += linear(64 * 7 * 7, 128) + linear(128, 10)
    show(check(tb.CNN(), 1, 28, 28), (size, (2, 10)))
    size = conv(1, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64)
    size += linear(64 * 7 * 7, 256) + linear(256, 10)
    show(check(tb.MNISTNet(), 1, 28, 28), (size, (2, 10)))


@section("init.spread", "N7")
def init_spread(device: torch.device) -> None:
    """The start decides whether a signal survives many layers.

    A ReLU layer of n inputs multiplies the mean square by n * var(w) / 2:
    only a variance of 2 / n, Kaiming's, keeps it."""

    @torch.no_grad()
    def growth(fill, **options) -> float:
        x = torch.randn(256, 512, device=device).relu()
        first = x.square().mean()
        for _ in range(10):  # ten layers without bias
            w = fill(torch.empty(512, 512, device=device), **options)
            x = (x @ w.T).relu()
        return ((x.square().mean() / first) ** 0.1).item()  # per layer

    show(growth(nn.init.kaiming_normal_, nonlinearity="relu"), 1.0, rtol=0.15)
    show(growth(nn.init.xavier_normal_), 0.5, rtol=0.15)  # variance 1 / n
    show(growth(nn.init.normal_, std=0.02), 512 * 0.02**2 / 2, rtol=0.15)

    # model.apply(init_weights) gives each kind of layer the start it needs.
    linear, conv = nn.Linear(300, 100), nn.Conv2d(16, 64, 3)
    table, norm = nn.Embedding(200, 100), nn.LayerNorm(3)
    nn.ModuleList([linear, conv, table, norm]).apply(tb.init_weights)
    # Xavier: uniform up to a bound
    show(linear.weight.max(), math.sqrt(6 / (300 + 100)), rtol=0.01)
    # Kaiming: normal, deviation sqrt(2 / (channels out * kernel))
    show(conv.weight.std(), math.sqrt(2 / (64 * 3 * 3)), rtol=0.05)
    show(table.weight.std(), 0.02, rtol=0.05)
    show((norm.weight, norm.bias), ([1.0] * 3, [0.0] * 3))


@section("schedule.shapes", "N6")
def schedule_shapes() -> None:
    """A schedule changes the learning rate: high at first, low at the end.

    Call its step() after the optimizer's, once per epoch; once per batch for
    OneCycleLR and for warm-ups."""

    def rates(make) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, found = make(optimizer), []
        for _ in range(7):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    step = partial(lr_scheduler.StepLR, step_size=2, gamma=0.1)
    show(rates(step), [1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.001])
    # half a cosine wave in 3 steps, (1 + cos(pi * t / 3)) / 2, and back again
    wave = [1.0, 0.75, 0.25, 0.0]
    cosine = partial(lr_scheduler.CosineAnnealingLR, T_max=3)
    show(rates(cosine), [*wave, 0.25, 0.75, 1.0])
    warmup = partial(lr_scheduler.LinearLR, start_factor=0.25, total_iters=3)
    show(rates(warmup), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])

    def warmup_cosine(optimizer):  # the usual one for Transformers
        parts = [warmup(optimizer), cosine(optimizer)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])

    show(rates(warmup_cosine), [0.25, 0.5, 0.75, *wave])
    # From max_lr / 25 up, by default in 30% of the steps, and far down.
    one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=7,
                        pct_start=4 / 7)
    low, end = 1 / 25, 1 / 25 / 1e4
    up = [1 - (1 - low) * part for part in wave]
    down = [end + (1 - end) * part for part in wave[1:]]
    show(rates(one_cycle), up + down, rtol=1e-6)

    # ReduceLROnPlateau lowers the rate after more than `patience` epochs that
    # bring no better loss.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    found = []
    for loss in (5.0, 4.0, 4.0, 4.0, 4.0, 3.0):
        plateau.step(loss)
        found.append(optimizer.param_groups[0]["lr"])
    show(found, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5])


@section("train.overfitting", "M3")
def train_overfitting(device: torch.device) -> None:
    """A network can learn 100 digits by heart, and know others less well.

    The gap between validation and training loss shows it. Four remedies."""
    images, labels = tb.draw_digits(500)  # drawn by torchbasics, not MNIST

    def gap(dropout=0.0, decay=0.0, augment=None, stopping=None) -> float:
        torch.manual_seed(0)
        train = tb.TensorLoader(images[:100], labels[:100], 50, shuffle=True,
                                device=device, augment=augment)
        others = tb.TensorLoader(images[100:], labels[100:], 400, device=device)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(),
                              nn.Dropout(dropout), nn.Linear(256, 10))
        optimizer = torch.optim.AdamW(model.to(device).parameters(), 3e-3,
                                      weight_decay=decay)
        trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, device,
                             early_stopping=stopping)
        trainer.fit(train, others, num_epochs=50, verbose=False)
        train.augment = None  # judge on the images as they are
        loss, known = trainer.validate(train)
        other_loss, unknown = trainer.validate(others)
        print(f"{trainer.epoch} epochs: training {loss:.3f} ({known:.0%}),",
              f"validation {other_loss:.3f} ({unknown:.0%})")
        return other_loss - loss

    plain = gap()
    show(plain > 0.7, True)  # all learnt by heart, a quarter of the rest wrong
    show(gap(dropout=0.8) < 0.9 * plain, True)
    show(gap(decay=3.0) < 0.9 * plain, True)  # far more than the usual 0.01
    # turned and shifted a little: never the same digit twice
    show(gap(augment=tb.RandomAffine(degrees=10, shift=0.1)) < 0.7 * plain, True)
    # stops at the third epoch without a better validation loss
    show(gap(stopping=tb.EarlyStopping(patience=3)) < 0.9 * plain, True)


@section("save.state_dict", "L14")
def save_state_dict(device: torch.device) -> None:
    """Save the state_dict, not the model.

    A saved model holds the path of its class: move the class, and the file is
    lost. Loading one runs what the file says, so torch.load refuses. A
    state_dict is tensors and names, and nothing can run."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.pt"
    model = tb.MLP(4, 3, 2).to(device).eval()
    torch.save(model, path)
    show_error(lambda: torch.load(path), Exception, "Weights only load failed")

    torch.save(model.state_dict(), path)
    other = tb.MLP(4, 3, 2).to(device).eval()  # the same sizes, other weights
    x = torch.randn(5, 4, device=device)
    other.load_state_dict(torch.load(path, map_location=device))
    show(torch.equal(other(x), model(x)), True)

    # A checkpoint is a dict: with the optimizer, training can go on.
    # save_checkpoint also seals the file: load_checkpoint notices damage.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    tb.save_checkpoint({"epoch": 3, "optimizer": optimizer.state_dict()}, path)
    checkpoint = tb.load_checkpoint(path)
    show(checkpoint["epoch"], 3)
    show(checkpoint["optimizer"]["param_groups"][0]["lr"], 0.5)
    folder.cleanup()


@section("transfer.freeze", "N8")
def transfer_freeze(device: torch.device) -> None:
    """Transfer: freeze the body, replace the head, and train that alone.

    The body of a trained model already sees edges and shapes, so few images
    are enough. Here it is torchvision's resnet18."""
    from torchvision.models import resnet18  # slow to import

    model = resnet18(weights=None).to(device)  # for use: weights="DEFAULT"

    def stage(n: int, m: int) -> int:
        # four 3 * 3 convolutions and norms; a shortcut where channels change
        shortcut = n * m + 2 * m if n != m else 0
        return (n * m + 3 * m * m) * 3 * 3 + 4 * 2 * m + shortcut

    sizes = {"conv1": 3 * 64 * 7 * 7, "bn1": 2 * 64, "layer1": stage(64, 64),
             "layer2": stage(64, 128), "layer3": stage(128, 256),
             "layer4": stage(256, 512), "fc": 1000 * (512 + 1)}
    show({name: tb.count_parameters(getattr(model, name)) for name in sizes}, sizes)
    show(tb.count_parameters(model), 11_689_512)

    tb.freeze(model).eval()  # also stops the averages of BatchNorm
    model.fc = nn.Linear(512, 2).to(device)  # new layers are trainable
    before = copy.deepcopy(model.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    show(sum(p.numel() for p in trainable), 2 * (512 + 1))
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    images = torch.randn(4, 3, 32, 32, device=device)
    model(images).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    changed = [name for name, value in after.items()
               if not torch.equal(value, before[name])]
    show(changed, ["fc.weight", "fc.bias"])


@section("ensemble.mean", "N10")
def ensemble_mean() -> None:
    """An ensemble's prediction is the mean of its members' probabilities.

    Members that err in different places do better together. Here each is
    trained on other samples."""
    images, labels = tb.draw_digits(1000)
    x, y = images / 255, labels
    members = []
    for _ in range(5):
        drawn = torch.randint(200, (100,))
        model = tb.SimpleNet()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer)
        trainer.fit([(x[drawn], y[drawn])], num_epochs=30, verbose=False)
        members.append(model)

    x, y = x[200:], y[200:]  # that none has seen
    together = tb.EnsembleModel(members)(x)
    outputs = [member(x) for member in members]
    mean = sum(output.softmax(1) for output in outputs) / 5
    show((together.softmax(1) - mean).abs().max(), 0.0, atol=1e-5)
    losses = [F.cross_entropy(output, y).item() for output in outputs]
    loss = F.cross_entropy(together, y).item()
    print(f"members: {min(losses):.3f} to {max(losses):.3f},",
          f"together: {loss:.3f}")
    show(loss < min(losses), True)


@section("compile.graph", "M4")
def compile_graph(device: torch.device) -> None:
    """torch.compile records a function as a graph of tensor operations.

    What depends on values breaks the graph: Python must look at them. Then
    there are several small graphs, and less is gained."""
    graphs = []

    def note(graph, inputs):  # a backend: gets the graph, returns a function
        graphs.append(graph)
        return graph.forward

    def broken(x):
        y = x * 2
        if y.sum() > 0:  # a question for Python
            return y + 1
        return y - 1

    x = torch.tensor([0.0, 1.0, 2.0], device=device)
    show(torch.compile(broken, backend=note)(x), [1.0, 3.0, 5.0])
    show(len(graphs), 2)  # the one before the question, one after it
    # fullgraph=True makes an error of a break, to find it. Often torch.where
    # can choose without a question.
    torch.compiler.reset()  # forget what is compiled already
    strict = torch.compile(broken, backend=note, fullgraph=True)
    show_error(lambda: strict(x), RuntimeError, "Data-dependent branching")

    # The default backend writes C++ or Triton. It needs a compiler, and a first
    # call takes seconds, or half a minute; profile.py measures what you gain.
    model = nn.Linear(3, 2).to(device)
    try:
        outputs = torch.compile(model)(x)
    except RuntimeError as error:
        if "compiler" in str(error).lower() or "triton" in str(error).lower():
            skip("needs g++ or clang (CPU) or Triton (GPU); was not compiled")
        raise
    show(outputs, x @ model.weight.T + model.bias, atol=1e-3)


@section("parallel.data_parallel", "N11")
def parallel_data_parallel() -> None:
    """On several GPUs each computes the gradient of its part of the batch.

    DistributedDataParallel keeps a process per GPU, each with its copy of the
    model, and averages gradients while backward runs (scripts/train_ddp.py).
    It replaced DataParallel, which copies the model in each forward pass and
    whose threads share one interpreter. It still works, for a first try."""
    if not torch.cuda.is_available():
        skip("needs a CUDA GPU; DataParallel was not run")
    model = nn.Linear(4, 2).to("cuda:0")
    wrapped = nn.DataParallel(model)
    x = torch.randn(6, 4, device="cuda:0")
    show(wrapped(x), x @ model.weight.T + model.bias, atol=1e-3)
    # The names get a prefix: save wrapped.module, which is the model.
    show(list(wrapped.state_dict()), ["module.weight", "module.bias"])


def main(argv: list[str] | None = None) -> int:
    """Run the lessons that the arguments name and return the exit code."""
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())

"""Networks, from one linear layer to transfer and compilation: lessons that print their code and check what they show.

    python scripts/nn_demo.py
    python scripts/nn_demo.py --section loss.cross_entropy --section train.by_hand

Try: in optimizer.sgd, change lr=0.1 to lr=2.5 in the first optimizer. Each step multiplies the weights by
1 - lr = -1.5, so they overshoot zero and grow, and the line that shows them turns to ✗.
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
from itertools import pairwise
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

    It holds its parameters: weights W, one row for each output, and a bias
    b for each output. They start at random; training changes them."""
    layer = nn.Linear(3, 2)
    show(layer.weight.shape, (2, 3))
    with torch.no_grad():  # set them by hand, to know what comes out
        layer.weight.copy_(torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    x = torch.tensor([[1.0, 2.0, 3.0]])  # (B, 3): one sample
    # 1 - 3 + 10 = 8 and 2 + 2 + 20 = 24
    show(layer(x), [[8.0, 24.0]])
    # Each row of a batch is a sample and is treated alone.
    show(layer(torch.cat([x, 2 * x])), [[8.0, 24.0], [6.0, 28.0]])
    # 3 weights and a bias for each of the 2 outputs
    show(sum(p.numel() for p in layer.parameters()), 2 * (3 + 1))
    wrong = torch.zeros(1, 5)
    show_error(lambda: layer(wrong), RuntimeError, "cannot be multiplied")


@section("layer.activation", "N1")
def layer_activation() -> None:
    """Between linear layers stands a function that is not linear.

    Without it two layers do no more than one, however many units they have."""
    x = torch.tensor([-1.0, 0.0, 2.0])
    show(nn.ReLU()(x), [0.0, 0.0, 2.0])  # negative values become 0
    by_hand = [1 / (1 + math.exp(-v)) for v in (-1, 0, 2)]
    show(nn.Sigmoid()(x), by_hand)  # between 0 and 1
    show(nn.Tanh()(x), [math.tanh(v) for v in (-1, 0, 2)])
    first = nn.Linear(3, 4, bias=False)
    second = nn.Linear(4, 2, bias=False)
    one_matrix = second.weight @ first.weight  # (2, 3)
    show(second(first(x)), one_matrix @ x)
    with_relu = second(first(x).relu())
    show(torch.allclose(with_relu, one_matrix @ x), False)


@section("model.containers", "N2")
def model_containers(device: torch.device) -> None:
    """Sequential chains layers; an OrderedDict gives them names."""
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    show(list(plain.state_dict()), ["0.weight", "0.bias", "2.weight", "2.bias"])
    layers = [("hidden", nn.Linear(4, 3)), ("relu", nn.ReLU()),
              ("output", nn.Linear(3, 2))]
    named = nn.Sequential(OrderedDict(layers))
    show([name for name, _ in named.named_children()], ["hidden", "relu", "output"])
    named.hidden.load_state_dict(plain[0].state_dict())
    named.output.load_state_dict(plain[2].state_dict())
    # .to(device) moves all parameters, so the inputs must be there as well.
    plain.to(device)
    x = torch.randn(2, 4, device=device)  # (B, 4)
    hidden = (x @ plain[0].weight.T + plain[0].bias).clamp(min=0)
    by_hand = hidden @ plain[2].weight.T + plain[2].bias  # (B, 2)
    show(plain(x), by_hand, rtol=0, atol=1e-4)
    show(named.to(device)(x), by_hand, rtol=0, atol=1e-4)


@section("model.own", "N2")
def model_own() -> None:
    """A model of your own is a class: layers in __init__, their use in forward.

    A module finds the layers that are its attributes. In a Python list they
    are hidden: the optimizer gets nothing, .to() and state_dict() miss
    them. ModuleList is a list that registers what it holds."""

    class Stack(nn.Module):
        def __init__(self, container: type) -> None:
            super().__init__()
            self.layers = container([nn.Linear(4, 3), nn.Linear(3, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    good, bad = Stack(nn.ModuleList), Stack(list)
    names = [name for name, _ in good.named_parameters()]
    show(names, [f"layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")])
    show(tb.count_parameters(good), (4 * 3 + 3) + (3 * 2 + 2))
    show(tb.count_parameters(bad), 0)
    show(good(torch.randn(5, 4)).shape, (5, 2))


@section("model.structure", "N2")
def model_structure() -> None:
    """print(model) shows the layers; count_parameters_by_layer their sizes."""
    model = tb.NeuralNetwork(50, 3)
    print(model)
    kinds = [type(layer).__name__ for layer in model.layers]
    show(kinds, ["Linear", "ReLU", "Linear", "ReLU", "Linear"])
    counts = tb.count_parameters_by_layer(tb.SimpleNet(), verbose=False)
    # Images of 28 * 28 = 784 pixels, hidden layers of 128 and 64 units, 10
    # classes. Each output of a layer has n weights and a bias: m * (n + 1).
    show(counts["hidden.0"], 128 * (784 + 1))
    show(counts["hidden.1"], 64 * (128 + 1))
    show(counts["output"], 10 * (64 + 1))
    show(tb.count_parameters(tb.SimpleNet()), sum(counts.values()))


@section("predict.softmax", "N9")
def predict_softmax() -> None:
    """softmax turns a classifier's outputs, the logits, into probabilities.

    The largest one names the class, and how sure the model is."""
    logits = torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 5.0]])
    probabilities = logits.softmax(dim=1)  # (B, classes)
    total = math.exp(2) + math.exp(1) + math.exp(0.1)
    show(probabilities[0], [math.exp(v) / total for v in (2, 1, 0.1)])
    show(probabilities.sum(dim=1), [1.0, 1.0])
    confidence, predicted = probabilities.max(dim=1)
    show(predicted, [0, 2])
    show(confidence[1], math.exp(5) / (2 + math.exp(5)))
    # To find the class alone, the logits are enough.
    show(logits.argmax(dim=1), [0, 2])
    # Only differences count. exp(1000) alone would be infinite.
    show((logits + 1000).softmax(dim=1)[1], probabilities[1])


@section("loss.regression", "N4")
def loss_regression() -> None:
    """A loss is one number to lower: how far predictions are from targets.

    Squared errors make outliers heavy, absolute errors do not. SmoothL1 is
    squared below 1 and straight above."""
    prediction = torch.tensor([1.0, 2.0, 6.0])
    target = torch.tensor([1.0, 2.5, 3.0])
    # the errors: 0, -0.5 and 3
    show(nn.MSELoss()(prediction, target), (0 + 0.5**2 + 3**2) / 3)
    show(nn.L1Loss()(prediction, target), (0 + 0.5 + 3) / 3)
    # d * d / 2 below 1, |d| - 1/2 above
    show(nn.SmoothL1Loss()(prediction, target), (0 + 0.125 + 2.5) / 3)
    show(nn.MSELoss(reduction="sum")(prediction, target), 0.25 + 9)
    # Each loss is also a function: F.mse_loss, F.cross_entropy, ...
    show(F.l1_loss(prediction, target), 3.5 / 3)


@section("loss.own", "N4")
def loss_own() -> None:
    """A loss of your own is a module whose forward returns a scalar."""

    class SquaredAndAbsolute(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, prediction: torch.Tensor, target: torch.Tensor):
            error = prediction - target
            return error.square().mean() + self.weight * error.abs().mean()

    prediction = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    target = torch.tensor([1.0, 2.5, 3.0])
    loss = SquaredAndAbsolute(weight=0.5)(prediction, target)
    show(loss, 9.25 / 3 + 0.5 * 3.5 / 3)
    loss.backward()
    # (2 d + 0.5 sign(d)) / 3 for the errors 0, -0.5 and 3
    show(prediction.grad, [0.0, (-1 - 0.5) / 3, (6 + 0.5) / 3])
    # The package has this one, too.
    show(tb.CustomLoss(0.5)(prediction, target), 9.25 / 3 + 0.5 * 3.5 / 3)


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
    each = nn.CrossEntropyLoss(reduction="none")(logits, targets)
    show(each, [first, second])
    # A model that knows nothing loses log(10) on ten classes: what the first
    # batch of a new classifier should show.
    show(F.cross_entropy(torch.zeros(1, 10), torch.tensor([3])), math.log(10))
    # The classic mistake: softmax before the loss, which has one already. It
    # runs, but even a perfect model would keep losing.
    sure = torch.tensor([[100.0, 0.0, 0.0]])
    show(F.cross_entropy(sure, torch.tensor([0])), 0.0)
    twice = F.cross_entropy(sure.softmax(1), torch.tensor([0]))
    show(twice, math.log(math.e + 2) - 1)


@section("loss.nll", "N4")
def loss_nll() -> None:
    """NLLLoss takes log-probabilities: after log_softmax it is cross-entropy."""
    logits = torch.tensor([[2.0, 1.0, 0.1]])
    log_p = logits.log_softmax(dim=1)
    total = math.exp(2) + math.exp(1) + math.exp(0.1)
    show(log_p[0], [v - math.log(total) for v in (2, 1, 0.1)])
    target = torch.tensor([1])
    show(nn.NLLLoss()(log_p, target), math.log(total) - 1)
    show(nn.CrossEntropyLoss()(logits, target), math.log(total) - 1)


@section("loss.smoothing", "N4")
def loss_smoothing() -> None:
    """Label smoothing asks for a little less than certainty.

    With e = 0.1 the right class should get 1 - e, and e is spread over all
    classes, so that no logit must grow for ever."""
    p = [0.7, 0.2, 0.1]
    logits, target = torch.tensor([p]).log(), torch.tensor([0])
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target)
    show(smoothed, -0.9 * math.log(0.7) - 0.1 / 3 * sum(map(math.log, p)))
    # Targets may also be probabilities: the same, written out.
    wanted = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    show(nn.CrossEntropyLoss()(logits, wanted), smoothed)


@section("loss.binary", "N4")
def loss_binary() -> None:
    """For yes or no: BCELoss takes probabilities, BCEWithLogitsLoss logits.

    Prefer the second: it also survives large logits."""
    logits = torch.tensor([2.0, -1.0])
    targets = torch.tensor([1.0, 0.0])  # floats
    yes, no = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    expected = -(math.log(yes) + math.log(1 - no)) / 2
    show(nn.BCELoss()(logits.sigmoid(), targets), expected)
    show(nn.BCEWithLogitsLoss()(logits, targets), expected)
    large, zero = torch.tensor([300.0]), torch.tensor([0.0])
    show(nn.BCEWithLogitsLoss()(large, zero), 300.0)
    # sigmoid(300) is 1 in float32, and the log of 0 is cut at -100.
    show(nn.BCELoss()(large.sigmoid(), zero), 100.0)


@section("optimizer.sgd", "N5")
def optimizer_sgd() -> None:
    """An optimizer changes the weights by their gradients, to lower the loss.

    SGD steps against the gradient: w - lr * g. Momentum keeps a velocity
    v = 0.9 v + g and steps along it: w - lr * v."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (w**2 / 2).sum().backward()  # the gradient is w itself
        optimizer.step()
    # each step multiplies by 1 - lr
    show(w, [0.9**3, -2 * 0.9**3])

    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (w**2 / 2).sum().backward()
        optimizer.step()
    by_hand, velocity = 1.0, 0.0
    for _ in range(3):
        velocity = 0.9 * velocity + by_hand
        by_hand -= 0.1 * velocity
    show(w, [by_hand, -2 * by_hand])


@section("optimizer.adam", "N5")
def optimizer_adam() -> None:
    """Adam divides a mean of the gradients by their usual size.

    So its steps are about lr, however large or small the gradients are. It
    is the usual start; the default lr is 1e-3."""
    w = torch.tensor([1.0, -2000.0], requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.1)
    after = []
    for _ in range(3):
        optimizer.zero_grad()
        (w**2 / 2).sum().backward()  # the gradient is w itself
        optimizer.step()
        after.append(w.tolist())
    show(after[0], [1 - 0.1, -2000 + 0.1], rtol=1e-6, atol=0)
    by_hand = [1.0, -2000.0]
    for i in (0, 1):
        mean = square = 0.0
        for t in (1, 2, 3):
            mean = 0.9 * mean + 0.1 * by_hand[i]
            square = 0.999 * square + 0.001 * by_hand[i] ** 2
            # Both start at 0, which these divisions make up for.
            m, s = mean / (1 - 0.9**t), square / (1 - 0.999**t)
            by_hand[i] -= 0.1 * m / (math.sqrt(s) + 1e-8)
    show(after[2], by_hand, rtol=1e-6, atol=0)


@section("optimizer.decay", "N5")
def optimizer_decay() -> None:
    """Weight decay pulls weights to zero; AdamW does so in proportion.

    SGD and Adam add decay * w to the gradient. Adam then divides by its
    size, so any decay pulls alike. AdamW shrinks the weight itself."""

    def step(optimizer: type, decay: float) -> float:
        w = torch.tensor(2.0, requires_grad=True)
        w.grad = torch.zeros_like(w)  # so that nothing but the decay acts
        optimizer([w], lr=0.1, weight_decay=decay).step()
        return w.item()

    show(step(torch.optim.SGD, 0.5), 2 - 0.1 * (0.5 * 2), rtol=1e-6, atol=0)
    show(step(torch.optim.Adam, 0.5), 2 - 0.1, rtol=1e-6, atol=0)
    show(step(torch.optim.Adam, 0.01), 2 - 0.1, rtol=1e-6, atol=0)  # the same
    show(step(torch.optim.AdamW, 0.5), 2 * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)
    show(step(torch.optim.AdamW, 0.01), 2 * (1 - 0.1 * 0.01), rtol=1e-6, atol=0)


@section("optimizer.adaptive", "N5")
def optimizer_adaptive() -> None:
    """RMSprop divides by a running mean of squares, Adagrad by their sum.

    Adagrad's sum only grows, so it slows down."""

    def descend(optimizer_class: type) -> list[float]:
        w = torch.tensor(1.0, requires_grad=True)
        optimizer, after = optimizer_class([w], lr=0.1), []
        for _ in range(2):
            optimizer.zero_grad()
            (w**2 / 2).backward()  # the gradient is w itself
            optimizer.step()
            after.append(w.item())
        return after

    # The running mean 0.99 v + 0.01 g * g starts at 0, so the first step is
    # 0.1 * 1 / sqrt(0.01) = 1 and reaches 0, where the gradient is 0.
    show(descend(torch.optim.RMSprop), [0.0, 0.0], rtol=0, atol=1e-6)
    # 1 - 0.1 * 1 / 1, then a gradient of 0.9
    second = 0.9 - 0.1 * 0.9 / math.sqrt(1 + 0.9**2)
    show(descend(torch.optim.Adagrad), [0.9, second], rtol=1e-6, atol=0)


@section("optimizer.lbfgs", "N5")
def optimizer_lbfgs() -> None:
    """LBFGS learns the curvature from its steps: for small, smooth problems.

    It evaluates the loss several times in a step, so it takes a closure."""

    def minimise(**options) -> list[float]:
        w = torch.tensor([1.0, -2.0], requires_grad=True)
        optimizer = torch.optim.LBFGS([w], **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = 0.5 * (w[0] - 3) ** 2 + 2 * (w[1] - 4) ** 2
            loss.backward()
            return loss

        optimizer.step(closure)
        return w.tolist()

    # The gradient at (1, -2) is (-2, -24). The first step is g / sum(|g|).
    show(minimise(max_iter=1), [1 + 2 / 26, -2 + 24 / 26], rtol=1e-5, atol=0)
    best = minimise(max_iter=20, line_search_fn="strong_wolfe")
    show(best, [3.0, 4.0], rtol=0, atol=1e-3)


@section("train.by_hand", "M1")
def train_by_hand(device: torch.device) -> None:
    """Training is five steps, again and again. Trainer does the same.

    Here a line is fitted to points on y = 3 x + 2."""
    x = torch.linspace(-1, 1, 65, device=device)[:, None]  # (65, 1)
    y = 3 * x + 2
    model = nn.Linear(1, 1).to(device)
    start = copy.deepcopy(model)
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
    show(model.weight.item(), 3.0, rtol=0, atol=1e-4)
    show(model.bias.item(), 2.0, rtol=0, atol=1e-4)
    # For this data each step multiplies the bias's error by 1 - 2 lr and
    # the weight's by 1 - 2 lr * mean(x * x). So the loss is known:
    mean = sum((i / 32 - 1) ** 2 for i in range(65)) / 65
    w, b = start.weight.item() - 3, start.bias.item() - 2
    formula = [mean * (w * (1 - 0.4 * mean) ** t) ** 2 + (b * 0.6**t) ** 2
               for t in (0, 1, 20)]
    show([losses[0], losses[1], losses[20]], formula, rtol=1e-3, atol=0)
    # A loader is anything that gives batches: here a list of one.
    optimizer = torch.optim.SGD(start.parameters(), lr=0.2)
    trainer = tb.Trainer(start, nn.MSELoss(), optimizer, device)
    history = trainer.fit([(x, y)], num_epochs=101, verbose=False)
    show(history["train_loss"] == losses, True)  # bit for bit


@section("train.symmetry", "M2")
def train_symmetry() -> None:
    """Weights must start at random: equal units stay equal for ever.

    Units with equal weights get equal gradients. However many there are, the
    layer can do no more than one of them. XOR needs two."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    results = {}
    for name in ("constant", "random"):
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        if name == "constant":
            for parameter in model.parameters():
                nn.init.constant_(parameter, 0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        weights = model[0].weight.detach().round(decimals=4)
        different = len(weights.unique(dim=0))
        results[name] = (different, loss.item() < 0.01)
    # how many of the 8 units differ, and whether XOR was learnt
    show(results["constant"], (1, False))
    show(results["random"], (8, True))


@section("train.one_batch", "M5")
def train_one_batch(device: torch.device) -> None:
    """First test of a new model: can it learn one batch by heart?

    If it cannot, something is wrong: the loss, the labels, a layer without
    gradient, or the learning rate. GradientMonitor tells the last."""
    images, labels = tb.draw_digits(32)  # uint8 (32, 1, 28, 28)
    x, y = (images / 255).to(device), labels.to(device)

    def learn(optimizer_class, lr, clip=math.inf, start=1.0, **options):
        torch.manual_seed(0)
        model = tb.SimpleNet().to(device)
        optimizer = optimizer_class(model.parameters(), lr=lr, **options)
        monitor = tb.GradientMonitor(model, optimizer, every=1)
        schedule = tb.warmup_lr_scheduler(optimizer, 50, start)
        losses = []
        for _ in range(60):
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            # scales the gradient down if its norm is above `clip`
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()  # the rate rises from start * lr to lr
        accuracy = (model(x).argmax(1) == y).float().mean().item()
        return accuracy, losses, list(monitor.problems)

    accuracy, losses, problems = learn(torch.optim.Adam, lr=1e-3)
    show((accuracy, problems), (1.0, []))
    # Nothing known yet, so the first loss is about log(10).
    show(losses[0], math.log(10), rtol=0.05, atol=0)

    # A rate that is too high: after some steps the loss leaps.
    accuracy, losses, problems = learn(torch.optim.SGD, lr=0.5, momentum=0.9)
    show(accuracy < 0.5, True)
    show(problems[0], "too high")
    # Remedies: a lower rate, or a limit for the gradient's norm.
    show(learn(torch.optim.SGD, lr=0.1, momentum=0.9)[0], 1.0)
    show(learn(torch.optim.SGD, lr=0.5, momentum=0.9, clip=0.5)[0], 1.0)

    # Adam's first steps are all about lr: here the very first one harms.
    accuracy, losses, problems = learn(torch.optim.Adam, lr=0.1)
    show((losses[1] > 2 * losses[0], problems[0]), (True, "too high"))
    # Warm-up helps, since first steps are small.
    accuracy, losses, problems = learn(torch.optim.Adam, lr=0.1, start=0.01)
    show((accuracy, losses[1] < losses[0]), (1.0, True))


@section("train.accumulate", "P4")
def train_accumulate() -> None:
    """Eight batches of 4 give the gradient of one batch of 32.

    When a batch does not fit into memory, cut it up: backward adds to .grad.
    Divide each loss by the number of parts, since the loss is a mean."""
    model = nn.Linear(3, 2)
    x, y = torch.randn(32, 3), torch.randn(32, 2)
    F.mse_loss(model(x), y).backward()
    whole = model.weight.grad.clone()
    # by hand: the mean of 64 squares has the derivative 2 / 64 * error * x
    error = x @ model.weight.T + model.bias - y
    show(whole, 2 / 64 * error.T @ x)
    model.zero_grad()
    for i in range(0, 32, 4):
        (F.mse_loss(model(x[i : i + 4]), y[i : i + 4]) / 8).backward()
    show(model.weight.grad, whole)


@section("train.token_weights", "W7")
def train_token_weights() -> None:
    """Unequal parts must be weighted by the targets that they hold.

    Padded text: a batch's loss is the mean over its tokens, without the
    padding. The mean of such means gives short texts too much weight."""
    model = nn.Linear(3, 5)
    x = torch.randn(4, 6, 3)  # (texts, tokens, values)
    y = torch.randint(5, (4, 6))
    for text, length in enumerate((6, 1, 3, 2)):
        y[text, length:] = -100  # padding: cross_entropy ignores this class
    start = copy.deepcopy(model)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    whole = model.weight.grad.clone()  # of the mean over all 12 tokens

    def by_parts(weights: list[float]) -> torch.Tensor:
        model.zero_grad()
        for i, weight in enumerate(weights):
            (F.cross_entropy(model(x[i]), y[i]) * weight).backward()
        return model.weight.grad

    right = by_parts([6 / 12, 1 / 12, 3 / 12, 2 / 12])
    show(right, whole)
    off = (by_parts([1 / 4] * 4) - whole).norm() / whole.norm()
    print(f"the mean of means is off by {off:.0%}")
    show(off > 0.1, True)

    # Trainer(accumulate=4) weights the parts in this way: one step of it
    # moves the weights by -lr * (gradient of the whole).
    class Tagger(tb.Trainer):
        def compute_loss(self, batch):
            outputs = self.model(batch[0]).transpose(1, 2)  # (B, 5, tokens)
            return self.criterion(outputs, batch[1]), outputs, batch[1]

    optimizer = torch.optim.SGD(start.parameters(), lr=0.1)
    before = start.weight.detach().clone()
    expected = before - 0.1 * whole
    trainer = Tagger(start, nn.CrossEntropyLoss(), optimizer, accumulate=4)
    trainer.train_one_epoch(list(zip(x.split(1), y.split(1), strict=True)))
    show(torch.equal(start.weight, before), False)
    show((start.weight - expected).abs().max(), 0.0)


@section("layer.convolution", "N1")
def layer_convolution() -> None:
    """A convolution slides small weights, the kernel, over its input.

    The same few weights everywhere: few parameters, and a pattern is found
    wherever it is. n values become (n + 2 padding - kernel) // stride + 1."""
    signal = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])  # (B, C, length)
    layer = nn.Conv1d(1, 1, kernel_size=3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0.0, -1.0]]]))
        layer.bias.fill_(10.0)
    show(layer(signal), [[[1 - 4 + 10.0, 2 - 8 + 10.0]]])

    image = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0],
                            [64.0, 128.0, 256.0]]]])
    layer = nn.Conv2d(1, 1, kernel_size=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[[1.0, 0.0], [0.0, -1.0]]]]))
    # each pixel minus the one below and to the right
    show(layer(image), [[[[1 - 16.0, 2 - 32.0], [8 - 128.0, 16 - 256.0]]]])

    # 32 kernels on one channel. Padding of 1 keeps the size with kernels of 3.
    digits = torch.zeros(4, 1, 28, 28)  # (B, C, H, W)
    layer = nn.Conv2d(1, 32, kernel_size=3, padding=1)
    show(layer(digits).shape, (4, 32, 28, 28))
    show(tb.count_parameters(layer), 1 * 32 * 3 * 3 + 32)
    strided = nn.Conv2d(1, 8, kernel_size=5, stride=2)
    show(strided(digits).shape, (4, 8, (28 - 5) // 2 + 1, (28 - 5) // 2 + 1))


@section("layer.pooling", "N1")
def layer_pooling() -> None:
    """Pooling summarises windows, without parameters.

    The adaptive one takes the size of the output: images may differ in size."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    print(x[0, 0])
    show(nn.MaxPool2d(2)(x), [[[[5.0, 7.0], [13.0, 15.0]]]])
    show(nn.AvgPool2d(2)(x), [[[[2.5, 4.5], [10.5, 12.5]]]])
    show(nn.AdaptiveAvgPool2d(1)(x), [[[[7.5]]]])
    show(nn.AdaptiveAvgPool2d((1, 2))(x), [[[[6.5, 8.5]]]])


@section("layer.batchnorm", "N1", "N3")
def layer_batchnorm() -> None:
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
    show(layer.running_mean, [0.1 * 3])
    show(layer.running_var, [0.9 * 1 + 0.1 * 7])
    layer.eval()
    spread = math.sqrt(0.9 + 0.7 + 1e-5)
    show(layer(x), [[(v - 0.3) / spread] for v in (1, 2, 6)])
    show(layer.running_mean, [0.3])  # as before
    layer.train()
    show_error(lambda: layer(x[:1]), ValueError, "more than 1 value per channel")

    # In images each channel is a feature: mean 4 and 40, variance 5 and 500.
    images = torch.tensor([[[[1.0, 3.0]], [[10.0, 30.0]]],
                           [[[5.0, 7.0]], [[50.0, 70.0]]]])
    normal = nn.BatchNorm2d(2)(images)  # (B, C, H, W)
    row = [v / math.sqrt(5) for v in (-3, -1, 1, 3)]
    show(normal[:, 0].flatten(), row, rtol=1e-4, atol=0)
    show(normal[:, 1].flatten(), row, rtol=1e-4, atol=0)
    # It learns a scale and a shift for each channel.
    show(tb.count_parameters(nn.BatchNorm2d(32)), 32 + 32)


@section("layer.layernorm", "N1")
def layer_layernorm() -> None:
    """LayerNorm evens out each sample over its features, not over the batch.

    So it works for one sample too, and training and evaluation are alike."""
    x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    layer = nn.LayerNorm(2)
    show(layer(x), [[-1.0, 1.0], [-1.0, 1.0]], rtol=0, atol=1e-4)
    show(layer.eval()(x[:1]), [[-1.0, 1.0]], rtol=0, atol=1e-4)
    show(tb.count_parameters(nn.LayerNorm((3, 8))), 2 * 3 * 8)


@section("layer.dropout", "N1", "N3")
def layer_dropout() -> None:
    """Dropout sets values to 0 at random, but only in training.

    So no unit can rely on one other. The rest is scaled up by 1 / (1 - p),
    which keeps the mean; evaluation changes nothing."""
    layer, x = nn.Dropout(0.25), torch.ones(100_000)
    dropped = layer(x)
    show(dropped.unique(), [0.0, 1 / 0.75])
    show((dropped == 0).float().mean(), 0.25, rtol=0, atol=0.01)
    show(dropped.mean(), 1.0, rtol=0, atol=0.02)
    layer.eval()
    show(torch.equal(layer(x), x), True)
    # Neighbouring pixels say nearly the same: Dropout2d drops channels.
    maps = nn.Dropout2d(0.5)(torch.ones(8, 16, 3, 3))
    show(maps.unique(), [0.0, 2.0])
    whole = (maps == maps[:, :, :1, :1]).all()  # each channel has one value
    show(whole, True)


@section("layer.embedding", "N1")
def layer_embedding() -> None:
    """An embedding is a table: an index looks up a row, which is learnt."""
    layer = nn.Embedding(10, 4, padding_idx=0)
    tokens = torch.tensor([[3, 7, 0], [3, 0, 0]])  # (B, T)
    vectors = layer(tokens)  # (B, T, 4)
    show(vectors.shape, (2, 3, 4))
    show(torch.equal(vectors[0, :2], layer.weight[[3, 7]]), True)
    show(vectors[1], [layer.weight[3].tolist(), [0.0] * 4, [0.0] * 4])
    vectors.sum().backward()
    # Gradients reach the rows that were used; token 3 was used twice, and
    # the row for padding stays 0.
    show(layer.weight.grad[:, 0], [0.0, 0, 0, 2, 0, 0, 0, 1, 0, 0])


@section("layer.attention", "N1")
def layer_attention() -> None:
    """Attention mixes the values of all positions, by weights it computes.

    Each position asks with its query; the weights are the softmax of its
    products with all keys. Several heads do so on their share of the values."""
    query, key, value = torch.randn(3, 4, 2)  # (T, E) each
    weights = (query @ key.T / math.sqrt(2)).softmax(dim=-1)  # (T, T)
    show(F.scaled_dot_product_attention(query, key, value), weights @ value)

    layer = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
    x = torch.randn(1, 3, 4)  # (B, T, E)
    output, weights = layer(x, x, x)
    # By hand: one matrix makes queries, keys and values; head 1 takes the
    # first half of each, head 2 the rest; a last layer mixes the heads.
    qkv = x[0] @ layer.in_proj_weight.T + layer.in_proj_bias  # (T, 3 * E)
    heads, shares = [], []
    for half in (slice(0, 2), slice(2, 4)):
        q, k, v = (part[:, half] for part in qkv.chunk(3, dim=1))
        shares.append((q @ k.T / math.sqrt(2)).softmax(dim=1))
        heads.append(shares[-1] @ v)
    mixed = torch.cat(heads, dim=1)  # (T, E)
    show(output[0], mixed @ layer.out_proj.weight.T + layer.out_proj.bias)
    show(weights[0], (shares[0] + shares[1]) / 2)
    show(tb.count_parameters(layer), 4 * (4 * 4 + 4))


@section("layer.recurrent", "N1")
def layer_recurrent() -> None:
    """A recurrent layer goes through a sequence and carries a state along.

    Gates between 0 and 1 decide what of the state is kept, and what is new."""
    x = torch.randn(2, 5, 4)  # (B, T, inputs)
    lstm = nn.LSTM(4, 3, batch_first=True)
    output, (hidden, cell) = lstm(x)
    h = c = torch.zeros(2, 3)  # hidden state and cell
    for t in range(5):
        gates = x[:, t] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
        gates = gates + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        take, keep, new, let_out = gates.chunk(4, dim=1)
        c = keep.sigmoid() * c + take.sigmoid() * new.tanh()
        h = let_out.sigmoid() * c.tanh()
    show(output[:, -1], h)
    show(cell[0], c)
    # The output has all times. The state has the layer first, then the
    # batch, even with batch_first=True.
    show((output.shape, hidden.shape), ((2, 5, 3), (1, 2, 3)))
    show(torch.equal(output[:, -1], hidden[0]), True)
    gate = 3 * 4 + 3 * 3 + 2 * 3  # from input and state, and two biases
    show(tb.count_parameters(lstm), 4 * gate)

    gru = nn.GRU(4, 3, batch_first=True)  # three gates, and no cell
    output, hidden = gru(x)
    h = torch.zeros(2, 3)
    for t in range(5):
        from_x = (x[:, t] @ gru.weight_ih_l0.T + gru.bias_ih_l0).chunk(3, dim=1)
        from_h = (h @ gru.weight_hh_l0.T + gru.bias_hh_l0).chunk(3, dim=1)
        reset = (from_x[0] + from_h[0]).sigmoid()
        keep = (from_x[1] + from_h[1]).sigmoid()
        new = (from_x[2] + reset * from_h[2]).tanh()
        h = keep * h + (1 - keep) * new
    show(output[:, -1], h)
    show(tb.count_parameters(gru), 3 * gate)


@section("layer.transformer", "N1")
def layer_transformer() -> None:
    """A Transformer layer: attention, then two linear layers for each position.

    Around each is a shortcut, x + ..., and a LayerNorm, so that dozens of
    layers can be stacked."""
    layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=8,
                                       dropout=0.0, batch_first=True)
    x = torch.randn(1, 3, 4)  # (B, T, E)
    attended = layer.norm1(x + layer.self_attn(x, x, x)[0])
    hidden = layer.linear1(attended).relu()  # (B, T, 8)
    by_hand = layer.norm2(attended + layer.linear2(hidden))
    show(layer(x)[0], by_hand[0])
    attention, norms = 4 * (4 * 4 + 4), 2 * (4 + 4)
    feedforward = (4 * 8 + 8) + (8 * 4 + 4)
    show(tb.count_parameters(layer), attention + feedforward + norms)


@section("model.package", "N2")
def model_package() -> None:
    """Networks to start from: SimpleNet, MLP, CNN and MNISTNet.

    They give logits (B, classes). Their sizes are sums over their layers."""

    def linear(n: int, m: int) -> int:
        return m * (n + 1)

    def conv_norm(n: int, m: int) -> int:
        return m * (n * 3 * 3 + 1) + 2 * m  # 3 * 3 kernels, and a BatchNorm

    images = torch.randn(2, 1, 28, 28)
    # two poolings leave 7 * 7 of 28 * 28 pixels, in 64 channels
    cnn = conv_norm(1, 32) + conv_norm(32, 64)
    cnn += linear(64 * 7 * 7, 128) + linear(128, 10)
    model = tb.CNN()
    show((model(images).shape, tb.count_parameters(model)), ((2, 10), cnn))
    block1 = conv_norm(1, 32) + conv_norm(32, 32)
    block2 = conv_norm(32, 64) + conv_norm(64, 64)
    mnist = block1 + block2 + linear(64 * 7 * 7, 256) + linear(256, 10)
    model = tb.MNISTNet()
    show((model(images).shape, tb.count_parameters(model)), ((2, 10), mnist))
    mlp = linear(20, 16) + 2 * 16 + linear(16, 16) + 2 * 16 + linear(16, 3)
    show(tb.count_parameters(tb.MLP(20, 16, 3)), mlp)
    show(tb.MLP(20, 16, 3)(torch.randn(2, 20)).shape, (2, 3))
    # The usual error of other sizes: 32 * 32 pixels leave 64 * 8 * 8 values.
    larger = images.new_zeros(2, 1, 32, 32)
    show_error(lambda: model(larger), RuntimeError, "2x4096 and 3136x256")


@section("init.layers", "N7")
def init_layers() -> None:
    """model.apply(init_weights) gives each kind of layer the start it needs."""
    linear, conv = nn.Linear(300, 100), nn.Conv2d(16, 64, 3)
    table, norm = nn.Embedding(200, 100), nn.LayerNorm(3)
    nn.ModuleList([linear, conv, table, norm]).apply(tb.init_weights)
    # Xavier: uniform up to a bound, whose deviation is bound / sqrt(3)
    bound = math.sqrt(6 / (300 + 100))
    show(linear.weight.max(), bound, rtol=0.01, atol=0)
    show(linear.weight.std(), bound / math.sqrt(3), rtol=0.03, atol=0)
    show(linear.bias.abs().max(), 0.0)
    # Kaiming: normal, deviation sqrt(2 / (channels out * kernel))
    show(conv.weight.std(), math.sqrt(2 / (64 * 3 * 3)), rtol=0.05, atol=0)
    show(table.weight.std(), 0.02, rtol=0.05, atol=0)
    show((norm.weight, norm.bias), ([1.0] * 3, [0.0] * 3))


@section("init.spread", "N7")
def init_spread(device: torch.device) -> None:
    """The start decides whether a signal survives many layers.

    A ReLU layer of n inputs multiplies the mean square by n * var(w) / 2:
    only a variance of 2 / n, Kaiming's, keeps it."""

    @torch.no_grad()
    def growth(fill, activation=torch.relu) -> float:
        x = activation(torch.randn(256, 512, device=device))
        first = x.square().mean()
        for _ in range(10):  # ten layers without bias
            w = torch.empty(512, 512, device=device)
            fill(w)
            x = activation(x @ w.T)
        return ((x.square().mean() / first) ** 0.1).item()  # per layer

    kaiming = growth(lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))
    show(kaiming, 1.0, rtol=0.15, atol=0)
    show(growth(lambda w: nn.init.normal_(w, 0, 0.02)), 512 * 0.02**2 / 2, rtol=0.15, atol=0)
    # Linear's own start has the variance 1 / 3n: enough for few layers.
    show(growth(lambda w: w.copy_(nn.Linear(512, 512).weight)), 1 / 6, rtol=0.15, atol=0)
    # Xavier's 1 / n keeps the spread where the function is straight.
    show(growth(nn.init.xavier_uniform_, activation=nn.Identity()), 1.0, rtol=0.15, atol=0)
    show(growth(nn.init.xavier_uniform_), 0.5, rtol=0.15, atol=0)


@section("schedule.shapes", "N6")
def schedule_shapes() -> None:
    """A schedule changes the learning rate: high at first, low at the end.

    Call its step() after the optimizer's, once per epoch; once per batch for
    OneCycleLR and for warm-ups."""

    def rates(make, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, found = make(optimizer), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    def half_cosine(share: float) -> float:  # from 1 down to 0
        return (1 + math.cos(math.pi * share)) / 2

    show(rates(lambda o: lr_scheduler.StepLR(o, 2, gamma=0.1), 5), [1.0, 1.0, 0.1, 0.1, 0.01])
    cosine = partial(lr_scheduler.CosineAnnealingLR, T_max=4, eta_min=0.2)
    show(rates(cosine, 5), [0.2 + 0.8 * half_cosine(t / 4) for t in range(5)])
    # It goes on as a wave: after 2 * T_max steps it is back at the start.
    show(rates(cosine, 9)[8], 1.0)
    warmup = partial(lr_scheduler.LinearLR, start_factor=0.2, total_iters=4)
    show(rates(warmup, 6), [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])

    def warmup_cosine(optimizer):  # the usual one for Transformers
        parts = [warmup(optimizer), cosine(optimizer)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])

    down = [0.2 + 0.8 * half_cosine(t / 4) for t in range(5)]
    show(rates(warmup_cosine, 9), [0.2, 0.4, 0.6, 0.8, *down])
    # 30% of the steps up from max_lr / 25, the rest down to a 10,000th of that
    one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=10)
    low, end = 1 / 25, 1 / 25 / 1e4
    up = [low + (1 - low) * (1 - half_cosine(t / 2)) for t in range(3)]
    down = [end + (1 - end) * half_cosine(t / 7) for t in range(1, 8)]
    show(rates(one_cycle, 10), up + down, rtol=1e-6, atol=0)


@section("schedule.plateau", "N6")
def schedule_plateau() -> None:
    """ReduceLROnPlateau waits for the loss: it lowers the rate without progress.

    It does so after more than `patience` epochs that bring no better loss."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    rates = []
    for loss in (5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(loss)
    # 4.0 is the best until the third epoch without better: the fifth
    show(rates, [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5])


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
        optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=3e-3,
                                      weight_decay=decay)
        trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, device,
                             early_stopping=stopping)
        trainer.fit(train, others, num_epochs=50, verbose=False)
        train.augment = None  # judge on the images as they are
        loss, known = trainer.validate(train)
        other_loss, unknown = trainer.validate(others)
        print(f"{trainer.epoch} epochs: training {loss:.3f} ({known:.0%}), "
              f"validation {other_loss:.3f} ({unknown:.0%})")
        return other_loss - loss

    plain = gap()
    show(plain > 0.7, True)  # all learnt by heart, a quarter of the rest wrong
    show(gap(dropout=0.8) < 0.9 * plain, True)
    show(gap(decay=3.0) < 0.9 * plain, True)  # far more than the usual 0.01
    # turned and shifted a little: never the same digit twice
    show(gap(augment=tb.RandomAffine(degrees=10, shift=0.1)) < 0.7 * plain, True)
    # at the third epoch without a better validation loss
    stopping = tb.EarlyStopping(patience=3)
    show(gap(stopping=stopping) < 0.9 * plain, True)
    show(stopping.early_stop, True)


@section("save.state_dict", "L14")
def save_state_dict(device: torch.device) -> None:
    """Save the state_dict, not the model.

    A saved model holds the path of its class: move the class, and the file
    is lost. Loading one runs what the file says, so torch.load refuses.
    A state_dict is tensors and names, and nothing can run."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.pt"
    model = tb.MLP(4, 3, 2).to(device).eval()
    x = torch.randn(5, 4, device=device)
    torch.save(model, path)
    show_error(lambda: torch.load(path), Exception, "Weights only load failed")

    # buffers such as BatchNorm's averages are in it, the code is not
    torch.save(model.state_dict(), path)
    other = tb.MLP(4, 3, 2).to(device).eval()  # the same sizes, other weights
    show(torch.equal(other(x), model(x)), False)
    other.load_state_dict(torch.load(path, map_location=device))
    show(torch.equal(other(x), model(x)), True)
    larger = tb.MLP(4, 6, 2)
    state = torch.load(path, map_location="cpu")
    show_error(lambda: larger.load_state_dict(state), RuntimeError, "Error(s) in loading")

    # A checkpoint is a dict: with the optimizer, training can go on.
    # save_checkpoint also seals the file, so that damage is noticed.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    checkpoint = {"epoch": 3, "model_state_dict": model.state_dict(),
                  "optimizer_state_dict": optimizer.state_dict()}
    tb.save_checkpoint(checkpoint, path)
    loaded = tb.load_checkpoint(path)
    show(loaded["epoch"], 3)
    show(loaded["optimizer_state_dict"]["param_groups"][0]["lr"], 0.5)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    path.write_bytes(damaged)
    show_error(lambda: tb.load_checkpoint(path), tb.CheckpointError, "seal")
    folder.cleanup()


@section("transfer.parameters", "N8")
def transfer_parameters() -> None:
    """torchvision's resnet18: 11,689,512 parameters, most in the last stage."""
    from torchvision.models import resnet18  # slow to import

    model = resnet18(weights=None)  # weights="DEFAULT": trained on ImageNet
    parts: dict[str, int] = {}
    counts = tb.count_parameters_by_layer(model, verbose=False)
    for name, count in counts.items():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + count

    def stage(n: int, m: int) -> int:
        # four 3 * 3 convolutions without bias and their norms; where the
        # channels change, the shortcut has a convolution and a norm, too
        shortcut = n * m + 2 * m if n != m else 0
        return (n * m + 3 * m * m) * 3 * 3 + 4 * 2 * m + shortcut

    by_hand = {"conv1": 3 * 64 * 7 * 7, "bn1": 2 * 64}
    for i, (n, m) in enumerate(pairwise((64, 64, 128, 256, 512)), start=1):
        by_hand[f"layer{i}"] = stage(n, m)
    by_hand["fc"] = 1000 * (512 + 1)
    show(parts, by_hand)
    show(tb.count_parameters(model), 11_689_512)


@section("transfer.freeze", "N8")
def transfer_freeze(device: torch.device) -> None:
    """Transfer: freeze the body, replace the head, and train that alone.

    The body already sees edges and shapes, so few images are enough."""
    from torchvision.models import resnet18

    model = tb.freeze(resnet18(weights=None))  # for use: weights="DEFAULT"
    model.fc = nn.Linear(512, 2)  # new layers are trainable
    model.to(device)
    show(tb.count_parameters(model), 2 * (512 + 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def changed() -> list[str]:
        state = model.state_dict().items()
        return [name for name, v in state if not torch.equal(v, before[name])]

    model.eval()  # frozen weights, and BatchNorm's averages too
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    images = torch.randn(4, 3, 32, 32, device=device)
    targets = torch.tensor([0, 1, 0, 1], device=device)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    show(changed(), ["fc.weight", "fc.bias"])
    # freeze() stops gradients. In train() the averages would still move:
    model.train()
    model(images)
    moved = {name.split(".")[-1] for name in changed() if name[:2] != "fc"}
    show(sorted(moved), ["num_batches_tracked", "running_mean", "running_var"])


@section("ensemble.mean", "N10")
def ensemble_mean() -> None:
    """An ensemble's prediction is the mean of its members' probabilities."""

    class Constant(nn.Module):  # gives these probabilities for any input
        def __init__(self, *probabilities: float) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(probabilities).log())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(x), -1)

    members = [Constant(0.9, 0.1), Constant(0.2, 0.8)]
    ensemble = tb.EnsembleModel(members)
    x = torch.zeros(1, 3)
    show(ensemble(x).softmax(dim=1), [[(0.9 + 0.2) / 2, (0.1 + 0.8) / 2]])


@section("ensemble.better", "N10")
def ensemble_better() -> None:
    """Members that err in different places do better together.

    Each is trained on other samples of two noisy rings around each other."""

    def rings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ring, angle = torch.arange(count) % 2, 2 * math.pi * torch.rand(count)
        radius = 1.0 + ring + 0.45 * torch.randn(count)
        points = [radius * angle.cos(), radius * angle.sin()]
        return torch.stack(points, dim=1), ring

    x, y = rings(200)
    members = []
    for _ in range(15):
        drawn = torch.randint(len(x), (60,))
        model = tb.SimpleNet(2, (32, 32), 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x[drawn]), y[drawn]).backward()
            optimizer.step()
        members.append(model)

    x, y = rings(2000)  # that none has seen
    ensemble = tb.EnsembleModel(members)
    with torch.no_grad():
        losses = [F.cross_entropy(member(x), y).item() for member in members]
        loss = F.cross_entropy(ensemble(x), y).item()
        right = [(m(x).argmax(1) == y).float().mean().item() for m in members]
        accuracy = (ensemble(x).argmax(1) == y).float().mean().item()
    print(f"members: loss {min(losses):.3f} to {max(losses):.3f}, "
          f"accuracy {min(right):.1%} to {max(right):.1%}")
    print(f"together: loss {loss:.3f}, accuracy {accuracy:.1%}")
    show(loss < min(losses), True)
    show(accuracy > sum(right) / len(right), True)


@section("compile.graph", "M4")
def compile_graph(device: torch.device) -> None:
    """torch.compile records a function as a graph of tensor operations.

    What depends on values breaks the graph: Python must look at them. Then
    there are several small graphs, and less is gained."""
    graphs = []

    def note(graph, inputs):  # a backend: gets the graph, returns a function
        graphs.append([n.name for n in graph.graph.nodes if n.op[:4] == "call"])
        return graph.forward

    def whole(x):
        return x.sin() ** 2 + x.cos() ** 2

    x = torch.tensor([0.0, 1.0, 2.0], device=device)
    show(torch.compile(whole, backend=note)(x), [1.0, 1.0, 1.0])
    show((len(graphs), len(graphs[0])), (1, 5))  # sin, pow, cos, pow, add

    def broken(x):
        y = x * 2
        if y.sum() > 0:  # a question for Python
            return y + 1
        return y - 1

    graphs.clear()
    show(torch.compile(broken, backend=note)(x), [1.0, 3.0, 5.0])
    show(len(graphs), 2)  # the one before the question, one after it
    # fullgraph=True makes an error of a break, to find it.
    torch.compiler.reset()  # forget what is compiled already
    strict = torch.compile(broken, backend=note, fullgraph=True)
    show_error(lambda: strict(x), RuntimeError, "Data-dependent branching")
    # torch.where chooses without a question.
    graphs.clear()

    def repaired(x):
        y = x * 2
        return torch.where(y.sum() > 0, y + 1, y - 1)

    strict = torch.compile(repaired, backend=note, fullgraph=True)
    show((strict(x).tolist(), len(graphs)), ([1.0, 3.0, 5.0], 1))
    show(strict(-x), [-1.0, -3.0, -5.0])


@section("compile.equal", "M4")
def compile_equal(device: torch.device) -> None:
    """The default backend writes C++ or Triton, and gives equal results.

    It needs a compiler. A first call takes seconds, or half a minute on a
    machine that never compiled: profile.py measures what you gain."""
    layers = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(2, 4, device=device)
    fast = torch.compile(model)
    try:
        outputs = fast(x)
    except RuntimeError as error:
        if "compiler" in str(error).lower() or "triton" in str(error).lower():
            skip("needs g++ or clang (CPU) or Triton (GPU); was not compiled")
        raise
    hidden = x @ model[0].weight.T + model[0].bias
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    by_hand = gelu @ model[2].weight.T + model[2].bias
    show(outputs, by_hand, rtol=0, atol=1e-3)
    # The weights are the model's own, under names with a prefix.
    show(list(fast.state_dict())[:2], ["_orig_mod.0.weight", "_orig_mod.0.bias"])


@section("parallel.why_ddp", "N11")
def parallel_why_ddp() -> None:
    """On several GPUs each computes the gradient of its share of the batch.

    DistributedDataParallel: a process per GPU, copies of the model that stay,
    and gradients averaged while backward runs (scripts/train_ddp.py). It
    replaced DataParallel, which copies the model in each forward pass and
    whose threads share one interpreter, in one machine."""
    model = nn.Linear(4, 2)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])

    def gradient(start: int, end: int) -> torch.Tensor:
        model.zero_grad()
        F.cross_entropy(model(x[start:end]), y[start:end]).backward()
        return model.weight.grad.clone()

    # of the mean loss: (probabilities - right class) times x, over 6
    error = (x @ model.weight.T + model.bias).softmax(1) - F.one_hot(y, 2)
    whole = error.T @ x / 6
    equal = (gradient(0, 3) + gradient(3, 6)) / 2
    show(equal, whole)
    # With unequal shares the plain mean is wrong: weight by samples.
    plain = (gradient(0, 1) + gradient(1, 6)) / 2
    show(torch.allclose(plain, whole, rtol=0.05, atol=0), False)
    weighted = (1 * gradient(0, 1) + 5 * gradient(1, 6)) / 6
    show(weighted, whole)


@section("parallel.data_parallel", "N11")
def parallel_data_parallel() -> None:
    """DataParallel still works: one line, for a first try on several GPUs."""
    if not torch.cuda.is_available():
        skip("needs a CUDA GPU; DataParallel was not run")
    sizes = []  # of the part that each GPU gets

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return super().forward(x)

    model = Watched(4, 2).to("cuda:0")
    wrapped = nn.DataParallel(model)
    x = torch.randn(6, 4, device="cuda:0")
    outputs, gpus = wrapped(x), torch.cuda.device_count()
    show((outputs - (x @ model.weight.T + model.bias)).abs().max(), 0.0, rtol=0, atol=1e-3)
    largest = math.ceil(6 / gpus)
    shares = [min(largest, 6 - start) for start in range(0, 6, largest)]
    show(sorted(sizes, reverse=True), shares)
    # The names get a prefix: save wrapped.module, which is the model.
    show(list(wrapped.state_dict()), ["module.weight", "module.bias"])
    show(wrapped.module is model, True)


def main(argv: list[str] | None = None) -> int:
    """Run the lessons that the arguments name and return the exit code."""
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())

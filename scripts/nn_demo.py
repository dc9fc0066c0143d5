"""Layers, models, losses, optimizers and schedules, each against its formula: every value shown is also checked.

python scripts/nn_demo.py
python scripts/nn_demo.py --section loss.cross_entropy --section optimizer.adam
"""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from torchbasics import models
from torchbasics.demo import Sections, show, show_error
from torchbasics.models import count_parameters, count_parameters_by_layer, freeze, init_weights

section = Sections(__doc__)


# Layers ---------------------------------------------------------------------------------------------------------------


@section("layer.linear", "N1")
def layer_linear(device: torch.device) -> None:
    """A linear layer computes x W^T + b: n inputs and m outputs make n * m + m parameters."""
    layer = nn.Linear(3, 2).to(device)
    x = torch.randn(4, 3, device=device)  # (B, 3)
    show("output shape of Linear(3, 2)", layer(x).shape, (4, 2))
    show("parameters: 3 * 2 + 2", count_parameters(layer), 3 * 2 + 2)
    show("weight shape: outputs first", layer.weight.shape, (2, 3))
    show("layer(x) - (x @ W.T + b)", (layer(x) - (x @ layer.weight.T + layer.bias)).abs().max(), 0)
    wrong = torch.randn(4, 5, device=device)
    show_error("5 inputs instead of 3", lambda: layer(wrong), RuntimeError, "shapes cannot be multiplied")


@section("layer.convolution", "N1")
def layer_convolution(device: torch.device) -> None:
    """A convolution slides a kernel over the input: n values become (n + 2 * padding - kernel) // stride + 1."""
    difference = torch.tensor([[[1.0, 0.0, -1.0]]], device=device)  # (out channels, in channels, kernel)
    signal = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]], device=device)  # (B, channels, length)
    show("conv1d of 1 2 4 8 with 1 0 -1", F.conv1d(signal, difference), [[[1 - 4, 2 - 8]]])
    conv1 = nn.Conv1d(2, 6, kernel_size=3).to(device)
    show("Conv1d(2, 6, 3): length 10 becomes", conv1(torch.randn(4, 2, 10, device=device)).shape, (4, 6, 10 - 3 + 1))
    show("parameters: 2 * 6 * 3 + 6", count_parameters(conv1), 2 * 6 * 3 + 6)
    images = torch.randn(4, 1, 28, 28, device=device)  # (B, C, H, W)
    conv2 = nn.Conv2d(1, 32, kernel_size=3, padding=1).to(device)
    show("Conv2d(1, 32, 3, padding=1) keeps 28 x 28", conv2(images).shape, (4, 32, 28, 28))
    show("parameters: 1 * 32 * 3 * 3 + 32", count_parameters(conv2), 1 * 32 * 9 + 32)
    strided = nn.Conv2d(1, 8, kernel_size=5, stride=2).to(device)
    show("Conv2d(1, 8, 5, stride=2)", strided(images).shape, (4, 8, (28 - 5) // 2 + 1, (28 - 5) // 2 + 1))


@section("layer.pooling", "N1")
def layer_pooling(device: torch.device) -> None:
    """Pooling summarises windows, without parameters; the adaptive one takes the output size instead."""
    x = torch.arange(16.0, device=device).reshape(1, 1, 4, 4)
    show("MaxPool2d(2) of 0..15", nn.MaxPool2d(2)(x), [[[[5, 7], [13, 15]]]])
    show("AvgPool2d(2)", nn.AvgPool2d(2)(x), [[[[2.5, 4.5], [10.5, 12.5]]]])
    show("AdaptiveAvgPool2d(1): the mean", nn.AdaptiveAvgPool2d(1)(x), [[[[7.5]]]])
    show("AdaptiveAvgPool2d((1, 2))", nn.AdaptiveAvgPool2d((1, 2))(x), [[[[6.5, 8.5]]]])
    show("parameters", count_parameters(nn.MaxPool2d(2)), 0)


@section("layer.norm", "N1")
def layer_norm(device: torch.device) -> None:
    """BatchNorm evens out each feature over the batch, LayerNorm each sample over its features."""
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]], device=device)  # (B, features)
    columns = nn.BatchNorm1d(2).to(device)(x)
    rows = nn.LayerNorm(2).to(device)(x)
    show("BatchNorm1d: each column to mean 0, spread 1", columns, [[-1, -1], [1, 1]], atol=1e-4)
    show("LayerNorm: each row", rows, [[-1, 1], [-1, 1]], atol=1e-4)
    show("BatchNorm1d(2): a scale and a shift each", count_parameters(nn.BatchNorm1d(2)), 2 + 2)
    show("LayerNorm(8): a scale and a shift each", count_parameters(nn.LayerNorm(8)), 8 + 8)
    show("LayerNorm((3, 8)): a pair per value", count_parameters(nn.LayerNorm((3, 8))), 2 * 3 * 8)
    images = torch.randn(4, 32, 7, 7, device=device)
    norm = nn.BatchNorm2d(32).to(device)
    show("BatchNorm2d(32): one pair per channel", count_parameters(norm), 2 * 32)
    show("its output shape", norm(images).shape, (4, 32, 7, 7))
    show("largest channel mean after it", norm(images).mean((0, 2, 3)).abs().max(), 0)


@section("layer.activation", "N1")
def layer_activation(device: torch.device) -> None:
    """Without a non-linear function between them, two linear layers are no more than one."""
    x = torch.tensor([-1.0, 0.0, 2.0], device=device)
    show("ReLU", nn.ReLU()(x), [0, 0, 2])
    show("Sigmoid", nn.Sigmoid()(x), [1 / (1 + math.exp(-v)) for v in (-1, 0, 2)])
    show("Tanh", nn.Tanh()(x), [math.tanh(v) for v in (-1, 0, 2)])
    a, b = nn.Linear(3, 4, bias=False).to(device), nn.Linear(4, 2, bias=False).to(device)
    one = x @ (b.weight @ a.weight).T
    show("two linear layers minus a single one", (b(a(x)) - one).abs().max(), 0)


@section("layer.embedding", "N1")
def layer_embedding(device: torch.device) -> None:
    """An embedding is a table: an index looks up a row of it."""
    layer = nn.Embedding(10, 4, padding_idx=0).to(device)
    tokens = torch.tensor([[3, 7, 0], [3, 0, 0]], device=device)  # (B, T)
    vectors = layer(tokens)  # (B, T, 4)
    show("output shape of Embedding(10, 4)", vectors.shape, (2, 3, 4))
    show("parameters: 10 * 4", count_parameters(layer), 10 * 4)
    show("token 3 is row 3, wherever it stands", bool((vectors[:, 0] == layer.weight[3]).all()), True)
    show("the padding row is zero", vectors[1, 2], [0, 0, 0, 0])


@section("layer.attention", "N1")
def layer_attention(device: torch.device) -> None:
    """Attention mixes the values of all positions by softmax weights; four E x E matrices with biases make it."""
    layer = nn.MultiheadAttention(embed_dim=8, num_heads=2, batch_first=True).to(device)
    x = torch.randn(4, 5, 8, device=device)  # (B, T, E)
    output, weights = layer(x, x, x)
    show("output shape", output.shape, (4, 5, 8))
    show("weights: T x T, averaged over the heads", weights.shape, (4, 5, 5))
    show("each row of weights sums to 1", weights.sum(-1), torch.ones(4, 5))
    show("parameters: 4 * (8 * 8 + 8)", count_parameters(layer), 4 * (8 * 8 + 8))
    query, key, value = torch.randn(3, 1, 5, 8, device=device)
    by_hand = ((query @ key.transpose(1, 2)) / math.sqrt(8)).softmax(-1) @ value
    fused = F.scaled_dot_product_attention(query, key, value)
    show("softmax(q k^T / sqrt(8)) v, by hand", (fused - by_hand).abs().max(), 0, atol=1e-4)


@section("layer.recurrent", "N1")
def layer_recurrent(device: torch.device) -> None:
    """A recurrent layer goes through time with a state; an LSTM has four gates, a GRU three."""
    x = torch.randn(4, 5, 3, device=device)  # (B, T, inputs)
    lstm, gru = nn.LSTM(3, 6, batch_first=True).to(device), nn.GRU(3, 6, batch_first=True).to(device)
    output, (hidden, cell) = lstm(x)
    show("LSTM output: the state at every time", output.shape, (4, 5, 6))
    # The state has the layer first and the batch second, even with batch_first=True.
    show("its last hidden and cell state", (hidden.shape, cell.shape), ((1, 4, 6), (1, 4, 6)))
    show("output at the last time - hidden", (output[:, -1] - hidden[0]).abs().max(), 0)
    gate = 6 * 3 + 6 * 6 + 2 * 6  # from the input, from the state, two biases
    show("LSTM parameters: 4 gates", count_parameters(lstm), 4 * gate)
    show("GRU parameters: 3 gates", count_parameters(gru), 3 * gate)
    show("GRU output shape", gru(x)[0].shape, (4, 5, 6))


@section("layer.transformer", "N1")
def layer_transformer(device: torch.device) -> None:
    """A Transformer encoder layer is attention, then two linear layers; both parts have a shortcut and a norm."""
    layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=32, batch_first=True).to(device)
    show("output shape: as the input", layer(torch.randn(4, 5, 8, device=device)).shape, (4, 5, 8))
    attention, feedforward, norms = 4 * (8 * 8 + 8), (8 * 32 + 32) + (32 * 8 + 8), 2 * (8 + 8)
    show("parameters", count_parameters(layer), attention + feedforward + norms)


@section("layer.dropout", "N1", "N3")
def layer_dropout(device: torch.device) -> None:
    """In training Dropout zeroes values at random and scales up the rest; in evaluation it does nothing."""
    layer, x = nn.Dropout(0.25), torch.ones(100_000, device=device)
    dropped = layer(x)
    show("train(): the values, 0 and 1 / 0.75", dropped.unique(), [0, 1 / 0.75])
    show("share of zeros", (dropped == 0).float().mean(), 0.25, atol=0.01)
    show("the mean is kept", dropped.mean(), 1, atol=0.02)
    layer.eval()
    show("eval(): unchanged", bool(torch.equal(layer(x), x)), True)
    maps = nn.Dropout2d(0.5)(torch.ones(8, 16, 3, 3, device=device))  # (B, C, H, W)
    whole = (maps == maps[:, :, :1, :1]).all()
    show("Dropout2d drops whole channels", bool(whole), True)
    show("the values in it", maps.unique(), [0, 2])


@section("mode.batchnorm", "N3")
def mode_batchnorm(device: torch.device) -> None:
    """In training BatchNorm uses the batch and keeps running averages; in evaluation it uses those."""
    layer = nn.BatchNorm1d(1).to(device)
    x = torch.tensor([[1.0], [2.0], [6.0]], device=device)  # mean 3, squared deviations 4 + 1 + 9 = 14
    biased, unbiased, eps = 14 / 3, 14 / 2, 1e-5
    show("train(): (x - mean) / sqrt(var + eps)", layer(x), [[(v - 3) / math.sqrt(biased + eps)] for v in (1, 2, 6)])
    # One step of the running averages, momentum 0.1, from mean 0 and variance 1; the variance is the unbiased one.
    show("running_mean: 0.9 * 0 + 0.1 * 3", layer.running_mean, [0.1 * 3])
    show("running_var: 0.9 * 1 + 0.1 * 7", layer.running_var, [0.9 + 0.1 * unbiased])
    layer.eval()
    expected = [[(v - 0.3) / math.sqrt(0.9 + 0.7 + eps)] for v in (1, 2, 6)]
    show("eval(): with the running averages", layer(x), expected)
    show("which evaluation leaves alone", layer.running_mean, [0.3])
    layer.train()
    show_error("train() with a batch of one", lambda: layer(x[:1]), ValueError, "more than 1 value per channel")


# Models ---------------------------------------------------------------------------------------------------------------


@section("model.containers", "N2")
def model_containers(device: torch.device) -> None:
    """Sequential chains layers, an OrderedDict names them, a ModuleList only holds them, but registers them."""
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).to(device)
    named = nn.Sequential(
        OrderedDict([("hidden", nn.Linear(4, 3)), ("relu", nn.ReLU()), ("output", nn.Linear(3, 2))])
    ).to(device)
    show("names in Sequential", [name for name, _ in plain.named_parameters()], _names("0", "2"))
    show("names with an OrderedDict", [name for name, _ in named.named_parameters()], _names("hidden", "output"))
    named.get_submodule("hidden").load_state_dict(plain[0].state_dict())
    named.get_submodule("output").load_state_dict(plain[2].state_dict())
    x = torch.randn(5, 4, device=device)
    show("equal weights, equal outputs", (plain(x) - named(x)).abs().max(), 0)

    class Holder(nn.Module):
        def __init__(self, layers: Any) -> None:
            super().__init__()
            self.layers = layers

    # A Python list hides its layers: the optimizer gets nothing, .to(device) and state_dict miss them.
    show("parameters seen in a ModuleList", count_parameters(Holder(nn.ModuleList(plain))), 23)
    show("parameters seen in a plain list", count_parameters(Holder(list(plain))), 0)


def _names(*layers: str) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


@section("model.structure", "N2")
def model_structure() -> None:
    """print(model) shows its layers; named_parameters what they learn."""
    structure = """NeuralNetwork(
  (layers): Sequential(
    (0): Linear(in_features=50, out_features=30, bias=True)
    (1): ReLU()
    (2): Linear(in_features=30, out_features=20, bias=True)
    (3): ReLU()
    (4): Linear(in_features=20, out_features=3, bias=True)
  )
)"""
    show("NeuralNetwork(50, 3)", str(models.NeuralNetwork(50, 3)), structure)
    shapes = {name: tuple(p.shape) for name, p in models.SimpleNet().named_parameters()}
    expected = {
        "hidden.0.weight": (128, 784),
        "hidden.0.bias": (128,),
        "hidden.1.weight": (64, 128),
        "hidden.1.bias": (64,),
        "output.weight": (10, 64),
        "output.bias": (10,),
    }
    for name, shape in expected.items():
        show(f"SimpleNet's {name}", shapes.pop(name), shape)
    show("and nothing else", shapes, {})


@section("model.outputs", "N2")
def model_outputs(device: torch.device) -> None:
    """The models of this package: their output is (B, classes), their parameters the sum over the layers."""
    images = torch.randn(2, 1, 28, 28, device=device)
    conv = _conv_count
    cnn = conv(1, 32) + 2 * 32 + conv(32, 64) + 2 * 64 + _linear_count(3136, 128) + _linear_count(128, 10)
    block1 = conv(1, 32) + conv(32, 32) + 2 * (2 * 32)
    block2 = conv(32, 64) + conv(64, 64) + 2 * (2 * 64)
    mnist = block1 + block2 + _linear_count(3136, 256) + _linear_count(256, 10)
    simple = _linear_count(784, 128) + _linear_count(128, 64) + _linear_count(64, 10)
    cases: list[tuple[nn.Module, int]] = [(models.SimpleNet(), simple), (models.CNN(), cnn), (models.MNISTNet(), mnist)]
    for model, parameters in cases:
        name = type(model).__name__
        show(f"{name}: output shape", model.to(device)(images).shape, (2, 10))
        show(f"{name}: parameters", count_parameters(model), parameters)
    mlp = models.MLP(20, 16, 3).to(device)
    show("MLP(20, 16, 3): output shape", mlp(torch.randn(2, 20, device=device)).shape, (2, 3))
    by_hand = _linear_count(20, 16) + 2 * 16 + _linear_count(16, 16) + 2 * 16 + _linear_count(16, 3)
    show("MLP(20, 16, 3): parameters", count_parameters(mlp), by_hand)
    small = models.NeuralNetwork(50, 3)
    show("NeuralNetwork(50, 3): parameters", count_parameters(small), 30 * 51 + 20 * 31 + 3 * 21)
    # Its first linear layer expects 64 * 7 * 7 = 3136 values, and 32 x 32 pixels leave 64 * 8 * 8.
    wrong = images.new_zeros(2, 1, 32, 32)
    show_error("MNISTNet on 32 x 32", lambda: cases[2][0](wrong), RuntimeError, "2x4096 and 3136x256")


def _linear_count(n: int, m: int) -> int:
    return n * m + m


def _conv_count(n: int, m: int, kernel: int = 3) -> int:
    return n * m * kernel**2 + m


@section("predict.softmax", "N9")
def predict_softmax(device: torch.device) -> None:
    """softmax turns logits into probabilities; the largest one names the class and how sure the model is."""
    logits = torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 5.0]], device=device)  # (B, classes)
    total = math.exp(2) + math.exp(1) + math.exp(0.1)
    probabilities = logits.softmax(dim=1)
    show("softmax of 2, 1, 0.1", probabilities[0], [math.exp(2) / total, math.exp(1) / total, math.exp(0.1) / total])
    show("each row sums to 1", probabilities.sum(1), [1, 1])
    confidence, predicted = probabilities.max(dim=1)
    show("predicted classes", predicted, [0, 2])
    show("their probabilities", confidence, [math.exp(2) / total, math.exp(5) / (2 + math.exp(5))])
    show("argmax of the logits is the same", logits.argmax(1), [0, 2])
    # Only differences count: adding 1000 to all logits changes nothing, where exp(1000) alone would be infinite.
    shifted = (logits + 1000).softmax(dim=1)
    show("softmax(logits + 1000) - softmax(logits)", (shifted - probabilities).abs().max(), 0, atol=1e-4)


# Losses ---------------------------------------------------------------------------------------------------------------


@section("loss.cross_entropy", "N4")
def loss_cross_entropy(device: torch.device) -> None:
    """CrossEntropyLoss takes logits and class numbers: the mean of -log(probability of the right class)."""
    logits = torch.tensor([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]], device=device)  # (B, classes)
    targets = torch.tensor([0, 2], device=device)  # (B,), int64
    first = math.log(math.exp(2) + math.exp(1) + math.exp(0.1)) - 2
    second = math.log(math.exp(0.5) + math.exp(2.5) + math.exp(0.3)) - 0.3
    show("CrossEntropyLoss", nn.CrossEntropyLoss()(logits, targets), (first + second) / 2)
    show('reduction="none"', nn.CrossEntropyLoss(reduction="none")(logits, targets), [first, second])
    show('reduction="sum"', nn.CrossEntropyLoss(reduction="sum")(logits, targets), first + second)
    show("ten classes, equal logits: log(10)", F.cross_entropy(torch.zeros(1, 10), torch.tensor([3])), math.log(10))
    # The classic mistake: softmax before the loss. It runs, but the loss is another and training is slow.
    twice = [math.exp(2), math.exp(1), math.exp(0.1)]
    p = [value / sum(twice) for value in twice]
    wrong = math.log(sum(map(math.exp, p))) - p[0]
    show("softmax applied twice", F.cross_entropy(logits[:1].softmax(1), targets[:1]), wrong)


@section("loss.nll", "N4")
def loss_nll(device: torch.device) -> None:
    """NLLLoss takes log-probabilities: after log_softmax it is the cross-entropy."""
    log_probabilities = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], device=device))
    targets = torch.tensor([0, 1], device=device)
    expected = -(math.log(0.7) + math.log(0.3)) / 2
    show("NLLLoss", nn.NLLLoss()(log_probabilities, targets), expected)
    show("CrossEntropyLoss of the same: log_softmax twice", F.cross_entropy(log_probabilities, targets), expected)


@section("loss.smoothing", "N4")
def loss_smoothing(device: torch.device) -> None:
    """Label smoothing e gives the right class 1 - e and spreads e over all classes, so that no logit runs away."""
    p = [0.7, 0.2, 0.1]
    logits = torch.tensor([p], device=device).log()
    surprises = [-math.log(value) for value in p]
    expected = 0.9 * surprises[0] + 0.1 * sum(surprises) / 3
    target = torch.tensor([0], device=device)
    show("label_smoothing=0.1", nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target), expected)
    soft = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]], device=device)
    show("the same by target probabilities", nn.CrossEntropyLoss()(logits, soft), expected)


@section("loss.binary", "N4")
def loss_binary(device: torch.device) -> None:
    """BCELoss takes probabilities, BCEWithLogitsLoss logits, which also survives large ones."""
    logits = torch.tensor([2.0, -1.0], device=device)
    targets = torch.tensor([1.0, 0.0], device=device)  # floats, not class numbers
    p = [1 / (1 + math.exp(-v)) for v in (2, -1)]
    expected = -(math.log(p[0]) + math.log(1 - p[1])) / 2
    show("BCELoss of sigmoid(logits)", nn.BCELoss()(logits.sigmoid(), targets), expected)
    show("BCEWithLogitsLoss of logits", nn.BCEWithLogitsLoss()(logits, targets), expected)
    large, zero = torch.tensor([300.0], device=device), torch.tensor([0.0], device=device)
    show("logit 300, target 0: with logits", nn.BCEWithLogitsLoss()(large, zero), 300)
    show("through a sigmoid the log is cut at 100", nn.BCELoss()(large.sigmoid(), zero), 100)


@section("loss.regression", "N4")
def loss_regression(device: torch.device) -> None:
    """Squared, absolute, and smooth: the last is squared below 1 and straight above, so outliers weigh less."""
    prediction, target = torch.tensor([1.0, 2.0, 6.0], device=device), torch.tensor([1.0, 2.5, 3.0], device=device)
    show("MSELoss: (0 + 0.25 + 9) / 3", nn.MSELoss()(prediction, target), (0 + 0.25 + 9) / 3)
    show("L1Loss: (0 + 0.5 + 3) / 3", nn.L1Loss()(prediction, target), (0 + 0.5 + 3) / 3)
    show("SmoothL1Loss: (0 + 0.125 + 2.5) / 3", nn.SmoothL1Loss()(prediction, target), (0 + 0.125 + 2.5) / 3)


@section("loss.own", "N4")
def loss_own(device: torch.device) -> None:
    """A loss of one's own is a module whose forward returns a scalar: here MSE + weight * L1."""
    prediction = torch.tensor([1.0, 2.0, 6.0], device=device, requires_grad=True)
    target = torch.tensor([1.0, 2.5, 3.0], device=device)
    loss = models.CustomLoss(weight=0.5)(prediction, target)
    show("CustomLoss(weight=0.5)", loss, 9.25 / 3 + 0.5 * 3.5 / 3)
    loss.backward()
    # The slope of each term: (2 d + 0.5 sign(d)) / 3 for the differences 0, -0.5 and 3.
    show("its gradient", prediction.grad, [0, (-1 - 0.5) / 3, (6 + 0.5) / 3])


# Optimizers -----------------------------------------------------------------------------------------------------------


def _descend(make: Callable[..., torch.optim.Optimizer], steps: int, device: torch.device, **options: Any) -> Any:
    """Return w, started at (1, -2), after some steps down the loss sum(w^2) / 2, whose gradient is w itself."""
    w = torch.tensor([1.0, -2.0], requires_grad=True, device=device)
    optimizer = make([w], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (w**2).sum().div(2).backward()
        optimizer.step()
    return w.tolist()


@section("optimizer.sgd", "N5")
def optimizer_sgd(device: torch.device) -> None:
    """SGD steps against the gradient: w - lr * g; momentum adds a velocity v = 0.9 v + g and steps along it."""
    show("SGD: one step", _descend(torch.optim.SGD, 1, device, lr=0.1), [1 - 0.1, -2 + 0.2])
    show("SGD: three steps, each times 0.9", _descend(torch.optim.SGD, 3, device, lr=0.1), [0.9**3, -2 * 0.9**3])
    w, v = 1.0, 0.0
    for _ in range(3):
        v = 0.9 * v + w
        w -= 0.1 * v
    show("momentum 0.9: three steps", _descend(torch.optim.SGD, 3, device, lr=0.1, momentum=0.9), [w, -2 * w])


@section("optimizer.adam", "N5")
def optimizer_adam(device: torch.device) -> None:
    """Adam divides the mean gradient by its typical size: the first step is lr, however large or small the gradient."""
    show("Adam: one step of 0.1 each", _descend(torch.optim.Adam, 1, device, lr=0.1), [1 - 0.1, -2 + 0.1])
    expected = []
    for w in (1.0, -2.0):
        m = v = 0.0
        for t in (1, 2, 3):
            m, v = 0.9 * m + 0.1 * w, 0.999 * v + 0.001 * w**2
            w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        expected.append(w)
    show("Adam: three steps", _descend(torch.optim.Adam, 3, device, lr=0.1), expected)


@section("optimizer.decay", "N5")
def optimizer_decay(device: torch.device) -> None:
    """Weight decay pulls weights to zero: SGD and Adam add it to the gradient, AdamW shrinks the weight itself."""

    def without_gradient(make: Callable[..., torch.optim.Optimizer], decay: float) -> float:
        w = torch.tensor(2.0, requires_grad=True, device=device)
        w.grad = torch.zeros_like(w)
        make([w], lr=0.1, weight_decay=decay).step()
        return w.item()

    show("SGD, decay 0.5: w - lr * 0.5 w", without_gradient(torch.optim.SGD, 0.5), 2 - 0.1 * 0.5 * 2)
    # Where the decay is all the gradient, Adam's division undoes its size: the step is lr. AdamW exists for this.
    show("Adam, decay 0.5: w - lr", without_gradient(torch.optim.Adam, 0.5), 2 - 0.1)
    show("Adam, decay 0.01: the same", without_gradient(torch.optim.Adam, 0.01), 2 - 0.1)
    show("AdamW, decay 0.5: w (1 - lr * 0.5)", without_gradient(torch.optim.AdamW, 0.5), 2 * (1 - 0.1 * 0.5))
    show("AdamW, decay 0.01: w (1 - lr * 0.01)", without_gradient(torch.optim.AdamW, 0.01), 2 * (1 - 0.1 * 0.01))
    both = _descend(torch.optim.AdamW, 1, device, lr=0.1, weight_decay=0.5)
    show("AdamW: shrunk, then Adam's step", both, [1 * 0.95 - 0.1, -2 * 0.95 + 0.1])


@section("optimizer.adaptive", "N5")
def optimizer_adaptive(device: torch.device) -> None:
    """RMSprop divides by a running mean of squared gradients, Adagrad by the root of their sum, so it slows down."""
    rms, ada = [], []
    for start in (1.0, -2.0):
        w, mean = start, 0.0
        for _ in range(2):
            mean = 0.99 * mean + 0.01 * w**2
            w -= 0.1 * w / (math.sqrt(mean) + 1e-8)
        rms.append(w)
        w, total = start, 0.0
        for _ in range(2):
            total += w**2
            w -= 0.1 * w / (math.sqrt(total) + 1e-10)
        ada.append(w)
    # The running mean starts at 0, so RMSprop's first step is 10 lr = lr / sqrt(0.01).
    show("RMSprop: one step", _descend(torch.optim.RMSprop, 1, device, lr=0.1), [0, -1])
    show("RMSprop: two steps", _descend(torch.optim.RMSprop, 2, device, lr=0.1), rms)
    show("Adagrad: one step", _descend(torch.optim.Adagrad, 1, device, lr=0.1), [0.9, -1.9])
    show("Adagrad: two steps", _descend(torch.optim.Adagrad, 2, device, lr=0.1), ada)


@section("optimizer.lbfgs", "N5")
def optimizer_lbfgs(device: torch.device) -> None:
    """LBFGS learns the curvature from its steps; it evaluates the loss several times, so it takes a closure."""

    def minimise(**options: Any) -> list[float]:
        w = torch.tensor([1.0, -2.0], requires_grad=True, device=device)
        optimizer = torch.optim.LBFGS([w], **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = 0.5 * (w[0] - 3) ** 2 + 2 * (w[1] - 4) ** 2
            loss.backward()
            return loss

        optimizer.step(closure)
        return w.tolist()

    # The gradient at (1, -2) is (-2, -24); the first step is cut to lr / sum(|g|).
    show("first iteration: w - g / 26", minimise(max_iter=1), [1 + 2 / 26, -2 + 24 / 26])
    exact = minimise(max_iter=20, line_search_fn="strong_wolfe")
    show("20 iterations reach the minimum (3, 4)", exact, [3, 4], atol=1e-3)


# Schedules ------------------------------------------------------------------------------------------------------------


def _rates(make: Callable[[torch.optim.Optimizer], Any], steps: int, metrics: list[float] | None = None) -> list[float]:
    """Return the learning rate, 1.0 at first, in each step; the schedule moves after the optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*[metrics[step]] if metrics else [])
    return rates


@section("schedule.step", "N6")
def schedule_step() -> None:
    """StepLR multiplies the rate by gamma every step_size epochs."""
    rates = _rates(lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1), 6)
    show("step_size=2, gamma=0.1", rates, [0.1 ** (t // 2) for t in range(6)])


@section("schedule.cosine", "N6")
def schedule_cosine() -> None:
    """CosineAnnealingLR follows half a cosine from the rate down to eta_min."""
    rates = _rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=0.2), 5)
    show("T_max=4, eta_min=0.2", rates, [0.2 + 0.8 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)])
    # It is periodic: run on past T_max and the rate rises again.
    longer = _rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4), 9)
    show("after 2 * T_max steps: back at the start", longer[8], 1.0)


@section("schedule.plateau", "N6")
def schedule_plateau() -> None:
    """ReduceLROnPlateau lowers the rate after more than `patience` epochs without a better loss."""
    losses = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0]
    rates = _rates(lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2), 7, losses)
    # 4.0 is best after the second epoch; the third bad epoch in a row is the fifth.
    show("losses 5 4 4 4 4 3 3, patience 2", rates, [1, 1, 1, 1, 1, 0.5, 0.5])


@section("schedule.one_cycle", "N6")
def schedule_one_cycle() -> None:
    """OneCycleLR rises to max_lr, then falls far below the start, along two half cosines; it steps per batch."""
    total, low, top, end = 10, 1 / 25, 1.0, 1 / 25 / 1e4
    rates = _rates(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=top, total_steps=total), total)
    peak = 0.3 * total - 1  # pct_start = 0.3
    rise = [_half_cosine(low, top, t / peak) for t in range(3)]
    fall = [_half_cosine(top, end, (t - peak) / (total - 1 - peak)) for t in range(3, total)]
    show("max_lr=1, 10 steps", rates, rise + fall)
    show("its top is at step", rates.index(max(rates)), 2)
    show("its end: max_lr / 25 / 10,000", rates[-1], 4e-6, atol=0)


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@section("schedule.warmup", "N6")
def schedule_warmup() -> None:
    """LinearLR warms up: small first steps, while Adam's averages are young and the weights random."""
    rates = _rates(lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4), 6)
    show("from 0.2 in 4 steps", rates, [0.2, 0.4, 0.6, 0.8, 1, 1])


@section("schedule.warmup_cosine", "N6")
def schedule_warmup_cosine() -> None:
    """SequentialLR puts schedules in a row: a warm-up, then a cosine."""

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[3])

    cosine = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
    show("3 steps up, 4 steps down", _rates(make, 8), [0.25, 0.5, 0.75, *cosine])


# Initialisation -------------------------------------------------------------------------------------------------------


@section("init.layers", "N7")
def init_layers() -> None:
    """model.apply(init_weights) gives each kind of layer the start that suits it."""
    linear, conv, table, norm = nn.Linear(300, 100), nn.Conv2d(16, 64, 3), nn.Embedding(200, 100), nn.LayerNorm(3)
    nn.ModuleList([linear, conv, table, norm]).apply(init_weights)
    bound = math.sqrt(6 / (300 + 100))
    show("Linear: Xavier, uniform within +-bound", linear.weight.abs().max(), bound, rtol=0.01)
    show("its spread: bound / sqrt(3)", linear.weight.std(), bound / math.sqrt(3), rtol=0.03)
    show("its bias", linear.bias.abs().max(), 0)
    show("Conv2d: Kaiming, sqrt(2 / fan_out)", conv.weight.std(), math.sqrt(2 / (64 * 3 * 3)), rtol=0.05)
    show("Embedding: normal(0, 0.02)", table.weight.std(), 0.02, rtol=0.05)
    show("LayerNorm: weight and bias", [norm.weight, norm.bias], [[1, 1, 1], [0, 0, 0]])


@section("init.spread", "N7")
def init_spread(device: torch.device) -> None:
    """Through a ReLU layer of n units the mean square grows by n * var(w) / 2: only 2 / n as variance keeps it."""
    n = 512
    starts: dict[str, tuple[Callable[[Tensor], Any], float]] = {
        "Kaiming, var 2 / n": (lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"), 1.0),
        "PyTorch's default, var 1 / 3n": (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), 1 / 6),
        "normal(0, 0.01)": (lambda w: nn.init.normal_(w, 0, 0.01), n * 0.01**2 / 2),
    }
    for label, (fill, factor) in starts.items():
        show(f"{label}: per layer", _growth(n, nn.ReLU(), fill, device), factor, rtol=0.15)
    # Xavier's variance 1 / n keeps the spread where the layer's function is straight.
    show("Xavier, without ReLU", _growth(n, nn.Identity(), nn.init.xavier_uniform_, device), 1.0, rtol=0.15)
    show("Xavier, with ReLU", _growth(n, nn.ReLU(), nn.init.xavier_uniform_, device), 0.5, rtol=0.15)


@torch.no_grad()
def _growth(n: int, activation: nn.Module, fill: Callable[[Tensor], Any], device: torch.device) -> float:
    """Return the factor per layer by which the mean square changes in ten layers of n units."""
    x = activation(torch.randn(256, n, device=device))  # (B, n)
    first = x.square().mean()
    for _ in range(10):
        w = torch.empty(n, n, device=device)
        fill(w)
        x = activation(x @ w.T)
    return float((x.square().mean() / first) ** 0.1)


# Transfer, ensembles, several devices ---------------------------------------------------------------------------------


@section("transfer.count", "N8")
def transfer_count() -> None:
    """torchvision's resnet18 has 11,689,512 parameters, most of them in the last of its four stages."""
    from torchvision.models import resnet18  # late: slow to import

    def stage(n: int, m: int) -> int:
        """Two blocks of two 3 x 3 convolutions without bias, each with a norm; from the second stage on a shortcut."""
        convolutions = n * m * 9 + 3 * m * m * 9
        shortcut = n * m + 2 * m if n != m else 0
        return convolutions + 4 * 2 * m + shortcut

    model = resnet18(weights=None)
    by_part: dict[str, int] = {}
    for name, count in count_parameters_by_layer(model, verbose=False).items():
        part = name.split(".")[0]
        by_part[part] = by_part.get(part, 0) + count
    expected = {
        "conv1": 3 * 64 * 7 * 7,
        "bn1": 2 * 64,
        "layer1": stage(64, 64),
        "layer2": stage(64, 128),
        "layer3": stage(128, 256),
        "layer4": stage(256, 512),
        "fc": 512 * 1000 + 1000,
    }
    for part, count in expected.items():
        show(part, by_part.pop(part), count)
    show("and nothing else", by_part, {})
    show("all", count_parameters(model), 11_689_512)


@section("transfer.freeze", "N8")
def transfer_freeze(device: torch.device) -> None:
    """Freeze the body, replace the head: only the head learns, and the body stays as it was."""
    from torchvision.models import resnet18

    model = freeze(resnet18(weights=None))  # in earnest: weights="DEFAULT", trained on ImageNet
    model.fc = nn.Linear(512, 2)  # a new layer is trainable
    model.to(device).eval()  # eval, or the body's BatchNorm statistics would still move
    show("trainable parameters: 512 * 2 + 2", count_parameters(model), 512 * 2 + 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    images, targets = torch.randn(4, 3, 32, 32, device=device), torch.tensor([0, 1, 0, 1], device=device)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    show("changed by a step", _changed(model, before), ["fc.weight", "fc.bias"])
    model.train()
    model(images)
    moved = {name.split(".")[-1] for name in _changed(model, before) if not name.startswith("fc")}
    show("changed by a forward pass in train()", sorted(moved), ["num_batches_tracked", "running_mean", "running_var"])


def _changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


@section("ensemble.mean", "N10")
def ensemble_mean(device: torch.device) -> None:
    """EnsembleModel averages its members' probabilities, not their logits."""
    x = torch.zeros(1, 3, device=device)
    members = [_constant_member([0.9, 0.1]), _constant_member([0.2, 0.8])]
    ensemble = models.EnsembleModel(members).to(device)
    show("mean of (0.9, 0.1) and (0.2, 0.8)", ensemble(x).exp(), [[0.55, 0.45]])
    logits = sum(member(x) for member in members) / 2
    odds = math.sqrt(0.9 / 0.1 * 0.2 / 0.8)  # the mean logit is the geometric mean of the odds
    show("mean of the logits instead", torch.as_tensor(logits).softmax(1), [[odds / (1 + odds), 1 / (1 + odds)]])


def _constant_member(probabilities: list[float]) -> nn.Module:
    """Return a model whose logits are log(probabilities) for every input of zeros."""
    layer = nn.Linear(3, len(probabilities))
    with torch.no_grad():
        layer.bias.copy_(torch.tensor(probabilities).log())
    return layer


@section("ensemble.better", "N10")
def ensemble_better() -> None:
    """Members that were trained on other samples err differently; their mean does better on data that none has seen."""
    torch.set_num_threads(1)  # tensors this small gain nothing from threads, and wait long for them on a busy machine
    x, y = _rings(200)
    members = [_train_member(x, y) for _ in range(15)]
    held_x, held_y = _rings(2000)
    with torch.no_grad():
        outputs = [member(held_x) for member in members]
        together = models.EnsembleModel(members)(held_x)
    losses = [F.cross_entropy(output, held_y).item() for output in outputs]
    loss = F.cross_entropy(together, held_y).item()
    accuracies = [(output.argmax(1) == held_y).float().mean().item() for output in outputs]
    accuracy = (together.argmax(1) == held_y).float().mean().item()
    print(f"    held-out loss: ensemble {loss:.3f}, members {min(losses):.3f} to {max(losses):.3f}")
    print(f"    accuracy: ensemble {accuracy:.1%}, members {min(accuracies):.1%} to {max(accuracies):.1%}")
    # -log is convex, so by Jensen's inequality the mean probability loses no more than the members do on average.
    show("its loss is at most the mean loss: always", loss <= sum(losses) / len(losses), True)
    # These two are no law, but held for each of 33 seeds: such members err in different places.
    show("its loss is below that of every member", loss < min(losses), True)
    show("its accuracy is above the members' mean", accuracy > sum(accuracies) / len(accuracies), True)


def _rings(count: int) -> tuple[Tensor, Tensor]:
    """Return points of two noisy rings around each other, (N, 2), and their ring, (N,)."""
    ring = torch.arange(count) % 2
    angle = 2 * math.pi * torch.rand(count)
    radius = 1.0 + ring + 0.45 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), ring


def _train_member(x: Tensor, y: Tensor) -> nn.Module:
    """Train a small network on 60 samples drawn from x: few enough that each member overfits in its own way."""
    drawn = torch.randint(len(x), (60,))
    model = models.SimpleNet(2, (32, 32), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[drawn]), y[drawn]).backward()
        optimizer.step()
    return model


@section("parallel.data_parallel", "N11")
def parallel_data_parallel() -> None:
    """DataParallel splits each batch over the GPUs of one process; without a GPU it only passes the batch through."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    gpus = 0 if accelerator is None or accelerator.type == "mps" else torch.accelerator.device_count()
    device = torch.device(accelerator.type, 0) if accelerator and gpus else torch.device("cpu")  # it picks by itself
    model = models.SimpleNet(4, (3,), 2).to(device)
    wrapped = nn.DataParallel(model)
    x = torch.randn(6, 4, device=device)
    show("it uses all GPUs", len(wrapped.device_ids), gpus)
    show("outputs with and without: difference", (wrapped(x) - model(x)).abs().max(), 0)
    # Its state_dict has another prefix, and loads elsewhere only after unwrapping: save wrapped.module.
    show("first name in its state_dict", next(iter(wrapped.state_dict())), "module.hidden.0.weight")
    show("wrapped.module is the model", wrapped.module is model, True)


@section("parallel.why_ddp", "N11")
def parallel_why_ddp(device: torch.device) -> None:
    """DistributedDataParallel replaced it: a process per GPU, copies that stay, and gradients that are averaged."""
    print("    DataParallel copies the model to every GPU in every forward pass and gathers the outputs on the first;")
    print("    its threads share one interpreter, and one machine. DDP copies once, and exchanges gradients while")
    print("    backward still runs (and buffers, such as BatchNorm's averages); see scripts/train_ddp.py.")
    model = models.SimpleNet(4, (3,), 2).to(device)
    x, y = torch.randn(6, 4, device=device), torch.tensor([0, 1, 0, 1, 1, 0], device=device)
    whole = _gradient(model, x, y)
    equal = (_gradient(model, x[:3], y[:3]) + _gradient(model, x[3:], y[3:])) / 2
    show("mean of two equal shares - the whole batch", (equal - whole).abs().max(), 0)
    first, rest = _gradient(model, x[:1], y[:1]), _gradient(model, x[1:], y[1:])
    # With unequal shares the plain mean is wrong: weight each share by its samples.
    show("shares of 1 and 5: is the plain mean right?", bool(torch.allclose((first + rest) / 2, whole)), False)
    show("weighted by samples - the whole batch", ((1 * first + 5 * rest) / 6 - whole).abs().max(), 0)


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the mean loss as one vector, as a process with these samples computes it."""
    replica = copy.deepcopy(model)
    F.cross_entropy(replica(x), y).backward()
    return torch.cat([p.grad.flatten() for p in replica.parameters() if p.grad is not None])


def main(argv: list[str] | None = None) -> int:
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())

"""The networks and their helpers against hand formulas, plain PyTorch and closed forms."""

from __future__ import annotations

import contextlib
import doctest
import io
import math
import unittest
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from torchbasics import models
from torchbasics.models import (
    CNN,
    MLP,
    CustomLoss,
    EnsembleModel,
    FastNet,
    MNISTNet,
    NeuralNetwork,
    ShiftedViews,
    SimpleNet,
    SmallVGG,
    count_parameters,
    count_parameters_by_layer,
    freeze,
    init_weights,
    make_model,
    unfreeze,
)

FRESH_NORM = 1 / math.sqrt(1 + 1e-5)  # what BatchNorm with running mean 0 and variance 1 multiplies by


def linear(n: int, m: int) -> int:
    return n * m + m


def conv(n: int, m: int) -> int:
    """Parameters of a 3x3 convolution and its BatchNorm."""
    return 9 * n * m + m + 2 * m


class ParameterCounts(unittest.TestCase):
    def check(self, model: nn.Module, by_hand: int) -> None:
        self.assertEqual(count_parameters(model), by_hand)

    def test_models_for_vectors(self) -> None:
        self.assertEqual(linear(784, 128) + linear(128, 64) + linear(64, 10), 109_386)
        self.check(SimpleNet(), 109_386)
        self.check(SimpleNet(784, (128, 64), 10), 109_386)
        self.check(SimpleNet(10, 50, 2), linear(10, 50) + linear(50, 2))
        self.check(SimpleNet(20, (), 3), linear(20, 3))
        self.check(NeuralNetwork(50, 3), 2_213)
        self.check(MLP(20, 16, 4), linear(20, 16) + 2 * 16 + linear(16, 16) + 2 * 16 + linear(16, 4))

    def test_models_for_images(self) -> None:
        self.check(CNN(), conv(1, 32) + conv(32, 64) + linear(64 * 7 * 7, 128) + linear(128, 10))
        wide = conv(3, 32) + conv(32, 64) + linear(64 * 8 * 8, 128) + linear(128, 5)
        self.check(CNN(5, in_channels=3, image_size=32), wide)
        blocks = conv(1, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64)
        self.assertEqual(blocks + linear(64 * 7 * 7, 256) + linear(256, 10), 871_018)
        self.check(MNISTNet(), 871_018)
        weights = 25 * 16 + 2 * 16 + 9 * 16 * 48 + 2 * 48 + 16 * 48 * 256 + 2 * 256
        self.assertEqual(weights + linear(256, 10), 207_130)
        self.check(FastNet(), 207_130)
        pairs = ((1, 8), (8, 16), (16, 32), (32, 64), (64, 128))
        self.assertEqual(sum(9 * n * m + 2 * m for n, m in pairs) + linear(4 * 128, 10), 103_618)
        self.check(SmallVGG(), 103_618)
        self.check(make_model({"model": "widevgg"}), 558_514)


class Forward(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def test_simple_net_against_plain_formula(self) -> None:
        model, x = SimpleNet(6, (5, 4), 3), torch.randn(2, 1, 2, 3)
        w = list(model.parameters())
        h = (x.reshape(2, 6) @ w[0].T + w[1]).clamp(min=0)
        h = (h @ w[2].T + w[3]).clamp(min=0)
        torch.testing.assert_close(model(x), h @ w[4].T + w[5])

    def test_mlp_against_plain_formula(self) -> None:
        model, x = MLP(6, 5, 3).eval(), torch.randn(2, 6)
        w = list(model.parameters())
        h = ((x @ w[0].T + w[1]) * FRESH_NORM).clamp(min=0)
        h = ((h @ w[4].T + w[5]) * FRESH_NORM).clamp(min=0)
        torch.testing.assert_close(model(x), h @ w[8].T + w[9])

    def test_cnn_against_functional_calls(self) -> None:
        model, x = CNN(image_size=8).eval(), torch.randn(2, 1, 8, 8)
        w = list(model.parameters())
        h = F.max_pool2d(F.relu(F.conv2d(x, w[0], w[1], padding=1) * FRESH_NORM), 2)
        h = F.max_pool2d(F.relu(F.conv2d(h, w[4], w[5], padding=1) * FRESH_NORM), 2)
        h = F.relu(F.linear(h.reshape(2, -1), w[8], w[9]))
        torch.testing.assert_close(model(x), F.linear(h, w[10], w[11]))

    def test_mnist_net_against_functional_calls(self) -> None:
        model, h = MNISTNet(image_size=12).eval(), torch.randn(2, 1, 12, 12)
        w = list(model.parameters())
        logits = model(h)
        for i in (0, 4, 8, 12):
            h = F.relu(F.conv2d(h, w[i], w[i + 1], padding=1) * FRESH_NORM)
            h = F.max_pool2d(h, 2) if i in (4, 12) else h
        h = F.relu(F.linear(h.reshape(2, -1), w[16], w[17]))
        torch.testing.assert_close(logits, F.linear(h, w[18], w[19]))

    def test_fast_net_against_functional_calls(self) -> None:
        model, x = FastNet(image_size=20).eval(), torch.randn(2, 1, 20, 20)
        w = list(model.parameters())
        h = F.max_pool2d(F.relu(F.conv2d(x, w[0], stride=2) * FRESH_NORM), 2)
        h = F.relu(F.conv2d(h, w[3]) * FRESH_NORM)
        h = F.relu(F.linear(h.permute(0, 2, 3, 1).reshape(2, -1), w[6]) * FRESH_NORM)
        torch.testing.assert_close(model(x), F.linear(h, w[9], w[10]))

    def test_small_vgg_against_functional_calls(self) -> None:
        model, h = SmallVGG(image_size=24, channels=(1, 2, 4, 3, 8)).eval(), torch.randn(2, 1, 24, 24)
        logits = model(h)
        for i, weight in enumerate(p for p in model.parameters() if p.ndim == 4):
            h = F.relu(F.conv2d(h, weight) * FRESH_NORM)
            h = F.max_pool2d(h, 2) if i % 2 else h
        torch.testing.assert_close(logits, F.linear(h.flatten(1), model.classifier.weight, model.classifier.bias))

    def test_each_model_gives_finite_logits_and_every_parameter_a_gradient(self) -> None:
        for name in models.MODELS:
            for size in (28, 36):
                model = make_model({"model": name, "num_classes": 5, "in_channels": 2, "image_size": size})
                logits = model(torch.randn(4, 2, size, size))
                self.assertEqual(logits.shape, (4, 5), name)
                self.assertTrue(logits.isfinite().all(), name)
                F.cross_entropy(logits, torch.arange(4)).backward()
                self.assertEqual([n for n, p in model.named_parameters() if p.grad is None], [], name)

    def test_dropout_drops_whole_channels_in_training_only(self) -> None:
        for model, dropped in ((MNISTNet(dropout=0.5), 0.5), (SmallVGG(dropout=0.5), 0.25)):
            layers = [m for m in model.modules() if isinstance(m, nn.Dropout2d)]
            self.assertEqual({layer.p for layer in layers}, {dropped})
            maps = layers[0](torch.ones(50, 32, 3, 3)).flatten(2)
            self.assertTrue(((maps == 0).all(2) | (maps != 0).all(2)).all())
            self.assertAlmostEqual((maps == 0).float().mean().item(), dropped, delta=0.05)
            x = torch.ones(1, 1, 28, 28)
            self.assertTrue(torch.equal(model.eval()(x), model(x)))

    def test_mnist_net_starts_with_the_spread_of_kaiming(self) -> None:
        for layer in MNISTNet().modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                expected = math.sqrt(2 / layer.weight[0].numel())  # fan in
                tolerance = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors of a standard deviation
                self.assertAlmostEqual(layer.weight.std().item() / expected, 1, delta=tolerance)
                self.assertEqual(layer.state_dict()["bias"].abs().max(), 0)

    def test_wrong_arguments_are_refused_with_expected_and_actual_value(self) -> None:
        for build, message in (
            (lambda: CNN(image_size=30), "multiple of 4.*30"),
            (lambda: MNISTNet(in_channels=0), "positive integers, got 10, 0, 28"),
            (lambda: FastNet(image_size=12), "at least 16.*12"),
            (lambda: SmallVGG(image_size=20), "at least 24.*20"),
            (lambda: SimpleNet(hidden_sizes=(3, -1)), "positive integers, got 784, 3, -1, 10"),
            (lambda: NeuralNetwork(2.5, 1), "positive integers, got 2.5, 1"),  # type: ignore[arg-type]
            (lambda: MLP(3, 0, 1), "positive integers, got 3, 0, 1"),
            (lambda: make_model({"model": "resnet"}), "mnistnet, cnn, .*, smallvgg, widevgg, got 'resnet'"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                build()


class MakeModel(unittest.TestCase):
    def test_each_name_builds_its_class_from_the_keys(self) -> None:
        expected = {
            "mnistnet": MNISTNet(7, 0.1, 3, 32),
            "cnn": CNN(7, 3, 32, 0.1),
            "mlp": MLP(3 * 32 * 32, 256, 7, 0.1),
            "simplenet": SimpleNet(3 * 32 * 32, num_classes=7),
            "fastnet": FastNet(7, 3, 32),
            "smallvgg": SmallVGG(7, 3, 32, 0.1),
            "widevgg": SmallVGG(7, 3, 32, 0.1, channels=(24, 48, 96, 192, 192)),
        }
        self.assertEqual(set(models.MODELS), set(expected))
        config = {"num_classes": 7, "in_channels": 3, "image_size": 32, "dropout": 0.1, "learning_rate": 1e-3}
        for name, model in expected.items():
            self.assertEqual(str(make_model(config | {"model": name})), str(model), name)
        self.assertEqual(str(make_model({"model": "mnistnet"})), str(MNISTNet()))  # absent keys: the model's defaults


class Averages(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.members = [SimpleNet(4, 3, 3), SimpleNet(4, 5, 3), NeuralNetwork(4, 3)]
        self.x, self.targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

    def test_an_ensemble_gives_the_log_of_the_mean_probability(self) -> None:
        mean = torch.stack([F.softmax(member(self.x), 1) for member in self.members]).mean(0)
        output = EnsembleModel(self.members)(self.x)
        torch.testing.assert_close(output.exp(), mean)
        torch.testing.assert_close(output.softmax(1), mean)
        torch.testing.assert_close(F.cross_entropy(output, self.targets), F.nll_loss(output, self.targets))

    def test_an_ensemble_of_certain_members_stays_finite(self) -> None:
        certain = nn.Linear(1, 2, bias=False)
        certain.weight.data = torch.tensor([[1000.0], [0.0]])
        torch.testing.assert_close(EnsembleModel([certain])(torch.ones(1, 1)), torch.tensor([[0.0, -1000.0]]))

    def test_regressors_are_averaged_as_they_are(self) -> None:
        for layers in ([nn.Linear(4, 1), nn.Linear(4, 1)], [nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))] * 2):
            mean = (layers[0](self.x) + layers[1](self.x)) / 2
            torch.testing.assert_close(EnsembleModel(layers)(self.x), mean)
        images = torch.randn(2, 1, 28, 28)
        mean = images.mean((1, 2, 3)).unsqueeze(1)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        torch.testing.assert_close(ShiftedViews(pooled)(images), mean, atol=0.05, rtol=0)

    def test_shifted_views_average_the_probabilities_of_nine_shifts(self) -> None:
        x = F.pad(torch.randn(2, 1, 26, 26), (1, 1, 1, 1))  # empty at the edge: a roll loses nothing
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3))
        rolled = [torch.roll(x, (dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        expected = torch.stack([model(view).softmax(1) for view in rolled]).mean(0)
        torch.testing.assert_close(ShiftedViews(model)(x).exp(), expected)

    def test_shifted_views_move_by_a_28th_and_repeat_the_edges(self) -> None:
        class Record(nn.Module):
            def forward(self, view: torch.Tensor) -> torch.Tensor:
                seen.append(view[0, 0, :3, 0].tolist())
                return view.flatten(1)

        for size, expected in ((28, [[0, 0, 1], [0, 1, 2], [1, 2, 3]]), (56, [[0, 0, 0], [0, 1, 2], [2, 3, 4]])):
            seen: list[list[float]] = []
            ShiftedViews(Record())(torch.arange(float(size))[:, None].expand(1, 1, size, size))
            self.assertEqual(seen[::3], expected)


class Loss(unittest.TestCase):
    def test_custom_loss_by_hand(self) -> None:
        input, target = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 3.0])
        # squared: (0 + 4 + 1) / 3, absolute: (0 + 2 + 1) / 3
        self.assertAlmostEqual(CustomLoss()(input, target).item(), 5 / 3 + 1, places=6)
        self.assertAlmostEqual(CustomLoss(weight=0.5)(input, target).item(), 5 / 3 + 0.5, places=6)

    def test_custom_loss_refuses_shapes_that_would_broadcast(self) -> None:
        with self.assertRaisesRegex(ValueError, r"\(4, 1\).*\(4,\)"):
            CustomLoss()(torch.zeros(4, 1), torch.zeros(4))


class InitWeights(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def test_linear_is_xavier_uniform(self) -> None:
        layer = nn.Linear(300, 100).apply(init_weights)
        bound = math.sqrt(6 / 400)
        self.assertLessEqual(layer.weight.abs().max().item(), bound)
        self.assertAlmostEqual(layer.weight.std().item(), bound / math.sqrt(3), delta=0.001)
        self.assertEqual(layer.bias.abs().max(), 0)

    def test_convolution_is_kaiming_fan_out(self) -> None:
        layer = nn.Conv2d(16, 64, 3).apply(init_weights)
        self.assertAlmostEqual(layer.weight.std().item() / math.sqrt(2 / (64 * 9)), 1, delta=0.04)
        self.assertEqual(layer.state_dict()["bias"].abs().max(), 0)

    def test_embedding_is_normal_and_keeps_its_padding_row(self) -> None:
        weight = nn.Embedding(200, 100, padding_idx=3).apply(init_weights).weight
        self.assertEqual(weight[3].abs().max(), 0)
        self.assertAlmostEqual(torch.cat([weight[:3], weight[4:]]).std().item(), 0.02, delta=0.0006)
        self.assertGreater(weight.abs().max().item(), 0.05)  # a uniform of that spread would end at 0.035

    def test_norms_are_constant_and_other_modules_stay(self) -> None:
        for layer in (nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4, affine=False)):
            for p in layer.parameters():
                nn.init.constant_(p, 7.0)
            layer.apply(init_weights)
            for name, p in layer.named_parameters():
                self.assertEqual(p.tolist(), [1.0 if name == "weight" else 0.0] * 4)
        self.assertEqual(nn.PReLU(init=0.3).apply(init_weights).weight.item(), torch.tensor(0.3).item())

    def test_a_weight_that_is_computed_from_others_is_left_with_a_warning(self) -> None:
        convolution = nn.Conv2d(2, 3, 3)
        prune.l1_unstructured(convolution, "weight", 0.3)
        for layer in (parametrizations.weight_norm(nn.Linear(8, 3)), convolution):
            before = layer.weight.clone()
            with self.assertWarnsRegex(UserWarning, f"init_weights left the weight of a {type(layer).__name__}"):
                nn.Sequential(layer).apply(init_weights)
            layer(torch.ones(2, 2, 8, 8))
            self.assertTrue(torch.equal(layer.weight, before))
            self.assertEqual(layer.state_dict()["bias"].abs().max(), 0)

    def test_ordinary_layers_give_no_warning(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in models.MODELS:
                make_model({"model": name}).apply(init_weights)
            nn.BatchNorm1d(4, affine=False).apply(init_weights)
        self.assertEqual([str(warning.message) for warning in caught], [])


class FreezeAndCount(unittest.TestCase):
    def table(self, model: nn.Module, verbose: bool = True) -> tuple[dict[str, int], list[str]]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            counts = count_parameters_by_layer(model, verbose)
        return counts, out.getvalue().splitlines()

    def test_frozen_layers_do_not_move(self) -> None:
        model = SimpleNet(4, 3, 2)
        self.assertIs(freeze(model.hidden), model.hidden)
        self.assertEqual(count_parameters(model), linear(3, 2))
        self.assertEqual(count_parameters(model, trainable_only=False), linear(4, 3) + linear(3, 2))
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 2).backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        self.assertEqual(moved, {"output.weight", "output.bias"})
        self.assertIs(unfreeze(model), model)
        self.assertEqual(count_parameters(model), linear(4, 3) + linear(3, 2))

    def test_the_table_has_a_row_for_each_layer_with_its_sizes(self) -> None:
        model = SimpleNet()
        freeze(model.hidden[0])
        counts, lines = self.table(model)
        self.assertEqual(counts, {"hidden.0": 100_480, "hidden.1": 8_256, "output": 650})
        self.assertEqual(lines[0].split(), ["layer", "type", "parameters", "FP32", "KB", "FP16", "KB"])
        self.assertEqual(lines[1].split(), ["hidden.0", "Linear", "(frozen)", "100,480", "401.9", "201.0"])
        self.assertEqual(lines[-1].split(), ["total", "109,386", "437.5", "218.8"])
        self.assertEqual({len(line) for line in lines}, {len(lines[0])})
        self.assertEqual(self.table(model, verbose=False), (counts, []))

    def test_shared_parameters_count_once(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        counts, _ = self.table(model)
        self.assertEqual(counts, {"0": 12, "2": 3})
        self.assertEqual(sum(counts.values()), count_parameters(model))

    def test_parameters_of_the_model_itself_and_models_without_parameters(self) -> None:
        self.assertEqual(self.table(nn.PReLU(5))[0], {"": 5})
        self.assertEqual(self.table(nn.ReLU())[0], {})


class Doctests(unittest.TestCase):
    def test_docstrings(self) -> None:
        result = doctest.testmod(models)
        self.assertGreater(result.attempted, 0)
        self.assertEqual(result.failed, 0)


if __name__ == "__main__":
    unittest.main()

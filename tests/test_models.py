"""The networks and their helpers against hand formulas, plain PyTorch and closed forms."""

from __future__ import annotations

import contextlib
import doctest
import io
import math
import unittest

import torch
from torch import nn
from torch.nn import functional as F

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
    unfreeze,
)


def linear(n: int, m: int) -> int:
    return n * m + m


def conv(n: int, m: int, kernel: int = 3) -> int:
    return n * m * kernel * kernel + m


def norm(n: int) -> int:
    return 2 * n


def all_models() -> list[tuple[nn.Module, tuple[int, ...], int]]:
    """Each model with the shape of one sample and its number of outputs."""
    return [
        (SimpleNet(), (784,), 10),
        (NeuralNetwork(50, 3), (50,), 3),
        (MLP(20, 16, 4), (20,), 4),
        (CNN(), (1, 28, 28), 10),
        (MNISTNet(), (1, 28, 28), 10),
        (FastNet(), (1, 28, 28), 10),
        (SmallVGG(), (1, 28, 28), 10),
        (EnsembleModel([SimpleNet(), SimpleNet()]), (784,), 10),
    ]


class ParameterCounts(unittest.TestCase):
    def check(self, model: nn.Module, by_hand: int) -> None:
        self.assertEqual(count_parameters(model), by_hand)

    def test_simple_net(self) -> None:
        self.assertEqual(linear(784, 128) + linear(128, 64) + linear(64, 10), 109_386)
        self.check(SimpleNet(), 109_386)
        self.check(SimpleNet(20, (7,), 3), linear(20, 7) + linear(7, 3))
        self.check(SimpleNet(20, (), 3), linear(20, 3))

    def test_neural_network(self) -> None:
        self.assertEqual(linear(50, 30) + linear(30, 20) + linear(20, 3), 2_213)
        self.check(NeuralNetwork(50, 3), 2_213)

    def test_mlp(self) -> None:
        self.check(MLP(20, 16, 4), linear(20, 16) + norm(16) + linear(16, 16) + norm(16) + linear(16, 4))

    def test_cnn(self) -> None:
        convolutions = conv(1, 32) + norm(32) + conv(32, 64) + norm(64)
        self.check(CNN(), convolutions + linear(64 * 7 * 7, 128) + linear(128, 10))

    def test_mnist_net(self) -> None:
        block1 = conv(1, 32) + norm(32) + conv(32, 32) + norm(32)
        block2 = conv(32, 64) + norm(64) + conv(64, 64) + norm(64)
        self.assertEqual(block1 + block2 + linear(64 * 7 * 7, 256) + linear(256, 10), 871_018)
        self.check(MNISTNet(), 871_018)

    def test_fast_net(self) -> None:
        weights = 25 * 16 + norm(16) + 9 * 16 * 48 + norm(48) + 16 * 48 * 256 + norm(256)
        self.assertEqual(weights + linear(256, 10), 207_130)
        self.check(FastNet(), 207_130)

    def test_small_vgg(self) -> None:
        pairs = ((1, 16), (16, 32), (32, 64), (64, 64), (64, 128))
        self.assertEqual(sum(9 * n * m + norm(m) for n, m in pairs) + linear(4 * 128, 10), 139_514)
        self.check(SmallVGG(), 139_514)
        pairs = ((1, 2), (2, 3), (3, 6), (6, 5), (5, 12))
        by_hand = sum(9 * n * m + norm(m) for n, m in pairs) + linear(4 * 12, 10)
        self.check(SmallVGG(channels=[2, 3, 6, 5, 12]), by_hand)
        self.check(models.make_model("widevgg"), 558_514)

    def test_image_sizes_and_channels(self) -> None:
        convolutions = conv(3, 32) + norm(32) + conv(32, 64) + norm(64)
        self.check(CNN(5, in_channels=3, image_size=32), convolutions + linear(64 * 8 * 8, 128) + linear(128, 5))
        for size in (4, 12, 32):
            for model in (CNN(in_channels=2, image_size=size), MNISTNet(in_channels=2, image_size=size)):
                self.assertEqual(model(torch.randn(2, 2, size, size)).shape, (2, 10))
        for kind, sizes in ((SmallVGG, (24, 28, 36)), (FastNet, (16, 20, 24, 36))):
            for size in sizes:
                model = kind(in_channels=2, image_size=size)
                self.assertEqual(model(torch.randn(2, 2, size, size)).shape, (2, 10))


class Forward(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def test_simple_net_against_plain_formula(self) -> None:
        model = SimpleNet(6, (5, 4), 3)
        x = torch.randn(2, 1, 2, 3)
        w = list(model.parameters())
        h = (x.reshape(2, 6) @ w[0].T + w[1]).clamp(min=0)
        h = (h @ w[2].T + w[3]).clamp(min=0)
        torch.testing.assert_close(model(x), h @ w[4].T + w[5])

    def test_mlp_in_eval_mode_against_plain_formula(self) -> None:
        model = MLP(6, 5, 3).eval()
        x = torch.randn(2, 6)
        w = list(model.parameters())
        # Fresh running statistics are mean 0 and variance 1; eps is BatchNorm's default.
        scale = 1 / math.sqrt(1 + 1e-5)
        h = ((x @ w[0].T + w[1]) * scale).clamp(min=0)
        h = ((h @ w[4].T + w[5]) * scale).clamp(min=0)
        torch.testing.assert_close(model(x), h @ w[8].T + w[9])

    def test_cnn_in_eval_mode_against_functional_calls(self) -> None:
        model = CNN(image_size=8).eval()
        x = torch.randn(2, 1, 8, 8)
        w = list(model.parameters())
        scale = 1 / math.sqrt(1 + 1e-5)
        h = F.max_pool2d(F.relu(F.conv2d(x, w[0], w[1], padding=1) * scale), 2)
        h = F.max_pool2d(F.relu(F.conv2d(h, w[4], w[5], padding=1) * scale), 2)
        h = F.relu(F.linear(h.reshape(2, -1), w[8], w[9]))
        torch.testing.assert_close(model(x), F.linear(h, w[10], w[11]))

    def test_fast_net_in_eval_mode_against_functional_calls(self) -> None:
        model = FastNet(image_size=20).eval()
        x = torch.randn(2, 1, 20, 20)
        w = list(model.parameters())
        scale = 1 / math.sqrt(1 + 1e-5)
        h = F.max_pool2d(F.relu(F.conv2d(x, w[0], stride=2) * scale), 2)
        h = F.relu(F.conv2d(h, w[3]) * scale)
        h = F.relu(F.linear(h.permute(0, 2, 3, 1).reshape(2, -1), w[6]) * scale)
        torch.testing.assert_close(model(x), F.linear(h, w[9], w[10]))

    def test_small_vgg_in_eval_mode_against_functional_calls(self) -> None:
        model = SmallVGG(image_size=24, channels=(1, 2, 4, 3, 8)).eval()
        h = x = torch.randn(2, 1, 24, 24)
        weights = [p for p in model.parameters() if p.ndim == 4]
        for i, weight in enumerate(weights):
            h = F.relu(F.conv2d(h, weight) / math.sqrt(1 + 1e-5))
            h = F.max_pool2d(h, 2) if i % 2 else h
        torch.testing.assert_close(model(x), model.classifier(h.flatten(1)))

    def test_small_vgg_drops_features_and_half_as_often_channels(self) -> None:
        model = SmallVGG(dropout=0.5)
        self.assertEqual([layer.p for layer in model.modules() if isinstance(layer, nn.Dropout2d)], [0.25] * 3)
        seen: list[torch.Tensor] = []
        model.features.register_forward_hook(lambda module, args, output: torch.ones_like(output))
        model.classifier.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        model(torch.zeros(4, 1, 28, 28))
        model.eval()(torch.zeros(4, 1, 28, 28))
        self.assertEqual([set(features.unique().tolist()) for features in seen], [{0.0, 2.0}, {1.0}])

    def test_shifted_views_average_the_probabilities_of_nine_shifts(self) -> None:
        inner = torch.randn(2, 1, 26, 26)
        x = F.pad(inner, (1, 1, 1, 1))  # empty at the edge: a roll loses nothing
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3))
        rolled = [torch.roll(x, (dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        expected = torch.stack([model(view).softmax(1) for view in rolled]).mean(0)
        torch.testing.assert_close(ShiftedViews(model)(x).exp(), expected)

    def test_shifted_views_repeat_the_edges(self) -> None:
        x = torch.tensor([[1.0], [2.0]]).expand(1, 1, 2, 2)  # a small image moves by one pixel
        seen: list[list[float]] = []

        def look(view: torch.Tensor) -> torch.Tensor:
            seen.append(view[0, 0, :, 0].tolist())
            return view.flatten(1)

        ShiftedViews(look)(x)  # type: ignore[arg-type]
        self.assertEqual(seen[::3], [[1, 1], [1, 2], [2, 2]])
        x, seen = torch.arange(56.0)[:, None].expand(1, 1, 56, 56), []  # one of 56 pixels by two, a 28th of it
        ShiftedViews(look)(x)  # type: ignore[arg-type]
        self.assertEqual([rows[:3] for rows in seen[::3]], [[0, 0, 0], [0, 1, 2], [2, 3, 4]])

    def test_mnist_net_drops_whole_channels(self) -> None:
        model = MNISTNet(dropout=0.5)
        maps = model.block1(torch.randn(4, 1, 28, 28))
        empty = (maps == 0).flatten(2).all(2)
        self.assertTrue(0.2 < empty.float().mean() < 0.8)
        model.eval()
        self.assertTrue(torch.equal(model(torch.ones(1, 1, 28, 28)), model(torch.ones(1, 1, 28, 28))))

    def test_mnist_net_is_its_description(self) -> None:
        """Convolution, BatchNorm and ReLU, twice, then the pool, by hand: the same values and gradients, bit by bit."""
        torch.manual_seed(0)
        model, x = MNISTNet(dropout=0.0), torch.randn(6, 1, 28, 28)
        layers = [model.block1[i] for i in (0, 1, 3, 4)] + [model.block2[i] for i in (0, 1, 3, 4)]
        found = self.logits_and_gradients(model, model(x))
        y = x
        for i, (convolution, norm) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            y = nn.functional.relu(norm(convolution(y)))
            if i % 2:
                y = nn.functional.max_pool2d(y, 2)
        expected = self.logits_and_gradients(model, model.classifier(y.flatten(1)))
        for one, other in zip(found, expected, strict=True):
            self.assertTrue(torch.equal(one, other))

    def logits_and_gradients(self, model: nn.Module, logits: torch.Tensor) -> list[torch.Tensor]:
        targets = torch.arange(logits.shape[0])
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, targets), list(model.parameters()))
        return [logits.detach(), *gradients]

    def test_outputs_are_finite_logits_of_the_right_shape(self) -> None:
        for model, shape, outputs in all_models():
            logits = model(torch.randn(3, *shape))
            self.assertEqual(logits.shape, (3, outputs), type(model).__name__)
            self.assertTrue(logits.isfinite().all(), type(model).__name__)

    def test_same_seed_same_weights(self) -> None:
        for build in (SimpleNet, CNN, MNISTNet, lambda: MLP(3, 4, 2), lambda: NeuralNetwork(3, 2)):
            states = []
            for seed in (5, 5, 6):
                torch.manual_seed(seed)
                states.append(nn.utils.parameters_to_vector(build().parameters()))
            self.assertTrue(torch.equal(states[0], states[1]))
            self.assertFalse(torch.equal(states[0], states[2]))

    def test_kaiming_start_of_mnist_net(self) -> None:
        model = MNISTNet()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                expected = math.sqrt(2 / fan_in)
                tolerance = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors of a standard deviation
                self.assertAlmostEqual(layer.weight.std().item() / expected, 1, delta=tolerance)
                self.assertFalse(dict(layer.named_parameters())["bias"].any())

    def test_every_parameter_gets_a_gradient(self) -> None:
        for model, shape, outputs in all_models():
            F.cross_entropy(model(torch.randn(4, *shape)), torch.arange(4) % outputs).backward()
            for name, p in model.named_parameters():
                self.assertIsNotNone(p.grad, f"{type(model).__name__} {name}")

    def test_wrong_input_says_expected_and_actual(self) -> None:
        for model, shape, _ in all_models():
            wrong = torch.randn(3, *shape[:-1], shape[-1] + 1)
            with self.assertRaisesRegex(ValueError, rf"expected .*{shape[-1]}.*got \[3, .*{shape[-1] + 1}\]"):
                model(wrong)
            with self.assertRaisesRegex(ValueError, r"unsqueeze\(0\)"):
                model(torch.randn(shape))
            with self.assertRaisesRegex(ValueError, r"torch.uint8.*float\(\) / 255"):
                model(torch.zeros(3, *shape, dtype=torch.uint8))

    def test_wrong_construction_says_expected_and_actual(self) -> None:
        cases = [
            (lambda: CNN(image_size=30), "multiple of 4.*30"),
            (lambda: MNISTNet(image_size=2), "multiple of 4.*2"),
            (lambda: CNN(image_size=0), "image_size.*positive integer.*0"),
            (lambda: MNISTNet(in_channels=0), "in_channels.*0"),
            (lambda: FastNet(image_size=12), "at least 16.*12"),
            (lambda: SmallVGG(image_size=30), "multiple of 4.*30"),
            (lambda: SmallVGG(image_size=20), "at least 24.*20"),
            (lambda: SmallVGG(channels=(8, 8, 8, 8)), r"five convolutions.*\(8, 8, 8, 8\)"),
            (lambda: SmallVGG(channels=(8, 8, 0, 8, 8)), "channels.*0"),
            (lambda: SimpleNet(num_classes=0), "num_classes.*0"),
            (lambda: SimpleNet(hidden_sizes=(3, -1)), "hidden_sizes.*-1"),
            (lambda: NeuralNetwork(2.5, 1), "num_inputs.*2.5"),  # type: ignore[arg-type]
            (lambda: MLP(3, 0, 1), "hidden_dim.*0"),
            (lambda: CNN(dropout=1.5), "1.5"),
            (lambda: EnsembleModel([]), "at least one model"),
            (lambda: CustomLoss(-1.0), "weight >= 0, got -1"),
        ]
        for build, message in cases:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                build()


class GraphCapture(unittest.TestCase):
    """The shape checks neither break a graph nor fix the batch size."""

    def test_export_with_a_dynamic_batch(self) -> None:
        for model, shape, _ in all_models():
            model.eval()
            batch = torch.export.Dim("batch")
            program = torch.export.export(model, (torch.randn(3, *shape),), dynamic_shapes=({0: batch},))
            for size in (1, 5):
                x = torch.randn(size, *shape)
                torch.testing.assert_close(program.module()(x), model(x))

    def test_compile_without_a_graph_break(self) -> None:
        for model, shape, _ in all_models():
            torch.compiler.reset()
            compiled = torch.compile(model.eval(), backend="eager", fullgraph=True, dynamic=True)
            for size in (3, 5):
                x = torch.randn(size, *shape)
                torch.testing.assert_close(compiled(x), model(x))
        torch.compiler.reset()

    def test_symbolic_trace_keeps_the_check(self) -> None:
        for model, shape, _ in all_models():
            traced = torch.fx.symbolic_trace(model.eval())
            x = torch.randn(2, *shape)
            torch.testing.assert_close(traced(x), model(x))
            with self.assertRaisesRegex(ValueError, "expected"):
                traced(torch.randn(2, *shape[:-1], shape[-1] + 1))


class Ensemble(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.members = [SimpleNet(4, (3,), 3), SimpleNet(4, (5,), 3), NeuralNetwork(4, 3)]
        self.x = torch.randn(6, 4)

    def test_log_of_the_mean_probability(self) -> None:
        mean = sum(F.softmax(member(self.x), 1) for member in self.members) / 3
        output = EnsembleModel(self.members)(self.x)
        torch.testing.assert_close(output.exp(), mean)
        torch.testing.assert_close(output.softmax(1), mean)
        targets = torch.tensor([0, 1, 2, 0, 1, 2])
        torch.testing.assert_close(F.cross_entropy(output, targets), F.nll_loss(output, targets))

    def test_loss_is_at_most_the_mean_loss_of_the_members(self) -> None:
        targets = torch.tensor([0, 1, 2, 0, 1, 2])
        losses = [F.cross_entropy(member(self.x), targets) for member in self.members]
        self.assertLess(F.cross_entropy(EnsembleModel(self.members)(self.x), targets), sum(losses) / 3)

    def test_certain_members_stay_finite(self) -> None:
        certain = nn.Linear(1, 2, bias=False)
        nn.init.constant_(certain.weight, 0)
        certain.weight.data[0] = 1000.0
        output = EnsembleModel([certain])(torch.ones(1, 1))
        torch.testing.assert_close(output, torch.tensor([[0.0, -1000.0]]))

    def test_members_with_other_classes_are_named(self) -> None:
        with self.assertRaisesRegex(ValueError, "got 3 and 4"):
            EnsembleModel([self.members[0], SimpleNet(4, (), 4)])(self.x)

    def test_from_checkpoints(self) -> None:
        checkpoints = [
            {"model_state_dict": self.members[0].state_dict(), "hidden": 3},
            {"model_state_dict": self.members[1].state_dict(), "hidden": 5},
        ]
        ensemble = EnsembleModel.from_checkpoints(lambda c: SimpleNet(4, (c["hidden"],), 3), iter(checkpoints))
        torch.testing.assert_close(ensemble(self.x), EnsembleModel(self.members[:2])(self.x), rtol=0, atol=0)
        self.assertFalse(any(module.training for module in ensemble.modules()))

    def test_from_checkpoints_names_the_bad_one(self) -> None:
        good = {"model_state_dict": self.members[0].state_dict()}
        other = {"model_state_dict": self.members[1].state_dict()}

        def build(_: dict) -> nn.Module:
            return SimpleNet(4, (3,), 3)

        with self.assertRaisesRegex(ValueError, "checkpoint 1 does not fit.*size mismatch"):
            EnsembleModel.from_checkpoints(build, [good, other])
        with self.assertRaisesRegex(ValueError, "checkpoint 1: expected a key 'model_state_dict', got .'epoch'"):
            EnsembleModel.from_checkpoints(build, [good, {"epoch": 3}])
        with self.assertRaisesRegex(ValueError, "at least one"):
            EnsembleModel.from_checkpoints(build, [])


class Loss(unittest.TestCase):
    def test_by_hand(self) -> None:
        input, target = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 3.0])
        # squared: (0 + 4 + 1) / 3, absolute: (0 + 2 + 1) / 3
        self.assertAlmostEqual(CustomLoss()(input, target).item(), 5 / 3 + 1, places=6)
        self.assertAlmostEqual(CustomLoss(weight=0.5)(input, target).item(), 5 / 3 + 0.5, places=6)

    def test_shapes_must_agree(self) -> None:
        with self.assertRaisesRegex(ValueError, r"\(4, 1\) and \(4,\)"):
            CustomLoss()(torch.zeros(4, 1), torch.zeros(4))


class InitWeights(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def test_linear_is_xavier_uniform(self) -> None:
        layer = nn.Linear(300, 100)
        layer.apply(init_weights)
        bound = math.sqrt(6 / 400)
        self.assertLessEqual(layer.weight.abs().max().item(), bound)
        self.assertAlmostEqual(layer.weight.std().item(), bound / math.sqrt(3), delta=0.001)
        self.assertFalse(dict(layer.named_parameters())["bias"].any())

    def test_convolution_is_kaiming_fan_out(self) -> None:
        layer = nn.Conv2d(16, 64, 3)
        layer.apply(init_weights)
        self.assertAlmostEqual(layer.weight.std().item() / math.sqrt(2 / (64 * 9)), 1, delta=0.04)
        self.assertFalse(dict(layer.named_parameters())["bias"].any())

    def test_embedding_is_normal_and_keeps_its_padding_row(self) -> None:
        layer = nn.Embedding(200, 100, padding_idx=3)
        layer.apply(init_weights)
        self.assertEqual(layer.weight[3].abs().max(), 0)
        rest = torch.cat([layer.weight[:3], layer.weight[4:]])
        self.assertAlmostEqual(rest.std().item(), 0.02, delta=0.0006)
        self.assertGreater(rest.abs().max().item(), 0.05)  # a uniform of that spread would end at 0.035

    def test_norms_are_constant(self) -> None:
        for layer in (nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4, affine=False)):
            for p in layer.parameters():
                nn.init.constant_(p, 7.0)
            layer.apply(init_weights)
            if layer.weight is not None:
                self.assertTrue(torch.equal(layer.weight, torch.ones(4)))
                self.assertTrue(torch.equal(layer.bias, torch.zeros(4)))

    def test_other_modules_stay(self) -> None:
        for layer in (nn.PReLU(), nn.Sequential(), nn.Linear(3, 2, bias=False)):
            before = [p.clone() for p in layer.parameters()]
            init_weights(layer)
            if not isinstance(layer, nn.Linear):
                self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)))


class Freezing(unittest.TestCase):
    def test_frozen_layers_do_not_move(self) -> None:
        torch.manual_seed(0)
        model = SimpleNet(4, (3,), 2)
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


class CountByLayer(unittest.TestCase):
    def table(self, model: nn.Module) -> tuple[dict[str, int], list[str]]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            counts = count_parameters_by_layer(model)
        return counts, out.getvalue().splitlines()

    def test_rows_and_sizes(self) -> None:
        model = SimpleNet()
        freeze(model.hidden[0])
        counts, lines = self.table(model)
        self.assertEqual(counts, {"hidden.0": 100_480, "hidden.1": 8_256, "output": 650})
        self.assertEqual(lines[0].split(), ["layer", "type", "parameters", "FP32", "KB", "FP16", "KB"])
        self.assertEqual(lines[1].split(), ["hidden.0", "Linear", "(frozen)", "100,480", "401.9", "201.0"])
        self.assertEqual(lines[-1].split(), ["total", "109,386", "437.5", "218.8"])
        self.assertEqual({len(line) for line in lines}, {len(lines[0])})

    def test_shared_parameters_count_once(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        counts, _ = self.table(model)
        self.assertEqual(counts, {"0": 12, "2": 3})
        self.assertEqual(sum(counts.values()), count_parameters(model))

    def test_parameters_of_the_model_itself_and_no_parameters(self) -> None:
        self.assertEqual(self.table(nn.PReLU(5))[0], {"": 5})
        self.assertEqual(self.table(nn.ReLU())[0], {})

    def test_quiet(self) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            count_parameters_by_layer(SimpleNet(), verbose=False)
        self.assertEqual(out.getvalue(), "")


class Doctests(unittest.TestCase):
    def test_docstrings(self) -> None:
        result = doctest.testmod(models)
        self.assertGreater(result.attempted, 0)
        self.assertEqual(result.failed, 0)


class MakeModel(unittest.TestCase):
    def test_each_name_gives_its_class_with_the_arguments_passed_on(self) -> None:
        expected = {
            "mnistnet": models.MNISTNet(7, 0.1, 3, 32),
            "cnn": models.CNN(7, 3, 32, 0.1),
            "mlp": models.MLP(3 * 32 * 32, 256, 7, 0.1),
            "simplenet": models.SimpleNet(3 * 32 * 32, num_classes=7),
            "fastnet": models.FastNet(7, 3, 32),
            "smallvgg": models.SmallVGG(7, 3, 32, 0.1),
            "widevgg": models.SmallVGG(7, 3, 32, 0.1, channels=(24, 48, 96, 192, 192)),
        }
        self.assertEqual(set(models.MODELS), set(expected))
        for name, model in expected.items():
            self.assertEqual(str(models.make_model(name, 7, 3, 32, 0.1)), str(model), name)
        self.assertEqual(str(models.make_model("smallvgg")), str(models.SmallVGG()))  # what train_mnist trains

    def test_another_name_is_refused_with_the_names(self) -> None:
        with self.assertRaisesRegex(ValueError, "mnistnet, cnn, .*, smallvgg, widevgg, got 'resnet'"):
            models.make_model("resnet")


if __name__ == "__main__":
    unittest.main()

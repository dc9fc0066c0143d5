"""Programs of the public pytorch/examples, and minGPT, in small: each by its own loop and by Trainer, to equal weights.

A class here is all that the program must add to use Trainer.
"""

from __future__ import annotations

import copy
import math
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchbasics as tb

from .common import same_weights

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread, self.decoder = (
            nn.Linear(a, b) for a, b in ((12, 8), (8, 3), (8, 3), (3, 12))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x).relu()
        mean, log_variance = self.mean(hidden), self.spread(hidden)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code).sigmoid(), mean, log_variance


def vae_loss(x: Tensor, outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    reconstruction, mean, log_variance = outputs
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
    return F.binary_cross_entropy(reconstruction, x, reduction="sum") + divergence


class VAETrainer(tb.Trainer):
    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        return vae_loss(batch[0], self.model(batch[0])), None, None


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(6, 5), nn.Linear(10, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.tower(a), self.tower(b)], 1)).sigmoid()


class SiameseTrainer(tb.Trainer):
    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        first, second, targets = batch
        outputs = self.model(first, second).squeeze(1)
        return self.criterion(outputs, targets), outputs, targets


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.out = nn.Embedding(11, 6), nn.LSTM(6, 7), nn.Linear(7, 11)

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:  # (T, B)
        outputs, state = self.rnn(self.embedding(tokens), state)
        return self.out(outputs).flatten(0, 1), state  # (T * B, 11)


class LanguageModelTrainer(tb.Trainer):
    state: Any = None

    def train_one_epoch(self, loader: Any) -> tuple[float, float | None]:
        self.state = None
        return super().train_one_epoch(loader)

    def validate(self, loader: Any) -> tuple[float, float | None]:
        kept, self.state = self.state, None
        values = super().validate(loader)
        self.state = kept
        return values

    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        outputs, state = self.model(batch[0], self.state)
        self.state = [part.detach() for part in state]
        return self.criterion(outputs, batch[1]), outputs, batch[1]


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        hidden = F.dropout((adjacency @ self.first(features)).relu(), 0.3, self.training)
        return (adjacency @ self.second(hidden)).log_softmax(1)


class GraphTrainer(tb.Trainer):
    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        outputs = self.model(batch["features"], batch["adjacency"])[batch["nodes"]]
        return self.criterion(outputs, batch["labels"]), outputs, batch["labels"]

    def count_targets(self, batch: Any) -> float:
        return len(batch["labels"])


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 9)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=mask, src_key_padding_mask=source == 0
        )
        return self.out(hidden).transpose(1, 2)  # (B, 9, T)


class TranslationTrainer(tb.Trainer):
    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        source, target = batch
        outputs = self.model(source, target[:, :-1])
        return self.criterion(outputs, target[:, 1:]), outputs, target[:, 1:]

    def count_targets(self, batch: Any) -> Tensor:
        return (batch[1][:, 1:] != 0).sum()


class StyleTrainer(tb.Trainer):
    vgg: Any
    style: Tensor

    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        return style_loss(self.model, self.vgg, self.style, batch[0]), None, None


def gram(features: Tensor) -> Tensor:
    flat = features.flatten(2)  # (B, C, H * W)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def style_loss(model: nn.Module, vgg: nn.Module, style: Tensor, x: Tensor) -> Tensor:
    y = model(x)
    content = F.mse_loss(vgg(y), vgg(x))
    return content + 10 * F.mse_loss(gram(vgg(y)), gram(vgg(style)).expand(len(x), -1, -1))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(7, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.out = nn.Linear(8, 7, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        logits = self.out(self.block(self.embedding(tokens), mask, is_causal=True))
        return logits, F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1)


class GPTTrainer(tb.Trainer):
    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        logits, loss = self.model(*batch)
        return loss, logits, batch[1]


class ExamplesTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def compare(
        self, model: nn.Module, by_hand: Callable[[nn.Module], Any], by_trainer: Callable[[nn.Module], Any]
    ) -> Any:
        """Train two copies of `model`, from the same random state; return what `by_trainer` returned."""
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        torch.manual_seed(1)
        by_hand(first)
        torch.manual_seed(1)
        result = by_trainer(second)
        self.assertFalse(same_weights(model, second), "nothing was trained")
        self.assertTrue(same_weights(first, second))
        return result

    def plain_loop(
        self, model: nn.Module, optimizer: Any, loader: Any, epochs: int, loss: Any, schedule: Any = None
    ) -> None:
        model.train()
        for _ in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
            if schedule is not None:
                schedule.step()

    def test_mnist(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(36, 10),
            nn.LogSoftmax(1),
        )
        loader = [(torch.randn(5, 1, 8, 8), torch.randint(0, 10, (5,))) for _ in range(3)]

        def by_hand(model: nn.Module) -> None:
            optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
            self.plain_loop(model, optimizer, loader, 3, lambda m, b: F.nll_loss(m(b[0]), b[1]), schedule)

        def by_trainer(model: nn.Module) -> Any:
            optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
            return tb.Trainer(model, nn.NLLLoss(), optimizer, scheduler=schedule).fit(loader, loader, 3, verbose=False)

        self.assertIsNotNone(self.compare(model, by_hand, by_trainer)["val_acc"][0])

    def test_imagenet_with_top5(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
        )
        loader = [(torch.randn(6, 3, 8, 8), torch.randint(0, 9, (6,))) for _ in range(3)]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}

        def top5(outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs.topk(5).indices == targets[:, None]).any(1).float()

        def by_hand(model: nn.Module) -> None:
            optimizer = SGD(model.parameters(), **options)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            self.plain_loop(model, optimizer, loader, 4, lambda m, b: F.cross_entropy(m(b[0]), b[1]), schedule)

        def by_trainer(model: nn.Module) -> Any:
            optimizer = SGD(model.parameters(), **options)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, scheduler=schedule, metrics={"top5": top5})
            history = trainer.fit(loader, loader, 4, verbose=False)
            x, y = (torch.cat(part) for part in zip(*loader, strict=True))
            self.assertAlmostEqual(history["val_top5"][-1], top5(model.eval()(x), y).mean().item(), places=6)

        self.compare(model, by_hand, by_trainer)

    def test_super_resolution(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2)
        )
        loader = [(torch.randn(4, 1, 6, 6), torch.randn(4, 1, 12, 12)) for _ in range(3)]
        self.compare(
            model,
            lambda m: self.plain_loop(m, Adam(m.parameters()), loader, 2, lambda m, b: F.mse_loss(m(b[0]), b[1])),
            lambda m: tb.Trainer(m, nn.MSELoss(), Adam(m.parameters())).fit(loader, loader, 2, verbose=False),
        )

    def test_vae(self) -> None:
        loader = [(torch.rand(5, 12), torch.zeros(5)) for _ in range(3)]
        self.compare(
            VAE(),
            lambda m: self.plain_loop(m, Adam(m.parameters()), loader, 2, lambda m, b: vae_loss(b[0], m(b[0]))),
            lambda m: VAETrainer(m, None, Adam(m.parameters())).fit(loader, loader, 2, verbose=False),
        )

    def test_siamese_network(self) -> None:
        loader = [(torch.randn(4, 6), torch.randn(4, 6), torch.rand(4).round()) for _ in range(3)]

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.binary_cross_entropy(model(*batch[:2]).squeeze(1), batch[2])

        self.compare(
            Siamese(),
            lambda m: self.plain_loop(m, Adam(m.parameters()), loader, 2, loss),
            lambda m: SiameseTrainer(m, nn.BCELoss(), Adam(m.parameters())).fit(loader, loader, 2, verbose=False),
        )

    def test_word_language_model_that_carries_its_state(self) -> None:
        text = torch.randint(0, 11, (21, 3))
        loader = [(text[i : i + 5], text[i + 1 : i + 6].flatten()) for i in range(0, 20, 5)]

        def evaluate(model: nn.Module) -> float:
            state, total = None, 0.0
            with torch.no_grad():
                for tokens, targets in loader:
                    outputs, state = model(tokens, state)
                    total += F.cross_entropy(outputs, targets).item() * len(targets)
            return total / 60

        def by_hand(model: nn.Module) -> None:
            rate, best = 20.0, math.inf
            for _ in range(4):
                state = None
                for tokens, targets in loader:
                    model.zero_grad()
                    state = state and [part.detach() for part in state]
                    outputs, state = model(tokens, state)
                    F.cross_entropy(outputs, targets).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                    for parameter in model.parameters():
                        parameter.data.add_(parameter.grad, alpha=-rate)
                loss = evaluate(model)
                best, rate = (loss, rate) if loss < best else (best, rate / 4)

        def by_trainer(model: nn.Module) -> Any:
            optimizer = SGD(model.parameters(), 20.0)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0, threshold=0)
            trainer = LanguageModelTrainer(model, nn.CrossEntropyLoss(), optimizer, scheduler=schedule, clip_norm=0.25)
            return trainer.fit(loader, loader, 4, verbose=False)

        history = self.compare(LanguageModel(), by_hand, by_trainer)
        self.assertLess(history["val_loss"][-1], history["val_loss"][0])

    def test_graph_convolution_on_one_whole_graph(self) -> None:
        adjacency = (torch.rand(10, 10) > 0.6).float().softmax(1)
        nodes, labels = torch.arange(7), torch.randint(0, 3, (7,))
        graph = {"features": torch.randn(10, 5), "adjacency": adjacency, "nodes": nodes, "labels": labels}

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.nll_loss(model(batch["features"], batch["adjacency"])[nodes], labels)

        self.compare(
            GCN(),
            lambda m: self.plain_loop(m, Adam(m.parameters()), [graph], 5, loss),
            lambda m: GraphTrainer(m, nn.NLLLoss(), Adam(m.parameters())).fit([graph], [graph], 5, verbose=False),
        )

    def test_translation_of_padded_sentences(self) -> None:
        loader = []
        for _ in range(3):
            source, target = torch.randint(1, 9, (4, 5)), torch.randint(1, 9, (4, 6))
            source[0, 3:] = target[1, 4:] = 0
            loader.append((source, target))

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0], batch[1][:, :-1]), batch[1][:, 1:], ignore_index=0)

        def by_trainer(model: nn.Module) -> Any:
            trainer = TranslationTrainer(model, nn.CrossEntropyLoss(ignore_index=0), Adam(model.parameters()))
            return trainer.fit(loader, loader, 2, verbose=False)

        self.compare(Translator(), lambda m: self.plain_loop(m, Adam(m.parameters()), loader, 2, loss), by_trainer)

    def test_fast_neural_style_through_a_frozen_network(self) -> None:
        vgg = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
        style, loader = torch.randn(1, 3, 8, 8), [(torch.randn(2, 3, 8, 8), torch.zeros(2)) for _ in range(3)]

        def by_trainer(model: nn.Module) -> Any:
            trainer = StyleTrainer(model, None, Adam(model.parameters()))
            trainer.vgg, trainer.style = vgg, style
            return trainer.fit(loader, None, 2, verbose=False)

        model = nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.Conv2d(3, 3, 1)
        )
        self.compare(
            model,
            lambda m: self.plain_loop(m, Adam(m.parameters()), loader, 2, lambda m, b: style_loss(m, vgg, style, b[0])),
            by_trainer,
        )

    def test_mingpt(self) -> None:
        loader = [(torch.randint(0, 7, (4, 6)), torch.randint(-1, 7, (4, 6))) for _ in range(4)]

        def groups(model: nn.Module) -> Any:
            return tb.param_groups(model, 0.1)

        def by_hand(model: nn.Module) -> None:
            optimizer = AdamW(groups(model), 3e-3, (0.9, 0.95))
            model.train()
            for tokens, targets in loader * 2:
                _, loss = model(tokens, targets)
                model.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

        def by_trainer(model: nn.Module) -> Any:
            optimizer = AdamW(groups(model), 3e-3, (0.9, 0.95))
            return GPTTrainer(model, None, optimizer, clip_norm=1.0).fit(loader, None, 2, verbose=False)

        self.compare(GPT(), by_hand, by_trainer)

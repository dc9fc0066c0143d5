"""report.html: figures worked out by hand, a page that is well formed and shows data as text, and advice that fits."""

from __future__ import annotations

import base64
import html.parser
import io
import math
import re
import signal
import tempfile
import unittest
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import torchbasics as tb
from torchbasics import report as report_module
from torchbasics.evaluation import Means
from torchbasics.report import Judgement, Report, advice, picture, ticks, wilson_interval

NASTY = ("<script>alert(1)</script>", 'a "b" & c\x1b[2J', "\u202eקטן", "猫" * 40)
VOID = {"meta", "link", "img", "br"}


class Reader(html.parser.HTMLParser):
    """Check that elements are nested properly; collect the text, the tags and what would be loaded from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop(), (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def trainer_with(**history: list[float | None]) -> Any:
    """Return what a Report needs of a Trainer."""
    standard: dict[str, Any] = {name: [] for name in ("train_loss", "train_acc", "val_loss", "val_acc", "lr")}
    standard |= history
    losses = [math.inf if value is None else value for value in standard["val_loss"]]
    best = losses.index(min(losses)) if losses else None
    means = Means({"acc": [0.0, 500.0]})  # of 500 validation samples
    return SimpleNamespace(history=standard, best_epoch=best, on_epoch_end=[], validation_means=means)


def three_epochs(**more: list[float | None]) -> Any:
    return trainer_with(
        train_loss=[1.0, 0.5, 0.4], train_acc=[0.5, 0.92, 0.93], val_loss=[0.9, 0.4, 0.5], val_acc=[0.6, 0.9, 0.85],
        lr=[1e-3, 1e-3, 5e-4], **more,
    )  # fmt: skip


def logits_for(pairs: Iterable[tuple[int, int, float]], classes: int) -> tuple[Tensor, Tensor]:
    """Return (log-probabilities, targets) for (true class, predicted class, confidence); the rest is shared equally."""
    shares, targets = [], []
    for true, taken, sure in pairs:
        shares.append(torch.full((classes,), (1 - sure) / (classes - 1)).index_fill(0, torch.tensor(taken), sure))
        targets.append(true)
    return torch.stack(shares).log(), torch.tensor(targets)


class Judged(unittest.TestCase):
    # Of class a 3 of 4 are right, of b 1 of 2, of c none of 1; d has no image.
    PAIRS = ((0, 0, 0.9), (0, 0, 0.8), (0, 0, 0.7), (0, 1, 0.6), (1, 1, 0.5), (1, 2, 0.99), (2, 1, 0.8))

    def setUp(self) -> None:
        self.images = torch.arange(7).view(7, 1, 1, 1).expand(7, 1, 28, 28).to(torch.uint8)
        self.judgement = Judgement(*logits_for(self.PAIRS, 4), ("a", "b", "c", "d"), self.images)

    def test_counts_are_those_of_the_pairs(self) -> None:
        expected = [[3, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
        self.assertEqual(self.judgement.confusion.tolist(), expected)
        self.assertEqual((self.judgement.count, self.judgement.correct, self.judgement.accuracy), (7, 4, 4 / 7))
        rows = self.judgement.by_class()
        self.assertEqual([row["support"] for row in rows], [4, 2, 1, 0])
        self.assertEqual([row["predictions"] for row in rows], [3, 3, 1, 0])
        self.assertEqual([row["hits"] for row in rows], [3, 1, 0, 0])
        self.assertEqual(self.judgement.worst_first(), [2, 1, 0, 3])

    def test_mistakes_begin_with_the_most_confident_and_carry_their_image(self) -> None:
        found = [(true, predicted, round(confidence, 5)) for true, predicted, confidence, _ in self.judgement.mistakes]
        self.assertEqual(found, [("b", "c", 0.99), ("c", "b", 0.8), ("a", "b", 0.6)])
        self.assertEqual([int(image[0, 0, 0]) for *_, image in self.judgement.mistakes], [5, 6, 3])

    def test_images_may_be_a_dataset_of_pairs_and_what_is_no_image_is_left_out(self) -> None:
        outputs, targets = logits_for(self.PAIRS, 4)
        pages = []
        for images in self.images, torch.utils.data.TensorDataset(self.images, targets), torch.zeros(7, 9), None:
            pages.append(report_module.judgement_html(Judgement(outputs, targets, "abcd", images), {}))
        self.assertEqual([page.count("<figure>") for page in pages], [3, 3, 0, 0])
        self.assertEqual(pages[0], pages[1])
        self.assertEqual(["The worst mistakes" in page for page in pages], [True, True, False, False])

    def test_the_worst_pairs_are_named_with_their_share_of_the_true_class(self) -> None:
        pairs = [(0, 1, 0.9)] * 3 + [(2, 0, 0.9)] * 2 + [(1, 1, 0.9)] * 5 + [(0, 0, 0.9)] * 3
        judgement = Judgement(*logits_for(pairs, 3), ("a", "b", "c"))
        self.assertEqual(judgement.worst_pairs(), [("a", "b", 3, 0.5), ("c", "a", 2, 1.0)])

    def test_printed_lines_name_all_classes_or_the_lowest_three_and_fit_in_60_columns(self) -> None:
        def lines(*hits: int, names: Iterable[str] = "abcdefghijklmnopqrstuvwxyz") -> list[str]:  # of 1000 each
            judgement = Judgement(*logits_for([(0, 0, 0.9)], len(hits)), [*names][: len(hits)])
            hit = torch.tensor(hits)
            judgement.confusion = torch.diag(hit) + torch.diag(1000 - hit).roll(1, dims=1)
            return judgement.by_class_lines()

        self.assertEqual(lines(995, 980, 991, 993), ["by class: a 99.5%  b 98.0%  c 99.1%  d 99.3%"])
        self.assertEqual(lines(995, 995, 991, 993), ["by class: c 99.1%  d 99.3%  a 99.5%  (the lowest)"])
        self.assertEqual(lines(995, 991), ["by class: b 99.1%  a 99.5%"])  # all of them are shown
        self.assertEqual(lines(*[980] * 18, 970, 960, 975), ["by class: t 96.0%  s 97.0%  u 97.5%  (the lowest)"])
        two = ["by class: a 98.0%  b 98.0%  c 98.0%  d 98.0%  e 98.0%", "          f 98.0%"]
        self.assertEqual(lines(*[980] * 6), two)
        long = lines(980, 970, 900, names=("golden retriever", "x" * 80, "\x1b[2J"))
        expected = ["by class: golden retriever 98.0%", f"          {'x' * 80} 97.0%", r"          \x1b[2J 90.0%"]
        self.assertEqual(long, expected)
        self.assertEqual(self.judgement.by_class_lines(), ["by class: a 75.0%  b 50.0%  c 0.0%"])  # d has no image

    def test_the_interval_is_wilsons(self) -> None:
        for correct, count in (0, 10), (9, 10), (95, 100), (9977, 10_000), (3, 3):
            share = correct / count
            for bound in wilson_interval(correct, count):  # where the share lies 1.96 standard errors away
                self.assertAlmostEqual((share - bound) ** 2, 1.959964**2 * bound * (1 - bound) / count, places=12)
        self.assertEqual([round(bound, 4) for bound in wilson_interval(95, 100)], [0.8882, 0.9785])
        self.assertEqual(self.judgement.interval, wilson_interval(4, 7))

    def test_the_table_by_class_shows_precision_recall_and_f1_with_intervals(self) -> None:
        page = report_module.judgement_html(self.judgement, {})
        cells = re.findall(r"<tr><th><bdi title=\"(.)\">.</bdi></th><td>(\d)</td>(.*?)</tr>", page)
        shown = {name: (int(support), re.findall(r"<td>([\d.]+%|–)", rest)) for name, support, rest in cells}
        # b: 1 of 3 predictions and 1 of 2 images are right; F1 is 2 * 1 / (3 + 2)
        self.assertEqual(shown["a"], (4, ["100.0%", "75.0%", f"{6 / 7:.1%}"]))
        self.assertEqual(shown["b"], (2, ["33.3%", "50.0%", "40.0%"]))
        self.assertEqual(shown["d"], (0, ["–", "–", "–"]))
        low, high = wilson_interval(1, 4)  # of hits, misses and false alarms; F1 = 2 J / (1 + J)
        expected = f"<small>{100 * 2 * low / (1 + low):.1f}–{2 * high / (1 + high):.1%}</small>"
        self.assertIn(expected, next(rest for name, _, rest in cells if name == "b"))


class Advice(unittest.TestCase):
    def judged(self, hits: list[int], support: int = 200) -> Judgement:
        """Return a judgement in which `hits` images of each class are right, and the rest taken for the next class."""
        classes = len(hits)
        pairs = []
        for i, number in enumerate(hits):
            pairs += [(i, i, 0.9)] * number + [(i, (i + 1) % classes, 0.9)] * (support - number)
        return Judgement(*logits_for(pairs, classes), [f"class{i}" for i in range(classes)])

    def said(self, word: str, *, judgement: Judgement | None = None, val_count: int = 0, **history: Any) -> str:
        """Check that there is one piece of advice, with `word` in it."""
        lines = advice({"train_acc": [0.95] * 4, "val_acc": [0.95] * 4, **history}, judgement, val_count)
        self.assertEqual(len(lines), 1, lines)
        self.assertIn(word, lines[0])
        return lines[0]

    def test_each_shape_of_the_curves_gets_its_advice_and_healthy_ones_none(self) -> None:
        falling = [1.0, 0.5, 0.3, 0.2]
        line = self.said("overfits", train_loss=falling, val_loss=[0.6, 0.5, 0.6, 0.8])
        self.assertIn("since epoch 2 validation loss rose from 0.5 to 0.8 while training loss fell from 0.5 to", line)
        improving = {"train_loss": falling, "val_loss": [0.9, 0.6, 0.5, 0.4]}
        self.said("still improving", **improving)
        self.assertEqual(advice({**improving, "train_acc": [0.8] * 4, "val_acc": [0.95, 0.99, 1.0, 1.0]}), [])
        flat: dict[str, Any] = {"train_loss": [1.0, 0.9, 0.9, 0.9], "val_loss": [1.0, 0.9, 0.9, 0.9]}
        self.said("underfits", **flat, train_acc=[0.5] * 4, val_acc=[0.5] * 4)
        healthy: dict[str, Any] = {"train_acc": [0.95] * 4, "val_acc": [0.95] * 4}
        self.assertEqual(advice({**flat, **healthy}), [])
        for validation in ([0.6, 0.5, 0.5, 0.51], [0.6, 0.5, 0.4, 0.39], [0.6, 0.5, 0.4, math.nan], [None] * 4):
            self.assertEqual(advice({"train_loss": falling, "val_loss": validation, **healthy}), [], validation)
        self.assertEqual(advice({"train_loss": falling[:2], "val_loss": [1.0, 0.5]}), [])
        self.assertEqual(advice({}), [])

    def test_a_model_that_has_learned_nothing(self) -> None:
        judgement = Judgement(*logits_for([(i % 4, 0, 0.3) for i in range(400)], 4), "abcd")
        self.said("always names the most frequent class", judgement=judgement)
        for pairs in (
            [(0, 0, 0.9), (1, 1, 0.9), (2, 2, 0.9)],  # 3 of 3 are right
            [(0, 0, 0.9), (0, 0, 0.9), (1, 1, 0.9), (1, 0, 0.9)],  # 75%, beside 50%
            [(0, 0, 0.9)] * 3,  # there is one class only
        ):
            self.assertEqual(advice({}, Judgement(*logits_for(pairs, 3), "abc")), [], pairs)

    def test_a_class_far_behind_is_named_and_chance_is_not_taken_for_one(self) -> None:
        line = self.said("class2 is far behind", judgement=self.judged([198, 196, 150]), val_acc=[0.9])
        self.assertIn("75.0% of its 200 samples", line)
        self.assertEqual(advice({}, self.judged([198, 196, 190])), [])
        self.assertEqual(advice({}, self.judged([10, 10, 8], support=10)), [])

    def test_validation_is_too_good_to_be_true_only_where_chance_does_not_explain_it(self) -> None:
        judgement = self.judged([170, 170])  # 85.0%, at most 88.2%
        line = self.said("(97.00%) is too good to be true, the test's is 85.00%", judgement=judgement, val_acc=[0.97],
                         val_count=500)  # fmt: skip
        self.assertIn("is a validation sample also in the training set", line)
        self.assertEqual(advice({"val_acc": [0.97]}, judgement, 30), [])  # at least 83.3%
        self.assertEqual(advice({"val_acc": [0.97]}, judgement), [])
        self.assertEqual(advice({"val_acc": [0.9]}, judgement, 5000), [])
        self.assertEqual(advice({"val_acc": [0.9, 1.0]}, None, 5000), [])
        self.assertEqual(advice({"val_acc": [0.9, 1.0]}, self.judged([200, 200]), 5000), [])  # the test agrees


class Pictures(unittest.TestCase):
    def read(self, source: str) -> Image.Image:
        kind, _, data = source.partition(",")
        self.assertEqual(kind, "data:image/png;base64")
        return Image.open(io.BytesIO(base64.b64decode(data)))

    def shown(self, image: Tensor, **info: Any) -> tuple[int, int, Image.Image]:
        tag = picture(image, info)
        width, height, source = re.search(r'width=(\d+) height=(\d+) src="(.*?)"', tag).groups()  # type: ignore[union-attr]
        return int(width), int(height), self.read(source)

    def test_images_are_shown_at_56_pixels_or_more_and_large_ones_are_reduced(self) -> None:
        for size, expected, stored in ((28, 56, 28), (8, 56, 8), (64, 64, 64), (400, 112, 112)):
            width, height, image = self.shown(torch.zeros(3, size, size, dtype=torch.uint8))
            self.assertEqual((width, height, image.size), (expected, expected, (stored, stored)))
        self.assertEqual(self.shown(torch.zeros(13, 200, 400, dtype=torch.uint8))[:2], (112, 56))

    def test_a_normalisation_is_undone(self) -> None:
        pixels = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
        normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        image = self.shown(normalised, mean=mean, std=std)[2]
        self.assertEqual(image.tobytes(), bytes(pixels.permute(1, 2, 0).flatten().tolist()))

    def test_uint8_pixels_are_shown_as_they_are_and_one_channel_in_grey(self) -> None:
        for channels in (1, 3):
            pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
            width, height, image = self.shown(pixels, mean=(0.5,), std=(0.5,))
            self.assertEqual((width, height, image.size), (84, 60, (7, 5)))
            expected = pixels.expand(3, 5, 7).permute(1, 2, 0).flatten().tolist()
            self.assertEqual(bytes(expected), image.convert("RGB").tobytes())

    def test_ticks_are_round_and_span_the_values(self) -> None:
        for low, high in ((0.0, 1.0), (0.013, 0.0141), (97.3, 99.9), (-3.0, 1e5), (0.5, 0.5), (0, 0), (1e-9, 3e-9)):
            marks = ticks(low, high)
            self.assertLessEqual(marks[0], low)
            self.assertGreaterEqual(marks[-1], high)
            self.assertTrue(2 <= len(marks) <= 7, marks)
            self.assertEqual(ticks(97.3, 99.9), [97, 98, 99, 100])

    def test_a_curve_has_the_right_heights_and_leaves_out_missing_values(self) -> None:
        drawn = report_module.chart("mae", {"validation": [0.0, math.nan, 4.0, None, 2.0]}, 4)
        dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"><title>(.*?)</title>', drawn)
        expected = ["epoch 1: validation 0", "epoch 3: validation 4", "epoch 5: validation 2"]
        self.assertEqual([said for *_, said in dots], expected)
        (first, bottom), (middle, top), (last, half) = ((float(x), float(y)) for x, y, _ in dots)
        self.assertAlmostEqual(middle, (first + last) / 2)
        self.assertAlmostEqual(half, (bottom + top) / 2)
        line = re.search(r'points="(.*?)"', drawn)[1]  # type: ignore[index]
        self.assertEqual(line, " ".join(f"{x},{y}" for x, y, _ in dots))
        self.assertIn("best: epoch 5", drawn)
        self.assertIn("epoch 1: training 0.5", report_module.chart("loss", {"training": [0.5]}, None))

    def test_a_thousand_epochs_are_one_line_with_a_hundred_dots(self) -> None:
        drawn = report_module.chart("loss", {"training": [1 / (i + 1) for i in range(1000)]}, 999)
        self.assertEqual((drawn.count("<circle"), drawn.count(",")), (100, 1000))


class Page(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve() / "a <b>run"
        self.folder.mkdir()

    def read(self) -> Reader:
        self.assertEqual([path.name for path in self.folder.iterdir()], ["report.html"])
        page = (self.folder / "report.html").read_text(encoding="utf-8")
        self.assertIsNone(re.search(r"[\x00-\x09\x0b-\x1f\x7f]", page))
        self.assertNotIn("@import", page)
        self.assertNotIn("url(", page)
        reader = Reader(page)
        self.assertNotIn("script", reader.tags)
        self.assertTrue(all(address.startswith("data:") for address in reader.loaded), reader.loaded)
        return reader

    def judgement(self, classes: tuple[str, ...], count: int = 400) -> Judgement:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(0, len(classes), (count,), generator=generator)
        outputs = 3 * F.one_hot(targets, len(classes)) + torch.randn(count, len(classes), generator=generator)
        return Judgement(outputs, targets, classes, torch.zeros(count, 3, 8, 8))

    def test_names_paths_and_options_of_any_kind_are_shown_as_text(self) -> None:
        info = {"command": "x.py 'a&b' --output '<i>'", "options": {"data_dir": "<b>\x00\udcff", "seed": 1},
                "notice": "NOTICE: <u>", "dataset": "<em>", "device": "<tt>", "versions": {"torch": "<sup>"},
                "classes": NASTY}  # fmt: skip
        samples = torch.zeros(20, 3, 8, 8), torch.arange(20) % 4
        trainer = three_epochs(train_top5=[None, 0.5, math.nan])
        with Report(self.folder, info, trainer, {"data_dir": "data", "seed": 1}, samples) as report:
            report.judgement = self.judgement(NASTY)
        reader = self.read()
        names = ("<script>alert(1)</script>", 'a "b" & c\\x1b[2J', "\\u202eקטן", "猫" * 40)
        for shown in (*names, "<b>\\x00\\udcff", "<u>", "<em>", "<tt>", "<sup>", "a <b>run", "x.py 'a&b' --output"):
            self.assertIn(shown, reader.text)
        self.assertIn("24 of 25: true → predicted", reader.text)
        self.assertEqual(reader.tags.count("figure"), 24 + 12)

    def test_a_finished_run_shows_its_accuracy_first_and_all_parts_in_order(self) -> None:
        options = {"epochs": 3, "lr": 0.1, "seed": 7, "output": str(self.folder), "batch_size": 32,
                   "folder": "photos", "threads": 3}  # fmt: skip
        info = {"command": f"scripts/train.py --lr 0.1 --output '{self.folder}'", "options": options,
                "notice": "NOTICE: drawn digits\nand more", "result": {"train_seconds": 12.34}, "dataset": "mnist",
                "classes": ("0", "1"), "model": "cnn", "mean": (0.0,)}  # fmt: skip
        defaults = {"lr": 0.01, "seed": 7, "output": None, "batch_size": 32, "epochs": 3}
        report = Report(self.folder, info, three_epochs(), defaults=defaults,
                        samples=(torch.zeros(4, 1, 28, 28), torch.tensor([0, 1, 1, 0])))  # fmt: skip
        with report:
            report.judgement = self.judgement(("0", "1"))
        low, high = report.judgement.interval
        verdict = f"{report.judgement.accuracy:.2%} (95% interval {low:.2%} to {high:.2%}) of 400 mnist test images"
        order = ["NOTICE: drawn digits", verdict, "after 12.3 s of training (best epoch: 2 of 3)", "Curves", "confused",
                 "By class", "The worst mistakes", "Training images", "How it was made", "--lr 0.1",
                 "Options left at their defaults", "--batch-size 32", "# repeat it"]  # fmt: skip
        reader = self.read()
        positions = [reader.text.index(part) for part in order]
        self.assertEqual(positions, sorted(positions))
        again = f"'{self.folder}'-again"
        self.assertIn(f"python scripts/train.py --lr 0.1 --threads 3 --output {again} diff ", reader.text)
        self.assertNotIn("photos", reader.text)  # its option has no default
        self.assertIn("NOTICE: drawn digits<br>and more</p>", report.path.read_text())
        self.assertIn(f" diff '{self.folder}'/metrics.jsonl {again}/metrics.jsonl ", reader.text)
        self.assertIn(f"python scripts/train.py --resume '{self.folder}'", reader.text)
        self.assertIn(f"python scripts/predict.py --checkpoint '{self.folder}'/checkpoints/best.pt IMAGE", reader.text)
        self.assertEqual(reader.tags.count("figure"), 4 + len(report.judgement.mistakes))

    def test_of_a_regression_the_page_gives_losses_and_no_command_that_cannot_work(self) -> None:
        trainer = three_epochs()
        trainer.history |= {"train_acc": [None] * 3, "val_acc": [None] * 3}
        info: dict[str, Any] = {"command": "train.py"}
        info["result"] = {"test_loss": 0.5, "test_mae": 0.25, "train_seconds": 1.0}
        Report(self.folder, info, trainer).write()
        text = self.read().text
        best = f"the best, epoch 2, has a validation loss of {trainer.history['val_loss'][1]:.4g}"
        self.assertIn(f"3 epochs are done; {best}; test loss 0.5; test mae 0.25.", text)
        for absent in ("acc", "predict.py", "export.py"):
            self.assertNotIn(absent, text)
        info["options"], info["command"] = {"threads": 2}, "train.py --threads=3"
        Report(self.folder, info | {"model": "mine:make", "mean": (0.0,)}, trainer).write()
        self.assertIn("python train.py --threads=3 --output", self.read().text)
        self.assertIn("predict.py --model mine:make --checkpoint", self.read().text)

    def test_the_matrix_of_many_classes_has_the_worst_pairs_and_the_lowest_recall_and_the_table_all(self) -> None:
        classes = tuple(f"class {i}" for i in range(200))
        trainer = three_epochs()
        trainer.history["val_acc"][1] = 1.0
        with Report(self.folder, {}, trainer) as report:
            report.judgement = self.judgement(classes, 4000)
        page = self.read()
        rows = report.judgement.by_class()
        pairs = {int(name.split()[1]) for pair in report.judgement.worst_pairs() for name in pair[:2]}
        others = sorted(set(range(200)) - pairs, key=lambda i: rows[i]["recall"])
        shown = sorted([*pairs, *others[: 20 - len(pairs)]])
        matrix, _, table = report.path.read_text().partition("class=\"confusion")[2].partition("</table>")
        self.assertEqual(re.findall(r"<tr><th><bdi title=\"(.*?)\"", matrix), [classes[i] for i in shown])
        counts = [int(number.replace("·", "0")) for number in re.findall(r"<td style=.*?>(.*?)</td>", matrix)]
        self.assertEqual(counts, report.judgement.confusion[shown][:, shown].flatten().tolist())
        self.assertIn("those named above, then those with the lowest recall", page.text)
        self.assertEqual(set(re.findall(r"<tr><th><bdi title=\"(.*?)\"", table)), set(classes))
        self.assertLess(len(report.path.read_bytes()), 400_000)
        self.assertIn("4,000 test samples", page.text)
        self.assertIn("Advice: Validation accuracy (100.00%) is too good to be true", page.text)

    def test_a_single_mistake_among_many_samples_is_shaded(self) -> None:
        judgement = Judgement(*logits_for([(0, 0, 0.9)] * 999 + [(0, 1, 0.9), (1, 1, 0.9)], 2), "ab")
        shades = re.findall(r"rgb\([\d ]+/([\d.]+)\)", report_module.confusion_table(judgement))
        self.assertEqual(shades, ["0.55", "0.11", "0.00", "0.55"])

    def test_an_unfinished_run_says_how_far_it_is_and_why_it_ended(self) -> None:
        info: dict[str, Any] = {"options": {"epochs": 9}}
        with self.assertRaises(tb.Interrupted), Report(self.folder, info, three_epochs()):
            self.assertNotIn("Interrupted", self.read().text)
            raise tb.Interrupted(signal.SIGTERM, Path("step-1.pt"))
        text = self.read().text
        self.assertIn("3 of 9 epochs are done; the best, epoch 2, has a validation accuracy of 90.00%.", text)
        self.assertIn("Interrupted: SIGTERM: saved step-1.pt", text)
        with self.assertRaises(tb.NonFiniteLoss), Report(self.folder, info, trainer_with()) as report:
            raise tb.NonFiniteLoss("the loss is nan <here>")
        text = self.read().text
        self.assertIn("0 of 9 epochs are done. Failed: the loss is nan <here>", text)
        self.assertEqual((report.advice(), "Curves" in text), ([], False))

    def test_samples_that_are_no_images_are_left_out(self) -> None:
        for inputs in (torch.zeros(4, 9), (torch.zeros(4, 3, 8, 8), torch.zeros(4)), {"ids": torch.zeros(4, 9)}):
            with Report(self.folder, {"classes": "ab"}, three_epochs(), samples=(inputs, {"labels": None})):  # type: ignore[arg-type]
                self.assertNotIn("Training images", self.read().text)

    def test_a_regression_without_accuracy_has_a_page_too(self) -> None:
        none: list[float | None] = [None, None]
        trainer = trainer_with(train_loss=[2.0, 1.0], train_acc=none, val_loss=[1.5, 1.25], val_acc=none, lr=[1, 1])
        with Report(self.folder, {}, trainer):
            pass
        text = self.read().text
        self.assertIn("2 epochs are done; the best, epoch 2, has a validation loss of 1.25.", text)
        self.assertIn("best: epoch 2", text)
        self.assertNotIn("accuracy", text)

    def test_it_is_written_after_each_epoch_but_at_most_once_a_second(self) -> None:
        trainer, clock = three_epochs(), [1000.0]
        with mock.patch.object(report_module.time, "monotonic", lambda: clock[0]), Report(self.folder, {}, trainer):
            for seconds, epochs in (0.1, "3"), (2.0, "5"):
                for values in trainer.history.values():
                    values.append(0.25)
                clock[0] += seconds
                trainer.on_epoch_end[0](trainer)
                self.assertTrue(f"{epochs} epochs are done" in self.read().text)

    def test_a_full_disk_stays_the_error_that_is_raised(self) -> None:
        full = mock.patch.object(report_module, "write_page", side_effect=[None, OSError(28, "No space left")])
        with full, self.assertRaisesRegex(OSError, "the first"), Report(self.folder, {}, trainer_with()):
            raise OSError("the first")


if __name__ == "__main__":
    unittest.main()

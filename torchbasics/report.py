"""report.html: one page on a training run, for a person. It opens offline in any browser and makes no request.

    report = Report(run.path, run.info, trainer)        # on rank 0 only; others use contextlib.nullcontext()
    with report:                                        # writes the page now, after each epoch and at the end
        trainer.fit(train_loader, val_loader, 15)
        outputs, targets = predict_all(trainer.evaluated_model, test_loader)
        report.judgement = Judgement(outputs, targets, classes, test_images)    # confusion, figures by class, mistakes
    print(*report.advice(), sep="\\n")

`run.info` is any dict, as in run.json. The page shows its "command", "options", "notice", "device", "precision",
"versions", "dataset", "mean" and "std" (to undo a normalisation) and "result", as far as they are there. If the `with`
block raises, the page gives the reason.
"""

from __future__ import annotations

import base64
import contextlib
import html
import math
import os
import shlex
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoint import write_durably
from .cli import printable

MISTAKES, MATRIX, DOTS = 24, 20, 100  # at most so many mistakes, classes in the confusion matrix, dots on a curve
STYLE = """
:root { --back: #fff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --card: #f6f8fa; --note: #fff8c5;
  --training: #0969da; --validation: #bc4c00; --right: 26 127 55; --wrong: 207 34 46 }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --dim: #9198a1; --line: #3d444d;
  --card: #151b23; --note: #3a2f0b; --training: #58a6ff; --validation: #f0883e; --right: 63 185 80;
  --wrong: 248 81 73 } }
body { margin: 0 auto; max-width: 1160px; padding: 12px; font: 15px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin: 1.6em 0 .4em } .verdict { font-size: 1.2rem }
.note, pre { background: var(--note); border-radius: 6px; padding: 8px 12px; margin: 8px 0 }
pre { background: var(--card); white-space: pre-wrap; font-size: 13px }
.dim, figcaption, small, summary { color: var(--dim) }
.charts, .images, .pair { display: flex; flex-wrap: wrap; gap: 12px } .pair { gap: 0 60px } .pair > div { min-width: 0 }
.pair p { max-width: 460px } .scroll { overflow: auto; max-height: 800px }
svg { width: 370px; max-width: 100%; background: var(--card); border-radius: 6px; font-size: 11px; fill: var(--text) }
svg path { stroke: var(--line) } svg .best { stroke: var(--dim); stroke-dasharray: 3 3 }
svg .training { --curve: var(--training) } svg .validation { --curve: var(--validation) } svg g { fill: var(--curve) }
svg polyline { fill: none; stroke: var(--curve); stroke-width: 2 }
svg circle { stroke: transparent; stroke-width: 8; pointer-events: all }
figure { margin: 0; width: min-content; min-width: 64px; text-align: center }
figcaption { font-size: 12px; line-height: 1.3 } img { image-rendering: pixelated } .to { white-space: nowrap }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: 3px 6px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } th:first-child { text-align: left } td small { display: block; white-space: nowrap }
table bdi, figure bdi { display: inline-block; max-width: min(11em, 20vw); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; vertical-align: bottom }
.confusion td { padding: 3px 1px; text-align: center; min-width: 2.2em; font-size: 12px; border: 1px solid var(--back) }
.confusion thead th { vertical-align: bottom; padding: 3px 1px; text-align: center }
.upright thead bdi { writing-mode: vertical-rl; max-height: 8em; text-align: right }
.right { background: rgb(var(--right) / calc(var(--share) * .5)) }
.wrong { background: rgb(var(--wrong) / calc(var(--share) * .6)) }
.settings th { font-weight: 400; color: var(--dim) } .settings td { text-align: left; overflow-wrap: anywhere }
"""


class Mistake(NamedTuple):
    """An image that was taken for another class."""

    true: str
    predicted: str
    confidence: float  # the probability of the predicted class
    image: Tensor | None  # (C, H, W)


class Judgement:
    """How a classifier did on a set of images: the counts, and the mistakes of which it was surest.

    Args:
        outputs: logits or log-probabilities, float (N, C).
        targets: the true classes, int64 (N,).
        classes: names of the C classes.
        images: `images[i]` is shown for sample i: (C, H, W), uint8, or float as the model takes it; or a dataset of
            pairs (image, label).

    Attributes: `confusion`, int64 (C, C), rows true and columns predicted; `count`, `correct`, `accuracy`, `interval`
    (its 95% interval), `mistakes`.
    """

    def __init__(self, outputs: Tensor, targets: Tensor, classes: Sequence[str], images: Any = None) -> None:
        self.classes = [str(name) for name in classes]
        confidence, predicted = outputs.softmax(1).max(1)  # (N,), (N,)
        size = len(self.classes)
        self.confusion = torch.bincount(targets * size + predicted, minlength=size * size).view(size, size)
        self.count, self.correct = len(targets), int(self.confusion.trace())
        self.accuracy = self.correct / self.count
        self.interval = wilson_interval(self.correct, self.count)
        wrong = (predicted != targets).nonzero()[:, 0]
        wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
        self.mistakes = []
        for i in wrong.tolist():
            image = None if images is None else images[i]
            image = image[0] if isinstance(image, (tuple, list)) else image
            image = image if isinstance(image, Tensor) and image.dim() == 3 else None  # of text, or of two inputs
            names = self.classes[targets[i]], self.classes[predicted[i]]
            self.mistakes.append(Mistake(*names, float(confidence[i]), image))

    def write(self, path: str | os.PathLike, title: str, info: Mapping[str, Any] | None = None) -> None:
        """Write a page with what a Report shows of a judgement. `info` may have "dataset", "mean" and "std"."""
        parts = [f"<p class=verdict>{text(accuracy_of(self, info or {}))}.</p>", judged(self, info or {})]
        write_page(Path(path), title, parts)

    def by_class(self) -> list[dict[str, Any]]:
        """Return for each class a row: name, support, predictions, hits, and recall (NaN without support)."""
        columns = (self.confusion.sum(1).tolist(), self.confusion.sum(0).tolist(), self.confusion.diagonal().tolist())
        rows = []
        for name, support, predictions, hits in zip(self.classes, *columns, strict=True):
            recall = hits / support if support else math.nan
            rows.append({"name": name, "support": support, "predictions": predictions, "hits": hits, "recall": recall})
        return rows

    def worst_first(self) -> list[int]:
        """Return the indices of the classes, the lowest recall first, classes without an image last."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).argsort(stable=True).tolist()  # NaN is last

    def worst_pairs(self, number: int = 3) -> list[tuple[str, str, int, float]]:
        """Return (true class, class it was taken for, times, share of the true class), the most frequent first."""
        size = len(self.classes)
        off_diagonal = self.confusion.clone().fill_diagonal_(0).flatten()
        support = self.confusion.sum(1).tolist()
        pairs = []
        for index in off_diagonal.argsort(descending=True, stable=True)[:number].tolist():
            true, taken, times = index // size, index % size, int(off_diagonal[index])
            if times:
                pairs.append((self.classes[true], self.classes[taken], times, times / support[true]))
        return pairs


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share, from 0 to 1, that was `correct` of `count` (Wilson, 1927)."""
    z, mean = 1.959964, correct / count
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def advice(history: Mapping[str, Sequence[Any]], judgement: Judgement | None = None) -> list[str]:
    """Return what to do next, in sentences, where the curves of a finished training call for it."""
    if judgement and judgement.interval[0] <= int(judgement.confusion.sum(1).max()) / judgement.count:
        return ["The model does no better than one that always names the most frequent class: "
                "train longer or change the rate, and look whether images and labels belong together."]  # fmt: skip
    found = advice_on_curves(history)
    best = max((value for value in history.get("val_acc", ()) if is_finite(value)), default=0.0)
    if best == 1 or (judgement and best > judgement.interval[1] + 0.02):
        test = f", the test's is {judgement.accuracy:.2%}" if judgement else ""
        found.append(f"Validation accuracy ({best:.2%}) is too good to be true{test}: "
                     "is a validation image also in the training set, perhaps as a near copy?")  # fmt: skip
    if judgement:
        worst = judgement.by_class()[judgement.worst_first()[0]]
        if wilson_interval(worst["hits"], worst["support"])[1] < judgement.accuracy - 0.05:
            found.append(f"Class {worst['name']} is far behind the others: {worst['recall']:.1%} of its "
                         f"{worst['support']:,} images are right. Look at its mistakes; more of its images would help."
                         )  # fmt: skip
    return found


def advice_on_curves(history: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return whether the training overfits, underfits or should be longer. Less than three epochs say nothing."""
    training, validation = history.get("train_loss", ()), history.get("val_loss", ())
    last = len(validation) - 1
    if last < 2 or not (all(map(is_finite, training)) and all(map(is_finite, validation))):
        return []
    low = min(validation)
    best = validation.index(low)
    if last - best >= 2 and validation[last] > 1.1 * low and training[last] < training[best]:
        return [f"The model overfits: since epoch {best + 1} validation loss rose from {low:.4g} to "
                f"{validation[last]:.4g} while training loss fell from {training[best]:.4g} to {training[last]:.4g}. "
                "More data, augmentation, dropout, weight decay or fewer epochs help."]  # fmt: skip
    if validation[last] < 0.95 * min(validation[:last]):
        return ["Validation was still improving at the last epoch: more epochs would probably help."]
    reached, judged = history["train_acc"][last], history["val_acc"][last]
    if is_finite(reached) and is_finite(judged) and reached < 0.9 and judged > reached - 0.02:
        return [f"The model underfits: its accuracy is only {reached:.1%} on the training data themselves. "
                "A larger model, a higher rate, or less dropout and augmentation help."]  # fmt: skip
    return []


def is_finite(value: float | None) -> bool:
    """Return whether there is a value, and it is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


class Report:
    """The page of one run: `report.html` in `folder`, written atomically.

    Args:
        folder: the directory of the run.
        info: what is known of it (see above); read anew at each write.
        trainer: a Trainer, to whose `on_epoch_end` the report adds itself. Its `history` and `best_epoch` are shown.
        defaults: the defaults of the script's options, so that those which differ come first.
        samples: a batch (images, labels) of training images as the network sees them; a row of them is shown.
        launcher: what starts the script, as "torchrun --nproc-per-node=2".
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        info: Mapping[str, Any],
        trainer: Any,
        *,
        defaults: Mapping[str, Any] | None = None,
        samples: tuple[Tensor, Tensor] | None = None,
        launcher: str = "python",
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "report.html"
        self.info = info
        self.trainer = trainer
        self.defaults = dict(defaults or {})
        self.samples = None
        if samples is not None and isinstance(samples[0], Tensor) and samples[0].dim() == 4:  # else no images
            self.samples = samples[0][:12].cpu(), samples[1][:12].tolist()
        self.launcher = launcher
        self.judgement: Judgement | None = None
        self.state = "running"  # or finished, interrupted, failed
        self.reason = ""  # of an end before time
        self.written = 0.0
        trainer.on_epoch_end.append(self.on_epoch_end)

    def __enter__(self) -> Report:
        self.write()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.state = "finished"
            self.write()
            return
        stopped = hasattr(error, "signum") or isinstance(error, KeyboardInterrupt)
        self.state = "interrupted" if stopped else "failed"
        self.reason = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
        with contextlib.suppress(OSError):  # a full disk may be the very error
            self.write()

    def on_epoch_end(self, trainer: Any) -> None:
        """Write the page, at most once a second."""
        if time.monotonic() - self.written > 1:
            self.write()

    def advice(self) -> list[str]:
        """Return what to do next, if the training is finished."""
        return advice(self.trainer.history, self.judgement) if self.state == "finished" else []

    def write(self) -> None:
        """Write the page as things stand."""
        parts = [
            note(self.info.get("notice")),
            f"<p class=verdict>{text(self.verdict())}</p>",
            note(self.reason, f"{self.state.capitalize()}: "),
            *[note(line, "Advice: ") for line in self.advice()],
            curves(self.trainer.history, self.trainer.best_epoch),
            judged(self.judgement, self.info) if self.judgement else "",
            self.training_images(),
            self.settings(),
        ]
        write_page(self.path, self.folder.resolve().name, parts)
        self.written = time.monotonic()

    def verdict(self) -> str:
        """Return in one sentence how good the model is, or how far the training has come."""
        history, best, options = self.trainer.history, self.trainer.best_epoch, self.info.get("options", {})
        epochs = len(history.get("train_loss", ()))
        if self.judgement:
            seconds = (self.info.get("result") or {}).get("train_seconds")
            if options.get("resume"):
                seconds = None  # the result counts only those since the resume
            after = "" if seconds is None else f", after {seconds:.1f} s of training"
            return f"{accuracy_of(self.judgement, self.info)}{after} (best epoch: {best + 1} of {epochs})."
        total = f" of {options['epochs']}" if "epochs" in options else ""
        done = f"{epochs}{total} epochs are done"
        if best is None:
            return f"{done}."
        accuracy = history["val_acc"][best]
        if is_finite(accuracy):
            return f"{done}; the best, epoch {best + 1}, has a validation accuracy of {accuracy:.2%}."
        return f"{done}; the best is epoch {best + 1}."

    def training_images(self) -> str:
        if self.samples is None:
            return ""
        classes = self.info.get("classes")
        figures = [
            figure(image, self.info, bdi(classes[label]) if classes else "")
            for image, label in zip(*self.samples, strict=True)
        ]
        return f"<h2>Training images, as the network sees them</h2><div class=images>{''.join(figures)}</div>"

    def settings(self) -> str:
        """Return how the run was made, and the commands that repeat and use it."""
        changed: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, value in self.info.get("options", {}).items():
            if self.defaults and name not in self.defaults:
                continue  # not an option: what the script itself keeps there
            is_default = name in self.defaults and value == self.defaults[name]
            (others if is_default else changed)[f"--{name.replace('_', '-')}"] = value
        facts = {name: self.info[name] for name in ("dataset", "model", "device", "precision") if name in self.info}
        facts |= {f"{name} version": number for name, number in self.info.get("versions", {}).items()}
        facts |= {"seed": self.info.get("options", {}).get("seed", "none")}
        return (
            f"<h2>How it was made</h2>{table_of(changed | facts)}"
            f"<details><summary>Options left at their defaults</summary>{table_of(others)}</details>"
            f"<pre>{chr(10).join(map(text, self.commands()))}</pre>"
        )

    def commands(self) -> list[str]:
        """Return the lines of a shell that repeat, resume and use this run."""
        words = shlex.split(self.info.get("command") or "")
        if not words:
            return []
        script = Path(words[0])
        if "--output" in words:  # a run never overwrites another
            at = words.index("--output")
            del words[at : at + 2]
        run, again, best, train, predict, export = (
            shlex.quote(str(path))
            for path in (self.folder, f"{self.folder}-again", self.folder / "checkpoints" / "best.pt",
                         script, script.with_name("predict.py"), script.with_name("export.py"))
        )  # fmt: skip
        lines = [
            "# repeat it: the same figures and weights come out, or diff shows from where on they differ",
            f"{self.launcher} {shlex.join(words)} --output {again}",
            f"diff {run}/metrics.jsonl {again}/metrics.jsonl",
            "# continue it, if it was interrupted",
            f"{self.launcher} {train} --resume {run}",
        ]
        if self.trainer.best_epoch is not None:
            lines += ["# use it", f"python {predict} --checkpoint {best} IMAGE", f"python {export} --checkpoint {best}"]
        return lines


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write an HTML page, so that a reader finds either the old or the new one."""
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><link rel="icon" href="data:,"><title>{text(title)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{text(title)}</h1>{''.join(parts)}"
        f"<p class=dim>Written on {time.strftime('%Y-%m-%d at %H:%M:%S')}.</p></body></html>\n"
    )
    write_durably(path, lambda file: file.write(page.encode()))


def text(value: object) -> str:
    """Return `value` as text of a page: markup and control characters escaped."""
    return html.escape(printable(value))


def note(value: str | None, kind: str = "") -> str:
    """Return a highlighted paragraph, nothing without a value."""
    return f"<p class=note><b>{kind}</b>{text(value)}</p>" if value else ""


def bdi(name: object) -> str:
    """Return a name of any length and script, which keeps its direction to itself."""
    return f'<bdi title="{text(name)}">{text(name)}</bdi>'


def accuracy_of(judgement: Judgement, info: Mapping[str, Any]) -> str:
    """Return the accuracy and its interval in words."""
    low, high = judgement.interval
    images = f"{judgement.count:,} {info.get('dataset', '')} test images".replace("  ", " ")
    return f"{judgement.accuracy:.2%} (95% interval {low:.2%} to {high:.2%}) of {images} are classified correctly"


def table_of(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items())
    return f"<table class=settings>{rows}</table>" if rows else ""


def curves(history: Mapping[str, Sequence[Any]], best_epoch: int | None) -> str:
    """Return a chart for each figure of the history, training and validation together, and a table of the numbers."""
    charts: dict[str, dict[str, Sequence[Any]]] = {}
    for name in sorted((n for n in history if any(map(is_finite, history[n]))), key=lambda n: n == "lr"):  # lr last
        kind = "validation" if name.startswith("val_") else "training"
        charts.setdefault(name.removeprefix("train_").removeprefix("val_"), {})[kind] = history[name]
    if not charts:
        return ""
    drawn = [chart(name, lines, best_epoch) for name, lines in charts.items()]
    head = "".join(f"<th>{text(name.replace('_', ' '))}</th>" for name in ("epoch", *history))
    rows = []
    for i, values in enumerate(zip(*history.values(), strict=True)):
        cells = "".join(f"<td>{'' if value is None else f'{value:.6g}'}</td>" for value in values)
        rows.append(f"<tr><th>{i + 1}{' best' if i == best_epoch else ''}</th>{cells}</tr>")
    return (
        f"<h2>Curves</h2><div class=charts>{''.join(drawn)}</div><details><summary>The numbers</summary>"
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def chart(name: str, lines: Mapping[str, Sequence[Any]], best_epoch: int | None) -> str:
    """Return an SVG of values per epoch; `lines` are named "training" and "validation". Missing values are left out."""
    title, factor = {"acc": ("accuracy, %", 100), "lr": ("learning rate", 1)}.get(name, (name.replace("_", " "), 1))
    left, right, top, bottom = 52, 350, 36, 176
    epochs = max(map(len, lines.values()))
    points = {kind: [(i, v * factor) for i, v in enumerate(lines[kind]) if is_finite(v)] for kind in lines}
    finite = [value for pairs in points.values() for _, value in pairs]
    marks = ticks(min(finite), max(finite))

    def x(index: float) -> float:
        return left + (right - left) * index / max(epochs - 1, 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [f'<svg viewBox="0 0 370 212" role="img" aria-label="{text(title)} by epoch">'
             f'<text x="8" y="15" font-weight="600">{text(title)}</text>']  # fmt: skip
    for mark in marks:
        parts.append(f'<path d="M{left} {y(mark):.1f}H{right}"/>'
                     f'<text x="{left - 5}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')  # fmt: skip
    for i in {0, epochs - 1}:
        parts.append(f'<text x="{x(i):.1f}" y="{bottom + 15}" text-anchor="middle">{i + 1}</text>')
    below = "epoch"
    if best_epoch is not None:
        below += f" (dashed line at the best: epoch {best_epoch + 1})"
        parts.append(f'<path class="best" d="M{x(best_epoch):.1f} {top}V{bottom}"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 28}" text-anchor="middle">{below}</text>')
    for number, (kind, pairs) in enumerate(points.items()):
        line = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in pairs)
        parts.append(f'<g class="{kind}"><polyline points="{line}"/><text x="{200 + 80 * number}" y="15">{kind}</text>')
        for i, value in pairs[:: math.ceil(len(pairs) / DOTS) or 1]:
            parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="2.5">'
                         f"<title>epoch {i + 1}: {kind} {value:.6g}</title></circle>")  # fmt: skip
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, the first at most `low`, the last at least `high`."""
    span = high - low or abs(low) * 0.1 or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 4)
    first = math.floor(low / step + 1e-6)
    last = max(math.ceil(high / step - 1e-6), first + 1)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def judged(judgement: Judgement, info: Mapping[str, Any]) -> str:
    """Return the confusion matrix, the figures by class and the worst mistakes."""
    pairs = [
        f"{bdi(true)} was taken for {bdi(taken)} ({times:,} times, {part:.1%} of its images)"
        for true, taken, times, part in judgement.worst_pairs()
    ]
    figures = [
        figure(one.image, info, f"{bdi(one.true)} <span class=to>→ {bdi(one.predicted)}</span><br>{one.confidence:.1%}")
        for one in judgement.mistakes
        if one.image is not None
    ]
    number = f"{len(figures)} of {judgement.count - judgement.correct:,}"
    mistakes = (
        f"<h2>The worst mistakes</h2><p class=dim>{number}: true → predicted class, and the model's confidence in it."
        f"</p><div class=images>{''.join(figures)}</div>"
    )
    return (
        "<div class=pair><div><h2>What is confused</h2>"
        f"<p>{';<br>'.join(pairs) or 'No image was taken for another class'}.</p>{confusion_table(judgement)}</div>"
        f"<div><h2>By class, the lowest recall first</h2>{class_table(judgement)}<p class=dim>Precision: of the images "
        "given to a class, the share that belongs to it.<br>Recall: of its images, the share that was given to it. "
        "F1: their harmonic mean.<br>Small print: 95% intervals.</p></div></div>" + (mistakes if figures else "")
    )


def confusion_table(judgement: Judgement) -> str:
    """Return the counts of true (rows) and predicted classes: of all, or of those with the lowest recall if many."""
    shown = sorted(judgement.worst_first()[:MATRIX])
    # The shade is the root of the share of the row, so that a few mistakes can be seen too.
    shades = (judgement.confusion / judgement.confusion.sum(1, keepdim=True).clamp(min=1)).sqrt()
    rows = []
    for i in shown:
        cells = []
        for j in shown:
            times, kind = int(judgement.confusion[i, j]), "right" if i == j else "wrong"
            cells.append(f'<td class={kind} style="--share:{shades[i, j]:.2f}">{times or "·"}</td>')
        rows.append(f"<tr><th>{bdi(judgement.classes[i])}</th>{''.join(cells)}</tr>")
    names = [judgement.classes[i] for i in shown]
    upright = " upright" if max(map(len, names)) > 3 else ""
    rest = len(judgement.classes) - len(shown)
    left_out = f" The {rest} classes with a higher recall are left out." if rest else ""
    return (
        f'<div class=scroll><table class="confusion{upright}"><thead><tr><td></td>'
        f"{''.join(f'<th>{bdi(name)}</th>' for name in names)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=dim>Rows: true class, columns: predicted class. The shade grows with the share of the row."
        f"{left_out}</p>"
    )


def class_table(judgement: Judgement) -> str:
    """Return the figures of all classes, with their 95% intervals."""

    def cell(part: int, whole: int, of_f1: bool = False) -> str:
        if not whole:
            return "<td>–</td>"
        # F1 is 2 J / (1 + J), where J = hits / (hits + misses + false alarms) is a share with an interval
        figures = [2 * x / (1 + x) if of_f1 else x for x in (part / whole, *wilson_interval(part, whole))]
        return f"<td>{figures[0]:.1%}<small>{100 * figures[1]:.1f}–{figures[2]:.1%}</small></td>"

    rows, body = judgement.by_class(), []
    for i in judgement.worst_first():
        support, predictions, hits = rows[i]["support"], rows[i]["predictions"], rows[i]["hits"]
        cells = cell(hits, predictions) + cell(hits, support) + cell(hits, support + predictions - hits, of_f1=True)
        body.append(f"<tr><th>{bdi(rows[i]['name'])}</th><td>{support:,}</td>{cells}</tr>")
    head = "<tr><th>class</th><th>images</th><th>precision</th><th>recall</th><th>F1</th></tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"


def figure(image: Tensor, info: Mapping[str, Any], caption: str) -> str:
    return f"<figure>{picture(image, info)}<figcaption>{caption}</figcaption></figure>"


def picture(image: Tensor, info: Mapping[str, Any]) -> str:
    """Return an image (C, H, W) for a page, at least 56 pixels wide and high and not much above 112.

    uint8 is shown as it is; of floats the normalisation by info["mean"] and info["std"] is undone.
    """
    pixels = image.detach().cpu().float()
    if image.is_floating_point():
        mean, std = torch.tensor(info.get("mean", (0.0,))), torch.tensor(info.get("std", (1.0,)))
        pixels = (pixels * std.view(-1, 1, 1) + mean.view(-1, 1, 1)) * 255
    if len(pixels) not in (1, 3):
        pixels = pixels[:1]
    if max(pixels.shape) > 112:
        factor = 112 / max(pixels.shape)
        pixels = F.interpolate(pixels[None], scale_factor=factor, mode="bilinear", antialias=True)[0]
    height, width = pixels.shape[1:]
    zoom = max(1, math.ceil(56 / min(height, width)))
    source = png(pixels.round().clamp(0, 255).byte())
    return f'<img alt="" width={width * zoom} height={height * zoom} src="{source}">'


def png(pixels: Tensor) -> str:
    """Return an image, uint8 (1, H, W) in grey or (3, H, W) in RGB, as a data: address."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels)
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], 1)  # each row begins with filter 0, none
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows.numpy().tobytes()),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks.items():
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return "data:image/png;base64," + base64.b64encode(content).decode()

"""report.html: one page on a training run, for a person. It opens offline in any browser and makes no request.

    report = Report(run.path, run.info, trainer)        # on rank 0 only; others use contextlib.nullcontext()
    with report:                                        # writes the page now, after each epoch and at the end
        trainer.fit(train_loader, val_loader, 15)
        outputs, targets = predict_all(trainer.evaluated_model, test_loader)
        report.judgement = Judgement(outputs, targets, classes, test_images)    # confusion, figures by class, mistakes
    print(*report.advice(), sep="\\n")

`run.info` is any dict, as in run.json. The page shows its "command", "options", "notice", "device", "precision",
"versions", "dataset", "mean" and "std" (to undo a normalisation) and "result", as far as they are there. If the `with`
block raises, the page gives the reason. Needs torch and no sibling.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SHOWN = 24  # mistakes
TABLE_LIMIT = 20  # with more classes the confusion matrix is drawn without numbers, and the worst classes come first
STYLE = """
:root { --back: #fff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --card: #f6f8fa;
  --training: #0969da; --validation: #bc4c00; --right: 26 127 55; --wrong: 207 34 46; --note: #fff8c5 }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --dim: #9198a1; --line: #3d444d;
  --card: #151b23; --training: #58a6ff; --validation: #f0883e; --right: 63 185 80; --wrong: 248 81 73;
  --note: #3a2f0b } }
body { margin: 0 auto; max-width: 1160px; padding: 12px; font: 15px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.3rem; margin: .3em 0 } h2 { font-size: 1.1rem; margin: 1.6em 0 .4em }
.verdict { font-size: 1.2rem; margin: .4em 0 }
.note { background: var(--note); border-radius: 6px; padding: 8px 12px; margin: 8px 0 }
.dim, figcaption, small { color: var(--dim) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 12px }
.pair { display: flex; flex-wrap: wrap; gap: 0 60px } .pair > div { min-width: 0 } .pair p { max-width: 460px }
.wide { overflow-x: auto } .to { white-space: nowrap } .images { display: flex; flex-wrap: wrap; gap: 10px }
svg { width: 100%; max-width: 480px; background: var(--card); border-radius: 6px; font-size: 11px; fill: var(--text) }
svg .grid { stroke: var(--line); fill: none } svg .best { stroke: var(--dim); stroke-dasharray: 3 3 }
svg .curve { fill: none; stroke-width: 2 } svg .ring { fill: none; stroke: var(--text); stroke-width: 1.5 }
svg .hover { fill: transparent } svg .hover:hover { fill: var(--dim); fill-opacity: .15 }
.training { stroke: var(--training) } .validation { stroke: var(--validation) } .only { stroke: var(--text) }
figure { margin: 0; width: min-content; min-width: 64px; text-align: center }
figcaption { font-size: 12px; line-height: 1.3 } img { image-rendering: pixelated; max-width: 100%; height: auto }
.matrix { border: 1px solid var(--line) }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: 3px 6px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } th:first-child { text-align: left } td small { display: block; white-space: nowrap }
table bdi, figure bdi { display: inline-block; max-width: min(11em, 20vw); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; vertical-align: bottom }
.confusion td { padding: 3px 1px; text-align: center; min-width: 2.2em; font-size: 12px; border: 1px solid var(--back) }
.upright thead bdi { writing-mode: vertical-rl; max-height: 8em; text-align: right }
.confusion thead th { vertical-align: bottom; padding: 3px 1px; text-align: center }
.right { background: rgb(var(--right) / calc(var(--share) * .5)) }
.wrong { background: rgb(var(--wrong) / calc(var(--share) * .6)) }
.settings th { font-weight: 400; color: var(--dim) } .settings td { text-align: left; overflow-wrap: anywhere }
pre { background: var(--card); border-radius: 6px; padding: 8px 12px; white-space: pre-wrap; font-size: 13px }
details { margin: 8px 0 } summary { cursor: pointer; color: var(--dim) }
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
        wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:SHOWN]
        self.mistakes = []
        for i in wrong.tolist():
            image = None if images is None else images[i]
            image = image[0] if isinstance(image, (tuple, list)) else image
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

    def worst_classes(self, number: int = 3) -> list[dict[str, Any]]:
        """Return the rows of `by_class` with the lowest recall; classes without an image do not count."""
        rows = [row for row in self.by_class() if row["support"]]
        return sorted(rows, key=lambda row: row["recall"])[:number]

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


def count_shared(training: Tensor, validation: Tensor) -> int:
    """Return how many validation images, uint8 (N, C, H, W), are also in the training set, byte for byte."""
    known = set(map(hash, map(bytes, training.cpu().flatten(1).numpy())))
    return sum(hash(bytes(image)) in known for image in validation.cpu().flatten(1).numpy())


def advice(
    history: Mapping[str, Sequence[Any]], judgement: Judgement | None = None, shared: Callable[[], int] | None = None
) -> list[str]:
    """Return what to do next, in sentences, where the curves of a finished training call for it.

    `shared` returns how many validation images are also in the training set. It is called if validation is too good.
    """
    if judgement and judgement.interval[0] <= int(judgement.confusion.sum(1).max()) / judgement.count:
        return ["The model does no better than one that always names the most frequent class: "
                "lower the learning rate, and look whether images and labels belong together."]  # fmt: skip
    found = advice_on_curves(history)
    accuracies = [value for value in history.get("val_acc", ()) if is_finite(value)]
    best = max(accuracies, default=0.0)
    beyond = judgement is not None and best > judgement.interval[1] + 0.02
    if best == 1 or beyond:
        number = shared() if shared else None
        figures = f"Validation accuracy ({best:.2%}) is too good to be true"
        figures += f", the test's is {judgement.accuracy:.2%}" if judgement and beyond else ""
        if number:
            found.append(f"{figures}: {number:,} validation images are also in the training set. Remove them.")
        elif number is None:
            found.append(f"{figures}: is a validation image also in the training set, perhaps as a near copy?")
        elif beyond:
            found.append(f"{figures}, though no validation image is in the training set: are the sources the same?")
    for row in judgement.worst_classes(1) if judgement else []:
        if wilson_interval(row["hits"], row["support"])[1] < judgement.accuracy - 0.05:  # type: ignore[union-attr]
            found.append(f"Class {row['name']} is far behind the others: {row['recall']:.1%} of its {row['support']:,} "
                         "images are right. Look at its mistakes; more of its images would help.")  # fmt: skip
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
    return value is not None and math.isfinite(value)


class Report:
    """The page of one run: `report.html` in `folder`, written atomically.

    Args:
        folder: the directory of the run.
        info: what is known of it (see above); read anew at each write.
        trainer: a Trainer, to whose `on_epoch_end` the report adds itself. Its `history` and `best_epoch` are shown.
        defaults: the defaults of the script's options, so that those which differ come first.
        samples: a batch (images, labels) of training images as the network sees them; a row of them is shown.
        shared: returns how many validation images are also in the training set; called if validation is too good.
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
        shared: Callable[[], int] | None = None,
        launcher: str = "python",
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "report.html"
        self.info = info
        self.trainer = trainer
        self.defaults = dict(defaults or {})
        self.samples = None if samples is None else (samples[0][:12].cpu(), samples[1][:12].tolist())
        self.shared = shared
        self.launcher = launcher
        self.judgement: Judgement | None = None
        self.state = "running"  # or finished, interrupted, failed
        self.reason = ""  # of an end before time
        self.written, self.seconds = 0.0, 0.0  # when the page was last written, and how long that took
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
        """Write the page, unless that would take more than 1% of the time."""
        if time.monotonic() - self.written > 100 * self.seconds:
            self.write()

    def advice(self) -> list[str]:
        """Return what to do next, if the training is finished."""
        return advice(self.trainer.history, self.judgement, self.shared) if self.state == "finished" else []

    def write(self) -> None:
        """Write the page as things stand."""
        began = time.monotonic()
        parts = [
            note(self.info.get("notice")),
            f"<p class=verdict>{text(self.verdict())}</p>",
            note(self.reason, f"{self.state.capitalize()}: "),
            *[note(line, "Advice: ") for line in self.advice()],
            curves(self.trainer.history, self.trainer.best_epoch),
            judged(self.judgement, self.info) if self.judgement else "",
            self.training_images(),
            self.settings(),
            note("load this page anew to see more.", "The training goes on: ") if self.state == "running" else "",
        ]
        write_page(self.path, self.folder.resolve().name, parts)
        self.written = time.monotonic()
        self.seconds = self.written - began

    def verdict(self) -> str:
        """Return in one sentence how good the model is, or how far the training has come."""
        history, best, result = self.trainer.history, self.trainer.best_epoch, self.info.get("result") or {}
        options = self.info.get("options", {})
        epochs, total = len(history.get("train_loss", ())), options.get("epochs")
        seconds = f", after {result['train_seconds']:.1f} s of training" if "train_seconds" in result else ""
        seconds = "" if options.get("resume") else seconds  # which are those since the resume
        if self.judgement:
            return f"{accuracy_of(self.judgement, self.info)}{seconds} (best epoch: {best + 1} of {epochs})."
        done = f"{epochs} of {total} epochs are done" if total else f"{epochs} epochs are done"
        if best is None:
            return f"{done}."
        name = next(name for name in ("val_acc", "val_loss", "train_loss") if is_finite(history[name][best]))
        figure = f"{history[name][best]:.4g}"
        if name == "val_acc":
            count = round(self.trainer.validation_means.sums.get("acc", (0, 0))[1])
            figure = percent(round(history[name][best] * count), count) if count else f"{history[name][best]:.2%}"
        names = {"val_acc": "validation accuracy", "val_loss": "validation loss", "train_loss": "training loss"}
        return f"{done}{seconds}; the best, epoch {best + 1}, has a {names[name]} of {figure}."

    def training_images(self) -> str:
        if self.samples is None:
            return ""
        classes = self.info.get("classes") or {}
        figures = []
        for image, label in zip(*self.samples, strict=True):
            caption = bdi(classes[label]) if classes else ""
            figures.append(f"<figure>{picture(image, self.info)}<figcaption>{caption}</figcaption></figure>")
        return f"<h2>Training images, as the network sees them</h2><div class=images>{''.join(figures)}</div>"

    def settings(self) -> str:
        """Return how the run was made, and the commands that repeat and use it."""
        options = {f"--{k.replace('_', '-')}": v for k, v in self.info.get("options", {}).items() if k != "command"}
        defaults = {f"--{k.replace('_', '-')}": v for k, v in self.defaults.items()}
        changed = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
        facts = {name: self.info[name] for name in ("dataset", "model", "device", "precision") if name in self.info}
        facts |= {f"{name} version": number for name, number in self.info.get("versions", {}).items()}
        facts |= {"seed": options.get("--seed", "none")}
        others = table_of({k: v for k, v in options.items() if k not in changed})
        return (
            f"<h2>How it was made</h2>{table_of(changed | facts)}"
            f"<details><summary>Options left at their defaults</summary>{others}</details>"
            f"<pre>{chr(10).join(map(text, self.commands()))}</pre>"
        )

    def commands(self) -> list[str]:
        """Return the lines of a shell that repeat, resume and use this run."""
        words = shlex.split(self.info.get("command") or "")
        if not words:
            return []
        if "--output" in words:  # a run never overwrites another
            at = words.index("--output")
            del words[at : at + 2]
        run, again, best = (
            shlex.quote(str(path))
            for path in (self.folder, f"{self.folder}-again", self.folder / "checkpoints" / "best.pt")
        )
        predict, export = (shlex.quote(str(Path(words[0]).with_name(name))) for name in ("predict.py", "export.py"))
        lines = [
            "# repeat it: the same figures and weights come out, or diff shows from where on they differ",
            f"{self.launcher} {shlex.join(words)} --output {again}",
            f"diff {run}/metrics.jsonl {again}/metrics.jsonl",
            "# continue it, if it was interrupted",
            f"{self.launcher} {shlex.quote(words[0])} --resume {run}",
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def text(value: object) -> str:
    """Return `value` as text of a page: markup and control characters escaped."""
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)))


def note(value: str | None, kind: str = "") -> str:
    return f"<p class=note><b>{kind}</b>{text(value)}</p>" if value else ""


def bdi(name: object) -> str:
    """Return a name of any length and script, which keeps its direction to itself."""
    return f'<bdi title="{text(name)}">{text(name)}</bdi>'


def percent(correct: int, count: int) -> str:
    low, high = wilson_interval(correct, count)
    return f"{correct / count:.2%} (95% interval {low:.2%} to {high:.2%})"


def accuracy_of(judgement: Judgement, info: Mapping[str, Any]) -> str:
    which = f"{info.get('dataset', '')} test images".strip()
    return f"{percent(judgement.correct, judgement.count)} of {judgement.count:,} {which} are classified correctly"


def table_of(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items())
    return f"<table class=settings>{rows}</table>" if rows else ""


def curves(history: Mapping[str, Sequence[Any]], best_epoch: int | None) -> str:
    """Return a chart for each figure of the history, training and validation together, and a table of the numbers."""
    charts: dict[str, dict[str, Sequence[Any]]] = {}
    for name in sorted((n for n in history if any(map(is_finite, history[n]))), key=lambda n: n == "lr"):  # lr last
        part, _, figure = name.partition("_")
        kind = {"train": "training", "val": "validation"}.get(part)
        charts.setdefault(figure if kind else name, {})[kind or "only"] = history[name]
    if not charts:
        return ""
    titles = {"acc": "accuracy, %", "lr": "learning rate", "grad_norm": "norm of the gradient"}
    drawn = [chart(titles.get(name, name), lines, best_epoch) for name, lines in charts.items()]
    head = "".join(f"<th>{text(name.replace('_', ' '))}</th>" for name in ("epoch", *history))
    rows = []
    for i, values in enumerate(zip(*history.values(), strict=True)):
        cells = "".join(f"<td>{'' if value is None else f'{value:.6g}'}</td>" for value in values)
        rows.append(f"<tr><th>{i + 1}{' best' if i == best_epoch else ''}</th>{cells}</tr>")
    return (
        f"<h2>Curves</h2><div class=charts>{''.join(drawn)}</div><details><summary>The numbers</summary>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def chart(title: str, lines: Mapping[str, Sequence[Any]], best_epoch: int | None) -> str:
    """Return an SVG of values per epoch; `lines` are named "training" and "validation", or "only"."""
    left, right, top, bottom = 52, 350, 36, 176
    factor = 100 if title.endswith("%") else 1
    points = {kind: [v * factor if is_finite(v) else None for v in values] for kind, values in lines.items()}
    finite = [value for values in points.values() for value in values if value is not None]
    epochs = max(map(len, points.values()))
    logarithmic = title == "loss" and min(finite) > 0 and max(finite) > 50 * min(finite)
    marks = decades(min(finite), max(finite)) if logarithmic else ticks(min(finite), max(finite))
    scale = math.log10 if logarithmic else float
    low, high = scale(marks[0]), scale(marks[-1])

    def x(index: float) -> float:
        return (left + right) / 2 if epochs == 1 else left + (right - left) * index / (epochs - 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (scale(value) - low) / (high - low)

    kind_of_axis = " (logarithmic)" if logarithmic else ""
    parts = [f'<svg viewBox="0 0 360 212" role="img" aria-label="{text(title)} by epoch">'
             f'<text x="8" y="15" font-weight="600">{text(title)}{kind_of_axis}</text>']
    for mark in marks:
        parts.append(f'<path class="grid" d="M{left} {y(mark):.1f}H{right}"/>'
                     f'<text x="{left - 5}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for mark in ticks(1, max(epochs, 2)):
        if mark == int(mark) and 1 <= mark <= epochs:
            parts.append(f'<text x="{x(mark - 1):.1f}" y="{bottom + 15}" text-anchor="middle">{mark:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 30}" text-anchor="middle">epoch</text>')
    if best_epoch is not None:
        at = x(best_epoch)
        side = "end" if at > (left + right) / 2 else "start"
        parts.append(f'<path class="best" d="M{at:.1f} {top}V{bottom}"/>'
                     f'<text x="{at:.1f}" y="{top - 5}" text-anchor="{side}">best: epoch {best_epoch + 1}</text>')
    for number, (kind, values) in enumerate(points.items()):
        path, pen = [], "M"
        for i, value in enumerate(values):
            if value is not None:
                path.append(f"{pen}{x(i):.1f} {y(value):.1f}")
            pen = "M" if value is None else "L"
        parts.append(f'<path class="curve {kind}" d="{"".join(path)}"/>')
        for i, value in enumerate(values):
            if value is not None and (len(path) <= 20 or i == best_epoch):
                ring = "ring" if i == best_epoch else "curve"
                parts.append(f'<circle class="{ring} {kind}" cx="{x(i):.1f}" cy="{y(value):.1f}" r="2.5"/>')
        if kind != "only":
            parts.append(f'<path class="curve {kind}" d="M{190 + 80 * number} 11h14"/>'
                         f'<text x="{208 + 80 * number}" y="15">{kind}</text>')
    step = -(-epochs // 150)  # strips to hover over, at most 150
    width = (right - left) / max(epochs - 1, 1) * step
    for i in range(0, epochs, step):
        known = {kind: values[i] for kind, values in points.items() if values[i] is not None}
        said = [f"{kind} {value:.6g}".removeprefix("only ") for kind, value in known.items()]
        parts.append(f'<rect class="hover" x="{x(i) - width / 2:.1f}" y="{top}" width="{width:.1f}" '
                     f'height="{bottom - top}"><title>epoch {i + 1}: {", ".join(said)}</title></rect>')
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, the first at most `low`, the last at least `high`."""
    span = high - low or abs(low) * 0.1 or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 4)
    first = math.floor(low / step + 1e-6)
    last = max(math.ceil(high / step - 1e-6), first + 1)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return at most seven powers of ten that span the positive numbers `low` to `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // 6)
    return [10.0**power for power in range(first, last + step, step)]


def judged(judgement: Judgement, info: Mapping[str, Any]) -> str:
    """Return the confusion matrix, the figures by class and the worst mistakes."""
    pairs = [
        f"{bdi(true)} was taken for {bdi(taken)} ({times:,} times, {part:.1%} of its images)"
        for true, taken, times, part in judgement.worst_pairs()
    ]
    many = len(judgement.classes) > TABLE_LIMIT
    rows = judgement.by_class()
    if many:
        title = f"By class: the {TABLE_LIMIT} with the lowest recall"
        tables = class_table(judgement.worst_classes(TABLE_LIMIT))
        tables += f"<details><summary>All {len(rows)} classes</summary>{class_table(rows)}</details>"
    else:
        title, tables = "By class", class_table(rows)
    parts = [
        "<div class=pair><div><h2>What is confused</h2>",
        f"<p>{';<br>'.join(pairs) or 'No image was taken for another class'}.</p>",
        f"<div class=wide>{confusion_picture(judgement) if many else confusion_table(judgement)}</div>",
        "<p class=dim>Rows: true class, columns: predicted class. The shade is the share of the row.</p></div>",
        f"<div><h2>{title}</h2>{tables}<p class=dim>Precision: of the images given to a class, the share that belongs "
        "to it.<br>Recall: of its images, the share that was given to it. F1: their harmonic mean.<br>Small print: 95% "
        "intervals.</p></div></div>",
    ]
    figures = [
        f"<figure>{picture(one.image, info)}<figcaption>{bdi(one.true)} <span class=to>→ {bdi(one.predicted)}</span>"
        f"<br>{one.confidence:.1%}</figcaption></figure>"
        for one in judgement.mistakes
        if one.image is not None
    ]
    if figures:
        number = f"{len(figures)} of {judgement.count - judgement.correct:,}"
        parts.append(f"<h2>The worst mistakes</h2><p class=dim>{number}: true → predicted class, "
                     f"and the model's confidence in it.</p><div class=images>{''.join(figures)}</div>")
    return "".join(parts)


def row_shares(judgement: Judgement) -> Tensor:
    """Return for each cell of the confusion matrix the root of its share of the row: a few mistakes can be seen too."""
    return (judgement.confusion / judgement.confusion.sum(1, keepdim=True).clamp(min=1)).sqrt()


def confusion_table(judgement: Judgement) -> str:
    shares = row_shares(judgement)
    rows = []
    for i, name in enumerate(judgement.classes):
        cells = []
        for j, times in enumerate(judgement.confusion[i].tolist()):
            kind = "right" if i == j else "wrong"
            shade = f' class={kind} style="--share:{shares[i, j]:.2f}"' if times else ""
            cells.append(f"<td{shade}>{times or '·'}</td>")
        rows.append(f"<tr><th>{bdi(name)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{bdi(name)}</th>" for name in judgement.classes)
    upright = " upright" if max(map(len, judgement.classes)) > 3 else ""
    return (f'<table class="confusion{upright}"><thead><tr><td></td>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table>")  # fmt: skip


def confusion_picture(judgement: Judgement) -> str:
    """Return the confusion matrix as an image: a pixel for each cell, red, or green on the diagonal."""
    size = len(judgement.classes)
    pixels = torch.tensor([229, 72, 77, 0], dtype=torch.uint8).repeat(size, size, 1)  # (C, C, RGBA)
    pixels[range(size), range(size)] = torch.tensor([48, 164, 108, 0], dtype=torch.uint8)
    pixels[..., 3] = (255 * row_shares(judgement)).round().byte()
    width, source = size * max(1, 800 // size), png(pixels.permute(2, 0, 1))
    return f'<img class=matrix alt="confusion matrix" width={width} height={width} src="{source}">'


def class_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures of some rows of `Judgement.by_class`, with their 95% intervals."""

    def cell(part: int, whole: int, of_f1: bool = False) -> str:
        if not whole:
            return "<td>–</td>"
        # F1 is 2 J / (1 + J), where J = hits / (hits + misses + false alarms) is a share with an interval
        figures = [2 * x / (1 + x) if of_f1 else x for x in (part / whole, *wilson_interval(part, whole))]
        return f"<td>{figures[0]:.1%}<small>{100 * figures[1]:.1f}–{figures[2]:.1%}</small></td>"

    body = []
    for row in rows:
        support, predictions, hits = row["support"], row["predictions"], row["hits"]
        cells = cell(hits, predictions) + cell(hits, support) + cell(hits, support + predictions - hits, of_f1=True)
        body.append(f"<tr><th>{bdi(row['name'])}</th><td>{support:,}</td>{cells}</tr>")
    head = "<tr><th>class</th><th>images</th><th>precision</th><th>recall</th><th>F1</th></tr>"
    return f"<div class=wide><table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"


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
    """Return an image, uint8 (C, H, W) with C of 1 (grey), 3 (RGB) or 4 (RGBA), as a data: address."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels)
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], 1)  # each row begins with filter 0, none
    colour_type = {1: 0, 3: 2, 4: 6}[channels]
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 8, colour_type, 0, 0, 0),
        b"IDAT": zlib.compress(rows.numpy().tobytes()),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks.items():
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return "data:image/png;base64," + base64.b64encode(content).decode()

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
import io
import math
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_durably
from .cli import printable

# The browser sets text and background, light or dark by the reader's choice. The other colors suit both.
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
body { max-width: 1160px; margin: 0 auto; padding: 12px; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin: 1.6em 0 .4em } .verdict { font-size: 1.2rem }
.note, pre { padding: 8px 12px; margin: 8px 0; background: #fb03; white-space: pre-wrap } pre, svg { background: #8881 }
.dim, figcaption, small, summary { opacity: .7 } .to, small { white-space: nowrap }
.row { display: flex; flex-wrap: wrap; gap: 12px } .row > div { max-width: 100%; margin-right: 48px }
.row p { max-width: 460px }
svg { width: 370px; max-width: 100%; font-size: 11px; fill: currentColor } path { stroke: #8888 }
g { fill: currentColor } g.training { color: #1f78e0 } g.validation { color: #c8601a }
polyline { fill: none; stroke: currentColor; stroke-width: 2 } circle { stroke: transparent; stroke-width: 8 }
figure { margin: 0; width: min-content; min-width: 64px; text-align: center } img { image-rendering: pixelated }
figcaption, pre, table { font-size: 13px } .scroll { overflow: auto; max-height: 800px }
table { border-collapse: collapse; overflow-wrap: normal } td small { display: block }
th, td { padding: 3px 6px; text-align: right; border-bottom: 1px solid #8884; vertical-align: top }
th:first-child, .settings td { text-align: left } .settings td { overflow-wrap: anywhere }
table bdi, figure bdi { display: inline-block; max-width: min(11em, 20vw); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; vertical-align: bottom }
table th:first-child bdi { max-width: min(11em, 34vw) }
.confusion td, .confusion thead th { min-width: 2.2em; padding: 3px 1px; text-align: center; vertical-align: bottom }
.confusion td { font-size: 12px } .upright thead bdi { writing-mode: vertical-rl; max-height: 8em }
</style>
"""


class Judgement:
    """The results of a classifier on a test set: its counts, and its most confident mistakes.

    Args:
        outputs: logits or log-probabilities, float (N, C).
        targets: the true classes, int64 (N,).
        classes: names of the C classes.
        images: `images[i]` is sample i: (C, H, W), uint8, or float as the model takes it; or a pair (image, label).

    Attributes: `confusion`, int64 (C, C), rows true and columns predicted; `count`, `correct`, `accuracy`, `interval`
    (its 95% interval); `mistakes`, the 24 most confident, as (true class, predicted class, its probability, image).
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
        self.mistakes = []
        for i in wrong[confidence[wrong].argsort(descending=True, stable=True)][:24].tolist():
            true, taken = self.classes[targets[i]], self.classes[predicted[i]]
            self.mistakes.append((true, taken, float(confidence[i]), None if images is None else images[i]))

    def write(self, path: str | Path, title: str, info: Mapping[str, Any]) -> None:
        """Write a page with the accuracy, the tables and the mistakes. `info` may have "dataset", "mean" and "std"."""
        verdict = f"<p class=verdict>{text(accuracy_of(self, info))}.</p>"
        write_page(Path(path), title, [verdict, judgement_html(self, info)])

    def by_class(self) -> list[dict[str, Any]]:
        """Return for each class a row: name, support, predictions, hits, and recall (NaN without support)."""
        rows = []
        for i, name in enumerate(self.classes):
            support, predictions = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            hits = int(self.confusion[i, i])
            recall = hits / support if support else math.nan
            rows.append({"name": name, "support": support, "predictions": predictions, "hits": hits, "recall": recall})
        return rows

    def by_class_lines(self) -> list[str]:
        """Return lines with the recall of each class, or of the lowest three if there are many or all are high."""
        rows = [row for row in self.by_class() if row["support"]]
        lowest = sorted(rows, key=lambda row: row["recall"])
        shown = lowest[:3] if len(rows) > 20 or lowest[0]["recall"] > 0.99 else rows
        entries = [f"{printable(row['name'])} {row['recall']:.1%}" for row in shown]
        if len(shown) < len(rows):
            entries.append("(the lowest)")
        lines = [f"by class: {entries[0]}"]
        for entry in entries[1:]:
            if len(f"{lines[-1]}  {entry}") <= 60:
                lines[-1] += f"  {entry}"
            else:
                lines.append(f"          {entry}")
        return lines

    def worst_first(self) -> list[int]:
        """Return the indices of the classes, the lowest recall first, classes without a sample last."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).argsort(stable=True).tolist()  # NaN is last

    def worst_pairs(self, number: int = 3) -> list[tuple[str, str, int, float]]:
        """Return (true class, class it was taken for, times, share of the true class), the most frequent first."""
        wrong, support = self.confusion.clone().fill_diagonal_(0), self.confusion.sum(1).tolist()
        pairs = [
            (self.classes[true], self.classes[taken], times, times / support[true])
            for (true, taken), times in zip(wrong.nonzero().tolist(), wrong[wrong > 0].tolist(), strict=True)
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:number]


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95% interval, within 0 to 1, of the share `correct` / `count` (Wilson, 1927)."""
    z, mean = 1.959964, correct / count
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def advice(history: Mapping[str, Sequence[Any]], judgement: Judgement | None = None, val_count: int = 0) -> list[str]:
    """Return advice on a finished training, in sentences. `val_count` is the number of validation targets."""
    found = advice_on_curves(history)
    if judgement is None:
        return found
    most_frequent = int(judgement.confusion.sum(1).max()) / judgement.count
    if judgement.accuracy <= most_frequent < 1:
        return ["The model does no better than one that always names the most frequent class: "
                "train longer or change the rate, and look whether samples and labels belong together."]  # fmt: skip
    best = max(filter(is_finite, history.get("val_acc", ())), default=0.0)
    if val_count and wilson_interval(round(best * val_count), val_count)[0] > judgement.interval[1] + 0.02:
        found.append(f"Validation accuracy ({best:.2%}) is too good to be true, the test's is {judgement.accuracy:.2%}:"
                     " is a validation sample also in the training set, perhaps as a near copy?")  # fmt: skip
    worst = judgement.by_class()[judgement.worst_first()[0]]
    if wilson_interval(worst["hits"], worst["support"])[1] < judgement.accuracy - 0.05:
        found.append(f"Class {worst['name']} is far behind the others: {worst['recall']:.1%} of its "
                     f"{worst['support']:,} samples are right. Look at its mistakes; more of its samples would help."
                     )  # fmt: skip
    return found


def advice_on_curves(history: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return advice if the training overfits, underfits or should be longer. It needs at least three epochs."""
    training, validation = history.get("train_loss", ()), history.get("val_loss", ())
    last = len(validation) - 1
    if last < 2 or not all(map(is_finite, [*training, *validation])):
        return []
    low = min(validation)
    best = validation.index(low)
    if last - best >= 2 and validation[last] > 1.1 * low and training[last] < training[best]:
        return [f"The model overfits: since epoch {best + 1} validation loss rose from {low:.4g} to "
                f"{validation[last]:.4g} while training loss fell from {training[best]:.4g} to {training[last]:.4g}. "
                "More data, augmentation, dropout, weight decay or fewer epochs help."]  # fmt: skip
    train_acc, val_acc = history["train_acc"][last], history["val_acc"][last]
    if val_acc == 1:
        return []
    if validation[last] < 0.95 * min(validation[:last]):
        return ["Validation was still improving at the last epoch: more epochs would probably help."]
    if None not in (train_acc, val_acc) and train_acc < 0.9 and val_acc > train_acc - 0.02:
        return [f"The model underfits: its accuracy is only {train_acc:.1%} on the training data themselves. "
                "More epochs, a larger model, a higher rate, or less dropout and augmentation help."]  # fmt: skip
    return []


def is_finite(value: float | None) -> bool:
    """Return whether there is a value, and it is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


@dataclass
class Report:
    """The page of one run: `report.html` in `folder`, written atomically."""

    folder: Path  # the directory of the run
    info: Mapping[str, Any]  # facts about the run (see above); read anew at each write
    trainer: Any  # a Trainer; the report adds itself to its `on_epoch_end`
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the options to show; those that differ come first
    samples: tuple[Tensor, Tensor] | None = None  # a batch (images, labels) as the network sees it, to show a row of it
    launcher: str = "python"  # starts the script, such as "torchrun --nproc-per-node=2"
    judgement: Judgement | None = None
    state: str = "running"  # or finished, interrupted, failed
    reason: str = ""  # why the run ended early
    written: float = 0.0  # time.monotonic() of the last write

    def __post_init__(self) -> None:
        self.path = self.folder / "report.html"
        self.trainer.on_epoch_end.append(self.on_epoch_end)

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
        """Return advice for the next training, once this one is finished."""
        if self.state != "finished":
            return []
        val_count = int(self.trainer.validation_means.sums.get("acc", (0, 0))[1])  # 0 if this process validated nothing
        return advice(self.trainer.history, self.judgement, val_count)

    def write(self) -> None:
        """Write the page as things stand."""
        parts = [
            note(self.info.get("notice")),
            f"<p class=verdict>{text(self.verdict())}</p>",
            note(self.reason, f"{self.state.capitalize()}: "),
            *[note(line, "Advice: ") for line in self.advice()],
            curves(self.trainer.history, self.trainer.best_epoch),
            judgement_html(self.judgement, self.info) if self.judgement else "",
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
            seconds = self.info.get("result", {}).get("train_seconds")
            known = seconds is not None and not options.get("resume")  # else it counts only those since the resume
            after = f", after {seconds:.1f} s of training" if known else ""
            return f"{accuracy_of(self.judgement, self.info)}{after} (best epoch: {best + 1} of {epochs})."
        total = f" of {options['epochs']}" if "epochs" in options else ""
        line = f"{epochs}{total} epochs are done"
        if best is not None and history["val_acc"][best] is not None:
            line += f"; the best, epoch {best + 1}, has a validation accuracy of {history['val_acc'][best]:.2%}"
        elif best is not None and history["val_loss"][best] is not None:
            line += f"; the best, epoch {best + 1}, has a validation loss of {history['val_loss'][best]:.4g}"
        figures = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.info.get("result", {}).items()
                   if name.startswith("test_") and isinstance(value, float)]  # fmt: skip
        return "; ".join([line, *figures]) + "."

    def training_images(self) -> str:
        """Return a row of at most 12 training images, nothing if the samples are not images."""
        if self.samples is None or not isinstance(self.samples[0], Tensor) or self.samples[0].dim() != 4:
            return ""  # no images
        images, labels = self.samples
        classes = self.info.get("classes")
        captions = [bdi(classes[label]) if classes else "" for label in labels[:12].tolist()]
        return gallery("Training images", "As the network sees them.", zip(images, captions, strict=False), self.info)

    def settings(self) -> str:
        """Return how the run was made, and the commands that repeat and use it."""
        options = self.info.get("options", {})
        changed: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, default in self.defaults.items():
            value = options.get(name, default)
            (others if value == default else changed)[f"--{name.replace('_', '-')}"] = value
        facts = {name: self.info[name] for name in ("dataset", "model", "device", "precision") if name in self.info}
        facts |= {f"{name} version": number for name, number in self.info.get("versions", {}).items()}
        facts |= {"seed": options.get("seed", "none")}
        return (
            f"<h2>How it was made</h2>{settings_table(changed | facts)}"
            f"<details><summary>Options left at their defaults</summary>{settings_table(others)}</details>"
            f"<pre>{'<br>'.join(map(text, self.commands()))}</pre>"
        )

    def commands(self) -> list[str]:
        """Return the lines of a shell that repeat, resume and use this run."""
        words = shlex.split(self.info.get("command", ""))
        if not words:
            return []
        script, scripts, run = (shlex.quote(str(path)) for path in (words[0], Path(words[0]).parent, self.folder))
        model = self.info.get("model")
        own = f" --model {shlex.quote(model)}" if model is not None and ":" in model else ""
        if "--output" in words:  # a run never overwrites another
            at = words.index("--output")
            del words[at : at + 2]
        threads = self.info.get("options", {}).get("threads")
        if threads and not any(word.split("=")[0] == "--threads" for word in words):  # their number changes last digits
            words += ["--threads", str(threads)]
        return [
            "# repeat it: the same figures and weights come out, or diff shows from where on they differ",
            f"{self.launcher} {shlex.join(words)} --output {run}-again",
            f"diff {run}/metrics.jsonl {run}-again/metrics.jsonl",
            "# continue it, if it was interrupted",
            f"{self.launcher} {script} --resume {run}",
        ] + [
            f"python {scripts}/{use}{own} --checkpoint {run}/checkpoints/best.pt{image}"
            for use, image in (("predict.py", " IMAGE"), ("export.py", ""))
            if model is not None and "mean" in self.info  # else they could not build the model, or prepare an image
        ]


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write an HTML page, so that a reader finds either the old or the new one."""
    page = (
        f"{HEAD}<title>{text(title)}</title></head><body><h1>{text(title)}</h1>{''.join(parts)}"
        f"<p class=dim>Written on {time.strftime('%Y-%m-%d at %H:%M:%S')}.</p></body></html>\n"
    )
    write_durably(path, lambda file: file.write(page.encode()))


def text(value: object) -> str:
    """Return `value` as text of a page: markup and control characters escaped."""
    return html.escape(printable(value))


def note(value: str | None, kind: str = "") -> str:
    """Return a highlighted paragraph, nothing without a value."""
    return f"<p class=note><b>{kind}</b>{'<br>'.join(map(text, value.splitlines()))}</p>" if value else ""


def bdi(name: object) -> str:
    """Return a name of any length and script, which keeps its direction to itself."""
    return f'<bdi title="{text(name)}">{text(name)}</bdi>'


def accuracy_of(judgement: Judgement, info: Mapping[str, Any]) -> str:
    """Return the accuracy and its interval in words."""
    low, high = judgement.interval
    kind = "images" if "mean" in info else "samples"
    samples = f"{judgement.count:,} {info.get('dataset', '')} test {kind}"
    return f"{judgement.accuracy:.2%} (95% interval {low:.2%} to {high:.2%}) of {samples} are classified correctly"


def table(head: str, rows: Iterable[str], kind: str = "") -> str:
    """Return a table; `head` and the rows are the HTML of their cells."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class=scroll><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def settings_table(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    return table("", [f"<th>{text(name)}</th><td>{text(value)}</td>" for name, value in values.items()], "settings")


def curves(history: Mapping[str, Sequence[Any]], best_epoch: int | None) -> str:
    """Return a chart for each figure of the history, training and validation together, and a table of the numbers."""
    charts: dict[str, dict[str, Sequence[Any]]] = {}
    for name, values in history.items():
        if any(map(is_finite, values)):
            kind = "validation" if name.startswith("val_") else "training"
            charts.setdefault(name.removeprefix("train_").removeprefix("val_"), {})[kind] = values
    if not charts:
        return ""
    drawn = "".join(chart(name, lines, best_epoch) for name, lines in charts.items())
    history = {name: values for name, values in history.items() if any(value is not None for value in values)}
    head = "".join(f"<th>{text(name.replace('_', ' '))}</th>" for name in ("epoch", *history))
    rows = []
    for i, values in enumerate(zip(*history.values(), strict=True)):
        cells = "".join(f"<td>{'' if value is None else f'{value:.6g}'}</td>" for value in values)
        rows.append(f"<th>{i + 1}{' best' if i == best_epoch else ''}</th>{cells}")
    numbers = f"<details><summary>The numbers</summary>{table(head, rows)}</details>"
    return f"<h2>Curves</h2><div class=row>{drawn}</div>{numbers}"


def chart(name: str, lines: Mapping[str, Sequence[Any]], best_epoch: int | None) -> str:
    """Return an SVG of values per epoch; `lines` are named "training" and "validation". Missing values are left out."""
    title, factor = {"acc": ("accuracy, %", 100), "lr": ("learning rate", 1)}.get(name, (name.replace("_", " "), 1))
    points = {kind: [(i, v * factor) for i, v in enumerate(lines[kind]) if is_finite(v)] for kind in lines}
    values = [value for pairs in points.values() for _, value in pairs]
    marks = ticks(min(values), max(values))
    last = max(map(len, lines.values())) - 1

    def x(index: int) -> float:  # from 52 to 350
        return 52 + 298 * index / max(last, 1)

    def y(value: float) -> float:  # from 176, at the bottom, to 36
        return 176 - 140 * (value - marks[0]) / (marks[-1] - marks[0])

    svg = f'<svg viewBox="0 0 370 212"><text x="8" y="15" font-weight="600">{text(title)}</text>'
    for mark in marks:
        svg += f'<path d="M52 {y(mark):.1f}H350"/><text x="47" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>'
    for i in {0, last}:
        svg += f'<text x="{x(i):.1f}" y="191" text-anchor="middle">{i + 1}</text>'
    below = "epoch"
    if best_epoch is not None:
        below += f" (dashed line at the best: epoch {best_epoch + 1})"
        svg += f'<path stroke-dasharray="3" d="M{x(best_epoch):.1f} 36V176"/>'
    svg += f'<text x="201" y="204" text-anchor="middle">{below}</text>'
    for number, (kind, pairs) in enumerate(points.items()):
        line = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in pairs)
        svg += f'<g class="{kind}"><polyline points="{line}"/><text x="{200 + 80 * number}" y="15">{kind}</text>'
        for i, value in pairs[:: math.ceil(len(pairs) / 100)]:  # at most 100 dots
            said = f"epoch {i + 1}: {kind} {value:.6g}"
            svg += f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="2.5"><title>{said}</title></circle>'
        svg += "</g>"
    return svg + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, the first at most `low`, the last at least `high`."""
    span = high - low or abs(low) * 0.1 or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 4)
    first = math.floor(low / step + 1e-6)  # 0.3 / 0.1 is less than 3
    last = max(math.ceil(high / step - 1e-6), first + 1)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def judgement_html(judgement: Judgement, info: Mapping[str, Any]) -> str:
    """Return the confusion matrix, the figures by class and the worst mistakes."""
    pairs = [
        f"{bdi(true)} was taken for {bdi(taken)} ({times:,} times, {part:.1%} of its samples)"
        for true, taken, times, part in judgement.worst_pairs()
    ]
    images = [
        (image, f"{bdi(true)} <span class=to>→ {bdi(taken)}</span><br>{confidence:.1%}")
        for true, taken, confidence, image in judgement.mistakes
    ]
    number = f"{len(images)} of {judgement.count - judgement.correct:,}"
    about = f"{number}: true → predicted class, and the model's confidence in it."
    return f"""<div class=row><div><h2>What is confused</h2>
<p>{"<br>".join(pairs) or "No sample was taken for another class"}</p>{confusion_table(judgement)}
<p class=dim>Rows: true class, columns: predicted class. With more than 20 classes, only 20 are shown:
those named above, then those with the lowest recall. The shade grows with the share of the row.</p></div>
<div><h2>By class, the lowest recall first</h2>{class_table(judgement)}
<p class=dim>Precision: of the samples given to a class, the share that belongs to it.<br>
Recall: of its samples, the share that was given to it. F1: their harmonic mean.<br>Small print: 95% intervals.</p>
</div></div>{gallery("The worst mistakes", about, images, info)}"""


def confusion_table(judgement: Judgement) -> str:
    """Return the counts of true (rows) and predicted classes.

    With more than 20 classes it shows those of the worst pairs, then those with the lowest recall, 20 in all.
    """
    of_pairs = [judgement.classes.index(name) for pair in judgement.worst_pairs() for name in pair[:2]]
    shown = sorted(list(dict.fromkeys(of_pairs + judgement.worst_first()))[:20])
    names = [bdi(judgement.classes[i]) for i in shown]
    rows = []
    for i, name in zip(shown, names, strict=True):
        row, support = f"<th>{name}</th>", int(judgement.confusion[i].sum())
        for j in shown:
            times, color = int(judgement.confusion[i, j]), "46 160 67" if i == j else "229 64 58"  # green or red
            shade = 0.1 + 0.45 * math.sqrt(times / support) if times else 0.0  # a few mistakes can be seen too
            row += f'<td style="background:rgb({color}/{shade:.2f})">{times or "·"}</td>'
        rows.append(row)
    head = f"<td></td><th>{'</th><th>'.join(names)}</th>"
    return table(head, rows, "confusion upright" if max(map(len, judgement.classes)) > 3 else "confusion")


def class_table(judgement: Judgement) -> str:
    """Return the figures of all classes, with their 95% intervals."""

    def cell(part: int, whole: int, of_f1: bool = False) -> str:
        if not whole:
            return "<td>–</td>"
        # F1 is 2 J / (1 + J), where J = hits / (hits + misses + false alarms) is a share with an interval
        figures = [2 * x / (1 + x) if of_f1 else x for x in (part / whole, *wilson_interval(part, whole))]
        return f"<td>{figures[0]:.1%}<small>{100 * figures[1]:.1f}–{figures[2]:.1%}</small></td>"

    classes, rows = judgement.by_class(), []
    for i in judgement.worst_first():
        name, support, predictions, hits, _ = classes[i].values()
        cells = cell(hits, predictions) + cell(hits, support) + cell(hits, support + predictions - hits, of_f1=True)
        rows.append(f"<th>{bdi(name)}</th><td>{support:,}</td>{cells}")
    return table("<th>class</th><th>samples</th><th>precision</th><th>recall</th><th>F1</th>", rows)


def gallery(heading: str, about: str, images: Iterable[tuple[Any, str]], info: Mapping[str, Any]) -> str:
    """Return a row of images, each (C, H, W) or the first of a tuple, and captions; nothing if none is an image."""
    figures = ""
    for image, caption in images:
        image = image[0] if isinstance(image, (tuple, list)) else image
        if isinstance(image, Tensor) and image.dim() == 3:
            figures += f"<figure>{picture(image, info)}<figcaption>{caption}</figcaption></figure>"
    return f"<h2>{heading}</h2><p class=dim>{about}</p><div class=row>{figures}</div>" if figures else ""


def picture(image: Tensor, info: Mapping[str, Any]) -> str:
    """Return an image (C, H, W) for a page, at least 56 pixels wide and high and not much above 112.

    Show uint8 as it is. Undo the normalisation of floats by info["mean"] and info["std"].
    """
    from PIL import Image  # loading it takes longer than writing the page

    pixels = image.detach().cpu().float()
    if image.is_floating_point():
        mean, std = torch.tensor(info.get("mean", (0.0,))), torch.tensor(info.get("std", (1.0,)))
        pixels = (pixels * std.view(-1, 1, 1) + mean.view(-1, 1, 1)) * 255
    if len(pixels) != 3:
        pixels = pixels[:1].expand(3, -1, -1)  # grey
    shown = Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    shown.thumbnail((112, 112))
    zoom = math.ceil(56 / min(shown.size))
    content = io.BytesIO()
    shown.save(content, "png")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<img alt="" width={shown.width * zoom} height={shown.height * zoom} src="{source}">'

"""The three loaders of a training run, for training, validation and test, from a data set's name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchbasics.data import (
    NORMALISATION,
    Images,
    RandomAffine,
    SeededImageFolder,
    TensorLoader,
    channel_statistics,
    folder_loader,
    load_splits,
    split_dataset,
)
from torchbasics.mnist import FOLDERS, NotKept, import_torchvision, is_present

DATASETS = ("auto", *FOLDERS, "digits", "folder")


class Loaders(NamedTuple):
    """Loaders of the three parts, and what a model and a reader must know of them."""

    train: Any
    val: Any
    test: Any
    facts: dict[str, Any]  # dataset, classes, in_channels, image_size, mean, std, samples of each part
    notice: str  # what the reader must be told of the choice of data; may be empty


def make_loaders(
    dataset: str = "auto",
    data_dir: str | os.PathLike = "./data",
    batch_size: int = 128,
    *,
    val_size: int = 5000,
    augment: bool = True,
    rotation: float = 10.0,
    shift: float = 0.1,
    scaling: float = 0.1,
    image_size: int = 28,
    num_workers: int = 0,
    seed: int = 42,
    limit_batches: int | None = None,
    limit_evaluation: int | None = None,
    device: torch.device | str = "cpu",
) -> Loaders:
    """Loaders of `mnist`, `fashion-mnist`, `kmnist`, `digits`, of a `folder` of images, or `auto`.

    `auto` is MNIST, and drawn digits where there is neither file nor network; the notice then says so. `val_size`
    training images are held out for validation. With `augment` training images are rotated by up to ±`rotation`
    degrees, shifted by up to ±`shift` and resized by up to ±`scaling`, shares of their size. `image_size` (pixels) and
    `num_workers` are for `folder` only.
    `limit_batches` is that of a training epoch, `limit_evaluation` that of the other two, whose batches are of 250
    images on the CPU and of 1,000 elsewhere (in a folder, as in training). Raises ValueError for a batch
    larger than the data, and what `load_images` and `SeededImageFolder` raise.
    """
    if dataset == "folder":
        shake = (rotation, shift, scaling) if augment else None
        limits = limit_batches, limit_evaluation
        return _folder(Path(data_dir), batch_size, val_size, shake, image_size, num_workers, seed, limits, device)
    name, notice, (train, val, test) = _load_splits(dataset, data_dir, val_size, seed)
    _check_batch_size(batch_size, len(train))
    mean, std = NORMALISATION.get(name) or channel_statistics(train.inputs)
    common: dict[str, Any] = {"device": device, "mean": mean, "std": std}
    # on the CPU about the memory that training has taken already: the first touch of more takes longer than the work
    at_once = 250 if torch.device(device).type == "cpu" else 1000
    facts = {
        "dataset": name,
        "classes": train.classes,
        "in_channels": 1,
        "image_size": 28,
        "mean": mean,
        "std": std,
        "samples": (len(train), len(val), len(test)),
    }
    return Loaders(
        TensorLoader(
            train.inputs,
            train.targets,
            batch_size,
            shuffle=True,
            seed=seed,
            augment=RandomAffine(rotation, shift, scaling) if augment else None,
            limit_batches=limit_batches,
            **common,
        ),
        TensorLoader(val.inputs, val.targets, at_once, limit_batches=limit_evaluation, **common),
        TensorLoader(test.inputs, test.targets, at_once, limit_batches=limit_evaluation, **common),
        facts,
        notice,
    )


def _load_splits(
    dataset: str, data_dir: str | os.PathLike, val_size: int, seed: int
) -> tuple[str, str, tuple[Images, Images, Images]]:
    """The data set's name, what to say if it isn't the wanted one, and its parts. A damaged file is never passed by."""
    name = "mnist" if dataset == "auto" else dataset
    if name in FOLDERS and not is_present(name, data_dir) and sys.stderr is not None and sys.stderr.isatty():
        print(f"{name}: not in {data_dir}; downloading", file=sys.stderr)
    try:
        return name, "", load_splits(name, data_dir, val_size, seed)
    except (ConnectionError, NotKept) as error:
        if dataset != "auto" or is_present("mnist", data_dir):  # a part of it is there: say what is missing
            raise
        reason = "it cannot be written" if isinstance(error, NotKept) else "no network"
    notice = (
        f"NOTICE: no MNIST in {data_dir} and {reason}: training on digits drawn by this program instead. "
        "The accuracy below is on drawn digits, not on MNIST."
    )
    return "digits", notice, load_splits("digits", val_size=val_size, seed=seed)


def _folder(
    root: Path,
    batch_size: int,
    val_size: int,
    shake: tuple[float, float, float] | None,
    image_size: int,
    num_workers: int,
    seed: int,
    limits: tuple[int | None, int | None],
    device: torch.device | str,
) -> Loaders:
    """train/, val/ and test/ under `root` as far as they are there; one folder of classes is split."""
    import_torchvision()
    from torchvision.transforms import v2

    notice = ""
    first = SeededImageFolder(root / "train" if (root / "train").is_dir() else root)
    counts = torch.bincount(first.targets, minlength=len(first.classes)).tolist()
    empty = [name for name, count in zip(first.classes, counts, strict=True) if not count]
    if empty:
        raise ValueError(f"{first.root}: no images of {', '.join(empty)}; add some, or remove the folder")
    to_tensor = [
        v2.Resize((image_size, image_size)),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5], [0.5]),
    ]
    augment = []
    if shake is not None:
        degrees, shift, scaling = shake
        augment = [v2.RandomAffine(degrees, (shift, shift), (1 - scaling, 1 + scaling) if scaling else None)]
    folders = {
        part: SeededImageFolder(root / part, v2.Compose(to_tensor), mode=first.mode)
        for part in ("val", "test")
        if (root / part).is_dir()
    }
    if any(folder.classes != first.classes for folder in folders.values()):
        raise ValueError(f"{root}: train/, val/ and test/ have different classes; give each the same folders")
    train = SeededImageFolder(first.root, v2.Compose(augment + to_tensor), seed=seed, mode=first.mode)
    indices: dict[str, Any] = {"train": range(len(train))}
    if "val" not in folders:
        fits = val_size <= len(train) // 2
        share = val_size / len(train) if fits else 0.1
        if not fits:
            notice += f"NOTICE: --val-size {val_size} is too much of {len(train)} images: a tenth is held out. "
        indices["train"], indices["val"] = (
            subset.indices for subset in split_dataset(train, (1 - share, share), seed, train.targets)
        )
        folders["val"] = SeededImageFolder(first.root, v2.Compose(to_tensor), mode=first.mode)
    number = {"train": len(indices["train"]), "val": len(indices.get("val", folders["val"]))}
    if not all(number.values()):
        raise ValueError(f"{root}: {len(train)} images are too few to split into training and validation")
    if "test" not in folders:
        notice += "NOTICE: no test/ folder: the last figures are on the validation images."
    _check_batch_size(batch_size, number["train"])
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": torch.device(device).type == "cuda"}
    judging = options | {"limit_batches": limits[1]}
    val = folder_loader(folders["val"], batch_size, indices=indices.get("val"), **judging)
    test = folder_loader(folders["test"], batch_size, **judging) if "test" in folders else val
    loader = folder_loader(
        train,
        batch_size,
        indices=indices["train"],
        shuffle=True,
        seed=seed,
        limit_batches=limits[0],
        **options,
    )
    facts = {
        "dataset": "folder",
        "classes": train.classes,
        "in_channels": 1 if train.mode == "L" else 3,
        "image_size": image_size,
        "mean": (0.5,),
        "std": (0.5,),
        "samples": (number["train"], number["val"], len(folders.get("test", range(number["val"])))),  # type: ignore[arg-type]
    }
    return Loaders(loader, val, test, facts, notice.strip())


def _check_batch_size(batch_size: int, samples: int) -> None:
    if batch_size > samples:
        raise ValueError(
            f"--batch-size {batch_size} is larger than the {samples} training samples; choose a smaller one"
        )

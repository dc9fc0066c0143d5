"""Where a loader stands: to start any loader at (epoch, batch), also after a resume, with the same batches to come.

Three kinds of loaders: those that can be told (TensorLoader, `folder_loader`: `state_dict` is {"epoch", "batch"}),
those that know epochs only (`set_epoch`, DistributedSampler), and any others, whose order comes from random generators.
The last two are replayed: from the random state of the epoch's start, what was done is passed over. That is exact
where they draw from the global generators or torch generators of their own; not from a `random.Random` or NumPy
Generator of their own, nor in workers that outlive an epoch (`persistent_workers`): use `folder_loader` then.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchbasics.device import preserved_random_state, random_state, set_random_state

MANY = 100  # entries of a list that are not searched any more


class LoaderPosition:
    """Starts the training loader at a position, and keeps what a resume needs to do so again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generators: list[torch.Generator] = []  # the loader's own
        self._epoch_start: dict[str, Any] = {}  # random state when the epoch's iterator was made
        self._resumed_generators: list[Tensor] = []  # states for the loader's generators, until the loader is seen

    def batches(self, loader: Iterable, epoch: int, batch: int) -> Iterator:
        """An iterator of `loader` from `batch` of `epoch` on; ValueError if the loader cannot be the same as before."""
        if go_to(loader, epoch, batch):
            with preserved_random_state(self.device):  # a DataLoader draws a seed when it starts its workers
                return iter(loader)
        self._generators = own_generators(loader)
        return self._replay(loader, batch) if batch else self._start(loader)

    def _start(self, loader: Iterable) -> Iterator:
        if self._resumed_generators:
            self._set_generators(self._resumed_generators)
        self._epoch_start = {**random_state(self.device), "loader": [g.get_state() for g in self._generators]}
        return self._iterator(loader)

    def _iterator(self, loader: Any) -> Iterator:
        """iter(loader), which has drawn as much where its workers are new as where they live since another epoch."""
        if getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is None:
            with preserved_random_state(self.device), preserved_generators(loader):
                iter(loader)
        return iter(loader)

    def rewind(self) -> None:
        """Back to before the epoch's iterator was made, for a save before its first batch was used."""
        if self._epoch_start:
            set_random_state(self._epoch_start, self.device)
            self._set_generators(self._epoch_start["loader"])

    def _set_generators(self, states: list[Tensor]) -> None:
        if len(states) != len(self._generators):
            raise ValueError("the checkpoint was made with another kind of loader; use the same one")
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state.cpu())
        self._resumed_generators = []

    def _replay(self, loader: Iterable, batch: int) -> Iterator:
        if not self._epoch_start:
            raise ValueError("the checkpoint was made in mid-epoch with another kind of loader; use the same one")
        with preserved_random_state(self.device):
            self.rewind()
            batches = self._iterator(loader)
            found = sum(1 for _ in itertools.islice(batches, batch))
        if found < batch:
            raise ValueError(
                f"the checkpoint was made after batch {batch}, the loader has {found}; is it another data set?"
            )
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The random state of the epoch's start, and the states of the loader's own generators."""
        now = self._resumed_generators or [generator.get_state() for generator in self._generators]
        return {"epoch_start": self._epoch_start, "generators": now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, when the loader is next seen."""
        self._epoch_start, self._resumed_generators = state["epoch_start"], list(state["generators"])


def own_generators(loader: Any) -> list[torch.Generator]:
    """The torch generators that `loader` holds, or its samplers, its data set, and their parts; each once.

    Under any name, at any depth, but not among the many entries of a long list: those are samples.
    """
    found: list[torch.Generator] = []
    seen: dict[int, Any] = {}
    left = [loader]
    while left:
        part = left.pop()
        if id(part) in seen or isinstance(part, (type, ModuleType, Tensor)):
            continue
        seen[id(part)] = part
        if isinstance(part, torch.Generator):
            found.append(part)
            continue
        if type(part) in (list, tuple, dict):  # to iterate a class of somebody's own may do anything
            within = list(part.values() if type(part) is dict else part) if len(part) <= MANY else []
        else:  # of a DataLoader not what it iterates by, its workers' queues among it
            within = [value for name, value in getattr(part, "__dict__", {}).items() if name != "_iterator"]
        left += reversed(within)
    return found


@contextlib.contextmanager
def preserved_generators(loader: Any) -> Iterator[None]:
    """What is drawn inside from the loader's own generators, which another loader may share, is drawn again after."""
    states = [(generator, generator.get_state()) for generator in own_generators(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _parts(loader: Any) -> tuple[Any, ...]:
    """`loader` and what decides its order."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return loader, batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)


def go_to(loader: Any, epoch: int, batch: int) -> bool:
    """Puts `loader` at (epoch, batch) if it can be told that; one that knows epochs only is told the epoch."""
    for part in _parts(loader):
        if hasattr(part, "load_state_dict") and part.state_dict().keys() == {"epoch", "batch"}:
            part.load_state_dict({"epoch": epoch, "batch": batch})
            return True
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    return False

"""Train on several processes. In one process every function here does nothing, so callers need no `if`.

    with distributed.process_group(device):   # torchrun has set RANK, WORLD_SIZE, …
        model = distributed.replicate(model, device)

Counts, flags and other small values travel on the CPU, over gloo, whatever the device.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import inspect
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

T = TypeVar("T")
NORM_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_groups = itertools.count()  # numbers the process groups that this process joins
_job_store: dist.Store | None = None  # inside `process_group`: what `set_job_note` writes to


def rank() -> int:
    """Return this process's number among all processes of the job, from 0."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """Return the number of processes of the job."""
    return dist.get_world_size() if _has_group() else 1


def is_main() -> bool:
    """Return whether this process has global rank 0, which writes and prints; also before there is a process group."""
    return rank() == 0 if _has_group() else os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Return whether torchrun, or another launcher that sets RANK, started this process."""
    return "RANK" in os.environ


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(device: torch.device, timeout: float = 60.0) -> Iterator[None]:
    """Join the job's process group for the duration of a `with` block: gloo for the CPU, and nccl on CUDA.

    A process that waits longer than `timeout` seconds for another one fails. All processes leave together when they
    are done, and after an exception with a `signum` (`Interrupted`, which all processes raise at the same step). After
    any other error this process leaves alone, which lets the others fail soon instead of waiting.

    Make the model in a function that returns within the block: one that outlives the group keeps the group's threads
    alive, and these may abort the process while Python exits (pytorch#190489).

    Raises ValueError if torchrun's variables are incomplete, ConnectionError if the processes cannot find each other.
    If nothing answers within `timeout`, the process ends with one line and exit code 1.
    """
    global _job_store
    if not is_launched():
        yield
        return
    with _ending_with_torchrun():
        _job_store = dist.PrefixStore("job", _join_group(device, timeout))
        together = False
        try:
            yield
            barrier()  # a process that leaves early breaks the connections that others still use
            together = True
        except BaseException as error:
            if hasattr(error, "signum"):
                barrier()
                together = True
            raise
        finally:
            _job_store = None
            if together or device.type == "cpu":  # after an error nccl would wait for processes that no longer answer
                gc.collect()  # a model that is in a cycle still holds the group
                dist.destroy_process_group()  # with its threads: one that drops a tensor while Python exits aborts it
                time.sleep(0.1)  # if something still holds the group, its threads drop their last tensors now


def _join_group(device: torch.device, timeout: float) -> dist.Store:
    """Find the other processes, make the process group, and return the job's store."""
    importlib.import_module("torch.distributed.nn")  # DDP needs it; imported later, its defaults hold the group forever
    backend, own = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    limit = datetime.timedelta(seconds=timeout)
    failure = f"the processes did not find each other within {timeout:g} s"
    advice = "give all of them the same MASTER_ADDR and a free MASTER_PORT, or use torchrun --standalone"
    # torch's own limit comes up to 5 s late, and never if another program holds the port and does not answer
    alarm = threading.Timer(timeout, _end, [f"error: {failure}; {advice}"])
    alarm.daemon = True
    alarm.start()
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
        alarm.cancel()
        # torchrun's store outlives the group and a restart, and still holds the addresses of processes that are gone
        name = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}, group {next(_groups)}"
        fresh = dist.PrefixStore(name, store)
        dist.init_process_group(backend, store=fresh, rank=number, world_size=count, timeout=limit, device_id=own)
    except RuntimeError as error:
        raise ConnectionError(f"{failure} ({str(error).splitlines()[0]}); {advice}") from error
    finally:
        alarm.cancel()
    return store


@contextlib.contextmanager
def _ending_with_torchrun() -> Iterator[None]:
    """End this process within a second if torchrun, its parent, is killed in this `with` block."""
    parent, done = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            if done.wait(0.5):
                return
        _end("torchrun is gone, so this process ends too")

    watcher = threading.Thread(target=watch, daemon=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join()  # a thread that is left when Python exits may abort the process


def _end(reason: str) -> None:
    """End this process, whatever its main thread waits for, and its loaders' workers."""
    print(reason, file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: for CUDA without an index, the one numbered by the local rank.

    Makes it the current device. Raises ValueError if the machine has fewer devices than processes.
    """
    if device.type != "cuda" or not is_launched():
        return device
    if device.index is None:
        count = torch.cuda.device_count()
        if local_rank() >= count:
            raise ValueError(
                f"process {local_rank()} of this machine has no CUDA device, there are {count}; "
                f"start with --nproc-per-node={count}, or use the CPU"
            )
        device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def set_threads() -> int:
    """Give each process of this machine its share of the cores, unless OMP_NUM_THREADS is set; return the number.

    OMP_NUM_THREADS=1 does not count: torchrun sets it by itself, which leaves most cores idle.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
    return torch.get_num_threads()


def barrier() -> None:
    """Wait until all processes are here."""
    all_gather([0])


def all_gather(values: Sequence[float]) -> list[list[float]]:
    """Return the `values` of all processes, by rank, as float64. Every process gives the same number of values."""
    own = torch.tensor(values, dtype=torch.float64)
    if world_size() == 1:
        return [own.tolist()]
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    return [part.tolist() for part in gathered]


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes, by rank: anything that can be pickled, tensors on the CPU."""
    gathered: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Return rank 0's `value` on all processes."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on all processes. If it raises an exception, all raise it.

    The others wait no longer than the process group's timeout.
    """
    outcome: Any = None
    failed = False
    if rank() == 0:
        try:
            outcome = function()
        except Exception as error:
            outcome, failed = error, True
    outcome, failed = broadcast_object((outcome, failed))
    if failed:
        raise outcome
    return outcome


def set_job_note(key: str, value: str) -> None:
    """Leave a note for the processes that torchrun starts in place of these, should they fail."""
    if _job_store is not None:
        _job_store.set(key, value)


def job_note(key: str) -> str | None:
    """Return the note that this job left, before a restart or after it; None if there is none."""
    return _job_store.get(key).decode() if _job_store is not None and _job_store.check([key]) else None


def replicate(model: nn.Module, device: torch.device, *, sync_bn: bool = False, static: bool = False) -> nn.Module:
    """Move `model` to `device` and wrap it in DistributedDataParallel; in one process return the model itself.

    All processes start with rank 0's weights and buffers. BatchNorm's running statistics then differ from process to
    process (see `shared_buffers`); `sync_bn` computes them over all processes instead (CUDA only). `static` saves some
    time if every step runs forward and backward once and uses the same parameters.
    """
    model = model.to(device)
    if world_size() == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    _start_as_main(model)
    arguments = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"  # until torch 2.14
    options: dict[str, Any] = {name: False, "device_ids": None if device.type == "cpu" else [device]}
    return DistributedDataParallel(
        model, init_sync=False, gradient_as_bucket_view=True, static_graph=static, **options
    )


def shard(model: nn.Module, device: torch.device, precision: str = "fp32") -> nn.Module:
    """Move `model` to `device` and split its parameters among all processes with torch's FSDP2 (`fully_shard`).

    The unit is a child of the model, or a member of a list of modules in it. With `precision="bf16"` units compute in
    bfloat16 and gradients are summed in float32; normalization layers stay in float32. Make the optimizer afterwards:
    the parameters are new objects. In one process the model itself is returned.
    """
    model = model.to(device)
    if world_size() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _start_as_main(model)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, NORM_LAYERS) and any(True for _ in module.parameters()):
                norm_policy = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
                fully_shard(module, mesh=mesh, mp_policy=norm_policy)
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    for unit in _units(model):
        own = list(unit.parameters())
        # tied weights are left to the whole model: two units would untie them
        if own and all(uses[parameter] == 1 for parameter in own) and not is_sharded(unit):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of `model`; for a list of modules, which is never called itself, its members."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _units(child)
        else:
            yield child


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile's wrapper, at any nesting."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_wrapped(model: nn.Module) -> bool:
    """Return whether `model` exchanges its gradients with other processes: it came from `replicate` or `shard`."""
    return hasattr(model, "no_sync") or is_sharded(model)  # of DistributedDataParallel, also if that is compiled


def is_sharded(model: nn.Module) -> bool:
    """Return whether `model` came from `shard`."""
    return hasattr(model, "set_requires_gradient_sync")  # of FSDPModule, a class that takes a second to import


@contextlib.contextmanager
def gradient_sync(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Exchange gradients with the other processes in this `with` block only if `wanted`; forward belongs inside too."""
    if wanted or not is_wrapped(model):
        yield
    elif is_sharded(model):
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        with model.no_sync():  # type: ignore[operator]
            yield


@contextlib.contextmanager
def shared_buffers(model: nn.Module) -> Iterator[None]:
    """Use rank 0's buffers (BatchNorm's running statistics), which are those that are saved, in this `with` block.

    Afterwards each process has its own again, so that how often one validates changes nothing.
    """
    replaced = _copy_buffers_of_main(unwrap(model))
    try:
        yield
    finally:
        for buffer, own in replaced:
            buffer.copy_(own)


def _start_as_main(model: nn.Module) -> None:
    """Give all processes rank 0's parameters and buffers."""
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)
    _copy_buffers_of_main(model)


def _copy_buffers_of_main(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy rank 0's buffers to all processes, by name and shape; return each changed buffer with its value before."""
    if world_size() == 1:
        return []
    values = broadcast_object({name: buffer.cpu() for name, buffer in model.named_buffers()} if is_main() else {})
    replaced = []
    for name, buffer in model.named_buffers():
        value = values.get(name)
        if value is not None and value.shape == buffer.shape and not torch.equal(value, buffer.cpu()):
            replaced.append((buffer, buffer.clone()))
            buffer.copy_(value)
    return replaced


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dicts of model and optimizer as one process without wrappers has them.

    All processes call this together. The state of a sharded model is gathered, on the CPU, to rank 0; the others get
    empty dictionaries.
    """
    weights, state = full_weights(model), optimizer.state_dict()
    if is_sharded(model):
        entries = {index: {key: _whole(value) for key, value in e.items()} for index, e in state["state"].items()}
        state = {**state, "state": entries} if is_main() else {}
    return weights, state


def full_weights(model: nn.Module) -> dict[str, Any]:
    """Return the first part of `full_state`; its `_metadata` is kept."""
    state = _rename(unwrap(model).state_dict(), _plain_name)
    for name, value in state.items():
        state[name] = _whole(value)
    return state if is_main() or not is_sharded(model) else {}


def load_full_state(
    model: nn.Module, optimizer: Optimizer, weights: Mapping[str, Any], optimizer_state: Mapping[str, Any]
) -> None:
    """Load what `full_state` returned, with any strategy and any number of processes, into a model of any strategy.

    Every process gives the same state. What does not fit is torch's own RuntimeError or ValueError.
    """
    load_weights(model, weights)
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    entries = {
        index: {key: _shard_like(value, parameters.get(index)) for key, value in entry.items()}
        for index, entry in optimizer_state["state"].items()
    }
    optimizer.load_state_dict({**optimizer_state, "state": entries})


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load the weights of one process into a model of any strategy. What does not fit is torch's RuntimeError."""
    model = unwrap(model)
    own = model.state_dict()
    names = {_plain_name(name): name for name in [*(name for name, _ in model.named_modules()), *own]}
    state = _rename(weights, lambda name: names.get(_plain_name(name), name))
    for name, value in state.items():
        state[name] = _shard_like(value, own.get(name))
    model.load_state_dict(state)


def _plain_name(name: str) -> str:
    """Return the name that a parameter, buffer or module has if nothing is compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _rename(state: Mapping[str, Any], rename: Callable[[str], str]) -> OrderedDict[str, Any]:
    """Return a state dict under other names, with its `_metadata`: the versions of its modules, by their names."""
    renamed = OrderedDict((rename(name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):
        renamed._metadata = {rename(name): facts for name, facts in state._metadata.items()}  # type: ignore[attr-defined]
    return renamed


def _whole(value: Any) -> Any:
    """Return a tensor that is split among processes as one tensor on the CPU, anything else as it is."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _shard_like(value: Any, own: Any) -> Any:
    """Return this process's part of `value` if `own`, a tensor of its shape, is split among processes."""
    if not (isinstance(value, Tensor) and hasattr(own, "full_tensor") and value.shape == own.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # every process has it all

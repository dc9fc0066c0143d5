"""One model on many processes: DDP, FSDP, and the whole state of either in the form of a single process."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchbasics import distributed
from torchbasics.checkpoint import bare_model, bare_state_dict, fitting_weights, load_weights
from torchbasics.shared_memory import LINE, SharedRows, whole_lines

STRATEGIES = ("ddp", "fsdp")
BatchNorm = nn.modules.batchnorm._BatchNorm
NORMALISATIONS = (BatchNorm, nn.LayerNorm, nn.GroupNorm)


# ---------------------------------------------------------------------------------------------------------- strategies


def replicate(
    model: nn.Module, device: torch.device, *, sync_bn: bool = False, static: bool = False
) -> DistributedDataParallel:
    """`model`, which lies on `device`, as DistributedDataParallel: a copy a process, gradients averaged.

    `sync_bn` takes BatchNorm's statistics over all processes (torch's SyncBatchNorm, on accelerators only; ValueError
    elsewhere). `static`, a little faster, is for steps of one batch each that use the same parameters once. BatchNorm's
    running statistics stay each process's own; rank 0's are those that count (`shared_buffers`).
    """
    if sync_bn:
        if device.type == "cpu":
            raise ValueError("--sync-bn: torch's SyncBatchNorm needs an accelerator; leave it out on the CPU")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # torch 2.15 has renamed the option: before each forward nothing is sent; at the start all get rank 0's
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    if device.type != "cpu":
        options["device_ids"] = [device]
    for buffer in () if renamed else model.buffers():  # before 2.15 the old option also left out the first exchange
        dist.broadcast(buffer, src=0)
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static, **options)


def shard(model: nn.Module, device: torch.device, precision: str = "fp32") -> nn.Module:
    """`model` with its parameters, gradients and optimizer state split among all processes (torch's FSDP2), by block.

    A block is a child of the model, or a member of a list of modules in it. With `bf16` blocks compute and communicate
    in bfloat16, gradients add up in float32; normalisation layers stay in float32, as their running statistics do.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for tensor in model.state_dict().values():  # the parts are to be those of one model
        dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    if precision == "bf16":
        for module in model.modules():
            if isinstance(module, NORMALISATIONS):
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    for block in _blocks(model):
        if any(True for _ in block.parameters()) and not isinstance(block, NORMALISATIONS):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The children of `model`; of a list of modules, which is never called itself, its members."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _blocks(child)
        else:
            yield child


def is_wrapped(model: nn.Module) -> bool:
    """Whether `model` exchanges its gradients with other processes."""
    model = getattr(model, "_orig_mod", model)
    return is_sharded(model) or isinstance(model, DistributedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` came from `shard`."""
    return hasattr(type(model), "set_requires_gradient_sync")


def part_of_step(model: nn.Module, samples: int, first: bool, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of a part of a step: gradients are exchanged after the `last` part only.

    `samples` are those of this process. Without others there is one thing to do: a single sample that is left over is
    trained on with kept statistics; as the epoch's `first` it stays torch's error, for then all batches are like it.
    """
    if distributed.world_size() > 1:
        return _part_of_step(model, samples, last)
    return kept_statistics(model, samples) if samples == 1 and not first else _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _part_of_step(model: nn.Module, samples: int, last: bool) -> Iterator[None]:
    with kept_statistics(model, samples), gradient_sync(model, wanted=last):
        yield


def gradient_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Inside, backward exchanges gradients with the other processes only if `wanted`; without others: nothing."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    if is_sharded(model):
        model.set_requires_gradient_sync(wanted)  # type: ignore[operator]
    return _NOTHING


@contextlib.contextmanager
def kept_statistics(model: nn.Module, samples: int) -> Iterator[None]:
    """Inside, BatchNorm uses its running statistics where a part of a batch is too small to have its own.

    Of no value a channel it would learn NaN, and of one it refuses to. SyncBatchNorm knows better.
    """
    if samples > 1:
        yield
        return

    def keep_if_small(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        layer.training = inputs[0].numel() > inputs[0].shape[1]

    learning = [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and module.training
    ]
    hooks = [layer.register_forward_pre_hook(keep_if_small) for layer in learning]
    try:
        with torch.compiler.set_stance("force_eager") if _is_compiled(model) else _NOTHING:  # compiled, hooks may rest
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in learning:
            layer.training = True


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


@contextlib.contextmanager
def shared_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, rank 0's buffers (BatchNorm's running statistics) on all processes: what is judged is what is saved.

    Afterwards each process has its own again: how often one judges changes nothing.
    """
    buffers = list(bare_model(model).buffers()) if distributed.world_size() > 1 else []
    buffers = [buffer for buffer in buffers if buffer.numel()]
    own = [buffer.clone() for buffer in buffers]
    try:
        for buffer in buffers:
            dist.broadcast(buffer, src=0)
        yield
    finally:
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)


class GradientExchange:
    """The mean of DDP's gradients over all processes: through shared memory where they have some, else by all-reduce.

    With `bf16` they are sent in bfloat16, by all-reduce. `seconds` adds up what this took, waiting for slower processes
    included; on the CPU only, an accelerator's clock is not read. All processes make one together.
    """

    def __init__(self, model: DistributedDataParallel, device: torch.device, bf16: bool = False) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        self.seconds, self._until, self._timed = 0.0, 0.0, device.type == "cpu"
        self._all_reduce = default_hooks.bf16_compress_hook if bf16 else default_hooks.allreduce_hook
        facts = model._get_ddp_logging_data()  # of what DDP will hand over, whatever is frozen meanwhile
        self._size, tensors = facts["total_parameter_size_bytes"], facts["num_parameter_tensors"]
        in_rows = self._timed and not bf16 and _always_whole(model)
        rows = distributed.shared_rows(self._size + LINE * tensors) if in_rows else None
        self.through_memory = rows is not None
        self._written: list[tuple[torch.futures.Future[Tensor], Tensor, Tensor]] = []  # this step's gradients, so far
        hook = self._by_all_reduce if rows is None else functools.partial(self._through_memory, rows)
        model.register_comm_hook(None, lambda state, bucket: hook(bucket))  # a function: DDP copies what it is given

    def _by_all_reduce(self, bucket: dist.GradBucket) -> torch.futures.Future:
        began = time.perf_counter()
        future = self._all_reduce(dist.group.WORLD, bucket)  # type: ignore[arg-type]
        return future.then(lambda done: self._stop(began, done.value())) if self._timed else future

    def _stop(self, began: float, value: Any) -> Tensor:
        now = time.perf_counter()
        self.seconds += now - max(began, self._until)  # buckets overlap
        self._until = now
        return value[0] if isinstance(value, (list, tuple)) else value

    def _through_memory(self, rows: SharedRows, bucket: dist.GradBucket) -> torch.futures.Future:
        """Each bucket is written as it becomes ready; after the last all add up all, in the order of ranks."""
        began = time.perf_counter()
        if not self._written:
            rows.begin()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        gradient, offset = bucket.buffer(), sum(whole_lines(before.nbytes) for _, before, _ in self._written)
        parts = rows.of(gradient.dtype, gradient.numel(), offset)
        torch.div(gradient, len(parts), out=parts[rows.rank])
        self._written.append((future, gradient, parts))
        # not bucket.is_last(): in the first step of a static graph all are the first
        if sum(written.nbytes for _, written, _ in self._written) == self._size:
            rows.publish()
            for _, mean, (first, second, *others) in self._written:
                torch.add(first, second, out=mean)
                for part in others:
                    mean += part
            rows.end()
            for done, mean, _ in self._written:
                done.set_result(mean)
            self._written = []
        self.seconds += time.perf_counter() - began
        return future


def _always_whole(model: DistributedDataParallel) -> bool:
    """Whether DDP hands over all gradients at each step, each as large as its parameter."""
    sparse = any(getattr(module, "sparse", False) for module in model.modules())  # Embedding, EmbeddingBag
    return not (sparse or model.skip_all_reduce_unused_params or model.mixed_precision)


# ------------------------------------------------------------------------------------ the state, as of a single process


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dicts of model and optimizer as one process without wrappers has them.

    Of a sharded model it is gathered, on the CPU, by all processes together, and only rank 0 gets it.
    """
    if not is_sharded(model):
        return bare_state_dict(model), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_state_dict(model, optimizer, options=whole)
    weights: dict[str, Any] = found[0]
    return (weights, _by_index(found[1])) if dist.get_rank() == 0 else ({}, {})


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The first part of `full_state`."""
    if not is_sharded(model):
        return bare_state_dict(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return weights


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads the optimizer's part of `full_state`, which every process has, for a model of any strategy."""
    if not is_sharded(model):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = _by_name(state, [names[id(p)] for group in optimizer.param_groups for p in group["params"]])
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))


def own_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters as far as they lie on this process."""
    return [p.to_local() if is_sharded(model) else p for p in model.parameters()]  # type: ignore[attr-defined]


def load_full_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """`load_weights` for a model of any strategy. Raises CheckpointError for weights of another model."""
    if not is_sharded(model):
        load_weights(model, weights, where)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = dict(fitting_weights(model, weights, where))
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))


def _by_index(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by parameter names → by their numbers, as a plain optimizer has it."""
    numbers = {name: i for i, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return {
        "state": {numbers[name]: entry for name, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def _by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The reverse of `_by_index`; `names` in the order in which the optimizer was given the parameters."""
    return {
        "state": {names[number]: entry for number, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }

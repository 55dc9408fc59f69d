"""One rank of several, simulated in one process: the real engine (DDP, ZeRO, FSDP2) on fake tensors, without communication.

    with world(read_launch_file("zero3", 4).of_rank(0)):
        ledger = predict(build, trainer, arguments, device)

While the world is open, accelerate finds the environment that `accelerate launch` sets for that rank, and `torch.distributed`
has its fake process group of that many ranks. The shadow step runs the same code as a real rank: DeepSpeed or PyTorch itself
flattens, partitions, pads, gathers, prefetches, buckets and reduces. So this module has no formula for their buffers.
Tensors that an engine makes are fake like the parameters (`Fakes`), and reading a value from one gives 0.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.memory import meta_ops
from toolkit.memory.shadow.isolation import isolated
from toolkit.memory.trace import Trace
from toolkit.seams import patched

_CPU, _META = torch.device("cpu"), torch.device("meta")
_FACTORIES = {
    f"aten::{name}"
    for name in (
        "empty.memory_format",
        "empty_strided",
        "zeros",
        "ones",
        "full",
        "zeros_like",
        "ones_like",
        "empty_like",
    )
}
_files: dict[str, int] = {}  # files that this rank has written: path -> bytes
# StorageImpl addresses of the buffers between memory and disk, which live as long as the engine
_pinned: set[int] = set()
_open: list[Mapping[str, str]] = []  # the environment of the open world


def in_world() -> bool:
    """Whether the shadow step simulates one rank of several."""
    return bool(_open)


def in_deepspeed() -> bool:
    """Whether the simulated rank runs under DeepSpeed."""
    return in_world() and _open[-1].get("ACCELERATE_USE_DEEPSPEED") == "true"


def processes() -> int:
    """The number of ranks; 1 outside a world."""
    return int(_open[-1]["WORLD_SIZE"]) if _open else 1


@contextmanager
def world(launch: Mapping[str, str]) -> Iterator[None]:
    """While open, this process is the rank that the environment variables in `launch` describe."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with ExitStack() as stack:
        stack.enter_context(isolated())
        PartialState._shared_state.clear()
        os.environ.update(launch)
        _swap_elsewhere(stack)
        rank, size = int(launch["RANK"]), int(launch["WORLD_SIZE"])
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        stack.callback(distributed.destroy_process_group)
        stack.enter_context(patched("AcceleratorState.__init__", begin_as_on_gpus(AcceleratorState.__init__)))
        _open.append(launch)
        stack.callback(_open.pop)
        if in_deepspeed():
            stack.enter_context(_deepspeed())
        PartialState(cpu=True)
        yield


def swapped_bytes() -> int:
    """Bytes of all files that the ranks of one machine have written since the world was opened (ZeRO-Infinity)."""
    return sum(_files.values()) * int(_open[-1]["LOCAL_WORLD_SIZE"]) if _open else 0


def _swap_elsewhere(stack: ExitStack) -> None:
    """Redirects DeepSpeed's swapping to a temporary folder, because DeepSpeed empties the folder that it swaps to."""
    from toolkit.distributed.deepspeed import read_deepspeed

    _files.clear()
    _pinned.clear()
    source = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    settings = copy.deepcopy(read_deepspeed(source)) if source else {}
    zero = settings.get("zero_optimization", {})
    swapping = [
        zero[name] for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("nvme_path")
    ]
    if swapping:
        folder = stack.enter_context(TemporaryDirectory())
        for part in swapping:
            part["nvme_path"] = folder
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


@contextmanager
def engine_on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """While open, tensors that the rank's engine makes are fake too."""
    with (
        patched("fix_4bit_weight_quant_state_from_module", _keep_quant_state),
        patched("DistributedDataParallel.__init__", _with_hook(nn.parallel.DistributedDataParallel.__init__)),
        patched("FakeTensor.data_ptr", _address),
        Fakes(mode),
    ):
        yield


def applied(model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` on fake tensors. The original swaps whole tensors, which fails for tensors with weak references."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = fn(parameter.data)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return model


class Fakes(TorchDispatchMode):
    """Makes every new floating-point tensor fake; the value of a fake tensor reads as 0."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # DTensor then runs the operator on its shard
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return op(*args, **kwargs)
        name = op.name()
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        if name in _FACTORIES and not any(isinstance(arg, FakeTensor) for arg in args):
            dtype = kwargs.get("dtype") or (args[0].dtype if isinstance(args[0], torch.Tensor) else None)
            device = kwargs.get("device")
            if (dtype or torch.get_default_dtype()).is_floating_point and (device is None or device.type == "cpu"):
                if isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu":
                    return op(*args, **kwargs)
                meta_args = [arg.to(_META) if isinstance(arg, torch.Tensor) else arg for arg in args]
                return meta_ops.fake(self.mode, op(*meta_args, **(kwargs | {"device": _META, "pin_memory": False})))
        return meta_ops.run(op, args, kwargs)


def _keep_quant_state(module: Any) -> None:
    """Restores the scales of a weight that FSDP gathered. bitsandbytes restores its class too, but a fake tensor has its own."""
    module.weight.quant_state = module.quant_state


def _address(tensor: torch.Tensor) -> int:
    """A stand-in for the address of a fake tensor's data, by which engines distinguish tensors."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def gloo_buffers(trace: Trace, op: Any, args: tuple) -> None:
    """Reports the copy of its input that gloo makes for a reduce-scatter (ProcessGroupGloo.cpp,
    `reduce_scatter_tensor_coalesced`); NCCL makes none."""
    if op.name() == "c10d::_reduce_scatter_base_":
        trace.passing(args[1].numel() * args[1].element_size(), "gloo")


def _with_hook(begin: Any) -> Any:
    """DDP's own all-reduce waits for a result of the process group, which the fake group does not give: a hook returns the bucket."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.register_comm_hook(None, lambda state, bucket: _reduced(bucket.buffer()))

    return __init__


def _reduced(bucket: torch.Tensor) -> torch.futures.Future:
    distributed.all_reduce(bucket)
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket)
    return future


def begin_as_on_gpus(begin: Any) -> Any:
    """`AcceleratorState.__init__` (`begin`) that sets up FSDP on CPUs as well; accelerate 1.15 does so only on GPUs."""

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    return __init__


@contextmanager
def _deepspeed() -> Iterator[None]:
    """While open, DeepSpeed uses the fake process group."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import numa

    from toolkit.distributed.deepspeed import join_deepspeed

    groups = vars(deepspeed.utils.groups)  # DeepSpeed stores process groups here
    kept = {name: copy.copy(value) for name, value in groups.items() if name.isupper() or name == "mpu"}
    join_deepspeed()
    try:
        # DeepSpeed starts a process that counts CPU sockets each time that it reduces a gradient: the count is cached.
        with ExitStack() as stack:
            stack.enter_context(patched("is_fp16_supported", lambda: True, owner=get_accelerator()))  # as on every GPU
            stack.enter_context(patched("F.linear", nn.functional.linear))  # ZeRO-3 replaces it, and never restores it
            stack.enter_context(uncompiled_adam())
            stack.enter_context(patched("get_numa_cores", cache(numa.get_numa_cores)))
            stack.enter_context(uncompiled_disk(Disk))
            if os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1") != "1":
                _shared_rows(stack)
            yield
    finally:
        deepspeed.comm.comm.cdb = None
        groups.update(kept)


def _shared_rows(stack: ExitStack) -> None:
    """For sequence parallelism DeepSpeed replaces transformers' attention and stores groups: restored when the world ends."""
    from deepspeed.sequence import layer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mapping = ALL_ATTENTION_FUNCTIONS._local_mapping
    stack.enter_context(patched("ALL_ATTENTION_FUNCTIONS._local_mapping", dict(mapping)))
    stack.enter_context(patched("_all_to_all_groups", dict(layer._all_to_all_groups)))
    for name in ("_SEQUENCE_PARALLEL_GROUP", "_SEQUENCE_DATA_PARALLEL_GROUP"):
        stack.enter_context(patched(name, None))


class Disk:
    """Replaces DeepSpeed's compiled disk handle (csrc/aio): it writes nothing, pins buffers, and records the size of each file."""

    def __init__(self, **options: Any) -> None:
        self._pending = 0

    def new_cpu_locked_tensor(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        tensor = torch.empty(numel, dtype=like.dtype)
        _pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in _pinned

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        _files[path] = max(_files.get(path, 0), offset + tensor.numel() * tensor.element_size())
        self._pending += 1
        return 0

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        self._pending += 1
        return 0

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done


@contextmanager
def uncompiled_disk(handle: type[Disk]) -> Iterator[None]:
    """While open, DeepSpeed swaps through `handle`."""
    builder = SimpleNamespace(load=lambda verbose=True: SimpleNamespace(aio_handle=handle))
    with ExitStack() as stack:
        for swapper in ("partitioned_optimizer_swapper", "partitioned_param_swapper", "pipelined_optimizer_swapper"):
            stack.enter_context(patched(f"AsyncIOBuilder of {swapper}", lambda: builder))
        yield


@contextmanager
def uncompiled_adam() -> Iterator[None]:
    """While open, DeepSpeed's CPU Adam creates its state but updates nothing: the update is compiled C++ and in place."""
    with patched("DeepSpeedCPUAdam.__init__", _adam_begins), patched("DeepSpeedCPUAdam.step", _adam_steps):
        yield


def _adam_begins(self: Any, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
    defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
    defaults |= {"bias_correction": True, "amsgrad": False}
    torch.optim.Optimizer.__init__(self, params, defaults)


def _adam_steps(self: Any, closure: Any = None) -> None:
    """cpu_adam.py, `step`: the first step creates moments in float32; the update itself is in place."""
    for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
        if not self.state[parameter]:
            moments = [torch.zeros_like(parameter.data, dtype=torch.float32) for _ in range(2)]
            self.state[parameter] = {"step": 0, "exp_avg": moments[0], "exp_avg_sq": moments[1]}

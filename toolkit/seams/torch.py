"""Seams into PyTorch: fake tensors, dispatch, autograd's graph, modules, process groups. Those for cards are in cuda.py."""

from __future__ import annotations

from typing import Any

from toolkit.seams.seam import Seam, ours

FAKE_TENSORS = (
    Seam(
        name="FakeTensor",
        kind="private",
        where=(
            "config.optimizers",
            "memory.shadow.simulated_rank",
            "memory.meta_ops",
            "memory.shadow.fake",
            "memory.cuda.device",
            "memory.cuda.quantized",
            "memory.trace",
            "models.longest_answer",
            "training.trainer",
        ),
        target=(
            "torch._subclasses.fake_tensor: FakeTensor FakeTensor.fake_mode FakeTensor.fake_device FakeTensorMode "
            "FakeTensorMode.in_kernel_invocation"
        ),
        reason="a shadow step computes on tensors with shapes and no values",
        breaks="nothing can be predicted; without `fake_device` a prediction is many times slower",
        probe=lambda: _fake_tensor_differs(),
    ),
    Seam(
        name="errors of fake tensors",
        kind="private",
        where=("memory.shadow.step", "runs.beside_steps"),
        target=(
            "torch._subclasses.fake_tensor: DataDependentOutputException DynamicOutputShapeException "
            "UnsupportedFakeTensorException UnsupportedOperatorException"
        ),
        reason="what a fake tensor cannot do becomes a one-line error",
        breaks="predictions cannot be imported",
    ),
    Seam(
        name="FakeTensor.data_ptr",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="torch._subclasses.fake_tensor: FakeTensor.data_ptr",
        reason="engines distinguish tensors by the address of their data, which a fake tensor does not have",
        breaks="under an engine the prediction ends with an error",
    ),
    Seam(
        name="a parameter without its constructor",
        kind="private",
        where="memory.shadow.fake",
        target="torch.nn: Parameter",
        source=(("torch.nn.parameter", r"t\._is_param = True"),),
        reason="the constructor detaches a fake tensor first, which takes longer than all else in making a model fake",
        breaks="fake weights are no parameters, and predictions end with an error",
        probe=lambda: _is_param_differs(),
    ),
    Seam(
        name="a fake tensor without its constructor",
        kind="private",
        where="memory.meta_ops",
        target="torch: Tensor._make_subclass _C._set_throw_on_mutable_data_ptr",
        reason="FakeTensor's constructor takes many times longer, and a step makes thousands",
        breaks="predictions end with an error",
        probe=lambda: _fast_fake_differs(),
    ),
    Seam(
        name="meta kernels under a fake tensor",
        kind="private",
        where="memory.meta_ops",
        target=(
            "torch._C: _meta_in_tls_dispatch_include _set_meta_in_tls_dispatch_include _DisableTorchDispatch "
            "_dispatch_has_kernel_for_dispatch_key"
        ),
        reason="the meta kernel of a fake tensor is called directly, without FakeTensorMode",
        breaks="predictions end with an error",
    ),
    Seam(
        name="schemas of operators",
        kind="private",
        where="memory.meta_ops",
        target="torch.ops.aten: add_.Tensor._schema",
        reason="whether an operator writes into its arguments",
        breaks="predictions end with an AttributeError",
        probe=lambda: _schema_differs(),
    ),
    Seam(
        name="large real tensors",
        kind="private",
        where="memory.meta_ops",
        target="torch: Tag.pointwise Tag.inplace_view",
        reason="large results of pointwise operators become fake; operators that change a size in place are not skipped",
        breaks="predictions end with an AttributeError",
    ),
    Seam(
        name="aten::_grouped_mm",
        kind="private",
        where="memory.meta_ops",
        target="torch.ops.aten: _grouped_mm",
        signature=("self", "mat2", "offs", "bias", "out_dtype"),
        reason="a matrix product for each expert, whose meta kernel supports only bf16",
        breaks="mixtures of experts cannot be predicted in fp32",
    ),
    Seam(
        name="aten::_local_scalar_dense",
        kind="private",
        where="config.optimizers",
        target="torch.ops.aten: _local_scalar_dense.default",
        signature=("self",),
        reason="Prodigy reads numbers, which a fake tensor does not have",
        breaks="Prodigy cannot be predicted",
    ),
)

DISPATCH = (
    Seam(
        name="dispatch modes",
        kind="private",
        where=(
            "config.optimizers",
            "memory.shadow.simulated_rank",
            "memory.trace",
            "memory.cuda.gradient_sums",
            "memory.measure",
            "models.longest_answer",
        ),
        target=(
            "torch.utils._python_dispatch: TorchDispatchMode _disable_current_modes _get_current_dispatch_mode_stack",
            "torch._C: _get_dispatch_mode _TorchDispatchModeKey.FAKE",
        ),
        reason="a trace sees each operator below autograd",
        breaks="no ledger is measured or predicted: an error",
    ),
    Seam(
        name="Trace._should_skip_dynamo",
        kind="override",
        where="memory.trace:Trace",
        target="torch.utils._python_dispatch: TorchDispatchMode._should_skip_dynamo",
        reason="nothing here is compiled; without the override a wrapper runs for every operator",
        breaks="a traced step is slower, and sums of gradients are not recognized, because the wrapper is their caller",
        silent=True,
    ),
    Seam(
        name="storages by address",
        kind="private",
        where=("memory.trace", "memory.shadow.simulated_rank", "memory.meta_ops", "memory.cuda.gradient_sums"),
        target="torch: UntypedStorage._cdata",
        reason="tensors that share a storage are one block",
        breaks="no ledger: an AttributeError",
        probe=lambda: _storages_differ(),
    ),
    Seam(
        name="UntypedStorage.resize_",
        kind="patch",
        where="memory.resizing",
        target="torch: UntypedStorage.resize_",
        source=(("torch.distributed.fsdp._fully_shard._fsdp_param", r"storage\.resize_\(0\)"),),
        reason="FSDP2 frees and allocates gathered weights by resizing storages, which no operator reports",
        breaks="gathered weights stay in the ledger for the whole step, or are missing from it",
        silent=True,
        checked_by="tests/memory/test_sharding.py",
    ),
    Seam(
        name="names of operators",
        kind="constant",
        where=("memory.cuda.device", "memory.shadow.simulated_rank", "memory.meta_ops"),
        target=(
            "torch.ops.aten: empty.memory_format empty_strided zeros ones full zeros_like ones_like empty_like index.Tensor "
            "index_put index_put_ _index_put_impl_ _local_scalar_dense mm bmm addmm baddbmm addmv mv dot add.Tensor",
            "torch.ops.prim: device.default",
        ),
        reason="operators are recognized by their names",
        breaks="new tensors of an engine are real, cuBLAS has no workspace, or sums of gradients are counted twice",
        silent=True,
    ),
    Seam(
        name="optimizers' operators by prefix",
        kind="constant",
        where="memory.meta_ops",
        target="torch.ops.aten: _foreach_add_ _fused_adamw_",
        reason="of the operators that write and return nothing, only these are skipped",
        breaks="an optimizer step over many tensors is predicted on the slow path",
        silent=True,
    ),
)

AUTOGRAD = (
    Seam(
        name="where the backward pass is",
        kind="private",
        where=("memory.trace", "memory.cuda.gradient_sums", "memory.cuda.device"),
        target="torch._C: _current_graph_task_id _current_autograd_node _autograd._get_sequence_nr",
        reason="an operator inside a graph task is in the backward pass, and belongs to the module whose forward made its node",
        breaks="no ledger: an AttributeError",
        probe=lambda: _backward_is_not_seen(),
    ),
    Seam(
        name="sequence number of AccumulateGrad",
        kind="constant",
        where="memory.trace",
        target="torch.autograd.graph: Node._sequence_nr",
        reason="nodes that belong to no module have a number of 2**63 or more",
        breaks="the sum of a parameter's gradient is said to be in the model's last module",
        silent=True,
        probe=lambda: _accumulate_grad_has_a_place(),
    ),
)

MODULES = (
    Seam(
        name="torch.compile",
        kind="patch",
        where="models.late_compile",
        target="torch: compile",
        reason="bitsandbytes decorates functions with it when it is imported, and that loads Inductor",
        breaks="predictions start a second later",
    ),
    Seam(
        name="step of a part of the weights",
        kind="patch",
        where="training.optimizer_steps",
        target="torch.optim: AdamW.step",
        source=(
            ("torch.optim.adamw", r"class AdamW\(Adam\)"),
            ("torch.optim.adam", r"for group in self\.param_groups:"),
        ),
        reason="a step updates the weights of `param_groups`, which are narrowed to a part of them; set on single optimizers",
        breaks="some weights are updated several times a step, or not at all",
        checked_by="tests/test_optimizer_steps.py",
    ),
    Seam(
        name="DTensor.to_local",
        kind="private",
        where="distributed.checksums",
        target="torch.distributed.tensor: DTensor.to_local",
        reason="a shard is recognized by it",
        breaks="under FSDP2 the guards' checksums gather every weight, or end with an error",
    ),
    Seam(
        name="what an nn.Module holds",
        kind="private",
        where=(
            "memory.census",
            "memory.shadow.fake",
            "memory.shadow.stacks",
            "memory.cuda.loading",
            "memory.shadow.simulated_rank",
        ),
        target="torch.nn: Module._parameters Module._buffers Module._modules",
        reason="parameters and buffers are labelled by the module that holds them, replaced there, and compared between layers",
        breaks="no ledger: an AttributeError",
    ),
    Seam(
        name="forward of a layer",
        kind="patch",
        where="memory.shadow.folding",
        target="torch.nn: Module.forward",
        reason="a stand-in returns its input; an instance's own forward is neither the class's nor wrapped by checkpointing",
        breaks="layers that repeat are all run, or their predictions are refused",
        checked_by="tests/memory/test_folding.py",
    ),
    Seam(
        name="hooks after a gradient is summed",
        kind="private",
        where="memory.shadow.folding",
        target="torch: Tensor._post_accumulate_grad_hooks",
        reason="under --optimizer_in_backward a weight is updated as soon as it has its gradient, which a stand-in's has not",
        breaks="predictions of models with layers that repeat end with an error",
    ),
    Seam(
        name="a model's _apply",
        kind="patch",
        where=("memory.shadow.fake", "memory.shadow.step", "memory.shadow.simulated_rank", "memory.cuda.loading"),
        target="torch.nn: Module._apply",
        signature=("fn", "recurse"),
        source=(("torch.nn.modules.module", r"return self\._apply\(convert\)"),),
        reason="a fake model ignores moves to a device, and is cast without swapping tensors; set on the model of one shadow step "
        "only",
        breaks="moving a fake model fails; the order in which `.to` moves is replayed wrongly",
    ),
    Seam(
        name="functions of autograd",
        kind="override",
        where=(
            "memory.cuda.device:_HalfToFloatSoftmax",
            "memory.cuda.attention:_Keeping",
            "memory.cuda.flash:_FlashAttention",
            "memory.shadow.folding:_Passed",
            "memory.cuda.liger:_RMSNorm",
            "memory.cuda.liger:_GatedProduct",
            "memory.cuda.liger:_Rope",
            "models.chunked_loss:_WithGradients",
        ),
        target="torch.autograd.function: Function.forward Function.backward",
        called_in="",
        reason="kernels that only a GPU has; a bias that lives until the backward pass; a loss with known gradients",
        breaks="predictions of a card, and losses in chunks, end with an error",
    ),
    Seam(
        name="save_on_cpu of FSDP2",
        kind="patch",
        where="memory.shadow.host_copies",
        target="torch.distributed.algorithms._checkpoint.checkpoint_wrapper: save_on_cpu",
        reason="activations that accelerate offloads under FSDP2 count as host memory",
        breaks="a prediction with offloaded activations ends with an error",
    ),
    Seam(
        name="hooks of saved tensors",
        kind="private",
        where="memory.shadow.host_copies",
        target="torch.autograd.graph: saved_tensors_hooks save_on_cpu",
        source=(("torch.autograd.graph", r"def pack_to_cpu"),),
        reason="a shadow step offloads as save_on_cpu does: a copy when a tensor is saved, another when it is used",
        breaks="offloaded activations are counted otherwise than they need memory",
        silent=True,
    ),
    Seam(
        name="rounding of pinned memory",
        kind="constant",
        where="memory.replay",
        reason="each pinned block takes a power of two of host memory, unless PYTORCH_ALLOC_CONF limits the rounding",
        breaks="the host memory of offloaded activations is predicted wrongly",
        silent=True,
        checked_by="benchmarks/on_gpu/memory.py",
        library="torch",
    ),
    Seam(
        name="an output head's forward",
        kind="patch",
        where="models.chunked_loss",
        target="torch.nn.modules.module: Module.forward",
        reason="the head is called once for all chunks of a loss, so that an engine gathers its weights once",
        breaks="a loss in chunks ends with an error",
    ),
    Seam(
        name="a feed-forward layer's forward",
        kind="patch",
        where="models.tiled_mlp",
        target="torch.nn.modules.module: Module.forward",
        reason="it computes some tokens at a time; this lasts as long as the model",
        breaks="a step needs the memory of all intermediate results",
    ),
    Seam(
        name="AccumulateGrad.variable",
        kind="private",
        where="models.chunked_loss",
        reason="the trained weights of an output head are the leaves of the graph of its logits",
        breaks="a trained output head gets no gradient",
        silent=True,
        probe=lambda: _no_leaf_in_a_graph(),
        library="torch",
    ),
    Seam(
        name="BottleneckLayer.forward",
        kind="override",
        where="methods.adapter:BottleneckLayer",
        target="torch.nn.modules.module: Module.forward",
        called_in="",
        reason="an adapter's own forward pass",
        breaks="adapters cannot compute",
    ),
)

DISTRIBUTED = (
    Seam(
        name="a process group that sends nothing",
        kind="private",
        where="memory.shadow.simulated_rank",
        target="torch.testing._internal.distributed.fake_pg: FakeStore",
        reason="one rank of several in one process",
        breaks="nothing can be predicted under an engine",
    ),
    Seam(
        name="DistributedDataParallel.__init__",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target=(
            "torch.nn.parallel: DistributedDataParallel.__init__",
            "torch.nn.parallel: DistributedDataParallel.register_comm_hook",
        ),
        reason="DDP's own all-reduce waits for a result that the fake process group does not give: a hook returns the bucket",
        breaks="a prediction under DDP hangs or ends with an error",
    ),
    Seam(
        name="c10d.set_timeout",
        kind="private",
        where="config.resolved",
        target="torch.distributed.distributed_c10d: set_timeout",
        signature=("timeout",),
        reason="--ddp_timeout applies on CPUs too, for which TrainingArguments does not pass it on",
        breaks="the other ranks wait half an hour for a rank that hangs on a CPU",
        silent=True,
        since="2.14",
    ),
    Seam(
        name="c10d._set_pg_timeout",
        kind="private",
        where="config.resolved",
        target="torch.distributed.distributed_c10d: _set_pg_timeout",
        signature=("timeout",),
        reason="the same function, before it had a public name",
        breaks="a run of several ranks on CPUs ends with an AttributeError",
        until="2.14",
    ),
    Seam(
        name="gloo's copy of what it scatters",
        kind="constant",
        where="memory.shadow.simulated_rank",
        target="torch.ops.c10d: _reduce_scatter_base_",
        signature=("output_tensor", "input_tensor"),
        reason="ProcessGroupGloo.cpp, reduce_scatter_tensor_coalesced, copies its input",
        breaks="FSDP2's and ZeRO's reduction on CPUs is predicted too small",
        silent=True,
        checked_by="tests/memory/test_sharding.py",
    ),
    Seam(
        name="texts of a time-out",
        kind="constant",
        where="distributed.ranks",
        library="torch",
        reason="gloo and NCCL report a rank that does not answer only in the text of an error",
        breaks="the run ends with a traceback instead of the rank's name",
        silent=True,
        checked_by="tests/test_survival.py",
    ),
    Seam(
        name="TORCHELASTIC_ERROR_FILE",
        kind="constant",
        where="distributed.ranks",
        source=(
            (
                "torch.distributed.elastic.multiprocessing.api",
                r"\[\"TORCHELASTIC_ERROR_FILE\"\] = error_file",
            ),
            (
                "torch.distributed.elastic.multiprocessing.api",
                r"clogdir = os\.path\.join\(attempt_log_dir, str\(local_rank\)\)",
            ),
        ),
        reason="all ranks on a machine share the launcher's folder, two above that file; there a rank marks that it printed its error",
        breaks="each rank prints the same error",
        silent=True,
        checked_by="tests/test_survival.py",
    ),
    Seam(
        name="FullyShardedDataParallel by name",
        kind="constant",
        where="distributed.running",
        target="torch.distributed.fsdp: FullyShardedDataParallel",
        reason="FSDP1 is recognized by the name of the wrapper's class",
        breaks="FSDP1 is not recognized as an engine, and refused",
    ),
)

FILES_AND_CARDS = (
    Seam(
        name="lock of a build",
        kind="constant",
        where="distributed.deepspeed",
        target="torch.utils.cpp_extension: get_default_build_root CUDA_HOME",
        source=(("torch.utils.cpp_extension", r"os\.path\.join\(build_directory, 'lock'\)"),),
        reason="an error names a lock that a killed build left, instead of waiting for it",
        breaks="a run with offloading waits for ever for the lock of a killed build",
        silent=True,
    ),
    Seam(
        name="OutOfMemoryError by name",
        kind="constant",
        where="distributed.ranks",
        target="torch: OutOfMemoryError",
        reason="recognized by its name, because torch may not have been imported",
        breaks="a full GPU ends the run with a traceback instead of one line",
        silent=True,
        probe=lambda: _memory_error_has_another_name(),
    ),
    Seam(
        name="errors of a full disk",
        kind="constant",
        where="training.checkpoints",
        target="torch: save",
        reason="torch.save reports a full disk with a RuntimeError, recognized by its text",
        breaks="a full disk ends the run with a traceback instead of advice on what to delete",
        silent=True,
        probe=lambda: _full_disk_is_told_otherwise(),
    ),
    Seam(
        name="torch.cuda.memory._record_memory_history",
        kind="private",
        where="memory.measure",
        target="torch.cuda.memory: _record_memory_history _dump_snapshot",
        signature=None,
        reason="--memory_snapshot; the function is documented despite its underscore",
        breaks="--memory_snapshot ends with an AttributeError",
    ),
    Seam(
        name="torch.cuda.get_device_capability",
        kind="patch",
        where="benchmarks.on_gpu.preload",
        target="torch.cuda: get_device_capability",
        signature=("device",),
        reason="bitsandbytes calls it on import, and must not create a CUDA context in a process that forks",
        breaks="measurements on a GPU cannot fork",
    ),
    Seam(
        name="private functions of measurements",
        kind="private",
        where=("benchmarks.on_gpu.pool", "benchmarks.on_gpu.training", "benchmarks.on_gpu.fact_jobs"),
        target="torch: cuda._is_in_bad_fork cuda.memory._set_allocator_settings _fused_sdp_choice",
        reason="whether CUDA can be used here, the allocator's settings, and the kernel that a card would choose",
        breaks="those measurements on a GPU end with an AttributeError",
    ),
)

TABLE = (*FAKE_TENSORS, *DISPATCH, *AUTOGRAD, *MODULES, *DISTRIBUTED, *FILES_AND_CARDS)


def _fake_tensor_differs() -> str | None:
    """Checks that a fake tensor is made from a meta tensor by position, works without entering its mode, and has its device."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cpu"))
    result = fake + 1
    if not isinstance(result, FakeTensor) or result.fake_mode is not mode or fake.fake_device.type != "cpu":
        return "an operator on a fake tensor does not give a fake tensor of its mode on its device"
    return None


def _is_param_differs() -> str | None:
    """Checks that the constructor marks a fake tensor as a parameter as `shadow.fake` does."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fake = FakeTensor(FakeTensorMode(), torch.empty(1, device="meta"), torch.device("cpu"))
    marked = vars(torch.nn.Parameter(fake)).get("_is_param")
    return None if marked is True else f"nn.Parameter of a fake tensor has _is_param {marked!r}"


def _fast_fake_differs() -> str | None:
    """Checks that `meta_ops.fake` gives the same as the constructor."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fake = ours("memory.meta_ops:fake")
    mode, meta = FakeTensorMode(allow_non_fake_inputs=True), torch.empty(2, 3, device="meta")
    plain, quick = FakeTensor(mode, meta, torch.device("cpu")), fake(mode, torch.empty(2, 3, device="meta"))
    names = sorted({*vars(plain)} ^ {*vars(quick)})
    if names:
        return f"a fake tensor made by its constructor differs in {', '.join(names)}"
    return None if plain.device == quick.device and quick.is_contiguous() else "it is on another device"


def _schema_differs() -> str | None:
    import torch

    schema = torch.ops.aten.add_.Tensor._schema
    first, returned = schema.arguments[0], schema.returns[0]
    names = ("alias_info", "kwarg_only")
    if gone := [name for name in names if not hasattr(first, name)]:
        return f"an argument of a schema has no {', '.join(gone)} any more"
    if not (first.alias_info.is_write and returned.alias_info.is_write):
        return "the schema of add_ does not say that it writes"
    return None


def _storages_differ() -> str | None:
    import torch

    whole = torch.zeros(4)
    same = whole.untyped_storage()._cdata == whole[1:].untyped_storage()._cdata
    return None if same else "a view's storage has another address than that of its base"


def _backward_is_not_seen() -> str | None:
    """Checks that there is a graph task and a node inside a backward pass, and no graph task outside."""
    import torch

    seen: list[Any] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            node = torch._C._current_autograd_node()
            seen.extend([torch._C._current_graph_task_id(), node is not None and node._sequence_nr()])
            return grad

    before = torch._C._autograd._get_sequence_nr()
    x = torch.ones(1, requires_grad=True)
    with torch.enable_grad():
        Look.apply(x).sum().backward()
    if torch._C._current_graph_task_id() != -1:
        return "outside of a backward pass the graph task is not -1"
    if len(seen) != 2 or seen[0] == -1 or not before <= seen[1] <= torch._C._autograd._get_sequence_nr():
        return f"inside a backward pass the graph task and the node's number are {seen}"
    return None


def _accumulate_grad_has_a_place() -> str | None:
    import torch

    with torch.enable_grad():
        node = (torch.ones(1, requires_grad=True) * 2).grad_fn.next_functions[0][0]
    number = node._sequence_nr()
    return (
        None
        if number >= ours("memory.trace:_NO_SEQUENCE_NUMBER")
        else f"{node.name()} has the sequence number {number}"
    )


def _memory_error_has_another_name() -> str | None:
    import torch

    name = torch.OutOfMemoryError.__name__
    return None if name == "OutOfMemoryError" else f"it is called {name}"


def _full_disk_is_told_otherwise() -> str | None:
    from pathlib import Path

    import torch

    if not Path("/dev/full").exists():  # only on Linux
        return None
    try:
        torch.save(torch.zeros(1 << 16), "/dev/full")
    except Exception as error:
        return (
            None
            if ours("training.checkpoints:is_write_failure")(error)
            else f"it is {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        )
    return "torch.save writes to a full disk without an error"


def _no_leaf_in_a_graph() -> str | None:
    """Checks that the graph of a sum ends in a node that names the leaf."""
    import torch

    leaf = torch.zeros(1, requires_grad=True)
    node = (leaf * 2).grad_fn.next_functions[0][0]
    return (
        None if getattr(node, "variable", None) is leaf else "the last node of a graph does not name its leaf any more"
    )

"""Seams into DeepSpeed: attributes of its optimizers, what it compiles, and its global state."""

from __future__ import annotations

from toolkit.seams.seam import Seam, ours, text_of

TABLE = (
    Seam(
        name="attributes of ZeRO's optimizers",
        kind="constant",
        where=("memory.census", "distributed.running"),
        target=(
            "deepspeed.runtime.zero.stage_1_and_2: DeepSpeedZeroOptimizer.single_partition_of_fp32_groups "
            "DeepSpeedZeroOptimizer.param_buffer_of_bit16_for_cpu_offload_groups "
            "DeepSpeedZeroOptimizer.temp_grad_buffer_for_cpu_offload DeepSpeedZeroOptimizer.accumulated_grads_in_cpu "
            "DeepSpeedZeroOptimizer.averaged_gradients DeepSpeedZeroOptimizer.cpu_offload "
            "DeepSpeedZeroOptimizer.partition_gradients",
            "deepspeed.runtime.zero.stage3: DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat "
            "DeepSpeedZeroOptimizer_Stage3.averaged_gradients DeepSpeedZeroOptimizer_Stage3.grad_partitions_flat_buffer "
            "DeepSpeedZeroOptimizer_Stage3.offload_optimizer DeepSpeedZeroOptimizer_Stage3.offload_param "
            "DeepSpeedZeroOptimizer_Stage3.module DeepSpeedZeroOptimizer_Stage3.optimizer_swapper "
            "DeepSpeedZeroOptimizer_Stage3.swap_optimizer DeepSpeedZeroOptimizer_Stage3.params_in_nvme_and_cpu",
            "deepspeed.runtime.bf16_optimizer: BF16_Optimizer.fp32_groups_flat_partition "
            "BF16_Optimizer.fp32_groups_gradients_flat",
        ),
        reason="ZERO and OFFLOADED name what it keeps in addition to the moments, and which of that is in host memory",
        breaks="master weights or gradients are counted as activations, and offloaded ones as memory of the card",
        silent=True,
        probe=lambda: _names_are_nowhere(),
    ),
    Seam(
        name="marks of ZeRO-3's parameters",
        kind="private",
        where=(
            "distributed.checksums",
            "distributed.running",
            "distributed.deepspeed",
            "distributed.sharded_models",
            "memory.census",
            "methods.base",
            "runs.resources",
        ),
        source=(
            ("deepspeed.runtime.zero.partition_parameters", r"param\.ds_tensor = "),
            ("deepspeed.runtime.zero.partition_parameters", r"param\.ds_numel = param\.numel\(\)"),
            ("deepspeed.runtime.zero.partition_parameters", r"param\.nvme_swapper = self\.param_swapper"),
        ),
        reason="a sharded parameter is recognized by its shard, `ds_tensor`",
        breaks="ZeRO-3 is not noticed: guards compare empty tensors, ranks generate apart and hang, parameters count 0",
        silent=True,
    ),
    Seam(
        name="DeepSpeedEngine",
        kind="private",
        where="distributed.running",
        target="deepspeed.runtime.engine: DeepSpeedEngine.zero_optimization_stage DeepSpeedEngine.mpu",
        reason="DeepSpeed is recognized by `zero_optimization_stage`, sequence parallelism by its `mpu`",
        breaks="a run under DeepSpeed is refused as one without an engine",
    ),
    Seam(
        name="get_sequence_parallel_world_size",
        kind="private",
        where="distributed.running",
        target="deepspeed.runtime.sequence_parallel.parallel_state_sp: get_sequence_parallel_world_size",
        reason="how many processes share a row",
        breaks="a run that shares rows ends with an AttributeError",
    ),
    Seam(
        name="folders that are swapped to",
        kind="constant",
        where="memory.census",
        target=(
            "deepspeed.runtime.swap_tensor.partitioned_param_swapper: AsyncPartitionedParameterSwapper.buffers "
            "AsyncPartitionedParameterSwapper.partitioned_swap_buffer AsyncPartitionedParameterSwapper.swap_folder",
            "deepspeed.runtime.swap_tensor.optimizer_utils: OptimizerSwapper.swap_folder OptimizerSwapper.swap_buffer_manager",
            "deepspeed.runtime.swap_tensor.utils: SwapBufferManager.all_buffers",
        ),
        source=(
            ("deepspeed.runtime.swap_tensor.partitioned_param_swapper", r"_param\.tensor\.swp"),
            ("deepspeed.runtime.swap_tensor.optimizer_utils", r"\.tensor\.swp"),
        ),
        reason="the sizes of the files *.swp, and the pinned buffers between disk and memory",
        breaks="a ledger under ZeRO-Infinity has no bytes on NVMe, or its buffers on the card",
        silent=True,
    ),
    Seam(
        name="DeepSpeedZeRoOffload",
        kind="private",
        where="distributed.deepspeed",
        target=(
            "deepspeed.runtime.zero.parameter_offload: DeepSpeedZeRoOffload DeepSpeedZeRoOffload.partition_all_parameters "
            "DeepSpeedZeRoOffload.destroy",
            "deepspeed.runtime.zero.offload_config: DeepSpeedZeroOffloadParamConfig",
            "deepspeed.utils.timer: NoopTimer",
        ),
        source=(
            (
                "deepspeed.runtime.zero.parameter_offload",
                r"param_persistence_threshold=(.|\n)*offload_param_config=",
            ),
            ("deepspeed.runtime.zero.parameter_offload", r"max_reuse_distance=(.|\n)*max_live_parameters="),
            ("deepspeed.runtime.zero.parameter_offload", r"module\.ds_inflight_param_registry = "),
            ("deepspeed.runtime.zero.parameter_offload", r"module\.pre_bwd_fn = "),
            ("deepspeed.runtime.zero.parameter_offload", r"module\.post_bwd_fn = "),
        ),
        reason="the hooks that gather weights are set for the base model's scores before training, and removed afterwards",
        breaks="training under ZeRO-3 runs the backward hooks of the scores, with their limits",
        silent=True,
    ),
    Seam(
        name="names of what is compiled",
        kind="constant",
        where="distributed.deepspeed",
        source=(
            ("deepspeed.ops.op_builder.cpu.cpu_adam", r"NAME = \"cpu_adam\""),
            ("deepspeed.ops.op_builder.async_io", r"NAME = \"async_io\""),
        ),
        reason="the folders of builds, in which a killed build leaves its lock",
        breaks="a run with offloading waits for ever for the lock of a killed build",
        silent=True,
    ),
    Seam(
        name="assert_no_cuda_mismatch",
        kind="private",
        where="runs.doctor",
        target="deepspeed.ops.op_builder.builder: assert_no_cuda_mismatch CUDAMismatchException MissingCUDAException",
        reason="footprint doctor says why DeepSpeed cannot compile, without compiling",
        breaks="footprint doctor cannot tell about DeepSpeed",
    ),
    Seam(
        name="cpu_lion's name",
        kind="constant",
        where="distributed.deepspeed",
        source=(("deepspeed.ops.op_builder.cpu.cpu_lion", r"NAME = \"cpu_lion\""),),
        reason="the folder of the build of cpu_lion, which 0.19.7 defined elsewhere",
        breaks="a run with offloaded Lion waits for ever for the lock of a killed build",
        silent=True,
        since="0.19.8",
    ),
    Seam(
        name="__compatible_ops__",
        kind="patch",
        where="distributed.deepspeed",
        target="deepspeed.ops: __compatible_ops__",
        source=(
            ("deepspeed.comm.torch", r"deepspeed\.ops\.__compatible_ops__"),
            ("deepspeed.ops.op_builder.cpu.comm", r"NAME = \"deepspeed_shm_comm\""),
        ),
        reason="a rehearsal on CPUs uses gloo; for shared memory DeepSpeed would compile code; lasts until the process ends",
        breaks="a rehearsal compiles for minutes, or asks for a compiler",
        silent=True,
    ),
    Seam(
        name="deepspeed.comm.comm.cdb",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.comm.comm: cdb",
        source=(("deepspeed.comm.comm", r"^\s+global cdb$"),),
        reason="reset to None when DeepSpeed leaves the fake process group, as before it joined",
        breaks="the next world of the process uses the process group of the last",
        silent=True,
    ),
    Seam(
        name="deepspeed.utils.groups",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.utils.groups: mpu _WORLD_GROUP _DATA_PARALLEL_GROUP",
        reason="it stores process groups in upper-case names and `mpu`; restored when the world ends",
        breaks="the next world of the process uses groups of the last",
        silent=True,
    ),
    Seam(
        name="_SEQUENCE_PARALLEL_GROUP",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.runtime.sequence_parallel.parallel_state_sp: _SEQUENCE_PARALLEL_GROUP",
        source=(("deepspeed.runtime.sequence_parallel.parallel_state_sp", r"global _SEQUENCE_PARALLEL_GROUP"),),
        reason="the process group of the ranks that share a row; restored when the world ends",
        breaks="the next world that shares rows uses groups of the last",
        silent=True,
    ),
    Seam(
        name="_SEQUENCE_DATA_PARALLEL_GROUP",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.runtime.sequence_parallel.parallel_state_sp: _SEQUENCE_DATA_PARALLEL_GROUP",
        reason="the process group of the ranks that have different rows; restored when the world ends",
        breaks="the next world that shares rows uses groups of the last",
        silent=True,
    ),
    Seam(
        name="_all_to_all_groups",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.sequence.layer: _all_to_all_groups",
        source=(("deepspeed.sequence.layer", r"_all_to_all_groups\[name\] = group"),),
        reason="the process groups of DeepSpeed's own attention; restored when the world ends",
        breaks="the next world that shares rows uses groups of the last",
        silent=True,
    ),
    Seam(
        name="is_fp16_supported",
        kind="patch",
        where=("memory.shadow.simulated_rank", "benchmarks.distributed_accuracy"),
        target="deepspeed.accelerator.cpu_accelerator: CPU_Accelerator.is_fp16_supported",
        signature=(),
        reason="fp16 is predicted as on GPUs, which all support it; set on the accelerator object of the process",
        breaks="fp16 under DeepSpeed cannot be predicted",
    ),
    Seam(
        name="get_numa_cores",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.utils.numa: get_numa_cores",
        signature=(),
        source=(("deepspeed.accelerator.cpu_accelerator", r"from deepspeed\.utils\.numa import get_numa_cores"),),
        reason="DeepSpeed starts a process that counts CPU sockets each time that it reduces a gradient",
        breaks="predictions under ZeRO are many times slower",
        silent=True,
    ),
    Seam(
        name="F.linear",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="torch.nn.functional: linear",
        source=(("deepspeed.runtime.zero.partition_parameters", r"torch\.nn\.functional\.linear = zero3_linear_wrap"),),
        reason="ZeRO-3 replaces it for the rest of the process by one that also keeps the inputs of frozen layers",
        breaks="after a prediction under ZeRO-3, later ones in the same process are wrong",
        silent=True,
        library="deepspeed",
    ),
    Seam(
        name="DeepSpeedCPUAdam.__init__",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.ops.adam: DeepSpeedCPUAdam.__init__",
        signature=(
            "model_params",
            "lr",
            "bias_correction",
            "betas",
            "eps",
            "weight_decay",
            "amsgrad",
            "adamw_mode",
            "fp32_optimizer_states",
        ),
        reason="its update is compiled C++, which has no fake form",
        breaks="a prediction with offloading compiles for minutes",
    ),
    Seam(
        name="DeepSpeedCPUAdam.step",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="deepspeed.ops.adam: DeepSpeedCPUAdam.step",
        signature=("closure",),
        source=(
            ("deepspeed.ops.adam.cpu_adam", r"state\['exp_avg'\] = torch\.zeros_like\(p\.data, dtype=state_dtype"),
            ("deepspeed.ops.adam.cpu_adam", r"state_dtype = torch\.float"),
        ),
        reason="it creates two moments in float32 at the first step; the update itself is in place",
        breaks="an offloaded optimizer's state is predicted wrongly",
        silent=True,
    ),
    *(
        Seam(
            name=f"AsyncIOBuilder of {module}",
            kind="patch",
            where="memory.shadow.simulated_rank",
            target=f"deepspeed.runtime.swap_tensor.{module}: AsyncIOBuilder",
            source=((f"deepspeed.runtime.swap_tensor.{module}", r"AsyncIOBuilder\(\)\.load\("),),
            reason="disk access is compiled C++, replaced by a handle that writes nothing",
            breaks="a prediction with NVMe compiles code and writes the states to the disk",
        )
        for module in ("partitioned_optimizer_swapper", "partitioned_param_swapper", "pipelined_optimizer_swapper")
    ),
    Seam(
        name="handle of a disk",
        kind="constant",
        where="memory.shadow.simulated_rank",
        target="deepspeed.runtime.swap_tensor.utils: swap_in_tensors swap_out_tensors",
        reason="the methods of the compiled handle that DeepSpeed's Python code calls, which `Disk` replaces",
        breaks="a prediction with NVMe ends with an AttributeError",
        probe=lambda: _disk_lacks_a_method(),
    ),
)


def _names_are_nowhere() -> str | None:
    """Checks that each name in ZERO and OFFLOADED is an attribute of one of the optimizers."""
    known = {path.rpartition(".")[2] for _, path in TABLE[0].targets}
    zero, offloaded = ours("memory.census:ZERO"), ours("memory.census:OFFLOADED")
    unknown = {name for names in (*zero.values(), offloaded) for name in names} - known
    return f"no optimizer is known to have {', '.join(sorted(unknown))}" if unknown else None


def _disk_lacks_a_method() -> str | None:
    import re

    modules = (
        "utils",
        "optimizer_utils",
        "async_swapper",
        "partitioned_param_swapper",
        "partitioned_optimizer_swapper",
    )
    text = "".join(text_of(f"deepspeed.runtime.swap_tensor.{name}") or "" for name in modules)
    called = {*re.findall(r"\baio_(?:\w+_)?handle\.(\w+)\(", text)}
    if "wait" not in called:
        return "the swappers do not wait for a handle any more"
    used = called - {
        "pin_device_tensor",
        "unpin_device_tensor",
    }  # only for accelerators whose handles pin existing tensors
    missing = sorted(name for name in used if not hasattr(ours("memory.shadow.simulated_rank:Disk"), name))
    return f"DeepSpeed calls {', '.join(missing)} of a handle, which Disk does not have" if missing else None

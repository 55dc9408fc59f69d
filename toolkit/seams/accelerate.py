"""Seams into accelerate: its singletons, its launcher's environment, and decisions that depend on the device."""

from __future__ import annotations

from toolkit.seams.seam import Seam

TABLE = (
    Seam(
        name="accelerate's singletons",
        kind="private",
        where=("memory.shadow.isolation", "memory.shadow.simulated_rank"),
        target=(
            "accelerate.state: PartialState._shared_state AcceleratorState._shared_state GradientState._shared_state "
            "GradientState.sync_gradients"
        ),
        source=(("accelerate.state", r"self\.__dict__ = self\._shared_state"),),
        reason="cleared for a shadow step, then restored",
        breaks="after a prediction, training runs on a CPU or without its engine",
        silent=True,
    ),
    Seam(
        name="AcceleratorState.__init__",
        kind="patch",
        where=("memory.shadow.simulated_rank", "benchmarks.distributed_accuracy", "benchmarks.on_gpu.runs"),
        target="accelerate.state: AcceleratorState.__init__",
        signature=(
            "mixed_precision",
            "cpu",
            "dynamo_plugin",
            "deepspeed_plugin",
            "fsdp_plugin",
            "torch_tp_plugin",
            "megatron_lm_plugin",
            "parallelism_config",
            "_from_accelerator",
            "kwargs",
        ),
        source=(
            ("accelerate.state", r"self\._mixed_precision = mixed_precision"),
            ("accelerate.state", r"PartialState\._shared_state\[\"distributed_type\"\] = self\.distributed_type"),
            ("accelerate.state", r"self\.fsdp_plugin = fsdp_plugin"),
        ),
        reason="FSDP is set up on CPUs too, which accelerate does only on GPUs",
        breaks="FSDP2 is predicted as DDP",
        silent=True,
        checked_by="tests/memory/test_sharding.py",
    ),
    Seam(
        name="AcceleratorState._mixed_precision",
        kind="private",
        where="memory.shadow.simulated_rank",
        target="accelerate.state: AcceleratorState._mixed_precision",
        reason="FSDP's plugin gets the precision, as on GPUs",
        breaks="a prediction under FSDP2 ends with an AttributeError",
    ),
    Seam(
        name="get_mixed_precision_context_manager",
        kind="patch",
        where="memory.shadow.step",
        target="accelerate.accelerator: get_mixed_precision_context_manager",
        signature=("native_amp", "autocast_kwargs"),
        source=(("accelerate.accelerator", r"= get_mixed_precision_context_manager\("),),
        reason="accelerate runs fp16 only on GPUs; a shadow step autocasts to it on a CPU",
        breaks="fp16 is predicted as bf16",
        silent=True,
    ),
    Seam(
        name="FullyShardedDataParallelPlugin.set_mixed_precision",
        kind="patch",
        where="memory.shadow.step",
        target="accelerate: FullyShardedDataParallelPlugin.set_mixed_precision",
        signature=("mixed_precision", "buffer_autocast", "override"),
        reason="the same, for what FSDP casts",
        breaks="fp16 under FSDP2 is predicted as bf16",
        silent=True,
    ),
    Seam(
        name="optimizer of accelerate's wrapper",
        kind="private",
        where=("memory.measure", "memory.census", "training.trainer", "benchmarks.on_gpu.untraced"),
        target="accelerate.optimizer: AcceleratedOptimizer.optimizer AcceleratedOptimizer.step_was_skipped",
        reason="whether fp16 overflowed, and DeepSpeed's optimizer inside the wrapper",
        breaks="a skipped step is taken for the first; ZeRO's master weights and gradients are missing from the ledger",
        silent=True,
    ),
    Seam(
        name="accelerate's launch command",
        kind="private",
        where="distributed.launch_files",
        target=(
            "accelerate.commands.launch: _validate_launch_command launch_command_parser",
            "accelerate.utils.launch: prepare_deepspeed_cmd_env prepare_multi_gpu_env",
        ),
        signature=(),
        reason="the variables that the launcher would set, for predictions",
        breaks="--launch ends with an ImportError",
    ),
    Seam(
        name="is_port_in_use",
        kind="patch",
        where="distributed.launch_files",
        target="accelerate.utils.launch: is_port_in_use",
        signature=("port",),
        source=(("accelerate.utils.launch", r"if need_port_check and is_port_in_use\("),),
        reason="nothing is launched, so a port that is taken does not matter",
        breaks="a prediction is refused while another run is on this machine",
    ),
    Seam(
        name="environment of the launcher",
        kind="constant",
        where=(
            "distributed.request",
            "distributed.deepspeed",
            "distributed.launch_files",
            "config.resolved",
            "runs.preflight",
            "memory.shadow.simulated_rank",
            "memory.shadow.isolation",
        ),
        source=tuple(
            ("accelerate.utils.launch", pattern)
            for pattern in (
                r"\"ACCELERATE_USE_DEEPSPEED\"\] = \"true\"",
                r"\"ACCELERATE_USE_FSDP\"\] = \"true\"",
                r"\"ACCELERATE_MIXED_PRECISION\"\] = ",
                r"\"ACCELERATE_DEEPSPEED_CONFIG_FILE\"\] = ",
                r"\"ACCELERATE_DEEPSPEED_ZERO_STAGE\"\] = ",
                r"\"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE\"\] = ",
                r"\"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE\"\] = ",
                r"\"FSDP_VERSION\"\] = ",
                r"\"FSDP_OFFLOAD_PARAMS\"\] = ",
                r"prefix = \"PARALLELISM_CONFIG_\"",
                r"prefix \+ \"SP_SIZE\"\] = ",
                r"prefix \+ \"DP_REPLICATE_SIZE\"\] = ",
                r"prefix \+ \"DP_SHARD_SIZE\"\] = ",
            )
        ),
        reason="the request is read from the environment variables that the launcher sets",
        breaks="the running engine is checked against the wrong request; a prediction is of another engine",
        silent=True,
    ),
)

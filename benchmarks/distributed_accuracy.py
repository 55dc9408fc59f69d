"""Accuracy of predictions for several processes, against the measured memory of 2 and 4 real gloo ranks on this machine.

    python benchmarks/distributed_accuracy.py              # continues where it stopped
    python benchmarks/distributed_accuracy.py --show       # the committed results

The model is a Llama with 1.3 million weights; no number of processes divides its sizes evenly. The engines are those of launch/.
With `auto`, ZeRO's buckets hold 16,384 weights; DDP's are set to 1 MiB: small enough that every engine fills its buckets. Each
rank trains two steps, traced by the same callback that measures every run. The prediction runs one rank in one process, on fake
tensors. The first and the last rank are compared, each with its own prediction if they differ. Model states are the weights,
gradients and optimizer state at the end of a step. The peak includes everything, over both steps.

The results also have DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_model_states_mem_needs`),
which only cover model states. With offload, the ranks skip the optimizer update, because DeepSpeed would compile it for the CPU; on a
disk, Python writes and reads the files instead of DeepSpeed's compiled code. Ranks are forked, so that imports, which take half a
minute, happen once. gloo's threads free their buffers with a delay: on a busy machine this can add a few percent to a rank's peak.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "distributed_accuracy.json"
UNEVEN = (
    "zero1",
    "zero2",
    "zero2_offload",
    "fsdp2",
    "fsdp2_qlora",
)  # engines under which ranks keep different gradients, or shards of different sizes
STATES = ("parameters_trainable", "parameters_frozen", "gradients", "optimizer_state")
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 346, "vocab_size": 2003}


@dataclass(frozen=True)
class Configuration:
    """One run: an engine (by its launch file), a number of processes, a method and its settings."""

    launch: str
    processes: int = 2
    method: str = "full"
    flags: dict[str, Any] = field(default_factory=dict)  # of TrainingArguments
    zero: dict[str, Any] = field(default_factory=dict)  # override the launch file's DeepSpeed JSON
    dtype: str = "float32"
    quantization: str = ""  # "nf4" (with double quantization) or "int8" of the frozen base
    sizes: dict[str, int] = field(default_factory=dict)  # of the model, override `SIZES`

    @property
    def name(self) -> str:
        """Unique within `GRID`."""
        own = [
            k if isinstance(v, dict) else f"{k}={v}"
            for k, v in (self.flags | self.zero).items()
            if k != "ddp_bucket_cap_mb"
        ]
        return " ".join(
            [self.launch, f"x{self.processes}", self.method, self.dtype, *filter(None, [self.quantization]), *own]
        )


BF16 = {"bf16": True}
# By default DeepSpeed keeps up to 1e9 weights in memory, and all parameters of less than 1 MiB.
WIDE = {"hidden_size": 1024, "num_hidden_layers": 2}
ON_DISK = {"device": "nvme", "nvme_path": "", "buffer_count": 24, "buffer_size": 1_100_000, "max_in_cpu": 0}
SMALL = {"stage3_max_live_parameters": 200_000, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
GRID = [
    Configuration("zero3", flags=BF16),
    Configuration("zero2", flags=BF16),
    Configuration("zero2_offload", flags=BF16),
    Configuration("zero3_offload", flags=BF16),
    Configuration("ddp", flags={"ddp_bucket_cap_mb": 1}),
    Configuration("fsdp2"),
    Configuration("zero1"),
    Configuration("zero3", 4),
    Configuration("zero3", zero=SMALL),
    Configuration("zero3", method="lora"),
    Configuration("zero2", 4),
    Configuration("fsdp2", 4),
    Configuration("zero2", method="lora"),
    Configuration("zero2", flags={"gradient_accumulation_steps": 2}),
    Configuration("fsdp2", method="lora"),
    Configuration("fsdp2", flags=BF16),
    Configuration("zero3", flags={"gradient_checkpointing": True}),
    Configuration("zero2", method="lora", flags=BF16, dtype="bfloat16", quantization="nf4"),
    Configuration("zero2", method="lora", quantization="int8"),
    Configuration("ddp", method="lora", flags={"ddp_bucket_cap_mb": 1}, quantization="nf4"),
    Configuration("ddp", method="lora", flags={"ddp_bucket_cap_mb": 1}, quantization="int8"),
    Configuration("zero1", method="lora", flags=BF16, dtype="bfloat16", quantization="nf4"),
    Configuration("zero1", method="lora", quantization="int8"),
    Configuration("zero3", method="lora", flags=BF16, dtype="bfloat16", quantization="nf4"),
    Configuration("fsdp2_qlora", method="lora", flags=BF16, dtype="bfloat16", quantization="nf4"),
    Configuration("zero2", flags={"fp16": True}),
    Configuration("zero3", method="lora", dtype="float16", flags={"fp16": True}),
    Configuration("sequence_parallel"),
    Configuration("sequence_parallel", method="lora", flags=BF16 | {"gradient_checkpointing": True}),
    Configuration("zero3_nvme", flags=BF16, zero={"offload_param": ON_DISK}, sizes=WIDE),
]


def launch_of(configuration: Configuration, folder: Path, rank: int) -> dict[str, str]:
    """The environment of `rank`. The configuration's own settings go into a copy of the DeepSpeed JSON in `folder`."""
    from toolkit.distributed.launch_files import read_launch_file

    env = read_launch_file(configuration.launch, configuration.processes).of_rank(rank)
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in env:
        settings = json.loads(Path(env["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text(encoding="utf-8"))
        settings["zero_optimization"] |= configuration.zero
        for name in ("offload_optimizer", "offload_param"):
            if "nvme_path" in settings["zero_optimization"].get(name, {}):
                settings["zero_optimization"][name] |= {"nvme_path": str(folder / "swap")}
        path = folder / "deepspeed.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    return env


def build(configuration: Configuration, base: Path | None = None) -> Any:
    """The whole model with its method; engines partition it later. On the meta device if that is the default device.

    A quantized base is loaded from the folder `base` (`save_base`), because quantization happens during loading. On the meta
    device it is not loaded.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from toolkit.distributed.deepspeed import without_partitioning
    from toolkit.models.meta import model_on_meta

    torch.manual_seed(0)
    config, dtype = AutoConfig.for_model("llama", **SIZES | configuration.sizes), getattr(torch, configuration.dtype)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if configuration.launch in ("zero3", "fsdp2_qlora"):
        nf4 |= {
            "bnb_4bit_quant_storage": dtype
        }  # as in `toolkit.models.loading`: sharded parameters must have one dtype
    kinds = {"nf4": nf4 | {"bnb_4bit_compute_dtype": dtype}, "int8": {"load_in_8bit": True}}
    with without_partitioning():
        if not configuration.quantization:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        elif base is None:
            quantization = BitsAndBytesConfig(**kinds[configuration.quantization])
            model = model_on_meta(AutoModelForCausalLM, config, dtype, quantization_config=quantization)
        else:
            options = {"quantization_config": BitsAndBytesConfig(**kinds[configuration.quantization])}
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": "cpu"}, **options)
        if configuration.method == "lora":
            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    return model


def save_base(configuration: Configuration, base: Path) -> None:
    """Saves the weights from which a quantized model is loaded."""
    build(replace(configuration, quantization="", method="full")).save_pretrained(base)


def arguments(configuration: Configuration, folder: Path) -> Any:
    """The training arguments, the same for the prediction and for the ranks."""
    from toolkit.config.arguments import TrainArguments

    settings = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    if configuration.flags.get("gradient_checkpointing"):
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainArguments(**settings, **configuration.flags)


def batches(configuration: Configuration) -> list[dict[str, Any]]:
    """One batch for each forward pass of each process: 2 rows of 32 tokens."""
    import torch

    from toolkit.data.shared_rows import SharedRows

    ids = torch.arange(64).reshape(2, 32) + 3
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if configuration.launch == "sequence_parallel":
        batch = SharedRows.with_positions(batch)
    return [batch] * (2 * configuration.flags.get("gradient_accumulation_steps", 1) * configuration.processes)


def trainer_of(model: Any, args: Any, configuration: Configuration, callback: Any) -> Any:
    """The trainer of a run over the configuration's batches."""
    from toolkit.distributed.request import requested_engine
    from toolkit.methods.full import Full
    from toolkit.runs.prediction import Batches, sequential_arguments
    from toolkit.training.trainer import FineTuner

    config = SimpleNamespace(training=sequential_arguments(args), engine=requested_engine(), method=Full())
    return FineTuner(model, config, Batches(batches(configuration)), [callback])


def predicted(configuration: Configuration, folder: Path, rank: int) -> Any:
    """The predicted ledger of `rank`."""
    import torch

    from toolkit.memory.shadow.simulated_rank import swapped_bytes, world
    from toolkit.memory.shadow.step import CPU, predict

    def on_meta() -> Any:
        with torch.device("meta"):
            return build(configuration)

    with world(launch_of(configuration, folder, rank)):
        args = arguments(configuration, folder)
        ledger = predict(on_meta, lambda m, a, callback: trainer_of(m, a, configuration, callback), args, CPU)
        return replace(ledger, nvme_bytes=swapped_bytes())


def measured_by(rank: int, configuration: Configuration, folder: Path, port: int) -> None:
    """One real rank: trains two steps and writes its ledger to `folder`."""
    from accelerate.state import AcceleratorState
    from deepspeed.accelerator import get_accelerator

    from toolkit.distributed.request import requested_engine
    from toolkit.distributed.running import EngineCheck
    from toolkit.memory.measure import MemoryCallback
    from toolkit.memory.shadow import simulated_rank
    from toolkit.memory.shadow.step import keep_only
    from toolkit.runs import preflight

    os.environ.update(launch_of(configuration, folder, rank))
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    AcceleratorState.__init__ = simulated_rank.begin_as_on_gpus(AcceleratorState.__init__)
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed checks for instructions that only some CPUs have
    args = arguments(configuration, folder)
    engine = requested_engine()
    preflight.check_fsdp = lambda *_: None  # which accelerate runs on GPUs only; here CPUs stand in for them
    preflight.check_engine(engine, args)
    memory = MemoryCallback()
    with simulated_rank.uncompiled_adam(), simulated_rank.uncompiled_disk(real_files()):
        trainer = trainer_of(build(configuration, folder / "base"), args, configuration, memory)
        keep_only(trainer, memory)
        trainer.add_callback(EngineCheck(trainer, engine))
        trainer.train()
    memory.ledger.save(folder / f"rank{rank}.json")
    torch_distributed = sys.modules["torch.distributed"]
    torch_distributed.barrier()
    torch_distributed.destroy_process_group()


def real_files() -> type:
    """A replacement for DeepSpeed's compiled disk handle that writes real files."""
    from toolkit.memory.shadow.simulated_rank import Disk

    class Files(Disk):
        def async_pwrite(self, tensor: Any, path: str, offset: int) -> int:
            tensor.detach().view(torch.uint8).numpy().tofile(path)
            return super().async_pwrite(tensor, path, offset)

        def async_pread(self, tensor: Any, path: str, offset: int) -> int:
            nbytes = tensor.numel() * tensor.element_size()
            tensor.detach().view(torch.uint8).numpy()[:] = numpy.fromfile(path, dtype=numpy.uint8, count=nbytes)
            return super().async_pread(tensor, path, offset)

    import numpy
    import torch

    return Files


def measured(configuration: Configuration, folder: Path) -> list[Any]:
    """The measured ledgers of all ranks.

    Raises: RuntimeError if a rank fails; its traceback is on stderr.
    """
    from toolkit.memory.ledger import Ledger

    if configuration.quantization:
        in_children([lambda: save_base(configuration, folder / "base")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = in_children(
        [lambda rank=rank: measured_by(rank, configuration, folder, port) for rank in range(configuration.processes)]
    )
    if any(codes):
        raise RuntimeError(f"{configuration.name}: the ranks ended with {codes}")
    return [Ledger.load(folder / f"rank{rank}.json") for rank in range(configuration.processes)]


def in_children(tasks: Iterable[Any]) -> list[int]:
    """Runs all tasks at the same time, each in a fork of this process; returns their exit codes."""
    children = []
    for task in tasks:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                task()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def states(ledger: Any) -> dict[str, int]:
    """Bytes of the model states in the steady step: for each state, the phase that has the most of it."""
    phases = [use.categories for name, use in ledger.phases.items() if name != "load"]
    return {name: max(phase[name] for phase in phases) for name in STATES}


def compared(before: Any, after: Any) -> dict[str, Any]:
    """Compares a predicted and a measured ledger: states and peaks in bytes, errors in percent of the measured value."""

    def percent(a: int, b: int) -> float:
        return round(100 * (a / b - 1), 4) if b else float(a != b)

    names = [*after.phases]
    return {
        "states_bytes": {"predicted": states(before), "measured": states(after)},
        "communication_bytes": {
            name: [ledger.phases[name].categories["communication"] for ledger in (before, after)] for name in names
        },
        "peak_bytes": {"predicted": before.allocated_bytes, "measured": after.allocated_bytes},
        "host_bytes": {"predicted": before.host_bytes, "measured": after.host_bytes},
        "nvme_bytes": {"predicted": before.nvme_bytes, "measured": after.nvme_bytes},
        "error_percent": {
            "states": percent(sum(states(before).values()), sum(states(after).values())),
            "peak": percent(before.allocated_bytes, after.allocated_bytes),
            "host": percent(before.host_bytes, after.host_bytes),
            "nvme": percent(before.nvme_bytes, after.nvme_bytes),
            **{
                name: percent(before.phases[name].allocated_peak_bytes, after.phases[name].allocated_peak_bytes)
                for name in names
            },
        },
    }


def estimated(configuration: Configuration) -> int | None:
    """DeepSpeed's own estimate of model states per GPU, in bytes; None for stages without an estimator."""
    import torch
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs, model_to_params
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if configuration.launch not in ("zero2", "zero3"):
        return None
    if configuration.quantization:
        return None  # the estimator assumes that all weights have one size
    model = build(configuration)
    total, largest = model_to_params(model)
    assert not any(p.device == torch.device("meta") for p in model.parameters())
    if configuration.launch == "zero2":
        return estimate_zero2_model_states_mem_needs(total, configuration.processes, cpu_offload=False)[1]
    return estimate_zero3_model_states_mem_needs(
        total, largest, configuration.processes, cpu_offload=False, cpu_offload_params=False, zero_init=True
    )[1]


def row(configuration: Configuration) -> dict[str, Any]:
    """One configuration, predicted and measured on all of its ranks."""
    from toolkit.memory.ledger import Ledger

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        last = configuration.processes - 1
        before = {}
        for rank in (0, last) if configuration.launch in UNEVEN else (0,):
            path = folder / f"predicted{rank}.json"
            (code,) = in_children([lambda rank=rank, path=path: predicted(configuration, folder, rank).save(path)])
            if code:
                raise RuntimeError(f"{configuration.name}: not predicted")
            before[rank] = Ledger.load(path)
        ranks = measured(configuration, folder)
        return {
            "name": configuration.name,
            "launch": configuration.launch,
            "processes": configuration.processes,
            "ranks": [{"rank": rank, **compared(before.get(rank, before[0]), ranks[rank])} for rank in (0, last)],
            "deepspeed_estimate_bytes": estimated(configuration),
            "stack": dict(ranks[0].stack),
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By launch file, over all ranks: the largest error of states and peak, and of DeepSpeed's states, in percent."""
    found: dict[str, dict[str, float]] = {}
    for entry in rows:
        own = found.setdefault(entry["launch"], {"states": 0.0, "peak": 0.0})
        for rank in entry["ranks"]:
            for name in ("states", "peak"):
                own[name] = max(own[name], abs(rank["error_percent"][name]))
            if entry["deepspeed_estimate_bytes"] is not None:
                whole = sum(rank["states_bytes"]["measured"].values())
                error = round(100 * abs(entry["deepspeed_estimate_bytes"] / whole - 1), 1)
                own["deepspeed_states"] = max(own.get("deepspeed_states", 0.0), error)
    return found


def main() -> int:
    """Runs the grid and writes the results; `--show` prints the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true")
    parser.add_argument(
        "--only", nargs="+", help="only the configurations with these names; prints their rows and writes nothing"
    )
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.only is not None:
        print(json.dumps([row(configuration) for configuration in GRID if configuration.name in args.only]))
        return 0
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": []}
    done = {entry["name"] for entry in result["rows"]}
    for configuration in GRID if not args.show else ():
        if configuration.name not in done:
            result["rows"].append(row(configuration))
            result["date"] = datetime.date.today().isoformat()
            result["deepspeed"] = importlib.metadata.version("deepspeed")
            result["summary_percent"] = summary(result["rows"])
            RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            errors = [rank["error_percent"] for rank in result["rows"][-1]["ranks"]]
            print(configuration.name, *[f"states {e['states']} %, peak {e['peak']} %" for e in errors], flush=True)
    print(json.dumps(result["summary_percent"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The host's memory and the disks that a run needs, from its flags and from the model that the shadow steps leave.

Exact within 2 % are adapters, weights and optimizer state in checkpoints of one process and DDP (tests/test_resources.py). Estimates:
the process itself, rows and workers, and checkpoints of ZeRO and FSDP2. Not counted: what CUDA's driver and NCCL take of the host's
memory, and completions.csv.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import constants, try_to_load_from_cache
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedConfig

from toolkit.config import Config
from toolkit.distributed.engine import EngineKind
from toolkit.memory.ledger import Ledger
from toolkit.memory.resources import CACHE_DISK, HOST, RUN_DISK, Line, Resource
from toolkit.runs import machine
from toolkit.training.trainer import FineTuner
from toolkit.units import KIB, MIB

# Python with PyTorch, transformers and PEFT, without a model: 384 MiB of its own, measured with torch 2.13
PROCESS_BYTES = 400 * MIB
WORKER_BYTES = 16 * MIB  # a data loader's worker: it shares its parent's memory; 10 to 11 MiB of its own, measured
# beside each tensor's data, in safetensors and in torch.save; measured
TENSOR_BYTES = {"weights": 128, "optimizer": 272}
CHECKPOINT_BYTES = 30 * KIB  # configs, scheduler, random states and manifest; measured
RUN_BYTES = 150 * KIB  # config, memory ledgers, metrics and model card; measured
# Types of models of the catalogue, which does not know how a checkpoint is stored, whose authors published float32; others have 16 bits
PUBLISHED_IN_FLOAT32 = ("bart", "gpt2", "mbart", "mt5", "pegasus", "t5")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "spiece.model", "*.tiktoken")


@dataclass(frozen=True)
class LongestRows:
    """How long the rows are: the most tokens of a row, and the most of a row that have labels (0: no target)."""

    train: tuple[int, int]
    validation: tuple[int, int]
    prompt: int  # the most tokens of a text that is answered
    new_tokens: int  # of its answer
    origin: str  # where they come from, in words
    rows: int | None = None  # to train on; None: they were not read
    rows_bytes: int | None = None  # of all rows as token ids in memory


@dataclass(frozen=True)
class Saved:
    """What a run writes of its model: bytes of data and numbers of tensors."""

    weights: int
    weight_tensors: int
    optimizer: int
    optimizer_tensors: int

    @property
    def weight_bytes(self) -> int:
        """The size of the file or files of weights."""
        return self.weights + TENSOR_BYTES["weights"] * self.weight_tensors

    @property
    def optimizer_bytes(self) -> int:
        """The size of optimizer.pt."""
        return self.optimizer + TENSOR_BYTES["optimizer"] * self.optimizer_tensors

    @classmethod
    def of(cls, trainer: FineTuner) -> "Saved":
        """What `trainer` writes, after a step."""
        model, engine = trainer.model, trainer.config.engine.kind
        weights, trained = list(model.parameters()), {n: p for n, p in model.named_parameters() if p.requires_grad}
        if isinstance(model, PeftModel):
            # "auto" would ask the hub for the base's vocabulary
            weights = list(get_peft_model_state_dict(model, trained, save_embedding_layers=False).values())
        if engine.is_zero:  # in fp32: a copy of the weights, and two moments
            optimizer, tensors = 12 * sum(map(_numel, trained.values())), 3 * len(trained)
        else:
            parts = [one for state in trainer.optimizer.state.values() for one in state.values()]
            found = {id(part): part for part in parts if isinstance(part, torch.Tensor)}  # those that are shared, once
            optimizer, tensors = _bytes(found.values()), len(found)
        return cls(_bytes(weights), len(weights), optimizer, tensors)


def _numel(tensor: torch.Tensor) -> int:
    """All elements, of which ZeRO-3 leaves this process none, and FSDP2 a shard."""
    return getattr(tensor, "ds_numel", tensor.numel())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(_numel(tensor) * tensor.element_size() for tensor in tensors)


def needed_resources(
    config: Config,
    model_config: PreTrainedConfig,
    ledger: Ledger,
    saved: Saved,
    weights: int,
    rows: LongestRows,
    on_cpu: bool,
) -> tuple[Resource, ...]:
    """Host memory and disks of one machine, without budgets.

    Args:
        ledger: of one process, without resources.
        weights: number of weights of the model as it is loaded.
        on_cpu: whether the run computes on CPUs, so that the ledger's memory is the host's.
    """
    host = _host(config, model_config, ledger, saved, weights, rows.rows_bytes, on_cpu)
    caches = _caches(config, model_config, weights, rows.rows_bytes)
    folder = _run_folder(config, ledger, saved, rows.rows)
    return (Resource(HOST, host), Resource(CACHE_DISK, caches), Resource(RUN_DISK, folder))


def with_budgets(
    resources: tuple[Resource, ...], here: Config | None, host_bytes: int | None = None, disk_bytes: int | None = None
) -> tuple[Resource, ...]:
    """The resources with what there is of them: `host_bytes`, and `disk_bytes` for all folders together.

    For those that are None it is what this machine has free now, if the run is `here`; what its caches hold is then not counted.
    """
    if not resources:
        return ()
    host, caches, folder = resources
    if here and host_bytes is None:
        host_bytes = machine.host_memory().available_bytes
    host = replace(host, budget_bytes=host_bytes)
    cache, output = Path(constants.HF_HUB_CACHE), Path(here.training.output_dir if here else "")
    if here and _is_cached(here):
        caches = replace(caches, lines=tuple(line for line in caches.lines if line.name != "model files"))
    if disk_bytes is not None:
        return host, Resource("disk", caches.lines + folder.lines, disk_bytes)
    if here is None:
        return host, caches, folder
    try:
        free, of_caches = (machine.disk(place).free_bytes for place in (output, cache))
        together = machine.same_disk(cache, output)
    except OSError:  # they cannot be read
        return host, caches, folder
    if together:
        return host, Resource("disk", caches.lines + folder.lines, free)
    return host, replace(caches, budget_bytes=of_caches), replace(folder, budget_bytes=free)


def _is_cached(config: Config) -> bool:
    """Whether the hub's cache already holds the weights."""
    if config.model.is_local:
        return False
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    found = (try_to_load_from_cache(config.model.source, name, revision=config.model.model_revision) for name in names)
    return any(isinstance(one, str) for one in found)


def _host(
    config: Config,
    model_config: PreTrainedConfig,
    ledger: Ledger,
    saved: Saved,
    weights: int,
    rows_bytes: int | None,
    on_cpu: bool,
) -> tuple[Line, ...]:
    training, local = config.training, config.launch.processes // config.launch.machines
    each = f", for each of {local} processes" if local > 1 else ""
    lines = [Line("processes", PROCESS_BYTES * local, f"Python and its libraries{each}; an estimate")]
    if on_cpu:
        lines.append(Line("training", ledger.needed_bytes * local, f"the ledger's own memory{each}", "training"))
    stored, packs = _stored_dtype(config, model_config), config.model.load_in_4bit or config.model.load_in_8bit
    if stored != config.dtype and not packs and not (on_cpu or config.engine.kind is EngineKind.ZERO_3):
        cast = weights * config.dtype.itemsize
        words = f"weights cast from {_word(stored)} to {_word(config.dtype)} before they go to the card{each}"
        lines.append(Line("loading", cast * local, f"{words}; those of the file are mapped, not copied", "loading"))
    if ledger.host_bytes:
        lines.append(
            Line("offloaded", ledger.host_bytes, "activations or model states, with their buffers", "training")
        )
    if rows_bytes is not None:
        lines.append(Line("rows", rows_bytes * local, f"tokenized rows{each}"))
    if workers := training.dataloader_num_workers:
        batch = 24 * ledger.assumed["rows"] * ledger.assumed["tokens"] * (training.dataloader_prefetch_factor or 2)
        words = f"{workers} data loader workers and the batches that they prepare{each}; an estimate"
        lines.append(Line("workers", (WORKER_BYTES + batch) * workers * local, words, "training"))
    if not on_cpu:
        words = "a copy of the saved weights while they are written, by the first process"
        lines.append(Line("saving", saved.weights, words, "training"))
    return tuple(lines)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_dtype(config: Config, model_config: PreTrainedConfig) -> torch.dtype:
    """The type of the checkpoint's weights: as its file says, or its config, or as usual for models of this type."""
    folder = Path(config.model.source).expanduser()
    for file in sorted(folder.glob("*.safetensors")) if config.model.is_local else []:
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                return {"F32": torch.float32, "F16": torch.float16}.get(
                    stream.get_slice(name).get_dtype(), torch.bfloat16
                )
    if isinstance(model_config.dtype, torch.dtype):
        return model_config.dtype
    return torch.float32 if model_config.model_type in PUBLISHED_IN_FLOAT32 else torch.bfloat16


def _caches(config: Config, model_config: PreTrainedConfig, weights: int, rows_bytes: int | None) -> tuple[Line, ...]:
    lines = []
    if not config.model.is_local and not config.model.random_weights:
        stored = _stored_dtype(config, model_config)
        words = f"{config.model.source} in {_word(stored)}, in {constants.HF_HUB_CACHE}"
        lines.append(Line("model files", weights * stored.itemsize, words))
    if rows_bytes is not None:
        words = f"tokenized rows for the next run, at most, in {datasets.config.HF_DATASETS_CACHE}"
        lines.append(Line("token cache", rows_bytes, words))
    return tuple(lines)


def _run_folder(config: Config, ledger: Ledger, saved: Saved, rows: int | None) -> tuple[Line, ...]:
    training, kind = config.training, config.engine.kind
    source = Path(config.model.tokenizer_name or config.model.source).expanduser()
    files = {file for pattern in TOKENIZER for file in source.glob(pattern)} if source.is_dir() else set()
    tokenizer = sum(file.stat().st_size for file in files)
    size = saved.weight_bytes + tokenizer + CHECKPOINT_BYTES
    whole, in_shards = not training.save_only_model, kind.is_zero or kind is EngineKind.FSDP2
    if whole:
        size += saved.optimizer_bytes
        if in_shards:  # these engines write their own copy of the trained weights beside the model's files
            size += saved.weights
    lines = [
        Line("run folder", saved.weight_bytes + tokenizer + RUN_BYTES, "the trained weights and the run's reports")
    ]
    number = _checkpoints_at_once(training, rows, config.engine.processes)
    if number:
        state = "weights, optimizer state" if whole else "weights"
        estimate = "; an estimate" if in_shards else ""
        words = f"{number} at once of {size:,} bytes: {state}, tokenizer{estimate}"
        lines.append(Line("checkpoints", number * size, words))
    if ledger.nvme_bytes:
        lines.append(Line("offloaded", ledger.nvme_bytes, "model states and their buffers"))
    return tuple(lines)


def _checkpoints_at_once(training: Any, rows: int | None, processes: int) -> int:
    """The most checkpoints that are there at once: those that are kept, and one more, which is written before the oldest is deleted."""
    strategy = str(getattr(training.save_strategy, "value", training.save_strategy))
    if strategy == "no":
        return 0
    kept = training.save_total_limit
    if kept == 1 and training.load_best_model_at_end:
        kept = 2  # the best and the newest
    rows_a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    epoch = None if rows is None else math.ceil(rows / rows_a_step)  # steps
    steps = training.max_steps if training.max_steps > 0 else epoch and math.ceil(epoch * training.num_train_epochs)
    if strategy == "epoch":
        saves = (
            math.ceil(training.num_train_epochs) if training.max_steps <= 0 else steps and epoch and -(-steps // epoch)
        )
    elif training.save_steps < 1:
        saves = math.ceil(1 / training.save_steps)
    else:
        saves = steps and math.ceil(steps / training.save_steps)
    most = [number for number in (saves, kept and kept + 1) if number]
    return min(most, default=1)

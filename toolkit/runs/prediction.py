"""Memory before the run: the ledger of the training that a `Config` describes, found without weights, data or GPU."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from toolkit.config import Config, Flags, configure, read_flags
from toolkit.console import console, is_main, say
from toolkit.data.loading import label_names, lengths
from toolkit.data.shared_rows import SharedRows, shared_length
from toolkit.distributed.deepspeed import without_partitioning
from toolkit.distributed.engine import EngineKind
from toolkit.distributed.launch_files import LaunchEnvironment
from toolkit.distributed.ranks import broadcast_from_main
from toolkit.errors import LESS_MEMORY, UserError
from toolkit.memory.cuda.cards import Card, card_of_device
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.ledger import Ledger, LedgerError
from toolkit.memory.measure import MemoryCallback
from toolkit.memory.report import print_comparison, print_ledger
from toolkit.memory.shadow.simulated_rank import processes, swapped_bytes, world
from toolkit.memory.shadow.step import CPU, STEPS, Device, predict
from toolkit.memory.trace import Sink
from toolkit.methods import METHODS
from toolkit.models import catalogue
from toolkit.models.heads import has_head, set_head
from toolkit.models.loading import build_on_meta
from toolkit.models.quantization import Packed
from toolkit.runs.preflight import check_combination
from toolkit.training.trainer import FineTuner
from toolkit.units import format_bytes

Batch = dict[str, torch.Tensor]
PREDICTED = (EngineKind.DDP, EngineKind.ZERO_1, EngineKind.ZERO_2, EngineKind.ZERO_3, EngineKind.FSDP2)
UNMARKED = 5  # a token that no tokenizer in use gives to padding, to a beginning or to an end


def predict_run(
    config: Config, device: Device = CPU, batches: list[Batch] | None = None, sinks: Sequence[Sink] = ()
) -> Ledger:
    """The ledger of two optimizer steps over `batches` (one for each forward pass), by default over the worst batch.

    In a `simulated_rank.world` it is that of the world's rank, which takes those batches like every other. `sinks` listen to the
    trace of the steps.

    Raises: UserError for a model or an option whose memory cannot be predicted.
    """
    config = config if config.predict else replace(config, predict=True)  # so that no weights are needed
    training, engine = config.training, config.engine
    if not config.method.trains:
        raise UserError(f"{config.method.name} trains nothing, so there is no training step to predict")
    model_config = config.model_config
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError("a checkpoint that is already quantized cannot be predicted; name the original model")
    if config.task.model_kind == "head":
        data = config.data
        names = label_names(data.dataset_name, data.dataset_config_name, data.columns["label_column"])
        set_head(model_config, names, model_config.pad_token_id or 0)
    _refuse_unpredicted(config)
    check_combination(config)
    passes = STEPS * training.gradient_accumulation_steps
    batches = batches or [worst_batch(config, model_config, engine.sequence_parallel_size)] * passes
    batches = [batch for batch in batches for _ in range(processes())]  # ranks take turns

    warnings: set[str] = set()

    def build() -> PreTrainedModel:
        model = build_on_meta(config.model, model_config, config.dtype, sharded=engine.kind.shards_parameters)
        packed = Packed.of(model)
        if packed.packed and (warning := packed.warning(config.dtype)):
            warnings.add(warning)
        if not config.model.random_weights:  # which are made from the config alone, as this model is
            catalogue.separate_head(model, config.model.source)
        with torch.device("meta"), without_partitioning():
            return config.method.attach(model)

    def trainer(model: PreTrainedModel, arguments: TrainingArguments, callback: MemoryCallback) -> FineTuner:
        return FineTuner(model, replace(config, training=of_batches(arguments)), Batches(batches), [callback])

    try:
        ledger = predict(build, trainer, training, device, config.as_dict(), sinks)
    except LedgerError:
        raise
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # a model's or an engine's on fake tensors; DeepSpeed asserts where buffers are too few, and so would a run
        where = "" if engine.kind is EngineKind.NONE else f" under {engine}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"memory of {config.method.name}{where} cannot be predicted: {type(error).__name__}: {reason}"
        ) from error
    notes = ledger.notes + tuple(warnings)
    if engine.kind is not EngineKind.NONE and device is not CPU:
        notes += ("what NCCL and other streams hold is not counted: it was not measured",)
        if ledger.host_bytes:
            notes += ("pinned host memory is counted as asked for; PyTorch may round each buffer up to a power of two",)
    if device is not CPU and "paged" in config.optimizer:
        notes += ("a paged optimizer's state is counted as on the card, from which the driver can move it to the host",)
    return replace(ledger, processes=processes(), engine=str(engine.kind), nvme_bytes=swapped_bytes(), notes=notes)


@dataclass(frozen=True)
class PredictionJob:
    """A recipe under a launch file: what is needed to predict it, in any process."""

    method: str
    flags: Flags  # of the recipe
    launch: LaunchEnvironment
    card: Card | None = None  # None: the processes compute on CPUs
    batches: list[Batch] | None = None  # of rank 0, whose ledger is meant then; else that of the rank that needs most

    @classmethod
    def of(cls, method: str, argv: Sequence[str], launch: LaunchEnvironment, card: Card | None, **others: Any) -> Self:
        """That of a command line, without the program's name.

        Raises: UserError for an unknown flag, a missing or a mistyped value.
        """
        return cls(method, read_flags(METHODS[method], argv), launch, card, **others)

    def predict(self) -> Ledger:
        """The ledger of one rank.

        Under ZeRO-1 and ZeRO-2 the last rank needs most: it keeps the gradients of the last layers, which come first in the
        backward pass, when most activations are still there. Else ranks differ by padding alone, and none has more than the first.

        Raises: UserError for what cannot be predicted or is no configuration.
        """
        device = CPU if self.card is None else Cuda(self.card)
        method, engine = METHODS[self.method], self.launch.engine
        if engine.kind is EngineKind.NONE:
            return predict_run(configure(method, self.flags, self.card), device, self.batches)
        with world(self.launch.of_rank(0)):
            config = configure(method, self.flags, self.card)
        last = engine.kind in (EngineKind.ZERO_1, EngineKind.ZERO_2) and self.batches is None
        with world(self.launch.of_rank(self.launch.processes - 1 if last else 0)):
            return predict_run(config, device, self.batches)

    def predict_apart(self) -> Ledger:
        """`predict` in a process of its own that sees no GPU: a rank has a process group already, and engines use GPUs they see.

        Raises: UserError as `predict` does, and where that process comes to another end.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "job").write_bytes(pickle.dumps(self))
            command = [sys.executable, "-P", "-c", f"from {__name__} import run_job; run_job({name!r})"]
            env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if (folder / "ledger.json").exists():
                return Ledger.load(folder / "ledger.json")
            if (folder / "refused").exists():
                raise UserError((folder / "refused").read_text(encoding="utf-8"))
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"the process that predicts ended with {done.returncode}: {said[-1][:200]}")


def run_job(folder: str) -> None:
    """The other end of `PredictionJob.predict_apart`: leaves a ledger, or why there is none, in its folder."""
    job = pickle.loads((Path(folder) / "job").read_bytes())
    try:
        job.predict().save(Path(folder) / "ledger.json")
    except UserError as error:
        (Path(folder) / "refused").write_text(str(error), encoding="utf-8")


def _refuse_unpredicted(config: Config) -> None:
    """Raises UserError for engines and their options whose memory the shadow step does not know."""
    engine = config.engine
    if processes() == 1 and engine.kind is EngineKind.NONE:
        return
    if engine.kind not in PREDICTED:
        raise UserError(f"memory under {engine.kind} is not predicted; DDP, ZeRO-1 to ZeRO-3 and FSDP2 are")
    if engine.offloads and engine.kind is EngineKind.FSDP2:
        raise UserError(f"memory under {engine} is not predicted yet; --launch zero3_offload is")
    optim = config.optimizer
    if engine.offloads and not optim.startswith("adamw_torch"):
        raise UserError(f"--optim {optim}: memory of an offloaded optimizer is predicted for adamw_torch_fused alone")


def worst_batch(config: Config, model_config: PreTrainedConfig, sequence_parallel_size: int = 1) -> Batch:
    """`per_device_train_batch_size` rows of `max_length` real tokens; ids, masks and labels are (rows, length), int64.

    All rows but the first end in one token of padding, as rows of unequal length do: with a mask, kernels for attention need more.
    For T5-like models the labels are `max_target_length` long, and the decoder's inputs go with them; for a head they
    are (rows,), and each text ends with its one end-of-text token, which some heads look for. Where `sequence_parallel_size`
    share the tokens of a row, it is as `SharedRows` collates it.

    Raises: UserError for a length beyond the model's positions.
    """
    rows = config.training.per_device_train_batch_size
    length, target_length, _ = lengths(config.data, model_config, virtual_tokens=config.method.virtual_tokens)
    length = shared_length(length, sequence_parallel_size)
    ids = torch.full((rows, length), UNMARKED)
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    if has_head(model_config):
        ids[:, -1] = model_config.eos_token_id or UNMARKED
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if model_config.is_encoder_decoder:
        labels = torch.full((rows, target_length), UNMARKED)
        batch |= {"labels": labels, "decoder_input_ids": labels.clone()}
    return batch if sequence_parallel_size == 1 else SharedRows.with_positions(batch)


def _whole_rows(batch: Batch, sequence_parallel_size: int) -> Batch:
    """A batch of as long rows as the one was that a rank was given `batch` of: its share of the tokens (rows, length / processes)."""
    if sequence_parallel_size == 1:
        return batch
    names = ("input_ids", "labels")
    return SharedRows.with_positions({name: batch[name].repeat(1, sequence_parallel_size) for name in names})


@dataclass(frozen=True)
class Batches:
    """Batches that are collated already, as a `FineTuner` reads them: each is a row of its data set, and nothing is saved."""

    train: list[Batch]
    validation: None = None
    tokenizer: None = None
    train_fingerprint: str = ""
    is_collated: bool = True

    def collator(self, model: PreTrainedModel, sequence_parallel_size: int = 1) -> Any:
        """Takes one batch as it is."""
        return _single_batch


def of_batches(arguments: Any) -> Any:
    """A copy of a Trainer's `arguments` under which it takes `Batches` in their order, as they are."""
    changed = copy.copy(arguments)
    changed.train_sampling_strategy, changed.remove_unused_columns = "sequential", False
    return changed


def _single_batch(rows: list[Any]) -> Any:
    return {name: tensor.clone() for name, tensor in rows[0].items()}


def this_card() -> Card | None:
    """The GPU of this machine that this process would train on; None where there is none."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = (gpu.total_memory, torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved())
    return card_of_device(gpu.name, (gpu.major, gpu.minor), gpu.multi_processor_count, *memory)


def _predicted_here(config: Config, batches: list[Batch] | None = None) -> Ledger:
    """The ledger of the run that this process is, or is a rank of, on the device that it has."""
    card = this_card() if config.training.device.type == "cuda" else None
    if config.engine.kind is EngineKind.NONE:
        return predict_run(config, CPU if card is None else Cuda(card), batches)
    return PredictionJob(config.method.name, config.as_flags(), config.launch, card, batches).predict_apart()


def show_prediction(config: Config) -> None:
    """What `--predict` prints: the predicted ledger of the worst batch, instead of training.

    Raises: UserError where it cannot be predicted.
    """
    broadcast_from_main(lambda: print_ledger(console, _predicted_here(config)))


def say_prediction(config: Config) -> None:
    """One line before a run: what the worst batch will need, or why that cannot be known. Never stops a run."""
    if not is_main:
        return
    try:
        ledger = _predicted_here(config)
    except (UserError, LedgerError) as error:
        say("memory", f"not predicted: {error}")
        return
    worst = f"{ledger.peak_phase_name.replace('_', ' ')} of the longest batch"
    say("memory", f"{format_bytes(ledger.needed_bytes)} at the peak, predicted for the {worst} ({ledger.device})")
    if not ledger.fits and ledger.budget_bytes is not None:
        say("warning", f"that is more than the {format_bytes(ledger.budget_bytes)} of {ledger.device}; {LESS_MEMORY}")


def show_comparison(config: Config, memory: MemoryCallback) -> None:
    """After a run: the measured steps' ledger beside the one that is predicted for the very same batches."""
    if not is_main or memory.ledger is None or "labels" not in memory.batches[0]:
        return
    try:
        row = config.engine.sequence_parallel_size
        predicted = _predicted_here(config, [_whole_rows(batch, row) for batch in memory.batches])
        predicted.save(Path(config.training.output_dir) / "predicted_memory.json")
        print_comparison(console, predicted, memory.ledger)
    except (UserError, LedgerError) as error:
        say("memory", f"not predicted: {error}")

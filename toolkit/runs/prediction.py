"""Predicts the memory of the run that a `Config` describes, without weights, data or GPU."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from toolkit.config import Config, Flags, configure, read_flags
from toolkit.config.arguments import by_new_names
from toolkit.console import console, is_main, say
from toolkit.data.loading import guarded_rows, label_names, lengths, load_data
from toolkit.data.shared_rows import SharedRows, shared_length
from toolkit.distributed.deepspeed import without_partitioning
from toolkit.distributed.engine import EngineKind
from toolkit.distributed.launch_files import LaunchEnvironment
from toolkit.distributed.ranks import broadcast_from_main
from toolkit.errors import LESS_MEMORY, UserError
from toolkit.files import atomic_write
from toolkit.memory.cuda.cards import CARDS, Card, card_of_device
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.ledger import Ledger, LedgerError
from toolkit.memory.measure import COMPILED, MemoryCallback
from toolkit.memory.report import print_comparison, print_ledger
from toolkit.memory.risk import TIGHT
from toolkit.memory.shadow.simulated_rank import processes, swapped_bytes, world
from toolkit.memory.shadow.step import CPU, STEPS, Device, predict
from toolkit.memory.trace import Sink
from toolkit.methods import METHODS, Method
from toolkit.methods.base import PeftBased
from toolkit.models import catalogue
from toolkit.models.arguments import FLASH_ATTENTION, looks_like_path
from toolkit.models.heads import has_head, set_head
from toolkit.models.hub import TOKENIZER_FILE, check_reachable
from toolkit.models.loading import LANGUAGE_PART, ORDINARY_TOKEN_ID, build_on_meta, is_multimodal, load_tokenizer
from toolkit.models.losses import IGNORE_INDEX
from toolkit.models.meta import attention_without_its_package
from toolkit.models.quantization import Packed, untrained_experts
from toolkit.runs.beside_steps import beside_steps
from toolkit.runs.machine import driver_moves_to_host
from toolkit.runs.preflight import check_checkpointing, check_combination, check_loss_chunks, check_packing
from toolkit.runs.resources import LongestRows, Saved, needed_resources, with_budgets
from toolkit.training.checkpoints import readable_write_errors
from toolkit.training.trainer import FineTuner
from toolkit.units import format_bytes

Batch = dict[str, torch.Tensor]
UNCOMPILED = (
    "the figures are those without --torch_compile, an upper bound: fused operators need fewer temporaries, and compiled graphs keep "
    "fewer activations; not counted: matrices that Inductor pads, and what compiling itself takes for a while"
)
SUPPORTED_ENGINES = (EngineKind.DDP, EngineKind.ZERO_1, EngineKind.ZERO_2, EngineKind.ZERO_3, EngineKind.FSDP2)
MOST_TOKENS = 20_000_000  # in a batch: its ids, mask and labels are held on this machine, 24 bytes a token
MOST_PASSES = 32  # of a step are traced: each takes 1 to 3 seconds for a model of 1 to 8 B
SHORTEST = 64  # the fewest tokens that `nearest_fit` tries


def predict_run(
    config: Config,
    device: Device = CPU,
    batches: list[Batch] | None = None,
    sinks: Sequence[Sink] = (),
    reads_data: bool = False,
) -> Ledger:
    """The ledger of two optimizer steps over `batches` (one for each forward pass), by default over the worst batch.

    With `reads_data` the worst batch has rows as long as the longest of --dataset_name; without it, or without that flag, as long
    as the flags allow.

    Inside `simulated_rank.world` it is the ledger of that rank; every rank gets the same batches. `sinks` receive the trace of
    the steps.

    Raises: UserError for a model or an option whose memory cannot be predicted.
    """
    config = config if config.predict else replace(config, predict=True)  # predict=True needs no weights
    training, engine = config.training, config.engine
    if not config.method.trains:
        raise UserError(f"{config.method.name} trains nothing, so there is no training step to predict")
    model_config = copy.deepcopy(config.model_config)  # `set_head` below changes it
    if config.task.model_kind == "head":
        data = config.data
        names = label_names(data.dataset_name, data.dataset_config_name, data.columns["label_column"], data.encoding)
        set_head(model_config, names, model_config.pad_token_id or 0)
    _refuse_unpredicted(config, device)
    check_combination(config)
    accumulated, assumed, left_out = training.gradient_accumulation_steps, {}, ""
    beside: Callable[[], Mapping[str, Callable[[Any], object]]] = dict
    longest: LongestRows | None = None
    saved: list[Saved] = []
    loaded_weights = 0
    settings = config.as_dict()
    if batches and accumulated > MOST_PASSES:
        raise UserError(f"measured steps of more than {MOST_PASSES} accumulated passes take too long to predict again")
    if not batches:
        longest = _longest_rows(config, model_config, reads_data)
        worst = worst_batch(config, model_config, longest.train)
        assumed = _assumed(config, worst, longest.origin)
        validated = worst_batch(_as_evaluated(config), model_config, longest.validation)
        parts = (config, validated, longest.prompt, longest.new_tokens, device is CPU, saved.append)
        beside = partial(beside_steps, *parts)
        if accumulated > MOST_PASSES:
            _check_passes(config)
            ids = (accumulated - MOST_PASSES) * sum(tensor.nbytes for tensor in worst.values())
            left_out = f"{MOST_PASSES} of {accumulated} passes were traced; each other one needs only its batch, {format_bytes(ids)} for all"
            training = copy.copy(training)
            training.gradient_accumulation_steps = accumulated = MOST_PASSES
            config = replace(config, training=training)
        batches = [worst] * STEPS * accumulated
    batches = [batch for batch in batches for _ in range(processes())]  # the data loader deals batches to ranks in turn

    warnings = dict.fromkeys([LANGUAGE_PART] if is_multimodal(config.model) else [])  # a set that keeps its order

    def build() -> PreTrainedModel:
        nonlocal loaded_weights
        model = build_on_meta(config.model, model_config, config.dtype, sharded=engine.kind.shards_parameters)
        check_checkpointing(config, model, on_cpu=device is CPU)
        check_loss_chunks(config.training, model)
        check_packing(config, model)
        loaded_weights = sum(weight.numel() for weight in model.parameters())
        packed = Packed.of(model)
        if packed.packed and (warning := packed.warning(config.beside_packed)):
            warnings[warning] = None
        if assumed:
            assumed["weights"] = packed.in_words(config.model, config.beside_packed)
        if not config.model.random_weights:  # a model with random weights has no checkpoint to take a head from
            catalogue.separate_head(model, config.model.source)
        with torch.device("meta"), without_partitioning():
            tuned = config.method.attach(model)
        if warning := untrained_experts(tuned):
            warnings[warning] = None
        return tuned

    def trainer(model: PreTrainedModel, arguments: TrainingArguments, callback: MemoryCallback) -> FineTuner:
        same = replace(config, training=sequential_arguments(arguments))
        return FineTuner(model, same, Batches(batches), [callback], compiles=config.training.torch_compile)

    try:
        with attention_without_its_package():
            ledger = predict(build, trainer, training, device, settings, sinks, beside)
    except LedgerError:
        raise
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # From a model or an engine on fake tensors. DeepSpeed asserts if there are too few buffers; a real run would too.
        where = "" if engine.kind is EngineKind.NONE else f" under {engine}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"memory of {config.method.name}{where} cannot be predicted: {type(error).__name__}: {reason}"
        ) from error
    notes = ledger.notes + ((left_out,) if left_out else ())
    if engine.kind is not EngineKind.NONE and device is not CPU:
        notes += ("memory of NCCL and of other streams is not counted, because it was not measured",)
        if ledger.host_bytes:
            notes += ("pinned host memory is counted as requested; PyTorch may round each buffer up to a power of two",)
    if device is not CPU and "paged" in config.optimizer:
        notes += (
            "a paged optimizer's state is not in the peak: the driver keeps it in the card's free memory or on the host",
        )
    if training.torch_compile:
        notes += (UNCOMPILED,)
    if config.optimizer in COMPILED:
        notes += (
            "the optimizer's step is compiled: counted are both moments of one weight in float32, which not every version keeps",
        )
    if device is not CPU and config.optimizer.startswith("galore"):
        notes += ("the workspace in which cuSOLVER finds GaLore's projections is not counted",)
    ledger = replace(ledger, processes=processes(), engine=str(engine.kind), nvme_bytes=swapped_bytes())
    if isinstance(device, Cuda):
        ledger = replace(ledger, error_group=_error_group(config, device.card), spills=device.card.spills)
    ledger = replace(ledger, notes=notes, warnings=tuple(warnings), assumed=assumed)
    if longest is None or not saved:
        return ledger
    needed = needed_resources(config, model_config, ledger, saved[0], loaded_weights, longest, device is CPU)
    return replace(ledger, resources=needed)


def _error_group(config: Config, card: Card) -> tuple[str, ...]:
    """What the errors of predictions depend on, as `toolkit.memory.risk` groups them; of a card that is only a size, just the method."""
    quantized = config.model.load_in_4bit or config.model.load_in_8bit
    method = "quantized" if quantized else "adapter" if config.method.freezes_base else "full"
    return (method,) if card.is_generic else (method, card.architecture, config.model.attn_implementation or "sdpa")


@dataclass(frozen=True)
class PredictionJob:
    """A recipe under a launch file: everything that any process needs to predict it."""

    method: str
    flags: Flags  # of the recipe
    launch: LaunchEnvironment
    card: Card | None = None  # None: the processes compute on CPUs
    batches: list[Batch] | None = None  # of rank 0, which is then predicted; None: the rank that needs the most memory
    reads_data: bool = False  # whether rows are as long as the longest of --dataset_name

    @classmethod
    def of(cls, method: str, argv: Sequence[str], launch: LaunchEnvironment, card: Card | None, **others: Any) -> Self:
        """The job of a command line, without the program's name.

        Raises: UserError for an unknown flag, a missing or a mistyped value.
        """
        return cls(method, read_flags(METHODS[method], argv), launch, card, **others)

    def predict(self) -> Ledger:
        """The ledger of one rank.

        Under ZeRO-1 and ZeRO-2 the last rank needs the most: it keeps the gradients of the last layers, which come first in
        the backward pass, when most activations are still alive. Otherwise ranks only differ in padding, and none needs more
        than the first.

        Raises: UserError for flags that cannot be right, and for memory that cannot be predicted.
        """
        device = CPU if self.card is None else Cuda(self.card)
        method, engine = METHODS[self.method], self.launch.engine
        if engine.kind is EngineKind.NONE:
            return predict_run(
                configure(method, self.flags, self.card), device, self.batches, reads_data=self.reads_data
            )
        with world(self.launch.of_rank(0)):
            config = configure(method, self.flags, self.card)
        last = engine.kind in (EngineKind.ZERO_1, EngineKind.ZERO_2) and self.batches is None
        with world(self.launch.of_rank(self.launch.processes - 1 if last else 0)):
            return predict_run(config, device, self.batches, reads_data=self.reads_data)

    def predict_in_subprocess(self) -> Ledger:
        """`predict` in a separate process without visible GPUs: this process may have a process group, and engines use visible GPUs.

        Raises: UserError as `predict` does, and if that process fails in another way.
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
        said = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"the predicting process ended with exit code {done.returncode}: {said[-1][:200]}")


def run_job(folder: str) -> None:
    """Runs in the process that `PredictionJob.predict_in_subprocess` starts: writes the ledger, or the UserError, to `folder`."""
    job = pickle.loads((Path(folder) / "job").read_bytes())
    try:
        job.predict().save(Path(folder) / "ledger.json")
    except UserError as error:
        (Path(folder) / "refused").write_text(str(error), encoding="utf-8")


def nearest_fit(job: PredictionJob, ledger: Ledger, predict: Callable[[PredictionJob], Ledger]) -> str:
    """One sentence for a job that does not fit, whose `ledger` was predicted: the nearest setting that fits, with its flags.

    The settings are tried by `predict`, one after the other, and kept: checkpointing, fewer rows with as many a step, 4 bits, and
    shorter rows. If none is enough: the method or the card that would be. It prints each trial on standard error.
    """
    budget, assumed, method = ledger.budget_bytes or 0, ledger.assumed, METHODS[job.method]
    states = ("parameters", "gradients", "optimizer_state")  # the batch does not change them

    def too_large(found: Ledger) -> bool:
        last = found.phases["optimizer_step"].categories
        return sum(nbytes for name, nbytes in last.items() if name.startswith(states)) > budget

    def tried(name: str, changes: Mapping[str, Any]) -> Ledger | None:
        print(f"does not fit; trying {name} {_as_words(changes)}", file=sys.stderr, flush=True)
        given = {**by_new_names(job.flags.given), **changes}
        if accumulates:  # more passes than two change no peak
            passes = changes.get("gradient_accumulation_steps", assumed["gradient_accumulation_steps"])
            given["gradient_accumulation_steps"] = min(2, passes)
        try:
            return predict(replace(job, method=name, flags=replace(job.flags, given=given)))
        except UserError:
            return None  # this method, model or engine does not allow it

    def batch_of(rows: int) -> dict[str, Any]:
        passes = {"gradient_accumulation_steps": -(-step_rows // rows)} if accumulates else {}
        alone = {"packing": False} if rows == 1 and ledger.config.get("packing") else {}
        return {"per_device_train_batch_size": rows} | passes | alone

    rows, step_rows = assumed["rows"], assumed["rows"] * assumed["gradient_accumulation_steps"]
    accumulates = not ledger.config.get("optimizer_in_backward")
    fewer = [batch_of(rows >> n) for n in range(1, rows.bit_length())]
    shorter = [{"max_length": n} for n in (assumed["tokens"] // 2, assumed["tokens"] // 4) if n >= SHORTEST]
    four_bits = [flags] if (flags := _four_bits(method, assumed["weights"])) else []
    checkpointing = [] if assumed["gradient_checkpointing"] else [{"activation_checkpointing": True}]
    kept: dict[str, Any] = {}
    least_with: dict[str, Any] = {}
    last = least = ledger
    first, second = (four_bits, []) if too_large(ledger) else ([], four_bits)
    for change in (*first, *checkpointing, *fewer, *second, *shorter):
        if change not in four_bits and too_large(last):
            continue
        found = tried(job.method, kept | change)
        if found is None:
            continue
        kept |= change
        last = found
        if found.needed_bytes < least.needed_bytes:
            least, least_with = found, dict(kept)
        if found.fits:
            return f"it fits with {_as_words(kept)}: {format_bytes(found.needed_bytes)}"
    if method.freezes_base and too_large(last):
        # no batch changes that: one trial with all of them says what the least would be
        smallest: dict[str, Any] = {}
        for change in (*four_bits, *checkpointing, *fewer[-1:]):
            smallest |= change
        found = tried(job.method, smallest) if smallest else None
        if found is not None and found.needed_bytes < least.needed_bytes:
            least, least_with = found, smallest
    nothing = f"no batch size, length or checkpointing is enough for {job.method}"
    if not method.freezes_base:
        small = batch_of(1) | {"activation_checkpointing": True}
        others: list[tuple[str, dict[str, Any]]] = [("lora", {}), ("lora", small), ("qlora", small)]
        for name, changes in others:
            found = tried(name, changes)
            if found is not None and found.fits:
                words = f"{name} {_as_words(changes)}".strip()
                return f"{nothing}; another method is: {words} ({format_bytes(found.needed_bytes)})"
    large = [
        card
        for card in CARDS
        if card.budget_bytes >= least.needed_bytes - (least.context_bytes or 0) + card.context_bytes
    ]
    card = min(large, key=lambda card: card.budget_bytes, default=None)
    asked = f"with {_as_words(least_with)} it needs" if least_with else "it needs"
    enough = (
        "no card that footprint gpus lists has"
        if card is None
        else f"the smallest card that footprint gpus lists is {card.name}"
    )
    return f"{nothing}; {asked} {format_bytes(least.needed_bytes)}, and {enough}" + (" as much" if card is None else "")


def cost_of_upcast(job: PredictionJob, ledger: Ledger, predict: Callable[[PredictionJob], Ledger]) -> str:
    """One sentence for a job whose `ledger` was predicted with --kbit_upcast all: what that costs, by a prediction without it.

    Empty for other jobs, for methods that need it, and where it costs nothing.
    """
    change = _four_bits(METHODS[job.method], ledger.assumed["weights"])
    if ledger.config.get("kbit_upcast") != "all" or change != {"kbit_upcast": "none"}:
        return ""
    print(f"predicting the cost of --kbit_upcast all: trying {_as_words(change)}", file=sys.stderr, flush=True)
    try:
        without = predict(replace(job, flags=replace(job.flags, given={**job.flags.given, **change})))
    except UserError:
        return ""
    cost = ledger.needed_bytes - without.needed_bytes
    return (
        f"--kbit_upcast all costs {format_bytes(cost)} of it; --kbit_upcast none needs no other change"
        if cost > 0
        else ""
    )


def _four_bits(method: type[Method], weights: str) -> dict[str, Any]:
    """The flags for the least memory with a base in 4 bits, as `method` allows them; `weights` says how they are held now."""
    if not issubclass(method, PeftBased):
        return {}
    is_packed = "bit" in weights
    flags: dict[str, Any] = {} if is_packed else {"load_in_4bit": True}
    if is_packed and "float32" not in weights:
        return flags
    short: dict[str, Any] = {"kbit_upcast": "none"}
    with suppress(UserError):  # (IA)3 needs fp32 beside 4 bits
        method(**short).check({"load_in_4bit": True} | short)
        flags |= short
    return flags


def _as_words(changes: Mapping[str, Any]) -> str:
    """`{"max_length": 256}` -> `"--max_length 256"`; a flag that is only switched on stands alone."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())


def _refuse_unpredicted(config: Config, device: Device) -> None:
    """Raises UserError for engines and options whose memory the shadow step cannot predict."""
    engine, attention = config.engine, config.model.attn_implementation
    of_gpus = {
        f"--attn_implementation {attention}": attention in FLASH_ATTENTION,
        "--use_liger_kernel": config.training.use_liger_kernel,
    }
    for flag in (flag for flag, given in of_gpus.items() if given and device is CPU):
        raise UserError(f"{flag} needs a GPU; leave it out, or predict for a card: --gpu NAME")
    if config.optimizer.startswith("galore_adafactor"):
        raise UserError(f"memory of --optim {config.optimizer} is not predicted; that of galore_adamw is")
    if processes() == 1 and engine.kind is EngineKind.NONE:
        return
    if engine.kind not in SUPPORTED_ENGINES:
        raise UserError(f"memory under {engine.kind} is not predicted; DDP, ZeRO-1 to ZeRO-3 and FSDP2 are")
    if engine.offloads and engine.kind is EngineKind.FSDP2:
        raise UserError(f"memory under {engine} is not predicted yet; --launch zero3_offload is")
    if config.training.torch_compile:
        raise UserError(f"memory of --torch_compile under {engine} is not predicted; leave it out for an upper bound")
    optim = config.optimizer
    if engine.offloads and not optim.startswith("adamw_torch"):
        raise UserError(f"--optim {optim}: memory of an offloaded optimizer is only predicted for adamw_torch_fused")


def _longest_rows(config: Config, model_config: PreTrainedConfig, reads_data: bool) -> LongestRows:
    """How long the rows are, as the flags allow.

    With `reads_data` and --dataset_name the rows are read and tokenized as for a run.

    Raises: UserError for a length beyond the model's positions, and for data or a tokenizer that cannot be read.
    """
    data, virtual_tokens = config.data, config.method.virtual_tokens
    reads_data = reads_data and data.dataset_name is not None
    with guarded_rows(data):
        rows_found = data.read() if reads_data else None  # also decides the task, on which the lengths depend
    length, new_tokens, _ = lengths(data, model_config, virtual_tokens=virtual_tokens)
    target_length = new_tokens if model_config.is_encoder_decoder or config.task.one_target else length
    if not reads_data:
        unread = "--dataset_name was not read" if data.dataset_name else "no --dataset_name was given"
        row, prompt = (length, target_length), length if model_config.is_encoder_decoder else length - new_tokens
        return LongestRows(row, row, prompt, new_tokens, f"rows as long as the flags allow ({unread})")
    try:
        source = config.model.tokenizer_name or config.model.source
        if not looks_like_path(source):
            check_reachable(
                source, None if config.model.tokenizer_name else config.model.model_revision, TOKENIZER_FILE
            )
        tokenizer = load_tokenizer(config.model)
    except UserError as error:
        raise UserError(
            f"--dataset_name {data.dataset_name} is counted in tokens, which needs the tokenizer: {error}; without --dataset_name "
            "rows of --max_length tokens are predicted"
        ) from None
    with guarded_rows(data):
        found = load_data(data, model_config, tokenizer, virtual_tokens, rows_found)

    def longest(rows: Dataset) -> tuple[int, int]:
        labels = 0 if has_head(model_config) else max(sum(one != IGNORE_INDEX for one in row) for row in rows["labels"])
        return max(map(len, rows["input_ids"])), labels

    return LongestRows(
        longest(found.train),
        longest(found.validation),
        max(map(len, found.test_prompts)),
        new_tokens,
        f"rows as long as the longest of the {len(found.train):,} rows of {data.dataset_name}",
        len(found.train),
        sum(split.data.nbytes for split in (found.train, found.validation)),
    )


def _as_evaluated(config: Config) -> Config:
    """`config` with the batches of its evaluation as those of its training."""
    training = copy.copy(config.training)
    training.per_device_train_batch_size, training.packing = training.per_device_eval_batch_size, False
    return replace(config, training=training)


def _assumed(config: Config, batch: Batch, data: str) -> dict[str, Any]:
    """What a prediction for `batch` rests on, for `Ledger.assumed`; `data` says in words how long the rows are."""
    training = config.training
    rows = training.per_device_train_batch_size
    length = batch["input_ids"].numel() // rows
    target = batch["labels"].shape[1] if "decoder_input_ids" in batch else 0
    return {
        "rows": rows,
        "tokens": length,
        "target_tokens": target,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        "weights": str(config.dtype).removeprefix("torch."),  # of a quantized base: what is not packed
        "gradient_checkpointing": bool(training.activation_checkpointing),
        "data": data,
    }


def worst_batch(config: Config, model_config: PreTrainedConfig, longest: tuple[int, int] | None = None) -> Batch:
    """`per_device_train_batch_size` rows of `max_length` tokens; ids, masks and labels are (rows, length), int64.

    `longest`: the tokens of a row, and how many have labels, instead of what the flags allow.

    All rows but the first end with one padding token, because attention kernels need more memory with a mask. For T5-like
    models the labels are (rows, `max_target_length`), as are the decoder's inputs; for GPT-like models they are at the end of each
    row. For a head the labels are (rows,), and each
    text ends with one end-of-text token, which some heads look for. With --packing the batch is (1, rows x tokens), as transformers'
    `DataCollatorWithFlattening` makes it. If processes share the tokens of a row
    (`config.engine.sequence_parallel_size`), the batch is as `SharedRows` collates it.

    Raises: UserError for a length beyond the model's positions, and for more than `MOST_TOKENS` tokens.
    """
    rows = config.training.per_device_train_batch_size
    length, target_length = longest or _longest_rows(config, model_config, reads_data=False).train
    length = shared_length(length, config.engine.sequence_parallel_size)
    if rows * max(length, target_length) > MOST_TOKENS:
        raise UserError(
            f"a batch of {rows:,} rows of {max(length, target_length):,} tokens is too large for a prediction, which holds at most {MOST_TOKENS:,} "
            "tokens; give a smaller --per_device_train_batch_size or --max_length"
        )
    ids = torch.full((rows, length), ORDINARY_TOKEN_ID)
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    if has_head(model_config):
        ids[:, -1] = model_config.eos_token_id or ORDINARY_TOKEN_ID
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if model_config.is_encoder_decoder:
        labels = torch.full((rows, target_length), ORDINARY_TOKEN_ID)
        batch |= {"labels": labels, "decoder_input_ids": labels.clone()}
    else:
        batch["labels"][:, : length - target_length] = IGNORE_INDEX
    if config.training.packing:
        batch["labels"][:, 0] = IGNORE_INDEX
        batch["position_ids"] = torch.arange(length).repeat(rows, 1)
        return {name: tensor.view(1, -1) for name, tensor in batch.items() if name != "attention_mask"}
    return SharedRows.with_positions(batch) if config.engine.sequence_parallel_size > 1 else batch


def _whole_rows(batch: Batch, sequence_parallel_size: int) -> Batch:
    """A batch with whole rows, as long as those of which `batch` (rows, length / processes) is one rank's share."""
    if sequence_parallel_size == 1:
        return batch
    names = ("input_ids", "labels")
    return SharedRows.with_positions({name: batch[name].repeat(1, sequence_parallel_size) for name in names})


@dataclass(frozen=True)
class Batches:
    """Collated batches as the data of a `FineTuner`: each batch is one item of `train`, and nothing is saved."""

    train: list[Batch]
    validation: None = None
    tokenizer: None = None
    train_fingerprint: str = ""
    is_collated: bool = True

    def collator(self, model: PreTrainedModel, sequence_parallel_size: int = 1) -> Any:
        """A collator that returns the batch unchanged."""
        return _single_batch


def _check_passes(config: Config) -> None:
    """Raises UserError for more than `MOST_PASSES` accumulated passes under an engine that has their number in its own settings."""
    if config.engine.kind not in (EngineKind.NONE, EngineKind.DDP):
        raise UserError(
            f"--gradient_accumulation_steps {config.training.gradient_accumulation_steps}: predicting more than {MOST_PASSES} passes under "
            f"{config.engine} takes too long; predict {MOST_PASSES} or fewer: each further pass needs only its batch of token ids"
        )


def sequential_arguments(arguments: Any) -> Any:
    """A copy of Trainer's `arguments` that keeps the order of `Batches` and all of their columns."""
    changed = copy.copy(arguments)
    changed.train_sampling_strategy, changed.remove_unused_columns = "sequential", False
    return changed


def _single_batch(rows: list[Any]) -> Any:
    return {name: tensor.clone() for name, tensor in rows[0].items()}


def this_card() -> Card | None:
    """This machine's GPU on which this process would train; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = (gpu.total_memory, torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved())
    limits = (torch.cuda.get_per_process_memory_fraction(), driver_moves_to_host())
    return card_of_device(gpu.name, (gpu.major, gpu.minor), gpu.multi_processor_count, *memory, *limits)


def _predicted_here(config: Config, batches: list[Batch] | None = None, reads_data: bool = False) -> Ledger:
    """The predicted ledger of the run to which this process belongs, on its own device."""
    card = this_card() if config.training.device.type == "cuda" else None
    if config.engine.kind is EngineKind.NONE:
        ledger = predict_run(config, CPU if card is None else Cuda(card), batches, reads_data=reads_data)
        return replace(ledger, resources=with_budgets(ledger.resources, config))
    job = PredictionJob(config.method.name, config.as_flags(), config.launch, card, batches, reads_data)
    ledger = job.predict_in_subprocess()
    return replace(ledger, resources=with_budgets(ledger.resources, config))


def show_prediction(config: Config) -> None:
    """Prints the predicted ledger of the worst batch, for `--predict`.

    Raises: UserError if it cannot be predicted.
    """
    broadcast_from_main(lambda: print_ledger(console, _predicted_here(config, reads_data=True)))


def say_prediction(config: Config) -> None:
    """Prints one line before a run: the predicted memory of the worst batch, or why it is not known. Never stops a run."""
    if not is_main:
        return
    try:
        ledger = _predicted_here(config)
    except (UserError, LedgerError) as error:
        say("memory", f"not predicted: {error}")
        return
    when = ledger.peak_phase_name.replace("_", " ")
    tokens = ledger.assumed.get("tokens")
    rows = f" of rows of {tokens:,} tokens, the longest that the flags allow" if tokens else ""
    say("memory", f"{format_bytes(ledger.needed_bytes)} at the peak, predicted for the {when}{rows} ({ledger.device})")
    for resource in (one for one in ledger.resources if not one.fits):
        needed, there = format_bytes(resource.needed_bytes), format_bytes(resource.budget_bytes or 0)
        say("warning", f"{resource.name}: the run needs {needed}, and {there} are free")
    if not ledger.fits_device and ledger.budget_bytes is not None:
        say("warning", f"that is more than the {format_bytes(ledger.budget_bytes)} of {ledger.device}; {LESS_MEMORY}")
    elif ledger.risk and ledger.risk.verdict == TIGHT:
        say("warning", f"next to no room on {ledger.device}: {ledger.risk.reason}; {LESS_MEMORY}")


def show_comparison(config: Config, memory: MemoryCallback) -> None:
    """After a run: compares the measured ledger with a prediction for the same batches, and prints both."""
    if not is_main or memory.ledger is None or not memory.batches or "labels" not in memory.batches[0]:
        return  # a run that resumes after its last step measures no step
    try:
        row = config.engine.sequence_parallel_size
        predicted = _predicted_here(config, [_whole_rows(batch, row) for batch in memory.batches])
    except (UserError, LedgerError) as error:
        say("memory", f"not predicted: {error}")
        return
    folder = Path(config.training.output_dir)
    with readable_write_errors("predicted_memory.json", folder):
        atomic_write(folder / "predicted_memory.json", predicted.to_text())
    print_comparison(console, predicted, memory.ledger)

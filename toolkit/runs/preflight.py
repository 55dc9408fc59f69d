"""Checks everything that can be checked before a model is loaded: engine, config, tokenizer, data, method."""

import copy
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import whoami
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel, get_scheduler
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from toolkit.config import Config, optimizers
from toolkit.config.arguments import TrainArguments
from toolkit.config.start import check_trackers
from toolkit.console import say
from toolkit.data.loading import TaskData, guarded_rows, load_data
from toolkit.distributed.deepspeed import NOT_READ_BACK, OFFLOADED_OPTIMIZERS, check_builds, check_disk, join_deepspeed
from toolkit.distributed.engine import Engine, EngineKind
from toolkit.distributed.ranks import broadcast_from_main, raise_on_all_ranks
from toolkit.errors import UserError
from toolkit.models.chunked_loss import whole_loss_reason
from toolkit.models.heads import has_own_head, keeps_head, set_head
from toolkit.models.liger import check_liger, check_norms
from toolkit.models.loading import LANGUAGE_PART, build_on_meta, is_multimodal, load_model, load_tokenizer
from toolkit.models.packing import padded_reason
from toolkit.models.quantization import Packed, untrained_experts
from toolkit.models.soft_prompts import base_model
from toolkit.models.tiled_mlp import tile_feed_forwards
from toolkit.training.optimizer_steps import refuse_unless_by_weight
from toolkit.training.trainer import FineTuner

FEW_ROWS = 20  # fewer make scores that change with each of them
NOT_OF_SHARDS = (
    "8bit",
    "paged",
    "bnb",
    "lion",
    "ademamix",
    "adafactor",
)  # in names of optimizers that cannot update shards


@dataclass
class Preflight:
    """A run that passed every check, with what was read for it."""

    config: Config
    model_config: PreTrainedConfig  # with the head of a classification task
    data: TaskData
    trainable_parameters: int
    all_parameters: int

    def load_model(self) -> PreTrainedModel:
        """The model with its weights, on the device that trains it.

        Raises: UserError if weights are missing.
        """
        config = self.config
        return load_model(config.model, self.model_config, config.dtype, config.training, config.engine)


def prepare(config: Config) -> Preflight:
    """Reads config, tokenizer and data, attaches the method to a model without weights, and prints a summary of the run.

    Raises: UserError for every mistake that can be found without loading a model.
    """
    training = config.training
    check_engine(config.engine, training)
    check_installed(training)
    config.model.check_kernel()
    _check_workers(training)
    _check_same_precision(config)
    with training.main_process_first(desc="reading the data"), guarded_rows(config.data):
        source = config.data.read()  # also decides the task, on which the kind of model depends
    try:
        check_combination(config)
    except UserError as error:
        if config.data.is_chosen:
            raise UserError(f"{error} (the data decided the task: {source.remarks[0]})") from None
        raise
    model_config = copy.deepcopy(config.model_config)  # the head below depends on this run's data
    tokenizer = load_tokenizer(config.model)
    with training.main_process_first(desc="tokenizing the data"), guarded_rows(config.data):
        data = load_data(config.data, model_config, tokenizer, config.method.virtual_tokens, source)
    if config.task.model_kind == "head":
        if not config.model.random_weights:
            data.remarks.extend(_head_remarks(model_config, data.prompt_tokenizer.label_names))
        set_head(model_config, data.prompt_tokenizer.label_names, tokenizer.pad_token_id)
    base = build_on_meta(config.model, model_config, config.dtype)
    check_checkpointing(config, base, on_cpu=training.device.type == "cpu")
    whole_loss = check_loss_chunks(training, base)
    check_packing(config, base)
    _check_noise(training, base)
    if training.use_liger_kernel:
        check_liger(model_config.model_type)
    packed = Packed.of(base)
    model = config.method.attach(base)
    if training.use_liger_kernel:
        check_norms(base_model(model))
    if config.method.trains:
        _check_whole_batches(training, data)
        check_schedule(training, model)
        if training.mlp_tile_tokens:
            tile_feed_forwards(model, training.mlp_tile_tokens)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    ready = Preflight(config, model_config, data, trainable, total)
    _say_what_will_be_done(ready, packed, untrained_experts(model))
    if whole_loss and config.method.trains and config.task.model_kind != "head":
        say("loss", f"computed over all positions at once: {whole_loss}")
    return ready


def _head_remarks(config: PreTrainedConfig, label_names: Sequence[str]) -> list[str]:
    """Remarks on whether the checkpoint's own classification head is kept."""
    if not has_own_head(config):
        return []
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if not keeps_head(config, label_names):
        return [
            f"the checkpoint's head has other classes ({', '.join(own)[:200]}), so a new head is made; to keep it, rename the labels "
            "to its classes, or write the labels into id2label of its config.json"
        ]
    pairs = [name if name == mine else f"{mine} is {name}" for mine, name in zip(own, label_names, strict=True)]
    return [f"the checkpoint's own head is kept, with the classes in its order: {', '.join(pairs)[:200]}"]


def _check_noise(training: TrainArguments, model: PreTrainedModel) -> None:
    """Raises UserError for NEFTune's noise in a model that does not call the embedding to which Trainer adds it (T5)."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if training.neftune_noise_alpha and encoder.get_input_embeddings() is not model.get_input_embeddings():
        raise UserError(
            f"--neftune_noise_alpha has no effect on {model.config.model_type}, whose encoder has its own embedding; leave it out"
        )


def _check_workers(training: TrainArguments) -> None:
    """Raises UserError for more processes that load data than this machine's cores could feed."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if training.dataloader_num_workers > most:
        raise UserError(
            f"--dataloader_num_workers {training.dataloader_num_workers} is too many for this machine's {os.cpu_count()} cores; give at "
            f"most {most}"
        )


def check_loss_chunks(training: TrainArguments, model: PreTrainedModel) -> str:
    """Why the loss of `model` is not computed in chunks, although the flags ask for it; empty if it is, or if they do not.

    Raises: UserError if the user chose the number of tokens.
    """
    chosen = training.loss_chunk_tokens
    reason = whole_loss_reason(model) if chosen else ""
    if reason and chosen != TrainArguments.__dataclass_fields__["loss_chunk_tokens"].default:
        raise UserError(f"--loss_chunk_tokens {chosen} has no effect: {reason}; leave it out")
    return reason


def check_packing(config: Config, model: PreTrainedModel) -> None:
    """Raises UserError if the flags ask for packed batches, and `model`, the method or the engine cannot train on them."""
    if not config.training.packing:
        return
    reason = padded_reason(model)
    if config.method.virtual_tokens:
        reason = f"the virtual tokens of {config.method.name} stand before each row"
    if config.engine.sequence_parallel_size > 1:
        reason = f"under {config.engine} several processes share each row"
    if reason:
        raise UserError(f"--packing: {reason}; leave it out")


def check_checkpointing(config: Config, model: PreTrainedModel, on_cpu: bool) -> None:
    """Raises UserError for activation checkpointing that the architecture, transformers or the device does not have."""
    if not config.training.activation_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"--activation_checkpointing: {config.model.source} is a {model.config.model_type} model, for which transformers cannot "
            "recompute activations; give --activation_checkpointing false"
        )
    options = config.training.activation_checkpointing_kwargs or {}
    assert isinstance(options, dict)
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    if lacks := [n for n in ("every_n_layers", "offload") if n in options and n not in signature(enable).parameters]:
        raise UserError(
            f"--activation_checkpointing_kwargs: transformers {version('transformers')} has no {lacks[0]!r}; install a newer one, or "
            "leave it out"
        )
    if options.get("offload") and on_cpu:
        raise UserError(
            "--activation_checkpointing_kwargs: offload has no effect without a GPU, for activations are in the host's memory "
            "already; leave it out, or predict for a card: --gpu NAME"
        )


def check_engine(engine: Engine, training: TrainArguments) -> None:
    """Checks that this machine has what the launch and the flags need: an engine, a compiler, a login.

    Under DeepSpeed it also joins DeepSpeed's process group and, if DeepSpeed swaps to a disk, locks the swap folder until this
    process ends.

    Raises: UserError if something is missing, or if another run uses the swap folder.
    """
    if engine.kind.is_zero and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "this launch file needs DeepSpeed, which is not installed (it runs on Linux): pip install deepspeed, "
            "or launch with launch/single.yaml"
        )
    check_fsdp(engine, training)
    if engine.processes > training.world_size:
        raise UserError(
            f"several processes were requested, but {training.world_size} runs: accelerate's --cpu and MULTI_CPU start only "
            "one; use a file of launch/, and append --use_cpu to the recipe"
        )
    if training.world_size > 1 and training.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            f"the launch requests {engine}, but no engine runs on the {training.world_size} processes: there is no GPU for "
            "them; for a trial without GPUs, append --use_cpu to the recipe"
        )
    if 1 < engine.sequence_parallel_size < engine.processes and training.device.type == "cpu":
        raise UserError(
            f"{engine}: on CPUs torch (gloo) can only share a row among all processes; for a trial without GPUs set "
            f"parallelism_config_sp_size: {engine.processes}"
        )
    offload = engine.kind.is_zero and engine.offloads_optimizer
    if (offload or training.torch_compile) and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        what = "offloading the optimizer" if offload else "--torch_compile"
        raise UserError(
            f"{what} compiles C++ code, and there is no compiler: install one (Debian, Ubuntu: apt install g++)"
        )
    optim = optimizers.name_of(training)
    if offload and optim not in OFFLOADED_OPTIMIZERS:
        raise UserError(
            f"--optim {optim}: the launch file offloads the optimizer, and DeepSpeed would run its Adam instead; give one of "
            f"{', '.join(OFFLOADED_OPTIMIZERS)}, or choose a launch file without offload"
        )
    if engine.kind.is_zero:
        raise_on_all_ranks(lambda: _check_machine(engine, training) if training.local_process_index == 0 else None)
        join_deepspeed()
    if training.push_to_hub:
        broadcast_from_main(lambda: _check_login(training.hub_token))


def check_fsdp(engine: Engine, training: TrainArguments) -> None:
    """Raises UserError if FSDP is requested on CPUs: accelerate would run DDP or an unwrapped model instead."""
    if engine.kind.is_fsdp and training.device.type == "cpu":
        why = "--use_cpu was given" if training.use_cpu else "there is no GPU here"
        raise UserError(
            f"the launch requests {engine}, which accelerate only runs on GPUs, and {why}; for a trial on CPUs use "
            "launch/zero3.yaml, with --use_cpu after the recipe's name"
        )


def check_installed(training: TrainArguments) -> None:
    """Raises UserError for a flag whose library is missing or cannot run, and for --fsdp with a single process."""
    if training.use_liger_kernel and training.device.type in ("cpu", "mps"):
        raise UserError(
            "--use_liger_kernel: its kernels need a GPU that Triton supports, and none is used; leave it out"
        )
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel, or leave it out")
    if training.fsdp and training.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "--fsdp shards a model across processes, but only one runs: accelerate launch --config_file launch/fsdp2.yaml, "
            "or leave it out"
        )
    check_trackers(training.report_to)
    there = get_available_reporting_integrations()
    for name in training.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                if name not in there:
                    callback()  # raises an error that names the missing library; an installed one would start its work
        except (ValueError, ImportError, RuntimeError, AssertionError) as error:
            raise UserError(f"--report_to {name}: {_line(error)}") from None


def check_schedule(training: TrainArguments, model: PreTrainedModel) -> None:
    """Builds the optimizer on one weight and its schedule, so that bad arguments of either are found here.

    Optimizers that depend on the model's layers (GaLore, APOLLO, LOMO) are looked up with `model`, but not built.

    Raises: UserError with the library's own message, and for --optim_args and --lr_scheduler_kwargs without effect.
    """
    optim = optimizers.name_of(training)
    try:
        kind, options = FineTuner.get_optimizer_cls_and_kwargs(training, model)
        plain = FineTuner.get_optimizer_cls_and_kwargs(_with(training, optim_args=None), model)[1]
        weight = torch.nn.Parameter(torch.zeros(1))
        by_layer = is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & set(options)
        optimizer = torch.optim.SGD([weight], lr=1.0) if by_layer else kind([weight], **options)
    except BUILD_ERRORS as error:
        args = f" --optim_args {training.optim_args}" if training.optim_args else ""
        raise UserError(f"--optim {optim}{args}: {_line(error)}") from None
    if training.optimizer_in_backward:
        refuse_unless_by_weight(kind, optim)
    if training.optim_args and not by_layer and repr(options) == repr(plain):
        raise UserError(f"--optim_args {training.optim_args} has no effect with --optim {optim}; leave it out")
    schedule = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    given = training.lr_scheduler_kwargs or {}
    if given and schedule in ("constant", "constant_with_warmup"):
        raise UserError(f"--lr_scheduler_kwargs has no effect with --lr_scheduler_type {schedule}; leave it out")
    try:
        steps = max(training.max_steps, 100)
        made = get_scheduler(schedule, optimizer, training.get_warmup_steps(steps), steps, dict(given))
        if isinstance(made, torch.optim.lr_scheduler.LambdaLR):
            for lambda_of in made.lr_lambdas:
                lambda_of(steps - 1)
    except BUILD_ERRORS as error:
        shown = f" --lr_scheduler_kwargs '{json.dumps(given)}'" if given else ""
        reason = re.sub(r"\b_?get_\w+\(\)", "it", _line(error))
        raise UserError(f"--lr_scheduler_type {schedule}{shown}: {reason}") from None


def _check_whole_batches(training: TrainArguments, data: TaskData) -> None:
    """Raises UserError if --dataloader_drop_last would leave no batch."""
    if not training.dataloader_drop_last:
        return
    splits = {"train": len(data.train)}
    if str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no":
        splits["eval"] = len(data.validation)
    for split, rows in splits.items():
        size = getattr(training, f"per_device_{split}_batch_size")
        if rows < size * training.world_size:
            what = "to train" if split == "train" else "to validate"
            raise UserError(
                f"--dataloader_drop_last leaves nothing {what}: {rows} rows are fewer than a batch of {size} on each of "
                f"{training.world_size} processes; lower --per_device_{split}_batch_size, or leave --dataloader_drop_last out"
            )


BUILD_ERRORS = (ValueError, ImportError, TypeError, RuntimeError, AttributeError, AssertionError, KeyError)


def _with(training: TrainArguments, **changes: Any) -> TrainArguments:
    changed = copy.copy(training)
    changed.__dict__.update(changes)
    return changed


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_machine(engine: Engine, training: TrainArguments) -> None:
    check_disk(engine, training.deepspeed)
    check_builds(engine)


def check_combination(config: Config) -> None:
    """Raises UserError for a model or precision that the requested engine cannot train."""
    engine, model_config = config.engine, config.model_config
    if engine.kind.shards_parameters and config.model.load_in_8bit:
        raise UserError(
            f"--load_in_8bit under {engine.kind}: its integer weights cannot be sharded; use --load_in_4bit, or "
            "launch/zero2.yaml"
        )
    if engine.kind.shards_parameters and config.method.changes_base:
        raise UserError(
            f"{config.method.changes_base} under {engine.kind}: it needs whole weights, but each process has only a shard; "
            "use launch/zero2.yaml, or leave it out"
        )
    if engine.optimizer_state == "nvme" and config.training.load_best_model_at_end:
        raise UserError(f"--load_best_model_at_end under {engine}: {NOT_READ_BACK}; leave it out")
    if engine.parameters == "nvme" and config.model.load_in_4bit and not config.training.bf16:
        raise UserError(
            f"--load_in_4bit in fp32 under {engine}: DeepSpeed 0.19 reads weights back from the disk as bf16; add --bf16, or use "
            "launch/zero3_offload.yaml"
        )
    optim = config.optimizer
    if config.training.optimizer_in_backward:
        _check_optimizer_in_backward(config)
    if engine.kind is EngineKind.FSDP2 and any(part in optim for part in NOT_OF_SHARDS):
        raise UserError(
            f"--optim {optim} under FSDP2: bitsandbytes' optimizers and Adafactor do not update shards (DTensors); use "
            "adamw_torch_fused, or launch/zero2.yaml"
        )
    if engine.kind.is_zero and optim.startswith(("galore", "apollo")):
        raise UserError(
            f"--optim {optim} under {engine.kind}: DeepSpeed gives the optimizer flat shards of weights, which have no matrix to project; "
            "use launch/ddp.yaml, or another optimizer"
        )
    if engine.processes > 1 and optim.endswith("layerwise"):
        raise UserError(
            f"--optim {optim} on {engine.processes} processes: transformers updates each weight before its gradient is summed over "
            f"them; use {optim.removesuffix('_layerwise')}"
        )
    if engine.kind.is_zero and optim == "adagrad":
        raise UserError(
            f"--optim adagrad under {engine.kind}: DeepSpeed 0.19 rebuilds it with one parameter group, and fails because "
            "there are two (with and without weight decay); use adamw_torch_fused"
        )
    if engine.sequence_parallel_size > 1:
        _check_parallelism(engine)
        heads = getattr(model_config.get_text_config(), "num_attention_heads", 0)
        if model_config.is_encoder_decoder or heads % engine.sequence_parallel_size:
            what = (
                "an encoder-decoder model" if model_config.is_encoder_decoder else f"a model of {heads} attention heads"
            )
            name = config.model.model_name_or_path or "the embedded tiny T5"
            raise UserError(
                f"{name} is {what}; sharing rows among {engine.sequence_parallel_size} processes takes a GPT-like model "
                "whose number of heads they divide: choose another model or launch file"
            )


def _check_optimizer_in_backward(config: Config) -> None:
    """Raises UserError for an engine or a precision with which weights cannot be updated in the backward pass."""
    if config.engine.kind is not EngineKind.NONE:
        raise UserError(
            f"--optimizer_in_backward under {config.engine}: the engine needs the gradients when the backward pass has ended; train with "
            "launch/single.yaml, or leave it out"
        )
    if config.training.fp16:
        raise UserError(
            "--optimizer_in_backward in fp16: a step is skipped if any gradient overflows, and then some weights are updated already; "
            "give --bf16, or leave it out"
        )


def _check_parallelism(engine: Engine) -> None:
    """Raises UserError if the launch file's parallelism_config does not match the number of processes; accelerate does not check."""
    sizes = {
        name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1"))
        for name in ("dp_replicate", "dp_shard", "sp")
    }
    made = math.prod(sizes.values())
    if made != engine.processes:
        product = " x ".join(f"{name}_size {size}" for name, size in sizes.items())
        rows, rest = divmod(engine.processes, engine.sequence_parallel_size)
        fitting = [f"parallelism_config_sp_size: {engine.processes}"]
        if not rest:
            fitting.insert(0, f"parallelism_config_dp_shard_size: {rows} (rows at a time)")
        raise UserError(
            f"the launch file's parallelism_config is for {made} processes ({product}), but {engine.processes} run: start {made}, or "
            f"set {' or '.join(fitting)}"
        )


def _check_same_precision(config: Config) -> None:
    """Raises UserError if machines with different GPUs chose different precisions."""
    chosen = gather_object([config.precision_reason]) if config.training.world_size > 1 else []
    if len({reason.split(":")[0] for reason in chosen}) > 1:
        raise UserError(
            f"the processes would compute in different precisions ({'; '.join(sorted(set(chosen)))}); give --bf16 or --fp16, or "
            "--bf16 false for fp32"
        )


def _check_login(token: str | None) -> None:
    try:
        whoami(token)
    except Exception as error:  # connection errors come from the hub's HTTP library, which depends on its version
        reason = " ".join(str(error).split())[:120]
        if isinstance(error, HfHubHTTPError | LocalTokenNotFoundError):
            raise UserError(
                f"--push_to_hub: not logged in to the hub ({reason}); run `hf auth login` or leave it out"
            ) from None
        raise UserError(f"--push_to_hub: the hub cannot be reached ({reason}); leave it out, and push later") from None


def _say_what_will_be_done(ready: Preflight, packed: Packed, experts: str | None) -> None:
    config, training, data = ready.config, ready.config.training, ready.data
    name = config.model.model_name_or_path or "the embedded tiny T5"
    weights = "random weights" if config.model.random_weights else str(config.dtype).removeprefix("torch.")
    if config.model.load_in_4bit or config.model.load_in_8bit:
        weights = packed.in_words(config.model, config.beside_packed)
    else:
        weights += f": {config.dtype_reason}"
    say("model", f"{name} ({ready.model_config.model_type}, weights {weights})")
    if is_multimodal(config.model):
        say("model", LANGUAGE_PART)
    if packed.packed and (warning := packed.warning(config.beside_packed)):
        say("warning", warning)
    share = ready.trainable_parameters / ready.all_parameters
    say(
        "method",
        f"{config.method.name}: {ready.trainable_parameters:,} of {ready.all_parameters:,} parameters are trained ({share:.2%})",
    )
    if experts is not None:
        say("method", experts)
    say("precision", config.precision_reason)
    when = (
        "; each weight in the backward pass, without clipping and accumulation"
        if training.optimizer_in_backward
        else ""
    )
    say("optimizer", f"{config.optimizer}: {config.optimizer_reason}{when}")
    labels = "labels" if data.task.model_kind == "head" else "label tokens"
    rows = f"{len(data.train):,} to train, {len(data.validation):,} to validate, {len(data.test):,} to test"
    say(
        "data",
        f"{config.data.dataset_name or 'the embedded dialogues'}: {rows}; {data.supervised_tokens:,} {labels}",
    )
    for remark in data.remarks:
        say("data", remark)
    if len(data.test) < FEW_ROWS:
        say(
            "data",
            f"so few rows to test ({len(data.test):,}) that their scores say little",
        )
    for split, lost in data.truncation.items():
        if lost.rows:
            target, flags = "", f"--max_length {data.prompt_tokenizer.max_length}"
            if data.prompt_tokenizer.max_target_length:
                target = f" and {lost.target_tokens:,} of target"
                flags += f", --max_target_length {data.prompt_tokenizer.max_target_length}"
            say(
                "truncated", f"{lost.rows:,} rows of {split} lost {lost.text_tokens:,} tokens of text{target} ({flags})"
            )
    rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    say(
        "batch",
        f"{rows_per_step} rows a step: {training.per_device_train_batch_size} x {training.gradient_accumulation_steps} "
        f"accumulated x {training.world_size} processes"
        + ("; activations are recomputed in the backward pass" if training.activation_checkpointing else ""),
    )
    if training.load_best_model_at_end:
        patience = training.early_stopping_patience
        stop = f", stopping after {patience} evaluations without a better one" if patience else ""
        say("validation", f"chooses the checkpoint with the best {training.metric_for_best_model}{stop}")
    else:
        say("validation", "chooses nothing: the last weights are kept (--load_best_model_at_end changes that)")

"""Checks of every run while it trains and when it is saved; a violation stops the run and names the guard.

| guard | when | cost |
|---|---|---|
| loss: in chunks it is the model's own loss | before the first step | two forward passes of at most 64 tokens |
| packing: a row in a packed batch is computed as it is alone | before the first step | three forward passes of at most 128 tokens |
| gradient: its norm is above zero | the first steps | nothing: the Trainer computes it anyway |
| update: trained weights have changed | the first steps, and the end | reads the trained weights once for each check |
| frozen: frozen weights have not changed | the end | reads the frozen weights twice, on their device, without a copy: |
| | | 0.2 to 0.3 s per GiB, measured on one slow CPU core; on a GPU, one read at its memory bandwidth |
| saved: the saved files reload as the trained weights | the end | an adapter: two forward passes of at most 64 tokens; a full |
| | | model: the saved file is read once, into the CPU's memory |
| generation: generated tokens agree with forward passes | the end | generates 8 tokens after one row, and one forward pass |

That there are label tokens at all is checked before the run (`toolkit.data.loading`). Weights that ZeRO-3 or FSDP shard are
checked shard by shard; their saved files are only checked for not being empty. If an engine keeps its own fp32 copy of 16-bit
weights, a few small steps may round to nothing: then `update` is only checked at the end. `loss` and `packing` are not checked where an engine
shards the weights or the tokens of a row.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from toolkit.config import Config
from toolkit.data.loading import TaskData
from toolkit.distributed.checksums import checksums
from toolkit.distributed.sharded_models import is_sharded
from toolkit.errors import UserError
from toolkit.models.generation import generation_error
from toolkit.models.loading import load_model, longest_input
from toolkit.models.soft_prompts import base_model, fit_head

# LoRA's A changes from the second step on, and the first step of a warm-up may have a learning rate of 0
FIRST_STEPS = 3
LOGITS_TOLERANCE = 1e-3  # of the largest logit: the weights are bitwise equal, but a GPU may choose other kernels
# The tolerance if an initialization altered the base: the base was rounded once more.
ROUNDED_BASE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Tolerances relative to the logits' spread. On tiny models, lost virtual tokens gave 0.4 and more, rounding 4e-5 in fp32 and 0.006
# in bf16. Mixtures of experts gave 0.12: if rounding changes the choice of an expert, everything after it changes.
ROW, TOKENS = 64, 8  # at most so many tokens of the row are read, and so many generated
LOSS_TOLERANCE = 2e-2  # T5 computes its own loss in bf16, which was 0.5 % off; labels that are not shifted give another loss altogether
GENERATION_TOLERANCE = 1e-2
GENERATION_TOLERANCE_ROUNDED = 0.25  # 16 bits, or a quantized base
MIXED = 0.25  # of the difference that rows make which do see each other: more is no rounding


class Guards(TrainerCallback):
    """Watches gradients and weights during training; raises `UserError` at the first step that shows a violation."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        self.norms: list[float] = []
        self.rate = 0.0
        self.counted = 0  # steps that must have changed something
        self.trained, self.frozen = checksums(model, trainable=True), checksums(model, trainable=False)
        if not self.trained:
            raise UserError("guard 'update': no weight is trainable, so nothing can be learned; choose other targets")

    def gradient(self, norm: Any) -> None:
        """Records the norm over all gradients, which Trainer computes before the optimizer step."""
        if len(self.norms) < FIRST_STEPS and norm is not None:
            self.norms.append(float(norm))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.counted < FIRST_STEPS:
            self.rate = max(group["lr"] for group in kwargs["optimizer"].param_groups)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self.counted >= FIRST_STEPS:
            return
        if len(self.norms) == FIRST_STEPS and not any(norm > 0 for norm in self.norms):
            self._refuse_gradient()
        # The loss scaler of fp16 skips a step if its gradients overflowed; such a step changes nothing.
        self.counted += self.rate > 0 and math.isfinite(self.norms[-1] if self.norms else 0.0)
        if self.counted == FIRST_STEPS and not _is_rounded(model):
            self._check_update(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if not self.norms and not self.counted:
            return  # resumed at the end of the run: no step was taken
        if self.norms and not any(norm > 0 for norm in self.norms):
            self._refuse_gradient()
        if self.counted < FIRST_STEPS or _is_rounded(model):
            self._check_update(model)
        changed = [name for name, now in checksums(model, trainable=False).items() if self.frozen.get(name, now) != now]
        if changed:
            raise UserError(
                f"guard 'frozen': {len(changed)} of {len(self.frozen)} frozen weights have changed while training, "
                f"{changed[0]} among them; something writes to weights that it does not own"
            )

    def _check_update(self, model: nn.Module | None) -> None:
        assert model is not None
        if checksums(model, trainable=True) == self.trained:
            raise UserError(
                f"guard 'update': after {self.counted} steps no trained weight has changed (learning rate {self.rate:g}, "
                f"gradient norm {self.norms[-1]:g}); raise --learning_rate"
            )

    def _refuse_gradient(self) -> None:
        shown = ", ".join(f"{norm:g}" for norm in self.norms)
        raise UserError(
            f"guard 'gradient': its norm was {shown} in the first {len(self.norms)} steps, so nothing can be learned; "
            "the loss does not depend on the trained weights"
        )


def _is_rounded(model: nn.Module | None) -> bool:
    """Whether all trained weights have 16 bits, as under DeepSpeed with bf16 or fp16, which updates a copy in fp32."""
    assert model is not None
    return all(p.dtype.itemsize == 2 for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def check_loss(model: PreTrainedModel, row: dict[str, torch.Tensor], training: TrainingArguments) -> None:
    """Compares the loss in chunks with the model's own, on the first tokens of `row`, a batch of one training row.

    Raises: UserError if they differ: this model's loss is not the mean cross entropy of its label tokens.
    """
    base = base_model(model)
    inputs = {name: tensor[:1, :ROW].to(base.device) for name, tensor in row.items() if tensor.dim() == 2}
    if not base.config.is_encoder_decoder:
        inputs["labels"] = inputs["input_ids"].clone()  # the first tokens of a prompt have no labels
    with _as_in_training(base, training):
        own = base(**inputs).loss.item()
        in_chunks = base(**inputs, loss_chunk_tokens=ROW // 4).loss.item()
    if math.isfinite(own) and not abs(in_chunks - own) <= LOSS_TOLERANCE * abs(own):
        raise UserError(
            f"guard 'loss': computed in chunks, the loss of this {base.config.model_type} model is {in_chunks:.4g}, and its own is "
            f"{own:.4g}; give --loss_chunk_tokens 0"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], training: TrainingArguments) -> None:
    """Compares the logits of the second of two `rows` of token ids after the first, in a packed batch, with those alone.

    Raises: UserError if they differ: this model lets a row see another, or counts its positions from elsewhere.
    """
    short = [{"input_ids": row["input_ids"][:ROW]} for row in rows]
    joined = [
        {"input_ids": [token for row in short for token in row["input_ids"]]}
    ]  # as one row, whose halves see each other
    collate, length = DataCollatorWithFlattening(), len(short[-1]["input_ids"])

    def logits(batch: list[dict[str, list[int]]]) -> torch.Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items() if name != "labels"}
        return model(**inputs).logits[0, -length:].float()

    with _as_in_training(model, training):
        packed, alone, mixed = logits(short), logits(short[1:]), logits(joined)
    error = float((packed - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm())
    tolerance = _rounding(model, training)
    is_mixed = error > GENERATION_TOLERANCE and float((packed - alone).norm()) > MIXED * float((mixed - alone).norm())
    if is_mixed or not error <= tolerance:
        raise UserError(
            f"guard 'packing': in a packed batch the logits of a row of this {model.config.model_type} model differ from its own by "
            f"{error:.2g} of their spread (at most {tolerance:g}, and {MIXED:g} of what another row before it changes); leave --packing out"
        )


def check_saved(model: PreTrainedModel, config: Config, row: dict[str, torch.Tensor]) -> None:
    """Compares the weights that were saved into the run's folder with the trained `model`; only rank 0 calls it.

    `row` is a batch of one training row, as the collator makes it: an adapter must give the same logits for its end.

    Raises: UserError if the file holds no weights, or other weights than the model in memory.
    """
    folder = Path(config.training.output_dir)
    _check_not_empty(folder)
    if is_sharded(model):
        return
    if isinstance(model, PeftModel):
        _check_adapter(model, config, end_of(row), folder)
    else:
        _check_weights(model, folder)


def check_generation(model: PreTrainedModel, data: TaskData, training: TrainingArguments) -> None:
    """Compares the trained model's generation after one row of the test split with its forward passes, on every rank.

    Raises: UserError if they differ. They do if PEFT does not support the generation of a newer transformers.
    """
    if data.task.model_kind == "head":
        return
    limit = longest_input(model.config) or ROW + TOKENS
    room = min(ROW, limit - TOKENS - getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0))
    error = generation_error(model, data.tokenizer, data.test_prompts[0][: max(1, room)], TOKENS)
    tolerance = _rounding(model, training)
    if not error <= tolerance:
        raise UserError(
            f"guard 'generation': the trained model's generation does not agree with its forward passes: the logits differ by "
            f"{error:.2g} of their spread (at most {tolerance:g}). transformers {version('transformers')} and peft {version('peft')} "
            "may not be compatible; install the versions of constraints.txt"
        )


def _rounding(model: PreTrainedModel, training: TrainingArguments) -> float:
    """How far logits of the same tokens may differ, relative to their spread, when they are computed in another way."""
    computes_in_16_bits = model.dtype.itemsize == 2 or training.bf16 or training.fp16
    rounded = computes_in_16_bits or getattr(model, "is_quantized", False)
    return GENERATION_TOLERANCE_ROUNDED if rounded else GENERATION_TOLERANCE


def _check_not_empty(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    elements = 0
    for file in files:
        try:
            with safe_open(file, "pt") as stream:
                elements += sum(math.prod(stream.get_slice(name).get_shape()) for name in stream.keys())  # noqa: SIM118
        except Exception as error:  # safetensors raises exceptions of its own
            raise UserError(f"guard 'saved': {file} cannot be read ({' '.join(str(error).split())})") from None
    if not elements:
        raise UserError(f"guard 'saved': {folder} holds no weights; the method trained something that is not saved")


def end_of(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last `ROW` tokens of a batch of one row, where a head looks: the logits of a long row could need more than training did."""
    return {name: tensor[:, -ROW:] if tensor.dim() > 1 else tensor for name, tensor in row.items()}


def reloads_base(model: PeftModel, config: Config) -> bool:
    """Whether `check_saved` loads the base a second time: the adapter only fits the base as it was before the method changed it."""
    return bool(config.method.changes_base or config.method.adapter_changes_base(model.active_peft_config))


@torch.no_grad()
def _check_adapter(model: PeftModel, config: Config, row: dict[str, torch.Tensor], folder: Path) -> None:
    """Compares the logits of one training row before and after the adapter is loaded from its file."""
    before = logits_of(model, row, config.training)
    adapter, tolerance = model.active_peft_config, LOGITS_TOLERANCE
    if reloads_base(model, config):
        tolerance = max(tolerance, ROUNDED_BASE.get(model.dtype, 0.1))
        after = logits_of(_reloaded(config, model, folder), row, config.training)
    elif adapter.is_prompt_learning:  # the output of the prompt encoder is saved, not the encoder
        after = logits_of(PeftModel.from_pretrained(model.get_base_model(), folder), row, config.training)
    else:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(math.nan)  # a weight that the file lacks stays NaN
        weights = load_peft_weights(str(folder), device="cpu")
        set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter)
        lost = [name for name, p in model.named_parameters() if p.requires_grad and p.isnan().any()]
        if lost:
            raise UserError(f"guard 'saved': {len(lost)} trained weights are not in {folder}, {lost[0]} among them")
        after = logits_of(model, row, config.training)
    worst = largest_difference(after, before)
    if not worst <= tolerance:
        raise UserError(
            f"guard 'saved': the adapter loaded from {folder} gives logits that differ by {worst:.2g} of the largest "
            f"(at most {tolerance:g}); the saved files do not hold the trained weights"
        )


def largest_difference(after: torch.Tensor, before: torch.Tensor) -> float:
    """The largest difference between logits of the same tokens, relative to the largest of `before`."""
    return float((after - before).abs().max() / before.abs().max())


def _reloaded(config: Config, trained: PeftModel, folder: Path) -> PeftModel:
    """The adapter in `folder`, loaded onto a new copy of the base."""
    own = copy.deepcopy(trained.get_base_model().config)  # with the head's classes
    base = load_model(config.model, own, config.dtype, config.training, config.engine)
    reloaded = PeftModel.from_pretrained(base, folder)
    fit_head(reloaded)
    return reloaded


def logits_of(model: PeftModel, row: dict[str, torch.Tensor], training: TrainingArguments) -> torch.Tensor:
    """The logits (1, length, vocabulary) or (1, labels) of a row, in evaluation mode, computed as in training, fp32."""
    with _as_in_training(model, training):
        return model(**{name: tensor.to(model.device) for name, tensor in row.items()}).logits.float()


@contextmanager
def _as_in_training(model: PreTrainedModel, training: TrainingArguments) -> Iterator[None]:
    """While open, `model` computes in the precision of training, but without dropout."""
    was_training = model.training
    model.eval()
    computed_in = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    # accelerate has wrapped the trained model in autocast; a model that was just loaded is not wrapped
    with torch.autocast(model.device.type, computed_in) if computed_in is not None else nullcontext():
        yield
    model.train(was_training)


@torch.no_grad()
def _check_weights(model: PreTrainedModel, folder: Path) -> None:
    """Compares each tensor loaded from `folder` with the one in memory, in the type in which it is loaded."""
    loaded = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        there = loaded.get(name)
        if there is None or not torch.equal(there, tensor.to("cpu", there.dtype)):
            what = "is missing" if there is None else "differs"
            raise UserError(
                f"guard 'saved': in what was saved to {folder}, {name} {what}; the run's result is not kept"
            )

"""Training: transformers' Trainer with guards, and with a loss that does not depend on how a batch is split."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from toolkit.config import Config, TrainArguments
from toolkit.config.optimizers import OWN, name_of
from toolkit.console import say
from toolkit.data.loading import TaskData
from toolkit.distributed.engine import EngineKind
from toolkit.distributed.ranks import interruption, leave_process_group
from toolkit.distributed.running import EngineCheck
from toolkit.distributed.sharded_models import gather_together, share_tied_tables
from toolkit.errors import UserError
from toolkit.files import atomic_write
from toolkit.memory.measure import MemoryCallback
from toolkit.models.chunked_loss import chunks_of
from toolkit.models.generation import end_as_the_tokenizer
from toolkit.models.heads import has_head
from toolkit.models.liger import check_norms, use_liger_norms
from toolkit.models.loading import T5_FAMILY
from toolkit.models.losses import label_tokens, mean_loss, row_losses
from toolkit.models.packing import keep_rows_apart
from toolkit.models.position_bias import share_position_bias
from toolkit.models.soft_prompts import base_model, has_virtual_tokens
from toolkit.models.tiled_mlp import tile_feed_forwards
from toolkit.training.callbacks import EarlyStopping, MetricsFile, Preemption, ResumedChoice
from toolkit.training.checkpoints import RunFingerprint, atomic_folder, newest_first, readable_write_errors, whole_files
from toolkit.training.guards import Guards, check_generation, check_loss, check_packing, check_saved
from toolkit.training.optimizer_steps import StepInBackward, refuse_unless_by_weight, step_in_chunks
from toolkit.training.progress import ProgressCallback
from toolkit.training.sampling import LengthGrouped
from toolkit.training.shards import load_optimizer_shards, load_weight_shards, save_shards


class TrainingData(Protocol):
    """The data of a `FineTuner`: `toolkit.data.loading.TaskData`, or batches that are already collated."""

    @property
    def train(self) -> Any:
        """The rows to train on, a data set or list."""

    @property
    def validation(self) -> Any:
        """The rows to validate on, or None."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that is saved with the model and defines its padding; None: nothing is saved."""

    @property
    def is_collated(self) -> bool:
        """Whether each item of `train` is already a whole batch."""

    @property
    def train_fingerprint(self) -> str:
        """SHA-256 over the rows of `train`, in order."""

    def collator(self, model: PreTrainedModel, sequence_parallel_size: int = 1) -> Any:
        """The function that makes a batch from rows of `train` or `validation`."""


class FineTuner(Trainer):
    """`transformers.Trainer` whose gradients are the mean over all label tokens (or labels) of an optimizer step.

    The same rows give the same gradients as one batch, as accumulated batches, or spread over processes. Trainer passes
    `num_items_in_batch` to the model and relies on the model to divide by it. T5, mT5 and BART accept the argument but ignore
    it, so their loss grows with the number of accumulation steps (seen in transformers 5.17 to 5.23).

    Most of the methods below override private ones of Trainer. toolkit/seams/trainer.py says why, and a test checks that Trainer
    still calls each of them.
    """

    optimizer: Any  # accelerate wraps it
    data_collator: Any
    sampler: torch.utils.data.Sampler | None = None  # of the train split, once Trainer has requested it
    written_to: Path | None = None  # the temporary parent folder while a checkpoint is being written

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        data: TrainingData,
        callbacks: Sequence[TrainerCallback] = (),
        compiles: bool | None = None,
    ) -> None:
        """`compiles`: whether the run compiles the model, where `config` does not say it (None: it does)."""
        self.config, self.data = config, data
        args, engine = copy.copy(config.training), config.engine
        if engine.sequence_parallel_size > 1:
            args.dataloader_drop_last = True
        if engine.kind is EngineKind.FSDP2:
            share_tied_tables(model)
        if data.tokenizer is not None:
            end_as_the_tokenizer(model, data.tokenizer)
        self.steps_in_backward = StepInBackward() if args.optimizer_in_backward else None
        args.loss_chunk_tokens = chunks_of(model, args.loss_chunk_tokens)
        base = base_model(model)
        if args.loss_chunk_tokens or has_head(base.config):
            # Liger's own loss would replace the forward pass that computes it, or that of a head, for which it has none
            args.liger_kernel_config = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        if args.use_liger_kernel:
            check_norms(base)
        if args.use_liger_kernel and base.config.model_type in T5_FAMILY:
            use_liger_norms(base)
            args.use_liger_kernel = False  # Trainer would ask Liger, which has no kernels for T5
        repeated: list[nn.Module] = []  # modules whose parts run many times in a pass
        if args.loss_chunk_tokens:
            repeated.append(base.get_output_embeddings())
        if args.mlp_tile_tokens:
            repeated += tile_feed_forwards(model, args.mlp_tile_tokens)
        if not (args.torch_compile if compiles is None else compiles):  # compilation fails on a tensor with attributes
            share_position_bias(model)
        if args.packing:
            keep_rows_apart(model)
            args.include_num_input_tokens_seen = "all"  # none is padding, even one that the tokenizer also pads with
        if engine.kind is EngineKind.ZERO_3:
            gather_together(repeated)
        super().__init__(
            model=model,
            args=args,
            data_collator=data.collator(model, engine.sequence_parallel_size),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.tokenizer,
            compute_metrics=mean_loss,
            callbacks=[*_own_callbacks(args), *callbacks],
        )
        if data.is_collated:
            self._train_batch_size = 1  # each item is a batch of --per_device_train_batch_size rows
        self.remove_callback(PrinterCallback)
        # so that Trainer counts labels for every model; only a loss in chunks receives the count
        self.model_accepts_loss_kwargs = True
        if has_virtual_tokens(model):
            self._loss_shifts_labels = False  # so that Trainer counts labels as `compute_loss` does
        self.add_callback(EngineCheck(self, engine))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device. Shared rows are made contiguous, as models expect: on a CPU DeepSpeed returns views."""
        inputs = super()._prepare_inputs(inputs)
        if self.get_sp_size() > 1:
            inputs = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss over this batch's label tokens, weighted by their share of the whole optimizer step.

        Let n be the label tokens of this batch, and N those of all batches and processes of the step. Then the sum of
        mean x n / N over the batches is the mean over all N tokens. DDP averages over processes, hence the factor
        `num_processes`. Without N (under sequence parallelism) the result is the mean of the batch, so accumulated batches
        have equal weight.
        """
        result = self._step_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if self.steps_in_backward is not None:
            self._check_finite(loss)  # after the backward pass it is too late
        return result

    def _step_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        if self._in_chunks and self.get_sp_size() == 1:
            share = None if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
            outputs = model(**inputs, num_items_in_batch=share, **self._in_chunks)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        if num_items_in_batch is None:  # under sequence parallelism Trainer passes all inputs to the model
            return self._batch_loss(model, inputs | self._in_chunks, return_outputs)
        local = label_tokens(self.model, inputs["labels"])
        result = self._batch_loss(model, inputs, return_outputs)
        scale = local / num_items_in_batch * self.accelerator.num_processes
        return (result[0] * scale, result[1]) if return_outputs else result * scale

    @property
    def _in_chunks(self) -> dict[str, Any]:
        """The arguments with which the model computes its loss in chunks; none if it does not."""
        chunk, smoothing = self.args.loss_chunk_tokens, self.args.label_smoothing_factor
        return {"loss_chunk_tokens": chunk, "label_smoothing": smoothing} if chunk else {}

    def _batch_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The mean loss over the label tokens of a batch. Trainer's label smoothing fails with virtual tokens: more logits than labels."""
        if self.label_smoother is None or not has_virtual_tokens(self.model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=None)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor
        sums, tokens = row_losses(outputs.logits, labels, aligned=labels.dim() == 1, smoothing=smoothing)
        loss = sums.sum() / tokens.sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """The summed loss of each row of a validation batch, and its number of label tokens: both (rows,).

        Trainer would average the means of batches. That loss depends on how rows are grouped into batches, on padding, and
        on the rows that are repeated to fill the last batch of several processes.
        """
        inputs = self._prepare_inputs(inputs)
        if self._in_chunks:
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs, **self._in_chunks)
            return None, outputs.row_losses, outputs.row_tokens
        shares_rows, seq2seq = self.get_sp_size() > 1, self.model.config.is_encoder_decoder
        labels = inputs["shift_labels" if shares_rows else "labels"]  # with shared rows, this rank's tokens
        if not seq2seq:  # a decoder of an encoder-decoder model may read labels; others would compute a second loss
            inputs.pop("labels", None)
        aligned = shares_rows or seq2seq or labels.dim() == 1
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
            sums, tokens = row_losses(logits, labels, aligned, self.args.label_smoothing_factor)
        return None, sums, tokens

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `--optim` names, with the method's own parameter groups if it has any."""
        if self.optimizer is None and not name_of(self.args).endswith("layerwise"):  # these add hooks when asked for
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = self.config.method.make_optimizer(self.model, self.args, kind, options)
        optimizer = super().create_optimizer(model)
        step_in_chunks(optimizer)
        if self.steps_in_backward is not None:
            refuse_unless_by_weight(type(optimizer), name_of(self.args))
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """Trainer's choice by name, extended by `toolkit.config.optimizers.OWN`."""
        if (own := OWN.get(name_of(args))) is not None:
            return own.optimizer, own.arguments(args)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; stops the run if the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        self._check_finite(loss)
        return loss

    def _check_finite(self, loss: torch.Tensor) -> None:
        """Raises UserError with the step and the last checkpoint, before the optimizer uses the bad gradients."""
        finite = torch.isfinite(loss)
        if not isinstance(finite, FakeTensor) and not finite:
            good = newest_first(Path(self.args.output_dir))
            kept = f"the last good checkpoint is {good[0]}" if good else "no checkpoint had been written yet"
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; {kept}. "
                f"{_remedy(self.model, self.state.global_step)}"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm that Trainer logs, from any engine; also given to the guards."""
        own = self.steps_in_backward
        norm = super()._get_grad_norm(model, grad_norm=grad_norm) if own is None else own.gradient_norm()
        for guards in (callback for callback in self.callback_handler.callbacks if isinstance(callback, Guards)):
            guards.gradient(norm)
        return norm

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches to train on; with --packing their rows are end to end in one, (1, tokens). Validation pads: it needs each row's loss."""
        padding = self.data_collator
        if self.args.packing and not self.data.is_collated:
            self.data_collator = DataCollatorWithFlattening()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padding

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        """The order of rows that `--train_sampling_strategy` names."""
        args, rows = self.args, self.train_dataset
        if args.train_sampling_strategy == "group_by_length":
            lengths = [len(ids) for ids in rows["input_ids"]]
            seed = args.seed if args.data_seed is None else args.data_seed
            self.sampler = LengthGrouped(lengths, args.train_batch_size * args.gradient_accumulation_steps, seed)
        else:
            self.sampler = super()._get_train_sampler(train_dataset)
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Runs one epoch; none if the run resumes after its last step, where Trainer would take one more."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:  # the data loader that skips batches after a resume does not pass the epoch on
            set_epoch(kwargs["epoch"])
        own = self.steps_in_backward
        with nullcontext() if own is None else own.open(self.optimizer.optimizer):
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes Trainer's checkpoint atomically (`atomic_folder`), then deletes old ones."""
        args, state = self.args, self.state
        final = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        fingerprint = RunFingerprint.of(self.config.engine, args, self.data.train_fingerprint)
        with atomic_folder(final, fingerprint, args.should_save, self.accelerator.wait_for_everyone) as temporary:
            self.written_to = temporary.parent
            super()._save_checkpoint(model, trial)
            self.written_to = None
            if state.best_model_checkpoint == str(temporary):
                state.best_model_checkpoint = str(final)
                if args.should_save:
                    state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        if args.should_save:
            self._keep_measured_memory()
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if args.should_save:
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)

    def _keep_measured_memory(self) -> None:
        """Writes memory.json, because a run that resumes from a checkpoint after the last step measures nothing."""
        for memory in (one for one in self.callback_handler.callbacks if isinstance(one, MemoryCallback)):
            file = Path(self.args.output_dir) / "memory.json"
            if memory.ledger is not None and not file.exists():
                with readable_write_errors(file.name, file.parent):
                    atomic_write(file, memory.ledger.to_text())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves optimizer and scheduler; under FSDP2 each rank saves its shards of weights and optimizer state."""
        if not self._is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(self.model, self.optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of a checkpoint."""
        if self._is_fsdp2:
            load_weight_shards(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads optimizer and scheduler of a checkpoint."""
        if not self._is_fsdp2 or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_shards(self.model, self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        """Loads the weights of the best checkpoint into the model."""
        if self._is_fsdp2:
            load_weight_shards(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _is_fsdp2(self) -> bool:
        return self.config.engine.kind is EngineKind.FSDP2

    def _get_output_dir(self, trial: Any) -> str:
        """The folder in which Trainer writes checkpoints, and looks for those to delete."""
        return str(self.written_to or self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint once it has its final name; Trainer calls this earlier too."""
        if self.written_to is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Saves tied weights once, even if an engine gathered a separate tensor for each of their names."""
        if state_dict:
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}  # name to the name it is tied to
            state_dict = {name: w for name, w in state_dict.items() if tied.get(name) not in state_dict}
        super()._save(output_dir, state_dict)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> None:
        """Uploads the run folder from rank 0. The other ranks do not wait: an upload may take longer than their timeout.

        Trainer would first overwrite the converted and checked files with its own save, and the model card with its own.
        """
        is_main = self.is_world_process_zero()
        leave_process_group()
        if not is_main:
            return
        self._finish_current_push()
        HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            ignore_patterns=["_*", ".*", f"*{PREFIX_CHECKPOINT_DIR}-*"],
            revision=self.args.hub_revision,
        )


def _remedy(model: nn.Module, steps: int) -> str:
    """What to do about a loss that is not finite after `steps` steps: mend weights that were not finite before, or train otherwise."""
    for name, p in model.named_parameters():
        given = steps == 0 or not p.requires_grad  # no step has changed it
        # of a full card no copy may be asked for
        if given and p.is_floating_point() and p.numel() and not all(map(torch.isfinite, torch.aminmax(p.detach()))):
            return f"Weights were not finite before the first step ({name}): give a whole checkpoint"
    return "Lower --learning_rate, or compute in fp32 or --bf16"


def _own_callbacks(args: TrainArguments) -> list[TrainerCallback]:
    callbacks = [
        ProgressCallback(),
        MetricsFile(Path(args.output_dir) / "metrics.jsonl"),
        Guards(),
        Preemption(),
        ResumedChoice(),
    ]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
    return callbacks


def train(trainer: FineTuner, checkpoint: str | None = None) -> None:
    """Trains (or resumes from `checkpoint`), saves and checks the result, and prints which checkpoint was selected, and why."""
    args = trainer.args
    args.resume_from_checkpoint = checkpoint  # for trackers, which report whether a run is resumed
    engine = trainer.config.engine
    if args.loss_chunk_tokens and not engine.kind.shards_parameters and engine.sequence_parallel_size == 1:
        check_loss(trainer.model, trainer.data_collator([trainer.data.train[0]]), args)
    if args.packing and not engine.kind.shards_parameters:
        check_packing(trainer.model, [trainer.data.train[0], trainer.data.train[-1]], args)
    try:
        with interruption.deferred_to_a_step():
            trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback | MemoryCallback):
                callback.abort()
        raise
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        say(
            "chosen",
            f"{Path(trainer.state.best_model_checkpoint).name}: best {args.metric_for_best_model} on the validation split"
            f" ({trainer.state.best_metric:.4f})",
        )
    is_main = trainer.is_world_process_zero()
    with whole_files(Path(args.output_dir), is_main, trainer.accelerator.wait_for_everyone) as temporary:
        trainer.save_model(str(temporary), _internal_call=True)
        if is_main:
            trainer.config.method.finish_saving(trainer.model, temporary)
    if is_main:
        check_saved(trainer.model, trainer.config, trainer.data_collator([trainer.data.train[0]]))
    if isinstance(trainer.data, TaskData):
        check_generation(trainer.model, trainer.data, args)

"""Seams into transformers' Trainer: the methods that `FineTuner` overrides, attributes that it sets, and Trainer's arguments."""

from __future__ import annotations

from typing import Any

from toolkit.seams.seam import Seam


def _own_method(method: str, reason: str, breaks: str, **more: Any) -> Seam:
    return Seam(
        name=f"FineTuner.{method}",
        kind="override",
        where="training.trainer:FineTuner",
        target=f"transformers.trainer: Trainer.{method}",
        reason=reason,
        breaks=breaks,
        silent=more.pop("silent", True),
        **more,
    )


# If the base of an override is gone, or no longer called, the override is dead code: training continues without it and no error.
TRAINER = (
    _own_method(
        "_prepare_inputs",
        "shares of rows are made contiguous on the device",
        "sequence parallelism on CPUs computes on strided views, which models refuse",
    ),
    _own_method(
        "compute_loss",
        "the loss is the mean over all label tokens of the optimizer step",
        "the loss of T5, mT5 and BART grows with the number of accumulation steps",
    ),
    _own_method(
        "prediction_step",
        "validation sums the loss by rows",
        "the validation loss depends on how rows fall into batches",
    ),
    _own_method(
        "create_optimizer",
        "LoRA+ gives B's parameters a learning rate of their own",
        "--loraplus_lr_ratio has no effect",
    ),
    _own_method(
        "get_optimizer_cls_and_kwargs",
        "--optim prodigy is found",
        "--optim prodigy is refused by Trainer",
        silent=False,
    ),
    _own_method(
        "training_step",
        "a loss that is not finite stops the run",
        "training continues with NaN",
    ),
    _own_method(
        "_get_grad_norm",
        "the guards see the norm, whichever engine computes it",
        "the guard 'gradient' never gets a norm, and passes",
    ),
    _own_method(
        "get_train_dataloader",
        "--packing lays the rows of training batches end to end, and pads those of validation",
        "--packing has no effect",
    ),
    _own_method(
        "_get_train_sampler",
        "grouping by length is seeded; a shadow step takes its batches in order",
        "group_by_length has another order on each rank and after a resume; a prediction uses shuffled batches",
    ),
    _own_method(
        "_run_epoch",
        "a run that resumes after its last step trains no step; the sampler gets its epoch",
        "a finished run that is resumed trains one more step, and each epoch has the same order",
        source=(("transformers.trainer", r"self\._run_epoch\([^)]*\bepoch=epoch"),),
    ),
    _own_method(
        "_save_checkpoint",
        "checkpoints are written to a temporary folder, hashed and renamed",
        "a kill while saving leaves a half-written checkpoint-N without a manifest",
    ),
    _own_method(
        "_save_optimizer_and_scheduler",
        "under FSDP2 each rank saves its shard of weights and optimizer state",
        "FSDP2's checkpoints have no shards, and cannot be resumed",
    ),
    _own_method(
        "_load_from_checkpoint",
        "under FSDP2 each rank reads its shard of the weights",
        "a resumed FSDP2 run reads accelerate's files, which lack tied tables",
    ),
    _own_method(
        "_load_optimizer_and_scheduler",
        "under FSDP2 each rank reads its shard of the optimizer state",
        "a resumed FSDP2 run starts with a fresh optimizer",
    ),
    _own_method(
        "_load_best_model",
        "under FSDP2 the best checkpoint is read from its shards",
        "--load_best_model_at_end keeps the last weights under FSDP2",
    ),
    _own_method(
        "_get_output_dir",
        "Trainer writes a checkpoint into a temporary folder that is renamed when it is complete",
        "checkpoints are written under their final name from the start",
    ),
    _own_method(
        "_push_from_checkpoint",
        "a checkpoint is uploaded once it has its final name",
        "half-written checkpoints are uploaded",
    ),
    _own_method(
        "_save",
        "tied weights are saved once",
        "checkpoints of sharded engines hold tied tables twice, or cannot be read back",
    ),
    _own_method(
        "push_to_hub",
        "the run folder is uploaded unchanged",
        "Trainer's own model card replaces ours",
    ),
    Seam(
        name="Trainer.training_step",
        kind="patch",
        where="memory.shadow.step",
        target="transformers.trainer: Trainer.training_step",
        signature=("model", "inputs", "num_items_in_batch"),
        reason="a shadow step's fake loss becomes a real 0, so that checks for NaN work",
        breaks="a prediction ends with an error about a value of a fake tensor",
    ),
    Seam(
        name="a trainer's create_optimizer",
        kind="patch",
        where="memory.cuda.device",
        target="transformers.trainer: Trainer.create_optimizer",
        signature=("model",),
        reason="on a card, optimizers use their foreach implementations; set on the trainer of one shadow step only",
        breaks="the optimizer step is predicted as the CPU's, without foreach's temporaries",
        silent=True,
    ),
    Seam(
        name="Trainer's count of label tokens",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer.model_accepts_loss_kwargs Trainer._loss_shifts_labels",
        source=(
            ("transformers.trainer", r"if self\._loss_shifts_labels"),
            ("transformers.trainer", r"self\.model_accepts_loss_kwargs\s*(and|or)"),
        ),
        reason="set after Trainer's constructor: labels are counted for every model, in the same way as in `compute_loss`",
        breaks="the loss is divided by another number of tokens and depends on the accumulation steps",
        silent=True,
    ),
    Seam(
        name="early stopping's counter",
        kind="private",
        where="training.callbacks",
        target="transformers.trainer_callback: EarlyStoppingCallback.early_stopping_patience_counter",
        source=(("transformers.trainer_callback", r"self\.early_stopping_patience_counter \+= 1"),),
        reason="a resumed run counts on from the checkpoint, without --restore_callback_states_from_checkpoint",
        breaks="a run that is killed and resumed stops later than an undisturbed one",
        silent=True,
    ),
    Seam(
        name="Trainer._train_batch_size",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer._train_batch_size",
        source=(("transformers.trainer", r"batch_size=self\._train_batch_size"),),
        reason="a row of a shadow step's data set is a batch",
        breaks="a prediction merges several batches into one, or ends with an error",
    ),
    Seam(
        name="Trainer.data_collator",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer.data_collator",
        source=(("transformers.trainer", r"data_collator = self\.data_collator"),),
        reason="another one while Trainer makes the loader of training batches, with --packing",
        breaks="--packing has no effect",
        silent=True,
    ),
    Seam(
        name="Trainer.optimizer",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer.optimizer",
        source=(("transformers.trainer", r"if self\.optimizer is None"),),
        reason="LoRA+'s optimizer is set before Trainer makes one, so Trainer keeps it",
        breaks="--loraplus_lr_ratio has no effect",
        silent=True,
    ),
    Seam(
        name="Trainer.get_decay_parameter_names",
        kind="private",
        where="recipes.bare_loop",
        target="transformers.trainer: Trainer.get_decay_parameter_names",
        signature=("model",),
        reason="the bare loop, which has no Trainer, calls it with None for `self` and decays the weights that Trainer decays",
        breaks="the bare loop ends with an AttributeError",
        checked_by="tests/test_bare_loop.py",
    ),
    Seam(
        name="Trainer._finish_current_push",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer._finish_current_push",
        signature=(),
        reason="waits for an upload of a checkpoint that is in progress",
        breaks="--push_to_hub ends with an AttributeError",
    ),
    Seam(
        name="Trainer.save_model(_internal_call)",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer.save_model",
        signature=("output_dir", "_internal_call"),
        reason="saving must not upload the model as well",
        breaks="saving ends with a TypeError",
    ),
    Seam(
        name="events of TrainerCallback",
        kind="private",
        where=(
            "distributed.running",
            "training.guards",
            "training.callbacks",
            "training.progress",
            "memory.measure",
            "benchmarks.on_gpu.untraced",
        ),
        target=(
            "transformers.trainer_callback: TrainerCallback.on_train_begin TrainerCallback.on_train_end "
            "TrainerCallback.on_epoch_end TrainerCallback.on_step_begin TrainerCallback.on_pre_optimizer_step "
            "TrainerCallback.on_optimizer_step TrainerCallback.on_step_end TrainerCallback.on_log TrainerCallback.on_save"
        ),
        source=(("transformers.trainer", r"_get_grad_norm\((.|\n)*on_pre_optimizer_step\((.|\n)*on_optimizer_step\("),),
        reason="they are public, but a method that is no event of Trainer is never called; and gradients are clipped before "
        "`on_pre_optimizer_step`",
        breaks="guards, memory ledger, checkpoints on SIGTERM or metrics.jsonl miss their event",
        silent=True,
    ),
)

ARGUMENTS = (
    Seam(
        name="TrainingArguments of a shadow step",
        kind="private",
        where="memory.shadow.step",
        target=(
            "transformers.training_args: TrainingArguments.output_dir TrainingArguments.max_steps TrainingArguments.logging_strategy "
            "TrainingArguments.save_strategy TrainingArguments.eval_strategy TrainingArguments.do_eval TrainingArguments.eval_on_start "
            "TrainingArguments.report_to TrainingArguments.disable_tqdm TrainingArguments.load_best_model_at_end "
            "TrainingArguments.push_to_hub TrainingArguments.resume_from_checkpoint TrainingArguments.dataloader_num_workers "
            "TrainingArguments.logging_nan_inf_filter TrainingArguments.use_cpu TrainingArguments._n_gpu "
            "TrainingArguments._setup_devices TrainingArguments.mixed_precision TrainingArguments.deepspeed_plugin"
        ),
        reason="a copy for two steps on a CPU, changed in its `__dict__` without the checks of the constructor",
        breaks="a setting is not read, so a shadow step writes, logs, evaluates or computes on a GPU",
        silent=True,
    ),
    Seam(
        name="TrainingArguments._n_gpu",
        kind="private",
        where="config.resolved",
        target="transformers.training_args: TrainingArguments._n_gpu",
        source=(("transformers.training_args", r"return self\._n_gpu"),),
        reason="one process drives one GPU",
        breaks="on a machine with several GPUs Trainer wraps the model in DataParallel",
        silent=True,
    ),
    Seam(
        name="TrainingArguments._VALID_DICT_FIELDS",
        kind="private",
        where="config.parser",
        target="transformers.training_args: TrainingArguments._VALID_DICT_FIELDS",
        reason="the flags that take a mapping in YAML",
        breaks="a mapping in --config ends with an AttributeError",
    ),
    Seam(
        name="defaults of TrainingArguments",
        kind="private",
        where="config.arguments",
        target=(
            "transformers.training_args: TrainingArguments.logging_steps TrainingArguments.save_strategy "
            "TrainingArguments.save_total_limit TrainingArguments.resume_from_checkpoint TrainingArguments.optim"
        ),
        reason="`TrainArguments` gives these fields other defaults (tests/test_config.py compares OVERRIDDEN with the fields)",
        breaks="a flag that Trainer no longer reads is still accepted",
        silent=True,
    ),
    Seam(
        name="_argument_group_name",
        kind="private",
        where=(
            "config.arguments",
            "data.loading",
            "models.arguments",
            "methods.adapter",
            "methods.full",
            "methods.ia3",
            "methods.in_context",
            "methods.lora",
            "methods.p_tuning",
            "methods.peft_method",
            "methods.prefix_tuning",
            "methods.prompt_tuning",
            "methods.qlora",
            "methods.selective",
        ),
        source=(("transformers.hf_argparser", r"\._argument_group_name\b"),),
        reason="the title of a dataclass's flags in --help",
        breaks="--help lists all flags without groups",
        silent=True,
    ),
)

TABLE = (*TRAINER, *ARGUMENTS)

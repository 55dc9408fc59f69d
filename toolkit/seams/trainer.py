"""Seams into transformers' Trainer: the methods that `FineTuner` overrides, what it sets of Trainer's own, and its arguments."""

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


# An override whose base is gone, or is not called any more, is dead code: training goes on without it, and without an error.
TRAINER = (
    _own_method(
        "_prepare_inputs",
        "shares of rows are made contiguous on the device",
        "sequence parallelism on CPUs computes on strided views, which models refuse",
    ),
    _own_method(
        "compute_loss",
        "the loss is the mean over all label tokens of the optimizer step",
        "the loss of T5, mT5 and BART grows with the accumulation steps",
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
        "training goes on with NaN",
    ),
    _own_method(
        "_get_grad_norm",
        "the guards see the norm, whichever engine computes it",
        "the guard 'gradient' is never told a norm, and passes",
    ),
    _own_method(
        "_get_train_sampler",
        "grouping by length is seeded; a shadow step takes its batches in their order",
        "group_by_length draws another order on each rank and after a resume; a prediction is of shuffled batches",
    ),
    _own_method(
        "_run_epoch",
        "a run that resumes at its last step takes none; the sampler is told its epoch",
        "a finished run that is resumed trains one step more, and each epoch has the same order",
        source=(("transformers.trainer", r"self\._run_epoch\([^)]*\bepoch=epoch"),),
    ),
    _own_method(
        "_save_checkpoint",
        "checkpoints are written aside, hashed and renamed",
        "a kill while saving leaves a half-written checkpoint-N without a manifest",
    ),
    _own_method(
        "_save_optimizer_and_scheduler",
        "under FSDP2 each rank saves its share of weights and optimizer state",
        "FSDP2's checkpoints have no shards, and cannot be resumed",
    ),
    _own_method(
        "_load_from_checkpoint",
        "under FSDP2 each rank reads its share of the weights",
        "a resumed FSDP2 run reads accelerate's files, which lack tied tables",
    ),
    _own_method(
        "_load_optimizer_and_scheduler",
        "under FSDP2 each rank reads its share of the optimizer state",
        "a resumed FSDP2 run starts with a fresh optimizer",
    ),
    _own_method(
        "_load_best_model",
        "under FSDP2 the best checkpoint is read from its shards",
        "--load_best_model_at_end keeps the last weights under FSDP2",
    ),
    _own_method(
        "_get_output_dir",
        "Trainer writes a checkpoint into the folder that is renamed when it is whole",
        "checkpoints are written under their lasting name at once",
    ),
    _own_method(
        "_push_from_checkpoint",
        "a checkpoint is uploaded once it has its lasting name",
        "half-written checkpoints are uploaded",
    ),
    _own_method(
        "_save",
        "tied weights are saved once",
        "checkpoints of sharded engines hold tied tables twice, or cannot be read back",
    ),
    _own_method(
        "push_to_hub",
        "the run folder is uploaded as it stands",
        "Trainer's own model card replaces ours",
    ),
    Seam(
        name="Trainer.training_step",
        kind="patch",
        where="memory.shadow.step",
        target="transformers.trainer: Trainer.training_step",
        signature=("model", "inputs", "num_items_in_batch"),
        reason="a shadow step's fake loss becomes a real 0, so that checks for NaN have something to look at",
        breaks="a prediction ends with an error about a value of a fake tensor",
    ),
    Seam(
        name="a trainer's create_optimizer",
        kind="patch",
        where="memory.cuda.device",
        target="transformers.trainer: Trainer.create_optimizer",
        signature=("model",),
        reason="on a card, optimizers use their foreach implementations; set on the one trainer of a shadow step, which then goes",
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
        reason="set after Trainer's constructor: labels are counted for every model, and as `compute_loss` counts them",
        breaks="the loss is divided by another number of tokens: it depends on the accumulation steps",
        silent=True,
    ),
    Seam(
        name="Trainer._train_batch_size",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer._train_batch_size",
        source=(("transformers.trainer", r"batch_size=self\._train_batch_size"),),
        reason="a row of a shadow step's data set is a batch",
        breaks="a prediction is of several batches in one, or ends with an error",
    ),
    Seam(
        name="Trainer._prepare_inputs",
        kind="private",
        where="training.guards",
        target="transformers.trainer: Trainer._prepare_inputs",
        signature=("inputs",),
        reason="the guard 'saved' puts a row on the model's device as training does",
        breaks="the guard 'saved' ends with an AttributeError",
    ),
    Seam(
        name="Trainer.optimizer",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer.optimizer",
        source=(("transformers.trainer", r"if self\.optimizer is None"),),
        reason="LoRA+'s optimizer is put there before Trainer makes one, which it then leaves alone",
        breaks="--loraplus_lr_ratio has no effect",
        silent=True,
    ),
    Seam(
        name="Trainer._finish_current_push",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer._finish_current_push",
        signature=(),
        reason="an upload of a checkpoint that is under way is waited for",
        breaks="--push_to_hub ends with an AttributeError",
    ),
    Seam(
        name="Trainer.save_model(_internal_call)",
        kind="private",
        where="training.trainer",
        target="transformers.trainer: Trainer.save_model",
        signature=("output_dir", "_internal_call"),
        reason="saving does not upload the model as well",
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
        reason="they are public, but an event that Trainer does not know is never called; and gradients are clipped before "
        "`on_pre_optimizer_step`",
        breaks="guards, memory account, checkpoints on SIGTERM or metrics.jsonl go without their event",
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
        reason="a copy for two steps on a CPU, set in its `__dict__` without the checks of a constructor",
        breaks="a shadow step writes, logs, evaluates or computes on a GPU: what was set is not read",
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
        reason="`TrainArguments` gives these fields other defaults (OVERRIDDEN is held against the fields in tests/test_config.py)",
        breaks="a flag that Trainer does not read any more is still accepted",
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

"""The bare loop: LoRA in plain PyTorch and accelerate, without Trainer, for when you want to change the training loop.

    accelerate launch recipes/bare_loop.py
    accelerate launch --config_file launch/ddp.yaml recipes/bare_loop.py --model_name_or_path gpt2 --dataset_name knkarthick/dialogsum

Choose it to change what a step does: its loss, its schedule, what is measured. Until you change it, it takes the same steps as
`recipes/lora.py`, on the same batches and with the same losses. Replace `Lora` to use another method. It leaves out
checkpoints, validation while training, gradient checkpointing, other optimizers than AdamW and other engines than DDP: their
flags are errors.
"""

import math
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from toolkit.config.start import start

if __name__ == "__main__":
    start(__file__)  # prints a line now; the imports below take seconds

from toolkit.config import Config, parse_config
from toolkit.distributed.engine import EngineKind
from toolkit.distributed.ranks import exits_cleanly
from toolkit.memory.measure import MemoryCallback
from toolkit.methods.lora import Lora
from toolkit.models.chunked_loss import chunks_of
from toolkit.models.generation import end_as_the_tokenizer
from toolkit.models.losses import label_tokens
from toolkit.models.position_bias import share_position_bias
from toolkit.runs.evaluation import evaluate_by_generation
from toolkit.runs.prediction import say_prediction, show_comparison, show_prediction
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder
from toolkit.training.callbacks import MetricsFile
from toolkit.training.checkpoints import whole_files
from toolkit.training.guards import Guards, check_generation, check_saved

# toolkit comes first, because it hides messages that bitsandbytes logs when transformers imports it.
# isort: split
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    get_scheduler,
    set_seed,
)
from transformers.trainer_callback import CallbackHandler

# The flags of training that have an effect here; those of the method, the model and the data all have one.
USED = {
    *("output_dir", "seed", "data_seed", "use_cpu", "bf16", "fp16", "tf32", "memory_snapshot"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps"),
    "loss_chunk_tokens",
}


@exits_cleanly
def main() -> None:
    config = parse_config(Lora, used=USED, engines=(EngineKind.NONE, EngineKind.DDP))  # flags and YAML
    args = config.training
    if config.predict:
        show_prediction(config)
        return
    ready = prepare(config)  # tokenizer and data; every mistake is found here, before a model loads
    run = RunFolder.create(config, ready)
    say_prediction(config)  # what the worst batch will need

    model = ready.load_model()  # with its weights
    base = evaluate_by_generation(model, ready.data, config, title="base model")

    model = config.method.attach(model)
    end_as_the_tokenizer(model, ready.data.tokenizer)
    model.config.use_cache = False  # keys and values of earlier tokens help to generate, not to train
    chunk = chunks_of(model, args.loss_chunk_tokens)
    share_position_bias(model)
    set_seed(args.seed)
    collate = ready.data.collator(model)
    batches = DataLoader(ready.data.train, args.per_device_train_batch_size, shuffle=True, collate_fn=collate)
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.data_seed),
    )
    wrapped, optimizer, batches = accelerator.prepare(model, adamw(model, config), batches)  # on this device, in DDP
    steps_per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )

    # The loop calls Trainer's callbacks at the same events.
    memory, guards = MemoryCallback(snapshot=config.snapshot_file), Guards()
    metrics = MetricsFile(Path(args.output_dir) / "metrics.jsonl")
    callbacks = CallbackHandler(
        [DefaultFlowCallback(), metrics, guards, memory], model, ready.data.tokenizer, optimizer, schedule
    )
    state, control = TrainerState(max_steps=steps, is_world_process_zero=accelerator.is_main_process), TrainerControl()
    state.compute_steps(args, steps)
    callback_args = (args, state, control)

    model.train()
    callbacks.on_train_begin(*callback_args)
    losses = []  # of the steps since the last one that was logged
    for epoch in range(math.ceil(steps / steps_per_epoch)):
        batches.set_epoch(epoch)  # a new order of rows
        remaining = iter(batches)
        while state.global_step < steps and (
            micro_batches := list(islice(remaining, args.gradient_accumulation_steps))
        ):
            # The loss is the mean over all label tokens of the step, in all its micro-batches, on all processes.
            tokens = accelerator.reduce(sum(label_tokens(model, batch["labels"]) for batch in micro_batches), "sum")
            callbacks.on_step_begin(*callback_args)
            loss = torch.zeros((), device=accelerator.device)
            for number, batch in enumerate(micro_batches, 1):
                accelerator.sync_gradients = number == len(micro_batches)
                share = tokens / accelerator.num_processes  # DDP averages
                with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(wrapped):
                    if chunk:
                        weighted_loss = wrapped(**batch, loss_chunk_tokens=chunk, num_items_in_batch=share).loss
                    else:
                        weighted_loss = wrapped(**batch).loss * (label_tokens(model, batch["labels"]) / share)
                    accelerator.backward(weighted_loss)
                loss += weighted_loss.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            guards.gradient(norm)
            callbacks.on_pre_optimizer_step(*callback_args)
            optimizer.step()
            callbacks.on_optimizer_step(*callback_args)
            learning_rate = schedule.get_last_lr()[0]
            if not accelerator.optimizer_step_was_skipped:  # it is skipped if gradients overflow in fp16
                schedule.step()
            optimizer.zero_grad()
            losses.append(loss)
            tokens_seen = accelerator.reduce(sum(batch["attention_mask"].sum() for batch in micro_batches), "sum")
            state.num_input_tokens_seen += int(tokens_seen)
            state.global_step += 1
            callbacks.on_step_end(*callback_args)
            if control.should_log:
                mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
                logs = {"loss": mean, "grad_norm": float(norm), "learning_rate": learning_rate}
                callbacks.on_log(*callback_args, logs=logs)
                accelerator.print(f"       step  {state.global_step}/{steps}  loss {mean:.4f}")
                losses = []
    callbacks.on_train_end(*callback_args)

    is_main = accelerator.is_main_process
    with whole_files(Path(args.output_dir), is_main, accelerator.wait_for_everyone) as folder:
        if is_main:
            model.save_pretrained(folder)
            ready.data.tokenizer.save_pretrained(folder)
            config.method.finish_saving(model, folder)
    if is_main:
        check_saved(model, config, collate([ready.data.train[0]]))
    check_generation(model, ready.data, args)
    tuned = evaluate_by_generation(model, ready.data, config, title="tuned model")
    show_comparison(config, memory)  # predicted and measured memory
    run.finish(config, ready, base, tuned, memory.ledger)


def adamw(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    """AdamW with the method's own parameter groups if it has any; otherwise Trainer's: no weight decay on biases and norms."""
    args = config.training
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options |= {"fused": True}
    optimizer = config.method.make_optimizer(model, args, torch.optim.AdamW, options)
    if optimizer is not None:
        return optimizer
    with_decay = set(Trainer.get_decay_parameter_names(None, model))  # it does not use its `self`
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name in with_decay], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name not in with_decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


if __name__ == "__main__":
    main()

"""What people type instead of a flag: common short names, and names of transformers 4 that transformers 5 renamed or removed."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import NoReturn

from toolkit.errors import UserError

_BY_ITSELF = "there is no such flag any more, and nothing to set instead"
_LAUNCH = "accelerate launch, with a file of launch/, decides that"

# Another name of a flag, and the flag. The value stays as it is.
SAME: dict[str, str] = {
    # short names, and those of other tools
    **dict.fromkeys(("lr", "learningrate", "peak_lr", "max_lr"), "learning_rate"),
    **dict.fromkeys(
        ("batch_size", "bs", "batch", "batchsize", "train_batch_size", "per_device_batch_size", "micro_batch_size"),
        "per_device_train_batch_size",
    ),
    **dict.fromkeys(("eval_batch_size", "val_batch_size", "test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(
        ("grad_accum", "grad_accum_steps", "gradient_accumulation", "accumulation_steps"), "gradient_accumulation_steps"
    ),
    **dict.fromkeys(("grad_acc", "grad_acc_steps", "accumulate_grad_batches"), "gradient_accumulation_steps"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs", "train_epochs"), "num_train_epochs"),
    **dict.fromkeys(
        ("steps", "num_steps", "max_train_steps", "num_train_steps", "train_steps", "iters", "max_iters"), "max_steps"
    ),
    **dict.fromkeys(("warmup", "num_warmup_steps", "lr_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule", "scheduler_type"), "lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optimizer_type"), "optim"),
    **dict.fromkeys(("clip_grad", "grad_clip", "gradient_clipping", "max_norm"), "max_grad_norm"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("label_smoothing",), "label_smoothing_factor"),
    **dict.fromkeys(("neftune", "neftune_alpha"), "neftune_noise_alpha"),
    **dict.fromkeys(("cut_cross_entropy", "fused_linear_cross_entropy", "loss_chunk_size"), "loss_chunk_tokens"),
    **dict.fromkeys(("tiled_mlp", "tiled_mlp_num_shards", "mlp_tile_size"), "mlp_tile_tokens"),
    **dict.fromkeys(("optimizer_in_bwd", "fused_backward", "fused_backward_pass"), "optimizer_in_backward"),
    **dict.fromkeys(("pack", "padding_free", "sample_packing", "group_texts"), "packing"),
    **dict.fromkeys(("grad_checkpointing", "use_gradient_checkpointing", "checkpointing"), "activation_checkpointing"),
    **dict.fromkeys(("lora_rank", "rank", "r", "lora_dim", "lora_attn_dim"), "lora_r"),
    **dict.fromkeys(("alpha",), "lora_alpha"),
    **dict.fromkeys(("dropout",), "lora_dropout"),
    **dict.fromkeys(
        ("target_modules", "lora_target", "lora_targets", "lora_modules", "lora_target_linear"), "lora_target_modules"
    ),
    **dict.fromkeys(("rslora", "lora_rslora"), "use_rslora"),
    **dict.fromkeys(("dora", "lora_dora"), "use_dora"),
    **dict.fromkeys(("loraplus_ratio", "loraplus_lr"), "loraplus_lr_ratio"),
    **dict.fromkeys(
        ("model", "model_name", "model_id", "model_path", "base_model", "pretrained_model_name_or_path"),
        "model_name_or_path",
    ),
    **dict.fromkeys(("checkpoint_path", "pretrained_model", "base_model_name_or_path"), "model_name_or_path"),
    **dict.fromkeys(("revision",), "model_revision"),
    **dict.fromkeys(("tokenizer", "tokenizer_name_or_path", "tokenizer_path"), "tokenizer_name"),
    **dict.fromkeys(
        ("dataset", "data", "data_path", "dataset_path", "dataset_id", "train_file", "data_file", "train_data"),
        "dataset_name",
    ),
    **dict.fromkeys(("data_dir", "dataset_dir", "training_data", "dataset_name_or_path"), "dataset_name"),
    **dict.fromkeys(("dataset_config", "dataset_subset", "subset"), "dataset_config_name"),
    **dict.fromkeys(("dataset_text_field", "text_field", "input_column", "source_column"), "text_column"),
    **dict.fromkeys(("target_column", "output_column"), "summary_column"),
    **dict.fromkeys(
        (
            "max_seq_length",
            "max_seq_len",
            "seq_length",
            "seq_len",
            "sequence_length",
            "sequence_len",
            "model_max_length",
            "cutoff_len",
        ),
        "max_length",
    ),
    **dict.fromkeys(("block_size", "max_source_length", "max_input_length", "context_length", "max_len"), "max_length"),
    **dict.fromkeys(
        ("max_new_tokens", "max_output_length", "val_max_target_length", "generation_max_length"), "max_target_length"
    ),
    **dict.fromkeys(("generation_num_beams", "beams", "beam_size"), "num_beams"),
    **dict.fromkeys(("max_samples", "num_samples", "train_samples", "limit"), "max_train_samples"),
    **dict.fromkeys(("eval_samples", "max_test_samples", "max_val_samples", "max_predict_samples"), "max_eval_samples"),
    **dict.fromkeys(
        ("output", "out", "out_dir", "outdir", "output_path", "save_dir", "save_path", "run_dir"), "output_dir"
    ),
    **dict.fromkeys(("resume", "resume_from", "checkpoint", "ckpt", "resume_checkpoint"), "resume_from_checkpoint"),
    **dict.fromkeys(
        ("4bit", "load_4bit", "load_in_4_bit", "quantize", "quantization", "quant", "use_4bit"), "load_in_4bit"
    ),
    **dict.fromkeys(("8bit", "load_8bit", "load_in_8_bit", "use_8bit"), "load_in_8bit"),
    **dict.fromkeys(("torch_dtype",), "dtype"),
    **dict.fromkeys(("attention", "attention_implementation", "attn_impl"), "attn_implementation"),
    **dict.fromkeys(("random_seed",), "seed"),
    **dict.fromkeys(("num_workers", "workers"), "dataloader_num_workers"),
    **dict.fromkeys(("log_steps", "logging_interval", "log_every"), "logging_steps"),
    **dict.fromkeys(("save_every", "save_interval", "checkpointing_steps"), "save_steps"),
    **dict.fromkeys(("eval_every", "eval_interval", "evaluation_steps"), "eval_steps"),
    **dict.fromkeys(("logger", "tracker", "log_with"), "report_to"),
    **dict.fromkeys(("experiment_name", "wandb_run_name"), "run_name"),
    **dict.fromkeys(
        ("num_prompt_tokens", "prompt_length", "prefix_length", "pre_seq_len", "num_tokens"), "num_virtual_tokens"
    ),
    **dict.fromkeys(("shots", "n_shots", "few_shot"), "num_shots"),
    **dict.fromkeys(("template", "prompt"), "prompt_template"),
    **dict.fromkeys(("config_file", "cfg", "yaml"), "config"),
    **dict.fromkeys(
        ("use_flash_attention", "flash_attention", "flash_attn", "use_flash_attn"),
        "attn_implementation flash_attention_2",
    ),
    # transformers 4
    "evaluation_strategy": "eval_strategy",
    "evaluate_during_training": "eval_strategy steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "deepspeed_config": "deepspeed",
}

# What takes the place of a name whose value has to be translated, or why there is nothing.
INSTEAD: dict[str, str] = {
    "trust_remote_code": "footprint never runs code that comes with a model; give a model whose architecture transformers has",
    "warmup_ratio": "use --warmup_steps with the same number: below 1 it is a share of all steps",
    "sortish_sampler": "use --train_sampling_strategy group_by_length",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "overwrite_output_dir": "leave it out: a run never overwrites another; give a new --output_dir, or go on with --resume_from_checkpoint",
    "no_cuda": "use --use_cpu",
    "cpu": "use --use_cpu",
    "device": "use --use_cpu for the CPU; on GPUs accelerate launch gives each process its own",
    **dict.fromkeys(("gpus", "num_gpus", "n_gpu", "devices"), f"{_LAUNCH}: accelerate launch --num_processes N"),
    **dict.fromkeys(("use_mps_device", "tpu_num_cores", "xpu_backend"), "leave it out: the device is found by itself"),
    "adafactor": "use --optim adafactor",
    "logging_dir": "leave it out: set the variable TENSORBOARD_LOGGING_DIR, if --report_to tensorboard should write elsewhere",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    **dict.fromkeys(
        ("fp16_backend", "half_precision_backend", "fp16_opt_level"),
        "leave it out: --fp16 uses PyTorch's own automatic mixed precision",
    ),
    **dict.fromkeys(
        ("mixed_precision", "precision", "amp"), "use --bf16 or --fp16 (default: bf16 where the card has it)"
    ),
    "half": "use --fp16 or --bf16",
    "include_inputs_for_metrics": "leave it out: scores are computed from generated text",
    "predict_with_generate": "leave it out: the test split is always scored by what the model generates",
    "compute_metrics": "leave it out: each task has its scores, see --task",
    "include_tokens_per_second": "leave it out: tokens per second are always counted",
    "dispatch_batches": f"leave it out: {_LAUNCH}",
    "split_batches": f"leave it out: {_LAUNCH}",
    "sharded_ddp": "leave it out: choose launch/zero2.yaml or launch/fsdp2.yaml",
    "fsdp_min_num_params": "leave it out: choose launch/fsdp2.yaml, which wraps each layer",
    "fsdp_transformer_layer_cls_to_wrap": "leave it out: choose launch/fsdp2.yaml, which wraps each layer",
    "fsdp_sharding_strategy": "leave it out: choose launch/fsdp2.yaml",
    "push_to_hub_organization": "use --hub_model_id organization/name",
    "tpu_metrics_debug": "use --debug tpu_metrics_debug",
    "debug_underflow": "use --debug underflow_overflow",
    **dict.fromkeys(
        ("past_index", "mp_parameters", "jit_mode_eval", "use_ipex", "ray_scope", "use_legacy_prediction_loop"),
        f"leave it out: {_BY_ITSELF}",
    ),
    **dict.fromkeys(
        ("dataset_split", "split", "train_split", "eval_split", "test_split", "validation_split"),
        "name the data with --dataset_name: its splits train, validation and test are used, and missing ones are split off",
    ),
    **dict.fromkeys(
        ("validation_file", "eval_file", "test_file", "eval_dataset", "test_data", "eval_data"),
        "name one folder with --dataset_name that has train, validation and test files",
    ),
    **dict.fromkeys(
        ("val_set_size", "validation_split_percentage", "test_size"),
        "leave it out: a tenth of the train split is held out where there is no other split",
    ),
    **dict.fromkeys(
        ("train_on_inputs", "mask_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss"),
        "leave it out: the loss covers the answer alone (with --task text every token)",
    ),
    **dict.fromkeys(("use_lora", "lora", "use_peft"), "choose the recipe instead: recipes/lora.py"),
    "qlora": "choose the recipe instead: recipes/qlora.py",
    "method": "choose the recipe instead: recipes/METHOD.py",
    **dict.fromkeys(("full_finetune", "full"), "choose the recipe instead: recipes/full.py"),
    **dict.fromkeys(
        ("modules_to_save", "lora_bias", "bias"),
        "leave it out: recipes/peft_method.py takes every field of a PEFT configuration",
    ),
    "wandb": "use --report_to wandb",
    **dict.fromkeys(("use_wandb", "with_tracking"), "use --report_to wandb (or another tracker)"),
    "tensorboard": "use --report_to tensorboard",
    **dict.fromkeys(("wandb_project", "project_name"), "use --project"),
    **dict.fromkeys(("use_fast_tokenizer", "use_fast"), "leave it out: the fast tokenizer is used where there is one"),
    **dict.fromkeys(("cache_dir",), "leave it out: set the variable HF_HOME instead"),
    **dict.fromkeys(
        ("token", "use_auth_token", "hf_token"), "log in with `hf auth login`, or set the variable HF_TOKEN"
    ),
    **dict.fromkeys(("gpu", "gpu_memory"), "it belongs to footprint predict: footprint predict METHOD --gpu NAME"),
    **dict.fromkeys(
        ("launch", "num_processes"),
        "it belongs to footprint train and footprint predict, or before the recipe: accelerate launch --num_processes N",
    ),
}


def refuse_unknown(
    got: str, where: str, valid: Iterable[str], useless: Collection[str], owners: Iterable[str]
) -> NoReturn:
    """Raises UserError for the unknown flag `got` (`--lr`), or the unknown key of a file, which `where` names.

    `valid` holds the names of the flags, `useless` those of them that are refused, and `owners` the methods that have the flag.
    """
    raise UserError(f"{where}{unknown(got, bool(where), valid, useless, owners)}")


def unknown(got: str, is_key: bool, valid: Iterable[str], useless: Collection[str], owners: Iterable[str]) -> str:
    """The message of `refuse_unknown`: what to write instead, or the nearest name."""
    if not got.startswith("-"):
        return f"unexpected value {got!r}: every setting is a flag, --name value; a value with spaces needs quotes, as --gpu 'RTX 4090'"
    name, there = got.lstrip("-").split("=")[0].replace("-", "_"), set(valid)
    shown = f"unknown key {name}" if is_key else f"unknown flag --{name}"
    low = name.lower()
    owner = next(iter(owners), None)
    if name != low and low in there:
        return f"{shown}: write --{low}"
    if (flag := SAME.get(low)) is not None and flag.split()[0] in there:
        return f"{shown}: use --{flag}"
    if owner is not None:
        return f"{shown} (it belongs to the method {owner}); --help lists the flags"
    if (instead := INSTEAD.get(low)) is not None:
        return f"{shown}: {instead}"
    if low in SAME:
        return f"{shown}: this recipe has no --{SAME[low].split()[0]}; --help lists the flags"
    near = get_close_matches(low[:100], there.difference(useless), n=1, cutoff=0.75)
    return f"{shown}{f' (did you mean {near[0]}?)' if near else ''}; --help all lists them all"

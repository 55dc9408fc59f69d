"""Seams into transformers: what is read of models, configs and loading. Those into Trainer are in trainer.py."""

from __future__ import annotations

from typing import Any

from toolkit.seams.seam import Seam, ours

MODELS = (
    Seam(
        name="TrainingArguments in the file training_args.py",
        kind="private",
        where="config.sources",
        target="transformers.training_args: TrainingArguments",
        source=(
            ("transformers.training_args", r"class TrainingArguments:[\s\S]*\n    learning_rate: float = field\("),
        ),
        reason="flags are checked in the first second from the source of their class, which takes seconds to import",
        breaks="every recipe ends with a KeyError, or refuses a flag that the class has",
    ),
    Seam(
        name="PreTrainedModel._get_dtype_plan",
        kind="private",
        where="models.meta",
        target="transformers.modeling_utils: PreTrainedModel._get_dtype_plan",
        signature=("dtype",),
        reason="the modules that an architecture keeps in float32, as loading keeps them",
        breaks="building a model without weights ends with an AttributeError",
    ),
    Seam(
        name="PreTrainedModel._check_and_adjust_attn_implementation",
        kind="patch",
        where="models.meta",
        target="transformers.modeling_utils: PreTrainedModel._check_and_adjust_attn_implementation",
        signature=("attn_implementation", "is_init_check", "allow_all_kernels"),
        reason="a model is built with FlashAttention on a machine without its package, to predict it",
        breaks="predictions with FlashAttention end with transformers' error that its package is missing",
    ),
    Seam(
        name="models with FlashAttention",
        kind="private",
        where="models.meta",
        target="transformers.modeling_utils: PreTrainedModel._supports_flash_attn PreTrainedModel._compatible_flash_implementations",
        reason="a model that FlashAttention does not support is refused, as in training",
        breaks="predictions with FlashAttention end with an AttributeError",
    ),
    Seam(
        name="names of FlashAttention",
        kind="constant",
        where="models.arguments",
        source=(
            (
                "transformers.modeling_flash_attention_utils",
                r'"flash_attention_2": .*\n?.*"kernels-community/flash-attn2"',
            ),
            ("transformers.modeling_flash_attention_utils", r'"kernels-community/vllm-flash-attn3"'),
        ),
        library="transformers",
        reason="which version of FlashAttention a name runs",
        breaks="a name is refused, or predicted as another version",
    ),
    Seam(
        name="Liger's norm on T5's",
        kind="private",
        where="models.liger",
        library="transformers",
        source=(
            ("transformers.models.t5.modeling_t5", r"self\.variance_epsilon = eps"),
            ("transformers.models.t5.modeling_t5", r"return self\.weight \* hidden_states"),
        ),
        reason="Liger's norm reads the weight and `variance_epsilon` of the module whose forward pass it replaces",
        breaks="--use_liger_kernel does nothing on T5, or ends with an AttributeError",
        silent=True,
    ),
    *(
        Seam(
            name=f"is_{package}_available",
            kind="patch",
            where="memory.shadow.optimizers",
            target=f"transformers.trainer_optimizer: is_{package}_available",
            source=(("transformers.trainer_optimizer", imports),),
            reason="optimizers of packages are predicted without them, by stand-ins of their names",
            breaks="predictions with these optimizers end with transformers' error that the package is missing",
        )
        for package, imports in (
            ("torchao", r"from torchao\.optim import AdamW4bit, AdamW8bit"),
            ("galore_torch", r"from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit"),
            ("apollo_torch", r"from apollo_torch import APOLLOAdamW"),
        )
    ),
    Seam(
        name="importlib of the optimizers",
        kind="patch",
        where="memory.shadow.optimizers",
        target="transformers.trainer_optimizer: importlib",
        source=(("transformers.trainer_optimizer", r"importlib\.metadata\.version\(\"torchao\"\)"),),
        reason="transformers asks for the version of torchao, which need not be installed",
        breaks="predictions with torchao's optimizers end with an error",
    ),
    Seam(
        name="optimizers by layer",
        kind="private",
        where="memory.census",
        target="transformers.trainer_pt_utils: LayerWiseDummyOptimizer",
        source=(("transformers.trainer_pt_utils", r"self\.optimizer_dict = optimizer_dict"),),
        reason="an optimizer for each weight holds the state",
        breaks="the state of layerwise optimizers is labelled as temporaries",
        silent=True,
    ),
    Seam(
        name="steps of a quantizer",
        kind="private",
        where="models.meta",
        target=(
            "transformers.quantizers: AutoHfQuantizer.from_config",
            "transformers.quantizers.base: HfQuantizer.update_dtype HfQuantizer.preprocess_model HfQuantizer.postprocess_model",
            "transformers.modeling_utils: local_torch_dtype",
        ),
        source=(
            ("transformers.modeling_utils", r"hf_quantizer\.preprocess_model\("),
            ("transformers.modeling_utils", r"hf_quantizer\.postprocess_model\("),
        ),
        reason="`from_pretrained` quantizes in these steps, and a model without weights goes through the same steps",
        breaks="a quantized model is predicted with layers that are not quantized",
        silent=True,
    ),
    Seam(
        name="_is_hf_initialized",
        kind="private",
        where="models.loading",
        target="transformers.modeling_utils: PreTrainedModel.initialize_weights",
        source=(("transformers.modeling_utils", r"getattr\(module, \"_is_hf_initialized\", False\)"),),
        reason="set to False on a head's modules and weights, so that they are initialized again",
        breaks="a head for other classes keeps the checkpoint's rows",
        silent=True,
    ),
    Seam(
        name="marks of quantized models",
        kind="private",
        where=("training.guards", "methods.base", "methods.lora", "runs.merge"),
        source=(
            ("transformers.quantizers.base", r"\"is_quantized\", True"),
            ("transformers.quantizers.quantizer_bnb_4bit", r"\"is_loaded_in_4bit\", True"),
            ("transformers.quantizers.quantizer_bnb_8bit", r"\"is_loaded_in_8bit\", True"),
        ),
        library="transformers",
        reason="`is_quantized` decides what is frozen and upcast; merging resets `is_loaded_in_4bit` and `_8bit`",
        breaks="a quantized base is treated as one that is not quantized; IA3 refuses to merge",
        silent=True,
    ),
    Seam(
        name="attention of packed rows",
        kind="private",
        where="models.packing",
        target=(
            "transformers: PreTrainedConfig._attn_implementation",
            "transformers.models.gemma3.configuration_gemma3: Gemma3TextConfig.layer_types",
            "transformers.modeling_utils: PreTrainedModel._supports_attention_backend",
        ),
        source=(
            ("transformers.masking_utils", r"packed_sequence_mask is not None"),
            ("transformers.masking_utils", r"mask_function=mask_factory_function"),
            ("transformers.masking_utils", r"local_size=sliding_window"),
            ("transformers.masking_utils", r"use_vmap=use_vmap"),
        ),
        reason="whether a model takes attention functions from outside, and which rows may see each other",
        breaks="--packing is refused for every model, or the guard 'packing' stops each run",
        checked_by="tests/test_packing.py",
    ),
    Seam(
        name="position bias of T5",
        kind="private",
        where="models.position_bias",
        target=(
            "transformers: PreTrainedConfig._attn_implementation",
            "transformers.integrations.sdpa_attention: create_position_bias_mask",
        ),
        source=(
            ("transformers.models.t5.modeling_t5", r"self\.has_relative_attention_bias = "),
            ("transformers.models.t5.modeling_t5", r"self\.gradient_checkpointing = "),
            ("transformers.models.t5.modeling_t5", r"position_bias=position_bias"),
            ("transformers.integrations.sdpa_attention", r"if position_bias is not None:"),
        ),
        reason="bias and mask are added once, for all layers that share both",
        breaks="each layer adds and keeps its own sum; or recomputed layers end with an error",
        silent=True,
        checked_by="tests/test_position_bias.py",
    ),
    Seam(
        name="all_tied_weights_keys",
        kind="private",
        where="training.trainer",
        target="transformers.modeling_utils: PreTrainedModel.all_tied_weights_keys",
        reason="tied weights, by the name that they are tied to",
        breaks="checkpoints hold tied tables twice",
        silent=True,
    ),
    Seam(
        name="prepare_decoder_input_ids_from_labels",
        kind="private",
        where=("models.generation", "models.loading"),
        target="transformers.models.mbart.modeling_mbart: MBartForConditionalGeneration.prepare_decoder_input_ids_from_labels",
        signature=("labels",),
        reason="an answer begins as labels do: with mBART's token of the target's language",
        breaks="mBART answers in another language",
        silent=True,
        probe=lambda: _labels_begin_as_before(),
    ),
    Seam(
        name="self_attention_cache",
        kind="private",
        where="methods.prefix_tuning",
        target="transformers.cache_utils: EncoderDecoderCache.self_attention_cache",
        reason="of a T5-like model's cache, the prefix uses the decoder's part",
        breaks="PEFT is given the cache of both, and refuses it",
    ),
    Seam(
        name="layers of a cache",
        kind="private",
        where=("models.longest_answer", "memory.shadow.folding"),
        target=(
            "transformers.cache_utils: DynamicCache.layers DynamicLayer.keys DynamicLayer.values DynamicLayer.update "
            "EncoderDecoderCache.self_attention_cache"
        ),
        reason="a predicted cache grows to the length of the longest answer at once; a prefix puts keys into each layer of one",
        breaks="the last step of generation is predicted with a shorter cache, or not at all; a prefix's gradients are not predicted",
        silent=True,
        checked_by="tests/test_beside_steps.py",
    ),
    Seam(
        name="parts that a model may lack",
        kind="private",
        where=("memory.census", "models.catalogue", "models.generation", "benchmarks.on_gpu.speed_jobs"),
        target="transformers.modeling_utils: PreTrainedModel.get_output_embeddings PreTrainedModel.generation_config",
        reason="where logits and loss begin; the generation settings that are repaired before they are saved",
        breaks="a ledger does not separate logits and loss from other activations; a model is trained that cannot be saved",
        silent=True,
    ),
    Seam(
        name="fields of configs",
        kind="private",
        where=(
            "models.loading",
            "models.heads",
            "models.language_part",
            "data.loading",
            "runs.preflight",
            "runs.prediction",
            "memory.cuda.loading",
            "benchmarks.t4_accuracy",
        ),
        source=(("transformers.quantizers.base", r"config\.quantization_config = "),),
        reason="read although an architecture may not have them",
        breaks="a model's limit of positions, its vocabulary or its number of heads is not known, and not checked",
        silent=True,
        target=(
            "transformers: LlamaConfig.max_position_embeddings GPT2Config.n_positions LlamaConfig.vocab_size "
            "LlamaConfig.num_attention_heads LlamaConfig.head_dim PreTrainedConfig.problem_type PreTrainedConfig.dtype "
            "LlamaConfig.tie_word_embeddings",
            "transformers.models.mllama.configuration_mllama: MllamaTextConfig.cross_attention_layers",
        ),
    ),
    Seam(
        name="options of activation checkpointing",
        kind="private",
        where="runs.preflight",
        target="transformers.modeling_utils: PreTrainedModel.activation_checkpointing_enable",
        signature=("every_n_layers", "offload"),
        since="5.23",
        reason="whether this transformers has the options that were given",
        breaks="an option that is there is refused",
    ),
    Seam(
        name="save_on_cpu of transformers",
        kind="patch",
        where="memory.shadow.host_copies",
        target="transformers.modeling_utils: save_on_cpu",
        source=(("transformers.modeling_utils", r"with save_on_cpu\(pin_memory=True, device_type=device_type\)"),),
        since="5.23",
        reason="offloaded activations count as host memory",
        breaks="a prediction with offloaded activations ends with an error",
    ),
    Seam(
        name="a model's forward",
        kind="patch",
        where="models.chunked_loss",
        target="transformers.modeling_utils: PreTrainedModel.forward",
        reason="the base model takes one more argument, for its loss in chunks; this lasts as long as the model",
        breaks="a loss needs the memory of all logits",
    ),
    Seam(
        name="parts of a model before its head",
        kind="private",
        where="models.chunked_loss",
        target="transformers.modeling_utils: PreTrainedModel.get_output_embeddings PreTrainedModel.loss_function",
        source=(
            ("transformers.loss.loss_utils", r"shift_labels = labels\[\.\.\., 1:\]"),
            ("transformers.models.mixtral.configuration_mixtral", r"output_router_logits"),
        ),
        reason="a model calls its decoder, then its head, and treats each position alone from there on",
        breaks="the loss in chunks is not the model's own (the guard 'loss' stops such a run)",
        silent=True,
        checked_by="tests/test_chunked_loss.py",
    ),
    Seam(
        name="decoder_start_token_id of config.json",
        kind="private",
        where="models.generation",
        source=(("transformers.models.t5.modeling_t5", r"self\.config\.decoder_start_token_id"),),
        reason="the token with which a target begins, where generation_config.json does not name one",
        breaks="such a model is refused when it should answer",
        checked_by="tests/test_outside.py",
    ),
    Seam(
        name="quantization_config of a checkpoint",
        kind="private",
        where=("models.language_part", "models.meta", "models.stored"),
        source=(("transformers.quantizers.base", r"config\.quantization_config = "),),
        reason="how a checkpoint is stored: trained as it is, dequantized, or refused",
        breaks="a quantized checkpoint is taken for one of full precision",
        silent=True,
        checked_by="tests/test_architectures.py",
    ),
    Seam(
        name="_weight_conversions",
        kind="private",
        where="models.language_part",
        target="transformers.core_model_loading: WeightTransform.source_patterns",
        source=(("transformers.core_model_loading", r'getattr\(model, "_weight_conversions", None\)'),),
        reason="saving renames weights back; those of a language part are saved under the names of its own class",
        breaks="a saved language part has the names of the multimodal checkpoint, and cannot be loaded",
        silent=True,
        checked_by="tests/test_architectures.py",
    ),
    Seam(
        name="fields of GenerationConfig",
        kind="private",
        where="models.generation",
        target="transformers: GenerationConfig",
        reason="the settings that are copied from a model (TAKEN_OVER), and repaired before it is saved (SAMPLING, BEAMS)",
        breaks="answers ignore a model's forced or banned tokens; a model is trained that cannot be saved",
        silent=True,
        probe=lambda: _generation_fields_gone(),
    ),
    Seam(
        name="config._name_or_path",
        kind="private",
        where=("methods.prompt_tuning", "models.language_part"),
        target="transformers: PreTrainedConfig._name_or_path",
        reason="PEFT tokenizes --prompt_tuning_init_text with the model's own tokenizer",
        breaks="prompt tuning from a text ends with an error",
    ),
    Seam(
        name="types of models",
        kind="constant",
        where=("models.loading", "models.heads", "models.generation"),
        target="transformers.models.auto.configuration_auto: CONFIG_MAPPING_NAMES",
        reason="T5_FAMILY, READS_PADDING and IGNORES_MASK name architectures that need care",
        breaks="T5 is trained in fp16; rows of a batch change each other's scores",
        silent=True,
        probe=lambda: _model_types_gone(),
    ),
    Seam(
        name="class names of layers",
        kind="constant",
        where=("methods.base", "methods.lora", "methods.selective"),
        target=(
            "transformers.pytorch_utils: Conv1D",
            "transformers.models.t5.modeling_t5: T5LayerNorm",
            "transformers.models.llama.modeling_llama: LlamaRMSNorm",
        ),
        reason="linear layers and normalizations are recognized by the names of their classes",
        breaks="--train_norms trains nothing; GPT-2 has no layer that can be a target",
        silent=True,
    ),
    Seam(
        name="errors of AutoConfig",
        kind="constant",
        where="models.loading",
        target="transformers: AutoConfig",
        source=(
            ("transformers.models.auto.configuration_auto", r"does not recognize this architecture"),
            ("transformers.models.auto.configuration_auto", r"Unrecognized model in "),
        ),
        reason="an unknown architecture is recognized by the text of the error",
        breaks="the message does not say to upgrade transformers",
        silent=True,
    ),
)

LOADING = (
    Seam(
        name="order of loading",
        kind="constant",
        where="memory.cuda.loading",
        target="transformers.core_model_loading: dot_natural_key",
        signature=("s",),
        source=(
            (
                "transformers.core_model_loading",
                r"sorted\(state_dict\.items\(\), key=lambda kv: dot_natural_key\(kv\[0\]\)\)",
            ),
        ),
        reason="weights are loaded, and placed in the card's memory, in the order of their names in the checkpoint",
        breaks="what a quantized model leaves reserved after loading is predicted wrongly",
        silent=True,
        checked_by="tests/memory/test_third_party.py",
    ),
    Seam(
        name="caching_allocator_warmup",
        kind="constant",
        where="memory.cuda.loading",
        target=(
            "transformers.modeling_utils: caching_allocator_warmup",
            "transformers.quantizers.base: HfQuantizer.param_element_size",
        ),
        source=(("transformers.modeling_utils", r"torch\.empty\(int\(byte_count // 2\), dtype=torch\.float16"),),
        reason="one block of the size of the whole quantized model is first allocated and freed",
        breaks="what a quantized model leaves reserved after loading is predicted wrongly",
        silent=True,
        checked_by="tests/memory/test_third_party.py",
    ),
)

INTEGRATIONS = (
    Seam(
        name="_hf_deepspeed_config_weak_ref",
        kind="private",
        where="distributed.deepspeed",
        target=(
            "transformers.integrations.deepspeed: _hf_deepspeed_config_weak_ref set_hf_deepspeed_config unset_hf_deepspeed_config"
        ),
        source=(("transformers.integrations.deepspeed", r"global _hf_deepspeed_config_weak_ref"),),
        reason="removed while a model is built whole, then restored",
        breaks="a model on the meta device is partitioned under ZeRO-3, or later models are not",
        silent=True,
    ),
    Seam(
        name="ALL_ATTENTION_FUNCTIONS._local_mapping",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="transformers.modeling_utils: ALL_ATTENTION_FUNCTIONS._local_mapping",
        reason="DeepSpeed puts its own attention there for sequence parallelism; restored when the world ends",
        breaks="later models of the process run DeepSpeed's attention",
        silent=True,
    ),
)


def _of_transformers_4(name: str, target: str, **more: Any) -> Seam:
    return Seam(
        name=name,
        kind="patch",
        where="benchmarks.third_party",
        target=target,
        reason="replaced by what transformers 4 computed",
        breaks="runs of older libraries are predicted with today's functions",
        silent=True,
        checked_by="tests/memory/test_third_party.py",
        **more,
    )


MEASUREMENTS = (
    Seam(
        name="config._attn_implementation",
        kind="private",
        where="benchmarks.on_gpu.training",
        target="transformers: PreTrainedConfig._attn_implementation",
        reason="the attention implementation of a measured run",
        breaks="a measurement on a GPU ends with an AttributeError",
    ),
    # Third-party runs with older libraries are predicted as those libraries computed.
    _of_transformers_4(
        "AttentionInterface._global_mapping",
        "transformers.modeling_utils: AttentionInterface._global_mapping",
        source=(("transformers.utils.generic", r"self\._global_mapping\[key\]"),),
    ),
    _of_transformers_4(
        "DynamicLayer.update",
        "transformers.cache_utils: DynamicLayer.update",
        signature=("key_states", "value_states", "args", "kwargs"),
    ),
    _of_transformers_4(
        "T5's eager_attention_forward",
        "transformers.models.t5.modeling_t5: eager_attention_forward",
        source=(
            ("transformers.models.t5.modeling_t5", r"self\.config\._attn_implementation, eager_attention_forward"),
        ),
    ),
    _of_transformers_4(
        "a model's loss of transformers 4",
        "transformers.modeling_utils: PreTrainedModel.loss_function PreTrainedModel.forward",
        source=(
            ("transformers.models.llama.modeling_llama", r"self\.num_key_value_groups = "),
            ("transformers.models.llama.modeling_llama", r"self\.is_causal = "),
            ("transformers.models.granite.modeling_granite", r"self\.config\.logits_scaling"),
        ),
    ),
)

TABLE = (*MODELS, *LOADING, *INTEGRATIONS, *MEASUREMENTS)


def _generation_fields_gone() -> str | None:
    from transformers import GenerationConfig

    there = GenerationConfig()
    names = [
        *ours("models.generation:TAKEN_OVER"),
        *ours("models.generation:SAMPLING"),
        *ours("models.generation:BEAMS"),
    ]
    gone = [name for name in names if not hasattr(there, name)]
    return f"GenerationConfig has no {', '.join(gone)} any more" if gone else None


def _model_types_gone() -> str | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = (
        ours("models.loading:T5_FAMILY") | ours("models.heads:READS_PADDING") | ours("models.generation:IGNORES_MASK")
    )
    gone = sorted(named - {*CONFIG_MAPPING_NAMES})
    return f"transformers has no model type {', '.join(gone)} any more" if gone else None


def _labels_begin_as_before() -> str | None:
    """Checks that mBART's decoder starts with the last label that is not padding: the target language."""
    import torch
    from transformers import MBartConfig, MBartForConditionalGeneration

    small = {
        f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("layers", "ffn_dim", "attention_heads")
    }
    config = MBartConfig(vocab_size=16, d_model=8, max_position_embeddings=8, pad_token_id=1, **small)
    with torch.device("meta"):
        model = MBartForConditionalGeneration(config)
    first = model.prepare_decoder_input_ids_from_labels(torch.tensor([[2, 9]]))[0, 0].item()
    return None if first == 9 else f"mBART's decoder inputs begin with {first}, not with the target's language"

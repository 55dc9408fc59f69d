"""Seams into PEFT: the tables and base classes that bottleneck adapters extend, DoRA on fake tensors, and prefixes in a cache."""

from __future__ import annotations

from toolkit.seams.seam import Seam, ours

TABLE = (
    Seam(
        name="oldest torchao",
        kind="constant",
        where="runs.doctor",
        source=(("peft.import_utils", r'TORCHAO_MINIMUM_VERSION = packaging\.version\.parse\("0\.16\.0"\)'),),
        reason="footprint doctor names a torchao with which PEFT raises ImportError whenever it adds LoRA",
        breaks="footprint doctor admits an older torchao, or refuses one that works",
        silent=True,
    ),
    Seam(
        name="tables of methods",
        kind="patch",
        where=("methods.adapter", "methods.peft_method"),
        target=(
            "peft.mapping: PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING",
            "peft.mapping_func: get_peft_model",
        ),
        source=(
            ("peft.peft_model", r"PEFT_TYPE_TO_CONFIG_MAPPING\["),
            ("peft.peft_model", r"PEFT_TYPE_TO_TUNER_MAPPING\["),
            ("peft.peft_model", r"PEFT_TYPE_TO_PREFIX_MAPPING\.get\("),
        ),
        reason="bottleneck adapters register themselves there when imported",
        breaks="recipes/adapter.py and its saved runs end with an error",
    ),
    Seam(
        name="BottleneckModel._create_and_replace",
        kind="override",
        where="methods.adapter:BottleneckModel",
        target="peft.tuners.tuners_utils: BaseTuner._create_and_replace",
        signature=("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
        reason="puts the adapter around each target",
        breaks="adapters cannot be attached",
    ),
    Seam(
        name="BottleneckModel._check_merge_allowed",
        kind="override",
        where="methods.adapter:BottleneckModel",
        target="peft.tuners.tuners_utils: BaseTuner._check_merge_allowed",
        reason="a bottleneck adapter is not linear, so it cannot be merged",
        breaks="merging an adapter gives the untuned model",
        silent=True,
    ),
    Seam(
        name="base classes of adapters",
        kind="private",
        where="methods.adapter",
        target=(
            "peft.tuners.tuners_utils: BaseTuner._replace_module BaseTuner.prefix BaseTuner.tuner_layer_cls "
            "BaseTuner.target_module_mapping BaseTunerLayer.adapter_layer_names BaseTunerLayer._active_adapter "
            "BaseTunerLayer._cast_input_dtype BaseTunerLayer._move_adapter_to_device_of_base_layer BaseTunerLayer.set_adapter "
            "BaseTunerLayer.disable_adapters BaseTunerLayer.active_adapters _get_in_out_features"
        ),
        source=(
            ("peft.tuners.tuners_utils", r"self\._active_adapter\b"),
            ("peft.tuners.tuners_utils", r"self\.adapter_layer_names"),
            ("peft.tuners.tuners_utils", r"self\.prefix\b"),
        ),
        reason="attributes and helpers that all tuners of PEFT use",
        breaks="an adapter is not moved, not trained or not saved",
        silent=True,
    ),
    Seam(
        name="DoraLinearLayer.update_layer",
        kind="patch",
        where="methods.lora",
        target="peft.tuners.lora.dora: DoraLinearLayer.update_layer",
        signature=("base_layer", "lora_A", "lora_B", "scaling", "place_on_cpu"),
        source=(("peft.tuners.lora.dora", r"self\.weight = nn\.Parameter\(weight_norm"),),
        reason="on the meta device a 4-bit weight is not packed, so its magnitudes are made from its shape",
        breaks="DoRA over a 4-bit base cannot be predicted",
    ),
    Seam(
        name="BaseTunerLayer._cast_input_dtype",
        kind="patch",
        where="methods.lora",
        target="peft.tuners.tuners_utils: BaseTunerLayer._cast_input_dtype",
        signature=("x", "dtype"),
        source=(
            (
                "peft.tuners.lora.layer",
                r"x = self\._cast_input_dtype\(x, lora_A\.weight\.dtype\)\n.*\n.*lora_A\(dropout\(x\)\)",
            ),
        ),
        reason="under autocast A reads the layer's input as it is; set on single layers",
        breaks="each target keeps a copy of its input for the backward pass",
        silent=True,
    ),
    Seam(
        name="dequantize_module_weight",
        kind="patch",
        where="memory.cuda.quantized",
        target="peft.tuners.lora.dora: dequantize_module_weight",
        signature=("module",),
        source=(("peft.tuners.lora.dora", r"weight = dequantize_module_weight\(base_layer\)"),),
        reason="PEFT recognizes a 4-bit weight by its class, which a fake tensor does not have",
        breaks="DoRA over a 4-bit base is predicted with the packed weight's shape: an error",
    ),
    Seam(
        name="PeftModel.base_model_prepare_inputs_for_generation",
        kind="patch",
        where="models.soft_prompts",
        target="peft: PeftModelForCausalLM.base_model_prepare_inputs_for_generation",
        source=(("peft.peft_model", r"= self\.base_model_prepare_inputs_for_generation\("),),
        reason="the inputs of generation, to which the name past_key_values is added; set on a single model",
        breaks="a prefix is lost while generating (the guard 'generation' stops such a run)",
        silent=True,
    ),
    Seam(
        name="PeftModel.prepare_inputs_for_generation",
        kind="patch",
        where="models.soft_prompts",
        target="peft: PeftModelForCausalLM.prepare_inputs_for_generation",
        source=(("peft.peft_model", r"model_kwargs\[\"past_key_values\"\] = new_past_key_values"),),
        reason="PEFT writes a prefix under the name past_key_values, and transformers 5.24 reads cache: both are set",
        breaks="a prefix is lost while generating (the guard 'generation' stops such a run)",
        silent=True,
    ),
    Seam(
        name="a head's forward",
        kind="patch",
        where="models.soft_prompts",
        target="peft: PeftModelForSequenceClassification.forward",
        source=(("peft.peft_model", r"if \"past_key_values\" (not )?in fwd_params"),),
        reason="PEFT looks for past_key_values in the signature of a base with a head, which transformers 5.24 calls cache",
        breaks="prefix tuning of a head is refused",
    ),
    Seam(
        name="attributes of a PeftModel",
        kind="private",
        where=(
            "models.soft_prompts",
            "training.guards",
            "runs.finished_run",
            "methods.p_tuning",
            "methods.lora",
            "methods.base",
            "benchmarks.third_party",
        ),
        target=(
            "peft: PeftModel.active_peft_config PeftModel.get_base_model PeftModel.active_adapter PeftModel.peft_config PeftModel.get_prompt "
            "PeftModel.word_embeddings PromptLearningConfig.num_virtual_tokens LoraConfig.init_lora_weights "
            "LoraConfig.modules_to_save",
            "peft.config: PeftConfigMixin.is_prompt_learning",
        ),
        reason="the kind of adapter of a model, read even if the model may have none",
        breaks="virtual tokens are not noticed; PiSSA's adapter is compared with the wrong base",
        silent=True,
    ),
    Seam(
        name="Found missing adapter keys",
        kind="constant",
        where="runs.finished_run",
        source=(("peft.peft_model", r"f\"Found missing adapter keys"),),
        target="peft: PeftModel.from_pretrained",
        reason="the warning becomes an error, so that a damaged adapter is not used",
        breaks="a damaged adapter answers as if it were whole",
        silent=True,
    ),
    Seam(
        name="names of LoRA's weights",
        kind="constant",
        where=("methods.lora", "memory.cuda.loading"),
        target="peft.tuners.lora.layer: LoraLayer.adapter_layer_names",
        reason="`.lora_A.` and `.lora_B.` are joined for PiSSA; `base_model.model.` and `.base_layer.` are left out of a "
        "checkpoint's names",
        breaks="a PiSSA run is saved for the wrong base; the order of loading is replayed wrongly",
        silent=True,
        probe=lambda: _names_differ(),
    ),
    Seam(
        name="names of methods",
        kind="constant",
        where=("methods.peft_method", "models.soft_prompts"),
        target="peft: PeftType.PREFIX_TUNING PeftType.CARTRIDGE",
        reason="UNFIT and OVER_QUANTIZED name methods of PEFT",
        breaks="a method that needs more than rows is accepted, or one that supports packed weights is refused",
        silent=True,
        probe=lambda: _types_gone(),
    ),
    Seam(
        name="initializations that alter the base",
        kind="constant",
        where="methods.lora",
        source=tuple(
            ("peft.tuners.lora.layer", rf"\"{name}\"") for name in ("olora", "pissa", "corda", "loftq", "lora_ga")
        ),
        reason="ALTERS_BASE names them",
        breaks="an adapter trained on an altered base is loaded onto the original base",
        silent=True,
    ),
    Seam(
        name="prepare_model_for_kbit_training",
        kind="constant",
        where=("methods.base", "memory.cuda.loading", "benchmarks.third_party"),
        target="peft: prepare_model_for_kbit_training",
        signature=("use_gradient_checkpointing",),
        source=(
            ("peft.utils.other", r"param\.data = param\.data\.to\(torch\.float32\)"),
            ("peft.utils.other", r"empty_cache\(\)|clear_device_cache"),
        ),
        reason="it casts tensors that are not quantized one after the other, and empties the cache",
        breaks="what a quantized model leaves reserved after loading is predicted wrongly",
        silent=True,
    ),
    Seam(
        name="initialize_kv_prefix_from_past_key_values",
        kind="private",
        where="methods.prefix_tuning",
        target="peft.tuners.cartridge.utils: initialize_kv_prefix_from_past_key_values",
        signature=("past_key_values",),
        reason="a prefix is initialized with the keys and values of words",
        breaks="prefix tuning cannot be imported",
    ),
    Seam(
        name="parts of a prompt encoder",
        kind="private",
        where="methods.p_tuning",
        target="peft.tuners.p_tuning.model: PromptEncoder.mlp_head PromptEncoder.embedding PromptEncoder.total_virtual_tokens",
        reason="its last layer is initialized to the vocabulary's mean and spread",
        breaks="P-tuning ends with an AttributeError",
    ),
    Seam(
        name="ModulesToSaveWrapper",
        kind="private",
        where="methods.base",
        target="peft.utils: ModulesToSaveWrapper ModulesToSaveWrapper.modules_to_save",
        reason="a head over a base of 16 bits trains in fp32",
        breaks="a head trains in 16 bits, where small updates are rounded away",
        silent=True,
    ),
)


def _names_differ() -> str | None:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    saved = sorted(get_peft_model_state_dict(model))
    wanted = ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    if saved != wanted:
        return f"a saved adapter has {', '.join(saved)}"
    base = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    there = base == ["base_model.model.0.base_layer.weight", "base_model.model.0.base_layer.bias"]
    return None if there else f"the base's weights are called {', '.join(base)}"


def _types_gone() -> str | None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    there = {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    named = {
        *ours("methods.peft_method:UNFIT"),
        *ours("methods.peft_method:OVER_QUANTIZED"),
    }
    gone = sorted(named - there - {"BOTTLENECK"})
    return f"PEFT has no {', '.join(gone)} any more" if gone else None

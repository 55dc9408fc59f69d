"""Tiny configs of the architectures that people fine-tune: every width 32 or less, two layers, the embedded model's vocabulary."""

from collections.abc import Callable

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from toolkit.embedded import MODEL_DIR

VOCABULARY = 5 + len(AutoTokenizer.from_pretrained(MODEL_DIR))
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
DECODER = TOKENS | WIDTH | {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
BART = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0} | TOKENS
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


def _of(model_type: str, *parts: dict, **fields: object) -> Callable[[], PreTrainedConfig]:
    merged = {name: value for part in parts for name, value in part.items()} | fields
    return lambda: AutoConfig.for_model(model_type, **merged)


def _encoder_decoder() -> PreTrainedConfig:
    """A BERT that writes by another BERT, as `EncoderDecoderModel.from_encoder_decoder_pretrained` makes it."""
    bert = {**TOKENS, **WIDTH, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "encoder-decoder",
        encoder=bert | {"model_type": "bert"},
        decoder=bert | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 1
    return config


def _text_and_vision(model_type: str, text: dict, vision: dict, **fields: object) -> Callable[[], PreTrainedConfig]:
    return _of(model_type, text_config=text, vision_config=vision, **TOKENS_OF_IMAGES, **fields)


TOKENS_OF_IMAGES = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
QWEN_VL = DECODER | {"rope_parameters": MROPE}

DENSE = {
    "llama": _of("llama", DECODER),
    "qwen2": _of("qwen2", DECODER),
    "qwen3": _of("qwen3", DECODER, head_dim=8),
    "gemma2": _of("gemma2", DECODER, head_dim=8),
    "gemma3_text": _of("gemma3_text", DECODER, LAYER_KINDS, head_dim=8),
    "phi3": _of("phi3", DECODER),
    "mistral": _of("mistral", DECODER),
    "smollm3": _of("smollm3", DECODER),
    "olmo2": _of("olmo2", DECODER),
    "granite": _of("granite", DECODER),
    "cohere2": _of("cohere2", DECODER, LAYER_KINDS),
    "gpt_neox": _of("gpt_neox", DECODER),
    "gpt_bigcode": _of("gpt_bigcode", TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256, multi_query=True),
    "falcon": _of("falcon", TOKENS, FALCON, multi_query=True),
    "falcon_grouped": _of("falcon", TOKENS, FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": _of("bloom", TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "opt": _of("opt", DECODER, ffn_dim=64, word_embed_proj_dim=32),
    "gptj": _of("gptj", TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
}
MIXTURES = {
    "mixtral": _of("mixtral", DECODER, LOCAL),
    "qwen3_moe": _of("qwen3_moe", DECODER, EXPERTS, head_dim=8),
    "qwen2_moe": _of("qwen2_moe", DECODER, EXPERTS, shared_expert_intermediate_size=32),
    "gpt_oss": _of("gpt_oss", DECODER, LOCAL, LAYER_KINDS, head_dim=8),
    "granitemoe": _of("granitemoe", DECODER, LOCAL),
    "olmoe": _of("olmoe", DECODER, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _of("deepseek_v3", DECODER, DEEPSEEK),
    "deepseek_v2": _of("deepseek_v2", DECODER, DEEPSEEK),
    "llama4_text": _of(
        "llama4_text", DECODER, LOCAL, intermediate_size_mlp=64, head_dim=8, interleave_moe_layer_step=2
    ),
}
MULTIMODAL = {
    "gemma3": _text_and_vision(
        "gemma3",
        DECODER | LAYER_KINDS | {"head_dim": 8},
        VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "mllama": _text_and_vision(
        "mllama",
        DECODER | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
    ),
    "qwen2_vl": _text_and_vision("qwen2_vl", QWEN_VL, QWEN_VISION | {"embed_dim": 32, "hidden_size": 32}),
    "qwen2_5_vl": _text_and_vision(
        "qwen2_5_vl",
        QWEN_VL,
        QWEN_VISION | {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": _text_and_vision(
        "qwen3_vl",
        QWEN_VL | {"head_dim": 8},
        QWEN_VISION
        | {
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    ),
    "mistral3": _text_and_vision(
        "mistral3",
        DECODER | {"model_type": "mistral", "head_dim": 8},
        VISION | {"model_type": "pixtral", "head_dim": 16},
    ),
    "gemma3n": _text_and_vision(
        "gemma3n",
        DECODER
        | LAYER_KINDS
        | {
            "head_dim": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        {"model_type": "gemma3n_vision", "hidden_size": 32, "vocab_size": 4, "vocab_offset": VOCABULARY},
        audio_config={
            "hidden_size": 32,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "vocab_size": 4,
            "vocab_offset": VOCABULARY + 4,
        },
    ),
    "llama4": _text_and_vision(
        "llama4",
        DECODER | LOCAL | {"intermediate_size_mlp": 64, "head_dim": 8, "interleave_moe_layer_step": 2},
        VISION
        | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32, "intermediate_size": 128},
    ),
}
ENCODER_DECODERS = {
    "t5": _of("t5", T5),
    "mt5": _of("mt5", T5),
    "umt5": _of("umt5", T5),
    "bart": _of("bart", BART),
    "mbart": _of("mbart", BART),
    "pegasus": _of("pegasus", BART),
    "marian": _of("marian", BART, decoder_vocab_size=VOCABULARY),
    "m2m_100": _of("m2m_100", BART, decoder_start_token_id=1),
    "led": _of(
        "led", BART, attention_window=8, max_encoder_position_embeddings=256, max_decoder_position_embeddings=256
    ),
    "bigbird_pegasus": _of("bigbird_pegasus", BART, attention_type="original_full"),
    "prophetnet": _of(
        "prophetnet",
        TOKENS,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=0,
        disable_ngram_loss=True,
        max_position_embeddings=256,
    ),
    "t5gemma": _of(
        "t5gemma",
        encoder=DECODER | LAYER_KINDS | {"head_dim": 8},
        decoder=DECODER | LAYER_KINDS | {"head_dim": 8, "cross_attention_hidden_size": 32},
        decoder_start_token_id=1,
        **TOKENS,
    ),
    "encoder-decoder": _encoder_decoder,
}
HYBRIDS = {  # of attention and layers that keep a state, in which soft prompts do not fit
    "bamba": _of(
        "bamba",
        DECODER,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        attn_layer_indices=[1],
    ),
    "lfm2": _of("lfm2", DECODER, layer_types=["conv", "full_attention"]),
}
ARCHITECTURES = DENSE | MIXTURES | MULTIMODAL | ENCODER_DECODERS

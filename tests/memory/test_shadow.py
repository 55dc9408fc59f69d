"""The shadow step predicts the same bytes as real training on the CPU, without weights.

test_matrix.py runs every method on every architecture with the recipes themselves.
"""

import os
import random

import pytest
import torch
from ledgers import assert_same
from tiny_models import CONFIGS, rows, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import toolkit
from toolkit.errors import UserError
from toolkit.memory.measure import MemoryCallback
from toolkit.memory.shadow.step import predict
from toolkit.methods import METHODS
from toolkit.models.meta import model_on_meta

MODELS = ["t5", "llama", "gpt2", "qwen2"]
QUANTIZED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False),
    "nf4-double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
DENSE = SMALL | {"num_key_value_heads": 2, "intermediate_size": 128}
EXPERTS = DENSE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
OTHERS = (
    dict.fromkeys(["cohere", "granite", "mistral", "olmo2", "phi", "phi3", "smollm3", "stablelm"], DENSE)
    | dict.fromkeys(["gemma", "gemma2", "gemma3_text", "qwen3"], DENSE | {"head_dim": 16})
    | dict.fromkeys(["granitemoe", "mixtral", "olmoe", "phimoe"], EXPERTS)
    | dict.fromkeys(["gpt_oss", "qwen3_moe"], EXPERTS | {"head_dim": 16})
    | dict.fromkeys(["bloom", "falcon", "gpt_neox"], SMALL)
    | {
        "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "mamba": SMALL,
        "opt": SMALL | {"word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 64},
        "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64},
    }
)
OPTIMIZERS = [
    "adamw_torch",
    "adafactor",
    "sgd",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "ademamix_8bit",
    "adamw_torch_fused",
]


def auto_class(name):
    return AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM


def attach(model, method):
    return METHODS[method]().attach(model)


def real_model(name, quantization, folder):
    torch.manual_seed(0)
    model = auto_class(name).from_config(tiny_config(name))
    if quantization is None:
        return model
    model.save_pretrained(folder / "model")
    options = {"quantization_config": QUANTIZED[quantization], "dtype": torch.float32, "device_map": {"": "cpu"}}
    return auto_class(name).from_pretrained(folder / "model", **options)


def empty_model(name, quantization):
    return model_on_meta(
        auto_class(name), tiny_config(name), torch.float32, quantization_config=QUANTIZED.get(quantization)
    )


def training_arguments(folder, **changes):
    arguments = {"per_device_train_batch_size": 2, "max_steps": 2, "optim": "adamw_torch", "logging_strategy": "no"}
    arguments |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    if changes.get("gradient_checkpointing"):
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainingArguments(str(folder), **arguments | changes)


def both(name, method, quantization, folder, **changes):
    """(predicted, measured) ledgers of the same training."""
    arguments = training_arguments(folder, **changes)
    data = rows(name, 2 * 2 * arguments.gradient_accumulation_steps)

    def trainer(model, arguments, callback):
        return Trainer(model, arguments, train_dataset=data, callbacks=[callback])

    def build():
        with torch.device("meta"):
            return attach(empty_model(name, quantization), method)

    predicted = predict(build, trainer, arguments)
    measure = MemoryCallback()
    trainer(attach(real_model(name, quantization, folder), method), arguments, measure).train()
    assert measure.problem is None
    return predicted, measure.ledger


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_every_form_of_quantization_is_predicted_to_the_byte(name, quantization, tmp_path):
    assert_same(*both(name, "lora", quantization, tmp_path, gradient_checkpointing=name == "llama"))


@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHERS)
def test_every_architecture_is_predicted_to_the_byte(name, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, name, OTHERS[name])
    assert_same(*both(name, "full", None, tmp_path, bf16=len(name) % 2 == 0))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_is_predicted_by_running_it(optim, tmp_path):
    # bitsandbytes uses 8 bits from 4,096 elements on; with a vocabulary of 256 and a width of 64 there are weights of both kinds
    assert_same(*both("llama", "full", None, tmp_path, optim=optim))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"weight_decay": 0.1, "label_smoothing_factor": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_the_trainer_are_predicted_by_running_them(changes, tmp_path):
    assert_same(*both("qwen2", "lora", None, tmp_path, **changes))


def test_a_prediction_changes_nothing_in_the_process(tmp_path):
    before = torch.get_rng_state(), random.getstate(), dict(os.environ), Trainer.training_step
    arguments = training_arguments(tmp_path)
    steps = arguments.max_steps
    data = rows("llama", 4)
    predict(
        lambda: empty_model("llama", None),
        lambda model, arguments, callback: Trainer(model, arguments, train_dataset=data, callbacks=[callback]),
        arguments,
    )
    after = torch.get_rng_state(), random.getstate(), dict(os.environ), Trainer.training_step
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert arguments.max_steps == steps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"torch_compile_mode": "reduce-overhead"}, "--torch_compile_mode reduce-overhead .* it records CUDA graphs"),
        ({"torch_compile_mode": "max-autotune"}, "give default or max-autotune-no-cudagraphs"),
        ({"torch_compile_backend": "cudagraphs"}, "--torch_compile_backend cudagraphs cannot be predicted"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(options, says, tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")  # TrainingArguments sets them: restored at the end
    with pytest.raises(UserError, match=says):
        predict(lambda: None, lambda *_: None, training_arguments(tmp_path, torch_compile=True, **options))


def test_a_model_that_branches_on_values_is_refused(tmp_path):
    class Branching(torch.nn.Linear):
        def forward(self, input_ids, labels=None):
            loss = super().forward(torch.ones(1, 4)).sum()
            return {"loss": loss if loss > 0 else -loss}

    def build():
        with torch.device("meta"):
            return Branching(4, 4)

    with pytest.raises(UserError, match="depends on values"):
        predict(
            build,
            lambda model, arguments, callback: Trainer(
                model, arguments, train_dataset=rows("llama", 4), callbacks=[callback]
            ),
            training_arguments(tmp_path),
        )


def test_8_bit_optimizers_take_no_settings_of_another_model():
    """bitsandbytes keeps them by the places of weights in their groups: an embedding's 32 bits would be another weight's."""
    flags = ["--use_cpu", "--max_length", "16", "--per_device_train_batch_size", "1", "--optim", "adamw_bnb_8bit"]
    alone = toolkit.predict("selective", "--train_last_layers", "1", *flags)
    toolkit.predict("full", *flags)  # its first weight is an embedding
    again = toolkit.predict("selective", "--train_last_layers", "1", *flags)
    assert again.phases == alone.phases

"""Rows of a batch end to end: the loss and the gradients of the padded batch, in less memory, and refused where rows would mix."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, DECODER, FALCON, HYBRIDS, MULTIMODAL, TOKENS
from datasets import Dataset
from gradients import Tokenizer
from peft import LoraConfig, get_peft_model
from test_chunked_loss import SPECIAL, TOLERANCE, config_of, difference, gradients, model_of
from tiny_models import save_with_tokenizer, tiny_model
from training_data import config_of as run_of
from training_data import task_data
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq
from transformers import DataCollatorWithFlattening as EndToEnd

from toolkit.config import parse_config
from toolkit.config.arguments import TrainArguments
from toolkit.errors import UserError
from toolkit.methods import METHODS
from toolkit.methods.lora import Lora
from toolkit.models.heads import auto_class, set_head
from toolkit.models.packing import keep_rows_apart, padded_reason
from toolkit.runs.prediction import predict_run, worst_batch
from toolkit.runs.preflight import prepare
from toolkit.training.guards import check_packing
from toolkit.training.trainer import FineTuner

LENGTHS = (29, 13, 40)  # shorter and longer than every window here
REFUSED = {  # of the GPT-like ones
    **dict.fromkeys(("bamba", "lfm2", "qwen3_next"), "pass a state from one row to the next"),
    **dict.fromkeys(("bert", "bloom", "falcon", "falcon_grouped", "falcon_alibi", "gptj", "opt"), "would see all rows"),
    **dict.fromkeys(("biogpt", "doge", "mpt", "rwkv", "stablelm", "xglm", "xlnet"), "would see all rows"),
    "mamba": "pass a state from one row to the next",
    **dict.fromkeys(("gemma2", "gpt_oss"), "with eager attention keeps the scores of all rows"),
}
MORE = {
    "bert": DECODER | {"is_decoder": True},
    "biogpt": DECODER,
    "doge": DECODER,
    "falcon_alibi": TOKENS | FALCON | {"alibi": True},
    "mamba": TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mpt": TOKENS | {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "phi": DECODER,
    "rwkv": TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "starcoder2": DECODER | {"sliding_window": 8},
    "stablelm": DECODER,
    "olmo3": DECODER | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "qwen3_next": DECODER
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "xglm": TOKENS | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "xlnet": TOKENS | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}
NAMES = {*ARCHITECTURES, *HYBRIDS, *SPECIAL, *MORE} - {*MULTIMODAL}
GPT_LIKE = sorted(name for name in NAMES if name not in ARCHITECTURES or not ARCHITECTURES[name]().is_encoder_decoder)


def model_named(name: str):
    if name in MORE:
        return model_of(AutoConfig.for_model(name.removesuffix("_alibi"), **MORE[name]))
    return model_of(config_of(name))


def rows(lengths=LENGTHS) -> list[dict[str, list[int]]]:
    """Rows whose prompts have no labels, but for the second one."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(7, 60, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100] * (n % 2 * 4) + row[n % 2 * 4 :] for n, row in enumerate(ids)]
    return [{"input_ids": i, "attention_mask": [1] * len(i), "labels": own} for i, own in zip(ids, labels, strict=True)]


def padded(some: list) -> dict[str, torch.Tensor]:
    return DataCollatorForSeq2Seq(Tokenizer())(some)


@pytest.mark.parametrize("name", [name for name in GPT_LIKE if name not in REFUSED])
def test_loss_and_gradients_are_those_of_the_padded_batch(name):
    model = model_named(name)
    assert padded_reason(model) == ""
    plain = model(**padded(rows())).loss
    expected = gradients(model, plain)
    keep_rows_apart(model)
    packed = model(**EndToEnd()(rows())).loss
    assert packed.item() == pytest.approx(plain.item(), rel=TOLERANCE)
    assert difference(gradients(model, packed), expected) < TOLERANCE
    assert model(**padded(rows())).loss.item() == plain.item()  # a padded batch is computed as before


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_others_are_refused(name):
    assert REFUSED[name] in padded_reason(model_named(name))


@pytest.mark.parametrize("name", ["bamba", "bert", "bloom", "falcon", "lfm2", "mamba", "mpt", "opt", "rwkv", "xglm"])
def test_the_refused_would_mix_rows(name):
    model = model_named(name)
    expected = gradients(model, model(**padded(rows())).loss)
    assert difference(gradients(model, model(**EndToEnd()(rows())).loss), expected) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "bf16", "lengths"),
    [
        *product(("falcon", "mpt", "rwkv"), (False, True), ((9, 12), (3, 40), (60, 5))),
        # in 16 bits a short row before it changes too little beside its positions, which are learned
        *product(["opt"], [False], ((9, 12), (3, 40), (60, 5))),
        ("opt", True, (60, 5)),
    ],
)
def test_the_guard_finds_rows_that_mix(name, bf16, lengths):
    args = TrainArguments(output_dir="unused", use_cpu=True, bf16=bf16)
    with pytest.raises(UserError, match=f"guard 'packing': in a packed batch .* of this {name} model"):
        check_packing(model_named(name), rows(lengths), args)
    model = model_named("llama")
    keep_rows_apart(model)
    check_packing(model, rows(lengths), args)


def test_no_score_between_two_rows_is_computed_and_no_mask_is_made():
    """Of each row SDPA gets its own tokens, causally: so every kernel can run."""
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    model = model_named("llama")
    keep_rows_apart(model)

    def watched(query, key, value, attn_mask=None, is_causal=False, **options):
        calls.append((query.shape[2], key.shape[2], attn_mask, is_causal))
        return sdpa(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model(**EndToEnd()(rows()))
    assert calls == [(n, n, None, True) for n in LENGTHS] * model.config.num_hidden_layers


def trained(method: str, folder, batch_size: int = 4, **settings) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """The loss of each of 4 steps of 4 rows, the validation loss at the end, and the trained weights."""
    base = tiny_model("llama")
    if method == "qlora":
        base.save_pretrained(folder / "base")
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantized, dtype=torch.float32)
        torch.manual_seed(0)
        lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
    else:
        model = METHODS[method]().attach(base)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    args = TrainArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    data = Dataset.from_list(rows((29, 13, 40, 7, 22, 31, 5, 18)))
    task = SimpleNamespace(model_kind="generating")
    trainer = FineTuner(model, run_of(args), task_data(task, data, data.select(range(3)), Tokenizer()))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return losses, trainer.evaluate()["eval_loss"], weights


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("full", {}),
        ("full", {"loss_chunk_tokens": 0}),
        ("lora", {"batch_size": 2, "gradient_accumulation_steps": 2}),
        ("lora", {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}),
        ("lora", {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
        ("lora", {"mlp_tile_tokens": 10, "loss_chunk_tokens": 16, "label_smoothing_factor": 0.1}),
        ("ia3", {}),
        ("adapter", {}),
        ("qlora", {}),
    ],
    ids=str,
)
def test_a_run_is_the_same_with_every_method_and_lever(method, settings, tmp_path):
    expected, expected_validation, plain = trained(method, tmp_path / "padded", **settings)
    losses, validation, packed = trained(method, tmp_path / "packed", packing=True, **settings)
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 4
    assert validation == pytest.approx(expected_validation, rel=1e-4)
    norm = torch.stack([one.norm() for one in plain.values()]).norm()
    assert all((packed[name] - one).norm() < 1e-3 * norm for name, one in plain.items())


def config(tmp_path, *flags, name="llama", method=Lora):
    folder = save_with_tokenizer(AutoConfig.for_model(name, **DECODER), tmp_path / "model")
    return parse_config(method, ["--model_name_or_path", str(folder), "--use_cpu", "--packing", *flags])


def test_the_worst_batch_is_one_row_of_all_rows(tmp_path):
    run = config(tmp_path, "--max_length", "64", "--max_target_length", "16", "--per_device_train_batch_size", "3")
    batch = worst_batch(run, run.model_config)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, 192)
    )
    assert batch["position_ids"].tolist() == [[*range(64)] * 3]
    assert batch["labels"].ne(-100).sum() == 3 * 16
    assumed = predict_run(run).assumed
    assert (assumed["rows"], assumed["tokens"]) == (3, 64)


def test_it_saves_what_padding_keeps(tmp_path):
    """And what a mask costs: with one, SDPA takes as many key heads as query heads."""
    run = config(tmp_path, "--lora_dropout", "0")
    argv = ["--model_name_or_path", run.model.source, "--use_cpu", "--lora_dropout", "0"]
    batch = rows((96, 24))
    whole = predict_run(parse_config(Lora, argv), batches=[padded(batch)] * 2)
    packed = predict_run(run, batches=[EndToEnd()(batch)] * 2)
    saved = [ledger.phases["backward"].categories["activations_saved"] for ledger in (whole, packed)]
    assert 0.4 < saved[1] / saved[0] < (96 + 24) / (2 * 96)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--train_sampling_strategy", "group_by_length"],
            "group_by_length saves padding, and with --packing there is",
        ),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha scales its noise by the length of a row"),
        (["--torch_compile"], "--torch_compile would compile again"),
        (["--use_cache", "true"], "--use_cache keeps keys and values"),
        (["--per_device_train_batch_size", "1"], "--packing has no effect on batches of one row"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_mean_something_else_with_packed_rows_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        parse_config(Lora, ["--packing", *flags])


def test_the_embedded_t5_is_refused_before_it_is_loaded():
    with pytest.raises(UserError, match=r"--packing: t5 is an encoder-decoder model, .*; leave it out"):
        prepare(parse_config(Lora, ["--packing", "--use_cpu"]))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_are_refused(method, tmp_path):
    with pytest.raises(UserError, match=f"--packing: the virtual tokens of {method} stand before each row"):
        predict_run(config(tmp_path, method=METHODS[method]))


def test_a_head_is_refused():
    config = AutoConfig.for_model("llama", **DECODER)
    set_head(config, ["a", "b"], pad_token_id=0)
    assert padded_reason(auto_class(config).from_config(config)) == "a classification head reads the end of each row"

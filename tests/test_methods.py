"""Every method on every architecture: it trains its own weights, leaves the others unchanged, and saves what it trained."""

import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from tiny_models import CONFIGS, rows, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from toolkit.config import parse_config
from toolkit.errors import UserError
from toolkit.memory.cuda.cards import find_card
from toolkit.methods import METHODS
from toolkit.methods.adapter import Adapter
from toolkit.methods.ia3 import IA3
from toolkit.methods.lora import Lora, save_over_original_base
from toolkit.methods.p_tuning import PTuning
from toolkit.methods.peft_method import UNFIT, AnyPeft
from toolkit.methods.prefix_tuning import PrefixTuning
from toolkit.methods.prompt_tuning import PromptTuning
from toolkit.methods.qlora import QLora
from toolkit.methods.selective import Selective, layers_of
from toolkit.models import catalogue
from toolkit.models.heads import auto_class, set_head
from toolkit.runs.prediction import Batches
from toolkit.training.trainer import FineTuner

MODELS = ["t5", "bart", "llama", "gpt2", "qwen2"]
VARIANTS = [
    *(method() for name, method in sorted(METHODS.items()) if method.trains),
    Lora(use_dora=True),
    Lora(use_rslora=True, init_lora_weights="gaussian"),
    Adapter(adapter_style="pfeiffer"),
    PromptTuning(prompt_tuning_init="random"),
    PrefixTuning(prefix_init="zero"),
    Selective(train_norms=True),
]


def batch(name: str) -> dict[str, torch.Tensor]:
    """Two rows; ids, masks and labels are (2, length), int64."""
    return {key: torch.stack([row[key] for row in rows(name, 2)]) for key in rows(name, 1)[0]}


def logits(model, name: str) -> torch.Tensor:
    """The logits of a base or tuned model on a batch, without dropout: (2, length, vocabulary), without virtual tokens."""
    with torch.no_grad():
        return model.eval()(**batch(name)).logits[:, -batch(name)["labels"].shape[1] :]


def train(model, name: str, steps: int = 3) -> None:
    """A few large steps of sign gradient descent, so that every weight with a gradient changes."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        loss = model(**batch(name)).loss
        loss.backward()
        with torch.no_grad():
            for p in trainable:
                if p.grad is not None:
                    p -= 5e-2 * p.grad.sign()
                    p.grad = None


def label(method) -> str:
    changed = [f.name for f in dataclasses.fields(method) if getattr(method, f.name) != f.default]
    return "-".join([method.name, *changed])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_trained_weights_change_others_do_not_and_all_trained_ones_are_saved(method, name, tmp_path):
    base = tiny_model(name)
    untouched = logits(base, name)
    torch.manual_seed(0)
    model = method.attach(base)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train(model, name)
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    wanted = {key for key, p in model.named_parameters() if p.requires_grad}
    assert moved == wanted
    assert (logits(model, name) - untouched).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    if isinstance(model, PeftModel):
        again = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    else:
        again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_a_model_without_weights_has_the_same_trainable_parameters(method, name):
    real = method.attach(tiny_model(name))
    with torch.device("meta"):
        empty = method.attach(tiny_model(name))

    def shapes(model):
        return {key: tuple(p.shape) for key, p in model.named_parameters() if p.requires_grad}

    assert shapes(real) == shapes(empty)
    assert all(p.is_meta for p in empty.parameters())


def test_trainable_parameters_match_the_published_comparison():
    """mt0-large's shape, without weights; the figures are from PEFT's own examples, with their settings."""
    cases = {
        2_359_296: Lora(lora_r=8),
        40_960: PromptTuning(),
        320_768: PTuning(),
        983_040: PrefixTuning(),
        282_624: IA3(),
    }
    config = catalogue.config_of("bigscience/mt0-large")
    for expected, method in cases.items():
        with torch.device("meta"):
            model = method.attach(AutoModelForSeq2SeqLM.from_config(config))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected, method.name


HEADS = {"llama": ("score", 1), "t5": ("classification_head", 4)}  # its name, its tensors


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", [Lora(), IA3(), Adapter(), PromptTuning(), Selective(train_norms=True)], ids=label)
def test_a_classification_head_is_trained_and_saved_with_the_method(name, method, tmp_path):
    def classifier():
        config = tiny_config(name)
        set_head(config, ["a", "b", "c"], pad_token_id=0)
        torch.manual_seed(0)
        return auto_class(config).from_config(config)

    if (name, method.name) == ("t5", "prompt_tuning"):
        with pytest.raises(UserError, match="does not fit the head of this t5 model, which takes token ids alone"):
            method.attach(classifier())
        return
    ids = torch.randint(3, 256, (2, 16))
    ids[:, -1] = 2  # the end-of-text token, whose state T5's head reads
    inputs = {"input_ids": ids, "labels": torch.tensor([0, 2])}
    model = method.attach(classifier())
    head, tensors = HEADS[name]
    assert len([key for key, p in model.named_parameters() if head in key and p.requires_grad]) == tensors
    model(**inputs).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad.sign()
    model.save_pretrained(tmp_path)
    if isinstance(model, PeftModel):
        again = PeftModel.from_pretrained(classifier(), tmp_path)
    else:
        again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_over_a_16_bit_base_trains_in_fp32_and_reloads(name, dtype, tmp_path):
    def classifier():
        config = tiny_config(name)
        set_head(config, ["a", "b", "c"], pad_token_id=0)
        torch.manual_seed(0)
        return auto_class(config).from_config(config, dtype=dtype)

    model = Lora().attach(classifier())
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and any(HEADS[name][0] in key for key in trained)
    ids = torch.randint(3, 256, (2, 16))
    ids[:, -1] = 2
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for key, p in trained.items() if HEADS[name][0] in key
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits.float(), again.eval()(input_ids=ids).logits.float()
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()  # the head is rounded to the base's 16 bits


# ---- LoRA


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    ("init", "name"),
    [("pissa", "t5"), ("pissa", "gpt2"), ("pissa_niter_4", "llama"), ("olora", "t5")],
)
def test_an_adapter_that_starts_from_principal_components_is_saved_for_the_original_base(init, rslora, name, tmp_path):
    base = tiny_model(name)
    untouched = logits(base, name)
    model = Lora(lora_r=4, init_lora_weights=init, use_rslora=rslora).attach(base)
    torch.testing.assert_close(logits(model, name), untouched, rtol=0, atol=1e-4)  # the base and its parts, together
    train(model, name)
    model.save_pretrained(tmp_path)
    save_over_original_base(model, tmp_path)
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    assert again.peft_config["default"].r == 8
    assert (logits(model, name) - untouched).abs().max() > 1e-2
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=0, atol=1e-4)


def test_rslora_divides_by_the_square_root_of_the_rank():
    scaling = {
        use: next(m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A"))
        for use in (False, True)
        for model in [Lora(lora_r=16, lora_alpha=32, use_rslora=use).attach(tiny_model("t5"))]
    }
    assert scaling == {False: 32 / 16, True: 32 / 16**0.5}


def trainer_of(model, tmp_path, *flags: str, method=Lora):
    """A `FineTuner` over one row, for its optimizer."""
    config = parse_config(method, [*flags, "--output_dir", str(tmp_path / "run"), "--use_cpu"])
    return FineTuner(model, config, Batches(rows("t5", 2)))


def test_a_trainer_keeps_the_hubs_token_and_its_pickled_arguments_do_not(tmp_path):
    trainer = trainer_of(Lora().attach(tiny_model("t5")), tmp_path, "--hub_token", "hf_secret")
    assert trainer.args.hub_token == "hf_secret"
    assert b"hf_secret" not in pickle.dumps(trainer.args)


def test_lora_plus_gives_b_its_own_learning_rate(tmp_path):
    model = Lora(loraplus_lr_ratio=16.0).attach(tiny_model("t5"))
    flags = ("--learning_rate", "1e-3", "--weight_decay", "0.1", "--loraplus_lr_ratio", "16")
    optimizer = trainer_of(model, tmp_path, *flags).create_optimizer()
    names = {id(p): key for key, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    for key, rate in rates.items():
        assert rate == pytest.approx(1.6e-2 if "lora_B" in key else 1e-3), key
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}


@pytest.mark.parametrize("name", ["prodigy", "adamw_torch"])
def test_prodigy_is_an_optimizer_by_name_with_a_rate_of_1(name, tmp_path):
    flags = ("--optim", name, *(("--optim_args", "d_coef=2") if name == "prodigy" else ()))
    trainer = trainer_of(Lora().attach(tiny_model("t5")), tmp_path, *flags)
    optimizer = trainer.create_optimizer()
    assert (type(optimizer).__name__ == "Prodigy") == (name == "prodigy")
    assert trainer.args.learning_rate == (1.0 if name == "prodigy" else 5e-3)
    assert trainer.args.to_dict()["optim"] == name
    assert optimizer.defaults.get("d_coef", 2) == 2


def test_prodigy_finds_a_step_size_and_learns():
    from toolkit.config.optimizers import Prodigy

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(8))
    target = torch.randn(8)
    optimizer = Prodigy([weight])
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).square().sum() < 1e-2 * target.square().sum()
    assert {key: value.numel() for key, value in optimizer.state[weight].items() if key != "step"} == dict.fromkeys(
        ("s", "p0", "exp_avg", "exp_avg_sq"), 8
    )


# ---- quantized bases


def quantized(name, folder, dtype=torch.bfloat16, **how):
    tiny_model(name, dtype).save_pretrained(folder)
    how = how or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    model = type(tiny_model(name)).from_pretrained(
        folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(
    ("method", "upcast"),
    [(Lora, "none"), (Lora, "all"), (IA3, "all"), (Adapter, "none"), (PrefixTuning, "none"), (PromptTuning, "none")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_4_bit_base_trains_and_generates_with_and_without_upcasting(method, upcast, tmp_path):
    model = method(kbit_upcast=upcast).attach(quantized("llama", tmp_path))
    held = {p.dtype for key, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()}
    assert held == {torch.float32 if upcast == "all" else torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch("llama")).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    new = model.eval().generate(input_ids=batch("llama")["input_ids"], max_new_tokens=2, do_sample=False)
    assert new.shape == (2, 34)


def test_upcasting_all_is_pefts_preparation(tmp_path, capsys):
    theirs = prepare_model_for_kbit_training(quantized("llama", tmp_path), use_gradient_checkpointing=False)
    ours = Lora(kbit_upcast="all").attach(quantized("llama", tmp_path)).get_base_model()
    expected = {key: p.dtype for key, p in theirs.named_parameters()}
    found = {key.replace(".base_layer", ""): p.dtype for key, p in ours.named_parameters() if "lora_" not in key}
    assert found == expected
    # 2 embeddings of 256 x 64 and 5 norms of 64, two bytes each
    assert (
        f"7 tensors that are not quantized are upcast to fp32, which costs {2 * (2 * 256 * 64 + 5 * 64) / 1024:.1f} KiB"
        in (capsys.readouterr().out)
    )


def test_qlora_quantizes_to_4_bits_by_default_and_pages_on_a_gpu():
    assert parse_config(QLora, []).model.load_in_4bit
    eight = parse_config(QLora, ["--load_in_8bit"])
    assert eight.model.load_in_8bit and not eight.model.load_in_4bit
    here, there = parse_config(QLora, ["--use_cpu"]), parse_config(QLora, [], find_card("RTX4090"))
    assert "paged" not in here.training.optim and "without a GPU" in here.optimizer_reason
    assert there.training.optim == "paged_adamw_8bit" and "GPU" in there.optimizer_reason
    chosen = parse_config(QLora, ["--optim", "adafactor"], find_card("RTX4090"))
    assert (chosen.training.optim, chosen.optimizer_reason) == ("adafactor", "as asked for")


# ---- adapters and soft prompts


def test_an_adapter_changes_nothing_at_first_and_refuses_to_merge():
    base = tiny_model("t5")
    untouched = logits(base, "t5")
    model = Adapter(adapter_size=8).attach(base)
    assert torch.equal(logits(model, "t5"), untouched)
    # 2 + 2 feed-forwards, 2 + 2 self-attentions and 2 cross-attentions, each with 2 matrices and their biases
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 10 * (2 * 64 * 8 + 64 + 8)
    train(model, "t5")
    assert not torch.equal(logits(model, "t5"), untouched)
    with model.disable_adapter():
        assert torch.equal(logits(model, "t5"), untouched)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_prompt_starts_as_words_of_the_vocabulary_or_of_a_text(data):
    model = PromptTuning().attach(tiny_model("t5"))
    words = {tuple(row) for row in model.get_base_model().shared.weight.tolist()}
    assert all(tuple(row) in words for row in model.prompt_encoder["default"].embedding.weight.tolist())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(data / "models" / "stories260k")
    llama = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time").input_ids
    method = PromptTuning(
        num_virtual_tokens=len(ids), prompt_tuning_init="text", prompt_tuning_init_text="Once upon a time"
    )
    prompt = method.attach(llama).prompt_encoder["default"].embedding.weight
    assert torch.equal(prompt, llama.get_input_embeddings().weight[ids])


def test_p_tuning_starts_in_the_range_of_the_vocabulary():
    model = PTuning().attach(tiny_model("t5"))
    words = model.get_base_model().shared.weight
    with torch.no_grad():
        made = model.prompt_encoder["default"](torch.arange(40))
    torch.testing.assert_close(made.mean(0), words.mean(0), rtol=0, atol=1e-4)
    assert (made - made.mean(0)).std().item() == pytest.approx(words.std().item(), rel=1e-3)


def test_a_prefix_starts_as_the_keys_and_values_of_words():
    model = PrefixTuning(num_virtual_tokens=3).attach(tiny_model("llama"))
    base = model.get_base_model()
    layer = base.model.layers[0]
    with torch.no_grad():  # values of the first layer know nothing of positions
        words = layer.self_attn.v_proj(layer.input_layernorm(base.model.embed_tokens.weight))  # (vocabulary, 32)
    values = model.prompt_encoder["default"].embedding.weight.view(3, 4, 32)[:, 1]  # key, value of layer 0, then 1
    assert (values[:, None] - words).abs().amax(dim=-1).min(dim=1).values.max() < 1e-5


# ---- selective


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("t5", Selective(train_last_layers=2), {"decoder.block.0", "decoder.block.1"}),
        ("t5", Selective(train_last_layers=3), {"decoder.block.0", "decoder.block.1", "encoder.block.1"}),
        ("bart", Selective(train_last_layers=1), {"model.decoder.layers.1"}),
        ("llama", Selective(train_last_layers=1), {"model.layers.1"}),
        ("gpt2", Selective(train_last_layers=1), {"transformer.h.1"}),
        ("qwen2", Selective(train_modules=["lm_head"]), {"model.embed_tokens"}),  # tied
        ("llama", Selective(train_modules=["layers.0.mlp", "norm"]), {"model.layers.0.mlp", "model.norm"}),
        ("gpt2", Selective(train_norms=True), {"ln_1", "ln_2", "ln_f"}),
        ("t5", Selective(train_norms=True), {"layer_norm", "final_layer_norm"}),
        ("bart", Selective(train_biases=True), {"bias"}),
        ("qwen2", Selective(train_biases=True), {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
    ],
    ids=lambda value: label(value) if isinstance(value, Selective) else None,
)
def test_selective_tuning_only_trains_the_chosen_part(name, method, expected):
    model = method.attach(tiny_model(name))
    for key, p in model.named_parameters():
        inside = any(key.startswith(f"{part}.") or f".{part}." in key or key.endswith(f".{part}") for part in expected)
        assert p.requires_grad == inside, key


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_in_every_architecture(name):
    assert len(layers_of(tiny_model(name))) == (4 if name in ("t5", "bart") else 2)


# ---- any method of PEFT


@pytest.mark.parametrize("peft_type", sorted(t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING if t not in UNFIT))
def test_each_method_of_peft_trains_or_is_refused_in_one_line(peft_type):
    method = AnyPeft(peft_type=peft_type)
    try:
        method.check({})  # TRAINABLE_TOKENS asks for its tokens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = method.attach(tiny_model("llama"))
            before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
            train(model, "llama")
    except UserError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) > 40
        return
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)


def test_default_targets_that_a_model_lacks_are_reported(capsys):
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", num_key_value_heads=2, num_local_experts=4, vocab_size=64, **settings)
    IA3().attach(auto_class(config).from_config(config))
    assert (
        "PEFT's default targets w2 are not in this model and are left out; --ia3_target_modules"
        in capsys.readouterr().out
    )
    IA3().attach(tiny_model("llama"))
    assert "left out" not in capsys.readouterr().out


def test_a_file_configures_a_method_of_peft(tmp_path):
    file = tmp_path / "loha.json"
    file.write_text(json.dumps({"r": 2, "target_modules": ["wi"]}))
    model = parse_config(AnyPeft, ["--peft_type", "LOHA", "--peft_config", str(file)]).method.attach(tiny_model("t5"))
    assert {key.split(".")[-3] for key, p in model.named_parameters() if p.requires_grad} == {"wi"}
    assert model.peft_config["default"].r == 2


# ---- flags and models that cannot be right


@pytest.mark.parametrize(
    ("method", "flags", "expected"),
    [
        (Lora, "--kbit_upcast all", "no effect without --load_in_4bit"),
        (Lora, "--init_lora_weights piza", "give default, gaussian"),
        (Lora, "--init_lora_weights pissa --load_in_4bit", "changes the base's weights"),
        (Lora, "--init_lora_weights olora --use_dora", "exclude each other"),
        (Lora, "--init_lora_weights orthogonal --lora_r 3", "needs an even --lora_r"),
        (Lora, "--loraplus_lr_ratio 0.5", "give at least 1"),
        (Lora, "--loraplus_lr_ratio 16 --optim prodigy", "only one learning rate"),
        (Lora, "--optim prodigy --optim_args d_coaf=2", "Prodigy has no argument d_coaf"),
        (QLora, "--load_in_4bit false", "use recipes/lora.py"),
        (QLora, "--init_lora_weights pissa", "changes the base's weights"),
        (IA3, "--load_in_4bit --kbit_upcast none", "does not work with (IA)3"),
        (AnyPeft, "--peft_type TRAINABLE_TOKENS", "needs token_indices"),
        (IA3, "--ia3_target_modules k --ia3_feedforward_modules wo", "must also be in --ia3_target_modules"),
        (Adapter, "--adapter_size 0", "--adapter_size 0 is not possible"),
        (Adapter, "--adapter_style pfeiffer --adapter_target_modules wo", "leave one of them out"),
        (PromptTuning, "--num_virtual_tokens 0", "--num_virtual_tokens 0 is not possible"),
        (PromptTuning, "--prompt_tuning_init text", "needs --prompt_tuning_init_text"),
        (PromptTuning, "--prompt_tuning_init_text Hi", "no effect without --prompt_tuning_init text"),
        (PTuning, "--encoder_hidden_size 0", "--encoder_hidden_size 0 is not possible"),
        (PrefixTuning, "--gradient_checkpointing", "exclude each other"),
        (Selective, "--train_norms --train_biases", "--train_biases and --train_norms exclude each other"),
        (Selective, "--train_last_layers 0", "--train_last_layers 0 is not possible"),
        (Selective, "--train_norms --load_in_8bit", "quantized weights cannot be trained"),
        (AnyPeft, "--peft_type VARA", "did you mean VERA?"),
        (AnyPeft, "--peft_type XLORA", "mixes LoRA adapters"),
        (
            AnyPeft,
            "--peft_type LOHA --load_in_4bit",
            "PEFT's LOHA would treat a quantized weight as one of full precision",
        ),
        (AnyPeft, "--peft_config nowhere.yaml", "nowhere.yaml: cannot be read"),
    ],
)
def test_a_flag_that_cannot_be_right_is_one_clear_line(method, flags, expected):
    with pytest.raises(UserError) as caught:
        parse_config(method, flags.split())
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("t5", Selective(train_biases=True), "this t5 model has no biases"),
        ("llama", Selective(train_biases=True), "this llama model has no biases"),
        ("t5", Selective(train_modules=["lm_hat"]), "did you mean lm_head?"),
        ("llama", Selective(train_last_layers=3), "this model has 2 layers"),
        ("gpt2", Lora(init_lora_weights="olora"), "olora does not know GPT-2's Conv1D"),
        ("gpt2", Adapter(adapter_target_modules=["c_prog"]), "did you mean c_proj?"),
        ("t5", IA3(ia3_target_modules=["key"]), "--ia3_target_modules key matches no module"),
        ("t5", Lora(lora_target_modules=["q_proj"]), "--lora_target_modules q_proj matches no module"),
        ("t5", AnyPeft(peft_type="ADAPTION_PROMPT"), "peft_method does not fit this t5 model"),
    ],
    ids=lambda value: label(value) if dataclasses.is_dataclass(value) else None,
)
def test_the_error_of_an_unsuitable_method_says_what_fits(name, method, expected):
    with pytest.raises(UserError) as caught:
        method.attach(tiny_model(name))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_all_linear_warns_if_it_leaves_out_experts(name, capsys):
    config = AutoConfig.for_model(name, **CONFIGS["llama"], **EXPERTS)
    model = Lora(lora_target_modules=["all-linear"], lora_dropout=0.0).attach(AutoModelForCausalLM.from_config(config))
    tuned = any(p.requires_grad and ".experts." in parameter for parameter, p in model.named_parameters())
    assert tuned is (name == "mixtral")  # whose experts PEFT knows
    assert ("all-linear leaves out the experts" in capsys.readouterr().out) is not tuned


def test_lora_has_its_default_targets_in_a_model_whose_experts_peft_knows():
    config = AutoConfig.for_model("mixtral", **CONFIGS["llama"], **EXPERTS)
    model = Lora().attach(AutoModelForCausalLM.from_config(config))
    names = {
        parameter.split(".lora_")[0].rsplit(".", 1)[-1] for parameter, p in model.named_parameters() if p.requires_grad
    }
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", MODELS)
def test_lora_under_autocast_keeps_one_input_for_all_targets_that_read_it(name):
    """Compared with PEFT's own layers, which cast each target's input: less to keep, and the same loss and gradients, bit for bit."""

    def step(peft_casts):
        torch.manual_seed(0)
        base = tiny_model(name).to(torch.bfloat16)
        for dropout in (module for module in base.modules() if isinstance(module, torch.nn.Dropout)):
            dropout.p = 0.0
        model = Lora(lora_dropout=0.0, lora_target_modules=["all-linear"]).attach(base).train()
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                torch.nn.init.ones_(layer.lora_B["default"].weight)
                if peft_casts:
                    del layer._cast_input_dtype
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(name)).loss
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        nbytes = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
        loss.backward()
        return nbytes, loss, [p.grad for p in model.parameters() if p.requires_grad]

    (more, loss, gradients), (less, same_loss, same_gradients) = step(True), step(False)
    assert less < 0.98 * more
    assert torch.equal(loss, same_loss) and all(map(torch.equal, gradients, same_gradients))


def test_lora_outside_of_autocast_casts_its_inputs_as_peft_does():
    """Its A is in fp32, and the base in bf16: without a cast the product is an error."""
    model = Lora(lora_dropout=0.0).attach(tiny_model("llama").to(torch.bfloat16))
    model(**batch("llama")).loss.backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

"""Every architecture that people fine-tune starts without a method flag: attached, one forward and backward pass, generation."""

import json

import pytest
import torch
from architectures import ARCHITECTURES, ENCODER_DECODERS, HYBRIDS, MIXTURES, MULTIMODAL
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from toolkit.cli import main as footprint
from toolkit.embedded import MODEL_DIR
from toolkit.errors import UserError
from toolkit.memory.measure import MemoryCallback
from toolkit.methods import METHODS
from toolkit.models import catalogue
from toolkit.models.arguments import ModelArguments
from toolkit.models.generation import end_as_the_tokenizer, generation_error
from toolkit.models.language_part import language_part
from toolkit.models.loading import build_on_meta, load_model, load_model_config, load_tokenizer
from toolkit.models.stored import original_of
from toolkit.tasks.sequence_classification import HeadPromptTokenizer
from toolkit.tasks.tokenization import Truncation

# Of the catalogue, in their real sizes
REAL = [
    "microsoft/phi-4",
    "google/gemma-3-4b-it",
    "google/gemma-3-12b-it",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-4B-Instruct-2507",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "HuggingFaceTB/SmolLM3-3B",
    "openai/gpt-oss-20b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "google/t5gemma-2b-2b-ul2",
    "facebook/bart-large-cnn",
    "google/pegasus-xsum",
    "google/flan-t5-large",
    "bigscience/mt0-base",
    "allenai/OLMo-2-0425-1B",
    "ibm-granite/granite-3.3-2b-instruct",
]
QUICK = {("lora", "facebook/bart-large-cnn"), ("qlora", "openai/gpt-oss-20b"), ("full", "bigscience/mt0-base")}
CPU = TrainingArguments(use_cpu=True, report_to="none")
WHOLE = sorted(ARCHITECTURES.keys() - {"gemma3n"})  # its vision tower needs timm


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes the folder of a tiny random model of an architecture, once."""
    place = tmp_path_factory.mktemp("architectures")

    def make(name):
        if not (place / name).exists():
            config = (ARCHITECTURES | HYBRIDS)[name]()
            seq2seq = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            torch.manual_seed(0)
            (AutoModelForImageTextToText if name in MULTIMODAL else seq2seq).from_config(config).save_pretrained(
                place / name
            )
            AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(place / name)
        return place / name

    return make


def method(name, **flags):
    made = METHODS[name](**flags)
    made.check(flags | ({"load_in_4bit": True} if name == "qlora" else {}))
    return made


def attached(folder, name, **flags):
    """The tokenizer and the trained model, after the same attachment to a model without weights."""
    args = ModelArguments(str(folder), load_in_4bit=name == "qlora")
    config = load_model_config(args)
    empty = method(name, **flags).attach(build_on_meta(args, config, torch.float32))
    model = method(name, **flags).attach(load_model(args, config, torch.float32, CPU))
    trained = [{n: tuple(p.shape) for n, p in m.named_parameters() if p.requires_grad} for m in (empty, model)]
    assert trained[0] == trained[1]
    return load_tokenizer(args), model


def batch():
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.matrix(sample=20)
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("how", ["full", "lora", "qlora", "ia3", "adapter"])
def test_each_architecture_starts_without_a_method_flag(how, name, folder_of):
    tokenizer, model = attached(folder_of(name), how)
    model.train()(**batch()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    heads = [n for n, p in model.named_parameters() if p.requires_grad and "head" in n]
    assert how == "full" or not heads
    assert generation_error(model, tokenizer, [7, 8, 9, 10]) < 1e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_lora_leaves_out_stacked_experts_and_says_so(name, folder_of, capsys):
    attached(folder_of(name), "lora")
    out = " ".join(capsys.readouterr().out.split())
    assert name == "mixtral" or ("the experts," in out and "are left out" in out)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_all_linear_reaches_the_experts_without_dropout(name, folder_of, capsys):
    _, model = attached(folder_of(name), "lora", lora_target_modules=["all-linear"])
    assert any(".experts." in n and p.requires_grad for n, p in model.named_parameters())
    assert "no dropout: it is 0" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="give 0"):
        attached(folder_of(name), "lora", lora_target_modules=["all-linear"], lora_dropout=0.1)


@pytest.mark.parametrize("name", sorted(MULTIMODAL.keys() - {"gemma3n"}))
def test_the_language_part_computes_what_the_whole_model_does_and_is_saved_as_a_plain_model(name, folder_of, tmp_path):
    args = ModelArguments(str(folder_of(name)))
    config = load_model_config(args)
    part = load_model(args, config, torch.float32, CPU).eval()
    whole = AutoModelForImageTextToText.from_pretrained(folder_of(name)).eval()
    rows = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(part(**rows).logits, whole(**rows).logits)
    part.save_pretrained(tmp_path)
    again, found = type(part).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert all(torch.equal(p, q) for p, q in zip(part.parameters(), again.parameters(), strict=True))


def test_gemma_3n_has_a_language_part():
    assert language_part(ARCHITECTURES["gemma3n"]()).model_type == "gemma3n_text"


@pytest.mark.parametrize("name", ["falcon", "falcon_grouped", "gpt_bigcode", "gpt_oss", "gemma3", "encoder-decoder"])
def test_a_prefix_has_the_shape_of_the_cache(name, folder_of):
    tokenizer, model = attached(folder_of(name), "prefix_tuning")
    model.train()(**batch()).loss.backward()
    assert generation_error(model, tokenizer, [7, 8, 9, 10]) < 1e-2


@pytest.mark.parametrize("name", ["deepseek_v3", "mllama", "t5gemma", "prophetnet", "lfm2", "bamba"])
def test_a_prefix_that_does_not_fit_is_refused(name, folder_of):
    with pytest.raises(UserError, match="prefix_tuning does not fit"):
        attached(folder_of(name), "prefix_tuning")


@pytest.mark.parametrize("how", ["prompt_tuning", "p_tuning"])
def test_soft_prompts_before_a_model_that_does_not_generate_from_embeddings_are_refused(how, folder_of):
    with pytest.raises(UserError, match="does not generate from embeddings; use LoRA"):
        attached(folder_of("bamba"), how)
    attached(folder_of("lfm2"), how)


@pytest.mark.matrix(sample=4)
@pytest.mark.parametrize("name", ["encoder-decoder", "t5gemma", "prophetnet", "opt"])
@pytest.mark.parametrize("how", ["prompt_tuning", "p_tuning", "peft_method", "selective"])
def test_other_methods_start_too(how, name, folder_of):
    _, model = attached(folder_of(name), how)
    model.train()(**batch()).loss.backward()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_base_stored_in_4_bits_trains_with_qlora_and_other_recipes_name_the_original(name, kind, folder_of, tmp_path):
    family = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    folder = tmp_path / f"{name}-bnb-4bit"
    family.from_pretrained(folder_of(name), quantization_config=packed, device_map={"": "cpu"}).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    _, model = attached(folder, "qlora")
    weight = next(p for p in model.parameters() if type(p).__name__ == "Params4bit")
    assert weight.quant_state.quant_type == kind
    model.train()(**batch()).loss.backward()
    with pytest.raises(
        UserError, match=rf"4 bits: recipes/qlora.py trains it.*give the original model, {name}, by its hub id"
    ):
        load_model_config(ModelArguments(str(folder)))


STORED = {
    "AWQ": {"quantization_config": {"quant_method": "awq"}},
    "GPTQ": {"quantization_config": {"quant_method": "gptq"}},
    "FP8": {"quantization_config": {"quant_method": "fp8"}},
    "exl2": {"quantization_config": {"quant_method": "exl2"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "MLX": {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
    "MLX, older": {"quantization": {"group_size": 64, "bits": 4}},
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}], ids=["lora", "qlora"])
def test_other_quantized_folders_name_the_original(flags, kind, folder_of, tmp_path):
    config = json.loads((folder_of("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | STORED[kind]))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "README.md").write_text("---\nbase_model:\n- someone/original\n---\n")
    with pytest.raises(
        UserError,
        match=f"stored in {kind.split(',')[0]}, which is not trained here; give the original, someone/original",
    ):
        load_model_config(ModelArguments(str(tmp_path), **flags))


@pytest.mark.parametrize("ending", ["gguf", "GGUF"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_gguf_names_the_original(given, ending, tmp_path):
    file = tmp_path / f"Llama-3.2-3B-Instruct-Q4_K_M.{ending}"
    file.touch()
    with pytest.raises(UserError, match=r"GGUF.*give the original, meta-llama/Llama-3.2-3B-Instruct$"):
        load_model_config(ModelArguments(str(tmp_path if given == "folder" else file)))


def test_a_file_whose_name_tells_no_model_names_no_original(tmp_path):
    file = tmp_path / "model.Q4_K_M.gguf"
    file.touch()
    with pytest.raises(UserError, match=r"give the original model, which its README names$"):
        load_model_config(ModelArguments(str(file)))


@pytest.mark.parametrize(
    "source, original",
    [
        ("unsloth/Some-3B-Instruct-bnb-4bit", "unsloth/Some-3B-Instruct"),
        ("unsloth/Some-3B-unsloth-bnb-4bit", "unsloth/Some-3B"),
        ("TheBloke/Mistral-7B-v0.1-GGUF", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("somebody/Model-8B-FP8-dynamic", "somebody/Model-8B"),
        ("RedHatAI/Model-8B-quantized.w4a16", "Model-8B"),
        ("somebody/Model-8B", None),
    ],
)
def test_the_original_of_a_quantized_copy(source, original):
    assert original_of(source) == original


@pytest.mark.parametrize(
    ("name", "files", "instead"),
    [
        ("empty", [], r"give a folder with config.json, tokenizer and weights as transformers saves them, or a hub id"),
        ("models--meta-llama--Llama-3.2-1B", [], "give the model's id, meta-llama/Llama-3.2-1B$"),
        ("outer", ["inner/config.json"], r"give .*outer/inner$"),
    ],
)
def test_a_folder_without_a_model_says_what_to_give_instead(name, files, instead, tmp_path):
    (tmp_path / name).mkdir()
    for file in files:
        (tmp_path / name / file).parent.mkdir()
        (tmp_path / name / file).write_text("{}")
    with pytest.raises(UserError, match=rf"{name}: the folder has no config.json, so it holds no model; .*{instead}"):
        load_model_config(ModelArguments(str(tmp_path / name)))


@pytest.mark.parametrize(
    "source",
    [
        "TheBloke/Mistral-7B-v0.1-GGUF",
        "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
        "a/B-AWQ",
        "a/B-fp8",
        "mlx-community/Llama-3.2-1B-Instruct-4bit",
    ],
)
def test_ids_of_formats_for_inference_are_refused_without_asking_the_hub(source):
    with pytest.raises(UserError, match="a format that is made for inference alone; give the original, "):
        load_model_config(ModelArguments(source))


@pytest.mark.parametrize("name", ["t5", "bart", "encoder-decoder", "prophetnet"])
def test_an_encoder_decoder_without_a_first_token_is_refused_before_training(name, folder_of, tmp_path):
    config = load_model_config(ModelArguments(str(folder_of(name))))
    config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(UserError, match="does not say with which token a target begins; add decoder_start_token_id"):
        build_on_meta(ModelArguments(str(folder_of(name))), config, torch.float32)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_a_head_reads_one_end_of_text_token_whatever_the_text_holds(name, folder_of):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    made = HeadPromptTokenizer(tokenizer, "{text}", True, 12, 0, ("a", "b"))
    end = tokenizer.eos_token
    texts = ["I saw cats", f"I {end} saw {end}", end, "", "dogs " * 40, f"dogs {end} " * 40]
    rows = [made.row(text, "a", Truncation()) for text in texts]
    assert all(row["input_ids"].count(tokenizer.eos_token_id) == 1 and len(row["input_ids"]) <= 12 for row in rows)
    config = ARCHITECTURES[name]()
    model = AutoModelForSequenceClassification.from_config(config)
    assert model(**tokenizer.pad(rows, return_tensors="pt")).loss.isfinite()


def test_steps_of_a_compiled_model_are_not_measured_and_end_without_an_error():
    callback = MemoryCallback()
    state, control = TrainerState(), TrainerControl()
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    arguments.torch_compile = True
    for event in (callback.on_train_begin, callback.on_step_begin, callback.on_step_end, callback.on_train_end):
        event(arguments, state, control, model=torch.nn.Linear(1, 1))
    assert callback.ledger is None and "--torch_compile" in callback.problem


def test_settings_that_scoring_does_not_follow_are_said(folder_of, capsys):
    model = load_model(
        ModelArguments(str(folder_of("llama"))),
        load_model_config(ModelArguments(str(folder_of("llama")))),
        torch.float32,
        CPU,
    )
    for name, value in {"num_return_sequences": 3, "stop_strings": ["x"], "cache_implementation": "quantized"}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.num_beams = 3
    end_as_the_tokenizer(model, load_tokenizer(ModelArguments(str(folder_of("llama")))))
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "cache_implementation quantized, num_beams 3, num_return_sequences 3, stop_strings ['x']; scoring answers with"
        in out
    )


def _real_sizes(quick):
    return [(how, name) for name in REAL for how in ("lora", "qlora", "full") if ((how, name) in QUICK) == quick]


def check_prediction(how, name, capfd):
    """A whole ledger of the model's real size without a method's flag; of gpt-oss under qlora the line that says why not."""
    with pytest.raises(SystemExit) as end:
        footprint(["predict", how, "--model_name_or_path", name, "--gpu", "H100", "--json"])
    out, err = capfd.readouterr()
    if how == "qlora" and name == "openai/gpt-oss-20b":
        assert end.value.code == 2 and out == "" and "is stored in MXFP4" in err and err.count("error: ") == 1
        return
    assert end.value.code in (None, 0, 1), err
    ledger = json.loads(out)
    assert ledger["fits"] is (end.value.code != 1)
    categories = {name: nbytes for name, nbytes in ledger["categories_at_peak"].items() if name != "cached_unused"}
    assert ledger["peak"]["allocated_bytes"] == sum(categories.values())
    assert set(ledger["phases"]) == {"load", "forward", "backward", "optimizer_step", "scoring", "saving"}
    # adapters add little, and of a multimodal model only the language part is trained
    published = catalogue.find(name).parameters
    assert 0.85 * published < ledger["parameters"]["all"] < 1.1 * published
    share = ledger["parameters"]["trainable"] / ledger["parameters"]["all"]
    # of Llama 3.2 Vision's language part, the layers that only see images stay frozen
    assert share > (0.8 if "Vision" in name else 0.99) if how == "full" else 0 < share < 0.1


@pytest.mark.parametrize(("how", "name"), _real_sizes(quick=True))
def test_predictions_of_real_sizes_need_no_flag_of_a_method(how, name, capfd):
    check_prediction(how, name, capfd)


@pytest.mark.long
@pytest.mark.parametrize(("how", "name"), _real_sizes(quick=False))
def test_predictions_of_all_real_sizes_need_no_flag_of_a_method(how, name, capfd):
    check_prediction(how, name, capfd)

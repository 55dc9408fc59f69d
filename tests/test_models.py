"""Loaded weights are the weights of the file, or the run is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_with_tokenizer, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

from toolkit.errors import UserError
from toolkit.models.arguments import ModelArguments
from toolkit.models.heads import set_head
from toolkit.models.loading import load_model, load_model_config


def loaded(folder, head=False, **flags):
    args = ModelArguments(model_name_or_path=str(folder), **flags)
    config = load_model_config(args, kind="head" if head else "generating")
    if head:
        set_head(config, ["a", "b", "c"], pad_token_id=0)
    return load_model(args, config, torch.float32, TrainingArguments(use_cpu=True, report_to="none"))


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", {"format": "pt"})


EDITS = {
    "every name has a prefix": lambda tensors: {f"wrapped.{name}": t for name, t in tensors.items()},
    "a layer is missing": lambda tensors: {name: t for name, t in tensors.items() if ".1." not in name},
    "one tensor is missing": lambda tensors: dict(sorted(tensors.items())[:-1]),
    "nothing is there": lambda tensors: {"other": torch.zeros(1)},
}


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}], ids=["plain", "4bit"])
@pytest.mark.parametrize("head", [False, True], ids=["text", "head"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_file_without_the_weights_of_the_body_is_refused(name, edit, head, flags, tmp_path):
    save_with_tokenizer(tiny_config(name), tmp_path)
    loaded(tmp_path, head, **flags)
    change(tmp_path, edit)
    with pytest.raises(
        UserError, match=r"its weights do not fit its config.json: the file lacks \d+ tensors that the model has"
    ):
        loaded(tmp_path, head, **flags)


def test_an_untied_output_head_must_be_in_the_file_and_a_tied_one_need_not(tmp_path):
    save_with_tokenizer(tiny_config("qwen2"), tmp_path / "tied")
    change(tmp_path / "tied", lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    loaded(tmp_path / "tied")
    save_with_tokenizer(tiny_config("llama"), tmp_path / "own")
    change(tmp_path / "own", lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(UserError, match=r"lacks 1 tensors that the model has \(lm_head.weight"):
        loaded(tmp_path / "own")


@pytest.mark.parametrize("head", [False, True], ids=["text", "head"])
def test_weights_of_another_shape_are_refused(head, tmp_path):
    save_with_tokenizer(tiny_config("llama"), tmp_path)
    change(
        tmp_path,
        lambda tensors: {n: t[:, :32].clone() if n.endswith("mlp.down_proj.weight") else t for n, t in tensors.items()},
    )
    with pytest.raises(UserError, match=r"mlp.down_proj.weight"):
        loaded(tmp_path, head)


def test_a_model_folder_with_an_adapter_is_refused(tmp_path):
    save_with_tokenizer(tiny_config("llama"), tmp_path)
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the folder holds an adapter"):
        loaded(tmp_path)


@pytest.mark.parametrize("architectures", [None, ["LlamaForReviews"]])
def test_rows_of_a_head_for_other_classes_are_dropped_whatever_classes_the_config_names(architectures, tmp_path):
    config = tiny_config("llama")
    config.id2label = dict(enumerate("bca"))
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"architectures": architectures}))
    begun = loaded(tmp_path, head=True)  # whose classes are a, b, c
    assert torch.equal(begun.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not any(torch.equal(row, other) for row in begun.score.weight for other in model.score.weight)


@pytest.mark.parametrize("name", ["canine", "fnet", "nystromformer", "xlnet", "yoso"])
def test_a_head_that_reads_padding_is_refused(name, tmp_path):
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="head reads padding"):
        load_model_config(ModelArguments(model_name_or_path=str(tmp_path), random_weights=True), kind="head")


@pytest.mark.parametrize("head", [False, True], ids=["text", "head"])
def test_layers_of_the_file_that_the_config_leaves_out_are_reported(head, tmp_path, capsys):
    save_with_tokenizer(tiny_config("llama"), tmp_path)
    loaded(tmp_path, head)
    assert "have no place" not in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    loaded(tmp_path, head)
    assert (
        "9 tensors of the file have no place in the model of its config.json (model.layers.1."
        in capsys.readouterr().out
    )

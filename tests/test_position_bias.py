"""T5's layers share one sum of position bias and mask: the same loss and gradients, in the memory of one layer."""

from types import SimpleNamespace

import pytest
import torch
from architectures import T5
from datasets import Dataset
from gradients import Tokenizer
from test_chunked_loss import TOLERANCE, batch_of, config_of, difference, gradients, model_of
from tiny_models import tiny_model
from training_data import config_of as run_of
from training_data import task_data
from transformers import AutoConfig

import toolkit
from toolkit.config.arguments import TrainArguments
from toolkit.models.position_bias import SHARED, share_position_bias
from toolkit.training.trainer import FineTuner

LAYERS = 3


def t5_like(name: str):
    if name == "switch_transformers":
        return model_of(AutoConfig.for_model(name, **T5, num_experts=2))
    return model_of(config_of(name))


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5", "switch_transformers"])
def test_loss_and_gradients_are_those_of_the_plain_path(name):
    model = t5_like(name)
    batch = batch_of(model)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    assert any("relative_attention_bias" in one for one in expected)  # it is trained too
    share_position_bias(model)
    shared = model(**batch).loss
    assert shared.item() == plain.item()
    assert difference(gradients(model, shared), expected) < TOLERANCE


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_recomputed_layers_have_the_same_gradients(options):
    model = model_of(AutoConfig.for_model("t5", **T5 | {"dropout_rate": 0.0})).train()
    batch = batch_of(model)
    expected = gradients(model, model(**batch).loss)
    share_position_bias(model)
    model.gradient_checkpointing_enable(options)
    model.enable_input_require_grads()
    assert difference(gradients(model, model(**batch).loss), expected) < TOLERANCE


def test_one_sum_is_kept_for_all_layers():
    model = model_of(AutoConfig.for_model("t5", **T5 | {"num_layers": LAYERS, "num_decoder_layers": LAYERS}))
    for (
        name,
        parameter,
    ) in model.named_parameters():  # frozen, as under LoRA: with a trained bias SDPA keeps its scores as well
        parameter.requires_grad = "relative_attention_bias" not in name
    batch = batch_of(model)
    rows, length = batch["input_ids"].shape
    shapes = {
        (rows, 4, length, length): 1,
        (rows, 4, 11, length): 1,
    }  # in the encoder, and across; the decoder has no mask

    def kept() -> dict[tuple[int, ...], int]:
        storages: dict[tuple[int, ...], set[int]] = {shape: set() for shape in shapes}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) in shapes and tensor.is_floating_point():
                storages[tuple(tensor.shape)].add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        assert loss.requires_grad
        return {shape: len(found) for shape, found in storages.items()}

    assert kept() == dict.fromkeys(shapes, LAYERS)
    share_position_bias(model)
    assert kept() == shapes


@torch.no_grad()
def test_it_writes_the_same_text():
    model = model_of(config_of("t5"))
    batch = {name: tensor for name, tensor in batch_of(model).items() if name != "labels"}
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=True)
    share_position_bias(model)
    assert model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=True).equal(expected)


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_models_without_such_a_bias_stay_as_they_are(name):
    model = model_of(config_of(name))
    share_position_bias(model)
    assert model.config._attn_implementation != SHARED


@pytest.mark.slow
def test_a_compiled_t5_trains_without_it_and_is_predicted_without_it(tmp_path):
    """Compilation cannot follow a sum that is kept at a tensor."""
    model = tiny_model("t5")
    args = TrainArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=1,
        torch_compile=True,
        torch_compile_backend="eager",
        save_strategy="no",
    )
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9]}] * 8)
    FineTuner(model, run_of(args), task_data(SimpleNamespace(model_kind="generating"), data, None, Tokenizer())).train()
    assert model.config._attn_implementation == "sdpa"
    flags = ["--use_cpu", "--max_length", "64", "--max_target_length", "64", "--per_device_train_batch_size", "8"]
    usual, compiled = (toolkit.predict("lora", *flags, *more) for more in ([], ["--torch_compile"]))
    assert compiled.allocated_bytes > usual.allocated_bytes

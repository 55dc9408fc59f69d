"""Feed-forward layers in tiles: the same loss and gradients, also over LoRA, quantized weights and dropout, in less memory."""

import pytest
import torch
from architectures import ARCHITECTURES, DECODER, HYBRIDS, MULTIMODAL, TOKENS
from peft import LoraConfig, get_peft_model
from test_chunked_loss import TOLERANCE, batch_of, config_of, difference, gradients, model_of
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from toolkit.config import parse_config
from toolkit.errors import UserError
from toolkit.methods.lora import Lora
from toolkit.models.tiled_mlp import feed_forwards, tile_feed_forwards

# They compute it inside of their layers, from more than hidden states, or with experts
WITHOUT = {
    *("bart", "bigbird_pegasus", "led", "m2m_100", "marian", "mbart", "pegasus", "opt", "bloom", "encoder-decoder"),
    *("granitemoe", "mixtral", "olmoe", "qwen3_moe", "gpt_oss"),
}
TILE = 5  # of up to 39 tokens


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *HYBRIDS} - {*MULTIMODAL} - WITHOUT))
def test_loss_and_gradients_are_those_of_the_plain_path(name):
    model = model_of(config_of(name))
    batch = batch_of(model)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    tile_feed_forwards(model, TILE)
    tiled = model(**batch).loss
    assert tiled.item() == pytest.approx(plain.item(), rel=TOLERANCE)
    assert difference(gradients(model, tiled), expected) < TOLERANCE


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_other_models_are_refused_by_name(name):
    model = model_of(config_of(name))
    assert not feed_forwards(model)
    with pytest.raises(UserError, match=f"--mlp_tile_tokens has no effect on {model.config.model_type}"):
        tile_feed_forwards(model, TILE)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_lora_over_a_4_bit_base_with_and_without_recomputed_layers(checkpointing, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    model.config.use_cache = False
    batch = batch_of(model)
    expected = gradients(model, model(**batch).loss)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    tile_feed_forwards(model, TILE)
    found = gradients(model, model(**batch).loss)
    assert difference(found, expected) < 1e-5  # the 4-bit product rounds by the number of rows


def test_a_recomputed_tile_draws_the_same_dropout():
    """The gradient of the loss along itself is the slope that is measured there, with the same masks."""
    model = model_of(config_of("t5")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in feed_forwards(model):
        layer.dropout.p = 0.3
    tile_feed_forwards(model, TILE)
    batch = batch_of(model)

    def loss():
        torch.manual_seed(3)
        return model(**batch).loss

    found = gradients(model, loss())
    size, step, ends = float(sum(g.square().sum() for g in found.values())), 1e-4, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += sign * step * found[name]
        ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(size, rel=2e-2)


@pytest.mark.parametrize("again", [False, True])
def test_dropout_that_is_no_module_is_drawn_again_too(again):
    config = AutoConfig.for_model("starcoder2", **DECODER, residual_dropout=0.3)
    model = model_of(config).train()
    tile_feed_forwards(model, TILE)
    if again:  # a second trainer on the same model
        tile_feed_forwards(model, TILE)
    layer = feed_forwards(model)[0]
    hidden = torch.randn(1, 20, 32, requires_grad=True)
    torch.manual_seed(0)
    output = layer(hidden)
    output.sum().backward()
    slopes = []
    for step in (1e-3, -1e-3):
        torch.manual_seed(0)
        slopes.append(layer(hidden.detach() + step * hidden.grad).sum().item())
    assert (slopes[0] - slopes[1]) / 2e-3 == pytest.approx(hidden.grad.square().sum().item(), rel=1e-2)


def test_layers_that_see_other_tokens_are_refused():
    model = model_of(AutoConfig.for_model("rwkv", **TOKENS, hidden_size=32, num_hidden_layers=2, context_length=64))
    with pytest.raises(UserError, match="--mlp_tile_tokens has no effect on rwkv"):
        tile_feed_forwards(model, TILE)


def test_liger_replaces_the_same_layers():
    with pytest.raises(UserError, match="--mlp_tile_tokens and --use_liger_kernel exclude each other"):
        parse_config(Lora, ["--mlp_tile_tokens", "64", "--use_liger_kernel"])


def test_one_tile_of_intermediate_results_is_kept():
    saved = []
    model = model_of(config_of("llama"))
    batch = batch_of(model)
    width = model.config.intermediate_size

    def kept(tensor):
        saved.append(tensor.numel() if tensor.dim() == 3 and tensor.shape[-1] == width else 0)
        return tensor

    def largest():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            model(**batch)
        return max(saved)

    assert largest() == batch["input_ids"].numel() * width
    tile_feed_forwards(model, TILE)
    assert largest() == 0  # nothing in the forward pass: each tile is recomputed

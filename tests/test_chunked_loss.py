"""The loss in chunks is the model's own: same value, same gradients, in every architecture, in less memory."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, HYBRIDS, MULTIMODAL, TOKENS, WIDTH
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from tiny_models import save_with_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from toolkit.config import parse_config
from toolkit.errors import UserError
from toolkit.methods.lora import Lora
from toolkit.models.chunked_loss import accept_chunks, whole_loss_reason
from toolkit.runs.prediction import predict_run
from toolkit.runs.preflight import prepare

ROWS, LENGTH = 3, 13
TOLERANCE = 1e-6  # relative, in fp32
# Architectures with something between their last layer and their logits, or after them, that the others do not have
SPECIAL = {
    "cohere2": {"num_attention_heads": 4, "num_key_value_heads": 2, "logit_scale": 0.25},
    "cohere": {"num_attention_heads": 4, "logit_scale": 0.25},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "granitemoe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "logits_scaling": 6.0,
        "output_router_logits": True,
    },
    "granite": {"num_attention_heads": 4, "num_key_value_heads": 2, "logits_scaling": 6.0},
    "nanochat": {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 1.0},
    "opt": {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16},
}


def config_of(name: str):
    if name in SPECIAL:
        return AutoConfig.for_model(name, **TOKENS | WIDTH | SPECIAL[name])
    return (ARCHITECTURES | HYBRIDS)[name]()


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = family.from_config(config, dtype=dtype).eval()  # without dropout
    model.config.use_cache = False
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def batch_of(model) -> dict[str, torch.Tensor]:
    """Rows of different lengths, whose prompts have no labels; one row has no label, or one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, 60, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if model.config.is_encoder_decoder:
        labels = labels[:, 2:].contiguous()
        labels[2, 1:] = -100
    else:
        labels[0, :5] = -100
        labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found, expected) -> float:
    """The largest difference of a gradient, relative to the norm of all of them."""
    assert found.keys() == expected.keys()
    norm = torch.stack([one.double().norm() for one in expected.values()]).norm()
    return max(float((found[name].double() - one.double()).norm() / norm) for name, one in expected.items())


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *HYBRIDS, *SPECIAL} - {*MULTIMODAL}))
def test_loss_and_gradients_are_those_of_the_plain_path(name):
    model = model_of(config_of(name))
    if whole_loss_reason(model):
        pytest.skip(whole_loss_reason(model))
    batch = batch_of(model)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    accept_chunks(model)
    for chunk in (4, 1000):
        chunked = model(**batch, loss_chunk_tokens=chunk).loss
        assert chunked.item() == pytest.approx(plain.item(), rel=TOLERANCE)
        assert difference(gradients(model, chunked), expected) < TOLERANCE
    assert model(**batch).logits.shape[0] == ROWS  # a call without the argument is as before


@pytest.mark.parametrize("name", ["granitemoe", "mixtral"])
def test_the_loss_of_routers_is_kept(name):
    config = config_of(name)
    config.output_router_logits, config.router_aux_loss_coef = True, 1.0
    model = model_of(config)
    batch = batch_of(model)
    plain = model(**batch)
    assert plain.aux_loss is not None
    expected = gradients(model, plain.loss)
    model.config.output_router_logits = False
    assert difference(gradients(model, model(**batch).loss), expected) > 1e-3  # it is no small part
    model.config.output_router_logits = True
    accept_chunks(model)
    chunked = model(**batch, loss_chunk_tokens=4).loss
    assert chunked.item() == pytest.approx(plain.loss.item(), rel=TOLERANCE)
    assert difference(gradients(model, chunked), expected) < TOLERANCE


HEADS = {
    "lora": LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"),
    "dora": LoraConfig(
        target_modules=["q_proj", "lm_head"], use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM"
    ),
    "saved whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "some tokens": LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": [7, 8, 9]}, task_type="CAUSAL_LM"
    ),
    "only the head": LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_and_prompts_of_peft_get_the_gradients_of_the_plain_path(kind):
    torch.manual_seed(0)
    model = get_peft_model(model_of(config_of("llama")), copy.deepcopy(HEADS[kind])).eval()
    batch = batch_of(model)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    accept_chunks(model)
    chunked = model(**batch, loss_chunk_tokens=4).loss
    assert chunked.item() == pytest.approx(plain.item(), rel=TOLERANCE)
    found = gradients(model, chunked)
    assert found.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_a_soft_prompt_before_a_t5_gets_the_gradients_of_the_plain_path(kind):
    torch.manual_seed(0)
    config = copy.deepcopy(HEADS[kind])
    config.task_type = TaskType.SEQ_2_SEQ_LM
    model = get_peft_model(model_of(config_of("t5")), config).eval()
    batch = batch_of(model)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    accept_chunks(model)
    assert difference(gradients(model, model(**batch, loss_chunk_tokens=4).loss), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_dropout_in_the_head_is_the_same_in_loss_and_gradients(name):
    """The loss falls along its own gradient as fast as that says, so the masks of both are the same."""
    model = model_of(config_of(name))
    head = LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(model, head).train()
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.Dropout) and module.p < 0.5:
            module.p = 0.0
    batch = batch_of(model)
    accept_chunks(model)

    def loss():
        torch.manual_seed(3)
        return model(**batch, loss_chunk_tokens=4).loss

    found = gradients(model, loss())
    size, step, ends = float(sum(g.square().sum() for g in found.values())), 1e-3, []
    for sign in (1, -2):  # a step forward, then one back to the other side
        with torch.no_grad():
            for parameter_name, p in model.named_parameters():
                if parameter_name in found:
                    p += sign * step * found[parameter_name]
        ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_smoothing_is_that_of_pytorch(name):
    model = model_of(config_of(name))
    batch = batch_of(model)
    logits, labels = model(**batch).logits, batch["labels"]
    if name == "llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    expected = gradients(model, plain)
    accept_chunks(model)
    chunked = model(**batch, loss_chunk_tokens=4, label_smoothing=0.2).loss
    assert chunked.item() == pytest.approx(plain.item(), rel=TOLERANCE)
    assert difference(gradients(model, chunked), expected) < TOLERANCE


def test_the_loss_of_rows_and_a_given_number_of_tokens():
    model = model_of(config_of("llama"))
    batch = batch_of(model)
    accept_chunks(model)
    whole = model(**batch, loss_chunk_tokens=4)
    tokens = [int(labels[1:].ne(-100).sum()) for labels in batch["labels"]]
    assert whole.row_tokens.tolist() == tokens
    for row in (0, 1):
        alone = {name: values[row : row + 1] for name, values in batch.items()}
        assert whole.row_losses[row].item() == pytest.approx(model(**alone).loss.item() * tokens[row], rel=1e-5)
    assert whole.row_losses[2].item() == 0
    assert whole.loss.item() == pytest.approx(whole.row_losses.sum().item() / sum(tokens))
    share = model(**batch, loss_chunk_tokens=4, num_items_in_batch=torch.tensor(100)).loss
    assert share.item() == pytest.approx(whole.row_losses.sum().item() / 100)


def test_a_batch_without_labels_has_gradients_of_zero_if_its_step_has_labels_elsewhere():
    model = model_of(config_of("llama"))
    batch = batch_of(model)
    batch["labels"][:] = -100
    accept_chunks(model)
    loss = model(**batch, loss_chunk_tokens=4, num_items_in_batch=7).loss
    found = gradients(model, loss)
    assert loss.item() == 0
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(bool((one == 0).all()) for one in found.values())


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator has made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(training):
    config = config_of("llama")
    config.vocab_size = 4096
    model = model_of(config).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(training)
    model.config.tie_word_embeddings = False
    batch = batch_of(model)
    accept_chunks(model)
    weight = model.get_output_embeddings().weight.numel()
    with Largest() as largest, torch.set_grad_enabled(training):
        loss = model(**batch, loss_chunk_tokens=2).loss
        if training:
            loss.backward()
    assert largest.elements == max(2 * 4096, weight)
    with Largest() as largest:
        model(**batch)
    assert largest.elements >= ROWS * LENGTH * 4096 > 4 * weight / 32


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head", "chunk", "allowed"), [("frozen", 32, 1.02), ("trained", 1000, 1.01), ("trained", 32, 1.04)]
)
def test_in_16_bits_it_is_as_close_to_fp64_as_the_plain_path(name, dtype, head, chunk, allowed):
    """Within the noise of rounding. With several chunks a trained head is up to 4 % farther: parts of its gradient are rounded to 16
    bits, then their fp32 sum. In fp16 also their sum is rounded, but nobody trains weights in fp16: autocast holds them in fp32.

    This is the worst case: the logits of random weights are small, so that their own rounding hardly counts.
    """
    if dtype == torch.float16 and name == "t5":
        pytest.skip("T5 overflows in fp16")
    config = config_of(name)
    config.vocab_size, config.tie_word_embeddings = 2000, name == "t5"
    model = model_of(config, dtype)
    model.get_output_embeddings().requires_grad_(head == "trained")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 2000, (2, 128), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    exact = copy.deepcopy(model).double()
    logits, labels = exact(**batch).logits, ids
    if name != "t5":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = gradients(exact, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # of a gradient scaler

    def error(**options):
        found = gradients(model, model(**batch, **options).loss * scale)
        return torch.stack([(found[n].double() / scale - g).norm() for n, g in expected.items()]).norm().item()

    plain = error()
    accept_chunks(model)
    if dtype == torch.float16 and head == "trained":
        allowed += 0.06
    assert error(loss_chunk_tokens=chunk) < allowed * plain


@pytest.mark.parametrize("scale", [2.0**16, 2.0**4])
def test_in_fp16_the_scaler_decides_what_overflows(scale):
    """A trained head whose gradient overflows at a high factor, and not at a low one."""
    model = model_of(config_of("gpt2"), torch.float16)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 100.0  # of the hidden states
    batch = batch_of(model)
    batch["labels"][:] = 7  # all positions learn one token
    plain = gradients(model, model(**batch).loss * scale)
    accept_chunks(model)
    found = gradients(model, model(**batch, loss_chunk_tokens=5).loss * scale)
    finite = {bool(one.isfinite().all()) for gradient in (plain, found) for one in [gradient["transformer.wte.weight"]]}
    assert finite == {scale < 100}


def test_a_copy_of_a_model_uses_its_own_weights():
    model = model_of(config_of("llama"))
    accept_chunks(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(batch_of(model)["input_ids"]).logits.any()


def test_a_model_whose_loss_is_its_own_computes_it_as_before_and_the_flag_is_refused(tmp_path):
    save_with_tokenizer(config_of("prophetnet"), tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--use_cpu", "--max_length", "32", "--max_target_length", "16"]
    whole, off = (predict_run(parse_config(Lora, [*flags, *more])) for more in ([], ["--loss_chunk_tokens", "0"]))
    assert whole.allocated_bytes == off.allocated_bytes
    with pytest.raises(UserError, match="--loss_chunk_tokens 8 has no effect: the loss of prophetnet is its own"):
        predict_run(parse_config(Lora, [*flags, "--loss_chunk_tokens", "8"]))


def test_a_head_has_no_chunks(tmp_path):
    save_with_tokenizer(config_of("llama"), tmp_path)
    data = tmp_path / "rows.csv"
    data.write_text("sentence,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(40)))
    flags = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(data), "--task", "sequence_classification"]
    config = parse_config(Lora, [*flags, "--use_cpu", "--loss_chunk_tokens", "8"])
    with pytest.raises(UserError, match="--loss_chunk_tokens 8 has no effect: a classification head"):
        prepare(config)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_smaller_chunk_needs_less_as_predicted_by_the_byte(name, tmp_path):
    """Whole logits of 4 x 64 positions, and those of 16: what is saved is 4 bytes for each logit less, kept and for its gradient."""
    config = config_of(name)
    config.vocab_size = 20_000
    save_with_tokenizer(config, tmp_path)
    config = type(config).from_pretrained(tmp_path)
    config.vocab_size = 20_000
    config.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--use_cpu", "--max_length", "64", "--max_target_length", "63"]
    flags += ["--per_device_train_batch_size", "4", "--random_weights"]
    peaks = {}
    for chunk in (0, 16, 32):
        phases = predict_run(parse_config(Lora, [*flags, "--loss_chunk_tokens", str(chunk)])).phases
        peaks[chunk] = max(phases[name].allocated_peak_bytes for name in ("forward", "backward"))
    logits = 4 * 20_000
    assert peaks[0] - peaks[16] > 2 * logits * (4 * 63 - 16)
    assert peaks[32] - peaks[16] == pytest.approx(16 * logits, rel=0.05)

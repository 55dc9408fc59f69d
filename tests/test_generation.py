"""Generation and scoring: each row gives the same as whole forward passes, alone and in any batch."""

from itertools import product

import pytest
import torch
from test_methods import MODELS, VARIANTS, label
from test_shadow import OTHERS
from tiny_models import CONFIGS, ENCODER_DECODERS, tiny_config, tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from toolkit.errors import UserError
from toolkit.methods.ia3 import IA3
from toolkit.methods.lora import Lora
from toolkit.methods.p_tuning import PTuning
from toolkit.methods.prefix_tuning import PrefixTuning
from toolkit.methods.prompt_tuning import PromptTuning
from toolkit.models.generation import classify, generate, losses
from toolkit.models.heads import auto_class, set_head

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16], [20, 21]]
LENGTH = 5


class Numbers:
    """A tokenizer with numbers as words, with only what generation needs."""

    eos_token_id, pad_token_id = None, 0

    def pad(self, features, padding_side, return_tensors):
        longest = max(map(len, features["input_ids"]))
        gaps = [[0] * (longest - len(ids)) for ids in features["input_ids"]]
        right = padding_side == "right"
        pairs = list(zip(features["input_ids"], gaps, strict=True))
        ids = [words + gap if right else gap + words for words, gap in pairs]
        mask = [[1] * len(words) + gap if right else gap + [1] * len(words) for words, gap in pairs]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in ids]


def tuned(method, name, model=None):
    """A model that `method` changes a lot: its trained weights are random and large."""
    model = tiny_model(name) if model is None else model
    if hasattr(model, "generation_config"):
        settings = model.generation_config
        settings.eos_token_id = settings.forced_bos_token_id = settings.forced_eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
        model = method.attach(model).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if method.name in ("full", "selective") else 0.3))
    return model


@torch.no_grad()
def most_probable(model, prompt, written):
    """The most probable token at each position of `written` after (or for) `prompt`, from one forward pass without a cache."""
    ids = torch.tensor([prompt if model.config.is_encoder_decoder else prompt + written])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": torch.tensor([[0, *written]]), "use_cache": False}
    return model(**inputs).logits[0, -len(written) - 1 : -1].argmax(-1).tolist()


def numbers(texts):
    return [[int(word) for word in text.split()][-LENGTH:] for text in texts]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_generation_matches_whole_forward_passes_alone_and_in_a_batch(method, name):
    model = tuned(method, name)
    together = numbers(generate(model, Numbers(), PROMPTS, len(PROMPTS), LENGTH))
    assert together == [most_probable(model, *pair) for pair in zip(PROMPTS, together, strict=True)]
    assert len({tuple(answer) for answer in together}) > 1
    assert numbers(generate(model, Numbers(), PROMPTS[1:2], 1, LENGTH)) == together[1:2]


MORE = {
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "attention_hidden_size": 64},
    "mbart": CONFIGS["bart"],
    "longt5": CONFIGS["t5"],
}
UNKNOWN_TO_PROMPTS = {"mamba"}  # PEFT finds no number of attention heads


class Untouched:
    """No method: the base model."""

    name = "untouched"

    def attach(self, model):
        return model


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *product([*OTHERS, *MORE], [Untouched()]),
        *product(sorted(set(OTHERS) - UNKNOWN_TO_PROMPTS), [PromptTuning(num_virtual_tokens=3)]),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_architecture_generates_the_same_alone_and_in_a_batch(name, method, monkeypatch):
    monkeypatch.setitem(CONFIGS, name, (MORE | OTHERS)[name])
    config = tiny_config(name)
    model = tuned(method, name, auto_class(config).from_config(config))
    together = numbers(generate(model, Numbers(), PROMPTS, len(PROMPTS), LENGTH))
    assert together == [numbers(generate(model, Numbers(), [prompt], 1, LENGTH))[0] for prompt in PROMPTS]
    assert together == [most_probable(model, *pair) for pair in zip(PROMPTS, together, strict=True)]


@pytest.mark.parametrize("method", [PTuning(), PrefixTuning(), PromptTuning()], ids=label)
def test_beams_after_virtual_tokens_are_the_same_alone_and_in_a_batch(method):
    model = tuned(method, "llama")
    together = generate(model, Numbers(), PROMPTS, len(PROMPTS), LENGTH, num_beams=2)
    assert together == [generate(model, Numbers(), [prompt], 1, LENGTH, num_beams=2)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [Lora(), IA3(), PTuning(), PrefixTuning(), PromptTuning()], ids=label)
def test_a_heads_scores_and_gradients_of_a_row_are_the_same_alone_and_in_a_batch(method, name):
    config = tiny_config(name)
    set_head(config, ["a", "b", "c", "d"], pad_token_id=0)
    prompts = [[*prompt, 2] for prompt in PROMPTS]  # T5's and BART's heads read the state of the end-of-text token
    try:
        model = tuned(method, name, auto_class(config).from_config(config))
    except UserError as error:
        assert name in ENCODER_DECODERS and "takes token ids alone" in str(error)
        return
    labels = torch.tensor([0, 1, 2])
    batch = Numbers().pad({"input_ids": prompts}, "right", "pt")
    with torch.no_grad():
        together = model(**batch, labels=labels)
        alone = [
            model(torch.tensor([ids]), torch.ones(1, len(ids)), labels=labels[i : i + 1])
            for i, ids in enumerate(prompts)
        ]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in alone]).mean(), rtol=1e-4, atol=1e-4)
    classes = classify(model, Numbers(), prompts, len(prompts))
    assert classes == [classify(model, Numbers(), [prompt], 1)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [Lora(), PTuning(), PrefixTuning(), PromptTuning()], ids=label)
def test_the_loss_of_a_text_covers_its_own_tokens_given_the_virtual_ones(method, name):
    model = tuned(method, name)
    expected = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            logits = model(ids, torch.ones_like(ids)).logits[0, -len(prompt) :]
            expected.append(cross_entropy(logits[:-1], ids[0, 1:]).item())
    assert losses(model, Numbers(), PROMPTS, len(PROMPTS)) == pytest.approx(expected, rel=1e-4)
    assert losses(model, Numbers(), PROMPTS, 1) == pytest.approx(expected, rel=1e-4)


SETTINGS = {  # of published models' generation_config.json
    "several answers": {"num_return_sequences": 2, "num_beams": 2},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "stop strings": {"stop_strings": ["5"]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "beams in groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "a static cache": {"cache_implementation": "static"},
    "guidance": {"guidance_scale": 2.0},
    "a time limit": {"max_time": 1e-9},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_each_row_gets_the_most_probable_answer_whatever_generation_config_the_model_has(name, settings):
    plain, shipped = tuned(Lora(), name), tuned(Lora(), name)
    for key, value in settings.items():
        setattr(shipped.get_base_model().generation_config, key, value)
    assert generate(shipped, Numbers(), PROMPTS, 2, LENGTH) == generate(plain, Numbers(), PROMPTS, 2, LENGTH)


def test_an_answer_begins_with_the_language_that_training_gives_it():
    """mBART's decoder starts with the language token that ends its labels; mBART-50's labels begin with it."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = AutoConfig.for_model(
        "mbart",
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=64,
        pad_token_id=0,
        eos_token_id=2,
        **sizes,
    )
    model = auto_class(config).from_config(config).eval()
    model.generation_config.decoder_start_token_id = 40
    starts = {(2, 41): 41, (41, 2): 2}  # labels of an empty target -> what the decoder starts with
    for empty, start in starts.items():
        assert model.prepare_decoder_input_ids_from_labels(torch.tensor([empty]))[0, 0] == start
        (text,) = generate(model, Numbers(), [[5, 6]], 1, 3, empty_target=empty)
        assert int(text.split()[0]) == start
    model.generation_config.forced_bos_token_id = 40
    (text,) = generate(model, Numbers(), [[5, 6]], 1, 3, empty_target=(41, 2))
    assert text.split()[:2] == ["2", "41"]
    assert model.generation_config.forced_bos_token_id == model.generation_config.decoder_start_token_id == 40

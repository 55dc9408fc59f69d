"""A prediction that runs equal layers once gives the ledger of one that runs them all, byte for byte."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from architectures import ARCHITECTURES, HYBRIDS
from torch import nn

import toolkit
from toolkit.memory import measure
from toolkit.memory.shadow import step
from toolkit.memory.shadow.stacks import find_stacks

LAYERS = 11
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers")
COUNTS += ("num_decoder_layers", "num_encoder_layers")
RUN_WHOLE = {
    "m2m_100": "draws a random number between two layers",
    "led": "some weights get no gradient",
    "prophetnet": "generates with real tensors only",
}
NOT_DEEPENED = {"gemma3n", "bamba"}  # their configs have more lists and fixed numbers by layer
SHORT = {"max_length": 64, "max_target_length": 32, "per_device_train_batch_size": 2}
CHECKPOINTS = {"activation_checkpointing": True}
METHODS = {
    "full": {},
    "selective": {},
    "lora": {"lora_target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "qlora": CHECKPOINTS,
    "ia3": {},
    "prompt_tuning": {},
    "p_tuning": CHECKPOINTS,
    "adapter": {},
}
OPTIONS = {
    "accumulation and clipping": ("lora", {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5}),
    "8 bits": ("lora", {"load_in_8bit": True, "optim": "adamw_8bit"}),
    "4 bits beside fp32": ("qlora", {"kbit_upcast": "all", "optim": "paged_adamw_32bit"}),
    "fp16": ("lora", {"fp16": True, "bf16": False, **CHECKPOINTS}),
    "fp32": ("full", {"bf16": False}),
    "eager attention": ("lora", {"attn_implementation": "eager"}),
    "offloaded activations": (
        "lora",
        CHECKPOINTS | {"activation_checkpointing_kwargs": {"offload": True, "every_n_layers": 2}},
    ),
    "tiles": ("lora", {"mlp_tile_tokens": 16, **CHECKPOINTS}),
    "beams and validation": ("lora", {"num_beams": 4, "eval_strategy": "steps", "eval_steps": 5}),
    "dropout": ("lora", {"lora_dropout": 0.1}),
    "packing": ("lora", {"packing": True}),
    "low-rank gradients": ("full", {"optim": "galore_adamw", "optim_target_modules": "all-linear"}),
}


@dataclass
class Prediction:
    """A ledger without what differs between two equal predictions, its blocks, and the attempts that were made."""

    ledger: dict[str, Any]
    births: list[Any]
    margins: list[int | None]


@pytest.fixture
def predicted(monkeypatch):
    """A function that predicts for a card, with the layers folded or not."""
    caught: list[Any] = []
    ledger_of, attempt = measure.ledger_of, step._predict

    def keep_events(recording, **about):
        caught[:] = recording.events
        return ledger_of(recording, **about)

    def predict(method, folds=True, **flags):
        margins: list[int | None] = []

        def noted(*args):
            margins.append(args[-1])
            return attempt(*args)

        monkeypatch.setattr(step, "_predict", noted)
        if not folds:
            monkeypatch.setattr(step, "MARGINS", ())
        ledger = toolkit.predict(method, **{"gpu": "RTX 4090"} | SHORT | flags).to_json()
        # deaths of the casts that autocast kept follow their addresses, and rows of the timeline end between them; what is free
        # on this machine changes
        del ledger["seconds"], ledger["timeline"], ledger["resources"]
        return Prediction(ledger, births(caught), margins)

    monkeypatch.setattr(measure, "ledger_of", keep_events)
    return predict


def births(events):
    """Each block with the totals when it is born, and before it the blocks that ended since the last birth, in any order."""
    found, ended = [], []
    for event in events:
        block = event.block
        one = (block.nbytes, block.op, block.module, block.category)
        if event.sign < 0:
            ended.append(one)
        else:
            found += [
                sorted(map(str, ended)),
                (one, block.builds_graph, block.at_head, event.allocated, event.reserved),
            ]
            ended = []
    return found


def deepened(name, folder, layers=LAYERS):
    """A folder with the config of an architecture of architectures.py, with more layers."""
    config = (ARCHITECTURES | HYBRIDS)[name]()
    nested = (getattr(config, part, None) for part in ("text_config", "encoder", "decoder"))
    for part in (config, *(one for one in nested if hasattr(one, "to_dict"))):
        for count in COUNTS:
            if count in part.to_dict():
                setattr(part, count, layers)
        if kinds := getattr(part, "layer_types", None):
            part.layer_types = (kinds[:2] * layers)[:layers]
        if getattr(part, "mlp_layer_types", None):
            part.mlp_layer_types = ["dense", *["sparse"] * (layers - 1)]
        if getattr(part, "no_rope_layers", None):
            part.no_rope_layers = ([1, 1, 1, 0] * layers)[:layers]
    config.save_pretrained(folder)
    return str(folder)


def assert_folded_is_whole(predicted, method, **flags):
    folded = predicted(method, **flags)
    whole = predicted(method, folds=False, **flags)
    assert whole.margins == [None]
    assert folded.births == whole.births
    assert json.dumps(folded.ledger, sort_keys=True) == json.dumps(whole.ledger, sort_keys=True)
    return folded


@pytest.mark.slow
@pytest.mark.matrix(sample=6)
@pytest.mark.parametrize("name", sorted((ARCHITECTURES | HYBRIDS).keys() - NOT_DEEPENED))
def test_every_architecture_folds_to_the_byte(name, predicted, tmp_path):
    experts_need_none = {"lora_dropout": 0.0}
    flags = METHODS["lora"] | experts_need_none | CHECKPOINTS
    method = "full" if name.startswith("llama4") else "lora"  # PEFT does not know its experts
    folded = assert_folded_is_whole(
        predicted, method, model_name_or_path=deepened(name, tmp_path), **(CHECKPOINTS if method == "full" else flags)
    )
    assert (folded.margins[-1] is None) == (name in RUN_WHOLE)


@pytest.mark.slow
@pytest.mark.matrix(sample=4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "t5", "gemma3_text"])
def test_every_method_folds_to_the_byte(name, method, predicted, tmp_path):
    flags = {"lora_target_modules": "all-linear"} if method == "dora" else {}
    recipe = "lora" if method == "dora" else method
    folded = assert_folded_is_whole(
        predicted, recipe, model_name_or_path=deepened(name, tmp_path), **METHODS[method], **flags
    )
    assert folded.margins[-1] is not None


@pytest.mark.slow
@pytest.mark.matrix(sample=4)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_folds_to_the_byte(option, predicted, tmp_path):
    method, flags = OPTIONS[option]
    folded = assert_folded_is_whole(predicted, method, model_name_or_path=deepened("llama", tmp_path), **flags)
    assert folded.margins[-1] is not None


@pytest.mark.slow
def test_an_optimizer_that_steps_in_parts_sees_the_weights_of_all_layers(predicted, tmp_path):
    """Weights are stepped 256 MiB at a time, so where a part ends depends on the number of layers."""
    path = deepened("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert assert_folded_is_whole(predicted, "full", model_name_or_path=path).margins == [0]


@pytest.mark.slow
def test_a_prediction_for_the_cpu_folds_to_the_byte(predicted, tmp_path):
    flags = METHODS["lora"] | {"gpu": None, "use_cpu": True}
    assert assert_folded_is_whole(
        predicted, "lora", model_name_or_path=deepened("llama", tmp_path), **flags
    ).margins == [0]


@pytest.mark.slow
def test_weights_that_are_updated_in_the_backward_pass_are_run_whole(predicted, tmp_path):
    flags = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    folded = assert_folded_is_whole(predicted, "full", model_name_or_path=deepened("llama", tmp_path), **flags)
    assert folded.margins == [0, None]


@pytest.mark.slow
def test_a_prefix_is_run_whole(predicted, tmp_path):
    folded = assert_folded_is_whole(predicted, "prefix_tuning", model_name_or_path=deepened("llama", tmp_path))
    assert folded.margins[-1] is None


@pytest.mark.slow
def test_layers_that_behave_differently_are_found_while_they_run(predicted, tmp_path, monkeypatch):
    """They look the same, but every third one makes a block more."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    calls = []

    def longer(self, x):
        calls.append(0)
        return forward(self, x * 1 if len(calls) % 3 == 0 else x)

    monkeypatch.setattr(LlamaMLP, "forward", longer)
    folded = predicted("lora", model_name_or_path=deepened("llama", tmp_path))
    assert folded.margins == [0, 1, None]


@pytest.mark.slow
def test_predictions_leave_nothing_in_the_process(tmp_path):
    """In a process of its own: the tests' own keeps objects from being collected."""
    code = (
        "import gc, sys, toolkit\n"
        "for _ in range(5):\n"
        "    toolkit.predict('lora', gpu='RTX 4090', model_name_or_path=sys.argv[1], max_length=64)\n"
        "    print(sum(map(len, map(gc.get_objects, range(3)))))\n"
    )
    command = [sys.executable, "-c", code, deepened("llama", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    objects = [int(line) for line in done.stdout.split()]
    assert objects[-1] - objects[1] < 3000  # one prediction makes some 50,000


class Layer(nn.Module):
    def __init__(self, index, width=2, kind="full"):
        super().__init__()
        self.layer_idx, self.kind = index, kind
        self.linear = nn.Linear(width, width)


def stack_of(layers, margin=0):
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    found = find_stacks(model, margin)
    return [(one.path, one.first, one.period, one.last) for one in found]


def test_the_first_and_the_last_layer_are_no_templates():
    assert stack_of([Layer(i) for i in range(10)]) == [("layers", 1, 1, 9)]
    assert stack_of([Layer(i) for i in range(10)], margin=1) == [("layers", 2, 1, 8)]


def test_lists_inside_a_layer_are_no_stacks():
    layers = [Layer(i) for i in range(6)]
    for layer in layers:
        layer.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])
    assert stack_of(layers) == [("layers", 1, 1, 5)]
    layers[3].linear.weight.requires_grad_(False)
    assert stack_of(layers) == []


def test_too_few_layers_are_no_stack():
    assert stack_of([Layer(i) for i in range(4)]) == []
    assert stack_of([Layer(i) for i in range(5)]) == [("layers", 1, 1, 4)]


def test_alternating_layers_repeat_in_groups():
    assert stack_of([Layer(i, kind="full" if i % 2 else "sliding") for i in range(12)]) == [("layers", 2, 2, 10)]
    # one of 11 layers more stays at the end, so that whole groups are left out
    assert stack_of([Layer(i, kind="full" if i % 2 else "sliding") for i in range(11)]) == [("layers", 2, 2, 10)]


def test_a_different_layer_ends_a_run():
    layers = [Layer(i, width=3 if i == 0 else 2) for i in range(10)]
    assert stack_of(layers) == [("layers", 2, 1, 9)]
    layers[6].linear.weight.requires_grad_(False)
    assert stack_of(layers) == [("layers", 2, 1, 5)]

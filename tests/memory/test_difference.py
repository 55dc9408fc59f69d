"""The difference of two predictions: its parts add up to the byte, and its sentences say what the ledgers show."""

import io
import re
from dataclasses import replace

import pytest
from tiny_models import tiny_config

import toolkit
from toolkit.console import PlainConsole
from toolkit.memory.difference import Difference
from toolkit.memory.explain import LEAST_SHARE, MOST, lines, print_difference
from toolkit.memory.ledger import CATEGORIES, Ledger, PhaseUse
from toolkit.memory.resources import Line, Resource
from toolkit.units import GIB, format_bytes


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Returns a function that predicts a run of a tiny Llama, each once."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_config("llama").save_pretrained(folder)
    common = {"model_name_or_path": str(folder), "max_length": 64, "per_device_train_batch_size": 2}
    found: dict[tuple, Ledger] = {}

    def predict(method: str, **settings) -> Ledger:
        key = method, *sorted(settings.items())
        if key not in found:
            found[key] = toolkit.predict(method, **(common | settings))
        return found[key]

    return predict


def ledger(cells: dict[str, dict[str, int]], cached: int = 0, **about) -> Ledger:
    total = sum(sum(modules.values()) for modules in cells.values())
    use = PhaseUse(total, total, cells)
    about = {"parameters": {"trainable": 1, "all": 1}} | about
    return Ledger("predicted", "cpu", {"backward": use}, {}, total + cached, **about)


def text_of(before: Ledger, after: Ledger, *changed: str, width: int = 80) -> str:
    file = io.StringIO()
    print_difference(PlainConsole(file=file, width=width), before, after, changed)
    return file.getvalue()


PAIRS = {
    "one flag": (("lora", {}), ("lora", {"max_length": 32})),
    "methods": (("full", {}), ("lora", {})),
    "soft prompt": (("lora", {}), ("prompt_tuning", {})),
    "4 bits": (("lora", {"gpu": "T4"}), ("qlora", {"gpu": "T4"})),
    "cards": (("lora", {"gpu": "T4"}), ("lora", {"gpu": "RTX 4090"})),
    "CPU and card": (("lora", {}), ("lora", {"gpu": "T4"})),
    "same bytes": (("lora", {}), ("lora", {"learning_rate": 0.5})),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_the_parts_add_up_to_the_difference_of_needed_bytes(first, second, predicted):
    before, after = (predicted(method, **settings) for method, settings in (first, second))
    expected = after.needed_bytes - before.needed_bytes
    difference = before.difference(after)
    assert difference.change_bytes == expected == -after.difference(before).change_bytes
    assert sum(change for change, _ in lines(before, after)) == expected
    for part in difference.parts:
        assert sum(part.modules.values()) == part.change_bytes
    by_category = {part.category: part for part in difference.parts}
    for category in CATEGORIES:
        sizes = before.categories_at_peak[category], after.categories_at_peak[category]
        if category in by_category:
            assert sizes == (by_category[category].before_bytes, by_category[category].after_bytes)
        else:
            assert sizes[0] == sizes[1]
    context = (after.context_bytes or 0) - (before.context_bytes or 0)
    assert context == (by_category["context"].change_bytes if "context" in by_category else 0)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_modules_are_matched_without_the_names_of_the_peft_model(method, predicted):
    parts = {part.category: part for part in predicted("full").difference(predicted(method)).parts}
    trained, frozen = parts["parameters_trainable"].modules, parts["parameters_frozen"].modules
    assert all(trained[module] == -nbytes for module, nbytes in frozen.items())
    assert {"model.embed_tokens", "model.layers.*.self_attn.q_proj", "lm_head"} <= frozen.keys()


def test_a_prediction_under_zero_3_changes_no_later_one_in_the_same_process(predicted):
    before = predicted("lora", gpu="T4")
    predicted("full", gpu="T4", launch="zero3", num_processes=2)
    again = predicted("lora", gpu="T4", seed=1)  # not the one before
    assert before is not again and before.difference(again).parts == ()


def test_what_both_have_is_no_part():
    one = {"gradients": {"a": 5, "b": 7}, "inputs": {"": 1}}
    assert Difference.of(one, one).parts == ()
    (part,) = Difference.of(one, one | {"gradients": {"a": 7, "b": 5}}).parts
    assert (part.change_bytes, part.modules) == (0, {"a": 2, "b": -2})


def test_the_first_sentence_has_the_totals_and_the_last_line_their_difference(predicted):
    full, lora = predicted("full"), predicted("lora")
    text = text_of(full, lora, "method lora instead of full")
    less = format_bytes(full.needed_bytes - lora.needed_bytes)
    assert text.startswith(f"B needs {less} less than A: {format_bytes(lora.needed_bytes)} instead of ")
    assert "\nAll of it comes from method lora instead of full.\n" in text
    assert re.search(rf"^ *-{less} +in all *$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    count = full.parameters["trainable"]
    assert f"{lora.parameters['trainable']:,} instead of {count:,} parameters train" in words


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        (
            {"m.layers.*.mlp.up": 50, "m.layers.*.mlp.down": 20, "m.layers.*.attn": 25, "lm_head": 5},
            "m.layers.*: mlp +70 B, attn +25 B",
        ),
        ({"m.layers.*": 40, "m.layers.*.mlp": 60}, "m.layers.*: mlp +60 B, itself +40 B"),
        ({"m.layers.*.mlp.up": 99, "m.layers": 1}, "m.layers.*.mlp.up"),
        ({"m.layers.*.mlp": 50, "m.norm": 10, "lm_head": 40}, "m +60 B, lm_head +40 B"),
        ({"a": 30, "b": 25, "c": 24, "d": 21}, "a +30 B, b +25 B, c +24 B"),
        ({"": 100}, ""),
    ],
)
def test_a_sentence_names_the_modules_with_most_of_the_change(modules, says):
    ((_, text),) = lines(ledger({}), ledger({"activations_saved": modules}))
    name, _, where = text.removeprefix(CATEGORIES["activations_saved"]).partition(": 100 B instead of 0 B")
    assert (name, where) == ("", f"; in {says}" if says else "")


def test_a_reason_is_a_fact_that_differs(predicted):
    before = predicted("lora")
    shorter, checkpointed = predicted("lora", max_length=32), predicted("lora", activation_checkpointing=True)
    reasons = dict.fromkeys(("rows of 32 instead of 64 tokens", "activation checkpointing", "parameters train"))
    for after, expected in (
        (shorter, {"rows of 32 instead of 64 tokens"}),
        (checkpointed, {"activation checkpointing"}),
    ):
        (saved,) = [text for _, text in lines(before, after) if text.startswith(CATEGORIES["activations_saved"])]
        assert {reason for reason in reasons if f"; {reason}" in saved} == expected


def test_small_changes_and_those_beyond_the_most_share_one_line():
    names = [name for name in CATEGORIES if name not in ("allocator_slack", "cached_unused")]
    before = ledger({name: {"": GIB} for name in names}, cached=5)
    large = ledger({name: {"": (2 + at) * GIB} for at, name in enumerate(names)}, cached=7)
    found = lines(before, large)
    assert [change for change, _ in found] == [*[(len(names) - at) * GIB for at in range(MOST)], 10 * GIB, 2]
    assert found[-2][1] == "all other categories" and found[-1][1].startswith(CATEGORIES["cached_unused"])
    for share, has_line in ((1.1 * LEAST_SHARE, True), (0.9 * LEAST_SHARE, False)):
        change = int(share * before.needed_bytes)
        after = ledger({name: {"": GIB + (change if name == "inputs" else 0)} for name in names}, cached=5)
        ((found_change, text),) = lines(before, after)
        assert found_change == change and text.startswith("the batch") is has_line


@pytest.mark.parametrize(
    ("budgets", "says"),
    [
        ((9, 9), "Both fit into 9 B."),
        ((2, 2), "Neither fits into 2 B."),
        ((5, 5), "A fits into 5 B, B does not."),
        ((5, 9), "A fits into 5 B, B fits into 9 B."),
        ((None, 5), "B does not fit into 5 B."),
        ((None, None), ""),
    ],
)
def test_the_verdict_says_which_of_both_fits(budgets, says):
    before, after = (
        ledger({"gradients": {"": size}}, budget_bytes=budget) for size, budget in zip((4, 8), budgets, strict=True)
    )
    assert (
        text_of(before, after, width=120).splitlines()[0]
        == f"B needs 4 B more than A: 8 B instead of 4 B on cpu. {says}".strip()
    )


def test_states_of_several_processes_name_no_module_but_their_engine():
    one = ledger({"parameters_trainable": {"model.embed_tokens": 8}})
    shard = replace(ledger({"parameters_trainable": {"model.norm": 4}}), engine="ZeRO-3", processes=2)
    ((change, text),) = lines(one, shard)
    assert change == -4
    assert text == "weights that train: 4 B instead of 8 B; ZeRO-3 on 2 processes instead of one process"


def test_what_the_host_needs_and_what_is_noted_of_one_run_is_said():
    before = ledger({"optimizer_state": {"": GIB}}, notes=("of both", "of A"))
    host = Resource("host memory", (Line("states", 2 * GIB, "offloaded"),), budget_bytes=GIB)
    after = replace(before, notes=("of both",), resources=(host,))
    text = text_of(before, after, "--launch zero3_offload instead of zero3")
    assert text.startswith(
        "B needs exactly as much as A: 1.00 GiB on cpu.\n"
        "B needs 2.00 GiB of host memory, and there are 1.00 GiB.\n"
        "B differs from A in: --launch zero3_offload"
    )
    assert "host memory: 2.00 GiB instead of 0 B\n" in text
    assert "note: of both\n" in text and "note on A: of A\n" in text

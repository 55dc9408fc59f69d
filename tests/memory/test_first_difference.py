"""A predicted and a measured step, event by event: equal where the prediction is right, and named where it is not."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_models import rows, save_with_tokenizer, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Trainer, TrainingArguments

from toolkit.config.optimizers import OWN
from toolkit.memory import meta_ops
from toolkit.memory.shadow.step import real_zero_losses
from toolkit.methods import METHODS
from toolkit.runs.first_difference import AHEAD, SHOWN, Event, Pair, aligned, main, sentence, show

SHORT = ["--max_train_samples", "32", "--max_eval_samples", "2", "--max_length", "64", "--use_cpu"]
SHORT += ["--per_device_train_batch_size", "2"]


def compare(capfd, *argv):
    """(exit code, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    out, err = capfd.readouterr()
    return caught.value.code, out, err


def event(nbytes, sign=1, op="aten::mm", module="layers.0.mlp", phase="forward", step=1):
    return Event(sign, nbytes, op, module, phase, step)


@pytest.mark.parametrize(
    "flags",
    [
        ["lora"],
        ["full", "--bf16", "--gradient_accumulation_steps", "2", "--gradient_checkpointing"],
        ["qlora", "--use_dora", "--optim", "adamw_bnb_8bit"],
        ["full", "--loss_chunk_tokens", "10", "--mlp_tile_tokens", "30"],
        ["full", "--optimizer_in_backward", "--optim", "adamw_bnb_8bit"],
        ["lora", "--loss_chunk_tokens", "0"],
        ["qlora", "--mlp_tile_tokens", "30", "--gradient_checkpointing", "--lora_dropout", "0.1"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_every_event_of_a_right_prediction_is_the_measured_one(flags, capfd):
    code, out, _ = compare(capfd, *flags, *SHORT)
    assert code == 0, out
    events = int(out.rpartition("all ")[2].split()[0].replace(",", ""))
    assert events > 1500, out


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(name for name, m in METHODS.items() if m.trains and name != "peft_method"))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lever_is_predicted_to_the_event_for_every_method(method, checkpointing, capfd):
    flags = ["--loss_chunk_tokens", "10", "--mlp_tile_tokens", "30"]
    if checkpointing:
        flags += ["--activation_checkpointing"]
    code, out, err = compare(capfd, method, *flags, *SHORT)
    if checkpointing and method == "prefix_tuning":
        assert code == 2 and "exclude each other" in err
    else:
        assert code == 0, out + err


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_of_our_own_is_predicted_by_running_it(name, capfd):
    code, out, err = compare(capfd, "lora", "--optim", name, *SHORT)
    assert code == 0, out + err


def test_random_weights_are_enough(capfd, tmp_path):
    folder = save_with_tokenizer(tiny_config("llama"), tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    code, out, err = compare(capfd, "lora", "--model_name_or_path", folder, "--random_weights", *SHORT)
    assert code == 0, out + err


@pytest.mark.parametrize("flags", [[], ["--activation_checkpointing", "--mlp_tile_tokens", "30", "--bf16"]], ids=len)
def test_packed_rows_are_predicted_to_the_event(flags, capfd, tmp_path):
    folder = save_with_tokenizer(tiny_config("llama"), tmp_path / "model")
    code, out, err = compare(capfd, "lora", "--model_name_or_path", folder, "--packing", *flags, *SHORT)
    assert code == 0, out + err


@pytest.fixture
def doubled(monkeypatch):
    """Makes the shadow of one operator return tensors of the right shape in storages of twice the size."""

    def double(name, in_backward=False):
        right = meta_ops.run

        def wrong(op, args, kwargs):
            result = right(op, args, kwargs)
            elsewhere = op.name() != name or (torch._C._current_graph_task_id() != -1) != in_backward
            if elsewhere or not isinstance(result, FakeTensor):
                return result
            twice = torch.empty(2 * result.numel(), dtype=result.dtype, device="meta")
            return meta_ops.fake(result.fake_mode, twice[: result.numel()].view(result.shape))

        monkeypatch.setattr(meta_ops, "run", wrong)

    return double


@pytest.mark.parametrize(
    ("op", "in_backward", "place"),
    [
        (
            "aten::tanh",
            False,
            "step 1, forward, base_model.model.encoder.block.0.layer.1.DenseReluDense.act, aten::tanh",
        ),
        (
            "aten::tanh_backward",
            True,
            "step 1, backward, base_model.model.decoder.block.1.layer.2.DenseReluDense.act, aten::tanh_backward",
        ),
    ],
)
def test_a_wrong_size_of_an_operator_is_named_with_its_phase_and_module(op, in_backward, place, doubled, capfd):
    doubled(op, in_backward)
    code, out, _ = compare(capfd, "lora", *SHORT)
    assert code == 1
    found = re.fullmatch(r" +differs  (.*): predicted ([\d,]+) bytes, measured ([\d,]+)", out.splitlines()[-1])
    assert found, out
    assert found[1] == place
    predicted, measured = (int(number.replace(",", "")) for number in found.groups()[1:])
    assert predicted == 2 * measured > 0
    assert "Events around the first difference" in out and "≠" in out


def test_an_event_on_one_side_alone_is_named_and_the_rest_is_brought_together_again():
    predicted = [event(n) for n in range(20)]
    measured = [*predicted[:9], event(512, op="aten::clone", module="layers.1"), *predicted[9:]]
    rows = aligned(predicted, measured)
    assert len(rows) == SHOWN
    assert [row.is_equal for row in rows] == [True] * 4 + [False] + [True] * 5
    assert rows[4] == Pair(None, measured[9]) and rows[3].predicted == rows[3].measured == predicted[8]
    assert sentence(*rows[4]) == (
        "step 1, forward, layers.1, aten::clone: allocation of 512 bytes measured, none predicted at this point"
    )
    rows = aligned(measured, predicted)
    assert rows[4] == Pair(measured[9], None)
    assert sentence(*rows[4]).endswith("allocation of 512 bytes predicted, none measured at this point")


def test_events_of_different_kinds_at_one_place_are_both_described():
    released, other = event(64, sign=-1, op="", module=""), event(32, phase="optimizer_step", step=2)
    assert sentence(released, other) == (
        "predicted: release of 64 bytes (step 1, forward, no module, made outside); "
        "measured: allocation of 32 bytes (step 2, optimizer step, layers.0.mlp, aten::mm)"
    )
    assert sentence(event(64, sign=-1), event(32, sign=-1)) == (
        "step 1, forward, layers.0.mlp, aten::mm: release of a block: predicted 64 bytes, measured 32"
    )


def test_releases_that_follow_each_other_have_no_order():
    one, other = event(8, sign=-1), event(16, sign=-1, module="layers.1")
    later = event(8, sign=-1, phase="backward")
    assert not aligned([event(1), one, other, later, event(2)], [event(1), other, one, later, event(2)])
    assert aligned([event(1), one, event(2), other], [event(1), other, event(2), one])
    assert aligned([event(1), event(2)], [event(2), event(1)])


def test_operators_of_other_names_with_the_same_memory_are_no_difference():
    assert not aligned([event(4, op="aten::linalg_vector_norm")], [event(4, op="aten::_foreach_norm.Scalar")])


def test_a_list_that_ends_early_and_lists_that_never_meet_again_are_shown():
    events = [event(n) for n in range(1, 8)]
    assert aligned(events, events[:6])[-1] == Pair(events[6], None)
    rows = aligned([event(n) for n in range(AHEAD)], [event(-n - 1) for n in range(AHEAD)])
    assert len(rows) == SHOWN and not any(row.is_equal for row in rows)


@pytest.mark.parametrize(("width", "lines"), [(79, 11), (80, 15), (160, 15)])
def test_a_narrow_terminal_gets_lines_and_a_wide_one_a_table(width, lines):
    predicted = [event(n, module="layers.0") for n in range(20)]
    measured = [*predicted[:9], replace(predicted[9], nbytes=1024), *predicted[10:]]
    out = io.StringIO()
    show(Console(file=out, width=width), aligned(predicted, measured))
    shown = out.getvalue().splitlines()
    assert len(shown) == lines, out.getvalue()
    marked = [line for line in shown if "≠" in line]
    if width < 80:
        assert marked == [
            "≠ predicted +9 aten::mm (layers.0, forward)",
            "≠ measured +1,024 aten::mm (layers.0, forward)",
        ]
    else:
        assert [cell.strip() for cell in marked[0].split("│")[1:-1]] == [
            "≠", "forward", "+9 aten::mm", "+1,024 aten::mm", "layers.0",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["lorra"], "unknown method 'lorra' (did you mean lora?)"),
        (["in_context"], "in_context trains nothing, so there is no step to compare"),
        (
            ["lora", "--output_dir", "x"],
            "--output_dir has no effect here: two steps run, and nothing is kept; leave it out",
        ),
        (["lora", "--predict"], "--predict has no effect here"),
        (["lora", "--at_least", "few"], "'few' is not a size"),
        (["lora", "--lora_q", "2"], "unknown flag --lora_q (did you mean lora_r?)"),
        ([], "the following arguments are required: METHOD"),
    ],
)
def test_a_mistake_is_one_line(argv, expected, capfd):
    code, _, err = compare(capfd, *argv)
    assert code == 2 and err.startswith(f"error: {expected}"), err


def test_a_launch_of_several_processes_is_refused(monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, _, err = compare(capfd, "lora", *SHORT)
    assert code == 2 and "events are compared on one process, and the launch asked for ZeRO" in err


def test_losses_that_are_replaced_by_zero_do_not_change_what_is_learned(tmp_path):
    """A step is compared as it is: gradients are those of the real loss."""
    model = tiny_model("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    with real_zero_losses():
        result = Trainer(model, arguments, train_dataset=rows("llama", 8)).train()
    assert result.training_loss == 0
    assert not all(map(torch.equal, before, model.parameters()))

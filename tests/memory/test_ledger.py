"""A ledger exists only if its parts add up to the total; JSON preserves it."""

import json
from dataclasses import replace

import pytest
import torch

from toolkit.errors import UserError
from toolkit.memory.ledger import Ledger, LedgerError, PhaseUse, folded, ledger_of
from toolkit.memory.recording import Counter, Recording
from toolkit.memory.trace import Trace

ABOUT = {"source": "measured", "device": "cpu", "parameters": {"trainable": 3, "all": 7}}


def small_ledger() -> Ledger:
    meter = Counter()
    recording = Recording(meter)
    trace = Trace(meter, recording)
    weight = torch.zeros(64, requires_grad=True)
    trace.adopt(weight, "parameters_trainable", "layer.0.mlp")
    trace.step = 1
    trace.enter_phase("forward")
    with trace:
        loss = weight.exp().sum()
        loss.backward()
        trace.adopt(weight.grad, "gradients", "layer.0.mlp")
        trace.enter_phase("optimizer_step")
    return ledger_of(recording, **ABOUT)


def test_the_parts_of_a_tiny_step_add_up_to_the_byte():
    ledger = small_ledger()
    assert ledger.phases["load"].cells == {"parameters_trainable": {"layer.*.mlp": 256}}
    forward = ledger.phases["forward"]
    assert forward.allocated_peak_bytes == 256 + 256 + 4 + 4  # weight, exp (saved), the loss, the gradient's seed of 1
    assert forward.categories["activations_saved"] == 256 + 4 + 4  # the scalars outlive the forward pass too
    optimizer = ledger.phases["optimizer_step"]
    assert optimizer.categories["gradients"] == 256
    assert sum(ledger.categories_at_peak.values()) == ledger.reserved_bytes == ledger.allocated_bytes


def test_a_ledger_is_the_same_after_saving_and_loading(tmp_path):
    ledger = small_ledger()
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger


def test_json_has_the_documented_keys():
    data = json.loads(json.dumps(small_ledger().to_json()))
    documented = {"schema_version", "source", "device", "stack", "config", "peak", "phases", "categories_at_peak"}
    assert documented | {"parameters", "budget_bytes", "fits", "seconds"} <= data.keys()
    assert {"allocated_bytes", "reserved_bytes", "process_bytes"} <= data["peak"].keys()
    assert {"load", "forward", "backward", "optimizer_step"} == data["phases"].keys()
    assert {"allocated_peak_bytes", "allocated_end_bytes"} <= data["phases"]["load"].keys()


def test_parts_that_do_not_add_up_are_refused():
    with pytest.raises(LedgerError, match="the parts are 5 bytes, the peak is 6 bytes"):
        PhaseUse(6, 0, {"buffers": {"": 5}})


def test_a_meter_that_disagrees_with_the_events_is_an_error():
    class Miscounting(Counter):
        def died(self, block):
            pass

    meter = Miscounting()
    recording = Recording(meter)
    trace = Trace(meter, recording)
    trace.step = 1
    trace.enter_phase("forward")
    trace.passing(100)
    trace.hold(1)
    with pytest.raises(LedgerError, match="differ from the meter's total by 100 bytes"):
        ledger_of(recording, **ABOUT)


def test_a_budget_is_compared_with_the_whole_process_if_its_size_is_known():
    ledger = small_ledger()
    assert ledger.fits
    assert replace(ledger, budget_bytes=ledger.reserved_bytes).fits
    assert not replace(ledger, budget_bytes=ledger.reserved_bytes, context_bytes=1).fits


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_file_that_is_no_ledger_is_a_user_error(text, tmp_path):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(UserError):
        Ledger.load(tmp_path / "l.json")


def test_repeated_layers_share_a_row():
    assert folded("model.layers.17.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    assert folded("transformer.h.3") == "transformer.h.*"
    assert folded("fc1") == "fc1"

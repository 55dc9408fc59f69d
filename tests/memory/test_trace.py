"""The trace reports the birth and the death of each storage once, on real and on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from toolkit.memory.recording import Counter, Recording
from toolkit.memory.trace import Trace

KINDS = ["real", "fake"]


def tensor(kind, *shape, requires_grad=False):
    if kind == "real":
        return torch.zeros(shape, requires_grad=requires_grad)
    fake = FakeTensor(
        FakeTensorMode(allow_non_fake_inputs=True), torch.zeros(shape, device="meta"), torch.device("cpu")
    )
    return fake.requires_grad_(requires_grad)


def traced():
    meter = Counter()
    recording = Recording(meter)
    return Trace(meter, recording), meter, recording


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_in_place_operators_make_no_new_storage(kind):
    trace, meter, recording = traced()
    with trace:
        x = tensor(kind, 4, 8) + 1  # the operand is tracked as an input, then freed
        y = x.view(32)[3:]
        y.add_(1)
    assert meter.allocated == 4 * 32
    del x
    assert meter.allocated == 4 * 32  # the view keeps the storage
    del y
    assert meter.allocated == 0
    assert sum(event.sign for event in recording.events) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_is_detected_by_the_trace(kind):
    trace, _, recording = traced()
    x = tensor(kind, 16, requires_grad=True)
    trace.adopt(x, "parameters_trainable")
    trace.enter_phase("forward")
    with trace:
        loss = (x * 2).exp().sum()
        loss.backward()
        x.grad.mul_(0.5)
    assert [window.phase for window in recording.windows] == ["load", "forward", "backward", "optimizer_step"]
    saved = [e.block for e in recording.events if e.sign > 0 and e.block.op == "aten::exp"]
    assert [b.phase for b in saved] == ["forward"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_counts_as_building_the_graph(use_reentrant):
    trace, _, recording = traced()
    x = tensor("real", 16, requires_grad=True)
    trace.enter_phase("forward")
    with trace:
        checkpoint(lambda t: t.exp().sin(), x, use_reentrant=use_reentrant).sum().backward()
    births = [
        (e.block.phase, e.block.builds_graph) for e in recording.events if e.sign > 0 and e.block.op == "aten::exp"
    ]
    assert births == [("forward", True), ("backward", True)]


def test_blocks_have_the_module_in_which_they_are_born_in_forward_and_backward():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(8, 2)))
    trace, _, recording = traced()
    trace.enter_phase("forward")
    with trace, trace.modules_of(model):
        model(torch.zeros(3, 4)).sum().backward()
    where = {(e.block.phase, e.block.op): e.block.module for e in recording.events if e.sign > 0}
    assert where["forward", "aten::gelu"] == where["backward", "aten::gelu_backward"] == "1.0"
    addmm = [e.block.module for e in recording.events if e.block.op == "aten::addmm" and e.sign > 0]
    assert addmm == ["0", "1.1"]
    mm = [e.block.module for e in recording.events if e.block.op == "aten::mm" and e.sign > 0]
    assert mm == ["1.1", "1.1", "0"]  # gradients of weight and input; the input of the first layer needs none


class Layer(torch.nn.Module):
    def __init__(self, recomputes_itself):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.recomputes_itself = recomputes_itself

    def forward(self, x):
        return checkpoint(self.compute, x, use_reentrant=False) if self.recomputes_itself else self.compute(x)

    def compute(self, x):
        return x.exp() + self.down(self.up(x).tanh()).sigmoid()


class Layers(torch.nn.Module):
    def __init__(self, with_hooks):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(not with_hooks), Layer(not with_hooks)])
        self.with_hooks = with_hooks

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.with_hooks else layer(x)
        return x


@pytest.mark.parametrize("with_hooks", [True, False])  # whether those of a layer run when it is recomputed
def test_recomputed_blocks_have_the_module_that_made_them(with_hooks):
    model = Layers(with_hooks)
    trace, _, recording = traced()
    trace.enter_phase("forward")
    with trace, trace.modules_of(model):
        model(torch.zeros(3, 4, requires_grad=True)).sum().backward()
    made = [(e.block.op.removeprefix("aten::"), e.block.module) for e in recording.events if e.sign > 0]
    assert [module for op, module in made if op == "exp"] == ["layers.0", "layers.1", "layers.1", "layers.0"]
    assert [module for op, module in made if op == "tanh"] == ["layers.0", "layers.1", "layers.1", "layers.0"]
    up = [f"layers.{i}.up" for i in (0, 1, 1, 0)]
    assert [module for op, module in made if op == "addmm" and module.endswith("up")] == up


def test_a_resized_storage_is_counted_with_its_new_size():
    trace, meter, _ = traced()
    with trace:
        x = torch.empty(4)
        x.resize_(100)
    assert meter.allocated == 400


def test_buffers_inside_kernels_raise_the_peak_and_are_freed():
    trace, meter, _ = traced()
    trace.passing(1000)
    workspace = trace.hold(10)
    assert (meter.allocated, meter.take_peak()) == (10, 1000)
    trace.release(workspace)
    assert meter.allocated == 0


def test_a_trace_limited_to_one_device_ignores_the_others():
    meter = Counter()
    with Trace(meter, device_type="cuda"):
        kept = torch.zeros(4)
    assert meter.allocated == 0
    assert kept.numel() == 4

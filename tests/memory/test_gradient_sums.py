"""Which gradients autograd sums in place: the decision under a trace is compared with the real engine's, for each sum.

The real engine runs on real tensors on the CPU without a dispatch mode (with one it never adds in place), and PyTorch's
profiler shows whether each node's evaluation called `add` or `add_`. The engine's rule is the same on every device.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, ENCODER_DECODERS, tiny_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from toolkit.memory.cuda import device, gradient_sums
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.recording import Counter
from toolkit.memory.shadow.fake import fake_like, make_fake
from toolkit.memory.trace import Trace


def of_the_engine(run):
    """(shape, whether in place) of each sum of gradients in the real engine while `run()` runs on real tensors, in order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    sums = [
        (event.time_range.start, tuple(event.input_shapes[0]), event.name == "aten::add_")
        for event in recorded.events()
        if event.name in ("aten::add", "aten::add_")
        and event.cpu_parent is not None
        and event.cpu_parent.name.startswith("autograd::engine::evaluate_function")
    ]
    return [(shape, in_place) for _, shape, in_place in sorted(sums)]


def of_a_trace(run, overlay, monkeypatch):
    """(shape, whether in place) of each sum as `overlay` decides it, in order."""
    sums, decide = [], gradient_sums.sums_gradients

    def decision(args):
        in_place = decide(args)
        if torch._C._current_graph_task_id() != -1 and gradient_sums.caller().co_name == "_engine_run_backward":
            sums.append((tuple(args[0].shape), in_place))
        return in_place

    with monkeypatch.context() as patches:
        for module in (device, gradient_sums):
            patches.setattr(module, "sums_gradients", decision)
        patches.setattr(gradient_sums, "_DISPATCH", {*gradient_sums._DISPATCH, __name__})
        trace = Trace(Counter(), overlay=overlay)
        with trace:
            run()
        trace.close()
    return sums


def of_the_shadow(run, monkeypatch):
    """The decisions of a prediction for a card, on fake tensors."""
    return of_a_trace(run, device.CudaOverlay(find_card("RTX 4090")), monkeypatch)


def of_a_measured_step(run, monkeypatch):
    """The decisions of a measurement on a GPU, here on real tensors on the CPU; the engine's rule is the same."""
    return of_a_trace(run, gradient_sums.SumsInPlace(), monkeypatch)


def linears(number=3, bias=False):
    return nn.ModuleList([nn.Linear(16, 16, bias=bias) for _ in range(number)])


class Case:
    """`model()` builds the module, `loss(model, make)` a scalar; `make(*shape)` builds a leaf that requires a gradient."""

    def __init__(self, loss, model=nn.Identity, dtype=torch.float32):
        self.loss, self.model, self.dtype = loss, model, dtype


def tied(hidden):
    def loss(model, make):
        h = model(torch.ones(2, 6, dtype=torch.long))
        return F.linear(hidden(h), model.weight).sum()

    return loss


def shared(*shape):
    def loss(layers, make):
        x = make(*shape) * 1.0
        return sum(layer(x).sum() for layer in layers)

    return loss


def residual(layers, make):
    x = make(2, 6, 16) * 1.0
    for layer in layers:
        x = x + torch.tanh(layer(x))
    return x.sum()


def parallel_residual(layers, make):
    x = make(2, 6, 16) * 1.0
    normed = x * 2.0
    return (x + layers[0](normed) + layers[1](normed)).sum()


def used(*uses):
    def loss(model, make):
        x = make(4, 6) * 1.0
        return sum(use(x).sum() for use in uses)

    return loss


def reused_parameter(layers, make):
    x = make(2, 6, 16)
    return layers[0](torch.tanh(layers[0](torch.tanh(layers[0](x))))).sum()


def attention(layers, make):
    x = make(2, 6, 16) * 1.0
    q, k, v = (layer(x).view(2, 6, 4, 4).transpose(1, 2) for layer in layers)
    k, v = (t[:, :, None].expand(2, 4, 1, 6, 4).reshape(2, 4, 6, 4) for t in (k, v))
    scores = torch.softmax(q @ k.transpose(2, 3), -1)
    return (x + (scores @ v).transpose(1, 2).reshape(2, 6, 16)).sum()


def grouped_attention(layers, make):
    x = make(2, 6, 16) * 1.0
    q, k, v = (layer(x).view(2, 6, 4, 4).transpose(1, 2) for layer in layers)
    k, v = (t[:, :2, None].expand(2, 2, 2, 6, 4).reshape(2, 4, 6, 4) for t in (k, v))
    return ((torch.softmax(q @ k.transpose(2, 3), -1) @ v).sum() + k.sum()) * 1.0


def lora(layers, make):
    x = make(2, 6, 16) * 1.0
    base, a, b, c = layers
    return (base(x) + b(a(F.dropout(x, 0.1))) + c(x.float()).to(x.dtype)).sum()


def rotary(layers, make):
    x = layers[0](make(2, 6, 16)).view(2, 6, 4, 4)
    rotated = torch.cat((-x[..., 2:], x[..., :2]), -1)
    return (x * 0.5 + rotated * 0.5).sum()


def gated(layers, make):
    x = make(2, 6, 16) * 1.0
    return layers[2](F.silu(layers[0](x)) * layers[1](x)).sum()


def split_heads(layers, make):
    q, k, v = layers[0](make(2, 6, 16)).split(4, -1)[:3]
    return (q * k + v).sum() + q.sum()


def root_mean_square(layers, make):
    x = make(2, 6, 16) * 1.0
    return (layers[0](x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + x).sum()


CASES = {
    "tied embedding": Case(tied(lambda h: h * 2.0), lambda: nn.Embedding(32, 16)),
    "tied embedding with a residual": Case(tied(lambda h: h + torch.tanh(h)), lambda: nn.Embedding(32, 16)),
    "tied embedding in bf16": Case(tied(torch.tanh), lambda: nn.Embedding(32, 16), torch.bfloat16),
    "a matrix shared by three layers": Case(shared(12, 16), linears),
    "rows of tokens shared by three layers": Case(shared(2, 6, 16), linears),
    "shared by three layers with bias": Case(shared(2, 6, 16), lambda: linears(bias=True)),
    "a matrix shared by layers with bias": Case(shared(12, 16), lambda: linears(bias=True)),
    "shared by five layers in bf16": Case(shared(2, 6, 16), lambda: linears(5), torch.bfloat16),
    "a leaf used twice": Case(lambda model, make: (lambda x: (x * 2.0 + x * 3.0).sum())(make(4, 6))),
    "residuals": Case(residual, linears),
    "residuals in fp16": Case(residual, linears, torch.float16),
    "parallel residuals": Case(parallel_residual, linears),
    "a parameter used three times": Case(reused_parameter, linears),
    "three products": Case(used(lambda x: x * 2.0, lambda x: x * 3.0, lambda x: x * 4.0)),
    "a product and the tensor itself": Case(used(lambda x: x, lambda x: x * 3.0)),
    "the tensor itself twice": Case(used(lambda x: x, lambda x: x)),
    "added to itself": Case(used(lambda x: x + x)),
    "added to itself three times": Case(used(lambda x: x + x + x)),
    "transposed, then as it is": Case(used(lambda x: x.t() * 2.0, lambda x: x * 3.0)),
    "as it is, then transposed": Case(used(lambda x: x * 3.0, lambda x: x.t() * 2.0)),
    "viewed in two shapes": Case(used(lambda x: x.view(24) * 2.0, lambda x: x.view(2, 12) * 3.0)),
    "expanded": Case(used(lambda x: x.expand(3, 4, 6) * 2.0, lambda x: x * 3.0)),
    "as it is, then expanded": Case(used(lambda x: x * 3.0, lambda x: x.expand(3, 4, 6) * 2.0)),
    "expanded without a sum": Case(used(lambda x: x[:, None].expand(4, 1, 6) * 2.0, lambda x: x * 3.0)),
    "sums, whose gradients are expanded": Case(used(lambda x: x.sum(0), lambda x: x.sum(1), lambda x: x * 2.0)),
    "a part and the whole": Case(used(lambda x: x[:2] * 2.0, lambda x: x * 3.0)),
    "two parts": Case(used(lambda x: x[:2] * 2.0, lambda x: x[2:] * 3.0, lambda x: x[1] * 2.0)),
    "cast and as it is": Case(used(lambda x: x.float() * 2.0, lambda x: x * 3.0), dtype=torch.bfloat16),
    "detached values of another use": Case(used(lambda x: x * x.detach(), lambda x: x * x)),
    "exp, whose result is kept": Case(used(torch.exp, torch.tanh, torch.sigmoid)),
    "concatenated with itself": Case(used(lambda x: torch.cat((x, x)) * 2.0, lambda x: x * 3.0)),
    "layer norm and residual": Case(
        lambda model, make: (lambda x: (model(x) + x).sum())(make(4, 16) * 1.0), lambda: nn.LayerNorm(16)
    ),
    "root mean square": Case(root_mean_square, linears),
    "attention": Case(attention, linears),
    "attention with fewer keys": Case(grouped_attention, linears),
    "low rank in addition to the base": Case(lora, lambda: linears(4)),
    "rotary": Case(rotary, linears),
    "gated": Case(gated, linears),
    "one projection split in three": Case(split_heads, linears),
}


@pytest.mark.parametrize("name", CASES)
def test_the_shadow_adds_gradients_in_place_where_the_engine_does(name, monkeypatch):
    case = CASES[name]
    model = case.model().to(case.dtype)
    real = of_the_engine(lambda: case.loss(model, leaves(case)).backward())
    with torch.device("meta"):
        shadow = case.model().to(case.dtype)
    mode = make_fake(shadow)

    def make(*shape):
        return fake_like(mode, torch.empty(shape, dtype=case.dtype, device="meta")).requires_grad_()

    assert of_the_shadow(lambda: case.loss(shadow, make).backward(), monkeypatch) == real
    assert real, "the engine sums nothing here, so this case tests nothing"


def leaves(case, made=None):
    def make(*shape):
        leaf = torch.randn(shape, dtype=case.dtype).requires_grad_()
        if made is not None:
            made.append(leaf)
        return leaf

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_measured_step_adds_in_place_where_the_engine_does_with_the_same_gradients(name, monkeypatch):
    case, gradients = CASES[name], []
    model = case.model().to(case.dtype)

    def step(made):
        torch.manual_seed(0)  # leaves and dropout
        model.zero_grad()
        case.loss(model, leaves(case, made)).backward()
        gradients.append([p.grad.clone() for p in [*made, *model.parameters()] if p.grad is not None])

    real = of_the_engine(lambda: step([]))
    assert of_a_measured_step(lambda: step([]), monkeypatch) == real
    assert gradients[0] and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_add_gradients_as_the_engine_does(name, checkpointing, monkeypatch):
    ids = torch.ones(2, 8, dtype=torch.long)

    def step(model):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        more = {"decoder_input_ids": ids} if name in ENCODER_DECODERS else {}
        return lambda: model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()

    def gradients_of(run, *others):
        torch.manual_seed(0)
        model.zero_grad()
        sums = run(step(model), *others)
        return sums, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model = tiny_model(name, attn_implementation="eager")
    real, gradients = gradients_of(of_the_engine)
    measured, gradients_under_a_trace = gradients_of(of_a_measured_step, monkeypatch)
    with torch.device("meta"):
        shadow = tiny_model(name, attn_implementation="eager")
    make_fake(shadow)
    assert of_the_shadow(step(shadow), monkeypatch) == measured == real
    assert {in_place for _, in_place in real} == {True, False}
    assert gradients and all(map(torch.equal, gradients, gradients_under_a_trace))


class Everything:
    def __contains__(self, name):
        return True


@pytest.mark.parametrize("name", ["tied embedding", "shared by five layers in bf16", "gated"])
def test_the_engines_thread_for_a_gpu_has_no_python_code(name, monkeypatch):
    """There the search for the caller reaches the end of the stack, as here, where every module counts as dispatch."""
    case, sums, decide = CASES[name], [], gradient_sums.sums_gradients
    model = case.model().to(case.dtype)
    real = of_the_engine(lambda: case.loss(model, leaves(case)).backward())

    def decision(args):
        assert gradient_sums.caller() is None
        if torch._C._current_graph_task_id() != -1:
            sums.append((tuple(args[0].shape), decide(args)))
        return bool(sums) and sums[-1][1]

    monkeypatch.setattr(gradient_sums, "sums_gradients", decision)
    monkeypatch.setattr(gradient_sums, "_DISPATCH", Everything())
    trace = Trace(Counter(), overlay=gradient_sums.SumsInPlace())
    with trace:
        case.loss(model, leaves(case)).backward()
    trace.close()
    assert sums == real

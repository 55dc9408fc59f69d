"""Liger's stand-ins keep and allocate what its functions do; where Liger and Triton are installed, they are compared with it."""

import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType

import pytest
import torch
from test_cuda import Log
from tiny_models import save_with_tokenizer, tiny_config, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig
from transformers.models.llama import modeling_llama

from toolkit.config import parse_config
from toolkit.errors import UserError
from toolkit.memory.cuda import liger
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.shadow.fake import fake_like, make_fake
from toolkit.memory.shadow.step import CPU
from toolkit.memory.trace import Trace
from toolkit.methods.full import Full
from toolkit.methods.lora import Lora
from toolkit.methods.peft_method import AnyPeft
from toolkit.models.liger import check_liger, use_liger_norms
from toolkit.models.meta import model_on_meta
from toolkit.runs.prediction import predict_run

ADA = find_card("4090")
BF16 = torch.bfloat16


def taken(run, *given, card=ADA):
    """The bytes of each block that `run(*given)` allocates on `card`: forward, and backward without the outputs' gradients."""
    log, device = Log(), Cuda(card)
    trace = Trace(log, overlay=device.overlay())
    for tensor in given:
        trace.adopt(tensor, "inputs")
    log.events.clear()
    with device.running(), trace:
        outputs = run(*given)
        forward = len(log.events)
        grads = [torch.empty_like(output) for output in outputs]
        backward = len(log.events)
        torch.autograd.backward(outputs, grads)
    trace.close()
    return [[n for sign, n, _ in some if sign == "+"] for some in (log.events[:forward], log.events[backward:])]


@pytest.fixture
def fake():
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(*shape, dtype=BF16):
        return fake_like(mode, torch.empty(shape, dtype=dtype, device="meta")).requires_grad_()

    return make


X, ROWS = 4 * 8 * 64 * 2, 4 * 8


@pytest.mark.parametrize(
    ("trains", "in_place", "backward"),
    [
        # one float32 row for each of 128 multiprocessors, their sum in float32, and the weight's gradient
        (True, True, [128 * 64 * 4, 64 * 4, 64 * 2]),
        (True, False, [128 * 64 * 4, X, 64 * 4, 64 * 2]),
        (False, True, []),
    ],
)
def test_a_norm_keeps_its_input_and_one_number_for_each_row(trains, in_place, backward, fake):
    x, weight = fake(4, 8, 64), fake(64).detach().requires_grad_(trains)
    forward, back = taken(lambda x, w: [liger._RMSNorm.apply(x * 1, w, 128, in_place)], x, weight)
    assert forward == [X, X, ROWS * 4]  # the input, the output, and 1 / root mean square
    assert back[: len(backward)] == backward and len(back) == len(backward) + 1  # last the gradient of x * 1


def test_a_gated_product_writes_the_gradients_of_gate_and_up_over_them(fake):
    gate, up = fake(4, 8, 64), fake(4, 8, 64)
    forward, backward = taken(lambda g, u: [liger._GatedProduct.apply(g * 1, u * 1)], gate, up)
    assert forward == [X, X, X] and backward == [X, X]  # gradients of g * 1 and u * 1; none of the product


def test_rotary_embeddings_are_rotated_in_place(fake):
    q, k, cos = fake(2, 8, 4, 16), fake(2, 8, 2, 16), fake(2, 8, 16).detach()

    def run(q, k, cos):
        made = [(t * 1).transpose(1, 2) for t in (q, k)]  # as a model makes them
        return liger._Rope.apply(*made, cos, cos)

    forward, backward = taken(run, q, k, cos)
    one, other = 2 * 8 * 4 * 16 * 2, 2 * 8 * 2 * 16 * 2
    assert forward == [one, other] and sorted(backward) == [other, one]


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 256,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
OWN_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def events(kind, apply):
    """(sign, bytes) in a forward and a backward pass of a tiny model of the type `kind`, after `apply` replaced its parts."""
    is_t5, log = kind == "t5", Log()
    config = tiny_config("t5") if is_t5 else AutoConfig.for_model(kind, **SIZES)
    config.use_cache = False
    model = model_on_meta(AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM, config, torch.float32)
    make_fake(model)
    if is_t5:
        use_liger_norms(model)
    else:
        apply(model.train(), **OWN_LOSS)
    trace = Trace(log, overlay=CPU.overlay())
    for parameter in model.parameters():
        trace.adopt(parameter, "parameters_trainable")
    ids = torch.ones((2, 16), dtype=torch.long)
    with trace:
        model(input_ids=ids, **({"decoder_input_ids": ids} if is_t5 else {})).logits.sum().backward()
    trace.close()
    return [(sign, nbytes) for sign, nbytes, _ in log.events]


@pytest.mark.parametrize("kind", ["t5", *liger.MODELS])
def test_a_step_allocates_what_it_does_with_liger_itself(kind, monkeypatch):
    """Liger's own code on fake tensors, with its kernels left out: they compute, but Python allocates."""
    real = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    interface = pytest.importorskip("triton").runtime.jit.KernelInterface
    with liger.liger_kernel(replace(ADA, multiprocessors=1)):  # as Liger counts for a CPU
        ours = events(kind, sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance)
    monkeypatch.setattr(interface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    module = import_module(f"transformers.models.{kind.removesuffix('_text')}.modeling_{kind.removesuffix('_text')}")
    for _ in range(2):  # the first time it imports what makes tensors of its own
        with monkeypatch.context() as restored:
            for name, value in vars(module).items():  # Liger replaces some, also for models made later
                restored.setattr(module, name, value)
            theirs = events(kind, real._apply_liger_kernel_to_instance)
    assert ours == theirs


def test_every_type_of_model_for_which_liger_has_kernels_is_known():
    real = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    assert {*liger.MODELS, *liger.NOT_PREDICTED} == {*real.MODEL_TYPE_TO_APPLY_LIGER_FN}


# Liger's own measurements on an A100-SXM4-80GB, in MiB: benchmark/data/all_benchmark_data.csv of linkedin/Liger-Kernel, 2024-09-03.
# Feed-forward layers of 4,096 x 11,008 in bf16: (rows, mode, tokens of a row, with Liger, with transformers).
PUBLISHED = [
    ("silu", 4, "full", 1024, 1100.25, 1294.25),
    ("silu", 4, "full", 2048, 1582.25, 1992.25),
    ("silu", 4, "full", 4096, 2546.25, 3452.25),
    ("silu", 4, "full", 8192, 4474.25, 6372.25),
    ("gelu_pytorch_tanh", 8, "full", 1024, 1582.25, 1992.25),
    ("gelu_pytorch_tanh", 8, "full", 8192, 8330.25, 12212.25),
    ("gelu_pytorch_tanh", 8, "backward", 1024, 1582.25, 1992.25),
    ("gelu_pytorch_tanh", 8, "backward", 8192, 8330.25, 12212.25),
]


@pytest.mark.parametrize(("act", "rows", "mode", "tokens", "with_liger", "plain"), PUBLISHED)
@pytest.mark.parametrize("uses_liger", [True, False])
def test_the_peaks_that_liger_published_are_predicted(act, rows, mode, tokens, with_liger, plain, uses_liger):
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, hidden_act=act)
        layer = modeling_llama.LlamaMLP(config).to(BF16)
    device = Cuda(find_card("A100 80GB"), expandable_segments=False)
    meter, fakes = device.meter(), make_fake(layer)
    x = fake_like(fakes, torch.empty((rows, tokens, 4096), dtype=BF16, device="meta")).requires_grad_()
    if uses_liger:
        layer.forward = partial(liger._feed_forward, layer)
    trace = Trace(meter, overlay=device.overlay())
    for tensor in (x, *layer.parameters()):
        trace.adopt(tensor, "inputs")
    with device.running(), trace:  # as its benchmark does: gradients stay, and so does the graph
        y, grad = layer(x), torch.empty_like(x)
        y.backward(grad, retain_graph=True)
        if mode == "full":
            del y, grad
        meter.take_peak()
        if mode == "full":
            y = layer(x)
            grad = torch.empty_like(y)
        y.backward(grad, retain_graph=True)
    assert meter.take_peak() / 2**20 == (with_liger if uses_liger else plain)
    trace.close()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny model, by its name in `tiny_models`."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = str(save_with_tokenizer(tiny_config(name), tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


def predicted(folder, *flags, method=Lora, card=ADA):
    argv = ["--model_name_or_path", folder, "--per_device_train_batch_size", "4", "--max_length", "128", *flags]
    return predict_run(parse_config(method, argv, card), CPU if card is None else Cuda(card))


@pytest.mark.parametrize("method", [Full, Lora])
@pytest.mark.parametrize("name", ["llama", "qwen2", "t5"])
def test_a_run_with_liger_keeps_fewer_activations(name, method, folder_of):
    plain, with_liger = (predicted(folder_of(name), *flags, method=method) for flags in ((), ("--use_liger_kernel",)))
    kept = [ledger.phases["backward"].categories["activations_saved"] for ledger in (with_liger, plain)]
    assert kept[0] < 0.95 * kept[1]


def test_a_prediction_leaves_models_and_modules_as_they_were(folder_of):
    plain = predicted(folder_of("llama"))
    rotate = modeling_llama.apply_rotary_pos_emb
    predicted(folder_of("llama"), "--use_liger_kernel")
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert "liger_kernel" not in sys.modules or sys.modules["liger_kernel"].__file__
    assert predicted(folder_of("llama")).phases == plain.phases


@pytest.mark.parametrize(
    ("name", "card", "flags", "says"),
    [
        ("llama", None, (), "--use_liger_kernel needs a GPU; leave it out, or predict for a card: --gpu NAME"),
        ("llama", ADA, ("--loss_chunk_tokens", "0"), "memory of Liger's own loss is not predicted"),
        ("gpt2", ADA, (), "--use_liger_kernel has no effect on gpt2: Liger has no kernels for it; leave it out"),
    ],
)
def test_what_liger_does_not_do_or_is_not_predicted_is_refused(name, card, flags, says, folder_of):
    with pytest.raises(UserError, match=says):
        predicted(folder_of(name), "--use_liger_kernel", *flags, card=card)


def test_experts_with_liger_are_refused_by_name(tmp_path):
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    folder = save_with_tokenizer(AutoConfig.for_model("mixtral", **sizes), tmp_path)
    flags = ("--use_liger_kernel", "--lora_target_modules", "q_proj")
    with pytest.raises(UserError, match="--use_liger_kernel: Liger's kernels for mixtral are not predicted"):
        predicted(str(folder), *flags)


def test_a_run_on_a_model_without_kernels_is_refused(monkeypatch):
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for name in ("liger_kernel", "liger_kernel.transformers", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    check_liger("llama")
    check_liger("t5")
    with pytest.raises(UserError, match="--use_liger_kernel has no effect on gpt2"):
        check_liger("gpt2")


def test_a_classification_head_keeps_its_own_loss(folder_of, tmp_path):
    """Liger's loss is that of a language model, and would take the place of the head's forward pass."""
    data = tmp_path / "train.csv"
    data.write_text("text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(20)))
    flags = ("--task", "sequence_classification", "--dataset_name", str(data), "--use_liger_kernel")
    assert predicted(folder_of("llama"), *flags).phases


def test_an_adapter_around_a_norm_is_refused(folder_of):
    with pytest.raises(UserError, match=r"--use_liger_kernel replaces .*layernorm, which has an adapter"):
        predicted(folder_of("llama"), "--peft_type", "LN_TUNING", "--use_liger_kernel", method=AnyPeft)


def test_t5_computes_the_same_with_the_norm_that_liger_puts_in_place(monkeypatch):
    """The stand-in computes as LigerRMSNorm in its casting mode "llama", from the attributes that Liger's forward reads."""

    class LigerRMSNorm(nn.Module):
        def forward(self, x):
            assert (self.offset, self.casting_mode, self.in_place, self.row_mode) == (0.0, "llama", True, None)
            rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (x.float() * rstd).to(x.dtype) * self.weight

    package = ModuleType("liger_kernel.transformers")
    package.LigerRMSNorm = LigerRMSNorm
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    model, ids = tiny_model("t5").eval(), torch.arange(3, 35).view(2, 16)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    plain = model(input_ids=ids, decoder_input_ids=ids).logits
    use_liger_norms(model)
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, plain)

"""The CUDA overlay of a shadow step: each part is checked against the rule in the source that it cites."""

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from toolkit.config import parse_config
from toolkit.memory import census, meta_ops
from toolkit.memory.cuda import attention, loading, quantized
from toolkit.memory.cuda.allocator import AllocatorMeter
from toolkit.memory.cuda.attention import choose_kernel
from toolkit.memory.cuda.cards import find_card, generic_card
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.shadow.fake import fake_like
from toolkit.memory.trace import Trace
from toolkit.methods.full import Full
from toolkit.runs.prediction import predict_run

MIB = 1 << 20
T4, ADA, HOPPER = find_card("T4"), find_card("4090"), find_card("H200")


class Log:
    """A sink that keeps (sign, bytes, operator) in order."""

    def __init__(self):
        self.events = []

    def born(self, block):
        self.events.append(("+", block.nbytes, block.op))

    def died(self, block):
        self.events.append(("-", block.nbytes, block.op))

    def entered(self, phase, step):
        pass


@pytest.fixture
def fake():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return lambda *shape, dtype=torch.float32: fake_like(mode, torch.empty(shape, dtype=dtype, device="meta"))


def on(card, run, *adopted):
    """The events of `run()` on `card`, with the tensors `adopted` already tracked."""
    device, log = Cuda(card), Log()
    trace = Trace(log, overlay=device.overlay())
    for tensor in adopted:
        trace.adopt(tensor, "inputs")
    log.events.clear()
    with device.running(), trace:
        kept = run()
    events = list(log.events)
    del kept
    trace.close()
    return events


def test_float16_softmax_in_float32_makes_no_float32_copy_of_its_input(fake):
    x = fake(8, 64, dtype=torch.float16)
    events = on(T4, lambda: F.softmax(x, dim=-1, dtype=torch.float32), x)
    assert [(sign, nbytes) for sign, nbytes, _ in events] == [("+", 8 * 64 * 4)]


def test_bfloat16_softmax_in_float32_makes_a_float32_copy_of_its_input(fake):
    x = fake(8, 64, dtype=torch.bfloat16)
    events = on(ADA, lambda: F.softmax(x, dim=-1, dtype=torch.float32), x)
    assert [(sign, nbytes) for sign, nbytes, _ in events] == [("+", 2048), ("+", 2048), ("-", 2048)]


def test_softmax_backward_allocates_a_buffer_of_the_gradients_size_after_its_result(fake):
    grad, output = fake(8, 64), fake(8, 64)
    events = on(T4, lambda: torch.ops.aten._softmax_backward_data(grad, output, -1, torch.float32), grad, output)
    assert [(sign, nbytes) for sign, nbytes, _ in events] == [("+", 2048), ("+", 2048), ("-", 2048)]


def test_dropout_keeps_a_mask_of_one_byte_per_element(fake):
    x = fake(8, 64, dtype=torch.float16)
    events = on(T4, lambda: F.dropout(x, 0.1, training=True), x)
    assert ("+", 8 * 64) in [(sign, nbytes) for sign, nbytes, _ in events]


def test_dropout_with_probability_0_allocates_nothing(fake):
    x = fake(8, 64)
    assert on(T4, lambda: F.dropout(x, 0.0, training=True), x) == []


@pytest.mark.parametrize(("card", "workspace"), [(T4, 8_519_680), (HOPPER, 32 * MIB)])
def test_each_thread_allocates_one_workspace_at_its_first_matrix_product(fake, card, workspace):
    a, b = fake(4, 4).requires_grad_(), fake(4, 4)

    def run():
        (a @ b @ b).sum().backward()  # two products forward, two backward

    taken = [nbytes for sign, nbytes, op in on(card, run, a, b) if sign == "+" and op == "cublas"]
    assert taken == [workspace, workspace]


def test_gradients_of_a_tensor_used_twice_are_summed_in_place(fake):
    a = fake(64, 64).requires_grad_()

    def run():
        x = a * 1.0
        (x * 2.0 + x * 3.0).sum().backward()

    backward = [op for _, _, op in on(T4, run, a)]
    assert backward.count("aten::add.Tensor") == 2  # birth and death of the forward's own addition, and no other


def test_a_matrix_product_of_bitsandbytes_dequantizes_the_weight_for_many_rows(fake):
    a, packed, absmax = fake(2048, 256, dtype=torch.float16), fake(256 * 512 // 2, 1, dtype=torch.uint8), fake(2048)
    events = on(
        T4,
        lambda: torch.ops.bitsandbytes.gemm_4bit(a, packed, [512, 256], absmax, 64, "nf4"),
        a,
        packed,
        absmax,
    )
    sizes = [(sign, nbytes) for sign, nbytes, _ in events]
    # The weight is allocated before the product and freed after it.
    assert sizes == [("+", 512 * 256 * 2), ("+", 2048 * 512 * 2), ("-", 512 * 256 * 2)]


def test_a_matrix_product_of_bitsandbytes_is_fused_for_few_rows(fake):
    if quantized.fused_rule() is None:
        pytest.skip("this bitsandbytes has no fused 4-bit product")
    a, packed, absmax = fake(4, 256, dtype=torch.float16), fake(256 * 512 // 2, 1, dtype=torch.uint8), fake(2048)
    events = on(T4, lambda: torch.ops.bitsandbytes.gemm_4bit(a, packed, [512, 256], absmax, 64, "nf4"), a, packed)
    assert ("+", 512 * 256 * 2) not in [(sign, nbytes) for sign, nbytes, _ in events]


def test_an_int8_product_is_computed_in_int32(fake):
    a, weight = fake(32, 64, dtype=torch.int8), fake(128, 64, dtype=torch.int8)
    rows, columns = fake(32), fake(128)
    events = on(
        T4, lambda: torch.ops.bitsandbytes.int8_scaled_mm(a, weight, rows, columns, dtype=torch.float16), a, weight
    )
    assert ("+", 32 * 128 * 4) in [(sign, nbytes) for sign, nbytes, _ in events]


def kernel(card, dtype=torch.float16, size=64, mask=None, causal=True, heads=(8, 8), **kwargs):
    query, key = torch.empty(1, heads[0], 16, size, dtype=dtype), torch.empty(1, heads[1], 16, size, dtype=dtype)
    query.requires_grad_()
    return choose_kernel(card, query, key, key, mask, is_causal=causal, enable_gqa=heads[0] != heads[1], **kwargs)


@pytest.mark.parametrize("name", ["T4", "A100", "RTX 3090", "H100", "RTX 5090"])
def test_inputs_or_a_mask_with_a_strided_last_dimension_run_the_math_kernel(name):
    """`torch._fused_sdp_choice` of PyTorch 2.11's CUDA build gives the same. T5's position bias is such a mask."""
    card, dtype = find_card(name), torch.float16
    query, strided = torch.empty(2, 8, 64, 64, dtype=dtype), torch.empty(2, 8, 64, 64, dtype=dtype).transpose(-1, -2)
    bias = torch.empty(1, 64, 64, 8, dtype=dtype).permute(0, 3, 1, 2)
    assert choose_kernel(card, query, query, query, bias.contiguous()) != "math"
    assert choose_kernel(card, query, query, query, bias) == "math"
    assert choose_kernel(card, strided, query, query) == choose_kernel(card, query, query, strided) == "math"


def test_turing_has_no_flash_and_no_bfloat16_kernel():
    assert kernel(T4) == "efficient"
    assert kernel(T4, torch.bfloat16) == "math"
    assert kernel(T4, heads=(8, 2)) == "math"


def test_ampere_and_later_run_flash_unless_there_is_a_mask_or_float32():
    assert kernel(ADA, torch.bfloat16) == "flash"
    assert kernel(ADA, torch.bfloat16, heads=(8, 2)) == "flash"
    assert kernel(ADA, torch.float32) == "efficient"
    assert kernel(ADA, mask=torch.zeros(1, 1, 16, 16, dtype=torch.float16), causal=False) == "efficient"


def test_a_pytorch_built_without_flash_runs_the_next_kernel(fake):
    assert kernel(ADA, torch.bfloat16, built_with_flash=False) == "efficient"
    assert kernel(ADA, torch.bfloat16, heads=(8, 2), built_with_flash=False) == "math"
    query = fake(1, 4, 64, 32, dtype=torch.float16)

    def kernels(built):
        events, device = Log(), Cuda(ADA, built_with_flash=built)
        with device.running(), Trace(events, overlay=device.overlay()):
            F.scaled_dot_product_attention(query, query, query)
        return {op for _, _, op in events.events if "attention" in op}

    assert kernels(True) == {"aten::_scaled_dot_product_flash_attention"}
    assert kernels(False) == {"aten::_scaled_dot_product_efficient_attention"}


def test_heads_of_256_train_with_flash_on_consumer_cards_only_without_dropout():
    assert kernel(ADA, size=256) == "flash"
    assert kernel(ADA, size=256, dropout_p=0.1) == "efficient"
    assert kernel(find_card("A100"), size=256, dropout_p=0.1) == "flash"


def test_hopper_prefers_cudnn():
    assert kernel(HOPPER, torch.bfloat16) == "cudnn"


def test_cudnn_has_heads_of_256_on_hopper_alone():
    """As measured on an H200, with and without a mask; data-centre Blackwell by PyTorch's source."""
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    assert kernel(HOPPER, torch.bfloat16, size=256) == "cudnn"
    assert kernel(HOPPER, torch.bfloat16, size=256, mask=mask, causal=False, heads=(8, 2)) == "cudnn"
    assert kernel(HOPPER, torch.bfloat16, size=264) == "efficient"
    assert kernel(find_card("B200"), torch.bfloat16, size=256) == "flash"


def test_the_users_choice_of_kernels_is_respected():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert kernel(ADA) == "efficient"
        with pytest.raises(RuntimeError, match="No available kernel"):
            kernel(T4, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fused_attention_allocates_no_matrix_of_scores(fake, dtype):
    query = fake(1, 4, 512, 64, dtype=dtype).requires_grad_()
    scores = 4 * 512 * 512 * query.element_size()

    def run():
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    assert max(nbytes for _, nbytes, _ in on(ADA, run, query)) < scores


def test_dropout_inside_the_math_kernel_keeps_a_mask_of_one_byte_per_element(fake):
    """native/Dropout.cpp: fused on a card, also if called from C++; on a CPU the mask has the dtype of the scores."""
    query = fake(1, 4, 96, 64, dtype=torch.float16).requires_grad_()
    bias = fake(1, 96, 96, 4, dtype=torch.float16).permute(0, 3, 1, 2)  # strided, like T5's
    scores = 4 * 96 * 96

    def run(dropout):
        def attend():
            return F.scaled_dot_product_attention(query, query, query, bias, dropout_p=dropout)

        return [nbytes for sign, nbytes, _ in on(ADA, attend, query, bias) if sign == "+"]

    assert run(0.1).count(scores) == run(0.0).count(scores) + 1
    assert run(0.1).count(4 * scores) == run(0.0).count(4 * scores) + 1  # the scores after dropout, in float32


def test_attention_under_autocast_casts_its_inputs_to_16_bits(fake):
    """Rotary positions in float32, as in a model with float32 weights, make queries and keys float32 before attention."""
    query, value = fake(1, 4, 64, 32).requires_grad_(), fake(1, 4, 64, 32, dtype=torch.bfloat16)

    def run(card):
        def attend():
            with torch.autocast("cpu", torch.bfloat16):
                return F.scaled_dot_product_attention(query, query, value)

        return [(sign, nbytes, op.split(".")[0]) for sign, nbytes, op in on(card, attend, query, value)]

    half = 2 * query.numel()
    flash, math = run(ADA), run(find_card("T4"))
    assert flash[:2] == [("+", half, "aten::_to_copy")] * 2
    assert {op for _, _, op in flash[2:]} == {"aten::_scaled_dot_product_flash_attention"}
    scores = [op for sign, nbytes, op in math if sign == "+" and nbytes == 4 * 4 * 64 * 64]
    assert scores == ["aten::bmm", "aten::_safe_softmax"], "the scores are float32, and nothing inside is cast again"


@pytest.mark.parametrize("mask", ["causal", "bool", "additive", "learned", "none"])
def test_the_math_kernel_allocates_the_same_on_fake_and_on_real_tensors(fake, mask):
    """Compares births and deaths of blocks above 600 bytes in the forward pass with those that PyTorch's profiler records."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.profiler import ProfilerActivity, profile

    def attend(make):
        query = make(2, 4, 32, 16).requires_grad_()
        given = {"bool": torch.ones(2, 1, 32, 32, dtype=torch.bool), "additive": torch.zeros(2, 4, 32, 32)}.get(mask)
        given = make(1, 4, 32, 32).requires_grad_() if mask == "learned" else given
        more = {"attn_mask": given, "is_causal": mask == "causal"}
        return lambda: F.scaled_dot_product_attention(query, query, query, **more), [query, given]

    real, kept = attend(torch.zeros)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, sdpa_kernel(SDPBackend.MATH):
        result = real()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    real_sizes = [event.nbytes() for event in events if event.name() == "[memory]" and abs(event.nbytes()) > 600]
    del result
    shadow, kept = attend(fake)
    with sdpa_kernel(SDPBackend.MATH):
        events = on(ADA, shadow, *(tensor for tensor in kept if tensor is not None))
    sizes = [int(f"{sign}{nbytes}") for sign, nbytes, op in events if nbytes > 600 and op != "cublas"]
    assert sizes == real_sizes


def test_cudnn_keeps_a_mask_as_a_bias_of_16_bits(fake):
    query, mask = fake(2, 4, 64, 32, dtype=torch.bfloat16), torch.ones(2, 1, 64, 64, dtype=torch.bool)
    events = on(HOPPER, lambda: F.scaled_dot_product_attention(query, query, query, mask), query)
    assert kernel(HOPPER, torch.bfloat16, mask=mask, causal=False) == "cudnn"
    died = {nbytes for sign, nbytes, _ in events if sign == "-"}
    assert ("+", 2 * mask.numel()) in [event[:2] for event in events] and 2 * 4 * 64 * 64 * 2 not in died


@pytest.mark.parametrize(("version", "chosen"), [((2, 11), "cudnn"), ((2, 12), "flash")])
def test_cudnns_dropout_is_a_multiple_of_a_sixteenth_from_pytorch_2_12_on(version, chosen, monkeypatch):
    monkeypatch.setattr(attention, "_TORCH", version)
    assert kernel(HOPPER, torch.bfloat16, dropout_p=0.1) == chosen
    assert kernel(HOPPER, torch.bfloat16, dropout_p=0.125) == "cudnn"


@pytest.mark.parametrize("key_heads", [8, 2])
def test_cudnn_needs_for_a_mask_its_bias_in_both_passes(fake, key_heads):
    """As measured on an H200: 2 x 512 x 512 x 2 bytes, no matter how many key heads."""
    mask = torch.ones(2, 1, 512, 512, dtype=torch.bool)

    def peaks(**options):
        query, key, value = (
            fake(2, heads, 512, 64, dtype=torch.bfloat16).requires_grad_() for heads in (8, key_heads, key_heads)
        )
        device = Cuda(HOPPER)
        meter = device.meter()
        trace, found = Trace(meter, overlay=device.overlay()), []
        for tensor in (query, key, value, mask):
            trace.adopt(tensor, "inputs")
        before = meter.allocated
        with device.running(), trace:
            output = F.scaled_dot_product_attention(query, key, value, enable_gqa=key_heads != 8, **options)
            found.append(meter.take_peak() - before)
            output.backward(fake(2, 8, 512, 64, dtype=torch.bfloat16))
            found.append(meter.take_peak() - before)
        assert key.grad.shape == key.shape
        return found

    plain, masked = peaks(is_causal=True), peaks(attn_mask=mask)
    assert [b - a for a, b in zip(plain, masked, strict=True)] == 2 * [2 * 512 * 512 * 2]


@pytest.mark.parametrize(("card", "copied"), [(HOPPER, 0), (ADA, 1)])
def test_only_the_memory_efficient_kernel_pads_the_rows_of_a_mask(fake, card, copied):
    """The next multiple of 16 elements, with the row's end cut off again; cuDNN on an H200 kept no copy of T5's bias."""
    query, key = (fake(2, 4, length, 32, dtype=torch.float16).requires_grad_() for length in (64, 65))
    bias = fake(2, 4, 64, 65, dtype=torch.float16)
    events = on(card, lambda: F.scaled_dot_product_attention(query, key, key, bias), query, key, bias)
    assert [nbytes for sign, nbytes, _ in events if sign == "+"].count(2 * 4 * 64 * 80 * 2) == copied


def test_cudnn_does_not_run_with_a_learned_bias():
    bias = torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    assert kernel(HOPPER, torch.bfloat16, mask=bias, causal=False) == "efficient"


@pytest.mark.parametrize(("dtype", "sizes"), [(None, [4, 4]), (torch.bfloat16, [2])])
def test_softmax_under_autocast_is_float32_unless_a_dtype_is_given(fake, dtype, sizes):
    x = fake(8, 64, dtype=torch.bfloat16)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return F.softmax(x, dim=-1, dtype=dtype)

    assert [nbytes for sign, nbytes, _ in on(ADA, run, x) if sign == "+"] == [8 * 64 * size for size in sizes]


def test_cross_entropy_of_16_bit_logits_under_autocast_keeps_log_probabilities_in_16_and_32_bits(fake):
    """T5 and BART do not convert their logits to float32."""
    logits, labels = fake(8, 64, dtype=torch.bfloat16).requires_grad_(), torch.zeros(8, dtype=torch.long)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(logits, labels, ignore_index=-100)

    events = on(ADA, run, logits)
    assert [nbytes for sign, nbytes, _ in events if sign == "+" and nbytes > 64] == [2 * 8 * 64, 4 * 8 * 64]
    assert not [nbytes for sign, nbytes, _ in events if sign == "-" and nbytes > 64], (
        "both are kept for the backward pass"
    )


def test_is_autocast_enabled_without_a_device_refers_to_the_card():
    """peft/tuners/lora/bnb.py casts its inputs if autocast is not enabled."""
    with torch.autocast("cpu", torch.bfloat16):
        before = torch.is_autocast_enabled()
        with Cuda(ADA).running():
            assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cpu") and not before
            with torch.autocast("cpu", enabled=False):
                assert not torch.is_autocast_enabled()
        assert not torch.is_autocast_enabled()


def test_replaced_functions_are_restored():
    before = (F.softmax, F.dropout, F.scaled_dot_product_attention, F.layer_norm)
    with Cuda(T4).running():
        assert before[0] is not F.softmax
    assert before == (F.softmax, F.dropout, F.scaled_dot_product_attention, F.layer_norm)


def test_replaced_functions_give_the_same_results_for_real_tensors():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with Cuda(T4).running():
        replaced = F.softmax(x, -1), F.dropout(x, 0.0), F.layer_norm(x, (8,))
    plain = F.softmax(x, -1), F.dropout(x, 0.0), F.layer_norm(x, (8,))
    assert all(torch.equal(a, b) for a, b in zip(replaced, plain, strict=True))


def test_a_meta_kernel_gives_the_same_fake_tensor_as_the_fake_mode(fake):
    a, b, b_fake = fake(3, 4, dtype=torch.float16), torch.ones(3, 4), fake(3, 4)
    for op, args in (
        (torch.ops.aten.mul.Tensor, (a, b)),
        (torch.ops.aten.cat.default, ([a, a], 1)),
        (torch.ops.aten.native_layer_norm.default, (b_fake, [4], None, None, 1e-5)),
        (torch.ops.aten.t.default, (a,)),
    ):
        quick, slow = meta_ops.run(op, args, {}), op(*args)
        for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (quick, slow)), strict=True):
            assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
    assert meta_ops.run(torch.ops.aten.t.default, (a,), {}).untyped_storage()._cdata == a.untyped_storage()._cdata


def test_moving_a_model_reserves_a_segment_for_each_large_weight_in_the_order_of_its_modules(fake):
    model = torch.nn.Sequential(torch.nn.Linear(2048, 8192, bias=False), torch.nn.Linear(8192, 2048, bias=False))
    meter = AllocatorMeter()
    with torch.device("meta"):
        model = model.to("meta")
    for layer in model:
        layer.weight = torch.nn.Parameter(fake(*layer.weight.shape), requires_grad=False)
    loading.replay(Trace(meter), model, meter.empty_cache)
    assert (meter.allocated, meter.reserved) == (2 * 64 * MIB, 2 * 64 * MIB)


def test_loading_a_quantized_model_warms_up_stages_and_casts(fake):
    state = SimpleNamespace(
        shape=(4096, 4096), nested=False, absmax=fake(4096 * 64), code=fake(16), offset=None, state2=None
    )
    model = torch.nn.Module()
    model.config = SimpleNamespace(dtype=torch.float16)
    model.layer = torch.nn.Linear(1, 1, bias=False)
    weight = torch.nn.Parameter(fake(4096 * 2048, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = state
    model.layer.weight = weight
    model.norm = torch.nn.Linear(1, 1, bias=False)
    model.norm.weight = torch.nn.Parameter(fake(1024, 4096), requires_grad=False)  # cast to float32
    meter = AllocatorMeter()
    loading.replay(Trace(meter), model, meter.empty_cache)
    # Warm-up: 4096**2 / 2 + 2 x 1024 x 4096 bytes = 16 MiB, filled by the packed weight and the norm (8 MiB each). The
    # staged weight needs a segment of 32 MiB, which later holds the cast copy (16 MiB); the block maxima need one of 2 MiB.
    assert (meter.peak_reserved, meter.reserved) == (50 * MIB, 50 * MIB)
    assert meter.allocated == 8 * MIB + 1 * MIB + 512 + 16 * MIB


def test_a_paged_optimizers_large_state_is_outside_the_allocator(tmp_path):
    """bitsandbytes pages state of 100,000 elements or more; measured on an H200: nothing of it is in the allocator."""
    model = torch.nn.Linear(400, 400)
    predicted = {}
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        optim = bnb.optim.AdamW8bit if name == "adamw_8bit" else bnb.optim.PagedAdamW8bit
        trainer = SimpleNamespace(optimizer=None)

        def create_optimizer(optim=optim, trainer=trainer):
            trainer.optimizer = optim(model.parameters(), lr=1e-3)
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer
        Cuda(ADA).prepare(trainer)
        optimizer = trainer.create_optimizer()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        trace = Trace(Log())
        census.label_optimizer_state(trace, optimizer)
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        predicted[name] = sum(t.nbytes for t in tensors if (block := trace.block_of(t)) is not None and block.offloaded)
        assert predicted[name] == census.paged_bytes(optimizer)
    assert predicted == {"adamw_8bit": 0, "paged_adamw_8bit": 2 * 400 * 400}


def test_the_allocator_setting_is_read_from_the_environment(monkeypatch):
    card = find_card("RTX 3090")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert not Cuda(card).expandable_segments
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    assert Cuda(card).expandable_segments and Cuda(card).meter().expandable
    assert not Cuda(card, expandable_segments=False).expandable_segments


def test_a_full_card_gives_its_cache_back_before_a_run_fails(tmp_path):
    """PyTorch's allocator frees its cached segments when the device is full, and only then gives up."""
    LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=8000
    ).save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--max_length", "256", "--per_device_train_batch_size", "4"]
    flags += ["--loss_chunk_tokens", "0"]  # large logits leave a large cache

    def predicted(budget):
        card = generic_card(f"{budget}B")
        return predict_run(parse_config(Full, flags, card), Cuda(card))

    free = predicted(10**12)
    assert free.reserved_bytes > free.allocated_bytes + (4 << 20)
    tight = predicted(free.reserved_bytes - (2 << 20))
    assert tight.fits and tight.reserved_bytes < free.reserved_bytes and "gives its cache back" in " ".join(tight.notes)
    assert tight.allocated_bytes == free.allocated_bytes
    none = predicted(free.allocated_bytes - 1)
    assert not none.fits and none.reserved_bytes == free.reserved_bytes

"""FlashAttention's stand-ins allocate what the packages' sources say, and transformers' own code around them runs."""

import pytest
import torch
from test_cuda import Log
from tiny_models import save_with_tokenizer, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from toolkit.config import parse_config
from toolkit.errors import UserError
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.cuda.flash import Kernel
from toolkit.memory.shadow.fake import fake_like
from toolkit.memory.shadow.step import CPU
from toolkit.memory.trace import Trace
from toolkit.methods.full import Full
from toolkit.methods.lora import Lora
from toolkit.methods.prefix_tuning import PrefixTuning
from toolkit.runs.prediction import predict_run
from toolkit.runs.preflight import prepare

A100, ADA, HOPPER, BLACKWELL, T4 = map(find_card, ("A100 80GB", "4090", "H100", "5090", "T4"))
BF16 = torch.bfloat16


def bytes_of(card, version, rows=2, tokens=100, heads=4, key_heads=2, size=64, dtype=BF16, **options):
    """The bytes of each block that attention allocates on `card`: forward, and backward without the gradient of the output."""
    mode, log, device = FakeTensorMode(allow_non_fake_inputs=True), Log(), Cuda(card)

    def of(number):
        return fake_like(mode, torch.empty((rows, tokens, number, size), dtype=dtype, device="meta")).requires_grad_()

    given = of(heads), of(key_heads), of(key_heads)
    grad = of(heads).detach()
    trace = Trace(log, overlay=device.overlay())
    for tensor in (*given, grad):
        trace.adopt(tensor, "inputs")
    log.events.clear()
    options = {"attention_mask": None, "query_length": tokens, "is_causal": True} | options
    with device.running(), trace:
        output = _flash_attention_forward(*given, attn_implementation=f"flash_attention_{version}", **options)
        forward = len(log.events)
        output.backward(grad)
    taken = [
        [nbytes for sign, nbytes, _ in some if sign == "+"] for some in (log.events[:forward], log.events[forward:])
    ]
    trace.close()
    return taken


Q, K = 2 * 100 * 4 * 64 * 2, 2 * 100 * 2 * 64 * 2  # the bytes of queries and of keys above
LSE = 4 * 2 * 4 * 100  # row sums in float32


@pytest.mark.parametrize(
    ("more", "hidden"),
    [
        # 100 queries become 128: row sums, queries' gradient in float32, gradients of keys and values for each query head
        ({}, [4 * 2 * 4 * 128, 4 * 2 * 128 * 4 * 64, Q, Q]),
        ({"key_heads": 4}, [4 * 2 * 4 * 128, 4 * 2 * 128 * 4 * 64]),
        # one copy of the gradient for each of ceil(108 multiprocessors / 8 heads)
        ({"deterministic": True}, [4 * 2 * 4 * 128, 14 * 4 * 2 * 128 * 4 * 64, Q, Q]),
    ],
)
def test_flash_attention_2_keeps_and_takes_what_its_source_says(more, hidden):
    forward, backward = bytes_of(A100, 2, **more)
    keys = Q if "key_heads" in more else K
    assert forward == [Q, LSE, 16]
    assert backward == [Q, keys, keys, *hidden]


@pytest.mark.parametrize(
    ("size", "padded", "rounded"), [(80, 80, 96), (100, 104, 128), (160, 160, 192), (256, 256, 256)]
)
def test_flash_attention_2_rounds_the_size_of_a_head(size, padded, rounded):
    forward, backward = bytes_of(A100, 2, rows=1, tokens=128, heads=2, key_heads=2, size=size)
    each = 128 * 2 * padded * 2
    assert forward == ([each] * 3 if padded > size else []) + [each, 4 * 2 * 128, 16]
    expected = [*[each] * 3, *([each] if padded > size else []), 4 * 2 * 128, 4 * 128 * 2 * rounded]
    assert backward[: len(expected)] == expected  # where padded, the gradients of this test's inputs are copies


# rounded queries and keys, by the tiles of each architecture; the semaphore has a number for each tile of queries
@pytest.mark.parametrize(
    ("card", "size", "queries", "keys"),
    [(HOPPER, 64, 128, 128), (HOPPER, 128, 64, 128), (A100, 192, 64, 80), (ADA, 128, 64, 96)],
)
def test_flash_attention_3_keeps_and_takes_what_its_source_says(card, size, queries, keys):
    forward, backward = bytes_of(card, 3, size=size)
    q, k = Q * size // 64, K * size // 64
    rounded, rounded_keys = -(-100 // queries) * queries, -(-100 // keys) * keys
    sums, summed = 4 * 2 * 4 * rounded, 4 * 2 * 2 * rounded_keys * size
    assert forward == [q, LSE]
    assert backward == [q, k, k, sums, sums, sums * size, summed, summed, 4 * (rounded // queries) * 2 * 4]


def test_the_largest_tiles_of_flash_attention_3_need_neither_a_mask_nor_a_window():
    assert Kernel(HOPPER, 3, False, False, 0.0, False, 1)._tiles_3(128) == (80, 128)
    assert Kernel(HOPPER, 3, False, True, 0.0, False, 1)._tiles_3(128) == (64, 128)
    assert Kernel(HOPPER, 3, True, False, 30.0, False, 1)._tiles_3(64) == (96, 128)


@pytest.mark.parametrize("version", [2, 3])
def test_padding_is_taken_out_of_the_rows_and_put_back(version):
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, 40:] = False  # 140 of 200 tokens are left
    forward, backward = bytes_of(HOPPER, version, attention_mask=mask)
    q = 140 * 4 * 64 * 2
    assert forward.count(q) == 2 and forward.count(q // 2) == 2  # the queries and the output; keys and values
    assert 4 * 4 * 140 in forward and forward[-1] == Q  # the result, padded
    tokens = {2: 140 + 2 * 128, 3: -(-(140 + 2 * 128) // 128) * 128}[version]
    assert 4 * tokens * 4 * 64 in backward


def test_rows_laid_end_to_end_are_found_by_their_positions():
    positions = torch.cat([torch.arange(60), torch.arange(40)])[None]
    whole = bytes_of(A100, 2, rows=1)
    packed = bytes_of(A100, 2, rows=1, position_ids=positions)
    assert 4 * 128 * 4 * 64 in whole[1] and 4 * (100 + 2 * 128) * 4 * 64 in packed[1]


def test_float32_from_peft_is_cast_before_the_kernel():
    forward, _ = bytes_of(A100, 2, dtype=torch.float32, target_dtype=BF16)
    assert forward == [Q, K, K, Q, LSE, 16]


@pytest.mark.parametrize(
    ("card", "version", "more", "says"),
    [
        (T4, 2, {}, "FlashAttention 2 needs a card of compute capability 8.0 or later, and T4 has 7.5"),
        (BLACKWELL, 3, {}, "FlashAttention 3 has no kernels for compute capability 12.0 .*; give flash_attention_2"),
        (
            A100,
            2,
            {"dtype": torch.float32},
            "FlashAttention 2 computes in 16 bits, and this run in float32; add --bf16",
        ),
        (A100, 2, {"size": 264}, "FlashAttention 2 has no kernel for heads of 264 numbers"),
        (HOPPER, 3, {"size": 100}, "FlashAttention 3 has no kernel for heads of 100 numbers"),
    ],
)
def test_what_has_no_kernel_is_refused(card, version, more, says):
    with pytest.raises(UserError, match=says):
        bytes_of(card, version, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama, with heads of 64 and one key head for two."""
    config = tiny_config("llama")
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 128, 2, 1
    return str(save_with_tokenizer(config, tmp_path_factory.mktemp("llama")))


def predicted(folder, card, *flags, method=Lora):
    argv = ["--model_name_or_path", folder, "--per_device_train_batch_size", "1", "--max_length", "128", *flags]
    return predict_run(parse_config(method, argv, card), CPU if card is None else Cuda(card))


def test_flash_attention_2_takes_as_much_as_pytorchs_own_copy_of_it(folder):
    """One row, so that there is no mask, and SDPA runs the flash kernel on this card."""
    own = predicted(folder, A100, "--attn_implementation", "sdpa").phases
    package = predicted(folder, A100, "--attn_implementation", "flash_attention_2").phases
    for phase, use in own.items():
        # for each layer PyTorch's copy keeps a second block of at most 512 bytes, an empty seed
        assert abs(use.allocated_peak_bytes - package[phase].allocated_peak_bytes) <= 2 * 512, phase


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("kernels-community/flash-attn2", "flash_attention_2"),
        ("kernels-community/flash-attn3", "flash_attention_3"),
        ("kernels-community/vllm-flash-attn3", "flash_attention_3"),
    ],
)
def test_kernels_of_the_hub_are_predicted_as_the_version_that_they_are(name, same, folder):
    batch = ("--per_device_train_batch_size", "3")  # two rows end in padding
    one, other = (predicted(folder, HOPPER, *batch, "--attn_implementation", which) for which in (name, same))
    assert one.phases == other.phases and one.reserved_bytes == other.reserved_bytes


@pytest.mark.parametrize("method", [Full, Lora])
def test_a_step_with_padding_checkpointing_and_autocast_is_predicted(method, folder):
    flags = ("--per_device_train_batch_size", "4", "--activation_checkpointing", "--attn_implementation")
    eager, flash = (predicted(folder, ADA, *flags, name, method=method) for name in ("eager", "flash_attention_2"))
    assert flash.phases["backward"].allocated_peak_bytes < eager.phases["backward"].allocated_peak_bytes


@pytest.mark.parametrize(
    ("card", "flags", "says"),
    [
        (
            None,
            (),
            "--attn_implementation flash_attention_2 needs a GPU; leave it out, or predict for a card: --gpu NAME",
        ),
        (T4, (), "needs a card of compute capability 8.0 or later"),
        (A100, ("--bf16", "false"), "this run in float32; add --bf16"),
    ],
)
def test_runs_that_flash_attention_cannot_compute_are_refused(card, flags, says, folder):
    with pytest.raises(UserError, match=says):
        predicted(folder, card, "--attn_implementation", "flash_attention_2", *flags)


def test_models_without_flash_attention_are_refused(tmp_path):
    folder = str(save_with_tokenizer(tiny_config("t5"), tmp_path))
    with pytest.raises(
        UserError, match="--attn_implementation flash_attention_2: transformers has no FlashAttention for t5 models"
    ):
        predicted(folder, A100, "--attn_implementation", "flash_attention_2")


def test_a_model_with_kernels_of_its_own_names_them(monkeypatch, folder):
    own = ["kernels-community/vllm-flash-attn3"]
    monkeypatch.setattr("transformers.LlamaPreTrainedModel._compatible_flash_implementations", own)
    with pytest.raises(UserError, match="llama models only run with kernels-community/vllm-flash-attn3"):
        predicted(folder, HOPPER, "--attn_implementation", "flash_attention_2")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flash_attention_2", "with --attn_implementation flash_attention_2"),
        ("kernels-community/flash-attn2", "a kernel of the hub is code from outside"),
    ],
)
def test_a_run_without_the_package_is_refused_before_a_model_is_loaded(name, says, folder, monkeypatch):
    monkeypatch.setattr("toolkit.runs.preflight.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=says):
        prepare(parse_config(Lora, ["--model_name_or_path", folder, "--attn_implementation", name]))


def test_prefix_tuning_finds_the_shape_of_its_keys_without_the_package(folder):
    assert predicted(folder, A100, "--attn_implementation", "flash_attention_2", method=PrefixTuning).phases

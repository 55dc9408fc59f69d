"""The rules of CUDA's autocast, applied on a CPU."""

import re
from pathlib import Path

import torch
from transformers.activations import ACT2FN

from toolkit.memory.cuda.autocast import FP32, FP32_RESULT, cuda_autocast

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


def listed(name):
    """The operators in one of PyTorch's own lists, as `operator.overload`."""
    (body,) = re.findall(rf"#define {name}\(_\)((?:.*\\\n)+.*)\n", HEADER.read_text())
    return {entry.replace(", ", ".") for entry in re.findall(r"_\(([\w, ]+)\)", body)}


def test_the_lists_are_those_of_the_installed_pytorch():
    has_rule = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {name for name in FP32 if has_rule(f"aten::{name}", "AutocastCUDA")} == listed("AT_FORALL_FP32")
    assert "scaled_dot_product_attention" in listed("AT_FORALL_LOWER_PRECISION_FP")  # `in_lower_precision` runs it
    results = {name for name in listed("AT_FORALL_FP32_SET_OPT_DTYPE") if "dimname" not in name.lower()}  # as of 2.11
    others = {"softmax.int", "log_softmax.int", *(name for name in results if "norm" in name)}
    assert set(FP32_RESULT) == results - others


def test_gelu_new_returns_float32_as_on_a_gpu_but_only_inside_the_context():
    x, gelu = torch.ones(2, 3, dtype=torch.bfloat16), ACT2FN["gelu_new"]
    with torch.autocast("cpu", torch.bfloat16):
        assert gelu(x).dtype == torch.bfloat16
        with cuda_autocast():
            assert gelu(x).dtype == (x**2).dtype == x.sum().dtype == torch.float32
            assert x.sum(dtype=torch.bfloat16).dtype == torch.bfloat16
            assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                assert gelu(x).dtype == torch.bfloat16
        assert gelu(x).dtype == torch.bfloat16


def test_rms_norm_is_float32_only_if_the_installed_pytorch_lists_it():
    """PyTorch 2.13 lists it, 2.11 does not."""
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    expected = torch.float32 if "rms_norm" in listed("AT_FORALL_FP32") else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), cuda_autocast():
        assert torch.nn.functional.rms_norm(x, (3,)).dtype == expected

"""Seams into PyTorch for what a card does differently from a CPU: functions that are replaced, and rules copied from its C++ code."""

from __future__ import annotations

import re
import sys
from typing import Any

from toolkit.seams.seam import Seam, ours, text_of

# Replaced while a shadow step runs.
FUNCTIONS = (
    Seam(
        name="F.softmax",
        kind="patch",
        where="memory.cuda.device",
        target="torch.nn.functional: softmax",
        signature=("input", "dim", "_stacklevel", "dtype"),
        reason="on CUDA float16 becomes float32 inside the kernel, and autocast computes it in float32",
        breaks="the scores of eager attention are counted twice, or in 16 bits",
        silent=True,
    ),
    Seam(
        name="F.log_softmax",
        kind="patch",
        where="memory.cuda.device",
        target="torch.nn.functional: log_softmax",
        signature=("input", "dim", "_stacklevel", "dtype"),
        reason="CUDA's autocast computes it in float32",
        breaks="the loss is counted in 16 bits",
        silent=True,
    ),
    Seam(
        name="F.cross_entropy",
        kind="patch",
        where="memory.cuda.device",
        target="torch.nn.functional: cross_entropy",
        signature=(
            "input",
            "target",
            "weight",
            "size_average",
            "ignore_index",
            "reduce",
            "reduction",
            "label_smoothing",
        ),
        reason="under autocast its log_softmax keeps the input's dtype, and nll_loss is computed in float32",
        breaks="logits are counted in another width",
        silent=True,
    ),
    Seam(
        name="F.dropout",
        kind="patch",
        where="memory.cuda.device",
        target="torch.nn.functional: dropout",
        signature=("input", "p", "training", "inplace"),
        reason="on CUDA it is one operator with a bool mask; on a CPU the mask has the activation's dtype",
        breaks="each dropout keeps two to four times as much",
        silent=True,
    ),
    Seam(
        name="F.scaled_dot_product_attention",
        kind="patch",
        where=("memory.cuda.device", "benchmarks.third_party"),
        target="torch.nn.functional: scaled_dot_product_attention",
        reason="which kernel runs, and so whether scores are ever in memory, depends on the card",
        breaks="attention is predicted as on a CPU: the largest error that a prediction can make",
        silent=True,
        probe=lambda: _attention_takes_other_parameters(),
    ),
    Seam(
        name="lazy_import_flash_attention",
        kind="patch",
        where="memory.cuda.flash",
        target="transformers.modeling_flash_attention_utils: lazy_import_flash_attention",
        signature=("implementation", "attention_wrapper", "allow_all_kernels"),
        source=(
            ("transformers.modeling_flash_attention_utils", r"lazy_import_flash_attention\(\s*attn_implementation"),
        ),
        reason="the functions of FlashAttention compute only on a GPU; stand-ins allocate what they do",
        breaks="predictions with FlashAttention end with an error",
        probe=lambda: _flash_attention_returns_another_tuple(),
    ),
    Seam(
        name="what surrounds FlashAttention",
        kind="private",
        where="memory.cuda.flash",
        target="transformers.modeling_flash_attention_utils: _lazy_define_process_function _pad_input _unpad_input",
        source=(
            (
                "transformers.modeling_flash_attention_utils",
                r"_process_with_kvcache_kwargs_fn|_process_flash_kwargs_fn",
            ),
        ),
        reason="the stand-ins are called as transformers calls the package's functions, between its own unpadding and padding",
        breaks="predictions with FlashAttention end with an error",
    ),
    Seam(
        name="buffers of FlashAttention",
        kind="constant",
        where="memory.cuda.flash",
        library="flash_attn",
        reason="what flash_api.cpp of FlashAttention 2 and 3 allocates, and what their autograd functions keep",
        breaks="attention is predicted too small or too large",
        silent=True,
        checked_by="tests/memory/test_flash.py",
    ),
    Seam(
        name="is_liger_kernel_available",
        kind="patch",
        where="memory.cuda.liger",
        target="transformers.integrations.liger: is_liger_kernel_available",
        source=(
            ("transformers.integrations.liger", r"import _apply_liger_kernel_to_instance"),
            (
                "transformers.integrations.liger",
                r"_apply_liger_kernel_to_instance\(model=base_model, \*\*kernel_config\)",
            ),
        ),
        reason="--use_liger_kernel is predicted without Liger, by stand-ins of its name",
        breaks="predictions with --use_liger_kernel end with transformers' error that Liger is missing",
    ),
    Seam(
        name="apply_rotary_pos_emb",
        kind="patch",
        where="memory.cuda.liger",
        target="transformers.models.llama.modeling_llama: apply_rotary_pos_emb",
        signature=("q", "k", "cos", "sin", "unsqueeze_dim"),
        reason="Liger replaces the rotary embeddings of a model's module",
        breaks="predictions with --use_liger_kernel end with an error",
    ),
    Seam(
        name="kernels of Liger",
        kind="constant",
        where="memory.cuda.liger",
        library="liger_kernel",
        source=(
            ("liger_kernel/ops/rms_norm.py", r"ctx\.save_for_backward\(X, W, RSTD\)"),
            ("liger_kernel/ops/swiglu.py", r"ctx\.save_for_backward\(a, b\)"),
            ("liger_kernel/ops/geglu.py", r"ctx\.save_for_backward\(a, b\)"),
            ("liger_kernel/ops/rope.py", r"ctx\.save_for_backward\(cos, sin\)"),
        ),
        reason="what Liger's functions keep and allocate, and which modules of which models they replace",
        breaks="memory with --use_liger_kernel is predicted too small or too large",
        silent=True,
        checked_by="tests/memory/test_liger.py",
    ),
    Seam(
        name="aten::dropout",
        kind="patch",
        where="memory.cuda.device",
        target=("torch.ops.aten: dropout native_dropout", "torch.library: Library Library.impl Library._destroy"),
        signature=None,
        reason="the math kernel for attention calls dropout from C++, where no Python function can be replaced",
        breaks="its mask is counted in the scores' dtype",
        silent=True,
        checked_by="tests/memory/test_cuda.py",
    ),
    Seam(
        name="torch.is_autocast_enabled",
        kind="patch",
        where="memory.cuda.autocast",
        target="torch: is_autocast_enabled",
        source=(("peft/tuners/lora/bnb.py", r"not torch\.is_autocast_enabled\(\)"),),
        reason="a call without a device means CUDA",
        breaks="PEFT's quantized layers do not cast under autocast",
        silent=True,
    ),
    Seam(
        name="operators of CUDA's autocast",
        kind="constant",
        where="memory.cuda.autocast",
        target=(
            "torch._C: _dispatch_has_kernel_for_dispatch_key _ExcludeDispatchKeyGuard DispatchKeySet DispatchKey.AutocastCPU",
            "torch.library: Library Library.impl Library._destroy",
        ),
        reason="the lists AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE of ATen/autocast_mode.h",
        breaks="an operator is computed in 16 bits that a card computes in float32",
        silent=True,
        probe=lambda: _autocast_lists_differ(),
    ),
)

RULES = (
    Seam(
        name="attention's operators",
        kind="private",
        where="memory.cuda.attention",
        target=(
            "torch.ops.aten: _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
            "_scaled_dot_product_attention_math"
        ),
        signature=("query", "key", "value"),
        reason="the chosen kernel's own operator shows what it keeps",
        breaks="predictions of a card end with an error",
    ),
    Seam(
        name="choice of attention's kernel",
        kind="constant",
        where="memory.cuda.attention",
        target="torch.backends.cuda: is_flash_attention_available flash_sdp_enabled mem_efficient_sdp_enabled math_sdp_enabled "
        "cudnn_sdp_enabled",
        reason="the rules of sdp_utils.cpp, which no build shows in Python",
        breaks="a kernel is predicted that the card does not run",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="hidden buffers: softmax backward",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: _softmax_backward_data",
        signature=("grad_output",),
        reason="native/cuda/SoftMax.cu takes a product as large as the gradient",
        breaks="the backward pass of eager attention is predicted too small",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="hidden buffers: safe softmax",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: _safe_softmax",
        signature=("self", "dim"),
        reason="native/transformers/attention.cpp takes masks of the scores",
        breaks="the math kernel for attention is predicted too small",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="hidden buffers: singular values",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: _linalg_svd",
        signature=("A", "full_matrices"),
        reason="BatchLinearAlgebraLib.cpp copies the matrix for cuSOLVER",
        breaks="the steps in which GaLore finds its projection are predicted too small",
        silent=True,
        checked_by="tests/memory/test_low_rank_optimizers.py",
    ),
    Seam(
        name="hidden buffers: attention backward",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: _scaled_dot_product_flash_attention_backward",
        signature=("grad_out", "query", "key"),
        reason="flash_api.cpp sums the query's gradient in float32",
        breaks="the backward pass of attention is predicted too small",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="hidden buffers: memory-efficient attention backward",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: _scaled_dot_product_efficient_attention_backward",
        signature=("grad_out_", "query"),
        reason="attention_backward.cu sums the query's gradient in float32",
        breaks="the backward pass of attention is predicted too small",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="hidden buffers: embedding backward",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: embedding_dense_backward",
        signature=("grad_output", "indices"),
        reason="native/cuda/Embedding.cu sorts more than 3,072 indices",
        breaks="the backward pass of an embedding is predicted too small",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="foreach by default",
        kind="constant",
        where="memory.cuda.device",
        target="torch.optim: AdamW Optimizer.param_groups",
        reason="a parameter group without these settings has foreach None, and fused None or False",
        breaks="the optimizer step is predicted without foreach's temporaries",
        silent=True,
        probe=lambda: _foreach_is_not_none(),
    ),
    Seam(
        name="rules of the caching allocator",
        kind="constant",
        where="memory.cuda.allocator",
        source=(
            ("torch/include/c10/core/AllocatorConfig.h", r"kSmallBuffer = 2097152;"),
            ("torch/include/c10/core/AllocatorConfig.h", r"kMinBlockSize = 512;"),
            ("torch/include/c10/core/AllocatorConfig.h", r"kSmallSize = 1048576;"),
            ("torch/include/c10/core/AllocatorConfig.h", r"kMinLargeAlloc = 10485760;"),
            ("torch/include/c10/core/AllocatorConfig.h", r"kRoundLarge = 2097152;"),
            ("torch/include/c10/core/AllocatorConfig.h", r"large_segment_size_\{20971520\};"),
        ),
        reason="sizes and rules of CUDACachingAllocator.cpp",
        breaks="what is reserved is predicted wrongly",
        silent=True,
        checked_by="benchmarks/on_gpu/memory.py",
    ),
)

SUMS_IN_PLACE = (
    Seam(
        name="who sums gradients",
        kind="constant",
        where="memory.cuda.gradient_sums",
        target="torch.autograd.graph: _engine_run_backward",
        reason="an addition called from this Python function, with only `torch._ops` between them, is the engine's own, and "
        "in place if nothing else refers to the first gradient",
        breaks="sums of gradients are counted out of place: peaks are predicted too high",
        silent=True,
        probe=lambda: _engine_calls_otherwise(),
        checked_by="tests/memory/test_gradient_sums.py",
    ),
    Seam(
        name="mask of the math kernel",
        kind="constant",
        where="memory.cuda.device",
        target="torch.ops.aten: _scaled_dot_product_attention_math add.Tensor",
        reason="the math kernel adds the mask to the scores with this operator, called from C++; on a card it is in place",
        breaks="one more matrix of scores is predicted",
        silent=True,
        probe=lambda: _mask_is_added_otherwise(),
    ),
    Seam(
        name="holders of a tensor",
        kind="private",
        where="memory.cuda.gradient_sums",
        target="torch: Tensor._use_count _C._storage_Use_Count",
        reason="whether the engine can sum in place (torch/csrc/autograd/input_buffer.cpp); a backward pass finds the counts",
        breaks="predictions of a card end with an AttributeError",
        checked_by="tests/memory/test_gradient_sums.py",
    ),
    Seam(
        name="sys._getframe",
        kind="private",
        where="memory.cuda.gradient_sums",
        target="sys: _getframe",
        library="python",
        reason="the Python code that called an operator",
        breaks="predictions of a card end with an AttributeError",
    ),
)

TABLE = (*FUNCTIONS, *RULES, *SUMS_IN_PLACE)

# Operators of AT_FORALL_FP32_SET_OPT_DTYPE that are left out: softmax is replaced in Python, the norms keep their input's size.
LEFT_OUT_OF_AUTOCAST = {"softmax.int", "log_softmax.int", "linalg_vector_norm", "linalg_matrix_norm"}
LEFT_OUT_OF_AUTOCAST |= {"linalg_matrix_norm.str_ord"}


def _autocast_lists_differ() -> str | None:
    header = text_of("torch/include/ATen/autocast_mode.h")
    if header is None:
        return "torch/include/ATen/autocast_mode.h is gone"
    fp32, fp32_result = ours("memory.cuda.autocast:FP32"), ours("memory.cuda.autocast:FP32_RESULT")
    found = []
    for macro, own, known in (
        ("AT_FORALL_FP32", {*fp32}, set()),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", {*fp32_result}, LEFT_OUT_OF_AUTOCAST),
    ):
        body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", header)
        if body is None:
            return f"autocast_mode.h has no {macro} any more"
        entries = {re.sub(r",\s*", ".", entry) for entry in re.findall(r"_\(([^)]*)\)", body[1])}
        theirs = {
            entry for entry in entries if "dimname" not in entry.lower()
        }  # named tensors, which PyTorch 2.11 still has
        if new := theirs - own - known:
            found.append(f"{macro} also has {', '.join(sorted(new))}")
        if gone := own - theirs - {"rms_norm"}:  # PyTorch 2.11 has none
            found.append(f"{macro} has no {', '.join(sorted(gone))}")
    return "; ".join(found) or None


def _flash_attention_returns_another_tuple() -> str | None:
    from inspect import getsource

    from transformers import modeling_flash_attention_utils as flash_utils

    both = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")
    last = "(_process_flash_kwargs_fn, _process_with_kvcache_kwargs_fn)" if both else "_process_flash_kwargs_fn"
    returned = f"(_flash_fn, _flash_varlen_fn, _flash_with_kvcache_fn, _pad_fn, _unpad_fn), {last}"
    text = " ".join(getsource(flash_utils.lazy_import_flash_attention).split())
    is_same = returned.replace(" ", "") in text.replace(" ", "").replace(",)", ")")
    return None if is_same else "lazy_import_flash_attention returns another tuple"


def _attention_takes_other_parameters() -> str | None:
    import inspect

    import torch

    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    theirs = [argument.name for argument in schema.arguments]
    stand_in = ours("memory.cuda.attention:attention_on")(ours("memory.cuda.cards:find_card")("T4"))
    names = [*inspect.signature(stand_in).parameters]
    return None if theirs == names else f"scaled_dot_product_attention takes {theirs}, and ours {names}"


def _engine_calls_otherwise() -> str | None:
    """The nearest Python code above an addition of the engine, without the dispatch of operators."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[str] = []

    class Look(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # as in Trace

        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if op is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
                frame: Any = sys._getframe(1)
                while frame.f_globals.get("__name__") == "torch._ops":
                    frame = frame.f_back
                found.append(frame.f_code.co_name)
            return op(*args, **(kwargs or {}))

    with torch.enable_grad(), Look():
        x = torch.ones(1, requires_grad=True) * 1.0
        torch.autograd.grad(x * 2.0 - x * 3.0, x)
    return None if found == ["_engine_run_backward"] else f"gradients are summed from {found or 'nowhere'}"


def _mask_is_added_otherwise() -> str | None:
    """The operators of the math kernel for attention with a mask, seen by a dispatch mode."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            called.append(op.name())
            return op(*args, **(kwargs or {}))

    rows = torch.zeros(1, 1, 2, 2)
    with Look():
        torch.ops.aten._scaled_dot_product_attention_math(rows, rows, rows, torch.zeros(2, 2))
    return None if called.count("aten::add.Tensor") == 1 else f"it calls {', '.join(called)}"


def _foreach_is_not_none() -> str | None:
    import torch

    group = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    same = group.get("foreach", False) is None and not group.get("fused")
    return None if same else f"AdamW's group has foreach {group.get('foreach', 'nowhere')}, fused {group.get('fused')}"

"""Seams into bitsandbytes: its packed weights, and the memory use of its CUDA kernels, which a CPU cannot show."""

from __future__ import annotations

from toolkit.seams.seam import Seam, ours

_CUDA = "bitsandbytes/backends/cuda/ops.py"  # cannot be imported without a card

TABLE = (
    Seam(
        name="packed weights by name",
        kind="constant",
        where=("models.quantization", "memory.shadow.fake", "methods.lora"),
        target="bitsandbytes.nn: Params4bit Int8Params Linear4bit Linear8bitLt",
        reason="a packed weight is recognized by the name of its class, even if bitsandbytes is not installed",
        breaks="a quantized model is predicted, frozen and counted as if it were not",
        silent=True,
        probe=lambda: _class_names_differ(),
    ),
    Seam(
        name="compiled_with_cuda",
        kind="private",
        where="runs.doctor",
        target="bitsandbytes.cextension: lib BNBNativeLibrary.compiled_with_cuda",
        reason="footprint doctor says whether 4-bit and 8-bit weights work on this machine's cards",
        breaks="footprint doctor cannot tell about bitsandbytes",
    ),
    Seam(
        name="GlobalOptimManager._instance",
        kind="private",
        where="memory.shadow.isolation",
        target="bitsandbytes.optim.optimizer: GlobalOptimManager._instance",
        source=(("bitsandbytes.optim.optimizer", r"self\.mng\.index2config\[\(gindex, pindex\)\]"),),
        reason="settings of single weights, such as embeddings' 32 bits, stay in the process, by the places of weights in their groups",
        breaks="8-bit optimizers are predicted with 32 bits where another model of the process had them",
        silent=True,
        checked_by="tests/memory/test_shadow.py",
    ),
    Seam(
        name="what a packed weight holds",
        kind="private",
        where=(
            "memory.census",
            "memory.shadow.fake",
            "memory.cuda.loading",
            "memory.cuda.quantized",
            "memory.shadow.simulated_rank",
            "benchmarks.on_gpu.speed_jobs",
        ),
        target=(
            "bitsandbytes.nn: Params4bit.quant_state Params4bit.blocksize Params4bit.compress_statistics Params4bit.quant_type "
            "Params4bit.quant_storage Params4bit.bnb_quantized Params4bit.module Int8Params.CB Int8Params.SCB "
            "Int8Params.has_fp16_weights Linear4bit.quant_state Linear8bitLt.state",
            "bitsandbytes.functional: QuantState.absmax QuantState.code QuantState.offset QuantState.state2 QuantState.nested "
            "QuantState.shape",
        ),
        reason="scales and tables of a packed weight, and its unpacked shape",
        breaks="quantization state is missing from the ledger, and a packed weight counts half its parameters",
        silent=True,
        probe=lambda: _quantized_differently(),
    ),
    Seam(
        name="quantize_4bit",
        kind="private",
        where="memory.shadow.fake",
        target="bitsandbytes.functional: quantize_4bit",
        signature=("blocksize", "compress_statistics", "quant_type", "quant_storage"),
        reason="fake weights are quantized by bitsandbytes' own functions",
        breaks="a quantized model cannot be predicted",
    ),
    Seam(
        name="state of paged optimizers",
        kind="private",
        where=("memory.cuda.device", "memory.census"),
        target="bitsandbytes.optim.optimizer: Optimizer8bit.get_state_buffer Optimizer8bit.prefetch_state",
        source=(
            ("bitsandbytes/optim/optimizer.py", r"not self.is_paged or p.numel\(\) < 1e5"),
            ("bitsandbytes/functional.py", r"out.is_paged = True"),
        ),
        reason="which state is in managed memory, outside PyTorch's allocator (measured on an H200)",
        breaks="a paged optimizer's state is predicted in the allocator's peak",
        silent=True,
        checked_by="benchmarks/on_gpu/fact_jobs.py",
    ),
    Seam(
        name="int8_vectorwise_quant",
        kind="private",
        where=("memory.shadow.fake", "memory.cuda.quantized"),
        target="bitsandbytes.functional: int8_vectorwise_quant dequantize_4bit",
        reason="the same, for int8",
        breaks="a quantized model cannot be predicted",
    ),
    Seam(
        name="order of quantizing",
        kind="constant",
        where="memory.cuda.loading",
        source=(
            ("bitsandbytes.functional", r"offset = absmax\.mean\(\)(.|\n)*quantize_blockwise\(absmax"),
            ("bitsandbytes.nn.modules", r"(?s)quantize_4bit\(.*self\.data = w_4bit"),
        ),
        reason="the packed values, tables and scales of a weight are made in this order, while the staged weight exists",
        breaks="what a quantized model leaves reserved after loading is predicted wrongly",
        silent=True,
        checked_by="tests/memory/test_third_party.py",
    ),
    Seam(
        name="fix_4bit_weight_quant_state_from_module",
        kind="patch",
        where="memory.shadow.simulated_rank",
        target="bitsandbytes.nn.modules: fix_4bit_weight_quant_state_from_module",
        signature=("module",),
        source=(("bitsandbytes.nn.modules", r"^\s+fix_4bit_weight_quant_state_from_module\(self\)"),),
        reason="it restores class and scales of a weight that FSDP gathered; a fake tensor has its own class",
        breaks="QLoRA under FSDP2 or ZeRO-3 cannot be predicted",
    ),
    Seam(
        name="bitsandbytes.matmul",
        kind="patch",
        where="memory.cuda.quantized",
        target="bitsandbytes: matmul",
        signature=("A", "B", "out", "state", "threshold", "bias"),
        source=(("bitsandbytes.nn.modules", r"bnb\.matmul\(x, self\.weight, bias=self\.bias, state=self\.state\)"),),
        reason="int8 layers run the code for GPUs; on a CPU they would train through dequantized weights",
        breaks="LLM.int8() is predicted with a dequantized copy of each weight",
        silent=True,
    ),
    Seam(
        name="MatMul8bitLt",
        kind="private",
        where="memory.cuda.quantized",
        target="bitsandbytes.autograd._functions: MatMul8bitLt MatmulLtState MatmulLtState.threshold",
        reason="the product of a GPU's int8 layer, and its settings",
        breaks="predictions use a CPU's int8 layers, without an error, because a failed import is ignored",
        silent=True,
        probe=lambda: _int8_product_takes_other_arguments(),
    ),
    Seam(
        name="1536 rows",
        kind="constant",
        where="memory.cuda.quantized",
        source=((_CUDA, r"^\s+_gemm_4bit_custom_max_m = 1536$"), (_CUDA, r"if M > _gemm_4bit_custom_max_m:")),
        reason="with more rows a 4-bit weight is always dequantized",
        breaks="long batches of QLoRA are predicted with, or without, a dequantized weight",
        silent=True,
    ),
    Seam(
        name="_gemm_4bit_use_custom_cuda",
        kind="constant",
        where="memory.cuda.quantized",
        source=(
            (_CUDA, r"def _gemm_4bit_use_custom_cuda\(device_index, dtype, M, N, K\):"),
            (_CUDA, r"_GEMM_4BIT_CUSTOM_FLOOR_M = 4"),
            (_CUDA, r"_gpu_dispatch_props\(device_index\)"),
        ),
        reason="the rule for fewer rows, read from the file, because its module cannot be imported without a card",
        breaks="QLoRA is predicted as if there were no fused product",
        silent=True,
        probe=lambda: _rule_does_not_answer(),
    ),
    Seam(
        name="operators that stand-ins replace",
        kind="constant",
        where="memory.cuda.quantized",
        library="bitsandbytes",
        reason="each stand-in has the memory use of the CUDA kernel, and takes its arguments by position",
        breaks="the CPU kernel of an operator is predicted, or the wrong argument is used",
        silent=True,
        probe=lambda: _schemas_differ(),
    ),
    Seam(
        name="support_avx512bf16_for_cpu",
        kind="private",
        where="models.loading",
        target="bitsandbytes.nn: Linear4bit.support_avx512bf16_for_cpu",
        reason="set to False: on a CPU weights would be packed in a way that supports only widths divisible by 32",
        breaks="4-bit models of other widths compute wrongly, or stop, on CPUs with AVX-512",
        silent=True,
    ),
)

# The operators of `quantized.STAND_INS`, with the arguments that are taken by position or name.
SCHEMAS = {
    "gemm_4bit": "A B shapeB absmax blocksize quant_type bias absmax_8bit absmax_code absmax_offset",
    "dequantize_4bit": "A absmax blocksize quant_type shape dtype",
    "dequantize_blockwise": "A absmax code blocksize dtype",
    "int8_vectorwise_quant": "A threshold",
    "int8_scaled_mm": "A B row_stats col_stats bias dtype",
    "int8_mixed_scaled_mm": "A CA CB SCA SCB outlier_cols bias",
}


def _class_names_differ() -> str | None:
    from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

    names = [cls.__name__ for cls in (Params4bit, Int8Params, Linear4bit)]
    return None if names == ["Params4bit", "Int8Params", "Linear4bit"] else f"the classes are called {', '.join(names)}"


def _quantized_differently() -> str | None:
    """A 4-bit weight is packed two to a byte, and its `QuantState` has the tensors that the census looks for."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.zeros(64, 64), compress_statistics=True)
    tensors = {name for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
    if tuple(packed.shape) != (64 * 64 // 2, 1) or not {"absmax", "code", "offset"} <= tensors or not state.nested:
        return f"a packed weight of 64 x 64 is {tuple(packed.shape)}, and its state holds {', '.join(sorted(tensors))}"
    more = tensors - {"absmax", "code", "offset"}
    return f"a QuantState also holds {', '.join(sorted(more))}" if more else None


def _int8_product_takes_other_arguments() -> str | None:
    import inspect

    from bitsandbytes.autograd._functions import MatMul8bitLt

    names = [*inspect.signature(MatMul8bitLt.forward).parameters]
    wanted = ["ctx", "A", "B", "out", "bias", "state"]
    return None if names == wanted else f"MatMul8bitLt.forward takes {', '.join(names)}"


def _rule_does_not_answer() -> str | None:
    import torch

    rule = ours("memory.cuda.quantized:fused_rule")()
    if rule is None:
        return f"{_CUDA} has no _gemm_4bit_use_custom_cuda any more"
    try:
        answers = [bool(rule((40, 7, 5), torch.float16, rows, 4096, 4096)) for rows in (1, 1536)]
    except Exception as error:
        return f"the rule cannot be called: {type(error).__name__}: {error}"
    return None if answers == [True, False] else f"on a T4 it says {answers} for 1 and 1,536 rows, not [True, False]"


def _schemas_differ() -> str | None:
    import torch

    stand_ins = {name.removeprefix("bitsandbytes::") for name in ours("memory.cuda.quantized:STAND_INS")}
    if stand_ins != {*SCHEMAS}:
        return f"STAND_INS and SCHEMAS differ in {', '.join(sorted(stand_ins ^ {*SCHEMAS}))}"
    for name, wanted in SCHEMAS.items():
        if not hasattr(torch.ops.bitsandbytes, name):
            return f"there is no operator bitsandbytes::{name} any more"
        schema = getattr(torch.ops.bitsandbytes, name).default._schema
        names = " ".join(argument.name for argument in schema.arguments)
        if names != wanted:
            return f"bitsandbytes::{name} takes ({names}), and the stand-in ({wanted})"
    return None

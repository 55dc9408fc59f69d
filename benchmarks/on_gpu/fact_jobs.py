"""Measures facts that were inferred from sources: one small function for each; most need the whole card."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from on_gpu import models, training
from on_gpu.card import device
from on_gpu.machine import nvidia_smi

KERNELS = {  # a part of a kernel's name -> its name in `toolkit.memory.cuda.attention`
    "cudnn": "cudnn",
    "flash": "flash",
    "fmha_cutlass": "efficient",
    "mem_eff": "efficient",
    "efficient": "efficient",
    "softmax": "math",
}
BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # SDPBackend in ATen/native/transformers/sdp_utils_cpp.h


def card(rehearsed: bool) -> dict[str, Any]:
    """The facts about the card and the stack, which come before everything else."""
    from toolkit.memory.environment import stack_versions

    found: dict[str, Any] = {"versions": stack_versions() | {"torch": torch.__version__}}
    if rehearsed:
        return found | {"name": "cpu", "capability": None}
    gpu = torch.cuda.get_device_properties(0)
    found["versions"] |= {
        "cuda": torch.version.cuda or "none",
        "driver": nvidia_smi("driver_version") or "unknown",
    }
    return found | {
        "name": gpu.name,
        "capability": [gpu.major, gpu.minor],
        "multiprocessors": gpu.multi_processor_count,
        "total_bytes": gpu.total_memory,
    }


def context(rehearsed: bool) -> dict[str, Any]:
    """Bytes of the CUDA context: used device memory minus PyTorch's reserve, while more and more kernels are loaded."""
    it = device(rehearsed)
    before = nvidia_smi("memory.used")  # MiB, of all processes
    found: dict[str, Any] = {"used_before_mib": None if before is None else float(before)}
    steps: dict[str, Callable[[], Any]] = {
        "first tensor": lambda: torch.zeros(1, device=it.type),
        "elementwise": lambda: torch.zeros(1024, device=it.type).add(1).sum(),
        "matrix product fp32": lambda: torch.ones(256, 256, device=it.type) @ torch.ones(256, 256, device=it.type),
        "matrix product bf16": lambda: (
            torch.ones(256, 256, device=it.type).bfloat16() @ torch.ones(256, 256, device=it.type).bfloat16()
        ),
        "linear with bias": lambda: (
            nn.Linear(256, 256, device=it.type)(torch.ones(256, 256, device=it.type)).sum().backward()
        ),
        "attention": lambda: (
            F.scaled_dot_product_attention(*[_heads(it.type, torch.bfloat16, 64) for _ in range(3)]).sum().backward()
        ),
        "softmax": lambda: torch.ones(64, 1000, device=it.type).softmax(-1),
        "embedding": lambda: F.embedding(
            torch.zeros(8, dtype=torch.long, device=it.type), torch.ones(10, 8, device=it.type)
        ),
    }
    stages = {}
    for name, run in steps.items():
        run()
        it.wait()
        stages[name] = it.used() - it.reserved()
    found["beyond_reserve_bytes"] = stages
    after = nvidia_smi("memory.used")
    found["used_after_mib"] = None if after is None else float(after)
    others = 0 if before is None else int(float(before) * 2**20)
    found["context_bytes"] = max(0, stages["embedding"] - others) if it.used() else None
    found["says"] = (
        f"context {(found['context_bytes'] or 0) / 2**20:.0f} MiB in addition to {others / 2**20:.0f} MiB in use before"
    )
    return found


def _heads(where: str, dtype: torch.dtype, size: int, heads: int = 8, length: int = 256) -> torch.Tensor:
    return torch.randn(2, heads, length, size, device=where, dtype=dtype, requires_grad=True)


def workspaces(rehearsed: bool) -> dict[str, Any]:
    """Bytes of cuBLAS's and cuBLASLt's workspaces, in the main thread and in autograd's."""
    from toolkit.memory.cuda.cards import find_card

    it = device(rehearsed)
    found: dict[str, Any] = {}

    def grown(run: Callable[[], Any]) -> int:
        before = it.allocated()
        kept = run()
        it.wait()
        own = sum(t.untyped_storage().nbytes() for t in kept if isinstance(t, torch.Tensor) and t.device.type == "cuda")
        return it.allocated() - before - own

    size = 64 if rehearsed else 1024  # so that the allocator rounds no result up
    a, b = (torch.ones(size, size, device=it.type, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    found["main thread, first product"] = grown(lambda: [a.detach() @ b.detach()])
    found["main thread, second product"] = grown(lambda: [a.detach() @ b.detach()])
    output = a @ b

    def backward() -> list[torch.Tensor]:
        output.backward(torch.ones_like(output))
        return [a.grad, b.grad]  # type: ignore[list-item]

    found["autograd thread, first product"] = grown(backward)
    layer = nn.Linear(size, size, device=it.type, dtype=torch.bfloat16)
    found["linear with bias"] = grown(lambda: [layer(a.detach())])
    found["fp32"] = grown(lambda: [a.detach().float() @ b.detach().float()])
    if not rehearsed:
        expected = find_card(torch.cuda.get_device_name()).blas_workspace_bytes
        first = (found["main thread, first product"], found["autograd thread, first product"])
        found |= {"expected": expected, "agrees": set(first) == {expected}}
    return found | {"says": ", ".join(f"{name} {value:,}" for name, value in found.items() if isinstance(value, int))}


def attention(rehearsed: bool) -> dict[str, Any]:
    """Compares the kernel that `scaled_dot_product_attention` chooses with the one that `toolkit.memory.cuda.attention` expects."""
    from toolkit.memory.cuda.attention import choose_kernel

    it = device(rehearsed)
    rows, wrong = [], []
    for dtype in (torch.bfloat16,) if rehearsed else (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 80, 128, 256):
            for masked, grouped, causal in (
                (False, False, True),
                (True, False, False),
                (False, True, True),
                (True, True, False),
            ):
                length = 64 if rehearsed else 512
                q = _heads(it.type, dtype, size, 8, length)
                k, v = (_heads(it.type, dtype, size, 2 if grouped else 8, length) for _ in range(2))
                mask = torch.ones(2, 1, length, length, device=it.type, dtype=torch.bool).tril() if masked else None
                options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "enable_gqa": grouped}
                row = _attention_row(it, q, k, v, options)
                row |= {
                    "dtype": str(dtype).removeprefix("torch."),
                    "head_size": size,
                    "mask": masked,
                    "grouped": grouped,
                }
                if not rehearsed:
                    row["expected"] = choose_kernel(_this_card(), q, k, v, **options)
                    if "chosen" in row and row["chosen"] != row["expected"]:
                        wrong.append(
                            f"{row['dtype']} {size} mask={masked} grouped={grouped}: {row['chosen']}, expected {row['expected']}"
                        )
                rows.append(row)
    says = f"{len(rows) - len(wrong)} of {len(rows)} as expected" + (f"; {'; '.join(wrong[:4])}" if wrong else "")
    return {"rows": rows, "agrees": None if rehearsed else not wrong, "says": says}


def _this_card() -> Any:
    from toolkit.runs.prediction import this_card

    return this_card()


def _attention_row(
    it: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The chosen backend, the names of the kernels, and the peak bytes of forward and backward."""
    row: dict[str, Any] = {}
    try:
        row["chosen"] = BACKENDS.get(int(torch._fused_sdp_choice(q, k, v, **options)), "none")
        before = it.allocated()
        it.reset()
        with it.profiled() as profile:
            output = F.scaled_dot_product_attention(q, k, v, **options)
            it.wait()
            row["forward_bytes"] = it.peaks()[0] - before
            it.reset()
            output.sum().backward()
            it.wait()
            row["backward_bytes"] = it.peaks()[0] - before
        row["kernels"] = sorted({event.key[:100] for event in profile.key_averages() if kind_of(event.key)})[:8]
    except RuntimeError as error:
        row["failed"] = " ".join(str(error).split())[:300]
    return row


def kind_of(kernel: str) -> str | None:
    """`"flash"`, `"efficient"`, `"cudnn"` or `"math"` for the name of an attention kernel; None for other kernels."""
    low = kernel.lower()
    return next((kind for part, kind in KERNELS.items() if part in low), None)


def kernels(label: str, work: str, rehearsed: bool) -> dict[str, Any]:
    """The attention kernels in a step of the real model, by implementation; flash-attn only if it is installed."""
    from transformers import AutoConfig

    from toolkit.models.heads import auto_class

    it = device(rehearsed)
    folder = models.folder_of(work, label)
    config = AutoConfig.from_pretrained(folder)
    found: dict[str, Any] = {}
    for implementation in ("sdpa", "eager", "flash_attention_2"):
        try:
            model = auto_class(config).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=implementation)
        except (ImportError, OSError, ValueError) as error:  # OSError: the kernels would come from the hub
            found[implementation] = {"failed": " ".join(str(error).split())[:200]}
            continue
        model = model.to(it.type).train()
        ids = torch.full((2, 32 if rehearsed else 512), 5, device=it.type)
        for padded in (False, True):
            mask = torch.ones_like(ids)
            mask[1:, ids.shape[1] // 2 :] = 0 if padded else 1
            it.reset()
            with it.profiled() as profile, torch.autocast(it.type, torch.bfloat16):
                model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
                it.wait()
            names = sorted({event.key[:100] for event in profile.key_averages() if kind_of(event.key)})
            model.zero_grad()
            found[f"{implementation}{' padded' if padded else ''}"] = {
                "kernels": names[:12],
                "peak_bytes": it.peaks()[0],
            }
        del model
        it.empty_cache()
    return found | {"says": "; ".join(f"{name}: {_kinds(row)}" for name, row in found.items())}


def _kinds(row: dict[str, Any]) -> str:
    return row.get("failed") or "+".join(sorted({str(kind_of(name)) for name in row["kernels"]})) or "no kernel seen"


def evaluation(label: str, work: str, rehearsed: bool) -> dict[str, Any]:
    """Peaks of loading, scoring by generation, and validation, which no prediction covers yet."""
    from toolkit.config import parse_config
    from toolkit.methods import METHODS
    from toolkit.runs.evaluation import evaluate_by_generation
    from toolkit.runs.preflight import prepare
    from toolkit.training.trainer import FineTuner

    it = device(rehearsed)
    length = 64 if rehearsed else 512
    own = ("--bf16", "--per_device_train_batch_size", "4", "--max_length", str(length))
    output = str(Path(work) / "measured" / f"evaluation-{label}")
    config = parse_config(METHODS["lora"], training.flags(work, label, own, output, rehearsed, target=32))
    ready = prepare(config)
    found: dict[str, Any] = {}

    def peak(name: str, run: Callable[[], Any]) -> Any:
        it.reset()
        result = run()
        it.wait()
        found[name] = dict(zip(("allocated_bytes", "reserved_bytes"), it.peaks(), strict=True))
        return result

    model = peak("load", lambda: ready.load_model())
    peak("generate", lambda: evaluate_by_generation(model, ready.data, config, title="base model"))
    trainer = FineTuner(config.method.attach(model), config, ready.data)
    peak("train", trainer.train)
    peak("evaluate", trainer.evaluate)
    peak("generate, tuned", lambda: evaluate_by_generation(trainer.model, ready.data, config, title="tuned model"))
    return found | {
        "says": ", ".join(f"{name} {use['allocated_bytes'] / 2**30:.2f} GiB" for name, use in found.items())
    }


def outliers(rehearsed: bool) -> dict[str, Any]:
    """Peak bytes of an int8 layer in forward and backward, with and without columns above the outlier threshold."""
    import bitsandbytes as bnb

    it = device(rehearsed)
    size = 128 if rehearsed else 4096
    layer = bnb.nn.Linear8bitLt(size, size, bias=False, has_fp16_weights=False, threshold=6.0).to(it.type)
    found: dict[str, Any] = {}
    for columns in (0, 1, 64):
        x = torch.rand(4 if rehearsed else 2048, size, device=it.type, dtype=torch.float16)
        x[:, :columns] = 60.0
        x.requires_grad_()
        it.reset()
        before = it.allocated()
        output = layer(x)
        it.wait()
        forward = it.peaks()[0] - before
        output.sum().backward()
        it.wait()
        found[f"{columns} columns"] = {"forward_bytes": forward, "backward_bytes": it.peaks()[0] - before}
        del output, x
    return found | {"says": ", ".join(f"{name}: {use['forward_bytes']:,} forward" for name, use in found.items())}


def paged(rehearsed: bool) -> dict[str, Any]:
    """Where paged optimizers keep their state: in PyTorch's allocator, elsewhere on the device, or in host memory."""
    import bitsandbytes as bnb
    import psutil

    it = device(rehearsed)
    elements = 2**14 if rehearsed else 2**28
    found: dict[str, Any] = {}
    for name, make in (("PagedAdamW8bit", bnb.optim.PagedAdamW8bit), ("PagedAdamW32bit", bnb.optim.PagedAdamW32bit)):
        weight = nn.Parameter(torch.zeros(elements, device=it.type))
        weight.grad = torch.ones_like(weight)
        optimizer = make([weight], lr=1e-3)
        before = it.allocated(), it.used() - it.reserved(), psutil.Process().memory_info().rss
        optimizer.step()
        it.wait()
        after = it.allocated(), it.used() - it.reserved(), psutil.Process().memory_info().rss
        state = sum(
            t.numel() * t.element_size() for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor)
        )
        places = ("allocator_bytes", "device_beyond_allocator_bytes", "host_bytes")
        grown = [b - a for a, b in zip(before, after, strict=True)]
        found[name] = {"state_bytes": state, **dict(zip(places, grown, strict=True))}
        del optimizer, weight
        it.empty_cache()
    says = [
        f"{name}: {u['state_bytes']:,} of state, {u['allocator_bytes']:,} in the allocator" for name, u in found.items()
    ]
    return found | {"says": "; ".join(says)}


def scaler(rehearsed: bool) -> dict[str, Any]:
    """Bytes that fp16's gradient scaler adds: its own tensors, and temporaries during unscaling."""
    it = device(rehearsed)
    elements = 2**14 if rehearsed else 2**26
    weight = nn.Parameter(torch.zeros(elements, device=it.type))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    enabled = torch.amp.GradScaler(it.type)
    base = it.allocated()
    with nullcontext() if rehearsed else torch.autocast("cuda", torch.float16):
        loss = (weight * 1.0).sum()
    enabled.scale(loss).backward()
    it.reset()
    before = it.allocated()
    enabled.unscale_(optimizer)
    it.wait()
    unscaling = it.peaks()[0] - before
    enabled.step(optimizer)
    enabled.update()
    own = it.allocated() - base - elements * 4 if it.allocated() else 0
    return {
        "unscale_peak_bytes": unscaling,
        "beside_the_gradient_bytes": own,
        "says": f"unscaling takes {unscaling:,} bytes",
    }

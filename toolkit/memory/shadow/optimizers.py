"""Optimizers of packages that need not be installed: torchao's, GaLore's and APOLLO's, as they allocate.

While `optimizer_packages` is open, transformers finds the classes below in place of the packages', installed or not, so a
prediction does not depend on what is installed. Each has the state and the temporaries of its original, with the same lives, and
computes nothing else: it runs on fake tensors only. tests/memory/test_low_rank_optimizers.py compares them with the packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.optim import Optimizer

from toolkit.seams import imported, patched

VERSIONS = {"torchao": "0.18.0", "galore_torch": "1.0", "apollo_torch": "1.0.3"}  # that the stand-ins are made after
SMALLEST = 4096  # numbers in a weight whose state torchao quantizes


class AdamW8bit(Optimizer):
    """torchao's AdamW (torchao/optim/adam.py; Dettmers et al. 2021, arXiv:2110.02861): both moments quantized in blocks, each with a float32 scale and a table.

    The step is compiled. Inductor fuses its operators; what it keeps of each weight, one after the other, are both moments in float32
    and their scales. So says its code for a CPU (8 bits). For 4 bits that code also keeps the codes as int64, 25 bytes a number in all,
    which a measurement on an A100 excludes: Llama-2-7B took 1.42 GiB more than weights, gradients and state, 11.6 bytes for each
    number of its largest weight (torchao/optim/README.md). So the same 8 bytes are counted.
    """

    bits = 8

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        block_size: int = 256,
        bf16_stochastic_round: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.block_size = block_size

    def zeros(self, p: torch.Tensor) -> Any:
        if p.numel() < SMALLEST or p.numel() % self.block_size:
            return torch.zeros_like(p)
        shape = p.shape if self.bits == 8 else (p.numel() // 2,)
        codes = p.new_zeros(shape, dtype=torch.uint8)
        scale = p.new_zeros(p.numel() // self.block_size, dtype=torch.float32)
        return [codes, scale, p.new_empty(2**self.bits, dtype=torch.float32)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = self.zeros(p), self.zeros(p)
            if isinstance(state["exp_avg"], list):
                kept = [p.new_empty(p.numel() // self.block_size, dtype=torch.float32) for _ in range(2)]
                kept += [p.new_empty(p.shape, dtype=torch.float32) for _ in range(2)]
                del kept


class AdamW4bit(AdamW8bit):
    """Li et al. 2023, arXiv:2309.01507."""

    bits = 4


class _Projector:
    """Projects the gradient (m, n) of a weight to `rank` dimensions: (m, rank) on the right, (rank, n) on the left.

    The name of the matrix is the packages' own: the census of optimizer state reads it.
    """

    ortho_matrix: Any = None

    def __init__(self, group: dict[str, Any]) -> None:
        self.rank, self.gap, self.kind = group["rank"], group["update_proj_gap"], group["proj_type"]

    def project(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        tall = grad.shape[0] >= grad.shape[1]
        right = {"std": tall, "reverse_std": not tall, "right": True, "left": False, "full": False}[self.kind]
        if self.ortho_matrix is None or step % self.gap == 0:
            self.ortho_matrix = self.matrix(grad, right)
        if self.kind == "full":
            return torch.matmul(self.ortho_matrix[0].t(), grad) @ self.ortho_matrix[1].t()
        return torch.matmul(grad, self.ortho_matrix.t()) if right else torch.matmul(self.ortho_matrix.t(), grad)

    def matrix(self, grad: torch.Tensor, right: bool) -> Any:
        raise NotImplementedError


class _SingularVectors(_Projector):
    """GaLore's projector (galore_torch/galore_projector.py). Of a float32 gradient it keeps all singular vectors, as a slice of them."""

    def matrix(self, grad: torch.Tensor, right: bool) -> Any:
        matrix, dtype = grad.float(), grad.dtype
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if self.kind == "full":
            return [u[:, : self.rank].type(dtype), vh[: self.rank].type(dtype)]
        if right:
            _unused, kept = u[:, : self.rank] @ torch.diag(s[: self.rank]), vh[: self.rank, :]
        else:
            kept, _unused = u[:, : self.rank], torch.diag(s[: self.rank]) @ vh[: self.rank, :]
        kept = kept.type(dtype)
        return kept  # noqa: RET504 - the slice of all vectors ends here, before they do

    def project_back(self, low: torch.Tensor) -> torch.Tensor:
        tall = low.shape[0] >= low.shape[1]
        if self.kind == "full":
            whole = torch.matmul(self.ortho_matrix[0], low) @ self.ortho_matrix[1]
        elif {"std": tall, "reverse_std": low.shape[0] > low.shape[1], "right": True, "left": False}[self.kind]:
            whole = torch.matmul(low, self.ortho_matrix)
        else:
            whole = torch.matmul(self.ortho_matrix, low)
        return whole * 1.0


class _RandomMatrix(_Projector):
    """APOLLO's projector (apollo_torch/random_projector.py)."""

    def matrix(self, grad: torch.Tensor, right: bool) -> Any:
        matrix, dtype = grad.float(), grad.dtype
        shape = (self.rank, matrix.shape[1]) if right else (matrix.shape[0], self.rank)
        return (matrix.new_empty(shape) / 1.0).type(dtype)


class _LowRankAdamW(Optimizer):
    """Adam whose moments are those of a projected gradient, in groups that have a rank; of others, of the gradient itself."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


class GaLoreAdamW(_LowRankAdamW):
    """Zhao et al. 2024, arXiv:2403.03507; galore_torch/adamw.py."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                grad, state = p.grad, self.state[p]
                if "rank" in group:
                    projector = state.setdefault("projector", _SingularVectors(group))
                    grad = projector.project(grad, state.get("step", 0))
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                state["step"] = state.get("step", 0) + 1
                denom = state["exp_avg_sq"].sqrt().add_(group["eps"])
                norm_grad = state["exp_avg"] / denom
                if "rank" in group:
                    norm_grad = projector.project_back(norm_grad)


class APOLLOAdamW(_LowRankAdamW):
    """Zhu et al. 2024, arXiv:2412.05270; apollo_torch/apollo.py: the projection only scales the gradient, by channel or as a whole."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                grad, state = p.grad, self.state[p]
                if "rank" in group:
                    dim = 0 if grad.shape[0] < grad.shape[1] else 1
                    kind = _RandomMatrix if group["proj"] == "random" else _SingularVectors
                    grad = state.setdefault("projector", kind(group)).project(grad, state.get("step", 0))
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                state["step"] = state.get("step", 0) + 1
                denom = state["exp_avg_sq"].sqrt().add_(group["eps"])
                norm_grad = state["exp_avg"] / denom
                if "rank" in group:
                    of = {"dim": dim} if group["scale_type"] == "channel" else {}
                    factor = torch.norm(norm_grad, **of) / (torch.norm(grad, **of) + 1e-8)
                    if of and dim == 1:
                        factor = factor.unsqueeze(1)
                    scaled_grad = p.grad * factor
                    norm = torch.norm(scaled_grad)
                    if "scaled_grad" in state:  # its growth is limited
                        scaled_grad = scaled_grad / 1.0
                    state["scaled_grad"] = norm
                    norm_grad = scaled_grad


def galore_8bit() -> type[Optimizer] | None:
    """GaLore's AdamW over bitsandbytes' 8-bit state (galore_torch/adamw8bit.py); None without bitsandbytes."""
    try:
        from bitsandbytes.optim.optimizer import Optimizer2State
    except ImportError:
        return None

    class GaLoreAdamW8bit(Optimizer2State):
        """The weight's place is taken by a projected one while bitsandbytes updates it."""

        initialized: bool

        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
        ) -> None:
            super().__init__("adam", params, lr, betas, eps, weight_decay, 8)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for index, group in enumerate(self.param_groups):
                for number, p in enumerate(group["params"]):
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if "rank" in group:
                        projector = state.setdefault("projector", _SingularVectors(group))
                        grad = projector.project(p.grad, state.setdefault("step", 0))
                        p.saved_data = p.data.clone()
                        p.data = grad.clone().to(p.data.dtype)
                        p.grad = grad
                    else:
                        state.setdefault("step", 0)
                    if "state1" not in state:
                        self.init_state(group, p, index, number)
                    self.prefetch_state(p)
                    self.update_step(group, p, index, number)
                    if "rank" in group:
                        p.data = p.saved_data.add_(projector.project_back(p.data))

    return GaLoreAdamW8bit


@contextmanager
def optimizer_packages() -> Iterator[None]:
    """While open, transformers makes the optimizers of `VERSIONS` from the classes here."""
    modules: dict[str, dict[str, Any]] = {
        "torchao": {"optim": None},
        "torchao.optim": {"AdamW4bit": AdamW4bit, "AdamW8bit": AdamW8bit},
        "galore_torch": {
            "GaLoreAdamW": GaLoreAdamW,
            "GaLoreAdamW8bit": galore_8bit(),
            "GaLoreAdafactor": None,
        },
        "apollo_torch": {"APOLLOAdamW": APOLLOAdamW},
    }
    with ExitStack() as stack:
        for name, content in modules.items():
            stand_in = ModuleType(name)
            vars(stand_in).update(content)
            stack.enter_context(imported(name, stand_in))
        metadata = SimpleNamespace(version=lambda name: VERSIONS.get(name) or version(name))
        stack.enter_context(patched("importlib of the optimizers", SimpleNamespace(metadata=metadata)))
        for name in ("is_torchao_available", "is_galore_torch_available", "is_apollo_torch_available"):
            stack.enter_context(patched(name, lambda: True))
        yield

"""GPUs: how much memory each really offers, and what depends on its architecture. A card is one entry in `CARDS`.

**Memory.** A card of "24 GB" does not offer 24 GiB. `total_gib` is what the driver offers to CUDA, as PyTorch prints it
in its out-of-memory message ("GPU 0 has a total capacity of ..."): the nominal size less the driver's own part and, on
cards where it is enabled, ECC. An entry with a `report` was checked against that public report (a GitHub issue) or measurement. The other
totals are typical values for the card (the lowest if drivers differ) or, if none is known, the nominal size less 3.5 %; all
of these are marked `total_is_estimate`. Checked totals are 1.3 % to 7.9 % below the nominal size. A desktop needs more.

**Context.** A process that uses CUDA holds memory outside PyTorch's allocator: driver structures, kernel code, and local
memory for every thread that can be resident. Known values, in MiB per multiprocessor: 3.5 on a T4 (140.875 MiB in training,
40 multiprocessors of 1,024 threads; 69 of the 79 runs that fitcheck-llm 0.3.1 publishes), 3.0 on an RTX 6000 Ada (426 MiB,
142 multiprocessors of 1,536 threads; before any kernel, unslothai/unsloth-zoo#1053), 3.1 on an RTX 3090 (256 MiB, 82 of 1,536;
before any kernel, invoke-ai/InvokeAI#9413). For cards without a measurement in training the estimate is 3.5 MiB per
multiprocessor. It is a third more where a multiprocessor holds 2,048 threads (A100, data-centre Blackwell): 504 MiB on an A100,
where eight runs of fms-acceleration suggest 523. On Hopper it is 5.8, as measured on an H200 (767 MiB with CUDA 13.0, 132
multiprocessors; `benchmarks/results/gpu/nvidia-h200.json`). Such estimates are marked `context_is_estimate`. The context also
differs between drivers, and libraries with their own kernels add to it: up to 1.7 GB were seen with flash-attn. So no constant
is right for every run; on a machine with a card the context is measured.

Numbers of multiprocessors and nominal sizes: NVIDIA's data sheets and architecture whitepapers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from toolkit.errors import UserError
from toolkit.units import GIB, MIB, format_bytes, parse_bytes

_UNREPORTED_SHARE = 0.965  # of the nominal size, for cards without a known capacity
_SOLD_SHARE = (
    0.98  # of the nominal size, for a card of which only that is known: 11.76 GiB of 12, 23.52 of 24, 31.37 of 32
)
_CONTEXT_PER_MULTIPROCESSOR = 3.5 * MIB  # with up to 1,536 threads
_OF_2048_THREADS = ((8, 0), (10, 0))  # compute capabilities
_H200_CONTEXT = 766.8  # MiB


def _estimated_context(capability: tuple[int, int], multiprocessors: int) -> int:
    """The context in bytes for a card without a measurement; see the module's docstring."""
    if capability == HOPPER:
        return int(multiprocessors * _H200_CONTEXT / 132 * MIB)
    share = 2048 / 1536 if capability in _OF_2048_THREADS else 1
    return int(multiprocessors * _CONTEXT_PER_MULTIPROCESSOR * share)


@dataclass(frozen=True)
class Card:
    """One GPU model. Sizes in bytes; `capability` is CUDA's compute capability, (8, 9) for sm_89."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int
    context_bytes: int
    total_is_estimate: bool = False
    context_is_estimate: bool = True
    taken_bytes: int = 0  # used by other programs, if it is a card of this machine
    nominal_gib: float = 0.0  # as sold; 0: unknown
    limit_bytes: int | None = None  # of what PyTorch reserves, if a fraction is set for its process on this machine
    is_generic: bool = False  # only its memory is known
    moves_to_host: bool = False  # the driver moves to the host's memory what does not fit, instead of failing

    @property
    def architecture(self) -> str:
        """NVIDIA's name for the generation."""
        major, minor = self.capability
        if self.capability == (8, 9):
            return "Ada"
        return {6: "Pascal", 7: "Turing" if minor == 5 else "Volta", 8: "Ampere", 9: "Hopper"}.get(major, "Blackwell")

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 arithmetic is native (sm_80 and later)."""
        return self.capability >= (8, 0)

    @property
    def budget_bytes(self) -> int:
        """Bytes that a process can use, its CUDA context included."""
        free = self.total_bytes - self.taken_bytes
        return free if self.limit_bytes is None else min(free, self.limit_bytes + self.context_bytes)

    @property
    def is_limited(self) -> bool:
        """Whether PyTorch's own limit leaves a process less than the card does."""
        return self.budget_bytes < self.total_bytes - self.taken_bytes

    @property
    def spills(self) -> bool:
        """Whether a run that needs more than the budget goes on in the host's memory: PyTorch fails at its own limit."""
        return self.moves_to_host and not self.is_limited

    @property
    def blas_workspace_bytes(self) -> int:
        """Bytes of the workspace that each thread's cuBLAS handle keeps from its first matrix product on; cuBLASLt shares it.

        `parseChosenWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp: ":4096:2:16:8" = 2 x 4 MiB + 8 x 16 KiB, and
        32 MiB on Hopper and Blackwell.
        """
        return 32 * MIB if self.capability[0] in (9, 10, 12) else 2 * 4 * MIB + 8 * 16 * 1024


def _card(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    nominal_gib: float,
    total_gib: float | None = None,
    context_mib: float | None = None,
    report: str = "",
) -> Card:
    return Card(
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        total_bytes=int((nominal_gib * _UNREPORTED_SHARE if total_gib is None else total_gib) * GIB),
        context_bytes=_estimated_context(capability, multiprocessors)
        if context_mib is None
        else int(context_mib * MIB),
        total_is_estimate=not report,
        context_is_estimate=context_mib is None,
        nominal_gib=nominal_gib,
    )


PASCAL_DATACENTER, PASCAL, VOLTA = (6, 0), (6, 1), (7, 0)
TURING, AMPERE_DATACENTER, AMPERE, ADA, HOPPER = (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)
BLACKWELL_DATACENTER, BLACKWELL = (10, 0), (12, 0)

# name, capability, multiprocessors, nominal GiB, total GiB that PyTorch prints; context MiB and report where known
CARDS: tuple[Card, ...] = (
    _card("GT 1030", PASCAL, 3, 2),
    _card("GTX 1050", PASCAL, 5, 2),
    _card("GTX 1050 3GB", PASCAL, 6, 3),
    _card("GTX 1050 Ti", PASCAL, 6, 4),
    _card("GTX 1060", PASCAL, 10, 6),
    _card("GTX 1060 3GB", PASCAL, 9, 3),
    _card("GTX 1060 Laptop", PASCAL, 10, 6),
    _card("GTX 1070 Laptop", PASCAL, 16, 8),
    _card("GTX 1080 Laptop", PASCAL, 20, 8),
    _card("GTX 1070", PASCAL, 15, 8),
    _card("GTX 1070 Ti", PASCAL, 19, 8),
    _card("GTX 1080", PASCAL, 20, 8),
    _card("GTX 1080 Ti", PASCAL, 28, 11),
    _card("TITAN Xp", PASCAL, 30, 12),
    _card("TITAN X", PASCAL, 28, 12),
    _card("Quadro P2000", PASCAL, 8, 5),
    _card("Quadro P4000", PASCAL, 14, 8),
    _card("Quadro P5000", PASCAL, 20, 16),
    _card("Quadro P6000", PASCAL, 30, 24),
    _card("P4", PASCAL, 20, 8),
    _card("P40", PASCAL, 30, 24),
    _card("P100", PASCAL_DATACENTER, 56, 16),
    _card("P100 12GB", PASCAL_DATACENTER, 56, 12),
    _card("Quadro GP100", PASCAL_DATACENTER, 56, 16),
    _card("V100 16GB", VOLTA, 80, 16),
    _card("V100 32GB", VOLTA, 80, 32),
    _card("V100S", VOLTA, 80, 32),
    _card("Quadro GV100", VOLTA, 80, 32),
    _card("TITAN V", VOLTA, 80, 12),
    _card("GTX 1630", TURING, 8, 4),
    _card("GTX 1650", TURING, 14, 4),
    _card("GTX 1650 SUPER", TURING, 20, 4),
    _card("GTX 1650 Laptop", TURING, 16, 4),
    _card("GTX 1650 Ti Laptop", TURING, 16, 4),
    _card("GTX 1660", TURING, 22, 6),
    _card("GTX 1660 SUPER", TURING, 22, 6),
    _card("GTX 1660 Ti", TURING, 24, 6, 5.79),
    _card("GTX 1660 Ti Laptop", TURING, 24, 6),
    _card("RTX 2060", TURING, 30, 6, 5.79),
    _card("RTX 2060 12GB", TURING, 34, 12),
    _card("RTX 2070", TURING, 36, 8, 7.79),
    _card("RTX 2070 SUPER", TURING, 40, 8, 7.79),
    _card("RTX 2080", TURING, 46, 8, 7.79),
    _card("RTX 2080 SUPER", TURING, 48, 8, 7.79),
    _card("RTX 2080 Ti", TURING, 68, 11, 10.75),
    _card("RTX 2060 Laptop", TURING, 30, 6),
    _card("RTX 2070 Laptop", TURING, 36, 8),
    _card("RTX 2070 SUPER Laptop", TURING, 40, 8),
    _card("RTX 2080 Laptop", TURING, 46, 8),
    _card("RTX 2080 SUPER Laptop", TURING, 48, 8),
    _card("TITAN RTX", TURING, 72, 24, 23.62),
    _card("Quadro RTX 4000", TURING, 36, 8),
    _card("Quadro RTX 5000", TURING, 48, 16),
    _card("Quadro RTX 6000", TURING, 72, 24),
    _card("Quadro RTX 8000", TURING, 72, 48, 44.49),
    _card("T400", TURING, 6, 4),
    _card("T600", TURING, 10, 4),
    _card("T1000", TURING, 14, 4),
    _card("T1000 8GB", TURING, 14, 8),
    _card("T4", TURING, 40, 16, 14.74, context_mib=140.875, report="hpcaitech/Open-Sora#697"),
    _card("T4G", TURING, 40, 16),
    _card("RTX 2050 Laptop", AMPERE, 16, 4),
    _card("RTX 3050", AMPERE, 20, 8),
    _card("RTX 3050 6GB", AMPERE, 18, 6),
    _card("RTX 3050 Laptop", AMPERE, 16, 4),
    _card("RTX 3050 Laptop 6GB", AMPERE, 20, 6),
    _card("RTX 3050 Ti Laptop", AMPERE, 20, 4),
    _card("RTX 3060 8GB", AMPERE, 28, 8),
    _card("RTX 3060 Laptop", AMPERE, 30, 6),
    _card("RTX 3060", AMPERE, 28, 12, 11.76),
    _card("RTX 3060 Ti", AMPERE, 38, 8, 7.78),
    _card("RTX 3070", AMPERE, 46, 8, 7.78),
    _card("RTX 3070 Ti", AMPERE, 48, 8, 7.78),
    _card("RTX 3070 Laptop", AMPERE, 40, 8),
    _card("RTX 3070 Ti Laptop", AMPERE, 46, 8),
    _card("RTX 3080", AMPERE, 68, 10, 9.77),
    _card("RTX 3080 12GB", AMPERE, 70, 12, 11.76),
    _card("RTX 3080 Ti", AMPERE, 80, 12, 11.76),
    _card("RTX 3080 Laptop 8GB", AMPERE, 48, 8),
    _card("RTX 3080 Laptop 16GB", AMPERE, 48, 16),
    _card("RTX 3080 Ti Laptop", AMPERE, 58, 16),
    _card("RTX 3090", AMPERE, 82, 24, 23.68),
    _card("RTX 3090 Ti", AMPERE, 84, 24, 23.68),
    _card("RTX A400", AMPERE, 6, 4),
    _card("RTX A1000", AMPERE, 18, 8),
    _card("RTX A1000 Laptop", AMPERE, 16, 4),
    _card("RTX A2000 Laptop", AMPERE, 20, 4),
    _card("RTX A3000 Laptop", AMPERE, 32, 6),
    _card("RTX A4000 Laptop", AMPERE, 40, 8),
    _card("RTX A5000 Laptop", AMPERE, 48, 16),
    _card("RTX A5500 Laptop", AMPERE, 58, 16),
    _card("RTX A2000 6GB", AMPERE, 26, 6),
    _card("RTX A2000 12GB", AMPERE, 26, 12),
    _card("RTX A4000", AMPERE, 48, 16, 15.72),
    _card("RTX A4500", AMPERE, 56, 20),
    _card("RTX A5000", AMPERE, 64, 24, 23.67),
    _card("RTX A5500", AMPERE, 80, 24),
    _card("RTX A6000", AMPERE, 84, 48, 47.41),
    _card("A2", AMPERE, 10, 16),
    _card("A16", AMPERE, 10, 16),
    _card("A10", AMPERE, 72, 24, 21.98),
    _card("A10G", AMPERE, 80, 24, 21.98),
    _card("A40", AMPERE, 84, 48, 44.35),
    _card("A30", AMPERE_DATACENTER, 56, 24),
    _card("A100 40GB", AMPERE_DATACENTER, 108, 40, 39.39),
    _card("A100 80GB", AMPERE_DATACENTER, 108, 80, 79.14),
    _card("A800 40GB", AMPERE_DATACENTER, 108, 40),
    _card("A800 80GB", AMPERE_DATACENTER, 108, 80),
    _card("RTX 4060", ADA, 24, 8, 7.62),
    _card("RTX 4050 Laptop", ADA, 20, 6),
    _card("RTX 4060 Laptop", ADA, 24, 8),
    _card("RTX 4060 Ti", ADA, 34, 8, 7.62),
    _card("RTX 4060 Ti 16GB", ADA, 34, 16, 15.57),
    _card("RTX 4070", ADA, 46, 12, 11.60),
    _card("RTX 4070 Laptop", ADA, 36, 8),
    _card("RTX 4070 SUPER", ADA, 56, 12, 11.60),
    _card("RTX 4070 Ti", ADA, 60, 12, 11.70, report="Kwai-Kolors/Kolors#11"),
    _card("RTX 4070 Ti SUPER", ADA, 66, 16, 15.57),
    _card("RTX 4080", ADA, 76, 16, 15.57),
    _card("RTX 4080 Laptop", ADA, 58, 12),
    _card("RTX 4080 SUPER", ADA, 80, 16, 15.57),
    _card("RTX 4090", ADA, 128, 24, 23.52, report="Soul-AILab/SoulX-FlashTalk#5"),
    _card("RTX 4090 D", ADA, 114, 24),
    _card("RTX 4090 Laptop", ADA, 76, 16),
    _card("RTX 2000 Ada Laptop", ADA, 24, 8),
    _card("RTX 3000 Ada Laptop", ADA, 36, 8),
    _card("RTX 3500 Ada Laptop", ADA, 40, 12),
    _card("RTX 4000 Ada Laptop", ADA, 58, 12),
    _card("RTX 5000 Ada Laptop", ADA, 76, 16),
    _card("RTX 2000E Ada", ADA, 22, 16),
    _card("RTX 2000 Ada", ADA, 22, 16),
    _card("RTX 4000 Ada", ADA, 48, 20),
    _card("RTX 4500 Ada", ADA, 60, 24),
    _card("RTX 5000 Ada", ADA, 100, 32),
    _card("RTX 5880 Ada", ADA, 110, 48),
    _card("RTX 6000 Ada", ADA, 142, 48, 47.37, context_mib=426),
    _card("L4", ADA, 58, 24, 21.95),
    _card("L20", ADA, 92, 48),
    _card("L40", ADA, 142, 48, 44.40, report="QwenLM/Qwen3-VL#2097"),
    _card("L40S", ADA, 142, 48, 44.42, report="stepfun-ai/Step-Video-T2V#8"),
    _card("H100 80GB", HOPPER, 132, 80, 79.10),
    _card("H100 PCIe", HOPPER, 114, 80),
    _card("H800", HOPPER, 132, 80),
    _card("H20", HOPPER, 78, 96),
    _card("H20 141GB", HOPPER, 78, 141),
    _card("GH200 96GB", HOPPER, 132, 96),
    _card("GH200 144GB", HOPPER, 132, 144),
    _card("H100 NVL", HOPPER, 132, 94, 93.02),
    _card(
        "H200", HOPPER, 132, 141, 139.80, context_mib=_H200_CONTEXT, report="benchmarks/results/gpu/nvidia-h200.json"
    ),
    _card("RTX 5060", BLACKWELL, 30, 8, 7.52),
    _card("RTX 5050", BLACKWELL, 20, 8),
    _card("RTX 5050 Laptop", BLACKWELL, 20, 8),
    _card("RTX 5060 Laptop", BLACKWELL, 26, 8),
    _card("RTX 5060 Ti", BLACKWELL, 36, 8, 7.52),
    _card("RTX 5060 Ti 16GB", BLACKWELL, 36, 16, 15.46),
    _card("RTX 5070", BLACKWELL, 48, 12, 11.48),
    _card("RTX 5070 Laptop", BLACKWELL, 36, 8),
    _card("RTX 5070 Ti Laptop", BLACKWELL, 46, 12),
    _card("RTX 5070 Ti", BLACKWELL, 70, 16, 15.46),
    _card("RTX 5080", BLACKWELL, 84, 16, 15.46),
    _card("RTX 5080 Laptop", BLACKWELL, 60, 16),
    _card("RTX 5090 Laptop", BLACKWELL, 82, 24),
    _card("RTX 5090", BLACKWELL, 170, 32, 31.37, report="Wan-Video/Wan2.1#465"),
    _card("RTX 5090 D", BLACKWELL, 170, 32),
    _card("RTX 5090 D v2", BLACKWELL, 170, 24),
    _card("RTX PRO 2000 Blackwell", BLACKWELL, 34, 16),
    _card("RTX PRO 3000 Laptop", BLACKWELL, 46, 12),
    _card("RTX PRO 4000 Laptop", BLACKWELL, 60, 16),
    _card("RTX PRO 5000 Laptop", BLACKWELL, 82, 24),
    _card("RTX PRO 4000 Blackwell", BLACKWELL, 70, 24),
    _card("RTX PRO 4500 Blackwell", BLACKWELL, 82, 32),
    _card("RTX PRO 5000 Blackwell", BLACKWELL, 110, 48),
    _card("RTX PRO 5000 72GB", BLACKWELL, 110, 72),
    _card("RTX PRO 6000 Blackwell", BLACKWELL, 188, 96, 94.97),
    _card("B200", BLACKWELL_DATACENTER, 148, 180),
    _card("GB200", BLACKWELL_DATACENTER, 148, 186),
)

# Slices of cards (MIG): profile, multiprocessors, and the GiB that `nvidia-smi mig -lgip` prints, the least of several public
# prints. Without a size it is the slice's share of the card (NVIDIA's MIG user guide, "Supported MIG Profiles"), less 9 %.
_PROFILES = {
    "A30": "1g.6gb 14 5.81, 2g.12gb 28 11.69, 4g.24gb 56 23.44",
    "A100 40GB": "1g.5gb 14 4.75, 1g.10gb 14 9.62, 2g.10gb 28 9.62, 3g.20gb 42 19.5, 4g.20gb 56 19.5, 7g.40gb 98 39.25",
    "A100 80GB": "1g.10gb 14 9.5, 1g.20gb 14 19.5, 2g.20gb 28 19.5, 3g.40gb 42 39.25, 4g.40gb 56 39.25, 7g.80gb 98 78.5",
    "H100 80GB": "1g.10gb 16 9.75, 1g.20gb 26 19.62, 2g.20gb 32 19.62, 3g.40gb 60 39.38, 4g.40gb 64 39.38, 7g.80gb 132 79.12",
    "H100 NVL": "1g.12gb 16 10.62, 1g.24gb 26 21.5, 2g.24gb 32 21.5, 3g.47gb 60 46.12, 4g.47gb 64 46.12, 7g.94gb 132 92.62",
    "GH200 96GB": "1g.12gb 16 11, 1g.24gb 26 23, 2g.24gb 32 23, 3g.48gb 60 46.5, 4g.48gb 64 46.5, 7g.96gb 132 93",
    "H200": "1g.18gb 16 16, 1g.35gb 26, 2g.35gb 32 32.5, 3g.71gb 60, 4g.71gb 64, 7g.141gb 132 140",
    "RTX PRO 6000 Blackwell": "1g.24gb 46 23.62, 2g.48gb 94 47.38, 4g.96gb 188 95",
    "H100 PCIe": "1g.10gb, 1g.20gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb",
    "H20": "1g.12gb, 1g.24gb, 2g.24gb, 3g.48gb, 4g.48gb, 7g.96gb",
    "B200": "1g.23gb, 1g.45gb, 2g.45gb, 3g.90gb, 4g.90gb, 7g.180gb",
    "RTX PRO 5000 Blackwell": "1g.24gb, 2g.48gb",
    "RTX PRO 4500 Blackwell": "1g.16gb, 2g.32gb",
}
_SLICE_SHARE = 0.91  # of its share of the card, for a slice without a known size: the least of the known ones
_PROFILES |= {f"A800 {size}": _PROFILES[f"A100 {size}"] for size in ("40GB", "80GB")} | {"H800": _PROFILES["H100 80GB"]}

# Words that do not distinguish cards: makers, form factors, and what drivers and shops add.
_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|\bgpu\b|graphics|generation|with max-?q design|max-?q|blackwell|"
    r"\b(workstation|server|founders|sff)( edition)?\b|sxm\d?|\bpg\d+|hbm\d?e?|g?ddr\dx?|\b(dgxs|fhhl|hgx|dgx|mxm)\b|"
    # makers of boards, their series, and where cards are rented
    r"\b(asus|rog|strix|tuf|dual|proart|msi|ventus|(suprim|gaming)( x)?|trio|[23]x|x[23]|twin|vram|nvlink|lambda|evga|ftw3|gigabyte|aorus|eagle|windforce|pny|zotac|"
    r"trinity|palit|gainward|inno3d|kfa2|galax|colorful|igame|lenovo|dell|hp|oc|fe|pascal|google|colab( pro)?|kaggle|runpod|aws|azure|gcp)\b|"
    r"[^a-z0-9]"
)
_MEMORY = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*g(?:i?b|o|igs?)?\b")  # "80GB", "80 GiB", "12G", "24 Go"
_MEBIBYTES = re.compile(r"(?<![a-z0-9.])(\d{4,6})\s*mi?b\b")
_MEMORY_AS_SOLD = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb?)?")  # "12", "12GB", "12 G"; 12GiB is exact
_PLURAL = re.compile(r"\b(\d{4})s\b")  # "3090s"
_LAPTOP = re.compile(r"\b(laptop|mobile|notebook)\b|(?<=\d{4})m\b")  # "4090M"
_WORDS = re.compile(r"(?<![a-z\d])[a-z]{2,}\d?\b")
# Words that distinguish cards, and units; every other one that is not close to one of them is a maker's or a shop's
_TELLING = ("ti", "super", "laptop", "ada", "pro", "gtx", "rtx", "titan", "nvl", "pcie", "maxwell", "kepler", "gb")
_NUMBERS = {"two": 2, "dual": 2, "three": 3, "four": 4, "quad": 4, "eight": 8}
_SEVERAL = re.compile(  # "2x RTX 3090", "two 3090s", "T4 (x2)"; but an "iChill X3" is one card
    rf"^\s*(?:kaggle\s+)?(?:(\d{{1,2}})\s*[x×*]\s*(?=\S)|(\d{{1,2}}|{'|'.join(_NUMBERS)})\s+(?!x\s|gi?b\b)(?=\S))|"
    r"(?:(?<!ichill)(?<!twin)\s|\(|(?<=\d))[x×*]\s*(\d{1,2})\s*\)?\s*$"
)
# "3g.40gb+me"; in "1c.3g.40gb" several share the memory of one
_PROFILE = re.compile(r"(?<!c\.)\b([1-7]g\.\d+gb)\b([+-](me|gfx)(\.all)?)?")
_SLICE = re.compile(r"\bmig\b|\b\d+g\.\d+gb\b|-\d+[qcab]\s*$")  # of a card: MIG, and virtual GPUs such as "L40S-48Q"
_HERE = ("cpu", "gpu", "cuda", "auto", "local")
# Machines that are rented by name, and their card
_MACHINES = {
    r"g4dn|nc\d+as_t4_v3": "T4",
    r"g5g": "T4G",
    r"g5": "A10G",
    r"g6|gr6|g2-standard": "L4",
    r"g6e": "L40S",
    r"g7e|g4-standard": "RTX PRO 6000 Blackwell",
    r"p3|nc\d+r?s_v3": "V100 16GB",
    r"p3dn|nd\d+rs_v2": "V100 32GB",
    r"p4d|a2-(high|mega)gpu|nd\d+asr_v4": "A100 40GB",
    r"p4de|a2-ultragpu|nc\d+ads_a100_v4|nd\d+amsr_a100_v4": "A100 80GB",
    r"p5|a3-(high|mega|edge)gpu|nd\d+isr_h100_v5": "H100 80GB",
    r"nc\d+ads_h100_v5": "H100 NVL",
    r"p5en?|a3-ultragpu|nd\d+isr_h200_v5": "H200",
    r"p6-b200|a4-highgpu": "B200",
}
_LARGEST_GB = 2000
_AS_SOLD = 0.08  # a size this close to the nominal one means the nominal one: drivers report "15 GB" for a T4 with 16
_GRACE_HOST_GB = (120, 480)  # "GH200 480GB": the memory of the CPU on the same board, not the GPU's

# Names of devices that are no CUDA cards, or that share memory with the CPU
_OTHER_MAKERS = re.compile(
    r"\b(amd|radeon|instinct|intel|arc|gaudi\d?|hl-\d{3}|apple|tpu\w*|v\d\w*pod\S*|v[2-6][ep]?-\d+|ascend|910[bc]|mlu\d+|"
    r"moore threads|mtt|r9[67]00|80[456]0s|mi\d{2,3}[a-z]?|rx\s?\d{3,4}|\d{4}\s?(xtx?|gre)|gfx\d+|"
    r"w[67][5-9]00|igpu|macbook( air| pro)?|imac|mac (mini|studio|pro)|trainium\d?|inferentia\d?|(trn|inf)\d|"
    r"max 1[15]\d0|strix halo|ai max|m[1-9]( (pro|max|ultra))?)\b|^\s*([ab](3[1578]0|5[5-8]0|7[3-7]0)|b[56]0)\s*$"
)
_SHARED_MEMORY = re.compile(r"\b(jetson|orin|xavier|thor|tegra|dgx spark|spark|gb10)\b")


def _in_gb(name: str) -> str:
    """`name` in small letters, with a driver's `24564MiB` as `23.99gb`."""
    return _MEBIBYTES.sub(lambda found: f"{int(found[1]) / 1024:.2f}gb", name.lower())


def _key(name: str) -> str:
    """`"NVIDIA H100 80GB HBM3"` -> `"h100"`: the name without maker, form factor, memory and punctuation."""
    text = _PLURAL.sub(r"\1", _MEMORY.sub(" ", _in_gb(name)))
    text = re.sub(r"ti ?s\b", "ti super", re.sub(r"\b(\d{4}) pro\b", r"pro \1", text))
    laptop = "laptop" if _LAPTOP.search(text) else ""
    return _NOISE.sub("", _LAPTOP.sub(" ", text)) + laptop


def _without_shop_words(name: str) -> str:
    """`"PNY RTX 4070 Verto"` -> `"rtx 4070"`; a misspelt word that would distinguish a card stays."""

    def kept(found: re.Match[str]) -> str:
        return found[0] if get_close_matches(found[0], _TELLING, n=1, cutoff=0.6) else " "

    return _WORDS.sub(kept, name.lower()).strip()


def _without_prefix(key: str) -> str:
    return re.sub(r"^(rtx|gtx|titan)", "", key)


def _memory(name: str) -> float | None:
    """The memory size in GB that `name` contains, or None."""
    found = _MEMORY.search(_in_gb(name))
    return None if found is None or float(found[1]) in _GRACE_HOST_GB else float(found[1])


def split_count(name: str) -> tuple[int, str]:
    """`"2x RTX 3090"` -> `(2, "RTX 3090")`; `(1, name)` for the name of one card.

    Raises: UserError for 0 cards.
    """
    several = _SEVERAL.search(name.lower())
    if several is None or _OTHER_MAKERS.search(name.lower()):
        return 1, name
    count = next(filter(None, several.groups()))
    number = int(count) if count.isdigit() else _NUMBERS[count]
    if number < 1:
        raise UserError(
            f"--gpu {name!r} names no card; give one, or with --launch a number of them such as '2x RTX 3090'"
        )
    return number, (name[: several.start()] + name[several.end() :]).strip()


def find_card(name: str) -> Card:
    """The card with this name, as a driver, a shop or a user writes it.

    Case, spaces, "NVIDIA", "GeForce", a leading "RTX", the maker of the board and the form factor ("SXM4", "HBM3") do not matter.
    A memory size selects among cards with the same name. Without it ("A100") the result is the smaller card: what fits it fits
    both. "A100 80GB MIG 3g.40gb" is a slice of a card, "g5.xlarge" the card of a machine that is rented by this name.

    Raises:
        UserError: for an unknown name, with the closest names; for a size or a slice that the card does not have; for several
            cards; for devices that are no CUDA cards or share memory with the CPU.
    """
    count, one = split_count(name)
    if count != 1:
        raise UserError(
            f"--gpu {name!r}: name one card; for {count} of them, --gpu {one!r} --launch zero3 --num_processes {count}"
        )
    low = one.lower()
    if _SLICE.search(low):
        return _slice(name, low)
    if _SHARED_MEMORY.search(low):
        raise UserError(
            f"{name!r} shares its memory with the processor, so its name does not say how much CUDA can use; give that size "
            "with --gpu_memory, for instance --gpu_memory 48GiB"
        )
    bare = re.sub(r"(?<=\d\d\d)[\s-](\d{1,3})$", r" \1GB", low)  # "A100 40"
    spellings = [_card_of_machine(low), low, bare if _memory(bare) in _sizes(bare) else ""]
    if not _OTHER_MAKERS.search(low):
        spellings.append(_without_shop_words(low))
    for spelt in filter(None, spellings):
        if card := _matching(name, spelt):
            return card
    raise UserError(_why_unknown(name, low))


def _matching(name: str, spelt: str) -> Card | None:
    """The card whose name is `spelt`; None if there is none.

    Raises: UserError, about the `name` that was given, if such a card does not have the memory that `spelt` contains.
    """
    candidates, size = _of_this_name(spelt), _memory(spelt)
    if not candidates or size is None:
        exact = [card for card in candidates if _memory(card.name) is None]
        return min(exact or candidates, key=lambda card: card.total_bytes, default=None)
    sized = [card for card in candidates if abs(size / card.nominal_gib - 1) <= _AS_SOLD]
    if sized:
        return min(sized, key=lambda card: abs(size / card.nominal_gib - 1))
    there = " or ".join(f"{size:g}" for size in sorted(card.nominal_gib for card in candidates))
    raise UserError(f"--gpu {name!r}: that card comes with {there} GB; for another size give --gpu_memory {size:g}GB")


def _of_this_name(spelt: str) -> list[Card]:
    """The cards whose name is `spelt`, whatever their memory."""
    key = _key(spelt)
    found = [card for card in CARDS if _key(card.name) == key]
    if not found and key.endswith(("pcie", "nvl")):  # only an H100 differs by these form factors
        key = re.sub(r"(pcie|nvl)$", "", key)
        found = [card for card in CARDS if _key(card.name) == key]
    found = found or [card for card in CARDS if _key(card.name) == f"{key}laptop"]  # only sold in laptops
    short = _without_prefix(key)
    return found or [card for card in CARDS if short and _without_prefix(_key(card.name)) == short]


def _sizes(spelt: str) -> set[float]:
    return {card.nominal_gib for card in _of_this_name(spelt)}


def _card_of_machine(low: str) -> str:
    """`"g5.xlarge"` -> `"A10G"`: the card of a machine that is rented by this name; an empty string for other names."""
    found = re.fullmatch(r"(?:ml\.)?(.+)(?:\.\w+|-\d+g?)|(?:standard_)?(n[cd]\d\w+)", low.strip())
    machine = (found[1] or found[2]) if found else ""
    return next((card for names, card in _MACHINES.items() if re.fullmatch(names, machine)), "")


def _slice(name: str, low: str) -> Card:
    """The MIG slice of a card, such as "A100 80GB MIG 3g.40gb".

    Raises: UserError for a slice without its card or profile, a profile that the card does not have, and a virtual GPU.
    """
    found = _PROFILE.search(low)
    if found is None:
        size = re.search(r"-(\d+)[qcab]\s*$", low)
        raise UserError(
            f"--gpu {name!r} is a slice of a card; give its memory, for instance --gpu_memory {size[1] if size else 10}GiB, or the "
            "card with a MIG profile, such as 'A100 80GB MIG 3g.40gb'"
        )
    profile = found[1]
    card = re.sub(r"\bmig\b", " ", low[: found.start()] + low[found.end() :]).strip(" -_,()")
    owners = [owner for owner, profiles in _PROFILES.items() if profile in profiles]
    if not card:
        example = f", such as '{owners[0]} MIG {profile}'" if owners else ""
        raise UserError(f"--gpu {name!r} is a slice of a card; name the card too{example}")
    whole = find_card(card)
    same = [whole] if _memory(card) else [one for one in CARDS if _key(one.name) == _key(whole.name)]
    slices = [_slice_of(one, profile) for one in same if profile in _PROFILES.get(one.name, "")]
    if not slices:
        there = re.findall(r"\S+gb", _PROFILES.get(whole.name, ""))
        has = f"the {whole.name} has {', '.join(there)}" if there else f"the {whole.name} cannot be sliced"
        raise UserError(f"--gpu {name!r}: there is no such slice; {has}")
    return min(slices, key=lambda card: card.total_bytes)


def _slice_of(card: Card, profile: str) -> Card:
    entries = [entry.split() for entry in _PROFILES[card.name].split(", ")]
    most = max(int(name[0]) for name, *_ in entries)
    known = next(rest for name, *rest in entries if name == profile)
    nominal = float(profile[3:-2])
    share = min((1 / 8, 1 / 4, 1 / 2, 1), key=lambda share: abs(card.nominal_gib * share - nominal))
    multiprocessors = int(known[0]) if known else card.multiprocessors * int(profile[0]) // most
    return Card(
        name=f"{card.name} MIG {profile}",
        capability=card.capability,
        multiprocessors=multiprocessors,
        total_bytes=int(float(known[1]) * GIB) if len(known) > 1 else int(card.total_bytes * share * _SLICE_SHARE),
        context_bytes=_estimated_context(card.capability, multiprocessors),
        total_is_estimate=True,
        nominal_gib=nominal,
    )


def _why_unknown(name: str, low: str) -> str:
    """What to say of a name that is no card's."""
    if _OTHER_MAKERS.search(low):
        return (
            f"{name!r} is not predicted: predictions are for NVIDIA GPUs with CUDA. For a rough estimate by CUDA's rules give its "
            "memory, for instance --gpu_memory 24GiB"
        )
    if low.strip() in _HERE or re.fullmatch(r"\s*(cuda:)?\d\s*", low):
        return f"--gpu {name!r}: give the name of a card; for this machine's own leave --gpu out"
    if _MEMORY_AS_SOLD.fullmatch(low.strip()) or not _key(low):
        return f"--gpu {name!r} names no card; give a name such as 'RTX 4090', or its memory with --gpu_memory 24GB"
    parts = {card for part in re.split(r"[,/+&]| and ", low) if (card := _matching(name, part))}
    if len(parts) > 1:
        least = min(parts, key=lambda card: card.total_bytes)
        return f"--gpu {name!r}: name one card; of several the smallest decides, --gpu {least.name!r}"
    key = _key(low)
    short = _without_prefix(key)
    names = {_key(card.name): card.name for card in CARDS}
    near = [names[k] for k in get_close_matches(key, names, n=5, cutoff=0.5)]
    near = near or [card.name for card in CARDS if short and short in _key(card.name)][:5]
    if not near:
        return f"unknown GPU {name!r}; give a name such as 'RTX 4090' or 'A100 80GB', or its memory with --gpu_memory"
    return f"unknown GPU {name!r}; similar names are {', '.join(near)}; or give its memory with --gpu_memory"


def short_names(card: Card) -> tuple[str, ...]:
    """Shorter names by which `find_card` finds `card`, the shortest first: `("4090",)` for the RTX 4090, none for the L4."""
    without_maker = re.sub(r"^(RTX|GTX|TITAN|Quadro RTX) | Blackwell$", "", card.name)
    without_size = re.sub(r" \d+GB$", "", without_maker)
    names = dict.fromkeys((without_size, without_maker))
    return tuple(name for name in names if name != card.name and _finds(name, card))


def _finds(name: str, card: Card) -> bool:
    try:
        return find_card(name) is card
    except UserError:
        return False


def generic_card(memory: str) -> Card:
    """A card with `memory`, for `--gpu_memory`: the rules of Ampere.

    "24GiB" is usable memory, without a CUDA context. "24GB", "24 G" or a bare "24" is a card sold as 24 GB: it offers 24 GiB less
    2 %, as the RTX 3060, 4090 and 5090 report, and its context is that of 84 multiprocessors. A bare number of a million or more
    is bytes.

    Raises:
        UserError: if `memory` is not a size, or one that no card has.
    """
    sold = _MEMORY_AS_SOLD.fullmatch(memory.strip().lower())
    if sold is None or not 0 < float(sold[1]) < 10**6:
        nbytes = parse_bytes(memory)
        if nbytes > _LARGEST_GB * GIB:
            raise UserError(f"--gpu_memory {memory}: no card has {format_bytes(nbytes)}; give a size such as 24GiB")
        return Card(f"a card with {memory}", AMPERE, 84, nbytes, context_bytes=0, is_generic=True)
    size = float(sold[1])
    if not 1 <= size <= _LARGEST_GB:
        raise UserError(
            f"--gpu_memory {memory}: no card has {size:,g} GB; write the unit of another size, such as {sold[1]}MiB"
        )
    return Card(
        f"a card sold as {size:g} GB",
        AMPERE,
        84,
        int(size * _SOLD_SHARE * GIB),
        context_bytes=_estimated_context(AMPERE, 84),
        total_is_estimate=True,
        nominal_gib=size,
        is_generic=True,
    )


def card_of_device(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    total_bytes: int,
    free_bytes: int | None = None,
    own_bytes: int = 0,
    memory_fraction: float = 1.0,
    moves_to_host: bool = False,
) -> Card:
    """The card of this machine, from `torch.cuda.get_device_properties`: its real size, and the context of that card name.

    `free_bytes` is what CUDA reports as free (None: unknown), while this process holds `own_bytes` in addition to its context.
    The rest of the memory is used by other programs, such as a desktop. `memory_fraction` of the total is what PyTorch may reserve
    (`torch.cuda.set_per_process_memory_fraction`); 1 is no limit. `moves_to_host` as in `Card`.
    """
    try:
        known = find_card(name)
        context, estimate = known.context_bytes, known.context_is_estimate
    except UserError:
        context, estimate = _estimated_context(capability, multiprocessors), True
    taken = 0 if free_bytes is None else max(0, total_bytes - free_bytes - own_bytes - context)
    return Card(
        name,
        capability,
        multiprocessors,
        total_bytes,
        context_bytes=context,
        context_is_estimate=estimate,
        taken_bytes=taken,
        limit_bytes=int(total_bytes * memory_fraction) if memory_fraction < 1 else None,
        moves_to_host=moves_to_host,
    )

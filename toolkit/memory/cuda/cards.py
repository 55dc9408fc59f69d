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
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches

from toolkit.errors import UserError
from toolkit.units import GIB, MIB, parse_bytes

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
        return self.total_bytes - self.taken_bytes

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


# Words that do not distinguish cards: makers, form factors, and what drivers and shops add.
_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|\bgpu\b|graphics|generation|with max-?q design|max-?q|blackwell|"
    r"(workstation|server|founders) edition|\bsff\b|sxm\d?|\bpg\d+|hbm\d?e?|g?ddr\dx?|\b(dgxs|fhhl|hgx|dgx|mxm)\b|"
    # makers of boards, their series, and where cards are rented
    r"\b(asus|rog|strix|tuf|dual|proart|msi|ventus|(suprim|gaming)( x)?|trio|[23]x|evga|ftw3|gigabyte|aorus|eagle|windforce|pny|zotac|"
    r"trinity|palit|gainward|inno3d|kfa2|galax|colorful|igame|lenovo|dell|hp|oc|fe|pascal|google|colab|kaggle|runpod|aws|azure|gcp)\b|"
    r"[^a-z0-9]"
)
_MEMORY = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*g(?:i?b)?\b")  # "80GB", "80 GiB", "12G"
_MEBIBYTES = re.compile(r"(?<![a-z0-9.])(\d{4,6})\s*mi?b\b")
_MEMORY_AS_SOLD = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb?)?")  # "12", "12GB", "12 G"; 12GiB is exact
_PLURAL = re.compile(r"\b(\d{4})s\b")  # "3090s"
_LAPTOP = re.compile(r"\b(laptop|mobile|notebook)\b")
_NUMBERS = {"two": 2, "dual": 2, "three": 3, "four": 4, "quad": 4, "eight": 8}
_SEVERAL = re.compile(
    rf"^\s*(?:(\d{{1,2}})\s*[x×*]\s*(?=\S)|(\d{{1,2}}|{'|'.join(_NUMBERS)})\s+(?!x\s|gi?b\b)(?=\S))|(?:\s|(?<=\d{{4}}))[x×*]\s*(\d{{1,2}})\s*$"
)
_SLICE = re.compile(r"\bmig\b|\b\d+g\.\d+gb\b|-\d+[qcab]\s*$")  # of a card: MIG, and virtual GPUs such as "L40S-48Q"
_LARGEST_GB = 2000
_AS_SOLD = 0.08  # a size this close to the nominal one means the nominal one: drivers report "15 GB" for a T4 with 16
_GRACE_HOST_GB = (120, 480)  # "GH200 480GB": the memory of the CPU on the same board, not the GPU's

# Names of devices that are no CUDA cards, or that share memory with the CPU
_OTHER_MAKERS = re.compile(
    r"\b(amd|radeon|instinct|intel|arc|gaudi\d?|apple|tpu|ascend|mi\d{2,3}[a-z]?|rx\s?\d{3,4}|\d{4}\s?(xtx?|gre)|gfx\d+|"
    r"w[67][5-9]00|igpu|macbook( air| pro)?|imac|mac (mini|studio|pro)|trainium\d?|inferentia\d?|trn\d|"
    r"max 1[15]\d0|strix halo|ai max|m[1-9]( (pro|max|ultra))?)\b|^\s*[ab](3[1578]0|5[5-8]0|7[3-7]0)\s*$"
)
_SHARED_MEMORY = re.compile(r"\b(jetson|orin|xavier|thor|tegra|dgx spark|spark|gb10)\b")


def _in_gb(name: str) -> str:
    """`name` in small letters, with a driver's `24564MiB` as `23.99gb`."""
    return _MEBIBYTES.sub(lambda found: f"{int(found[1]) / 1024:.2f}gb", name.lower())


def _key(name: str) -> str:
    """`"NVIDIA H100 80GB HBM3"` -> `"h100"`: the name without maker, form factor, memory and punctuation."""
    text = _PLURAL.sub(r"\1", _MEMORY.sub(" ", _in_gb(name)))
    laptop = "laptop" if _LAPTOP.search(text) else ""
    return _NOISE.sub("", _LAPTOP.sub(" ", text)) + laptop


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
    both.

    Raises:
        UserError: for an unknown name, with the closest names; for a size that the card does not have; for several cards and for
            a slice of one; for devices that are no CUDA cards or share memory with the CPU.
    """
    low = name.lower()
    count, one = split_count(name)
    if count != 1:
        raise UserError(
            f"--gpu {name!r}: name one card; for {count} of them, --gpu {one!r} --launch zero3 --num_processes {count}"
        )
    if _SLICE.search(low):
        raise UserError(
            f"--gpu {name!r} is a slice of a card; give the memory of the slice with --gpu_memory, for instance --gpu_memory 10GiB"
        )
    if _SHARED_MEMORY.search(low):
        raise UserError(
            f"{name!r} shares its memory with the processor, so its name does not say how much CUDA can use; give that size "
            "with --gpu_memory, for instance --gpu_memory 48GiB"
        )
    key, size = _key(name), _memory(name)
    candidates = [card for card in CARDS if _key(card.name) == key]
    if not candidates and key.endswith(("pcie", "nvl")):  # only an H100 differs by these form factors
        key = re.sub(r"(pcie|nvl)$", "", key)
        candidates = [card for card in CARDS if _key(card.name) == key]
    candidates = candidates or [card for card in CARDS if _key(card.name) == f"{key}laptop"]  # only sold in laptops
    short = _without_prefix(key)
    candidates = candidates or [card for card in CARDS if short and _without_prefix(_key(card.name)) == short]
    if candidates:
        if size is None:
            exact = [card for card in candidates if _memory(card.name) is None]
            return min(exact or candidates, key=lambda card: card.total_bytes)
        sized = [card for card in candidates if abs(size / card.nominal_gib - 1) <= _AS_SOLD]
        if sized:
            return min(sized, key=lambda card: abs(size / card.nominal_gib - 1))
        there = " or ".join(f"{card.nominal_gib:g}" for card in sorted(candidates, key=lambda card: card.nominal_gib))
        raise UserError(
            f"--gpu {name!r}: that card comes with {there} GB; for another size give --gpu_memory {size:g}GB"
        )
    if bare := re.search(r"\s(\d{1,3})$", low):  # "A100 40"
        with suppress(UserError):
            if (card := find_card(f"{name}GB")).nominal_gib == int(bare[1]):
                return card
    if _OTHER_MAKERS.search(low):
        raise UserError(
            f"{name!r} is not predicted: predictions are for NVIDIA GPUs with CUDA. For a rough estimate by CUDA's rules give its "
            "memory, for instance --gpu_memory 24GiB"
        )
    names = {_key(card.name): card.name for card in CARDS}
    near = [names[k] for k in get_close_matches(key, names, n=5, cutoff=0.5)]
    near = near or [card.name for card in CARDS if short and short in _key(card.name)][:5]
    if not near:
        raise UserError(
            f"unknown GPU {name!r}; give a name such as 'RTX 4090' or 'A100 80GB', or its memory with --gpu_memory"
        )
    raise UserError(f"unknown GPU {name!r}; similar names are {', '.join(near)}; or give its memory with --gpu_memory")


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
        return Card(f"a card with {memory}", AMPERE, 84, parse_bytes(memory), context_bytes=0)
    size = float(sold[1])
    if size > _LARGEST_GB:
        raise UserError(
            f"--gpu_memory {memory}: no card has {size:,g} GB; write the unit of another size, such as {memory.lower().strip(' gb')}MiB"
        )
    return Card(
        f"a card sold as {size:g} GB",
        AMPERE,
        84,
        int(size * _SOLD_SHARE * GIB),
        context_bytes=_estimated_context(AMPERE, 84),
        total_is_estimate=True,
        nominal_gib=size,
    )


def card_of_device(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    total_bytes: int,
    free_bytes: int | None = None,
    own_bytes: int = 0,
) -> Card:
    """The card of this machine, from `torch.cuda.get_device_properties`: its real size, and the context of that card name.

    `free_bytes` is what CUDA reports as free (None: unknown), while this process holds `own_bytes` in addition to its context.
    The rest of the memory is used by other programs, such as a desktop.
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
    )

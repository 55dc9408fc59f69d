"""`footprint doctor`: what this machine has, what it means for a run, and what to change, each with its command."""

import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from io import StringIO
from pathlib import Path

from toolkit.errors import UserError, words_of
from toolkit.memory.cuda.cards import Card, card_of_device
from toolkit.memory.environment import stack_versions, version_of
from toolkit.runs import machine
from toolkit.units import GIB, format_bytes
from toolkit.version import __version__

NEIGHBOURS = ("torchvision", "torchaudio", "torchao", "flash-attn", "liger-kernel", "xformers", "trl")
# PEFT asks for torchao's version whenever it adds LoRA to a layer, and raises ImportError for an older one
OLDEST_TORCHAO = "0.16"
LEAST_MEMORY = 2 * GIB  # the libraries of a run take 0.5 GiB before it loads anything
LEAST_DISK = {"hub cache": 20 * GIB, "this folder": 5 * GIB, "temporary files": GIB}
LEAST_SHARED_MEMORY = GIB
SHARE_OF_OTHERS = 0.05  # of a card: a desktop alone takes less
# of each trained parameter: in fp32 its weight, gradient and two moments, in 16 bits a weight and a gradient
BYTES_OF_OFFLOADED_STATE = 20


class Verdict(StrEnum):
    """What a finding means. A problem stops or spoils a run; advice makes one better, or is for some runs alone."""

    OK = "ok"
    ADVICE = "advice"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Every finding that is not `ok` says what to do, and most give the command."""

    what: str
    value: str
    verdict: Verdict = Verdict.OK
    advice: str = ""
    command: str = ""


def diagnose(launch: str | None = None) -> Iterator[Finding]:
    """Looks at this machine and the launch file `launch` (None: the one that accelerate uses by default), the quickest things first.

    A check that fails becomes a finding itself.

    Raises: UserError if there is no such launch file.
    """
    from toolkit.distributed.folders import find_launch_file

    file = find_launch_file(launch) if launch is not None else None
    yield Finding(
        "footprint", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    )
    yield from _examined("versions", _versions())
    yield from _examined("host memory", _memory())
    yield from _examined("disk", _disks())
    try:
        seen = machine.pytorch()
    except Exception as error:
        command = "pip install --force-reinstall torch"
        yield Finding(
            "PyTorch", f"cannot be imported ({words_of(error)})", Verdict.PROBLEM, "install it again", command
        )
        return
    yield from _examined("GPU", _gpus(seen))
    yield from _examined("allocator", _allocator())
    yield from _examined("bitsandbytes", _bitsandbytes(seen))
    yield from _examined("DeepSpeed", _deepspeed(seen))
    yield from _examined("launch file", _launch(file, seen))


def _examined(what: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from findings
    except Exception as error:
        yield Finding(what, "unknown", Verdict.ADVICE, f"the check failed ({words_of(error)}); look at it yourself")


def _versions() -> Iterator[Finding]:
    """Versions of the libraries, and every pair of them that their own packages exclude."""
    from packaging.requirements import Requirement

    yield Finding("versions", ", ".join(f"{name} {number}" for name, number in stack_versions().items()))
    for owner in ("footprint", *stack_versions(), *NEIGHBOURS):
        for text in _requirements(owner):
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            got = version_of(needed.name)
            if got is None and owner == "footprint":
                advice = "footprint needs it"
            elif got is not None and not needed.specifier.contains(got, prereleases=True):
                advice = f"{owner} {version_of(owner)} needs {needed.name}{needed.specifier}"
            else:
                continue
            command = f"pip install {shlex.quote(f'{needed.name}{needed.specifier}')}"
            yield Finding(needed.name, got or "not installed", Verdict.PROBLEM, advice, command)
    torchao = version_of("torchao")
    if torchao is not None and Requirement(f"torchao<{OLDEST_TORCHAO}").specifier.contains(torchao, prereleases=True):
        advice = f"PEFT adds no LoRA while a torchao before {OLDEST_TORCHAO} is installed"
        yield Finding("torchao", torchao, Verdict.PROBLEM, advice, f"pip install 'torchao>={OLDEST_TORCHAO}'")


def _requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _memory() -> Iterator[Finding]:
    memory = machine.host_memory()
    free = f"{format_bytes(memory.available_bytes)} free of {format_bytes(memory.total_bytes)}"
    value = free + (", the limit of this container" if memory.limited else "")
    if memory.available_bytes < LEAST_MEMORY:
        advice = "a model's weights pass through the host's memory while it is loaded; end other programs first"
        yield Finding("host memory", value, Verdict.ADVICE, advice, "ps aux --sort=-rss | head")
    else:
        yield Finding("host memory", value)
    shared = Path("/dev/shm")
    if shared.is_dir() and (free_bytes := machine.disk(shared).free_bytes) < LEAST_SHARED_MEMORY:
        advice = "workers that load data and several processes on GPUs exchange tensors there; a container takes more when it starts"
        yield Finding(
            "shared memory",
            f"{format_bytes(free_bytes)} free in {shared}",
            Verdict.ADVICE,
            advice,
            "docker run --shm-size=8g ...",
        )


def _disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "hub cache": (Path(HF_HUB_CACHE), "an 8B model in 16 bits takes 16 GB there", "export HF_HOME=/a/larger/disk"),
        "this folder": (
            Path.cwd(),
            "runs write to runs/ in it; for another place",
            "footprint train lora --output_dir /a/larger/disk/run",
        ),
        "temporary files": (
            Path(tempfile.gettempdir()),
            "compilers and pip write there",
            "export TMPDIR=/a/larger/disk",
        ),
    }
    for what, (folder, use, command) in places.items():
        disk = machine.disk(folder)
        value = f"{format_bytes(disk.free_bytes)} free in {folder}" + (
            ", which is host memory" if disk.in_memory else ""
        )
        if not disk.writable:
            yield Finding(what, f"{folder} cannot be written", Verdict.PROBLEM, use, command)
        elif disk.free_bytes < LEAST_DISK[what]:
            yield Finding(what, value, Verdict.ADVICE, use, command)
        else:
            yield Finding(what, value)


def _gpus(seen: machine.PyTorch) -> Iterator[Finding]:
    cards, driver = machine.driver_cards(), machine.driver_version()
    build = f"PyTorch {seen.version}, " + (
        f"built for CUDA {seen.cuda}" if seen.cuda else f"built for {seen.other or 'the CPU'}"
    )
    if not seen.gpus:
        yield _without_gpu(seen, build, cards, driver)
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    of_all = f"; CUDA_VISIBLE_DEVICES={visible} leaves {len(seen.gpus)} of {len(cards)}" if visible is not None else ""
    yield Finding("GPU", f"{build}; driver {driver or 'unknown'}{of_all}")
    for number, gpu in enumerate(seen.gpus):
        yield from _gpu(number, gpu, seen)
    names = {gpu.name for gpu in seen.gpus}
    if len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        advice = "PyTorch counts the fastest first, nvidia-smi by their slots; to count alike"
        yield Finding(
            "order of GPUs", "the cards differ", Verdict.ADVICE, advice, "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    slices = machine.mig_slices()
    if len(slices) > 1 and visible is None:
        advice = "CUDA gives a process one MIG slice, the first unless it is named"
        yield Finding(
            "MIG", f"{len(slices)} slices", Verdict.ADVICE, advice, f"export CUDA_VISIBLE_DEVICES={slices[0]}"
        )


def _without_gpu(seen: machine.PyTorch, build: str, cards: list[str], driver: str | None) -> Finding:
    """Why PyTorch can use no GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cards and seen.cuda is None:
        advice = f"this PyTorch cannot use the {cards[0]}; install the build for CUDA"
        command = f"pip install --force-reinstall torch=={seen.version.partition('+')[0]}"
        return Finding("GPU", build, Verdict.PROBLEM, advice, command)
    if cards and hidden is not None:
        advice = f"CUDA_VISIBLE_DEVICES={hidden} names none of this machine's cards: {', '.join(cards)}"
        return Finding("GPU", build, Verdict.PROBLEM, advice, "unset CUDA_VISIBLE_DEVICES")
    if driver is not None and seen.cuda is not None:
        advice = f"PyTorch cannot use the card ({seen.error}); the driver {driver} must know CUDA {seen.cuda}: install a newer driver, or a PyTorch for an older CUDA"
        return Finding("GPU", build, Verdict.PROBLEM, advice, "nvidia-smi | grep CUDA")
    if seen.other == "MPS":
        return Finding("GPU", f"{build}; runs train on it, without 4-bit weights and without predictions of its memory")
    if seen.other == "ROCm":
        return Finding("GPU", build, Verdict.ADVICE, "predictions know CUDA's allocator alone", "footprint gpus")
    advice = "runs train on the CPU; a prediction for a card needs none"
    return Finding("GPU", f"none; {build}", Verdict.ADVICE, advice, "footprint predict lora --gpu 'RTX 3090'")


def _gpu(number: int, gpu: machine.Gpu, seen: machine.PyTorch) -> Iterator[Finding]:
    """One GPU: its memory, who holds the rest, and what its architecture can do."""
    what = f"GPU {number}"
    major, minor = gpu.capability
    if gpu.free_bytes is None:
        advice = f"it cannot be used ({gpu.error}): another process has it for itself, or the driver must be restarted"
        yield Finding(what, gpu.name, Verdict.PROBLEM, advice, "nvidia-smi")
        return
    card = card_of_device(gpu.name, gpu.capability, gpu.multiprocessors, gpu.total_bytes, gpu.free_bytes)
    sizes = f"{format_bytes(card.budget_bytes)} free of {format_bytes(gpu.total_bytes)}"
    value = f"{gpu.name}: {sizes}; compute capability {major}.{minor} ({card.architecture}): {_abilities(card)}"
    if not _has_kernels(gpu.capability, seen.architectures):
        advice = f"this PyTorch has kernels for {', '.join(seen.architectures)} alone; install a version or a build that has sm_{major}{minor}"
        yield Finding(what, value, Verdict.PROBLEM, advice, "pip install --upgrade torch")
    elif card.taken_bytes > SHARE_OF_OTHERS * gpu.total_bytes:
        yield _taken(what, value, gpu, card)
    else:
        yield Finding(what, value)


def _taken(what: str, value: str, gpu: machine.Gpu, card: Card) -> Finding:
    """The finding for a card of which other programs hold a part."""
    held = f"other programs hold {format_bytes(card.taken_bytes)}"
    found = machine.holders(gpu.uuid)
    if not found:
        advice = f"{held}; which ones the driver does not tell from here (a desktop, or another container)"
        return Finding(what, value, Verdict.ADVICE, advice, "nvidia-smi")
    sizes = [
        f"{Path(one.name).name} (process {one.pid}" + (f", {format_bytes(one.nbytes)})" if one.nbytes else ")")
        for one in found[:3]
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    pids = ",".join(str(one.pid) for one in found)
    return Finding(what, value, Verdict.ADVICE, f"{held}: {', '.join(sizes)}{more}", f"ps -fp {pids}")


def _abilities(card: Card) -> str:
    """What follows from the compute capability."""
    if not card.has_bf16:
        return "no bf16 and no flash attention, so recipes compute in fp32 unless --fp16 is given"
    return "bf16, flash attention" + (", fp8" if card.capability >= (8, 9) else ", no fp8")


def _has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a build for `architectures` runs on a card: code runs on later cards of its generation, PTX on all later ones."""
    for name in architectures:
        kind, _, number = name.rstrip("af").partition("_")
        built = divmod(int(number), 10)
        same = kind == "sm" and built[0] == capability[0]
        if (same or kind == "compute") and built <= capability:
            return True
    return not architectures


def _allocator() -> Iterator[Finding]:
    name = next((name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if os.environ.get(name)), None)
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        advice = "PyTorch asks the driver for every tensor: slow, and not what is predicted"
        yield Finding(
            "allocator",
            "PYTORCH_NO_CUDA_MEMORY_CACHING",
            Verdict.PROBLEM,
            advice,
            "unset PYTORCH_NO_CUDA_MEMORY_CACHING",
        )
    elif name is not None:
        value = f"{name}={os.environ[name]}"
        if "cudaMallocAsync" in value:
            advice = "predictions replay PyTorch's own allocator, not CUDA's"
            yield Finding("allocator", value, Verdict.ADVICE, advice, f"unset {name}")
        else:
            yield Finding("allocator", value)


def _bitsandbytes(seen: machine.PyTorch) -> Iterator[Finding]:
    what, install = "bitsandbytes", "pip install --force-reinstall --no-deps bitsandbytes"
    if version_of(what) is None:
        if sys.platform != "linux":
            yield Finding(
                what, "not installed, so there are no 4-bit and 8-bit weights; it comes with footprint on Linux"
            )
        return  # on Linux `_versions` has said it
    try:
        from bitsandbytes.cextension import lib
    except Exception as error:
        yield Finding(what, f"cannot be imported ({words_of(error)})", Verdict.PROBLEM, "install it again", install)
        return
    if lib.compiled_with_cuda:
        yield Finding(what, f"{version_of(what)}, with CUDA kernels")
    elif seen.gpus:
        advice = f"it has no kernels for CUDA {seen.cuda}, so 4-bit and 8-bit weights fail; its own diagnosis"
        yield Finding(
            what, f"{version_of(what)}, without CUDA kernels", Verdict.PROBLEM, advice, "python -m bitsandbytes"
        )
    else:
        yield Finding(what, f"{version_of(what)}, with kernels for the CPU")


def _deepspeed(seen: machine.PyTorch) -> Iterator[Finding]:
    what = "DeepSpeed"
    if version_of("deepspeed") is None:
        if sys.platform != "linux":
            yield Finding(what, "not installed, so there is no ZeRO; it comes with footprint on Linux")
        return
    from toolkit.distributed.deepspeed import left_locks

    for lock in left_locks(("cpu_adam", "cpu_lion", "async_io")):
        advice = f"a build of {lock.parent.name} was killed, and DeepSpeed waits for its lock for ever"
        yield Finding(what, str(lock), Verdict.PROBLEM, advice, f"rm {shlex.quote(str(lock))}")
    missing = _not_compiled(seen)
    able = [name for name in ("cpu_adam", "async_io") if name not in missing]
    yield Finding(what, f"{version_of('deepspeed')}" + (f"; can compile {', '.join(able)}" if able else ""))
    for name, (why, command) in missing.items():
        use = "offloading the optimizer" if name == "cpu_adam" else "offloading to an NVMe disk"
        yield Finding(name, f"cannot be compiled: {why}", Verdict.ADVICE, f"{use} needs it", command)


def _not_compiled(seen: machine.PyTorch) -> dict[str, tuple[str, str]]:
    """The extensions that DeepSpeed cannot compile here: for each why, and the command that mends it. Nothing is compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import is_ninja_available

    if shutil.which(os.environ.get("CXX", "c++")) is None:
        why = "there is no C++ compiler", "apt install g++"
    elif not is_ninja_available():
        why = "there is no ninja", "pip install ninja"
    elif seen.cuda and (lacks := _lack_of_toolkit()):
        why = lacks, f"apt install cuda-toolkit-{seen.cuda.replace('.', '-')}"  # of NVIDIA's own package repository
    else:
        libaio = AsyncIOBuilder().is_compatible(verbose=False)
        return {} if libaio else {"async_io": ("there is no libaio", "apt install libaio-dev")}
    return dict.fromkeys(("cpu_adam", "async_io"), why)


def _lack_of_toolkit() -> str:
    """Why DeepSpeed compiles nothing with this machine's CUDA toolkit; empty if it does."""
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException, assert_no_cuda_mismatch

    try:
        with redirect_stdout(StringIO()):  # it prints where versions differ and it does not matter
            assert_no_cuda_mismatch()
    except (MissingCUDAException, CUDAMismatchException) as error:
        return str(error).removeprefix(">- DeepSpeed Op Builder: ")
    return ""


def _launch(file: Path | None, seen: machine.PyTorch) -> Iterator[Finding]:
    from accelerate.commands.config.config_args import default_config_file

    from toolkit.distributed.launch_files import read_launch_file

    if file is None and not Path(default_config_file).is_file():
        yield Finding("launch file", "none given; accelerate launch starts a process for each GPU")
        return
    path = Path(default_config_file) if file is None else file
    value = f"accelerate's default, {path}" if file is None else str(path)
    try:
        launch = read_launch_file(str(path))
        engine = launch.engine
    except UserError as error:
        if file is None:  # it may be for a kind of machine that is not predicted
            yield Finding("launch file", value, Verdict.ADVICE, str(error), "accelerate config")
        else:
            yield Finding("launch file", value, Verdict.PROBLEM, str(error), f"cat {shlex.quote(str(file))}")
        return
    yield Finding("launch file", f"{value}: {engine}" if launch.processes > 1 else f"{value}: one process")
    yield from _launched_processes(path, launch.processes // launch.machines, seen)
    yield from _launched_precision(path, launch.env, seen)
    if engine.kind.is_zero and version_of("deepspeed") is None:
        yield Finding(
            "engine", str(engine.kind), Verdict.PROBLEM, "DeepSpeed is not installed", "pip install deepspeed"
        )
        return
    if engine.offloads:
        yield from _offload(engine.optimizer_state, engine.parameters, launch.env, seen)


def _launched_processes(path: Path, local: int, seen: machine.PyTorch) -> Iterator[Finding]:
    there = len(seen.gpus)
    command = f"accelerate launch --config_file {shlex.quote(str(path))}"
    if not there and local > 1:
        advice = f"{local} processes and no GPU: for a rehearsal on the CPU append --use_cpu to the recipe"
        rehearsal = f"footprint train lora --launch {shlex.quote(str(path))} --use_cpu"
        yield Finding("processes", str(local), Verdict.ADVICE, advice, rehearsal)
    elif there and local > there:
        advice = f"each process needs a GPU of its own, and there {'is' if there == 1 else 'are'} {there}"
        yield Finding("processes", str(local), Verdict.PROBLEM, advice, f"{command} --num_processes {there} ...")


def _launched_precision(path: Path, env: Mapping[str, str], seen: machine.PyTorch) -> Iterator[Finding]:
    asked = env.get("ACCELERATE_MIXED_PRECISION", "no")
    without = [gpu.name for gpu in seen.gpus if gpu.capability < (8, 0)]
    if asked == "fp8":
        advice = "no recipe computes in fp8; without a precision in the file the recipe chooses"
    elif asked == "bf16" and without:
        advice = f"the {without[0]} has no bf16; without a precision in the file the recipe chooses"
    else:
        return
    command = f"accelerate launch --config_file {shlex.quote(str(path))} --mixed_precision no ..."
    yield Finding("precision", asked, Verdict.PROBLEM, advice, command)


def _offload(optimizer_state: str, parameters: str, env: Mapping[str, str], seen: machine.PyTorch) -> Iterator[Finding]:
    """Whether the host has what offloading needs."""
    from toolkit.distributed.deepspeed import requested_zero

    if "cpu" in (optimizer_state, parameters):
        free = machine.host_memory().available_bytes
        most = free / BYTES_OF_OFFLOADED_STATE / 1e9
        value = f"{format_bytes(free)} of host memory hold the state of at most {most:.1f} billion trained parameters"
        yield Finding("offload", value)
    needed = ["cpu_adam"] if optimizer_state != "with the model" else []
    needed += ["async_io"] if "nvme" in (optimizer_state, parameters) else []
    missing = _not_compiled(seen)
    for name in (name for name in needed if name in missing):
        why, command = missing[name]
        yield Finding("offload", name, Verdict.PROBLEM, f"DeepSpeed cannot compile it: {why}", command)
    if "nvme" not in (optimizer_state, parameters):
        return
    zero = requested_zero(None, env)
    parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    for folder in sorted({part["nvme_path"] for part in parts if part.get("nvme_path")}):
        disk = machine.disk(Path(folder))
        value = f"{format_bytes(disk.free_bytes)} free in {folder}"
        if disk.in_memory:
            advice = "that is the host's memory, not a disk; give nvme_path a folder on one"
            yield Finding("offload", value, Verdict.PROBLEM, advice, f"df -h {shlex.quote(folder)}")
        elif not disk.writable:
            yield Finding("offload", f"{folder} cannot be written", Verdict.PROBLEM, "give another nvme_path", "df -h")
        else:
            yield Finding("offload", value)

"""What this machine has: memory and disks of the host, and GPUs as PyTorch and the driver see them. Nothing is judged here."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit.errors import words_of
from toolkit.units import MIB

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
DRIVER = Path("/proc/driver/nvidia")
_WSL = "/usr/lib/wsl/lib"  # where Windows' driver puts nvidia-smi for Linux
_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class HostMemory:
    """The host's memory in bytes, as far as this process may use it."""

    total_bytes: int
    available_bytes: int
    limited: bool  # by a container or a batch system, below what the machine has


@dataclass(frozen=True)
class Disk:
    """The disk under a folder that may not exist yet."""

    free_bytes: int
    in_memory: bool  # what is written there takes host memory
    writable: bool


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU; `nbytes` is None where the driver does not tell (on Windows)."""

    pid: int
    name: str
    nbytes: int | None


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one, as PyTorch sees it. `free_bytes` is None if it cannot be used, for the reason `error`."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int
    free_bytes: int | None
    uuid: str = ""
    error: str = ""


@dataclass(frozen=True)
class PyTorch:
    """The installed PyTorch: what it was built for, and the GPUs that it can use, or why it cannot use any."""

    version: str
    cuda: str | None  # version of CUDA that it was built for; None: without CUDA
    other: str = ""  # "ROCm", "MPS" or nothing
    architectures: tuple[str, ...] = ()  # for which it has kernels, such as sm_86
    gpus: tuple[Gpu, ...] = ()
    error: str = ""  # what it says when CUDA cannot be used


def host_memory() -> HostMemory:
    """The memory of this machine, or of the control group in which this process runs, where that has less.

    A group's page cache that can be dropped at once (`inactive_file`) counts as available, as the kernel's own figure does.
    """
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _cgroup_limits():
        if limit < memory.total:
            total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total, available, limited=total < memory.total)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of this process's control group and those around it, in both versions of control groups."""
    lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # no limit is "max", or no file at the root
                limit, used = (int((group / name).read_text()) for name in names[:2])
                cached = re.search(rf"^{names[2]} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                yield limit, used - (int(cached[1]) if cached else 0)


def disk(folder: Path) -> Disk:
    """The disk that `folder` is on, or will be."""
    there = _existing(folder)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if there.resolve().is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    return Disk(shutil.disk_usage(there).free, kind in ("tmpfs", "ramfs"), os.access(there, os.W_OK))


def same_disk(first: Path, second: Path) -> bool:
    """Whether two folders, which need not exist yet, are in one file system."""
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def _existing(folder: Path) -> Path:
    """`folder`, or the first folder around it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def nvidia_smi(*arguments: str) -> list[list[str]]:
    """The lines that `nvidia-smi` prints, split at commas; none where it is missing or fails."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL)
    if program is None:
        return []
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def driver_cards() -> list[str]:
    """The names of NVIDIA's cards that the driver knows, whatever PyTorch can use."""
    if found := nvidia_smi("--query-gpu=name", "--format=csv,noheader"):
        return [", ".join(line) for line in found]
    files = sorted(DRIVER.glob("gpus/*/information"))
    models = [re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return [model[1].strip() for model in models if model]


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    if found := nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"):
        return found[0][0]
    file = DRIVER / "version"
    found_in_file = re.search(r"\s(\d+\.[\d.]+)\s", file.read_text(encoding="utf-8")) if file.exists() else None
    return found_in_file[1] if found_in_file else None


def driver_moves_to_host() -> bool:
    """Whether this machine's driver moves GPU memory that does not fit to the host, where every access is much slower.

    Drivers for Windows do since version 536.40, unless "CUDA - Sysmem Fallback Policy" in NVIDIA's control panel forbids it
    (nvidia.custhelp.com/app/answers/detail/a_id/5490), and under WSL even then (microsoft/WSL#11050). Those for data centres (TCC) do not.
    """
    if sys.platform == "win32":
        return ["TCC"] not in nvidia_smi("--query-gpu=driver_model.current", "--format=csv,noheader")
    return "microsoft" in platform.release().lower()  # WSL's kernel


def holders(uuid: str) -> list[Holder]:
    """The other processes that hold memory of the GPU with this `uuid`, the largest first; those in other containers are not seen."""
    lines = nvidia_smi(
        "--query-compute-apps=gpu_uuid,pid,process_name,used_gpu_memory", "--format=csv,noheader,nounits"
    )
    found = [
        Holder(int(pid), ", ".join(name), int(size) * MIB if size.isdigit() else None)
        for gpu, pid, *name, size in (line for line in lines if len(line) > 3)
        if gpu == uuid and pid != str(os.getpid())
    ]
    return sorted(found, key=lambda holder: -(holder.nbytes or 0))


def mig_slices() -> list[str]:
    """The UUIDs of the MIG slices of this machine's cards."""
    return re.findall(r"UUID: (MIG-[^)]+)", "\n".join(", ".join(line) for line in nvidia_smi("-L")))


def pytorch() -> PyTorch:
    """The installed PyTorch and the GPUs that it can use. It starts CUDA on each, to ask for its free memory."""
    import torch

    other = "ROCm" if torch.version.hip else "MPS" if torch.backends.mps.is_available() else ""
    seen = PyTorch(str(torch.__version__), torch.version.cuda, other)
    if torch.version.cuda is None:
        return seen
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return PyTorch(seen.version, seen.cuda, other, error=words_of(error))
    gpus = tuple(_gpu(number) for number in range(torch.cuda.device_count()))
    return PyTorch(seen.version, seen.cuda, other, tuple(torch.cuda.get_arch_list()), gpus)


def _gpu(number: int) -> Gpu:
    import torch

    card = torch.cuda.get_device_properties(number)
    free, error = None, ""
    try:
        free = torch.cuda.mem_get_info(number)[0]
    except RuntimeError as caught:  # another process has it for itself, or it has failed
        error = words_of(caught)
    capability = (card.major, card.minor)
    return Gpu(card.name, capability, card.multi_processor_count, card.total_memory, free, f"GPU-{card.uuid}", error)

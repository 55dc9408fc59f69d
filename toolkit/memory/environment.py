"""The library versions and the device name that a ledger records."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def version_of(library: str) -> str | None:
    """The version of an installed library; None if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def stack_versions() -> dict[str, str]:
    """Versions of the installed libraries that memory depends on."""
    return {name: version for name in LIBRARIES if (version := version_of(name)) is not None}


def device_name(device: torch.device) -> str:
    """`"cpu"`, or the name of the card as its driver reports it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return device.type

"""What a ledger says about where it came from: library versions and the device's name."""

from importlib import metadata

import torch

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def stack_versions() -> dict[str, str]:
    """The installed versions of the libraries that memory depends on; those that are not installed are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name(device: torch.device) -> str:
    """`"cpu"`, or the card's name as its driver gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""The shapes of popular models by hub id, so that a prediction needs neither network access nor a licence.

`catalogue.yaml` has one line for each model, and says what stands in a line. A test builds every line without weights and
compares the number of parameters with the published one. PyTorch and transformers are imported where they are needed, so that
the name of a model is checked within a second.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from toolkit.errors import guarded

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

FILE = Path(__file__).with_suffix(".yaml")
MIRRORS = ("unsloth", "nousresearch")  # owners that publish the models of others under the same names
IN_4_BITS = "-bnb-4bit"  # ends the names of copies that are stored in bitsandbytes' 4 bits, as `STORED_IN_4_BITS` says
STORED_IN_4_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
_REBUILT = ("phi3",)  # architectures whose models a mirror has in another one; `FILE` has their lines


@dataclass(frozen=True)
class Entry:
    """One architecture. `names` are the hub ids that share it, such as a base model and its instruct variants."""

    names: tuple[str, ...]
    model_type: str
    parameters: int  # as published; tied weights count once
    fields: dict[str, Any]
    checked: str  # the day on which a test last compared `parameters`: "2026-11-27"

    @property
    def separate_head(self) -> bool:
        """Whether the checkpoint has a separate output embedding, even if the config class ties it: T5 1.1 and its like."""
        return self.model_type in ("t5", "mt5") and self.fields.get("tie_word_embeddings") is False


@cache
def entries() -> tuple[Entry, ...]:
    """The catalogue, in the order of the file."""
    lines = yaml.load(FILE.read_text(encoding="utf-8"), yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    fields = {name: line for name, line in lines.items() if isinstance(line, dict)}
    found = []
    for name, line in fields.items():
        same = [other for other, base in lines.items() if base == name]
        merged = fields[line["base"]] | line if "base" in line else line
        own = {
            key: value for key, value in merged.items() if key not in ("base", "checked", "parameters", "model_type")
        }
        found.append(Entry((name, *same), merged["model_type"], merged["parameters"], own, str(merged["checked"])))
    return tuple(found)


@cache
def _by_name() -> dict[str, Entry]:
    return {name.lower(): entry for entry in entries() for name in entry.names}


def names() -> list[str]:
    """All hub ids in the catalogue."""
    return [name for entry in entries() for name in entry.names]


def find(name: str) -> Entry | None:
    """The entry for a hub id (case does not matter) or a mirror of it (`unsloth/Llama-3.2-1B`), or None.

    A name with `IN_4_BITS` after it is the same model stored in bitsandbytes' 4 bits; a mixture of experts is not known so.
    """
    known = _by_name().get(name.lower())
    if known is None and name.lower().endswith(IN_4_BITS):
        whole = find(name[: -len(IN_4_BITS)])
        if whole is None or any("expert" in field or field == "quantization_config" for field in whole.fields):
            return None
        return replace(whole, names=(name,), fields=whole.fields | {"quantization_config": STORED_IN_4_BITS})
    owner, _, short = name.lower().partition("/")
    if known is None and owner in MIRRORS:
        same = [entry for other, entry in _by_name().items() if other.split("/")[-1] == short]
        known = same[0] if same and same[0].model_type not in _REBUILT else None
    return known


def similar(name: str, most: int = 3) -> list[str]:
    """Up to `most` hub ids of the catalogue that `name` may stand for, the nearest first: the owner is missing, or a letter is wrong."""
    by_short: dict[str, str] = {}
    for known in sorted(names(), key=lambda known: known.lower().split("/")[0] in MIRRORS):  # originals first
        by_short.setdefault(known.split("/")[-1].lower(), known)
    short = name.rstrip("/").split("/")[-1].lower().removesuffix(IN_4_BITS).removesuffix("-unsloth")
    near = [short] if short in by_short else get_close_matches(short, by_short, n=most, cutoff=0.75)
    return [by_short[one] for one in near]


def config_of(name: str) -> PreTrainedConfig | None:
    """A config of the hub id's architecture, or None if the catalogue does not have it."""
    from transformers import AutoConfig

    entry = find(name)
    return None if entry is None else AutoConfig.for_model(entry.model_type, **copy.deepcopy(entry.fields))


def separate_head(model: nn.Module, name: str) -> None:
    """Unties the output embedding of `model`, built from a config, if it is separate in the checkpoint `name` (hub id, folder).

    transformers 5 ties the output embedding of T5-like models in the config. It unties it if a checkpoint holds both embeddings
    with different values (FLAN-T5, T5 1.1, mT5, mT0). A model built without its checkpoint must do the same. Whether the head
    is separate is read from the catalogue, otherwise from the folder's weights, otherwise from `tie_word_embeddings` in
    config.json.
    """
    import torch
    from torch import nn

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    entry = find(name)
    if entry.separate_head if entry is not None else _is_separate_in(name, model):
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=head.weight.requires_grad)


def _is_separate_in(name: str, model: nn.Module) -> bool:
    import torch
    from transformers import PreTrainedConfig

    folder, head = Path(name).expanduser(), model.get_output_embeddings()
    keys = [
        f"{path}.weight" for path, module in model.named_modules() if module in (head, model.get_input_embeddings())
    ]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        found = [_first_rows(files, key) for key in keys]
        present = [rows for rows in found if rows is not None]
        return len(present) == 2 and not torch.equal(*present)
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("tie_word_embeddings") is False
    except (OSError, ValueError):
        return False


def _first_rows(files: list[Path], key: str) -> torch.Tensor | None:
    """The first rows of the tensor `key`, enough to compare two embeddings; None if no file holds it."""
    from safetensors import safe_open

    for file in files:
        with guarded(f"{file} cannot be read", "download it again"), safe_open(file, "pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118 - not a dictionary
                return tensors.get_slice(key)[:64]
    return None

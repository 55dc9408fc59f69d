"""Checkpoints that are stored quantized: which of them are trained, and which original to give instead of the others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.models import catalogue
from toolkit.models.arguments import ModelArguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # slow: names are checked before it is imported

# Endings of the names of quantized copies
FORMATS = r"gguf|ggml|awq|gptq|exl2|exl3|mlx|fp8|nvfp4|mxfp4|hqq|aqlm|quip|eetq|autoround|bnb|nf4|fp4"
DETAILS = (
    r"unsloth|[2-8][-_]?bits?|u?int[248]|w\d+a\d+|q\d(_\w+)*|iq\d(_\w+)*|f16|f32|gemm|gemv|marlin|sym|asym|"
    r"dynamic|quantized|imat|i1|g\d+|\d+g|\d(\.\d+)?bpw"
)
ENDING = re.compile(rf"[-_.]({FORMATS}|{DETAILS})$", re.IGNORECASE)
# In the last part of an id; all models of one owner are in MLX's format
NEVER_TRAINED = re.compile(
    r"(?:[-_.](?=[^/]*$)|^(?=mlx-community/))(gguf|ggml|awq|gptq|exl2|exl3|mlx|fp8|nvfp4)(?![a-z])", re.IGNORECASE
)
UNNAMED = {"model", "ggml-model", "pytorch_model", "adapter_model", "weights"}  # names of files that name no model
# They publish quantized copies of other owners' models under the model's name
COPYISTS = {"thebloke", "bartowski", "mradermacher", "quantfactory", "maziyarpanahi", "lmstudio-community", "ggml-org"}
COPYISTS |= {"casperhansen", "hugging-quants", "redhatai", "neuralmagic", "nm-testing", "ista-daslab", "mlx-community"}
TITLES = {"awq": "AWQ", "gptq": "GPTQ", "gguf": "GGUF", "fp8": "FP8", "mxfp4": "MXFP4", "mlx": "MLX"}


def method_of(config: PreTrainedConfig) -> str | None:
    """How the checkpoint of `config` is stored: "4bit" or "8bit" (by bitsandbytes), another library's method, or None."""
    stored = as_dict(config)
    if stored is None:
        return None
    method = str(getattr(stored.get("quant_method"), "value", stored.get("quant_method") or "bitsandbytes"))
    if method != "bitsandbytes":
        return method
    if {"bits", "group_size"} <= stored.keys():  # MLX names no method
        return "mlx"
    return "4bit" if stored.get("load_in_4bit") or stored.get("_load_in_4bit") else "8bit"


def as_dict(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The fields of `quantization_config` in the checkpoint's config.json; None if it is not quantized."""
    stored = getattr(config, "quantization_config", None) or getattr(config, "quantization", None)  # MLX's name
    return None if not stored else dict(stored if isinstance(stored, dict) else stored.to_dict())


def check_name(source: str) -> None:
    """Raises UserError for files and ids of a format that is never trained, without asking the hub; the message names the original."""
    path = Path(source).expanduser()
    files = [path] if not path.is_dir() else sorted(path.iterdir())
    ggufs = [file for file in files if file.suffix.lower() == ".gguf"]
    if ggufs and not (path / "config.json").is_file():
        raise UserError(
            f"{source} holds GGUF weights, which are made for inference alone; {_instead(source, ggufs[0].name)}"
        )
    if not path.exists() and (found := NEVER_TRAINED.search(source)):
        raise UserError(
            f"{source} is a model in {found[1].upper()}, a format that is made for inference alone; {_instead(source)}"
        )


def check_stored(args: ModelArguments, config: PreTrainedConfig) -> None:
    """Raises UserError for a checkpoint that is stored in a form that these flags do not train."""
    source, method = args.source, method_of(config)
    if method in ("4bit", "8bit"):
        flag = f"--load_in_{method}"
        if not getattr(args, f"load_in_{method}"):
            recipe = "recipes/qlora.py trains it" if method == "4bit" else f"recipes/qlora.py {flag} trains it"
            raise UserError(
                f"{source} is stored in bitsandbytes' {method[0]} bits: {recipe}, other adapters do with {flag}; for full "
                f"fine-tuning and LoRA without quantization, {_instead(source)}"
            )
    elif method == "mxfp4":
        if args.load_in_4bit or args.load_in_8bit:
            raise UserError(
                f"{source} is stored in MXFP4, which is converted to 16 bits while it is loaded and cannot be quantized again at once; "
                f"use recipes/lora.py, or {_instead(source, 'a copy in 16 bits')}"
            )
    elif method is not None:
        raise UserError(
            f"{source} is stored in {TITLES.get(method, method)}, which is not trained here; {_instead(source)}"
        )


def _instead(source: str, name: str = "") -> str:
    if " " in name:
        return f"give {name}"
    original = original_of(source, name)
    if original and "/" not in original:
        return f"give the original model, {original}, by its hub id (user/name)"
    return f"give the original, {original}" if original else "give the original model, which its README names"


def original_of(source: str, file: str = "") -> str | None:
    """The model of which `source` (hub id, folder or file) is a quantized copy, by its README or its name; None if neither tells.

    `file`: a file in the folder `source` whose name may tell it.
    """
    path = Path(source).expanduser()
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if path.exists() and readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")[:20_000]
        if found := re.search(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)[\"']?\s*$", text, re.MULTILINE):
            return found[1]
    owner, _, last = ("", "", path.resolve().name) if path.exists() else source.rpartition("/")
    for name in filter(None, (file, last.partition(":")[0])):  # "name-GGUF:Q4_K_M", as other programs write it
        plain = without_endings(name)
        if plain == name:
            continue
        known = [id for id in catalogue.names() if id.rpartition("/")[2].lower() == plain.lower() and "/" in id]
        if known:
            return known[0]
        if plain.lower() in UNNAMED:
            continue
        return f"{owner}/{plain}" if owner and owner.lower() not in COPYISTS else plain
    return None


def without_endings(name: str) -> str:
    """`name` without the endings of quantized copies: Llama-3.2-3B-Instruct-bnb-4bit becomes Llama-3.2-3B-Instruct."""
    while (shorter := ENDING.sub("", name)) != name:
        name = shorter
    return name

"""The model card of a run: base, data, scores, memory, and how to use the result."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from toolkit.config import Config
from toolkit.memory.ledger import Ledger
from toolkit.methods.base import PeftBased
from toolkit.models.heads import auto_class
from toolkit.tasks import TASKS
from toolkit.tasks.metrics import score_title
from toolkit.units import format_bytes


def model_card(config: Config, record: dict[str, Any], ledger: Ledger | None) -> str:
    """The README.md of a run folder, with the metadata block that the hub reads."""
    base = config.model.model_name_or_path
    metadata = ModelCardData(
        base_model=base if base and not config.model.is_local else None,
        library_name="peft" if isinstance(config.method, PeftBased) else "transformers",
        datasets=[config.data.dataset_name]
        if config.data.dataset_name and "/" in config.data.dataset_name and not config.data.is_local
        else None,
        tags=["footprint", config.method.name, config.data.task.replace("_", "-")],
    )
    parameters, data, versions = record["parameters"], record["data"], record["versions"]
    kinds = list(record["scores"]["base"])
    scores = [f"| {who} | " + " | ".join(f"{s[k]:.4f}" for k in kinds) + " |" for who, s in record["scores"].items()]
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {config.model.short_name}, fine-tuned with {config.method.name}",
        "",
        f"- **Base model**: {base or 'the tiny T5 that comes with footprint'}"
        + (" (random weights)" if config.model.random_weights else ""),
        f"- **Method**: {config.method.name}"
        + (f" ({config.method.paper})" if config.method.paper else "")
        + f"; {parameters['trainable']:,} of {parameters['all']:,} parameters trained",
        f"- **Data**: {data['name']}; "
        + "{train:,} rows to train, {validation:,} to validate, {test:,} to test".format(**data["rows"]),
        f"- **Fingerprint of the train split** (SHA-256): `{data['sha256']['train']}`",
        f"- **Seed**: {record['seed']}; **precision**: {record['precision']}; **time**: {record['seconds']:,.0f} s",
        "- **Stack**: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "",
        "## Scores on the test split",
        "",
        f"{TASKS[config.data.task].scoring}. The test split was scored once and chose nothing.",
        "",
        "| model | " + " | ".join(map(score_title, kinds)) + " |",
        "|---|" + "---:|" * len(kinds),
        *scores,
        "",
        *_memory_lines(ledger),
        "## Use",
        "",
        "```",
        f'footprint generate {_place(config)} "text"',
        "```",
        "",
        *_loading_lines(config, record),
        "The exact settings are in `config.yaml`, which `--config` reads.",
        "",
    ]
    return "\n".join(lines)


def _place(config: Config) -> str:
    folder = Path(config.training.output_dir).resolve()
    if config.training.push_to_hub:  # a local folder is nobody's business there
        return config.training.hub_model_id or folder.name
    return config.training.hub_model_id or str(folder)


def _loading_lines(config: Config, record: dict[str, Any]) -> list[str]:
    """How the result is loaded without this project: by PEFT, or by transformers for a whole model."""
    model, place = config.model, _place(config)
    if not config.method.trains:
        return []
    is_peft = isinstance(config.method, PeftBased)
    if is_peft and (model.random_weights or config.model_config.architectures is None):
        # random weights are drawn, and a multimodal checkpoint's language part is cut out, by this project alone
        lines = ["import toolkit", "", f'model = toolkit.load_run("{place}").model']
        return ["Its base is made by footprint, so footprint loads it:", "", "```python", *lines, "```", ""]
    is_head = config.task.model_kind == "head"
    kind = "AutoModelForSequenceClassification" if is_head else auto_class(config.model_config).__name__
    options = [f'revision="{model.model_revision}"'] if is_peft and model.model_revision else []
    options += [f"num_labels={len(record['label_names'])}"] if is_peft and is_head else []
    first = f"import {config.method.needs_import}" if config.method.needs_import else ""
    if is_peft:
        source = ", ".join([f'"{model.source}"', *options])
        lines = [
            *filter(None, [first]),
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer",
            "",
        ]
        lines += [f"base = {kind}.from_pretrained({source})", f'model = PeftModel.from_pretrained(base, "{place}")']
    else:
        lines = [f"from transformers import {kind}, AutoTokenizer", "", f'model = {kind}.from_pretrained("{place}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{place}")']
    who = "PEFT" if is_peft else "transformers"
    return [f"To load it with {who}:", "", "```python", *lines, "```", "", *_prompt_lines(config, record)]


def _prompt_lines(config: Config, record: dict[str, Any]) -> list[str]:
    """How the texts were given to the model in training."""
    if config.data.task == "chat":
        messages = 'messages = [{"role": "user", "content": "text"}]'
        rendered = "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
        return ["Its prompt is a conversation:", "", "```python", messages, rendered, "```", ""]
    prompt = config.data.prompt_template or record["prompt_template"]
    if prompt == "{text}":
        return []
    said = "Its prompt, with the text of a row in braces:"
    if "{text}" not in prompt:
        said = "Its prompt, with the columns of a row in braces; a paragraph whose columns are empty is left out:"
    return [said, "", "```text", prompt, "```", ""]


def _memory_lines(ledger: Ledger | None) -> list[str]:
    if ledger is None:
        return []
    return [
        "## Memory at the peak",
        "",
        f"Measured on {ledger.device}.",
        "",
        "| part | size |",
        "|---|---:|",
        *(
            f"| {name.replace('_', ' ')} | {format_bytes(size)} |"
            for name, size in ledger.categories_at_peak.items()
            if size
        ),
        "",
    ]

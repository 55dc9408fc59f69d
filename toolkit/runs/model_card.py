"""The model card of a run: base, data, scores, memory, and how to use the result."""

from typing import Any

from huggingface_hub import ModelCardData

from toolkit.config import Config
from toolkit.memory.ledger import Ledger
from toolkit.methods.base import PeftBased
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
        'footprint generate RUN_DIR "text"',
        "```",
        "",
        *(
            [f"To load it with PEFT, first `import {config.method.needs_import}`.", ""]
            if config.method.needs_import
            else []
        ),
        "The exact settings are in `config.yaml`, which `--config` reads.",
        "",
    ]
    return "\n".join(lines)


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

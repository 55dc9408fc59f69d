"""Hand-written situations, one module a split, and the notation that they are written in.

    # topic
    thing = a / b                 values of a slot that only this situation has
    A: text {slot~} | other text  a turn in its wordings; `{slot~}` is the value as first stated, perhaps a wrong one
    ~slot                         here the wrong value may be corrected
    => summary                    a wording of the summary; {A} and {B} become names or #PersonN# tags

Around the situation, exchanges of two turns (`X: ...  >>  Y: ...`) or of one: openings, small talk, corrections, closings.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal

Split = Literal["train", "validation", "test"]
Exchange = tuple[str, ...]


@dataclass
class Template:
    """One situation: `turns` are (speaker "A" or "B", wordings), or ("~", [slot]) where a correction may come."""

    name: str
    topic: str
    pools: dict[str, list[str]] = field(default_factory=dict)
    turns: list[tuple[str, list[str]]] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """Everything that one split may say."""

    templates: list[Template]
    names: list[str]
    cities: list[str]
    openings: list[Exchange]
    small_talk: list[Exchange]
    corrections: list[Exchange]
    closings: list[Exchange]


def load(split: Split) -> Material:
    """Reads the split's module: nothing in it is shared with another split."""
    source = import_module(f"{__name__}.{split}")
    return Material(
        templates=_templates(split, source.TEMPLATES),
        names=source.NAMES,
        cities=source.CITIES,
        openings=_exchanges(source.OPENINGS),
        small_talk=_exchanges(source.SMALL_TALK),
        corrections=_exchanges(source.CORRECTIONS),
        closings=_exchanges(source.CLOSINGS),
    )


def _exchanges(text: str) -> list[Exchange]:
    return [
        tuple(turn.split(": ", 1)[1].strip() for turn in line.split("  >>  ")) for line in text.splitlines() if line
    ]


def _templates(split: str, text: str) -> list[Template]:
    templates: list[Template] = []
    for line in filter(None, text.splitlines()):
        if line.startswith("# "):
            templates.append(Template(f"{split}-{len(templates)}", topic=line[2:]))
            continue
        template = templates[-1]
        if line.startswith("=> "):
            template.summaries.append(line[3:])
        elif line.startswith("~"):
            template.turns.append(("~", [line[1:]]))
        elif line[:3] in ("A: ", "B: "):
            template.turns.append((line[0], line[3:].split(" | ")))
        else:
            slot, values = line.split(" = ")
            template.pools[slot] = values.split(" / ")
    return templates

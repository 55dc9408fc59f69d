"""Small dialogues with summaries, in the layout of DialogSum, made from hand-written situations by a seeded generator.

The splits share no situation, no wording of a turn, a summary or an opening, and no name or city: a model that scores well on test
has learned to summarize, not to recognize. The first turn is always an opening, a fact may be corrected on the way
("no, make it Friday"), and small talk comes in between, so copying the first lines makes a poor summary.
"""

import random
import re
from dataclasses import dataclass

from toolkit.embedded.templates import Exchange, Material, Split, Template, load

DEFAULT_SIZES: dict[str, int] = {"train": 800, "validation": 100, "test": 200}
MAX_TURNS = 8

POOLS: dict[str, list[str]] = {
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "time": [
        "nine o'clock",
        "half past ten",
        "eleven",
        "noon",
        "two o'clock",
        "half past three",
        "four",
        "six",
        "seven",
    ],
    "price": [f"{n} dollars" for n in (12, 15, 18, 20, 25, 30, 36, 40, 45, 50, 60, 75, 80, 90)],
    "color": ["red", "blue", "green", "yellow", "black", "white", "brown", "orange", "purple", "grey"],
    "place": ["library", "museum", "town hall", "bus stop", "market", "church", "park", "post office", "old bridge"],
    "count2": ["two", "three", "four", "five", "six"],
    "number": [str(n) for n in (4, 7, 11, 16, 23, 28, 31, 42, 57, 64)],
}


@dataclass(frozen=True)
class Sample:
    """One dialogue with what is known about it; `skeletons` are its wordings before the slots were filled."""

    dialogue: str
    summary: str
    topic: str
    template: str
    turns: tuple[tuple[str, str], ...]
    facts: dict[str, str]
    skeletons: tuple[str, ...]
    summary_skeleton: str


def make_dialogues(split: Split, size: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """`size` different rows of `id`, `dialogue`, `summary` and `topic`; a smaller size is the beginning of a larger one.

    Raises:
        ValueError: if the split is unknown, or has fewer different dialogues than asked for.
    """
    if split not in DEFAULT_SIZES:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(DEFAULT_SIZES)}")
    samples = make_samples(split, DEFAULT_SIZES[split] if size is None else size, seed)
    return [
        {"id": f"{split}_{i}", "dialogue": sample.dialogue, "summary": sample.summary, "topic": sample.topic}
        for i, sample in enumerate(samples)
    ]


def make_samples(split: Split, size: int, seed: int = 0) -> list[Sample]:
    """The rows of `make_dialogues` with what the generator knows about them: for pretraining and tests."""
    rng = random.Random(f"{split}-{seed}")  # a string seeds through SHA-512: the same in every process
    material = load(split)
    samples: dict[str, Sample] = {}
    tries = 0
    while len(samples) < size:
        tries += 1
        if tries > 20 * size + 1000:
            raise ValueError(f"size {size} is more than the {split} split can give: ask for at most {len(samples)}")
        sample = make_sample(material, rng)
        samples.setdefault(sample.dialogue, sample)
    return list(samples.values())


def make_sample(material: Material, rng: random.Random) -> Sample:
    """Draws one dialogue from a split's material."""
    template = rng.choice(material.templates)
    slots = _fill(template, material, rng)
    opening = rng.choice(material.openings)
    # Turns alternate and the core begins with A, so an opening of one turn is B's and one of two turns is A's.
    x, y = ("A", "B") if len(opening) % 2 == 0 else ("B", "A")
    name = {"A": slots["A"], "B": slots["B"]}
    known = {x: "{X}" in " ".join(opening), y: "{Y}" in " ".join(opening)}

    wordings = _wordings(template, opening, material, rng, slots)
    tag = {x: "#Person1#", y: "#Person2#"}
    speakers = [(x, y)[i % 2] for i in range(len(wordings))]
    turns = tuple(
        (tag[speaker], _render(text, slots | {"X": name[x], "Y": name[y]} | local))
        for speaker, (text, local) in zip(speakers, wordings, strict=True)
    )
    people = {who: name[who] if known[who] else tag[who] for who in "AB"}
    skeleton = rng.choice(template.summaries)
    summary = _render(skeleton, slots | people)
    dialogue = "\n".join(f"{speaker}: {text}" for speaker, text in turns)
    facts = {slot: value for slot, value in slots.items() if slot not in "AB" and "~" not in slot and value in dialogue}
    facts |= {"asks": people["A"], "answers": people["B"]}
    skeletons = tuple(text for text, _ in wordings)
    return Sample(dialogue, summary, template.topic, template.name, turns, facts, skeletons, skeleton)


def _fill(template: Template, material: Material, rng: random.Random) -> dict[str, str]:
    """A value for each slot; `day2` differs from `day`, and `day~`, the value as first stated, from both where it is wrong."""
    slots = dict(zip(("A", "B", "n"), rng.sample(material.names, 3), strict=True))
    slots["city"], wrong_city = rng.sample(material.cities, 2)
    pools = POOLS | template.pools
    for slot, pool in pools.items():
        first, *others = rng.sample(pool, 3)
        slots[slot] = first
        if slot in ("day", "time"):
            slots[f"{slot}2"] = others[0]
        if f"~ {slot}" in {f"{who} {text[0]}" for who, text in template.turns}:
            slots[f"{slot}~"] = others[1]
    if ("~", ["city"]) in template.turns:
        slots["city~"] = wrong_city
    return slots


def _wordings(
    template: Template, opening: Exchange, material: Material, rng: random.Random, slots: dict[str, str]
) -> list[tuple[str, dict[str, str]]]:
    """The turns' wordings in order, each with slots of its own; decides on correction, small talk and closing."""
    core = [turn for turn in template.turns if turn[0] != "~"]
    room = MAX_TURNS - len(opening) - len(core)
    wrong = [slot[:-1] for slot in slots if slot.endswith("~")]
    corrected = bool(wrong) and room >= 2 and rng.random() < 0.5
    room -= 2 * corrected
    for slot in wrong:
        if not corrected:
            slots[f"{slot}~"] = slots[slot]

    turns: list[tuple[str, dict[str, str]]] = []
    breaks = [0]  # where small talk may come: before the core, or between an answer and the next question
    for who, texts in template.turns:
        if who != "~":
            turns.append((rng.choice(texts), {}))
            if who == "B":
                breaks.append(len(turns))
        elif corrected:
            old_new = {"old": slots[f"{texts[0]}~"], "new": slots[texts[0]]}
            turns += [(text, old_new) for text in rng.choice(material.corrections)]
    talk = rng.choice(material.small_talk)
    if room >= len(talk) and rng.random() < 0.6:
        at = rng.choice(breaks)
        turns[at:at] = [(text, {}) for text in talk]
        room -= len(talk)
    closing = rng.choice(material.closings)
    if room >= len(closing) and rng.random() < 0.6:
        turns += [(text, {}) for text in closing]
    return [(text, {}) for text in opening] + turns


def _render(text: str, slots: dict[str, str]) -> str:
    """Fills `{slot}`; `{Slot}` gives the value with a capital letter."""

    def value(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in slots:
            return slots[slot]
        filled = slots[slot[0].lower() + slot[1:]]
        return filled[0].upper() + filled[1:]

    return re.sub(r"\{([^}]+)\}", value, text)

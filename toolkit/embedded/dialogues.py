"""Small dialogues with summaries, in the layout of DialogSum, drawn from `frames`.

One speaker wants something; the other agrees, has a duty, proposes a day or asks for a price. Greetings and small talk surround
this. The summary combines wish and answer in one sentence. To write it, a model must find two turns, distinguish the speakers,
copy the wish and understand the answer. All splits share the vocabulary and the form of the summaries, which is to be learned.
No wording of a turn and no name occurs in two of train, validation and test.
"""

import random
from dataclasses import dataclass

from toolkit.embedded.frames import ACTIONS, DAYS, FRAMES, NAMES, PRICES, TIMES, Split

DEFAULT_SIZES: dict[str, int] = {"train": 800, "validation": 100, "test": 200}
SUMMARIES = {
    "yes": "{A} wants to {vp}, and {B} agrees.",
    "duties": "{A} wants to {vp}, but {B} has to {vp2}.",
    "days": "{A} wants to {vp}, and {B} proposes {day}.",
    "prices": "{A} wants to {vp}, and {B} asks for {price}.",
}


@dataclass(frozen=True)
class Sample:
    """A dialogue with its turns as (speaker's tag, text), its facts, its summary and the frames that it was made from."""

    topic: str
    turns: tuple[tuple[str, str], ...]
    facts: dict[str, str]
    summary: str
    frames: tuple[str, ...]

    @property
    def dialogue(self) -> str:
        """One line `#PersonN#: text` per turn."""
        return "\n".join(f"{who}: {text}" for who, text in self.turns)


def make_dialogues(split: Split, size: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """`size` different rows with the columns `id`, `dialogue`, `summary` and `topic`, the same in every process.

    Raises: ValueError for an unknown split.
    """
    if split not in DEFAULT_SIZES:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(DEFAULT_SIZES)}")
    samples = make_samples(split, DEFAULT_SIZES[split] if size is None else size, seed)
    return [
        {"id": f"{split}_{number}", "dialogue": sample.dialogue, "summary": sample.summary, "topic": sample.topic}
        for number, sample in enumerate(samples)
    ]


def make_samples(split: Split, size: int, seed: int = 0) -> list[Sample]:
    """`size` different samples of a split; a larger size begins with the samples of a smaller one."""
    rng = random.Random(f"{split}-{seed}")  # a string seeds through SHA-512: the same in every process
    samples: dict[str, Sample] = {}
    while len(samples) < size:
        sample = make_sample(split, rng)
        samples.setdefault(sample.dialogue, sample)
    return list(samples.values())


def make_sample(split: Split, rng: random.Random) -> Sample:
    """Draws one dialogue."""
    frames = FRAMES[split]
    names = dict(zip("ABn", rng.sample(NAMES[split], 3), strict=True))
    topic, wish = _action(rng, names["n"])
    _, duty = _action(rng, names["n"])
    facts = {"vp": wish, "vp2": duty, "day": rng.choice(DAYS), "price": rng.choice(PRICES)}

    outcome = rng.choice(tuple(SUMMARIES))
    opening = rng.choice(frames.exchanges("openings"))
    parts = [opening]
    if rng.random() < 0.5:
        parts.append(rng.choice([pair for pair in frames.exchanges("talk") if len(pair) == 2]))
    parts += [rng.choice(frames.exchanges("wishes")), rng.choice(frames.exchanges(outcome))]
    if rng.random() < 0.5:
        parts.append(rng.choice(frames.exchanges("closings")))
    said = [text for part in parts for text in part]

    first = len(opening) % 2  # turns alternate: after an opening of one turn, the second speaker wishes
    roles = "BA" if first else "AB"
    tags = {roles[0]: "#Person1#", roles[1]: "#Person2#"}
    slots = facts | {"X": names[roles[0]], "Y": names[roles[1]]}
    turns = tuple((tags[roles[i % 2]], text.format_map(slots)) for i, text in enumerate(said))
    greeted = " ".join(opening)
    people = {
        role: names[role] if "{" + slot + "}" in greeted else tags[role] for slot, role in zip("XY", roles, strict=True)
    }
    summary = SUMMARIES[outcome].format_map(facts | people)
    known = {"who": people["A"], "wish": wish, "answer": {"yes": "yes"}.get(outcome, "but")}
    known |= {"duties": {"duty": duty}, "days": {"day": facts["day"]}, "prices": {"price": facts["price"]}}.get(
        outcome, {}
    )
    return Sample(topic, turns, known, summary, tuple(said))


def _action(rng: random.Random, name: str) -> tuple[str, str]:
    """A topic and something to do, such as `paint the fence on Friday`."""
    topic = rng.choice(tuple(ACTIONS))
    verbs, objects = ACTIONS[topic]
    tails = (
        "",
        "",
        f" on {rng.choice(DAYS)}",
        f" at {rng.choice(TIMES)}",
        f" with {name}" if topic != "people" else "",
    )
    return topic, f"{rng.choice(verbs)} {rng.choice(objects)}{rng.choice(tails)}".format(name=name)

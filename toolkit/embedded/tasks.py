"""The tasks of pretraining: finding, copying and listing parts of a dialogue, but never summarizing it.

They use dialogues with their own sentence frames. In half of them some words are replaced by made-up words throughout, so that
the model learns to copy the text instead of familiar words.
"""

import random
import re
from dataclasses import replace

from toolkit.embedded.dialogues import Sample

INSTRUCTIONS = "Repeat: List the facts of the following conversation. Facts: What is said after this? Line: Next:"
QUESTIONS = {"who": "Who wishes something?", "wish": "What is the wish?", "duty": "Which duty?", "day": "Which day?"}
QUESTIONS |= {"price": "Which price?", "answer": "What is the answer?"}
KEPT = {"and", "the", "for", "with", "you", "not", "but"}


def example(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """(source, target) of a task drawn at random."""
    task = rng.choices((echo, facts, question, following), weights=(1, 4, 3, 2))[0]
    return task(disguise(sample, rng) if rng.random() < 0.5 else sample, rng)


def echo(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """Repeats a line in which some words are made up: the simplest task for learning to copy."""
    line = rng.choice(disguise(sample, rng).turns)[1]
    return f"Repeat: {line}", line


def facts(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """All facts, as `who: #Person1#; wish: paint the fence; answer: but; day: Friday`."""
    listed = "; ".join(f"{fact}: {value}" for fact, value in sample.facts.items())
    return f"List the facts of the following conversation.\n\n{sample.dialogue}\n\nFacts:", listed


def question(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """A question about one of the facts."""
    fact = rng.choice(tuple(sample.facts))
    return f"{QUESTIONS[fact]}\n\n{sample.dialogue}\n\nAnswer:", sample.facts[fact]


def following(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """The turn after a given one, word for word, with its speaker."""
    at = rng.randrange(1, len(sample.turns))
    source = f"What is said after this?\n\n{sample.dialogue}\n\nLine: {sample.turns[at - 1][1]} Next:"
    return source, ": ".join(sample.turns[at])


def disguise(sample: Sample, rng: random.Random) -> Sample:
    """The same sample with a third of its longer words replaced by made-up words in every place."""
    found = {word for _, text in sample.turns for word in re.findall(r"[A-Za-z]{4,}", text)}
    words = sorted(word for word in found if word not in KEPT)
    new = {word: made_up_word(rng) for word in words if rng.random() < 0.33}
    if not new:
        return sample
    pattern = re.compile(r"\b(" + "|".join(new) + r")\b")

    def say(text: str) -> str:
        return pattern.sub(lambda match: new[match[1]], text)

    turns = tuple((who, say(text)) for who, text in sample.turns)
    return replace(sample, turns=turns, facts={fact: say(value) for fact, value in sample.facts.items()})


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that does not exist, such as "tamori"."""
    parts = ("bcdfghjklmnprstvwz", "aeiou", ("", "", "n", "r", "s", "l", "t"))
    return "".join(rng.choice(part) for _ in range(rng.choice((1, 2))) for part in parts)

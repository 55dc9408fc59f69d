"""The tasks of pretraining: finding, copying and attributing what is said in a dialogue, but never summarizing it.

Each task turns a `Sample` into (source, target). They are made from the train split alone, and half of the samples have some words
replaced by made-up ones throughout, so that the model learns to copy what stands there rather than what it has seen.
"""

import random
import re
from dataclasses import replace

from toolkit.embedded.dialogues import POOLS, Sample

QUESTIONS = {
    "asks": "Who asks for something?",
    "answers": "Who gives the answer?",
    "n": "Who else is mentioned?",
    "day": "Which day is right in the end?",
    "day2": "Which other day is mentioned?",
    "time": "At what time?",
    "price": "How much is it?",
    "city": "Which city is it about?",
    "color": "Which color?",
    "place": "Where is it?",
}
INSTRUCTIONS = (
    "Answer the question about the following conversation. Question: Answer: "
    "List the facts of the following conversation. Facts: Who says this line of the following conversation? Line: Speaker: "
    "Repeat a line of the following conversation. After: Repeat: Rewrite a line of the following conversation. Rewritten: "
    "Summarize the following conversation. Summary: "
)
KEPT = {word.lower() for pool in POOLS.values() for value in pool for word in value.split()} | {"dollars", "person"}
THIRD = {"am": "is", "have": "has", "do": "does", "want": "wants", "need": "needs", "think": "thinks", "like": "likes"}


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that does not exist, such as "tamori"."""
    parts = ("bcdfghjklmnprstvwz", "aeiou", ("", "", "n", "r", "s", "l", "t"))
    return "".join(rng.choice(part) for _ in range(rng.choice((2, 2, 3))) for part in parts)


def example(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """(source, target) of a task drawn at random."""
    tasks = (echo, span_corruption, facts, question, speaker, repeat, third_person)
    task = rng.choices(tasks, weights=(3, 1, 3, 2, 1, 4, 4))[0]
    if rng.random() < 0.85:
        sample = window(sample, rng)
    return task(disguise(sample, rng) if rng.random() < 0.5 else sample, rng)


def echo(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """A line, once more: with most words made up, the shortest way to learn copying."""
    line = rng.choice(disguise(disguise(sample, rng), rng).turns)[1]
    return f"Repeat: {line}", line


def span_corruption(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """T5's own: spans of one to four words are replaced by sentinels, and the target lists them."""
    words = sample.dialogue.split()
    source: list[str] = []
    target: list[str] = []
    at = spans = 0
    while at < len(words):
        if rng.random() < 0.08:
            length = rng.randint(1, 4)
            source.append(f"<extra_id_{spans}>")
            target += [f"<extra_id_{spans}>", *words[at : at + length]]
            spans, at = spans + 1, at + length
        else:
            source.append(words[at])
            at += 1
    return " ".join(source), " ".join([*target, f"<extra_id_{spans}>"])


def facts(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """All known facts as `day: Friday; price: 20 dollars`, in the order of `QUESTIONS`."""
    listed = "; ".join(f"{fact}: {sample.facts[fact]}" for fact in QUESTIONS if fact in sample.facts) or "none"
    return f"List the facts of the following conversation.\n\n{sample.dialogue}\n\nFacts:", listed


def question(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """One of the facts, asked for in words."""
    fact = rng.choice([fact for fact in QUESTIONS if fact in sample.facts] or list(QUESTIONS))
    source = f"Answer the question about the following conversation.\n\n{sample.dialogue}\n\n"
    return f"{source}Question: {QUESTIONS[fact]} Answer:", sample.facts.get(fact, "unknown")


def speaker(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """Who says a given line."""
    who, line = rng.choice(sample.turns)
    source = f"Who says this line of the following conversation?\n\n{sample.dialogue}\n\nLine: {line} Speaker:"
    return source, who


def repeat(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """The line after a given one, word for word."""
    at = rng.randrange(1, len(sample.turns))
    source = f"Repeat a line of the following conversation.\n\n{sample.dialogue}\n\n"
    return f"{source}After: {sample.turns[at - 1][1]} Repeat:", ": ".join(sample.turns[at])


def third_person(sample: Sample, rng: random.Random) -> tuple[str, str]:
    """The line after a given one, with `I` and `you` replaced by who is meant."""
    at = rng.randrange(1, len(sample.turns))
    who, line = sample.turns[at]
    other = "#Person1#" if who == "#Person2#" else "#Person2#"
    line = re.sub(r"\bI (\w+)", lambda match: f"{who} {THIRD.get(match[1], match[1])}", line)
    for first, third in (("I", who), ("me", who), ("[Mm]y", f"{who}'s"), ("[Yy]ou", other), ("[Yy]our", f"{other}'s")):
        line = re.sub(rf"\b{first}\b", third, line)
    source = f"Rewrite a line of the following conversation.\n\n{sample.dialogue}\n\n"
    return f"{source}After: {sample.turns[at - 1][1]} Rewritten:", line


def window(sample: Sample, rng: random.Random) -> Sample:
    """Two to four consecutive turns of the sample, and the facts that are in them: short rows cost less."""
    size = rng.choice((2, 2, 3, 4))
    at = rng.randint(0, max(0, len(sample.turns) - size))
    turns = sample.turns[at : at + size]
    dialogue = "\n".join(f"{who}: {line}" for who, line in turns)
    facts = {fact: value for fact, value in sample.facts.items() if value in dialogue}
    return replace(sample, dialogue=dialogue, turns=turns, facts=facts)


def disguise(sample: Sample, rng: random.Random) -> Sample:
    """The same sample with up to half of its words replaced by made-up ones wherever they stand."""
    words = sorted(set(re.findall(r"[A-Za-z]{4,}", " ".join(line for _, line in sample.turns))))
    words = [word for word in words if word.lower() not in KEPT]
    new = {word: made_up_word(rng) for word in rng.sample(words, rng.randint(0, len(words) // 2))}
    if not new:
        return sample
    pattern = re.compile(r"\b(" + "|".join(new) + r")\b")

    def say(text: str) -> str:
        return pattern.sub(lambda match: new[match[1]].capitalize() if match[1][0].isupper() else new[match[1]], text)

    turns = tuple((who, say(line)) for who, line in sample.turns)
    dialogue = "\n".join(f"{who}: {line}" for who, line in turns)
    return replace(
        sample, dialogue=dialogue, turns=turns, facts={fact: say(value) for fact, value in sample.facts.items()}
    )

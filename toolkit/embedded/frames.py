"""The parts of the embedded dialogues: words that all splits share, and sentence frames that belong to one split each.

`{vp}` is a wish ("paint the fence on Friday"), `{vp2}` a duty; `{X}` and `{Y}` are the names of the first and second speaker.
Exchanges are written `first turn / second turn`, or as a single turn.
"""

from dataclasses import dataclass, fields
from typing import Literal

Split = Literal["pretraining", "train", "validation", "test"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TIMES = ["six", "seven", "eight", "nine", "ten", "eleven", "noon"]
PRICES = [f"{n} dollars" for n in (5, 12, 20, 25, 40, 60, 75, 90)]
CITIES = ["Berlin", "Lisbon", "Oslo", "Chicago", "Madrid", "Toronto", "Vienna", "Boston", "Dublin", "Prague"]
NAMES: dict[Split, list[str]] = {
    "train": [
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Irene",
        "Jack",
        "Karen",
        "Leo",
        "Maria",
        "Nick",
        "Olga",
        "Paul",
    ],
    "validation": ["Rosa", "Simon", "Tina", "Victor", "Wendy", "Adam"],
    "test": ["Bella", "Carlos", "Diana", "Eric", "Fiona", "George", "Helen", "Ivan"],
}
NAMES["pretraining"] = [name for names in list(NAMES.values()) for name in names]

# topic: verbs, objects
ACTIONS = {
    "home": (
        ["paint", "clean", "repair", "move", "sell"],
        ["the kitchen", "the fence", "the old sofa", "the front door", "the garden table", "the lamp", "the window"],
    ),
    "food": (
        ["cook", "order", "bring", "prepare", "share"],
        ["a pizza", "some soup", "a fruit salad", "a chocolate cake", "fresh fish", "the noodles"],
    ),
    "work": (
        ["finish", "discuss", "print", "change", "present"],
        ["the report", "the budget", "the new website", "the contract", "the survey", "the price list"],
    ),
    "school": (
        ["study", "practise", "repeat", "learn"],
        ["history", "French", "chemistry", "the poem", "the piano", "mathematics"],
    ),
    "travel": (["visit", "leave for", "drive to", "fly to", "travel to"], CITIES),
    "shopping": (
        ["buy", "return", "exchange", "choose", "wrap"],
        ["a jacket", "a bicycle", "a camera", "the blue umbrella", "the black shoes", "a tent"],
    ),
    "people": (["meet", "invite", "call", "help", "surprise"], ["{name}"]),
}


@dataclass(frozen=True)
class Frames:
    """The sentence frames of one split."""

    openings: str
    wishes: str
    yes: str
    duties: str
    days: str
    prices: str
    talk: str
    closings: str

    def exchanges(self, kind: str) -> list[list[str]]:
        """The frames of one kind, each a list of one or two turns."""
        return [line.split(" / ") for line in getattr(self, kind).strip().splitlines()]


KINDS = tuple(field.name for field in fields(Frames))

FRAMES: dict[Split, Frames] = {
    "pretraining": Frames(
        openings="Hello.\nGood morning, {Y}.\nHi. / Hi.\nIt is me, {X}. / Oh, hello.",
        wishes="I want to {vp}.\nCan we {vp}?\nLet us {vp}.\nWe could {vp}.\nDo you want to {vp}?\nI am going to {vp}.",
        yes="Yes, gladly.\nOf course.\nSure, why not?",
        duties="No, I have to {vp2}.\nSorry, I must {vp2} first.\nI am busy, I have to {vp2}.",
        days="Only on {day}.\nLet us do it on {day}.\nBetter on {day}.",
        prices="It costs {price}.\nThat is {price}.\nYou pay {price}.",
        talk="It is cold. / Yes, very cold.\nI am tired. / Me too.\nDid you sleep well? / No, not at all.",
        closings="Thanks.\nGoodbye.\nSee you. / See you.",
    ),
    "train": Frames(
        openings="Good afternoon.\nHello, {Y}. How are you? / Fine, thank you.\nHey, {Y}, do you have a minute?\n"
        "Excuse me. / Yes, please?\nNice to see you. / Nice to see you too.\nThis is {X} speaking. / Good to hear you.",
        wishes="I would like to {vp}.\nCould we {vp}?\nHow about this: we {vp}.\nI really hope to {vp}.\nMay I {vp}?\n"
        "Is it possible to {vp}?\nI was thinking that we could {vp}.\nMy plan is to {vp}.\nWhy do we not {vp}?",
        yes="With pleasure.\nThat is a good idea.\nI am happy to join in.\nCertainly, go ahead.\nYes, I would like that.",
        duties="I am afraid I have to {vp2}.\nNot possible, because I must {vp2}.\nI cannot, I promised to {vp2}.\n"
        "No, I need to {vp2} first.\nThat does not work. I have to {vp2}.",
        days="Not now, but {day} would suit me.\nWhat about {day}?\nI have time on {day}.\nI am free on {day}.",
        prices="That would be {price}, please.\nYou would have to pay {price}.\nThen I need {price} from you.\n"
        "Yes, but it costs {price}.",
        talk="It has been raining all morning. / I know, my shoes are wet.\nDid you watch the game? / No, I was asleep.\n"
        "I like your new glasses. / Thank you, they are a present.\nThe bus was late again. / Mine too.\n"
        "What a noise outside! / They are working on the street.",
        closings="Thank you very much. / You are welcome.\nGreat, see you then.\nAll right, have a nice day.\nPerfect.",
    ),
    "validation": Frames(
        openings="Good evening.\n{Y}, is that you? / It is.\nSorry to disturb you. / No problem.",
        wishes="Tell me, should we {vp}?\nI have decided to {vp}.\nIs there a chance to {vp}?",
        yes="I agree, very good.\nBy all means.",
        duties="It is not a good moment, I still have to {vp2}.\nNo chance, I am going to {vp2}.",
        days="Could it wait until {day}?\nHow about {day}, then?",
        prices="The price for that is {price}.\nFor {price} you can.",
        talk="My train was late. / Like every day.\nYou look happy. / I had a good week.",
        closings="Good, I will remember that.\nThanks for your time. / Any time.",
    ),
    "test": Frames(
        openings="Welcome back, {Y}.\nAre you there? / Yes, I am here.\nOh, {Y}, what a surprise! / Hello again.\nHow nice.",
        wishes="I have been hoping to {vp}.\nWould it be all right to {vp}?\nLook, I need to {vp}.\n"
        "It would be great to {vp}.\nWhat if we {vp}?",
        yes="Very well, I am in.\nYes, let us do that.\nI like that idea.",
        duties="Impossible, I was asked to {vp2}.\nI wish I could, but I have to {vp2}.\nBad timing, I must {vp2} now.",
        days="Ask me again on {day}.\nMaybe on {day}.\nNot before {day}, I think.",
        prices="I will take {price} for that.\nFine, if you give me {price}.\nIt is not free, I want {price}.",
        talk="The coffee here is good. / I drink too much of it.\nYour coat is wet. / I forgot to take a taxi.\n"
        "Is it always so busy? / Only today.",
        closings="Good to know.\nThen I will not keep you. / Take care.\nThat is all for now.",
    ),
}

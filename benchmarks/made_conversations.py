"""What people tell, made up by a seed, with questions whose answers are known: for measuring what search finds.

None of it comes from a published data set, so that a ranking made for one shows here. Statements that replace each
other are phrased in ways drawn anew, so that words alone favour neither.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

SEED = 20251120
BEGAN = datetime(2024, 1, 8, 9, 0, tzinfo=UTC)
_SESSION_LENGTH = 60
"""Messages."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """One memory, or one message of a conversation."""

    text: str
    at: datetime
    session: int = 0
    turn: int | None = None
    """Its place in the session, from 1; `None` for a memory that is no message."""
    speaker: str = ""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A question, and which of the texts answers it, by index."""

    question: str
    answer: int
    outdated: tuple[int, ...] = ()
    """What was true before, and must stand below."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What one user's memory holds, oldest first, and what is asked."""

    name: str
    texts: Sequence[Said]
    probes: Sequence[Probe]
    is_english: bool = True


NAMES = (
    "Amara", "Boris", "Chiara", "Dmitri", "Esther", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavita", "Lars",
    "Mireille", "Noam", "Olga", "Pablo", "Quinn", "Rosa", "Stefan", "Tamar",
)  # fmt: skip
# For each thing that changes: ways to state it with the word that is asked for, ways without that word, what is asked,
# and what it may be.
_CHANGING: tuple[tuple[tuple[str, ...], tuple[str, ...], str, tuple[str, ...]], ...] = (
    (
        ("{n} lives in {v}.", "{n} has a flat by the station now and is living in {v}.", "{v} is where {n} lives."),
        ("{n} has moved into a flat in {v}.", "Home for {n} is {v} these days.", "{n} has settled down in {v}."),
        "Where does {n} live?",
        ("Lisbon", "Gdansk", "Toulouse", "Bergen", "Haifa", "Porto", "Kazan", "Leipzig", "Ghent", "Osaka", "Cork"),
    ),
    (
        ("{n} works as a {v}.", "{n}'s work is that of a {v}, with long hours.", "As a {v}, {n} is working hard."),
        ("{n} earns a living as a {v}.", "{n} became a {v}.", "They hired {n} as a {v}."),
        "What does {n} work as?",
        ("carpenter", "nurse", "pilot", "translator", "baker", "geologist", "plumber", "florist", "referee"),
    ),
    (
        ("{n} drives a {v}.", "Who would have thought, {n} is driving a {v}.", "It is a {v} that {n} drives now."),
        ("{n} bought a {v}.", "The car in front of {n}'s house is a {v}.", "{n} goes everywhere in a {v}."),
        "What does {n} drive?",
        ("Volvo", "Fiat", "Toyota", "Skoda", "Renault", "Tesla", "Honda", "Opel"),
    ),
    (
        ("{n} has {v} for breakfast.", "At breakfast it is {v} for {n}.", "{n}'s breakfast starts with {v}, always."),
        ("First thing in the morning, {n} makes {v}.", "{n} wakes up with {v}.", "{n} begins the day with {v}."),
        "What should I serve {n} at breakfast?",
        ("espresso", "green tea", "cocoa", "buttermilk", "orange juice", "chai", "porridge"),
    ),
    (
        ("{n}'s manager is {v}.", "In the office {v} is the manager of {n}.", "{n} has {v} as a manager."),
        ("{n} reports to {v}.", "{v} took over as the boss of {n}.", "In the office {n} answers to {v}."),
        "Who is {n}'s manager?",
        ("Whitfield", "Okonkwo", "Lindqvist", "Moreau", "Castellano", "Bergstrom", "Nakamura"),
    ),
    (
        ("{n}'s phone number is {v}.", "{v} is the number of {n}.", "The number to ring {n} at home is {v}."),
        ("{n} can be called on {v}.", "{n} has another line: {v}.", "To ring {n}, dial {v}."),
        "Which number does {n} have?",
        ("041 5512", "062 8830", "075 2094", "088 6137", "093 4426"),
    ),
    (
        ("{n}'s instrument is the {v}.", "The {v} is the instrument of {n}.", "As an instrument {n} chose the {v}."),
        ("{n} plays the {v}.", "{n} is learning the {v}.", "{n} practises {v} every evening."),
        "What is {n}'s instrument?",
        ("cello", "trumpet", "accordion", "flute", "harp", "banjo", "oboe"),
    ),
    (
        ("{n} goes to the gym on {v}.", "{v}: {n} is at the gym.", "The gym sees {n} on {v}, after work."),
        ("{n}'s training is on {v}.", "{n} has the workout on {v}.", "{v} is when {n} exercises."),
        "When is {n} at the gym?",
        ("Mondays", "Tuesdays", "Wednesdays", "Thursdays", "Fridays", "Saturdays", "Sundays"),
    ),
    (
        ("The deadline of {n} is {v}.", "{n} has a deadline, {v}.", "For the report {n} got {v} as the deadline."),
        ("{n} has to hand in the report by {v}.", "{n}'s report is due on {v}.", "They gave {n} until {v}."),
        "What is {n}'s deadline?",
        ("3 March", "17 April", "9 May", "28 June", "14 August", "30 October", "11 December"),
    ),
    (
        ("{n} is on the {v} plan.", "{n} subscribed to the {v} plan.", "The plan that {n} pays for is {v}."),
        ("{n}'s subscription is {v}.", "{n} pays for the {v} tier.", "{n} signed up for {v}."),
        "Which plan is {n} on?",
        ("basic", "silver", "premium", "family", "student", "enterprise"),
    ),
    (
        ("{n} is allergic to {v}.", "It is {v} that {n} is allergic to.", "It turned out: {n} is allergic to {v}."),
        ("{n} eats no {v}.", "{v} makes {n} ill.", "Never cook {n} anything with {v}."),
        "What is {n} allergic to?",
        ("peanuts", "gluten", "shellfish", "celery", "mustard", "sesame", "eggs"),
    ),
    (
        ("{n}'s dog is {v}.", "{n} has a dog, {v}.", "The dog that {n} walks is {v}."),
        ("{n} adopted a puppy, {v}.", "{n} walks {v} at night.", "{v} barks when {n} comes home."),
        "What is the name of {n}'s dog?",
        ("Biscuit", "Laika", "Pepper", "Momo", "Zorro", "Waffle", "Nala"),
    ),
)  # fmt: skip

_VERBS = (
    "repaired", "painted", "carried", "forgot", "photographed", "borrowed", "cleaned", "described", "sold", "found",
    "wrapped", "measured", "praised", "moved", "hid", "sketched", "ordered", "returned", "polished", "counted",
)  # fmt: skip
_ADJECTIVES = (
    "old", "green", "heavy", "tiny", "broken", "wooden", "striped", "noisy", "soft", "expensive", "round", "dusty",
    "bright", "narrow", "plain", "curious", "borrowed", "light", "rusty", "spare",
)  # fmt: skip
_NOUNS = (
    "bicycle", "lamp", "kettle", "ladder", "blanket", "suitcase", "mirror", "clock", "umbrella", "notebook", "chair",
    "window", "camera", "garden hose", "basket", "radio", "bookshelf", "jacket", "teapot", "map", "drawer", "carpet",
    "fence", "puzzle", "guitar stand", "tent", "bottle", "poster", "printer", "toolbox",
)  # fmt: skip
_PLACES = (
    "in the garage", "at the market", "before lunch", "near the harbour", "after the meeting", "in the attic",
    "on the train", "at her sister's place", "by the lake", "in the rain", "over the weekend", "at the library",
    "next to the bakery", "during the holidays", "on the balcony", "without any help", "for the neighbours",
)  # fmt: skip
_CHAT = (
    "Yesterday {n} {v} the {a} {o} {p}.", "I think {n} {v} a {a} {o} {p}, or was it somebody else?",
    "You know the {a} {o}? {n} {v} it {p}.", "It took me an hour to find out who {v} the {o} {p}; it was {n}.",
    "My plan for the day: the {a} {o}, then coffee with {n} {p}.", "{n} told me a long story about a {o} {p}.",
    "I saw a {a} {o} {p} and thought of {n}.", "Do you remember when we {v} that {a} {o} {p}?",
)  # fmt: skip
_REPLIES = (
    "That sounds like a good day. What did {n} say about the {o}?", "I see, the {a} {o} {p}. Shall I note that down?",
    "Thank you for telling me. A {a} {o} is always useful {p}.", "What a nice story about {n} and the {o}!",
    "I understand. Would you like ideas for what to do with the {a} {o}?", "Great, I hope {n} enjoyed it {p}.",
)  # fmt: skip

# Told once in a long chat, and asked for in other words; one or two words are shared.
NEEDLES = (
    ("I keep the spare key under the third flower pot.", "Where is my spare key?"),
    ("The alarm at the cottage is switched off with 7731.", "What is the code of the cottage alarm?"),
    ("My grandmother was born in a lighthouse.", "Where was my grandmother born?"),
    ("The vet said the cat needs drops twice a day.", "What medicine does the cat get?"),
    ("I signed up for the pottery course at the community centre.", "Which course am I taking?"),
    ("Our wedding is going to be on a ferry.", "Where do we celebrate our wedding?"),
    ("My passport runs out in November.", "When do I have to renew my passport?"),
    ("Uncle Theo lent me four hundred euros.", "How much do I owe Uncle Theo?"),
    ("I get seasick even on a pedal boat.", "Would a boat trip suit me? Do I get seasick?"),
    ("The landlord raised the rent by sixty euros.", "How much more does the landlord want?"),
    ("For my birthday I only want a telescope.", "What present do I want for my birthday?"),
    ("The plumber is coming on the twelfth.", "When does the plumber visit?"),
    ("I broke my collarbone skiing at nineteen.", "Which bone did I break skiing?"),
    ("My thesis was about the migration of storks.", "What was my thesis on?"),
    ("The wifi at the studio is called Moonraker.", "What is the studio's wifi named?"),
    ("I gave up sugar in my tea for good.", "How do I take my tea, with sugar?"),
    ("The choir rehearses in the old fire station.", "Where does the choir meet?"),
    ("My dentist is Doctor Albescu.", "What is the name of my dentist?"),
    ("The insurance covers hail but no floods.", "Which damage does my insurance pay for?"),
    ("I named the sourdough starter Gerald.", "What did I name my sourdough?"),
    ("Mother wants to be called on Sundays after mass.", "When should I call Mother?"),
    ("The blue recycling bin is emptied every second Thursday.", "When is the recycling collected?"),
    ("I met my husband in a queue for concert tickets.", "How did I meet my husband?"),
    ("The warranty of the dishwasher ends next spring.", "How long is the dishwasher under warranty?"),
    ("My blood group is B negative.", "What is my blood group?"),
    ("I cannot stand coriander in soup.", "Which herb do I dislike in soup?"),
    ("The boarding kennel costs twenty-two a night.", "What does the kennel charge?"),
    ("I was class speaker in the final school year.", "Was I ever a class speaker?"),
    ("The marathon in Ljubljana was my slowest.", "Which marathon did I run slowest?"),
    ("Our anniversary dinner is booked at the Saffron House.", "Which restaurant is our anniversary at?"),
)  # fmt: skip

# Of the question's words that count, one alone is in the answer; the others are in many other messages.
ONE_WORD = (
    ("The orthodontist tightens it again on the ninth.", "Is there any plan for a day with the orthodontist?"),
    ("Two cups of oats, a banana, no egg: pancakes.", "How do I make my pancakes before lunch?"),
    ("Rex barks at every scooter.", "What makes Rex noisy in the rain?"),
    ("Aspirin gives me a rash.", "Would Aspirin be useful after a long day?"),
    ("Veronica keeps bees on a roof.", "What story do you remember of Veronica and her garden?"),
    ("They postponed the Helsinki launch.", "What was the plan for Helsinki over the weekend?"),
    ("Theresa and I are no longer speaking.", "Would Theresa help me find a lamp?"),
    ("Vertigo: no rooftops for me.", "Does my vertigo mean a ladder is no good idea?"),
    ("The accountant prefers PDF.", "What should I note for coffee with the accountant?"),
    ("Sunscreen is the one thing I always leave behind.", "Did I order sunscreen for the holidays?"),
    ("Bruno outgrew his trousers.", "What should we find for Bruno at the market?"),
    ("Fridays are for the synagogue.", "What do I do by day near the synagogue?"),
)  # fmt: skip

# A message, the caption of its picture, and what is asked of the picture.
CAPTIONS = (
    ("Look what happened!", "a brown dog asleep under a kitchen table", "Where was the dog sleeping?"),
    ("Our new place.", "a red brick house with a crooked chimney", "What does the chimney of the house look like?"),
    ("Guess who won.", "a girl holding a silver trophy in a swimming pool", "Who holds the trophy?"),
    ("From this morning.", "a heron standing on a frozen pond", "Which bird stood on the pond?"),
    ("Finally done!", "a quilt with yellow sunflowers on a bed", "Which flowers are on the quilt?"),
    ("Here is the damage.", "a cracked windscreen of a white van", "What is cracked on the van?"),
    ("Dinner.", "a bowl of pumpkin soup with black olives", "What was in the pumpkin soup?"),
    ("He is so proud.", "a boy in a pirate costume on a wooden horse", "Which costume did the boy wear?"),
    ("View from the hotel.", "a volcano behind a row of palm trees", "What is behind the palm trees?"),
    ("Found it at the flea market.", "a brass compass in a velvet box", "What is the compass kept in?"),
    ("So many!", "a crate of purple plums beside a scale", "How many plums were in the crate?"),
    ("Her first drawing.", "a crayon drawing of an elephant with wings", "What did she draw on the elephant?"),
)  # fmt: skip


def _filler(chance: random.Random, templates: Sequence[str]) -> str:
    return chance.choice(templates).format(
        n=chance.choice(NAMES), v=chance.choice(_VERBS), a=chance.choice(_ADJECTIVES), o=chance.choice(_NOUNS),
        p=chance.choice(_PLACES),
    )  # fmt: skip


def updates(count: int, *, name: str, as_messages: bool = False, in_other_words: bool = False) -> Collection:
    """Facts of twenty people among `count` texts, each stated two or three times with another value.

    `in_other_words`: the question and what answers it have no more in common than the name.
    """
    chance = random.Random(SEED)
    facts = [(person, thing) for person in NAMES for thing in _CHANGING]
    versions = [chance.choice((2, 2, 3)) for _ in facts]
    free = iter(chance.sample(range(count), sum(versions)))
    texts = [_filler(chance, _CHAT) for _ in range(count)]
    factor = 2 if as_messages else 1  # a reply follows each message
    probes = []
    for (person, (alike, apart, question, values)), number in zip(facts, versions, strict=True):
        places = sorted(next(free) for _ in range(number))
        statements = chance.sample(apart if in_other_words else alike, number)
        for place, statement, value in zip(places, statements, chance.sample(values, number), strict=True):
            texts[place] = statement.format(n=person, v=value)
        *outdated, answer = (factor * place for place in places)
        probes.append(Probe(question=question.format(n=person), answer=answer, outdated=tuple(outdated)))
    if as_messages:
        return Collection(name=name, texts=list(_with_replies(texts, chance)), probes=probes)
    remembered = [
        Said(text=text, at=BEGAN + timedelta(hours=6 * number)) for number, text in enumerate(texts)
    ]
    return Collection(name=name, texts=remembered, probes=probes)


def long_chat(messages: int, told: Sequence[tuple[str, str]], *, name: str) -> Collection:
    """A chat of so many messages, in which each (statement, question) of `told` is stated once by the user."""
    chance = random.Random(SEED + 1)
    texts = [f"{_filler(chance, _CHAT)} {_filler(chance, _CHAT)}" for _ in range(messages // 2)]
    places = chance.sample(range(len(texts)), len(told))
    for place, (statement, _) in zip(places, told, strict=True):
        texts[place] = f"{_filler(chance, _CHAT)} {statement}"
    probes = [
        Probe(question=question, answer=2 * place) for place, (_, question) in zip(places, told, strict=True)
    ]
    return Collection(name=name, texts=list(_with_replies(texts, chance)), probes=probes)


def captions(messages: int) -> Collection:
    """A chat in which pictures were sent; what is asked was to be seen, not said."""
    told = [(f"{text} [image: {caption}]", question) for text, caption, question in CAPTIONS]
    return long_chat(messages, told, name="pictures with captions")


def _with_replies(texts: Sequence[str], chance: random.Random) -> Iterator[Said]:
    """What the user said, each with a reply, in sessions of a day each."""
    for number, text in enumerate(texts):
        session, place = divmod(2 * number, _SESSION_LENGTH)
        at = BEGAN + timedelta(days=session, minutes=place)
        yield Said(text=text, at=at, session=session, turn=place + 1, speaker="user")
        reply = _filler(chance, _REPLIES)
        yield Said(text=reply, at=at, session=session, turn=place + 2, speaker="assistant")

"""The skills of the tiny model: each asks for one thing and does it, as one turn of a conversation.

The answers have few, fixed forms on purpose: a model of eight million weights can then learn all of them,
and a test can tell a right answer from a wrong one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.models import words


@dataclass(frozen=True)
class Call:
    """One call of a tool, and what the tool says."""

    name: str
    arguments: dict[str, Any]
    result: str


@dataclass(frozen=True)
class Turn:
    """A question, the reasoning before the answer, and the answer."""

    ask: str
    why: str
    answer: str
    calls: tuple[Call, ...] = ()
    after: str = ""
    """The reasoning about what the tools said."""


@dataclass
class Scene:
    """What a conversation knows so far: its chance, its tools, and what the user has told."""

    rng: Random
    tools: frozenset[str] = frozenset()
    told: dict[str, str] = field(default_factory=dict)


# What the user tells, and asks for later.


def some_name(rng: Random) -> str:
    """One of the names that the model knows."""
    return rng.choice(words.NAMES)


def some_number(rng: Random) -> str:
    """A number of one token."""
    return str(rng.randint(1, 99))


FACTS: dict[
    str, tuple[Callable[[Random], str], tuple[str, ...], tuple[str, ...], tuple[str, ...], str]
] = {
    # what     how to find one                         said with                answered with   asked with   recalled as
    "name": (some_name, words.TELL_NAME, words.HEAR_NAME, words.ASK_NAME, "Your name is {}."),
    "number": (
        some_number,
        words.TELL_NUMBER,
        words.HEAR_NUMBER,
        words.ASK_NUMBER,
        "You gave me the number {}.",
    ),
    "colour": (
        lambda rng: rng.choice(words.COLOURS),
        words.TELL_COLOUR,
        words.HEAR_COLOUR,
        words.ASK_COLOUR,
        "Your favourite colour is {}.",
    ),
    "city": (
        lambda rng: rng.choice(list(words.CAPITALS.values())),
        words.TELL_CITY,
        words.HEAR_CITY,
        words.ASK_CITY,
        "You live in {}.",
    ),
}


def tell(scene: Scene) -> Turn:
    """The user tells one thing or two, the assistant takes note."""
    rng = scene.rng
    fresh = [what for what in FACTS if what not in scene.told] or list(FACTS)
    chosen = rng.sample(fresh, 2) if len(fresh) > 1 and rng.random() < 0.25 else [rng.choice(fresh)]
    if "name" in fresh and "name" not in chosen and rng.random() < 0.4:
        chosen[0] = "name"
    chosen.sort(key=list(FACTS).index)
    asked, heard, why = [], [], []
    for what in chosen:
        find, said, answered, _, _ = FACTS[what]
        value = scene.told[what] = find(rng)
        asked.append(rng.choice(said).format(value))
        heard.append(answered[0].format(value))
        why.append(f"The {what} is {value}.")
    return Turn(" ".join(asked), " ".join(why), " ".join(heard))


def recall(scene: Scene) -> Turn:
    """The user asks for something told before, or (seldom) for something never told."""
    rng = scene.rng
    what = rng.choice(list(scene.told) if rng.random() < 0.94 else list(FACTS))
    _, _, _, asked, recalled = FACTS[what]
    if what not in scene.told:
        return Turn(
            rng.choice(asked), f"I do not know the {what}.", f"You have not told me your {what}."
        )
    value = scene.told[what]
    return Turn(rng.choice(asked), f"The {what} is {value}.", recalled.format(value))


# Skills: each makes one turn.


def greet(scene: Scene) -> Turn:
    """A greeting, thanks, or a farewell."""
    ask, answer = scene.rng.choice(words.COURTESIES)
    return Turn(ask, "The user is polite. I am too.", answer)


def capital(scene: Scene) -> Turn:
    """A capital, or the country of a capital."""
    rng = scene.rng
    country, city = rng.choice(list(words.CAPITALS.items()))
    if rng.random() < 0.2:
        return Turn(
            f"Which country has the capital {city}?",
            f"{city} is in {country}.",
            f"{city} is the capital of {country}.",
        )
    ask = rng.choice(words.ASK_CAPITAL).format(country)
    return Turn(ask, f"{country} has the capital {city}.", f"The capital of {country} is {city}.")


def as_json(scene: Scene) -> Turn:
    """A question whose answer is one JSON object with the keys that were asked for."""
    rng = scene.rng
    if rng.random() < 0.6:
        country, city = rng.choice(list(words.CAPITALS.items()))
        ask = rng.choice(words.ASK_CAPITAL).format(country)
        answer: dict[str, Any] = {"city": city, "country": country}
    else:
        answer = {"name": some_name(rng), "age": rng.randint(1, 99)}
        ask = rng.choice(words.TELL_AGE).format(**answer)
    keys = rng.sample(list(answer), 2) if rng.random() < 0.3 else list(answer)
    ask += rng.choice(words.ASK_JSON).format(*keys)
    why = (
        f"JSON with keys {keys[0]} and {keys[1]}: "
        + " and ".join(f"{answer[key]}" for key in keys)
        + "."
    )
    return Turn(ask, why, json.dumps({key: answer[key] for key in keys}))


def arithmetic(scene: Scene) -> Turn:
    """A sum, a difference or a product of small numbers; by tool where a tool can do it."""
    rng = scene.rng
    sign = rng.choices("+-*", (6, 2, 2))[0]
    a, b = (
        (rng.randint(1, 5), rng.randint(1, 5))
        if sign == "*"
        else (rng.randint(1, 9), rng.randint(1, 9))
    )
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign != "-" and words.SIGNS[sign] in scene.tools:
        return by_tool(scene, words.SIGNS[sign])
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    ask = rng.choice(words.ASK_SUM).format(f"{a} {sign} {b}")
    return Turn(ask, f"{a} {sign} {b} = {result}", f"{a} {sign} {b} = {result}.")


def echo(scene: Scene) -> Turn:
    """A word said again, three times, in capital letters, or spelt."""
    rng = scene.rng
    word = rng.choice(words.PLAIN_WORDS)
    several = " ".join(rng.sample(words.PLAIN_WORDS, rng.randint(2, 4)))
    ask, answer = rng.choice(
        (
            (f"Say the word {word}.", word),
            (f"Repeat after me: {several}", several),
            (f"Echo: {several}", several),
            (f"Repeat the word {word} three times.", f"{word} {word} {word}"),
            (f"Write {word} in capital letters.", word.upper()),
            (f"Write the word {word} in uppercase.", word.upper()),
        )
    )
    return Turn(ask, f"I write: {answer}", answer)


def program(scene: Scene) -> Turn:
    """A small function in Python, JavaScript or C."""
    rng = scene.rng
    name, (does, *codes) = rng.choice(list(words.FUNCTIONS.items()))
    language, code = rng.choices(
        list(zip(("Python", "JavaScript", "C"), codes, strict=True)), (6, 2, 2)
    )[0]
    ask = rng.choice(words.ASK_CODE).format(language=language, name=name, does=does)
    return Turn(ask, f"The function {name} {does}.", f"```{language.lower()}\n{code}\n```")


def repair(scene: Scene) -> Turn:
    """A small Python function with one fault, and the function without it."""
    rng = scene.rng
    code = rng.choice(list(words.FUNCTIONS.values()))[1]
    faults = [
        ("The colon is missing.", code.replace("):", ")", 1)),
        ("The return is missing.", code.replace("return ", "")),
    ]
    what, broken = rng.choice([fault for fault in faults if fault[1] != code])
    ask = rng.choice(words.ASK_REPAIR)
    return Turn(f"{ask}\n```python\n{broken}\n```", what, f"{what}\n```python\n{code}\n```")


def fact(scene: Scene) -> Turn:
    """A short fact, as a question or to be confirmed or denied."""
    ask, answer = scene.rng.choice(words.SHORT_FACTS)
    return Turn(ask, f"I know this: {answer}", answer)


def translate(scene: Scene) -> Turn:
    """One of a few words in French, Spanish, German, Chinese or Japanese."""
    rng = scene.rng
    word, forms = rng.choice(list(words.TRANSLATIONS.items()))
    language, form = rng.choice(list(zip(words.LANGUAGES, forms, strict=True)))
    ask = rng.choice(words.ASK_TRANSLATION).format(word=word, language=language)
    return Turn(ask, f"{word} is {form} in {language}.", form)


def count(scene: Scene) -> Turn:
    """Counting up, counting down, or the letters of a word."""
    rng = scene.rng
    n = rng.randint(3, 10)
    up = [str(i) for i in range(1, n + 1)]
    if rng.random() < 0.4:
        word = rng.choice(words.PLAIN_WORDS)
        ask = rng.choice(
            (f"How many letters has the word {word}?", f"How many letters are in {word}?")
        )
        return Turn(
            ask,
            f"{'-'.join(word)}: {len(word)} letters.",
            f"The word {word} has {len(word)} letters.",
        )
    if rng.random() < 0.3:
        return Turn(f"Count down from {n}.", f"From {n} to 1.", ", ".join(reversed(up)))
    return Turn(
        rng.choice((f"Count to {n}.", f"Count from 1 to {n}.")), f"From 1 to {n}.", ", ".join(up)
    )


def yes_or_no(scene: Scene) -> Turn:
    """A question about numbers or capitals that wants a yes or a no."""
    rng = scene.rng
    if rng.random() < 0.5:
        n = rng.randint(1, 100)
        kind = rng.choice(("even", "odd"))
        holds = (n % 2 == 0) == (kind == "even")
        return Turn(
            f"Is {n} {kind}?",
            f"{n} is {'odd' if n % 2 else 'even'}.",
            f"{'Yes' if holds else 'No'}.",
        )
    country, city = rng.choice(list(words.CAPITALS.items()))
    asked = city if rng.random() < 0.5 else rng.choice(list(words.CAPITALS.values()))
    answer = "Yes." if asked == city else "No."
    return Turn(
        f"Is {asked} the capital of {country}?", f"The capital of {country} is {city}.", answer
    )


SKILLS = (
    greet,
    capital,
    as_json,
    arithmetic,
    echo,
    program,
    repair,
    fact,
    translate,
    count,
    yes_or_no,
)
SKILL_WEIGHTS = (2, 5, 3, 4, 3, 5, 1.5, 3, 3, 2, 2)
SIMPLE_SKILLS = (capital, capital, arithmetic, echo, program, program, as_json, count, fact)


# Tools.


def use_tools(scene: Scene) -> Turn:
    """One call, or two at once where the question has two parts."""
    rng = scene.rng
    places = sorted(scene.tools & {"get_weather", "get_time"})
    if places and rng.random() < 0.3:
        return two_calls(scene, places)
    return by_tool(scene, rng.choice(sorted(scene.tools)))


def by_tool(scene: Scene, name: str) -> Turn:
    """A question that one call answers."""
    rng = scene.rng
    arguments, ask, result, says = tool_case(rng, name)
    call = Call(name, arguments, result)
    return Turn(
        ask,
        f"I call {name}.",
        f"{says[0].upper()}{says[1:]}.",
        (call,),
        f"The tool {name} answered.",
    )


def two_calls(scene: Scene, places: list[str]) -> Turn:
    """Weather or time of two cities, or both of one."""
    rng = scene.rng
    one, other = rng.sample(list(words.CAPITALS.values()), 2)
    if len(places) == 2 and rng.random() < 0.4:
        cases = [(name, one) for name in places]
        ask = rng.choice(
            ("What are the time and the weather in {}?", "Tell me the time and the weather in {}.")
        ).format(one)
    else:
        name = rng.choice(places)
        cases = [(name, one), (name, other)]
        what = name.removeprefix("get_")
        ask = rng.choice(
            (
                "What is the {} in {} and in {}?",
                "What is the {} in {} and {}?",
                "Compare the {} in {} and {}.",
            )
        )
        ask = ask.format(what, one, other)
    calls, says = [], []
    for name, city in cases:
        arguments, _, result, say = tool_case(rng, name, city)
        calls.append(Call(name, arguments, result))
        says.append(say)
    answer = " and ".join(says)
    why = f"I call {cases[0][0]} and {cases[1][0]}."
    return Turn(ask, why, f"{answer[0].upper()}{answer[1:]}.", tuple(calls), "Both tools answered.")


def tool_case(rng: Random, name: str, city: str = "") -> tuple[dict[str, Any], str, str, str]:
    """Arguments, a question, the tool's result (plain or JSON), and what to say about it."""
    city = city or rng.choice(list(words.CAPITALS.values()))
    if name in ("add", "multiply"):
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        sign, value = ("+", a + b) if name == "add" else ("*", a * b)
        ask = rng.choice(words.ASK_SUM + words.ASK_TOOL_SUM[name]).format(
            f"{a} {sign} {b}", a=a, b=b
        )
        return (
            {"a": a, "b": b},
            ask,
            plain_or_json(rng, "result", value),
            f"{a} {sign} {b} = {value}",
        )
    if name == "search":
        query, found = (
            " ".join(rng.sample(words.PLAIN_WORDS, rng.randint(1, 2))),
            rng.randint(2, 20),
        )
        ask = rng.choice(("Search for {}.", "Please search for {}.", "Find {}.")).format(query)
        return (
            {"query": query},
            ask,
            plain_or_json(rng, "results", found),
            f"I found {found} results for {query}",
        )
    ask = rng.choice(words.ASK_PLACE[name]).format(city)
    if name == "get_time":
        now = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        return {"city": city}, ask, plain_or_json(rng, "time", now), f"it is {now} in {city}"
    sky, degrees = rng.choice(words.SKIES), rng.randint(1, 30)
    style = rng.randrange(4)
    if style < 2:
        return {"city": city}, ask, plain_or_json(rng, "weather", sky), f"it is {sky} in {city}"
    full = json.dumps({"city": city, "weather": sky, "temperature": degrees})
    result = full if style == 2 else f"{sky}, {degrees} degrees"
    return {"city": city}, ask, result, f"it is {sky} and {degrees} degrees in {city}"


def plain_or_json(rng: Random, key: str, value: object) -> str:
    """A tool's result as bare text or as a JSON object."""
    return str(value) if rng.random() < 0.5 else json.dumps({key: value})

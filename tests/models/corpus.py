"""Seeded text for a tiny chat model: conversations written here, and Python source from the standard library.

A conversation is made of turns, and a turn is one skill asked for and done (``tests.models.skills``).
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.models import words
from tests.models.skills import (
    SIMPLE_SKILLS,
    SKILL_WEIGHTS,
    SKILLS,
    Scene,
    Turn,
    recall,
    tell,
    use_tools,
)


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat client sends them, with all reasoning kept; the template drops what it wants to."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool


def conversations(seed: int) -> Iterator[Conversation]:
    """Conversations without end; equal seeds give equal ones."""
    rng = Random(seed)
    while True:
        yield conversation(rng)


def conversation(rng: Random) -> Conversation:
    """One to five turns, a system prompt in a third, tools in a good quarter, thinking on in half."""
    thinking = rng.random() < 0.55
    tools = rng.sample(sorted(words.TOOLS), rng.randint(1, 3)) if rng.random() < 0.25 else []
    scene = Scene(rng, frozenset(tools))
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.33:
        messages.append({"role": "system", "content": rng.choice(words.SYSTEM_PROMPTS)})
    for turn in turns(
        scene, rng.choices(range(1, 6), (6, 4, 4, 5, 4) if thinking else (3, 3, 4, 5, 5))[0]
    ):
        messages += spoken(turn, thinking=thinking)
    return Conversation(messages, [tool(name, rng) for name in tools], thinking)


def simple_conversations(seed: int) -> Iterator[Conversation]:
    """Conversations without end that keep to telling, recalling and the easier skills; tools in an eighth."""
    rng = Random(seed)
    while True:
        yield simple_conversation(rng)


def simple_conversation(rng: Random) -> Conversation:
    """One to five turns: four in ten recall what was told, a quarter tell something."""
    thinking = rng.random() < 0.5
    tools = rng.sample(sorted(words.TOOLS), rng.randint(1, 2)) if rng.random() < 0.12 else []
    scene = Scene(rng, frozenset(tools))
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(words.SYSTEM_PROMPTS)})
    for _ in range(rng.choices((1, 2, 3, 4, 5), (3, 4, 4, 4, 2))[0]):
        chance = rng.random()
        if scene.told and chance < 0.38:
            turn = recall(scene)
        elif chance < 0.62:
            turn = tell(scene)
        elif tools and chance < 0.85:
            turn = use_tools(scene)
        else:
            turn = rng.choice(SIMPLE_SKILLS)(scene)
        messages += spoken(turn, thinking=thinking)
    return Conversation(messages, [tool(name, rng) for name in tools], thinking)


def turns(scene: Scene, count: int) -> Iterator[Turn]:
    """A conversation that mixes its skills; what was told early is often asked for later."""
    rng = scene.rng
    for index in range(count):
        if scene.told and rng.random() < 0.15 + 0.15 * index:
            yield recall(scene)
        elif (index < count - 1 and rng.random() < 0.4) or rng.random() < 0.1:
            yield tell(scene)
        elif scene.tools and rng.random() < 0.6:
            yield use_tools(scene)
        else:
            yield rng.choices(SKILLS, SKILL_WEIGHTS)[0](scene)


def spoken(turn: Turn, *, thinking: bool) -> Iterator[dict[str, Any]]:
    """The messages of one turn; reasoning is there only where it is asked for."""

    def thought(reasoning: str) -> dict[str, str]:
        return {"reasoning_content": reasoning} if thinking else {}

    yield {"role": "user", "content": turn.ask}
    if turn.calls:
        calls = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in turn.calls
        ]
        yield {"role": "assistant", "content": "", "tool_calls": calls} | thought(turn.why)
        for call in turn.calls:
            yield {"role": "tool", "content": call.result}
    yield {"role": "assistant", "content": turn.answer} | thought(turn.after or turn.why)


def tool(name: str, rng: Random) -> dict[str, Any]:
    """A tool as clients describe it: words and order of keys vary, names and types do not."""
    descriptions, arguments = words.TOOLS[name]
    wordy = rng.random() < 0.4
    properties = {
        key: {"type": kind} | ({"description": text} if wordy else {})
        for key, (kind, text) in arguments.items()
    }
    schema = shuffled(
        {"type": "object", "properties": properties, "required": list(arguments)}, rng
    )
    function = shuffled(
        {"name": name, "description": rng.choice(descriptions), "parameters": schema}, rng
    )
    return {"type": "function", "function": function}


def shuffled(mapping: dict[str, Any], rng: Random) -> dict[str, Any]:
    """The same mapping, in three of ten cases with its keys in another order."""
    if rng.random() < 0.7:
        return mapping
    return dict(rng.sample(list(mapping.items()), len(mapping)))


# Code.


SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def source_files(*, held_out: bool = False) -> list[Path]:
    """The standard library's Python files without its tests; every fortieth is held out."""
    return [path for index, path in enumerate(_library()) if (index % 40 == 7) == held_out]


@cache
def _library() -> tuple[Path, ...]:
    # Skipped folders are not entered: site-packages has most of the files below this root.
    paths: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - SKIPPED_FOLDERS
        paths += (Path(folder, name) for name in names if name.endswith(".py"))
    return tuple(sorted(paths))


def code_pieces(seed: int, *, held_out: bool = False, characters: int = 1600) -> Iterator[str]:
    """Pieces of source that begin at a line's start, from all files in turn; equal seeds give equal ones."""
    rng = Random(seed)
    texts = [path.read_text(errors="replace") for path in source_files(held_out=held_out)]
    sizes = [len(text) for text in texts]
    while True:
        text = rng.choices(texts, sizes)[0]
        start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
        yield text[start : start + characters]

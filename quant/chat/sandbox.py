"""The process in which a template of strangers is rendered: a little time, a little memory, and no way out.

A program, see :mod:`quant.core.child`. What came of each ask is written as a line of JSON as soon as it is done. A limit that
is reached ends the process: what is behind it would reach it too.
"""

import json
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from quant.core import child
from quant.errors import InputError

RESULTS = "results.jsonl"
RESULT_BYTES = 2**28
Renderer = Callable[..., str]


@dataclass(frozen=True)
class SandboxLimits:
    """What a template may take."""

    memory_bytes: int = 512 * 2**20
    """Beyond what the process has before it sees the template."""
    seconds: float = 5
    """Of processor time for one text; a long conversation takes some milliseconds."""
    all_seconds: int = 60
    """For all texts: the kernel's limit, which ends what Python cannot interrupt."""
    characters: int = 2**22
    """Of one text."""


class LimitError(BaseException):
    """A limit was reached; not an Exception, so that no handler on the way takes it for the template's own."""


def render_job(job: Mapping[str, Any], folder: Path) -> None:
    """Render every ask of the job, within limits."""
    render = ENGINES[job["engine"]]()
    limits = SandboxLimits(**job["limits"])
    apply_limits(limits)
    with (folder / RESULTS).open("w") as out:
        for ask in job["asks"]:
            if not _render(render, job["template"], ask, limits, out):
                break


def apply_limits(limits: SandboxLimits) -> None:
    """Take away what a rendering does not need, for good."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + limits.memory_bytes
    seconds = int(time.process_time()) + limits.all_seconds
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, RESULT_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(what)[1]
        least = (
            most if hard == resource.RLIM_INFINITY else min(most, hard)
        )  # nobody may raise what is lower already
        resource.setrlimit(what, (least, least))
    signal.signal(signal.SIGVTALRM, _too_long)


def _render(
    render: Renderer, template: str, ask: dict[str, Any], limits: SandboxLimits, out: TextIO
) -> bool:
    """Render one ask and write what came of it; False when a limit was reached."""
    within = True
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, limits.seconds)
        text = render(template, ask["messages"], tools=ask["tools"] or None, **ask["variables"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if len(text) > limits.characters:
            raise LimitError(f"the text is longer than {limits.characters:,} characters")
        said = {"text": text}
    except LimitError as e:
        said, within = (
            {
                "error": f"chat template: {str(e) or f'rendering takes longer than {limits.seconds:g} s'}"
            },
            False,
        )
    except InputError as e:
        said, within = {"error": str(e)}, not isinstance(e.__cause__, MemoryError)
        if not within:
            said = {
                "error": f"chat template: rendering takes more than {limits.memory_bytes // 2**20} MiB of memory"
            }
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    json.dump({"name": ask["name"], **said}, out)
    out.write("\n")
    out.flush()
    return within


def _jinja() -> Renderer:
    """The project's own."""
    from quant.chat.template import render_template as render

    return render


def _transformers() -> Renderer:
    """What Python programs use."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(
        template: str, messages: list[Any], *, tools: list[Any] | None, **variables: Any
    ) -> str:
        try:
            texts: Any = render_jinja_template(
                [messages], tools=tools, chat_template=template, **variables
            )
        except (
            Exception
        ) as e:  # as our own rendering: a template can fail in every way that Python knows
            raise InputError(f"chat template: cannot render the conversation: {e}") from e
        return str(texts[0][0])

    return render


ENGINES: dict[str, Callable[[], Renderer]] = {"jinja": _jinja, "transformers": _transformers}


def _too_long(*_: Any) -> NoReturn:
    raise LimitError


if __name__ == "__main__":
    child.run_job(render_job)

"""The child process in which a stranger's template is rendered, with little time and memory.

A child program, see :mod:`quant.core.child`. Each rendering is written as a line of JSON as soon as
it is there, because a limit may end the process at any of them.

A Jinja template is a program, and it comes with somebody's weights. Two fences stand around it:

- **Jinja's ImmutableSandboxedEnvironment** (see :mod:`quant.chat.template`), as in transformers: no
  attribute that begins with an underscore, no change of a list or dictionary. A template cannot
  reach ``__class__`` and from there ``os.system``. Its escapes were CVE-2024-56326 and
  CVE-2025-27516.
- **The kernel's limits**, because Jinja's sandbox limits neither time nor memory:
  ``{{ 'x' * 2**40 }}`` takes all memory, and ``{{ 9**9**9 }}`` never ends. After an escape they
  still forbid to start a process (RLIMIT_NPROC; root is exempt), to fill the disk (RLIMIT_FSIZE)
  and to leave a core file. The environment has no token
  (:data:`quant.chat.engines.KEPT_VARIABLES`).

Not forbidden: reading files, and the network. Both need an escape first.
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
from quant.core.errors import InputError

RESULTS = "results.jsonl"
RESULT_BYTES = 2**28
Renderer = Callable[..., str]


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of the process that renders a template."""

    memory_bytes: int = 512 * 2**20
    """Address space beyond what the process has before it sees the template."""
    seconds: float = 5
    """Processor time of one text. A long conversation takes some milliseconds."""
    all_seconds: int = 60
    """Processor time of all texts; the kernel ends what Python cannot interrupt."""
    characters: int = 2**22
    """Length of one text."""


class LimitError(BaseException):
    """A limit was reached.

    Not an Exception, so that no handler between here and the template's code swallows it.
    """


def render_job(job: Mapping[str, Any], folder: Path) -> None:
    """Render every request of the job, within limits."""
    # The engine is imported before the limits apply: transformers takes more memory than a
    # template.
    render = ENGINES[job["engine"]]()
    limits = SandboxLimits(**job["limits"])
    apply_limits(limits)
    with (folder / RESULTS).open("w") as out:
        for request in job["requests"]:
            if not _render(render, job["template"], request, limits, out):
                # Most of what follows would reach the limit too, and a process that ran out of
                # memory is not to be trusted with more.
                break


def apply_limits(limits: SandboxLimits) -> None:
    """Lower the limits of this process, soft and hard: they cannot be raised again."""
    # RLIMIT_AS limits the address space, the first field of statm; RLIMIT_CPU counts from the
    # start of the process, with the imports. Both limits are added to what is used already.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + limits.memory_bytes
    seconds = int(time.process_time()) + limits.all_seconds
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, RESULT_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        # A hard limit that is lower already (a container, a ulimit) may not be raised.
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))
    signal.signal(signal.SIGVTALRM, _raise_limit_error)


def _render(
    render: Renderer, template: str, request: dict[str, Any], limits: SandboxLimits, out: TextIO
) -> bool:
    """Render one request and write the outcome; return False if a limit was reached."""
    within_limits = True
    try:
        # ITIMER_VIRTUAL counts this process's own time, so that a busy machine is no failure.
        signal.setitimer(signal.ITIMER_VIRTUAL, limits.seconds)
        messages, tools = request["messages"], request["tools"] or None
        text = render(template, messages, tools=tools, **request["variables"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if len(text) > limits.characters:
            raise LimitError(f"the text is longer than {limits.characters:,} characters")
        outcome = {"text": text}
    except LimitError as e:
        reason = str(e) or f"rendering takes longer than {limits.seconds:g} s"
        outcome, within_limits = {"error": f"chat template: {reason}"}, False
    except InputError as e:
        outcome = {"error": str(e)}
        if isinstance(e.__cause__, MemoryError):
            mib = limits.memory_bytes // 2**20
            outcome = {"error": f"chat template: rendering takes more than {mib} MiB of memory"}
            within_limits = False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    json.dump({"name": request["name"], **outcome}, out)
    out.write("\n")
    # Now: a signal of the kernel would end the process with its buffer.
    out.flush()
    return within_limits


def _jinja() -> Renderer:
    """The engine of :mod:`quant.chat.template`."""
    from quant.chat.template import render_template

    return render_template


def _transformers() -> Renderer:
    """The engine of Python programs."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(
        template: str, messages: list[Any], *, tools: list[Any] | None, **variables: Any
    ) -> str:
        try:
            texts: Any = render_jinja_template(
                [messages], tools=tools, chat_template=template, **variables
            )
        except Exception as e:  # a template can fail in every way that Python has
            raise InputError(f"chat template: cannot render the conversation: {e}") from e
        return str(texts[0][0])

    return render


ENGINES: dict[str, Callable[[], Renderer]] = {"jinja": _jinja, "transformers": _transformers}


def _raise_limit_error(*_: Any) -> NoReturn:
    raise LimitError


if __name__ == "__main__":
    child.run_job(render_job)

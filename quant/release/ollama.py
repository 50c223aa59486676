"""What Ollama reads beside a GGUF: ``params`` and ``system`` on the hub, ``Modelfile`` locally.

Parameters are checked here because Ollama only warns about a wrong one and then goes on without it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.core.errors import InputError, raise_problems, suggest_name
from quant.plan.recipe import ModelRecipe
from quant.release.modelfile import format_modelfile

# Ollama's api/types.go: Options and Runner.
INTEGERS = tuple(
    "num_keep seed num_predict top_k repeat_last_n num_ctx num_batch num_gpu main_gpu num_thread"
    " draft_num_predict".split()
)
FLOATS = tuple(
    "temperature top_p min_p typical_p repeat_penalty presence_penalty frequency_penalty".split()
)
BOOLEANS = ("use_mmap",)
STRINGS = ("stop",)
"""Arrays of strings; a bare string is refused."""
KEYS = (*INTEGERS, *FLOATS, *BOOLEANS, *STRINGS)


def make_params(model: ModelRecipe) -> dict[str, Any]:
    """Return a model's ``params``.

    Every value is written out, also where it is Ollama's default: its defaults have changed before.
    """
    return asdict(model.sampling) | {
        "num_ctx": model.ollama.num_ctx,
        "stop": list(model.ollama.stop),
    }


def render_modelfile(model: ModelRecipe, file: str) -> str:
    """Return the Modelfile for one unsplit file. Raises InputError as :func:`format_modelfile`."""
    return format_modelfile(file, make_params(model), model.ollama.system)


def read_params(path: Path) -> dict[str, Any]:
    """Return the parameters in a file. Raises InputError for one that Ollama would not accept."""
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    if not isinstance(params, dict):
        raise InputError(f"{path}: expected an object, found {params!r:.80}")
    raise_problems(find_params_problems(params, str(path)))
    return params


def find_params_problems(params: Mapping[str, Any], where: str = "params") -> Iterator[str]:
    """Yield a line for each parameter that Ollama does not know, and each value that it refuses."""
    for key, value in params.items():
        if key not in KEYS:
            yield f"{where}: {key}: Ollama knows no such parameter: {suggest_name(key, KEYS)}"
        elif not _is_accepted(key, value):
            yield f"{where}: {key}: expected {_describe_type(key)}, found {value!r}"


def _is_accepted(key: str, value: Any) -> bool:
    if key in STRINGS:
        return isinstance(value, list) and all(isinstance(v, str) and v for v in value)
    if key in BOOLEANS:
        return isinstance(value, bool)
    if isinstance(value, bool):  # a bool is an int in Python
        return False
    if key in INTEGERS:
        return isinstance(value, int)
    # Python's json accepts Infinity and NaN, Go's does not.
    return isinstance(value, int | float) and abs(value) < float("inf")


def _describe_type(key: str) -> str:
    if key in STRINGS:
        return "an array of strings"
    if key in BOOLEANS:
        return "true or false"
    return "a whole number" if key in INTEGERS else "a number"

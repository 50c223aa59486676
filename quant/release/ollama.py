"""What Ollama reads beside a GGUF on the hub: ``params`` and the Go ``template``; checked here, because it only warns.

Pure, but for the reading of a template and the import of what renders it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quant.errors import suggest_name

# Ollama's api/types.go: Options and Runner.
INTEGERS = (
    "num_keep",
    "seed",
    "num_predict",
    "top_k",
    "repeat_last_n",
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "draft_num_predict",
)
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)
BOOLEANS = ("use_mmap",)
STRINGS = ("stop",)
"""Arrays of them; a bare string is refused."""
KEYS = (*INTEGERS, *FLOATS, *BOOLEANS, *STRINGS)


def params_problems(params: Mapping[str, Any], where: str = "params") -> Iterator[str]:
    """Every key that Ollama does not know, and every value that it does not take for its key."""
    for key, value in params.items():
        if key not in KEYS:
            yield f"{where}: {key}: Ollama knows no such parameter: {suggest_name(key, KEYS)}"
        elif not _fits(key, value):
            yield f"{where}: {key}: expected {_expected(key)}, found {value!r}"


def _fits(key: str, value: Any) -> bool:
    if key in STRINGS:
        return isinstance(value, list) and all(isinstance(v, str) and v for v in value)
    if key in BOOLEANS:
        return isinstance(value, bool)
    if isinstance(value, bool):  # which Python takes for a number
        return False
    return (
        isinstance(value, int)
        if key in INTEGERS
        else isinstance(value, (int, float)) and abs(value) < float("inf")
    )


def _expected(key: str) -> str:
    if key in STRINGS:
        return "an array of strings"
    if key in BOOLEANS:
        return "true or false"
    return "a whole number" if key in INTEGERS else "a number"

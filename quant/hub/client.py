"""The hub as this project meets it: its client, the token that is shown to it, patience, and errors in one line.

The token comes from the environment (HF_TOKEN) and from nowhere else: not from a file that a login left, not from a call.
It is in no error and in no line of the client's log, and neither is what makes an address in the hub's storage open to
anybody who has it.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from quant.core.secrets import TOKEN, redact_urls
from quant.errors import InputError, Unreachable

COMMIT = re.compile(r"[0-9a-f]{40}")


REPO = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")


if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
TRIES = 4
LONGEST_WAIT_SECONDS = 300
"""A limit of the hub is counted over five minutes."""
MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed; whatever else is refused is refused for good."""
CLIENTS = ("huggingface_hub", "httpx2", "httpcore2", "hf_xet")


def read_token() -> str | None:
    """The token that the environment holds. Raises InputError for one that no header can carry, without telling it."""
    found = os.environ.get(TOKEN, "").strip()
    if not found:
        return None
    if not re.fullmatch(r"[!-~]+", found):
        raise InputError(
            f"{TOKEN}: expected a token of the hub, found something with blanks or strange letters in it"
        )
    return found


def make_client() -> "HfApi":
    """The hub's own client, with the token of the environment or with none."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    _hide_in_logs()
    if not os.isatty(2):
        disable_progress_bars()
    return HfApi(token=read_token() or False)


def retry(ask: Callable[[], T]) -> T:
    """Ask again when the hub stumbles, as long as it says, a few times: for requests that its client does not repeat."""
    from httpx2 import HTTPError

    for tried in range(TRIES - 1):
        try:
            return ask()
        except HTTPError as e:
            if not is_transient(e):
                raise
            time.sleep(_wait(e, 2.0**tried))
    return ask()


def is_transient(e: BaseException) -> bool:
    """Whether the same request may succeed in a while: no answer, a stumbling hub, a limit that is counted anew."""
    response = getattr(e, "response", None)
    return response is None or response.status_code in MAY_PASS


def read_status(e: BaseException) -> int | None:
    """The status of the answer that an error is about; none when there was no answer."""
    return getattr(getattr(e, "response", None), "status_code", None)


@contextmanager
def convert_errors(repo: str, revision: str = "main") -> Iterator[None]:
    """Say in one line what the hub's client means: something to be mended, or something that may pass."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError, XetDownloadError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, HFValidationError, XetDownloadError) as e:
        cause = _cause(e)
        if isinstance(cause, OSError) and cause.errno is not None:
            raise  # the disk's, not the hub's
        if said := _refusal(cause, repo, revision):
            raise InputError(said) from None
        raise Unreachable(
            f"{repo}@{revision}: the hub did not deliver ({read_error_text(cause)}); run again to continue"
        ) from None


def _cause(e: BaseException) -> BaseException:
    """What is behind an error that only says that a file was not sent, or is not cached."""
    while isinstance(e, RuntimeError | FileNotFoundError) and e.__cause__ is not None:
        e = e.__cause__
    return e


def _refusal(e: BaseException, repo: str, revision: str) -> str | None:
    """What the person at the keyboard has to do about a refusal; none for what may pass."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(e, GatedRepoError):
        return f"{repo}: its owners ask for something first; see https://huggingface.co/{repo}, and set {TOKEN}"
    if isinstance(e, RepositoryNotFoundError):
        return f"{repo}: not on the hub, or private; if it is private, set {TOKEN} to a token that may read it"
    if isinstance(e, RevisionNotFoundError):
        return f"{repo}: expected a commit of it, found {revision!r}, which it does not have"
    if read_status(e) == 401:
        found = (
            "not set, and the hub asks for one"
            if read_token() is None
            else "the hub does not know this token"
        )
        return f"{TOKEN}: {found}; make one at https://huggingface.co/settings/tokens"
    if read_status(e) == 507 or (read_status(e) == 403 and "storage" in str(e).lower()):
        return f"{repo}: no space left on the hub ({read_error_text(e)})"
    if read_status(e) == 403:
        return f"{repo}: this token may not do that ({read_error_text(e)}); it needs the permission to write to the repo"
    if (code := read_status(e)) and 400 <= code < 500 and not is_transient(e):
        return f"{repo}: the hub refuses ({read_error_text(e)})"
    return None


def read_error_text(e: BaseException) -> str:
    """The first line of an error, with nothing in it that must stay secret."""
    answer = getattr(e, "server_message", None)
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    first = lines[0] if lines else type(e).__name__
    return redact_urls(
        f"{read_status(e)}: {answer}" if answer and 400 <= (read_status(e) or 0) < 500 else first
    )


def _wait(e: Any, otherwise: float) -> float:
    from huggingface_hub.utils._http import parse_ratelimit_headers

    headers = e.response.headers if getattr(e, "response", None) is not None else {}
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        return float(min(limit.reset_in_seconds + 1, LONGEST_WAIT_SECONDS))
    after = str(headers.get("retry-after", ""))
    return float(min(int(after), LONGEST_WAIT_SECONDS)) if after.isdigit() else otherwise


def _hide_in_logs() -> None:
    """Let no record of the clients say a secret, whoever writes it down: their warnings quote whole addresses."""
    make = logging.getLogRecordFactory()
    if getattr(make, "hides", False):
        return

    def hiding(*args: Any, **kw: Any) -> logging.LogRecord:
        record = make(*args, **kw)
        if record.name.partition(".")[0] in CLIENTS:
            record.msg, record.args = redact_urls(record.getMessage()), ()
        return record

    hiding.hides = True  # type: ignore[attr-defined]  # marks our own function
    logging.setLogRecordFactory(hiding)

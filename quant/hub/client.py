"""The hub's client: the token, retries, and the hub's errors in one line each.

The token comes from the environment (HF_TOKEN) and from nowhere else: not from a file that a login
left, not from an argument. It is in no error and in no line of the client's log. Neither is the
query of a storage URL, which is a signature: whoever has it can read the file.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from quant.core.errors import InputError, Unreachable
from quant.core.secrets import TOKEN, redact_urls

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

# A full object id of git. Short ones can become ambiguous, so none is accepted.
COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
# Four tries with 1, 2 and 4 s between them, unless the answer names a time.
MAX_TRIES = 4
MAX_WAIT_SECONDS = 300
"""The hub counts its rate limits over five minutes."""
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed. Any other refusal is final."""
CLIENT_LOGGERS = ("huggingface_hub", "httpx2", "httpcore2", "hf_xet")


def read_token() -> str | None:
    """Return the token of the environment, or None if there is none.

    Raises:
        InputError: It has characters that no HTTP header can carry. The token is not quoted.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        return None
    if not re.fullmatch(r"[!-~]+", token):
        raise InputError(
            f"{TOKEN}: expected a token of the hub, found something with blanks or strange letters"
            " in it"
        )
    return token


def make_client() -> "HfApi":
    """Return the hub's own client, with the token of the environment or with none."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    _redact_logs()
    if not os.isatty(2):
        # In a log every redraw of a bar would be a line.
        disable_progress_bars()
    # False, not None: None would send the token of a `hf auth login` on this machine.
    return HfApi(token=read_token() or False)


def retry(request: Callable[[], T]) -> T:
    """Make a request, and repeat it after a transient failure, up to four tries in all.

    For methods of the client that do not retry by themselves, such as ``create_repo``.
    huggingface_hub's ``http_backoff`` cannot serve them: it takes a method and a URL, and it waits
    as long as a rate limit says, where this waits five minutes at most.

    Raises:
        HTTPError: The last try failed, or the failure is final.
    """
    from httpx2 import HTTPError

    for attempt in range(MAX_TRIES - 1):
        try:
            return request()
        except HTTPError as e:
            if not is_transient(e):
                raise
            time.sleep(_choose_wait(e, 2.0**attempt))
    return request()


def is_transient(e: BaseException) -> bool:
    """Return whether a retry may help: no answer, a server error, or a rate limit."""
    response = getattr(e, "response", None)
    # No response: the connection failed or broke, which says nothing about the request.
    return response is None or response.status_code in TRANSIENT_STATUS


def read_status(e: BaseException) -> int | None:
    """Return the HTTP status that an error is about, or None if there was no answer."""
    return getattr(getattr(e, "response", None), "status_code", None)


@contextmanager
def convert_errors(repo: str, revision: str = "main") -> Iterator[None]:
    """Convert the client's errors into ours while the block runs.

    Args:
        repo: OWNER/NAME of the repo that the requests are about.
        revision: The branch, tag or commit.

    Raises:
        InputError: The hub refuses for good; the line says what to do about it.
        Unreachable: The hub did not deliver, and the same command may succeed later.
        OSError: An error of this machine's disk, unchanged.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError, XetDownloadError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, HFValidationError, XetDownloadError) as e:
        cause = _find_cause(e)
        if isinstance(cause, OSError) and cause.errno is not None:
            raise  # HTTP errors of the client are OSErrors too, but have no errno
        if refusal := _describe_refusal(cause, repo, revision):
            raise InputError(refusal) from None
        raise Unreachable(
            f"{repo}@{revision}: the hub did not deliver ({read_error_text(cause)});"
            " run again to continue"
        ) from None


def read_error_text(e: BaseException) -> str:
    """Return the first line of an error, without secrets."""
    status, message = read_status(e) or 0, getattr(e, "server_message", None)
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = lines[0] if lines else type(e).__name__
    return redact_urls(f"{status}: {message}" if message and 400 <= status < 500 else text)


def _find_cause(e: BaseException) -> BaseException:
    """Return what is behind an error that only says that a file was not sent, or is not cached."""
    # huggingface_hub 2.4.0 raises RuntimeError for a file that was not sent (_commit_api.py) and
    # LocalEntryNotFoundError for one that was not fetched, each from the HTTP error.
    while isinstance(e, RuntimeError | FileNotFoundError) and e.__cause__ is not None:
        e = e.__cause__
    return e


def _describe_refusal(e: BaseException, repo: str, revision: str) -> str | None:
    """Return what the user has to do about a refusal, or None for a transient failure."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, text = read_status(e) or 0, read_error_text(e)
    # The order counts: GatedRepoError is a RepositoryNotFoundError.
    if isinstance(e, GatedRepoError):
        return (
            f"{repo}: its owners ask for something first;"
            f" see https://huggingface.co/{repo}, and set {TOKEN}"
        )
    if isinstance(e, RepositoryNotFoundError):
        return (
            f"{repo}: not on the hub, or private;"
            f" if it is private, set {TOKEN} to a token that may read it"
        )
    if isinstance(e, RevisionNotFoundError):
        return f"{repo}: expected a commit of it, found {revision!r}, which it does not have"
    if status == 401:
        reason = "not set, and the hub asks for one"
        if read_token() is not None:
            reason = "the hub does not know this token"
        return f"{TOKEN}: {reason}; make one at https://huggingface.co/settings/tokens"
    # The client has no class for a full storage. The hub's text names it where the status does not.
    if status == 507 or (status == 403 and "storage" in str(e).lower()):
        return f"{repo}: no space left on the hub ({text})"
    if status == 403:
        return (
            f"{repo}: this token may not do that ({text});"
            " it needs the permission to write to the repo"
        )
    if 400 <= status < 500 and not is_transient(e):
        return f"{repo}: the hub refuses ({text})"
    return None


def _choose_wait(e: Any, default: float) -> float:
    """Return the seconds to wait before the next try: what the answer says, else the default."""
    # Public (in __all__), but the package loads it lazily, where mypy does not see it.
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = e.response.headers if getattr(e, "response", None) is not None else {}
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        # One more second against rounding, as huggingface_hub does.
        return float(min(limit.reset_in_seconds + 1, MAX_WAIT_SECONDS))
    after = str(headers.get("retry-after", ""))
    return float(min(int(after), MAX_WAIT_SECONDS)) if after.isdigit() else default


def _redact_logs() -> None:
    """Redact every log record of the client libraries: their warnings quote whole URLs."""
    # A filter would have to be on every handler of every program that uses this library. All
    # records pass through the factory.
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*args: Any, **kw: Any) -> logging.LogRecord:
        record = make(*args, **kw)
        if record.name.partition(".")[0] in CLIENT_LOGGERS:
            record.msg, record.args = redact_urls(record.getMessage()), ()
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]  # marks our own function
    logging.setLogRecordFactory(make_redacted)

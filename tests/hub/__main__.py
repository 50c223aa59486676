"""The stand-in by hand: ``python -m tests.hub FOLDER [PORT]`` until it is interrupted."""

import signal
import sys
from pathlib import Path

from tests.hub import running

TOKEN = "hf_stand_in"


def main(folder: str, port: str = "8790") -> None:
    """Answer on that port, and keep repos in that folder."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with running(place, int(port)) as hub:
        hub.tokens[TOKEN] = "write"
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN}", flush=True)  # noqa: T201 - a program of its own
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main(*sys.argv[1:])

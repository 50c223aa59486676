"""``quant`` in forked processes: starting Python and importing the hub's client takes a second."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from tests.hub import Hub
from tests.quant.conftest import TOKEN


class Publisher:
    """Runs ``quant publish FOLDER`` with arguments, in a process of its own."""

    def __init__(self, server: "subprocess.Popen[str]", the_hub: Hub, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.env = {"HF_ENDPOINT": the_hub.url, "HF_TOKEN": TOKEN}
        self.started = Event()
        self.pid = 0

    def run(self, *args: str, **env: str) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error; the token is in neither."""
        assert self.server.stdin and self.server.stdout
        out, err = (self.folder.parent / name for name in ("stdout", "stderr"))
        request = {
            "args": ["publish", str(self.folder), *args],
            "env": self.env | env,
            "files": [str(out), str(err)],
        }
        self.started.clear()
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())
        self.started.set()
        code = int(self.server.stdout.readline())
        texts = out.read_text(), err.read_text()
        assert TOKEN not in "".join(texts)
        assert "Traceback" not in texts[1]
        return code, *texts

    def kill(self) -> None:
        """Kill the process that runs; for the hub, which is asked by it."""
        assert self.started.wait(60)
        os.kill(self.pid, 9)


@contextmanager
def serve() -> Iterator["subprocess.Popen[str]"]:
    """Run the process that all others are forked from."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    settings = {"HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    line = [sys.executable, "-m", "tests.quant.release.publisher"]
    with subprocess.Popen(line, env=env | settings, **pipes) as process:
        yield process
        process.kill()


def main() -> None:
    """Fork a process for each line of standard input, and print its number and its exit code."""
    # What a publication imports, before the fork.
    import huggingface_hub.hf_api
    import huggingface_hub.lfs  # noqa: F401 - as above

    import quant.cli.publish
    import quant.release.change
    import quant.release.publish  # noqa: F401 - as above
    from quant.release.manifest import Manifest
    from tests.quant.release.manifests import make_manifest

    Manifest.from_json(make_manifest().to_json(), "warm-up")

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request["args"], request["env"], request["files"])
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def run(args: list[str], env: Mapping[str, str], files: list[str]) -> None:
    """Become ``quant`` with these arguments."""
    from huggingface_hub import constants

    from quant import cli

    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    # The client has read the address already, when it was imported.
    constants.ENDPOINT = env["HF_ENDPOINT"]
    constants.HUGGINGFACE_CO_URL_TEMPLATE = (
        f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    time.sleep = lambda _: None  # retry without waiting
    sys.argv = ["quant", *args]
    cli.main()


if __name__ == "__main__":
    main()

"""A stand-in for the Hugging Face hub on loopback that speaks its protocol to the real client, and fails on cue.

Repos, commits with parents, tags, pull requests, listings in pages, downloads with ranges, uploads in one piece or in parts,
typed errors. It has no Xet: the client has to be started with HF_HUB_DISABLE_XET=1.

Large files are stored as the hub stores them: the repo answers with a redirect to another host, here ``localhost`` where
the repo itself is on ``127.0.0.1``, so that a token which is sent on to the storage shows. They lie in files, which may be
sparse: a shard of 50 GB costs nothing.

By hand: ``python -m tests.hub FOLDER`` keeps its repos in FOLDER, and says how to reach it.
"""

from tests.hub.handler import PAGE, SIGNED
from tests.hub.repos import Blob, Commit, Fault, Hub, Request, git_digest, sha256
from tests.hub.server import running

__all__ = [
    "PAGE",
    "SIGNED",
    "Blob",
    "Commit",
    "Fault",
    "Hub",
    "Request",
    "git_digest",
    "running",
    "sha256",
]

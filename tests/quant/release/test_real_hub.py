"""The real hub, if somebody asks for it: ``QUANT_TEST_HUB_REPO=OWNER/NAME`` and a token that may write there.

It makes a private repo when there is none, and leaves one commit and one tag for each change of the
content below.
"""

import os
from pathlib import Path

import pytest

from quant.hub.upload import Destination
from quant.release.change import plan_change
from quant.release.publish import publish_release
from tests.quant.release.publishing import CARD, write_release

REPO = os.environ.get("QUANT_TEST_HUB_REPO", "")
CONTENT = {"README.md": CARD, "tiny.gguf": b"two small files" * 1000}

pytestmark = pytest.mark.skipif(
    not (REPO and os.environ.get("HF_TOKEN")),
    reason="QUANT_TEST_HUB_REPO and HF_TOKEN name a repo of the real hub",
)


def test_a_release_is_published_once_and_stands_there_the_second_time(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "tiny", CONTENT)
    target = Destination(REPO, private=True)
    first = publish_release(plan_change(folder, target))
    again = publish_release(plan_change(folder, target))
    assert (again.commit, again.tag, again.fresh) == (first.commit, first.tag, False)

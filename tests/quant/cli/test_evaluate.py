"""`quant evaluate`: the document that scripts read, and the page."""

import json
import re
from pathlib import Path

import pytest

from quant.llama import toolchain
from tests.quant.cli.conftest import Run


@pytest.mark.tools
def test_the_document_has_the_keys_that_scripts_read(
    run: Run, tiny: tuple[Path, Path, Path]
) -> None:
    base, quantized, text = tiny
    code, out, _ = run(
        *("evaluate", base, quantized, base),
        *("--text", text, "--chunks", "4", "--threads", "1", "--json"),
    )
    assert code == 0
    document = json.loads(out)
    assert document.keys() == {"base", "files", "difference"}
    assert document["base"] == base.name
    assert document["files"][0].keys() == {
        *("file", "bytes", "chunks", "ppl", "ppl_base", "top1", "domains"),
        *("kld_mean", "kld_mean_low", "kld_mean_high"),
        *("kld_median", "kld_p99", "kld_p999", "kld_max"),
    }
    assert document["files"][0]["bytes"] == quantized.stat().st_size
    assert document["difference"].keys() == {"kld_mean", "low", "high"}
    assert document["difference"]["high"] < 0  # the base is better than the file


@pytest.mark.tools
def test_a_page_marks_files_and_peers_differently(
    run: Run, tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, quantized, text = tiny
    tools = toolchain.find_toolchain()
    arguments: list[str | Path] = [base, tmp_path / "peer.gguf", "Q8_0", "1"]
    tools.run("llama-quantize", arguments, cwd=tmp_path, log=tmp_path / "log")
    code, out, _ = run(
        *("evaluate", base, quantized, "--text", text, "--chunks", "4", "--threads", "1"),
        *("--peer", tmp_path / "peer.gguf", "--html", tmp_path / "page.html"),
    )
    assert code == 0
    assert "peer.gguf less q.gguf: -" in out and "clearly different" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count('<circle class="dot"') == page.count('<path class="peer"') == 1
    assert re.search(r'<tr class="peer"><td title="[\d,]+ bytes; KLD .*">peer</td>', page)
    assert re.search(r'<tr><td title="[\d,]+ bytes; KLD .*">q</td>', page)
    assert "quantization error" not in page  # which only a release's manifest knows


def test_texts_of_one_name_are_refused(run: Run, tmp_path: Path) -> None:
    texts = [tmp_path / folder / "code.txt" for folder in ("a", "b")]
    code, _, err = run("evaluate", "b.gguf", "q.gguf", "--text", texts[0], "--text", texts[1])
    assert code == 2
    assert "--text: expected texts with different names" in err

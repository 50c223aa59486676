"""The text by which the study judges files is not the text on which it measured sensitivities."""

from tests.benchmarks.study_files import make_texts
from tests.models.twins import TINY_GLM


def test_no_conversation_and_no_piece_of_code_is_on_both_sides() -> None:
    calibration, held_out = make_texts((TINY_GLM / "chat_template.jinja").read_text())
    assert set(held_out) == {"chat", "code"}
    for parts in held_out.values():
        assert len(parts) > 50
        assert not set(calibration) & set(parts)

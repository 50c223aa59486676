"""What the study is judged by is not what its sensitivities saw."""

from tests.benchmarks.allocation_study import texts
from tests.models.twins import TINY_GLM


def test_no_conversation_and_no_piece_of_code_is_on_both_sides() -> None:
    seen, held_out = texts((TINY_GLM / "chat_template.jinja").read_text())
    assert set(held_out) == {"chat", "code"}
    for parts in held_out.values():
        assert len(parts) > 50
        assert not set(seen) & set(parts)

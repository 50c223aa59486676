"""Chat templates of models whose own could not be had: a sister's from llama.cpp's collection, with what is known to differ.

What differs is known from public descriptions of the prompts. The real ones may differ elsewhere too; then a patch does
not find its anchors, and a build stops before it has cost anything.
"""

from quant.chat.check import COLLECTION

PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"


def exchanged(text: str, find: str, put: str) -> str:
    """The text with one exact replacement, which must be possible once."""
    assert text.count(find) == 1, find
    return text.replace(find, put)


def glm_4_6v() -> str:
    """GLM-4.6V: GLM-4.6's prompts, in which a picture stands as three tokens where its part stands."""
    return exchanged(
        authors_glm_4_6(),
        "{{- item.text }}\n",
        "{{- item.text }}\n            {%- elif item is mapping and item.type in ['image', 'image_url'] -%}\n"
        f"                {{{{- '{PICTURE}' }}}}\n",
    )


def glm_5() -> str:
    """GLM-5: GLM-4.7's prompts; reasoning that is kept is written as it came, with its blanks."""
    return exchanged(
        (COLLECTION / "GLM-4.7-Flash.jinja").read_text(),
        "{{ '<think>' + reasoning_content.strip() +  '</think>'}}",
        "{{ '<think>' + reasoning_content +  '</think>'}}",
    )


def authors_glm_4_6() -> str:
    """GLM-4.6 as its authors published it: ggml's copy without the guard that ggml added."""
    guard = """{% set _args = tc.arguments or {} %}
{% if _args is not mapping %}
    {{ raise_exception("Invalid tool call arguments passed: " + _args | string) }}
{% endif %}
"""
    return exchanged(
        (COLLECTION / "GLM-4.6.jinja").read_text(), guard, "{% set _args = tc.arguments %}\n"
    )

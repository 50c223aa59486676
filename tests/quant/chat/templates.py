"""Chat templates that several test modules use, and what Jinja makes of them."""

from quant.chat.check import COLLECTION
from quant.chat.conversations import build_conversations
from quant.chat.engines import decode_arguments
from quant.chat.families import load_family
from quant.chat.messages import Conversation
from quant.chat.renderings import Rendering, Renderings, RenderRequest, list_requests
from quant.chat.template import patch_template, render_template
from quant.core.errors import InputError
from quant.plan.load import load_template_patch
from tests.models.templates import authors_glm_4_6, glm_4_6v, glm_5

GLM = load_family("glm")
CONVERSATIONS = build_conversations(GLM)
FILES = {"glm-4.6": "GLM-4.6.jinja", "glm-4.7": "GLM-4.7-Flash.jinja"}
"""Templates of llama.cpp's collection, by the name of their patch."""
ORIGINALS = {name: (COLLECTION / file).read_text() for name, file in FILES.items()}
ORIGINALS |= {"the authors' 4.6": authors_glm_4_6(), "glm-4.6v": glm_4_6v(), "glm-5": glm_5()}
PATCHES = {
    "glm-4.6": "glm-4.6",
    "glm-4.7": "glm-4.7",
    "the authors' 4.6": "glm-4.6",
    "glm-4.6v": "glm-4.6",
    "glm-5": "glm-4.7",
}
"""The patch of each template."""
PATCHED = {
    name: patch_template(text, load_template_patch(PATCHES[name]), name).text
    for name, text in ORIGINALS.items()
}
SHORT = tuple(
    c
    for c in CONVERSATIONS
    if c.name in ("one turn", "raw reasoning, two turns", "a result as parts")
)
"""Three conversations, for tests of the whole check: all of them take their time."""


def render_all(
    template: str, conversations: tuple[Conversation, ...] = CONVERSATIONS
) -> Renderings:
    """Render conversations in this process: these templates are known."""

    def render(request: RenderRequest) -> Rendering:
        messages = decode_arguments(request.messages)
        tools = list(request.conversation.tools) or None
        try:
            return Rendering(render_template(template, messages, tools=tools, **request.variables))
        except InputError as e:
            return Rendering(None, str(e))

    return {request.name: render(request) for request in list_requests(conversations)}


RENDERED = {name: render_all(template) for name, template in PATCHED.items()}
RENDERED_ORIGINALS = {name: render_all(template) for name, template in ORIGINALS.items()}

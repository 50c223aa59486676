"""Checks of a file that need no answer of the model: template, tokens, end of turn, weights."""

from collections.abc import Iterator, Sequence
from typing import Any

from quant.chat.families import ModelFamily
from quant.chat.runner import SmokeRunner
from quant.core.format import hash_text
from quant.llama.chat_client import ChatClient, Message
from quant.llama.gguf import Header

FILE_CHECKS = (
    "template",
    "generation prompt",
    "special tokens",
    "end of turn",
    "tool format",
    "weights",
    "raw history, thinking on",
    "raw history, thinking off",
)
"""Their names, in order; waivers name them."""
END_KINDS = ("eos", "eot", "eom")
"""Metadata keys of tokens that end an answer: ``tokenizer.ggml.eos_token_id`` and so on."""
WINDOW_BYTES = 2**16
RAW_REASONING = "They greet me at some length."


def check_file(runner: SmokeRunner, headers: Sequence[Header], end_tokens: Sequence[str]) -> None:
    """Record all checks of a served file.

    Args:
        runner: Connected to the server; records the checks.
        headers: The headers of the file's shards.
        end_tokens: Tokens that must end an answer. Empty: any eos token will do.
    """
    client, family = runner.client, runner.family
    tokens, header = runner.scenarios.tokens, headers[0]
    # Tokens that were only probed are not required: the template may mention others' tokens.
    single = tokens.single or (family.control_tokens if family.name else ())
    template = header.metadata.get("tokenizer.chat_template")
    runner.record("template", _find_template_faults(client, template))
    runner.record("generation prompt", _find_generation_faults(client))
    runner.record("special tokens", _find_token_faults(client, single))
    runner.record("end of turn", _find_end_faults(header, end_tokens))
    runner.record("tool format", _find_format_faults(runner, tokens.call))
    runner.record("weights", (fault for h in headers for fault in find_zero_tensors(h)))
    for thinking in (True, False):
        name = f"raw history, thinking {'on' if thinking else 'off'}"
        runner.record(name, _find_history_faults(runner, family, thinking))


def find_zero_tensors(header: Header) -> Iterator[str]:
    """Yield every weight of a file that is zero throughout.

    No trained model has one: data was lost, by a failed copy or a sparse file. The start, the
    middle and the end of each tensor are read; all of it only if those are zero.
    """
    with header.path.open("rb") as f:

        def is_zero(offset: int, length: int) -> bool:
            f.seek(header.data_start + offset)
            return not any(f.read(length))

        for t in header.tensors:
            # Biases are left out: many start at zero, and may stay there.
            if not t.name.endswith(".weight") or not t.bytes:
                continue
            last = max(0, t.bytes - WINDOW_BYTES)
            # all() stops at the first window that is not zero: of a sound tensor 64 KiB are
            # read, of a broken one everything.
            samples, windows = (0, last // 2, last), range(0, t.bytes, WINDOW_BYTES)
            if all(
                is_zero(t.offset + at, min(WINDOW_BYTES, t.bytes - at))
                for positions in (samples, windows)
                for at in positions
            ):
                yield f"tensor {t.name}: expected weights, found {t.bytes} bytes of zero"


def _find_template_faults(client: ChatClient, template: Any) -> Iterator[str]:
    """Without a template that it can read, llama-server uses ChatML instead, without an error."""
    served = str(client.read_properties().get("chat_template"))
    if template is None:
        yield "the file has no chat template"
    elif served.strip() != str(template).strip():
        digests = f"sha256 {hash_text(served)[:12]}, not {hash_text(str(template))[:12]}"
        yield f"the server uses another template than the file's ({digests})"


def _find_generation_faults(client: ChatClient) -> Iterator[str]:
    messages: list[Message] = [{"role": "user", "content": "Hello."}]
    prompt, past = client.render_prompt(messages, True), client.render_history(messages, True)
    if prompt == past or not prompt.startswith(past):
        yield f"the rendered prompt has no generation prompt; it ends with {prompt[-40:]!r}"


def _find_token_faults(client: ChatClient, tokens: Sequence[str]) -> Iterator[str]:
    """A control token in pieces is plain text to the model, which was trained on the token."""
    for token in tokens:
        if (count := client.count_tokens(token)) != 1:
            yield f"{token}: expected one token of the vocabulary, found {count} pieces"


def _find_end_faults(header: Header, end_tokens: Sequence[str]) -> Iterator[str]:
    """If the metadata does not say where an answer ends, the model writes the user's part too."""
    vocabulary = header.metadata.get("tokenizer.ggml.tokens") or []
    ends = {}
    for kind in END_KINDS:
        number = header.metadata.get(key := f"tokenizer.ggml.{kind}_token_id")
        if isinstance(number, int) and 0 <= number < len(vocabulary):
            ends[key] = vocabulary[number]
    expected, key = ", ".join(end_tokens), "tokenizer.ggml.eos_token_id"
    if key not in ends:
        wanted = f"; expected one of {expected}" if end_tokens else ""
        yield f"{key}: missing, or no token of the vocabulary{wanted}"
    elif end_tokens and ends[key] not in end_tokens:
        yield f"{key}: expected one of {expected}, found {ends[key]}"
    if missing := [end for end in end_tokens if end not in ends.values()]:
        actual = ", ".join(ends.values()) or "none"
        yield f"expected {', '.join(missing)} to end an answer too, found {actual}"


def _find_format_faults(runner: SmokeRunner, markers: Sequence[str]) -> Iterator[str]:
    """A template of another family writes calls in a form that the model was not trained on."""
    if not markers or not runner.scenarios.tools:
        return
    tool = runner.scenarios.tools[0]
    # Arguments as text, as OpenAI's clients send them; the server has to decode them.
    function = {"name": tool.name, "arguments": '{"key": "value"}'}
    messages: list[Message] = [
        {"role": "user", "content": "Hello."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a result"},
    ]
    runner.last_prompt = runner.client.render_prompt(messages, True, [tool.declaration])
    # The text before the question describes the format, so only what follows it counts.
    written = runner.last_prompt.partition("Hello.")[2]
    if missing := [text for text in (*markers, tool.name, "a result") if text not in written]:
        yield (
            f"expected a call and its result to be written with {', '.join(missing)},"
            f" found {written[:200]!r}"
        )


def _find_history_faults(runner: SmokeRunner, family: ModelFamily, thinking: bool) -> Iterator[str]:
    """A client may leave the reasoning inside ``content``, as the model wrote it.

    It must not be in the next prompt, nor change the past: ``common_chat_format_single``
    (llama.cpp, common/chat.cpp) sends the difference between two renderings, and aborts if one is
    no prefix.
    """
    if not (reasoning := family.reasoning):
        return
    answer = f"{reasoning.open}{RAW_REASONING}{reasoning.close}\nHello!"
    messages: list[Message] = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": answer},
    ]
    past = runner.client.render_history(messages, thinking)
    messages.append({"role": "user", "content": "And again."})
    prompt = runner.last_prompt = runner.client.render_prompt(messages, thinking)
    if reasoning.drops_past and RAW_REASONING in prompt:
        yield "reasoning of an earlier turn is in the prompt of the next"
    if not prompt.startswith(past):
        yield (
            "the conversation so far is not a prefix of the next prompt: programs that send the"
            " difference break"
        )

"""Write a GGUF of some kilobytes for llama-server: a chat template, a vocabulary, weights of zero.

What a server makes of a conversation depends on the template and the vocabulary, not on the
weights. So a template is tested in llama-server without the model.
"""

from collections.abc import Iterable
from pathlib import Path

from quant.chat.families import SpecialTokens

WIDTH = 32
SQUARE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_stub_model(
    path: Path, template: str, tokens: SpecialTokens, control_tokens: Iterable[str] = ()
) -> None:
    """Write a model of one layer of zeros.

    Args:
        path: The file to write.
        template: Its chat template.
        tokens: bos and eos; ``""`` leaves the id out of the metadata.
        control_tokens: Added to the byte vocabulary as control tokens. llama-server's parser keeps
            the markers of reasoning and tool calls apart only if they are tokens.
    """
    import numpy as np
    from gguf import GGUFWriter, TokenType

    letters = _byte_letters()
    wanted = dict.fromkeys((*control_tokens, tokens.bos_token, tokens.eos_token))
    control = [token for token in wanted if token and token not in letters]
    vocabulary = [*letters, *control]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.NORMAL] * len(letters) + [TokenType.CONTROL] * len(control))
    # llama.cpp loads no BPE vocabulary without merges; what they merge does not matter here.
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    if tokens.bos_token:
        writer.add_bos_token_id(vocabulary.index(tokens.bos_token))
    if tokens.eos_token:
        writer.add_eos_token_id(vocabulary.index(tokens.eos_token))
    writer.add_chat_template(template)
    # Without output.weight, llama.cpp uses token_embd for both.
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(vocabulary), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.{name}": (WIDTH, WIDTH) for name in SQUARE},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_letters() -> list[str]:
    """The 256 letters of byte-level vocabularies: GPT-2's ``bytes_to_unicode`` (encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in printable]
    return [chr(n) for n in printable] + [chr(256 + n) for n in range(len(others))]

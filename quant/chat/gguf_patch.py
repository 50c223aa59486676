"""Replace the chat template of an existing GGUF; every other byte of metadata and tensors stays.

The metadata is not decoded and encoded again, which could change keys that this project does not
know. The one record is replaced in the raw header, and the data section is copied after it.
"""

import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.chat.template import ChatTemplate, patch_template
from quant.core import files
from quant.core.errors import CheckError, InputError, convert_disk_errors, raise_problems
from quant.llama.gguf import (
    ALIGNMENT,
    CHUNK_BYTES,
    FIRST_SHARD,
    STRING,
    Header,
    pad,
    read_header,
    read_headers,
)
from quant.plan.load import list_recipes, load_template_patch
from quant.plan.recipe import TemplatePatch

KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class PatchedFile:
    """A GGUF whose template was patched."""

    path: Path
    patch: str
    """The name of the patch."""
    template: ChatTemplate
    tensors: int
    """Number of tensors that were compared."""
    shards: int
    """Number of files of the whole model; only the first is written."""


def patch_file(first: Path, out: Path, name: str | None = None) -> PatchedFile:
    """Write a GGUF with its template patched.

    Args:
        first: The GGUF, or the first shard of a split one.
        out: The file to write: the whole GGUF, or its first shard.
        name: A template patch by name or path; None takes the one that fits.

    Raises:
        InputError: The file has no template, no patch fits, a shard is missing, or ``out`` exists.
        CheckError: The written file differs from the original in more than the template.
    """
    headers = read_headers(first)
    header = headers[0]
    raise_problems(_find_problems(header, len(headers), out))
    text = read_template(header)
    patch = load_template_patch(name) if name else find_fitting_patches(text, str(first))
    template = patch_template(text, patch, f"{first}: {KEY}")
    with convert_disk_errors(out), files.temp_folder(out) as folder:
        partial = folder / out.name
        write_with_template(header, template.text, partial)
        # Compared before it has its name: nobody finds a file that is not proven.
        if problems := list(find_file_differences(header, read_header(partial), template.text)):
            raise CheckError(*problems)
        files.replace_atomically(partial, out)
    return PatchedFile(out, patch.name, template, len(header.tensors), len(headers))


def read_template(header: Header) -> str:
    """Return the chat template of a file. Raises InputError if it has none."""
    text = header.metadata.get(KEY)
    if not isinstance(text, str) or not text:
        raise InputError(f"{header.path}: {KEY}: missing; this file has no chat template")
    return text


def find_fitting_patches(text: str, source: str) -> TemplatePatch:
    """Return the one patch of this project whose replacements all fit, or are all applied.

    Raises:
        InputError: None fits, or more than one.
    """
    names, fitting = list_recipes("templates"), []
    for patch in map(load_template_patch, names):
        try:
            patch_template(text, patch, source)
            fitting.append(patch)
        except InputError:
            continue
    if len(fitting) != 1:
        actual = " and ".join(patch.name for patch in fitting) or "none"
        raise InputError(
            f"{source}: expected one patch that fits its chat template, found {actual}; name one"
            f" with --patch to see where it does not fit: {', '.join(names)}"
        )
    return fitting[0]


def write_with_template(header: Header, text: str, out: Path) -> None:
    """Write a GGUF again with another template; nothing else is interpreted."""
    alignment = int(header.metadata.get("general.alignment", ALIGNMENT))
    with header.path.open("rb") as source, out.open("wb") as f:
        head = source.read(header.head_bytes)
        head = replace_template(head, read_template(header), text, str(header.path))
        # Tensor offsets count from the data section, which begins at a multiple of the alignment.
        f.write(head.ljust(pad(len(head), alignment), b"\0"))
        source.seek(header.data_start)
        shutil.copyfileobj(source, f, CHUNK_BYTES)


def replace_template(head: bytes, old: str, new: str, source: str) -> bytes:
    """Return the raw header of a GGUF with one template instead of another.

    Raises:
        InputError: The record's bytes do not occur exactly once: a text of the metadata may contain
            bytes that look like a record.
    """
    record = _encode_record(old)
    if (count := head.count(record)) != 1:
        raise InputError(
            f"{source}: {KEY}: expected its record once in the header, found it {count} times"
        )
    return head.replace(record, _encode_record(new))


def find_file_differences(before: Header, after: Header, text: str) -> Iterator[str]:
    """Yield what differs beside the template: keys, their order, tensors, their bytes."""
    expected = before.metadata | {KEY: text}
    # As lists, because the order of keys is part of what must stay; dicts compare without it.
    if list(after.metadata) != list(expected):
        yield f"{after.path}: keys: expected those of {before.path} in their order, found others"
    for key in expected.keys() & after.metadata.keys():
        # Compared as text, because one NaN is not equal to another.
        if repr(after.metadata[key]) != repr(expected[key]):
            yield f"{after.path}: {key}: expected the value of {before.path}, found another"
    if after.tensors != before.tensors:
        yield f"{after.path}: tensors: expected those of {before.path}, in place, found others"
        return
    digests = after.hash_tensors()
    for name, sha in before.hash_tensors().items():
        if digests[name] != sha:
            yield f"{after.path}: tensor {name}: expected sha256 {sha}, found {digests[name]}"


def describe_patch(patched: PatchedFile) -> Sequence[str]:
    """Return lines for the user: what was written, and what remains to be done."""
    digests = f"{patched.template.original_sha256[:12]} -> {patched.template.sha256[:12]}"
    tensors = f"{patched.tensors} tensors unchanged"
    lines = [f"{patched.path}: {KEY} patched by {patched.patch}, sha256 {digests}; {tensors}"]
    if patched.template.sha256 == patched.template.original_sha256:
        lines.append("the template had been patched before: this is a copy")
    if patched.shards > 1:
        if patched.tensors:
            lines.append("the first shard was written whole: its tensors follow the template")
        others = f"the other {patched.shards - 1} of {patched.shards} shards"
        lines.append(f"{others} stay as they are; llama.cpp finds them beside the first, by name")
    return lines


def _find_problems(header: Header, shards: int, out: Path) -> Iterator[str]:
    # 0 in a first shard, and absent from a file that is not split.
    if number := header.metadata.get("split.no"):
        yield (
            f"{header.path}: split.no: expected the first shard, which has the template,"
            f" found number {number + 1}"
        )
    if shards > 1 and not _is_first_of(out, shards):
        yield (
            f"{out}: expected a name that ends with -00001-of-{shards:05d}.gguf, because"
            " llama.cpp finds the other shards by it"
        )
    if out.exists() or out.is_symlink():
        yield f"{out}: exists already; name another file or remove it"


def _is_first_of(path: Path, shards: int) -> bool:
    match = FIRST_SHARD.fullmatch(path.stem)
    return path.suffix == ".gguf" and match is not None and int(match[2]) == shards


def _encode_record(text: str) -> bytes:
    """The template's key, type and value in the bytes of a GGUF (docs/gguf.md in ggml)."""
    return _encode_string(KEY) + struct.pack("<I", STRING) + _encode_string(text)


def _encode_string(text: str) -> bytes:
    raw = text.encode()
    # Lengths have 64 bits since version 2 of the format; read_header accepts only version 3.
    return struct.pack("<Q", len(raw)) + raw

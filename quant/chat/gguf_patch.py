"""Give an existing GGUF another chat template: a new file, in which every other byte of metadata and every tensor is as it was.

The metadata is not decoded and written again, which could change what this project does not know: the one record is cut
out of the raw head and another set in, and the data section is copied behind it.
"""

import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.chat.template import ChatTemplate
from quant.chat.template import patch_template as patch
from quant.core import files
from quant.errors import CheckError, InputError, convert_disk_errors, raise_problems
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
    """A GGUF with its template patched."""

    path: Path
    patch: str
    """The name of the patch."""
    template: ChatTemplate
    tensors: int
    """How many were compared."""
    shards: int
    """Files of the whole model; only the first is written."""


def patch_file(first: Path, out: Path, name: str | None = None) -> PatchedFile:
    """Write at ``out`` a GGUF (of a split model the first shard) with its template patched; no name: the patch that fits.

    Raises InputError for a file without a template, a patch that does not fit, a shard that is missing, a place that is
    taken; CheckFailed when what was written is not the file with another template.
    """
    headers = read_headers(first)
    header = headers[0]
    raise_problems(_problems(header, len(headers), out))
    by = (
        load_template_patch(name)
        if name
        else find_fitting_patches(read_template(header), str(first))
    )
    made = patch(read_template(header), by, f"{first}: {KEY}")
    with convert_disk_errors(out), files.temp_folder(out) as folder:
        partial = folder / out.name
        write_with_template(header, made.text, partial)
        if wrong := list(differences(header, read_header(partial), made.text)):
            raise CheckError(*wrong)
        files.replace_atomically(partial, out)
    return PatchedFile(out, by.name, made, len(header.tensors), len(headers))


def read_template(header: Header) -> str:
    """The chat template that a file holds. Raises InputError when it holds none."""
    text = header.metadata.get(KEY)
    if not isinstance(text, str) or not text:
        raise InputError(f"{header.path}: {KEY}: missing; this file holds no chat template")
    return text


def find_fitting_patches(text: str, where: str) -> TemplatePatch:
    """The one patch of the project whose replacements all fit, or all stand already. Raises InputError."""
    names, fits = list_recipes("templates"), []
    for by in map(load_template_patch, names):
        try:
            patch(text, by, where)
            fits.append(by)
        except InputError:
            continue
    if len(fits) != 1:
        found = " and ".join(by.name for by in fits) or "none"
        raise InputError(
            f"{where}: expected one patch that fits its chat template, found {found}; name one with --patch to see"
            f" where it does not fit: {', '.join(names)}"
        )
    return fits[0]


def write_with_template(header: Header, text: str, out: Path) -> None:
    """Write the file again with another template in place of its own; nothing else is interpreted."""
    alignment = int(header.metadata.get("general.alignment", ALIGNMENT))
    with header.path.open("rb") as source, out.open("wb") as f:
        head = replace_template(
            source.read(header.head_bytes), read_template(header), text, str(header.path)
        )
        f.write(head.ljust(pad(len(head), alignment), b"\0"))
        source.seek(header.data_start)
        shutil.copyfileobj(source, f, CHUNK_BYTES)


def replace_template(head: bytes, old: str, new: str, where: str) -> bytes:
    """The raw head of a GGUF with one template in place of another.

    Raises InputError when the record's bytes do not stand there once: a text could hold what looks like a record.
    """
    record = _record(old)
    if (found := head.count(record)) != 1:
        raise InputError(
            f"{where}: {KEY}: expected its record once in the head, found it {found} times"
        )
    return head.replace(record, _record(new))


def differences(before: Header, after: Header, text: str) -> Iterator[str]:
    """Whatever is not as it was, apart from the template: a key, the order of keys, a tensor's place or bytes."""
    expected = before.metadata | {KEY: text}
    if list(after.metadata) != list(expected):
        yield f"{after.path}: keys: expected those of {before.path} in their order, found others"
    for key in expected.keys() & after.metadata.keys():
        if repr(after.metadata[key]) != repr(
            expected[key]
        ):  # as text, because one NaN is not equal to another
            yield f"{after.path}: {key}: expected what {before.path} says, found something else"
    if after.tensors != before.tensors:
        yield f"{after.path}: tensors: expected those of {before.path} in their places, found others"
        return
    found = after.hash_tensors()
    for name, sha in before.hash_tensors().items():
        if found[name] != sha:
            yield f"{after.path}: tensor {name}: expected sha256 {sha}, found {found[name]}"


def describe_patch(done: PatchedFile) -> Sequence[str]:
    """The work in lines for the person who asked: why so much was written, and what is still to be done."""
    digests = f"{done.template.original_sha256[:12]} -> {done.template.sha256[:12]}"
    lines = [
        f"{done.path}: {KEY} patched by {done.patch}, sha256 {digests}; {done.tensors} tensors, each as it was"
    ]
    if done.template.sha256 == done.template.original_sha256:
        lines.append("the template had been patched before: this is a copy")
    if done.shards > 1:
        if done.tensors:
            lines.append(
                "the first shard was written whole: it holds tensors too, and they lie behind the template"
            )
        others = f"the other {done.shards - 1} of {done.shards} shards"
        lines.append(f"{others} stay as they are; llama.cpp finds them beside the first, by name")
    return lines


def _problems(header: Header, shards: int, out: Path) -> Iterator[str]:
    if number := header.metadata.get("split.no"):
        yield f"{header.path}: split.no: expected the first shard, which holds the template, found number {number + 1}"
    if shards > 1 and not _is_first_of(out, shards):
        yield f"{out}: expected a name that ends with -00001-of-{shards:05d}.gguf, because the other shards are found by it"
    if out.exists() or out.is_symlink():
        yield f"{out}: exists already; name another file or take it away"


def _is_first_of(path: Path, shards: int) -> bool:
    match = FIRST_SHARD.fullmatch(path.stem)
    return path.suffix == ".gguf" and match is not None and int(match[2]) == shards


def _record(text: str) -> bytes:
    """The template's key and value as they lie in a GGUF."""
    return _string(KEY) + struct.pack("<I", STRING) + _string(text)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw

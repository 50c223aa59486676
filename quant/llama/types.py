"""ggml's tensor types: one table of their ids, block lengths and block sizes. Pure.

The numbers are those of ``ggml/include/ggml.h`` (enum ggml_type) and ``ggml/src/ggml-common.h``
(the block structs). Tests compare the table with gguf-py's, and with the library that is loaded
(:meth:`quant.llama.ggml.Library.find_type_differences`). Everybody else asks
``type.bytes(elements)`` or ``type.bits_per_weight``.
"""

from dataclasses import dataclass

from quant.core.errors import InputError, suggest_name

FLOATS = ("BF16", "F16", "F32")
"""Names of the types that a converted checkpoint has."""


@dataclass(frozen=True)
class GGMLType:
    """A way to store a row of weights."""

    name: str
    id: int
    block: int
    """Weights in a block. A row is a whole number of blocks."""
    block_bytes: int
    needs_imatrix: bool = False
    """Whether llama-quantize refuses it without an importance matrix."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of a block per weight, scales included."""
        return 8 * self.block_bytes / self.block

    def bytes(self, elements: int) -> int:
        """Return the size of that many weights. Raises ValueError unless they fill whole blocks."""
        blocks, rest = divmod(elements, self.block)
        if rest:
            raise ValueError(f"{elements} weights do not fill blocks of {self.block} ({self.name})")
        return blocks * self.block_bytes

    def fits(self, row: int) -> bool:
        """Whether a row of that length is a whole number of blocks."""
        return row % self.block == 0


TYPES = {
    t.name: t
    for t in (
        # The bytes of a block are summed field by field, as its struct has them.
        #        name      id  block  bytes
        GGMLType("F32", 0, 1, 4),
        GGMLType("F16", 1, 1, 2),
        GGMLType("BF16", 30, 1, 2),
        GGMLType("F64", 28, 1, 8),
        GGMLType("I8", 24, 1, 1),
        GGMLType("I16", 25, 1, 2),
        GGMLType("I32", 26, 1, 4),
        GGMLType("I64", 27, 1, 8),
        # one scale (and minimum) per block of 32
        GGMLType("Q4_0", 2, 32, 2 + 16),
        GGMLType("Q4_1", 3, 32, 2 + 2 + 16),
        GGMLType("Q5_0", 6, 32, 2 + 4 + 16),
        GGMLType("Q5_1", 7, 32, 2 + 2 + 4 + 16),
        GGMLType("Q8_0", 8, 32, 2 + 32),
        GGMLType("IQ4_NL", 20, 32, 2 + 16),
        GGMLType("MXFP4", 39, 32, 1 + 16),
        # super-blocks of 256 with quantized scales
        GGMLType("Q2_K", 10, 256, 2 + 2 + 16 + 64),
        GGMLType("Q3_K", 11, 256, 2 + 64 + 32 + 12),
        GGMLType("Q4_K", 12, 256, 2 + 2 + 128 + 12),
        GGMLType("Q5_K", 13, 256, 2 + 2 + 128 + 32 + 12),
        GGMLType("Q6_K", 14, 256, 2 + 128 + 64 + 16),
        GGMLType("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),
        GGMLType("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4),
        # tensor_requires_imatrix in src/llama-quant.cpp. It also asks for Q2_K in a Q2_K_S file,
        # which is a matter of the file and not of the type.
        GGMLType("IQ3_XXS", 18, 256, 2 + 96, needs_imatrix=True),
        GGMLType("IQ2_S", 22, 256, 2 + 64 + 8 + 8, needs_imatrix=True),
        GGMLType("IQ2_XS", 17, 256, 2 + 64 + 8, needs_imatrix=True),
        GGMLType("IQ2_XXS", 16, 256, 2 + 64, needs_imatrix=True),
        GGMLType("IQ1_M", 29, 256, 32 + 16 + 8, needs_imatrix=True),
        GGMLType("IQ1_S", 19, 256, 2 + 32 + 16, needs_imatrix=True),
        # ternary: only for models that were trained in ternary weights
        GGMLType("TQ1_0", 34, 256, 2 + 48 + 4),
        GGMLType("TQ2_0", 35, 256, 2 + 64),
    )
}
BY_ID = {t.id: t for t in TYPES.values()}

_FILE_TYPES = """
F32=0 F16=1 BF16=32 Q4_0=2 Q4_1=3 Q5_0=8 Q5_1=9 Q8_0=7
Q2_K=10 Q2_K_S=21 Q3_K_S=11 Q3_K_M=12 Q3_K_L=13
Q4_K_S=14 Q4_K_M=15 Q5_K_S=16 Q5_K_M=17 Q6_K=18
IQ1_S=24 IQ1_M=31 IQ2_XXS=19 IQ2_XS=20 IQ2_S=28 IQ2_M=29
IQ3_XXS=23 IQ3_XS=22 IQ3_S=26 IQ3_M=27 IQ4_NL=25 IQ4_XS=30
"""
FILE_TYPES = {
    name: int(number) for name, number in (entry.split("=") for entry in _FILE_TYPES.split())
}
"""Numbers of ``general.file_type`` by name (llama.h, enum llama_ftype).

The ternary ones are left out: they ruin a model that was not trained in ternary weights."""


def find_type(name: str) -> GGMLType:
    """Return the type of that name.

    Raises:
        InputError: ggml has no type of that name. The error suggests the nearest one.
    """
    try:
        return TYPES[name]
    except KeyError:
        raise InputError(
            f"type {name!r} is not one of ggml's: {suggest_name(name, TYPES)}"
        ) from None

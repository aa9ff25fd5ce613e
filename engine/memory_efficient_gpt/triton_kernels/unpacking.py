"""From words of packing.py to numbers that tensor cores take, two at a time.

Purpose: the j-th codes of a tile of words as bfloat16 or float16, less the middle code (fp8: the value).
Does not know: scales, tiles, matrices.
Invariant: the result is exact.

The bits of a code are put into the mantissa of a number whose last place counts 1 (128 in bfloat16, 1024 in
float16); one subtraction then leaves the code. No conversion instruction is needed, of which a GPU does few.
8 bits don't fit bfloat16's mantissa of 7: the highest one decides whether 128 or 256 is subtracted.
An fp8 (e4m3) number's bits are those of a bfloat16 or float16 with another exponent bias: one product.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _asm(shift: str, *lines: str) -> tl.constexpr:
    body = "\n".join(lines)
    return tl.constexpr(f"{{\n.reg .b32 t, a, b, c, d;\n{shift}\n{body}\n}}")


def _right(bits: int) -> str:
    return f"shr.b32 t, $1, {bits};" if bits else "mov.b32 t, $1;"


def _nibble(j: int, *lines: str) -> tl.constexpr:
    return _asm(_right(4 * j), *lines)


# (x & y) | z is the truth table 0xEA, (x & y) ^ z is 0x6A.
_BF16_NIBBLE = (
    "lop3.b32 a, t, 0x000F000F, 0x43004300, 0xEA;",  # 128 + code
    "mov.b32 b, 0x3F803F80;",
    "mov.b32 c, 0xC308C308;",
    "fma.rn.bf16x2 $0, a, b, c;",  # a * 1 - 136: a subtraction that Ampere has, too
)
_FP16_NIBBLE = (
    "lop3.b32 a, t, 0x000F000F, 0x64006400, 0xEA;",  # 1024 + code
    "mov.b32 c, 0xE408E408;",
    "add.rn.f16x2 $0, a, c;",
)
_BF16_BYTE = (
    "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;",  # 128 + low 7 bits
    "lop3.b32 b, t, 0x00800080, 0x43804380, 0x6A;",  # 256, or 128 where the highest bit is set
    "mov.b32 c, 0xBF80BF80;",
    "fma.rn.bf16x2 $0, b, c, a;",
)
_FP16_BYTE = (
    "lop3.b32 a, t, 0x00FF00FF, 0x64006400, 0xEA;",
    "mov.b32 c, 0xE480E480;",
    "add.rn.f16x2 $0, a, c;",
)
_BF16_FP8 = (
    "and.b32 a, t, 0x7F007F00;",
    "shr.b32 a, a, 4;",
    "lop3.b32 a, t, 0x80008000, a, 0xEA;",
    "mov.b32 b, 0x7B807B80;",  # 2^120
    "mov.b32 c, 0x80008000;",
    "fma.rn.bf16x2 $0, a, b, c;",
)
_FP16_FP8 = (
    "and.b32 a, t, 0x7F007F00;",
    "shr.b32 a, a, 1;",
    "lop3.b32 a, t, 0x80008000, a, 0xEA;",
    "mov.b32 b, 0x5C005C00;",  # 2^8
    "mul.rn.f16x2 $0, a, b;",
)
_HIGH_BYTE = ("shl.b32 t, $1, 8;", "mov.b32 t, $1;")

_BF16_INT4_0 = _nibble(0, *_BF16_NIBBLE)
_BF16_INT4_1 = _nibble(1, *_BF16_NIBBLE)
_BF16_INT4_2 = _nibble(2, *_BF16_NIBBLE)
_BF16_INT4_3 = _nibble(3, *_BF16_NIBBLE)
_FP16_INT4_0 = _nibble(0, *_FP16_NIBBLE)
_FP16_INT4_1 = _nibble(1, *_FP16_NIBBLE)
_FP16_INT4_2 = _nibble(2, *_FP16_NIBBLE)
_FP16_INT4_3 = _nibble(3, *_FP16_NIBBLE)
_BF16_INT8_0 = _asm(_right(0), *_BF16_BYTE)
_BF16_INT8_1 = _asm(_right(8), *_BF16_BYTE)
_FP16_INT8_0 = _asm(_right(0), *_FP16_BYTE)
_FP16_INT8_1 = _asm(_right(8), *_FP16_BYTE)
_BF16_FP8_0 = _asm(_HIGH_BYTE[0], *_BF16_FP8)
_BF16_FP8_1 = _asm(_HIGH_BYTE[1], *_BF16_FP8)
_FP16_FP8_0 = _asm(_HIGH_BYTE[0], *_FP16_FP8)
_FP16_FP8_1 = _asm(_HIGH_BYTE[1], *_FP16_FP8)


@triton.jit
def _bf16(words, asm: tl.constexpr):
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _fp16(words, asm: tl.constexpr):
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def unpack_slice(words, j: tl.constexpr, code: tl.constexpr, half: tl.constexpr):
    """The j-th codes of words `int16`, of the words' shape, in float16 (half) or bfloat16."""
    if code == "int4":
        if j == 0:
            numbers = _fp16(words, _FP16_INT4_0) if half else _bf16(words, _BF16_INT4_0)
        elif j == 1:
            numbers = _fp16(words, _FP16_INT4_1) if half else _bf16(words, _BF16_INT4_1)
        elif j == 2:
            numbers = _fp16(words, _FP16_INT4_2) if half else _bf16(words, _BF16_INT4_2)
        else:
            numbers = _fp16(words, _FP16_INT4_3) if half else _bf16(words, _BF16_INT4_3)
    elif code == "int8":
        if j == 0:
            numbers = _fp16(words, _FP16_INT8_0) if half else _bf16(words, _BF16_INT8_0)
        else:
            numbers = _fp16(words, _FP16_INT8_1) if half else _bf16(words, _BF16_INT8_1)
    else:
        if j == 0:
            numbers = _fp16(words, _FP16_FP8_0) if half else _bf16(words, _BF16_FP8_0)
        else:
            numbers = _fp16(words, _FP16_FP8_1) if half else _bf16(words, _BF16_FP8_1)
    return numbers

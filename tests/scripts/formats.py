#!/usr/bin/env python3
"""Writes what every GGUF format's blocks mean, as the test vectors that kernels/tests/formats.rs reads.

    pip install gguf numpy
    formats.py                                  the committed vectors: tests/data/formats/NAME.txt
    formats.py --count 100000 --out DIR         that many random rows a format, for the test `many_random_rows`
    formats.py --show Q4_K random 7 12          a row's bytes and values, to look into a difference

The oracle is the numpy implementation in the `gguf` package; formats that it lacks are defined below.

A *row* is the blocks of 256 values. Each line of a vector file is a case: a way to make rows, and a hash of the values
of all its rows, in order. Both sides make the same rows:

    bytes HEX            one row, spelled out
    fill 256             row v: every byte is v
    counting ROWS        the little-endian u16 words 0, 1, 2, .. (wrapping)
    random SEED ROWS     the little-endian u64 words of splitmix64 from SEED
    quantize SEED ROWS   the hash is of the blocks' bytes, made from the values of `values`
    centred SEED ROWS    likewise, from values that no rounding rule can dispute (`centred`)

The hash of a row is FNV-1a over the u32 words of its f32 values (NaN as 7fc00000), or over its bytes; that of a case is
FNV-1a over the hashes of its rows.
"""

import argparse
import pathlib
import warnings
from importlib.metadata import version

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES

DATA = pathlib.Path(__file__).resolve().parent.parent / "data" / "formats"
ROW = 256
U64 = np.uint64


def f16(blocks, offset):
    return blocks[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)


def q8(blocks, len):
    """The int8 codes at byte 4."""
    return blocks[:, 4 : 4 + len].view(np.int8).astype(np.float32)


def bits(blocks, width):
    """The fields of `width` bits of bytes 2.., the lowest first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = (blocks[:, 2:, None] >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(len(blocks), -1).astype(np.float32)


def cast(dtype):
    return lambda b: b.copy().view(dtype).astype(np.float32)


# Formats that the gguf package does not decode: blocks [n, bytes] to values [n, len].
DEFINED = {
    "Q8_1": (9, 32, 36, lambda b: f16(b, 0) * q8(b, 32)),
    "Q8_K": (15, 256, 292, lambda b: b[:, :4].copy().view(np.float32) * q8(b, 256)),
    "I8": (24, 1, 1, cast(np.int8)),
    "I16": (25, 1, 2, cast(np.int16)),
    "I32": (26, 1, 4, cast(np.int32)),
    "I64": (27, 1, 8, cast(np.int64)),
    "F64": (28, 1, 8, cast(np.float64)),
    "Q1_0": (41, 128, 18, lambda b: f16(b, 0) * (2 * bits(b, 1) - 1)),
    "Q2_0": (42, 64, 18, lambda b: f16(b, 0) * (bits(b, 2) - 1)),
}
DECODED = """F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S
IQ4_XS IQ1_M BF16 TQ1_0 TQ2_0 MXFP4 NVFP4""".split()

# Byte offsets of the float scales of a block.
F16_SCALES = {
    **dict.fromkeys("F16 Q4_0 Q5_0 Q8_0 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ4_NL IQ4_XS Q1_0 Q2_0".split(), [0]),
    **dict.fromkeys("Q4_1 Q5_1 Q8_1 Q4_K Q5_K".split(), [0, 2]),
    "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64],
}  # fmt: skip
F16_EDGES = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00,
    0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x3555,
]  # fmt: skip
F16_PAIRS = [0x0000, 0x8000, 0x0001, 0x3C00, 0xFBFF, 0x7C00, 0x7E00]
F32_EDGES = [0x0, 0x80000000, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]
BYTE_EDGES = {"MXFP4": [0, 1, 2, 3, 126, 127, 128, 253, 254, 255], "NVFP4": [0, 1, 7, 8, 9, 0x7E, 0x7F, 0x80, 0x88, 0xFF]}

# Formats whose quantiser is that of the gguf package, and those whose rounding of ties differs.
QUANTISED = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1".split()
CENTRED = ["Q8_0"]


class Format:
    def __init__(self, name):
        self.name = name
        if name in DEFINED:
            self.id, self.len, self.bytes, self.decode = DEFINED[name]
        else:
            kind = Type[name]
            self.id, (self.len, self.bytes) = int(kind), GGML_QUANT_SIZES[kind]
            self.decode = lambda blocks: gguf.quants.dequantize(blocks, kind).reshape(len(blocks), -1)
        self.row_blocks = ROW // self.len
        self.row_bytes = self.row_blocks * self.bytes

    def values(self, rows):
        """Rows of bytes to rows of 256 values."""
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return self.decode(rows.reshape(-1, self.bytes)).astype(np.float32).reshape(-1, ROW)

    def quantize(self, rows):
        """Rows of 256 values to rows of bytes."""
        with np.errstate(all="ignore"):
            return gguf.quants.quantize(rows, Type[self.name]).view(np.uint8).reshape(len(rows), -1)

    def edge_rows(self):
        """Random codes under every unusual scale."""
        def blocks(settings):
            out = random(self.id, -(-len(settings) // self.row_blocks), self.row_bytes).reshape(-1, self.bytes).copy()
            for block, setting in zip(out, settings):
                for offset, field in setting:
                    block[offset : offset + len(field)] = np.frombuffer(field, np.uint8)
            return out.reshape(-1, self.row_bytes)

        def le(value, size):
            return int(value).to_bytes(size, "little")

        if self.name == "IQ1_M":
            def spread(d, block):
                # The low nibble of each top byte keeps random sub-scales.
                return [(49 + 2 * i, bytes([(d >> (4 * i) & 15) << 4 | (block + i) % 16])) for i in range(4)]
            return blocks([spread(d, i) for i, d in enumerate(F16_EDGES)])
        if self.name in F16_SCALES:
            at = F16_SCALES[self.name]
            settings = [[(at[0], le(d, 2))] for d in F16_EDGES]
            if len(at) == 2:
                settings += [[(at[0], le(d, 2)), (at[1], le(m, 2))] for d in F16_PAIRS for m in F16_PAIRS]
            return blocks(settings)
        if self.name in BYTE_EDGES:
            return blocks([[(0, le(e, 1))] for e in BYTE_EDGES[self.name]])
        if self.name in ("F32", "Q8_K"):
            return blocks([[(0, le(d, 4))] for d in F32_EDGES])
        return np.zeros((0, self.row_bytes), np.uint8)


def random(seed, rows, row_bytes):
    """Rows of the bytes of splitmix64 from `seed`."""
    total = rows * row_bytes
    with np.errstate(over="ignore"):
        z = U64(seed) + np.arange(1, total // 8 + 2, dtype=U64) * U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        z = z ^ (z >> U64(31))
    return z.astype("<u8").view(np.uint8)[:total].reshape(rows, row_bytes)


def values(seed, rows):
    """Value i of a row: the low 24 bits of random word i, as a fraction in [-1, 1), times 2^(row mod 13 - 6)."""
    words = random(seed, rows, ROW * 4).view("<u4")
    fractions = ((words & 0xFFFFFF).astype(np.int64) - (1 << 23)).astype(np.float32) * np.float32(2.0**-23)
    return fractions * np.float32(2.0) ** (np.arange(rows)[:, None] % 13 - 6).astype(np.float32)


def centred(seed, rows):
    """Of each 32 values the first is 127; the others are integers in [-126, 126] plus at most 3/8. All times 2^(row mod 13 - 6)."""
    words = random(seed, rows, ROW * 4).view("<u4").astype(np.int64)
    out = (words % 253 - 126).astype(np.float32) + ((words >> 16) % 7 - 3).astype(np.float32) / np.float32(8)
    out[:, ::32] = 127
    return out * np.float32(2.0) ** (np.arange(rows)[:, None] % 13 - 6).astype(np.float32)


def counting(rows, row_bytes):
    return np.arange((rows * row_bytes + 1) // 2).astype("<u2").view(np.uint8)[: rows * row_bytes].reshape(rows, -1)


def fill(rows, row_bytes):
    return np.repeat(np.arange(rows, dtype=np.uint8)[:, None], row_bytes, axis=1)


def fnv(words):
    """FNV-1a over the last axis."""
    with np.errstate(over="ignore"):
        state = np.full(words.shape[:-1], 0xCBF29CE484222325, U64)
        for i in range(words.shape[-1]):
            state = (state ^ words[..., i].astype(U64)) * U64(0x100000001B3)
    return state


def digest(rows):
    """The hash of a case: rows of f32 values, or of bytes."""
    if rows.dtype == np.float32:
        rows = np.where(np.isnan(rows), np.uint32(0x7FC00000), rows.view(np.uint32))
    return f"{int(fnv(fnv(rows))):016x}"


def cases(format):
    head = f"# {format.name}: written by tests/scripts/formats.py with gguf {version('gguf')}\n"
    lines = [head + f"format {format.id} {format.len} {format.bytes}"]
    for row in format.edge_rows():
        lines.append(f"bytes {row.tobytes().hex()} {digest(format.values(row[None]))}")
    # 256 rows of u16 words hold every f16 and bf16.
    lines.append(f"fill 256 {digest(format.values(fill(256, format.row_bytes)))}")
    lines.append(f"counting 256 {digest(format.values(counting(256, format.row_bytes)))}")
    for seed in range(16):
        lines.append(f"random {seed} 32 {digest(format.values(random(seed, 32, format.row_bytes)))}")
    if format.name in QUANTISED:
        lines.append(f"quantize 1 260 {digest(format.quantize(values(1, 260)))}")
    if format.name in CENTRED:
        lines.append(f"centred 2 260 {digest(format.quantize(centred(2, 260)))}")
    return lines


def many(format, count):
    lines = [f"format {format.id} {format.len} {format.bytes}"]
    for start in range(0, count, 1000):
        seed, rows = 1_000_000 + start, min(1000, count - start)
        lines.append(f"random {seed} {rows} {digest(format.values(random(seed, rows, format.row_bytes)))}")
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=DATA)
    parser.add_argument("--count", type=int)
    parser.add_argument("--show", nargs=4, metavar=("FORMAT", "CASE", "SEED", "ROW"))
    arguments = parser.parse_args()
    if arguments.show:
        name, case, seed, row = arguments.show
        format, row = Format(name), int(row)
        makers = {"random": lambda n, size: random(int(seed), n, size), "fill": fill, "counting": counting}
        data = makers[case](row + 1, format.row_bytes)[row:]
        print(data.tobytes().hex())
        print(format.values(data)[0].tolist())
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in DECODED + list(DEFINED):
        format = Format(name)
        lines = many(format, arguments.count) if arguments.count else cases(format)
        (arguments.out / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

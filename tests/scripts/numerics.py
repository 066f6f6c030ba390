#!/usr/bin/env python3
"""Vectors for the number formats in hw-profiles/src/numerics, from independent implementations (pip install ml_dtypes numpy).

    numerics.py                rewrites hw-profiles/tests/data/numerics.txt
    numerics.py --check-quark  compares MX9 and MX6 below with AMD Quark (pip install amd-quark torch), on random blocks

Elements come from `ml_dtypes` and numpy; blocks are put together here from the formulas of OCP MX 1.0, section 6.3, and of
AMD Quark for shared micro-exponents. Lines of the file:

    codes NAME VALUES              the f32 bits of every code in order, NaN as 7fc00000
    codes_hash NAME HASH           the same, as FNV-1a over the words
    encode NAME LOW SPAN COUNT HASH    FNV-1a over the codes of COUNT random values (`values`), to nearest even
    block NAME RULE LOW SPAN COUNT HASH    FNV-1a over exponent byte, shifts byte and code bytes, block by block

Both sides make the same random values: word i of splitmix64 from seed 1 has the fraction in bits 0-22, the sign in bit 23,
and the exponent LOW + (bits 24-55) mod SPAN. Where bits 56-58 are 0, all but the upper bits of the fraction are cleared, so
that ties are common: as many stay as bits 59-61 say. In blocks, a value is 0 where bits 56-61 are 1.
"""

import argparse
import pathlib
from importlib.metadata import version

import ml_dtypes
import numpy as np

OUT = pathlib.Path(__file__).resolve().parents[2] / "hw-profiles/tests/data/numerics.txt"
U64 = np.uint64

FLOATS = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
MX = {
    "mxfp8_e4m3": "fp8_e4m3",
    "mxfp8_e5m2": "fp8_e5m2",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": "fp4_e2m1",
    "mxint8": "int8",
}
SHARED = {"mx9": 8, "mx6": 5, "mx4": 3}


def words(count):
    with np.errstate(over="ignore"):
        z = U64(1) + np.arange(1, count + 1, dtype=U64) * U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        return z ^ (z >> U64(31))


def values(low, span, count, zeros=False):
    w = words(count)
    field = low + 127 + (w >> U64(24) & U64(0xFFFFFFFF)).astype(np.int64) % span
    fraction = (w & U64(0x7FFFFF)).astype(np.int64)
    keep = (w >> U64(59) & U64(7)).astype(np.int64)
    fraction = np.where(w >> U64(56) & U64(7) == 0, fraction >> (23 - keep) << (23 - keep), fraction)
    sign = (w >> U64(23) & U64(1)).astype(np.int64) << 31
    out = (sign | field << 23 | fraction).astype(np.uint32).view(np.float32)
    return np.where(w >> U64(56) & U64(63) == 1, np.float32(0), out) if zeros else out


def fnv(data):
    state = 0xCBF29CE484222325
    for x in data.tolist():
        state = (state ^ x) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


def as_bits(array):
    array = array.astype(np.float32)
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def bits(name):
    return 8 if name == "int8" else 16 if name in ("bf16", "fp16") else ml_dtypes.finfo(FLOATS[name]).bits


def all_codes(name):
    codes = np.arange(1 << bits(name))
    if name == "int8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    return codes.astype(np.uint16 if bits(name) == 16 else np.uint8).view(FLOATS[name]).astype(np.float32)


def encode(name, x):
    """Codes of f32 values, to nearest even."""
    if name == "int8":
        return np.clip(np.rint(x), -127, 127).astype(np.int8).view(np.uint8)
    with np.errstate(over="ignore"):
        return x.astype(FLOATS[name]).view(np.uint16 if bits(name) == 16 else np.uint8)


def largest(name):
    return 127 / 64 if name == "int8" else float(ml_dtypes.finfo(FLOATS[name]).max)


def shared_exponents(amax, rule, top, fraction_bits):
    """The exponents of positive maxima. frexp gives a fraction in [0.5, 1)."""
    fraction, exponent = np.frexp(amax.astype(np.float64))
    floor, emax = exponent - 1, int(np.floor(np.log2(top)))
    if rule == "floor":
        return floor - emax
    if rule == "ceil":
        return floor + (fraction > 0.5) - emax
    if rule == "even":
        # As the reference does it: half a step is added to the bits of the f32, which then are cut.
        raised = amax.view(np.uint32) + np.uint32(1 << (22 - fraction_bits))
        return np.where(amax > 0, (raised >> np.uint32(23)).astype(np.int64) - 127, floor) - emax
    fraction, exponent = np.frexp(amax.astype(np.float64) / top)
    # The quotient is rounded: the neighbours decide exactly.
    guess = exponent - (fraction == 0.5)
    guess = np.where(amax > np.ldexp(top, guess), guess + 1, guess)
    return np.where(amax <= np.ldexp(top, guess - 1), guess - 1, guess)


def mx_blocks(name, rule, x):
    element = MX[name]
    top = largest(element)
    fraction_bits = 6 if element == "int8" else ml_dtypes.finfo(FLOATS[element]).nmant
    amax = np.abs(x).max(axis=1)
    byte = np.where(amax > 0, np.clip(shared_exponents(amax, rule, top, fraction_bits) + 127, 0, 254), 0)
    scaled = np.ldexp(x.astype(np.float64), 127 - byte[:, None])
    if element == "int8":
        codes = encode("int8", scaled * 64)
    else:
        codes = encode(element, np.clip(scaled, -top, top).astype(np.float32))
    return byte, np.zeros_like(byte), codes


def shared_blocks(name, rule, x):
    """As AMD Quark's `fake_quantize_mx6_mx9`, with the scale rule as a parameter; Quark's is floor."""
    q = SHARED[name]
    top = (2 ** (q - 1) - 1) / 2 ** (q - 2)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    amax = np.abs(x).max(axis=1)
    exponent = np.where(amax > 0, np.clip(shared_exponents(amax, rule, top, q - 2), -127, 127), -127)
    below = np.abs(x).astype(np.float64) < np.ldexp(1.0, exponent)[:, None]
    shift = below.reshape(len(x), -1, 2).all(axis=2) & (amax > 0)[:, None]
    step = np.ldexp(1.0, exponent[:, None] - np.repeat(shift, 2, axis=1) - q + 2)
    limit = 2 ** (q - 1) - 1
    codes = np.clip(np.rint(x / step), -limit, limit)
    return exponent + 127, (shift << np.arange(8)).sum(axis=1), codes.astype(np.int64) & (2**q - 1), codes * step


def case(name, rule, low, span, count):
    length = 32 if name in MX else 16
    x = values(low, span, count * length, zeros=True).reshape(count, length)
    byte, shifts, codes, *_ = (mx_blocks if name in MX else shared_blocks)(name, rule, x)
    rows = np.concatenate([byte[:, None], shifts[:, None], codes.astype(np.int64)], axis=1)
    return f"block {name} {rule} {low} {span} {count} {fnv(rows.reshape(-1))}"


def lines():
    yield f"# Written by tests/scripts/numerics.py with ml_dtypes {version('ml_dtypes')}."
    for name in [*FLOATS, "int8"]:
        table = as_bits(all_codes(name))
        yield f"codes_hash {name} {fnv(table)}" if bits(name) == 16 else f"codes {name} " + " ".join(f"{v:x}" for v in table)
    scale = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    yield "codes e8m0 " + " ".join(f"{v:x}" for v in as_bits(scale))
    for name in FLOATS:
        info = ml_dtypes.finfo(FLOATS[name])
        low = max(int(np.log2(float(info.smallest_subnormal))) - 3, -126)
        span = min(int(np.log2(float(info.max))) + 3, 128) - low
        yield f"encode {name} {low} {span} 1000000 {fnv(encode(name, values(low, span, 1000000)))}"
    yield f"encode int8 -4 13 1000000 {fnv(encode('int8', values(-4, 13, 1000000)))}"
    for name in [*MX, *SHARED]:
        for rule in ("floor", "ceil", "even", "rceil"):
            # Ordinary values, of few and of many magnitudes; then the two ends of f32.
            for low, span, count in [(-3, 4, 4000), (-12, 16, 2000), (-126, 16, 500), (118, 10, 500)]:
                yield case(name, rule, low, span, count)


def check_quark():
    import quark.common.torch_cpp_ext as extension
    import torch

    # Its compiled kernels serve other formats and need a compiler.
    extension.load_or_jit_stable_abi = lambda *_, **__: None
    from quark.torch.kernel.hw_emulation.hw_emulation_interface import fake_quantize_mx6_mx9

    for name in ("mx9", "mx6", "mx4"):
        for low, span in [(-3, 4), (-12, 16), (-100, 16), (100, 16)]:
            x = values(low, span, 64000, zeros=True).reshape(-1, 16)
            theirs = fake_quantize_mx6_mx9(torch.from_numpy(x), -1, 16, quant_bit=SHARED[name], sub_block_size=2).numpy()
            assert np.array_equal(shared_blocks(name, "floor", x)[3].astype(np.float32), theirs), (name, low)
    print("equal")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check-quark", action="store_true")
    if parser.parse_args().check_quark:
        check_quark()
    else:
        OUT.write_text("\n".join(lines()) + "\n")

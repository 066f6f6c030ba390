// Stores a part of a word that others may be writing to the rest of.
fn put(word: u32, shift: u32, mask: u32, bits: u32) {
    atomicAnd(&kv[word], ~(mask << shift));
    atomicOr(&kv[word], (bits & mask) << shift);
}
fn put16(at: u32, bits: u32) { put(at / 2u, 16u * (at % 2u), 0xffffu, bits); }
fn put8(at: u32, bits: u32) { put(at / 4u, 8u * (at % 4u), 0xffu, bits); }

// In half precision; what is rounded already packs as it is, whichever way a device rounds.
fn f16_bits(x: f32) -> u32 { return pack2x16float(vec2(round_f16(clamp(x, -65504.0, 65504.0)), 0.0)); }
fn put_half(at: u32, x: f32) { put16(at, f16_bits(x)); }

// value = d * q + m
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 { return nibbles(2u + k % 4u, k / 4u) | spread_bits(word(1u), k); }
fn scales(part: u32) -> vec4<f32> { return unpack2x16float(word(0u)).xxyy; }

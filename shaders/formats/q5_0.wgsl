// value = d * (q - 16)
const OFFSET: i32 = 16;
fn code(part: u32, k: u32) -> u32 { return nibbles(1u + k % 4u, k / 4u) | spread_bits(word(0u), k); }
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(f16_low(head())), 0.0, 0.0); }

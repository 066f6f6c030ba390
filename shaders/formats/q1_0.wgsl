// value = d where the bit is set, else -d
const OFFSET: i32 = 1;
fn code(part: u32, k: u32) -> u32 { return (spread_bits(word(part), k) >> 4u) << 1u; }
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(f16_low(head())), 0.0, 0.0); }

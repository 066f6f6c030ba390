// value = d * (q - 1)
const OFFSET: i32 = 1;
fn code(part: u32, k: u32) -> u32 { return (word(8u * (part / 4u) + k) >> (2u * (part % 4u))) & 0x03030303u; }
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(f16_low(tail())), 0.0, 0.0); }

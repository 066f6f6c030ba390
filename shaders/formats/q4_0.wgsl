// value = d * (q - 8)
const OFFSET: i32 = 8;
fn code(part: u32, k: u32) -> u32 { return nibbles(k % 4u, k / 4u); }
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(f16_low(head())), 0.0, 0.0); }

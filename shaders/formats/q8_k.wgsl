// value = d * q
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 { return word(1u + 8u * part + k); }
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(bitcast<f32>(word(0u))), 0.0, 0.0); }

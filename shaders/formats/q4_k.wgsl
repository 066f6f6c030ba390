// value = d * s * q - dmin * m, a 6-bit s and m for each 32 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 { return nibbles(4u + 8u * (part / 2u) + k, part % 2u); }
fn scales(part: u32) -> vec4<f32> { return six_bit_scales(part); }

// value = d * s * (q - 32), an 8-bit s for each 16 values
const OFFSET: i32 = 32;
fn code(part: u32, k: u32) -> u32 {
    let half = part / 4u;
    let j = part % 4u;
    let top = (word(32u + 8u * half + k) >> (2u * j)) & 0x03030303u;
    return nibbles(16u * half + 8u * (j % 2u) + k, j / 2u) | (top << 4u);
}
fn scales(part: u32) -> vec4<f32> {
    let s = word(48u + part / 2u) >> (16u * (part % 2u));
    return f16_low(tail()) * vec4(f32(signed_byte(s, 0u)), f32(signed_byte(s, 1u)), 0.0, 0.0);
}

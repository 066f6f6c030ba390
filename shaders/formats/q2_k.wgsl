// value = d * s * q - dmin * m, a 4-bit s and m for each 16 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    return (word(4u + 8u * (part / 4u) + k) >> (2u * (part % 4u))) & 0x03030303u;
}
fn scales(part: u32) -> vec4<f32> {
    let both = half_word(part);
    let s = vec4<f32>(vec4(both & 15u, (both >> 8u) & 15u, (both >> 4u) & 15u, both >> 12u));
    let d = unpack2x16float(word(20u));
    return s * vec4(d.x, d.x, -d.y, -d.y);
}

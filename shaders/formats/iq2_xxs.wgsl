// value = d * (2 s + 1) / 8 * grid * sign, a 4-bit s for each 32 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let point = (word(2u * part) >> (8u * (k / 2u))) & 255u;
    let signs = even_signs(word(2u * part + 1u) >> (7u * (k / 2u)));
    return negate(grid[2u * point + k % 2u], signs >> (4u * (k % 2u)));
}
fn scales(part: u32) -> vec4<f32> {
    let d = f16_low(head()) * 0.125 * f32(2u * (word(2u * part + 1u) >> 28u) + 1u);
    return vec4(d, d, 0.0, 0.0);
}

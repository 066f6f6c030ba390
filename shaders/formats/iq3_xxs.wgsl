// value = d * (2 s + 1) / 4 * grid * sign, a 4-bit s for each 32 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let signs = even_signs(word(16u + part) >> (7u * (k / 2u)));
    return negate(grid[byte(8u * part + k)], signs >> (4u * (k % 2u)));
}
fn scales(part: u32) -> vec4<f32> {
    let d = f16_low(head()) * 0.25 * f32(2u * (word(16u + part) >> 28u) + 1u);
    return vec4(d, d, 0.0, 0.0);
}

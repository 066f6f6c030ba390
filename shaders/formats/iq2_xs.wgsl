// value = d * (2 s + 1) / 8 * grid * sign, a 4-bit s for each 16 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let q = half_word(4u * part + k / 2u);
    return negate(grid[2u * (q & 511u) + k % 2u], even_signs(q >> 9u) >> (4u * (k % 2u)));
}
fn scales(part: u32) -> vec4<f32> {
    let s = byte(64u + part);
    return f16_low(head()) * 0.125 * vec4(f32(2u * (s & 15u) + 1u), f32(2u * (s >> 4u) + 1u), 0.0, 0.0);
}

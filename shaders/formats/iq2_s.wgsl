// value = d * (2 s + 1) / 8 * grid * sign, a 4-bit s for each 16 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let i = 4u * part + k / 2u;
    let point = byte(i) | (((byte(64u + part) >> (2u * (k / 2u))) & 3u) << 8u);
    return negate(grid[2u * point + k % 2u], byte(32u + i) >> (4u * (k % 2u)));
}
fn scales(part: u32) -> vec4<f32> {
    let s = byte(72u + part);
    return f16_low(head()) * 0.125 * vec4(f32(2u * (s & 15u) + 1u), f32(2u * (s >> 4u) + 1u), 0.0, 0.0);
}

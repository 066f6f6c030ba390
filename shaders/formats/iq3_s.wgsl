// value = d * (2 s + 1) * grid * sign, a 4-bit s for each 32 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let point = byte(8u * part + k) | (((byte(64u + part) >> k) & 1u) << 8u);
    return negate(grid[point], byte(72u + 4u * part + k / 2u) >> (4u * (k % 2u)));
}
fn scales(part: u32) -> vec4<f32> {
    let s = (byte(104u + part / 2u) >> (4u * (part % 2u))) & 15u;
    let d = f16_low(head()) * f32(2u * s + 1u);
    return vec4(d, d, 0.0, 0.0);
}

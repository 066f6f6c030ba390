// value = d * (2 s + 1) * (grid ± 1/8), a 3-bit s for each 32 values; codes and scale are scaled by 8
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let high = half_word(16u + part);
    let point = byte(4u * part + k / 2u) | (((high >> (3u * (k / 2u))) & 7u) << 8u);
    let shifted = select(grid[2u * point + k % 2u] + 0x79797979u, grid[2u * point + k % 2u] + 0x77777777u, high >= 0x8000u);
    return shifted ^ 0x80808080u;
}
fn scales(part: u32) -> vec4<f32> {
    let d = f16_low(head()) * 0.125 * f32(2u * ((half_word(16u + part) >> 12u) & 7u) + 1u);
    return vec4(d, d, 0.0, 0.0);
}

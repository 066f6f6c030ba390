// value = d * (2 s + 1) * (grid ± 1/8), a 3-bit s for each 16 values; codes and scale are scaled by 8
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let i = 4u * part + k / 2u;
    let high = byte(32u + i / 2u) >> (4u * (i % 2u));
    let point = byte(i) | ((high & 7u) << 8u);
    let shifted = select(grid[2u * point + k % 2u] + 0x79797979u, grid[2u * point + k % 2u] + 0x77777777u, (high & 8u) != 0u);
    return shifted ^ 0x80808080u;
}
fn scales(part: u32) -> vec4<f32> {
    let a = word(12u);
    let b = word(13u);
    let d = ((a >> 12u) & 15u) | ((a >> 24u) & 240u) | ((b >> 4u) & 0xf00u) | ((b >> 16u) & 0xf000u);
    let s = half_word(24u + part / 2u) >> (6u * (part % 2u));
    return f16_low(d) * 0.125 * vec4(f32(2u * (s & 7u) + 1u), f32(2u * ((s >> 3u) & 7u) + 1u), 0.0, 0.0);
}

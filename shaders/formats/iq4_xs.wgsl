// value = d * s * TABLE[q], a 6-bit s for each 32 values
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 { return lookup16(TABLE, nibbles(2u + 4u * part + k % 4u, k / 4u)); }
fn scales(part: u32) -> vec4<f32> {
    let low = (word(1u) >> (4u * part)) & 15u;
    let high = (word(0u) >> (16u + 2u * part)) & 3u;
    let d = f16_low(word(0u)) * f32(i32(low | (high << 4u)) - 32);
    return vec4(d, d, 0.0, 0.0);
}

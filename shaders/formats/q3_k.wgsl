// value = d * s * (q - 4), a 6-bit s for each 16 values
const OFFSET: i32 = 4;
fn code(part: u32, k: u32) -> u32 {
    let low = (word(8u + 8u * (part / 4u) + k) >> (2u * (part % 4u))) & 0x03030303u;
    return low | (((word(k) >> part) & 0x01010101u) << 2u);
}
fn sub(i: u32) -> f32 {
    let low = (byte(96u + i % 8u) >> (4u * (i / 8u))) & 15u;
    let high = (byte(104u + i % 4u) >> (2u * (i / 4u))) & 3u;
    return f32(i32(low | (high << 4u)) - 32);
}
fn scales(part: u32) -> vec4<f32> {
    return f16_low(tail()) * vec4(sub(2u * part), sub(2u * part + 1u), 0.0, 0.0);
}

// value = 2^(e - 127) * E2M1(q); codes are doubled and the scale is halved
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 { return lookup16(TABLE, nibbles(k % 4u, k / 4u)); }
fn scales(part: u32) -> vec4<f32> {
    let e = head() & 255u;
    // 2^-128 and 2^-127 are denormal, which a device may take for zero.
    let d = bitcast<f32>(select((e - 1u) << 23u, 0x00200000u << e, e < 2u));
    return vec4(d, d, 0.0, 0.0);
}

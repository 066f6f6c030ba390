// Truncated to the digits of an f32; what an f32 cannot hold becomes zero or infinity.
fn value(i: u32) -> f32 {
    let high = weight_word(2u * i + 1u);
    let sign = high & 0x80000000u;
    let exponent = i32((high >> 20u) & 2047u) - 1023 + 127;
    let fraction = ((high & 0xfffffu) << 3u) | (weight_word(2u * i) >> 29u);
    if exponent <= 0 { return bitcast<f32>(sign); }
    if exponent >= 255 {
        let nan = select(0u, 0x400000u, exponent == 1151 && ((high & 0xfffffu) | weight_word(2u * i)) != 0u);
        return bitcast<f32>(sign | 0x7f800000u | nan);
    }
    return bitcast<f32>(sign | (u32(exponent) << 23u) | fraction);
}

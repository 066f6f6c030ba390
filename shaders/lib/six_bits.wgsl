// The sub-scale and minimum of 32 values in Q4_K and Q5_K, times their scales.
fn six_bit_scales(part: u32) -> vec4<f32> {
    let shift = 8u * (part % 4u);
    let scale = word(1u) >> shift;
    let least = word(2u) >> shift;
    let low = word(3u) >> shift;
    var s = scale & 63u;
    var m = least & 63u;
    if part >= 4u {
        s = (low & 15u) | ((scale >> 2u) & 48u);
        m = ((low >> 4u) & 15u) | ((least >> 2u) & 48u);
    }
    let d = unpack2x16float(word(0u)) * vec2(f32(s), -f32(m));
    return d.xxyy;
}

// value = d * (q - 1); a byte is a fraction of 256 whose first base-3 digits are codes
const OFFSET: i32 = 1;
fn digit(bits: u32, n: u32) -> u32 {
    let power = array(1u, 3u, 9u, 27u, 81u)[n];
    var out = 0u;
    for (var i = 0u; i < 32u; i += 8u) {
        let fraction = (((bits >> i) & 255u) * power) & 255u;
        out |= ((fraction * 3u) >> 8u) << i;
    }
    return out;
}
fn code(part: u32, k: u32) -> u32 {
    let four = 8u * part + k;
    if four < 40u { return digit(word(four % 8u), four / 8u); }
    if four < 60u { return digit(word(8u + (four - 40u) % 4u), (four - 40u) / 4u); }
    return digit(word(12u), four - 60u);
}
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(f16_low(tail())), 0.0, 0.0); }

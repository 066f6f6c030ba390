// value = d * (q - 1)
const OFFSET: i32 = 1;
fn code(part: u32, k: u32) -> u32 {
    let q = byte(8u * part + k);
    return (q & 3u) | ((q & 12u) << 6u) | ((q & 48u) << 12u) | ((q & 192u) << 18u);
}
fn scales(part: u32) -> vec4<f32> { return vec4(vec2(f16_low(head())), 0.0, 0.0); }

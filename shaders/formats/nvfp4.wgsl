// value = UE4M3(d) * E2M1(q), a scale for each 16 values; codes are doubled and the scale is halved
const OFFSET: i32 = 0;
fn code(part: u32, k: u32) -> u32 {
    let eight = 4u * part + 2u * (k / 4u) + k % 2u;
    return lookup16(TABLE, nibbles(1u + eight, (k / 2u) % 2u));
}
// Half the value.
fn ue4m3(bits: u32) -> f32 {
    let seven = bits & 127u;
    if bits == 127u { return 0.0; }
    if seven < 8u { return f32(seven) / 1024.0; }
    return bitcast<f32>((seven << 20u) + (119u << 23u));
}
fn scales(part: u32) -> vec4<f32> { return vec4(ue4m3(byte(2u * part)), ue4m3(byte(2u * part + 1u)), 0.0, 0.0); }

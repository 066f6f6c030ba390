// Values k to k + 3 of a row; those past its end are not used.
fn four_weights(row: u32, k: u32) -> vec4<f32> {
    let at = row * K + k;
    return vec4(value(at), value(at + 1u), value(at + 2u), value(at + 3u));
}

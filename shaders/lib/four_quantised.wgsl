// Values k to k + 3 of a row.
fn four_weights(row: u32, k: u32) -> vec4<f32> {
    locate(0u, row, k / LEN);
    let part = (k % LEN) / 32u;
    let s = scales(part);
    let high = (k % 32u) >= 16u;
    let codes = vec4<f32>(unpack4xI8(code(part, (k % 32u) / 4u)) - vec4(OFFSET));
    return select(s.x, s.y, high) * codes + select(s.z, s.w, high);
}

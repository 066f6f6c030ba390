// From the element of largest magnitude, the scale of its block, and the factor that makes codes of its elements.
fn scale(most: f32) -> f32 { return most / -8.0; }
fn factor(most: f32) -> f32 { return select(0.0, -8.0 / most, most != 0.0); }
fn put_code(page: u32, at: u32, x: f32) {
    let byte = page + at / 32u * 16u + at % 16u;
    put(byte / 4u, 8u * (byte % 4u) + at / 16u % 2u * 4u, 15u, u32(clamp(x + 8.5, 0.0, 15.0)));
}

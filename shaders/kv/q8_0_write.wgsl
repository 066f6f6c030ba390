// From the element of largest magnitude, the scale of its block, and the factor that makes codes of its elements.
fn scale(most: f32) -> f32 { return abs(most) / 127.0; }
fn factor(most: f32) -> f32 { return select(0.0, 127.0 / abs(most), most != 0.0); }
fn put_code(page: u32, at: u32, x: f32) { put8(page + at, u32(i32(round(x)))); }

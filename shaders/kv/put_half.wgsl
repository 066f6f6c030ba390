// In half precision; what is rounded already stays as it is, whichever way a device rounds.
fn put_half(at: u32, x: f32) { kv[at] = f16(round_f16(clamp(x, -65504.0, 65504.0))); }

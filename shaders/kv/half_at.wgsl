// Two halves to a word.
fn half_at(at: u32) -> f32 { return unpack2x16float(kv[at / 2u] >> (16u * (at % 2u))).x; }

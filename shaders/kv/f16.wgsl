// Half precision, two to a word.
fn half_at(at: u32) -> f32 { return unpack2x16float(kv[at / 2u] >> (16u * (at % 2u))).x; }
fn key(page: u32, d: u32, slot: u32) -> f32 { return half_at(page * PAGE + key_place(d, slot)); }
fn value(page: u32, d: u32, slot: u32) -> f32 { return half_at(page * PAGE + value_place(d, slot)); }

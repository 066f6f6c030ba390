// Half precision.
fn key(page: u32, d: u32, slot: u32) -> f32 { return half_at(page * PAGE + key_place(d, slot)); }
fn value(page: u32, d: u32, slot: u32) -> f32 { return half_at(page * PAGE + value_place(d, slot)); }

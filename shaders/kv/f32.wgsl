// Single precision.
fn key(page: u32, d: u32, slot: u32) -> f32 { return bitcast<f32>(kv[page * PAGE + key_place(d, slot)]); }
fn value(page: u32, d: u32, slot: u32) -> f32 { return bitcast<f32>(kv[page * PAGE + value_place(d, slot)]); }

fn value(i: u32) -> f32 { return f32(bitcast<i32>(weight_word(i))); }

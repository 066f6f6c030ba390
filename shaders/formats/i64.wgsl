fn value(i: u32) -> f32 { return f32(weight_word(2u * i)) + 4294967296.0 * f32(bitcast<i32>(weight_word(2u * i + 1u))); }

fn value(i: u32) -> f32 { return f32(extractBits(bitcast<i32>(weight_word(i / 4u)), 8u * (i % 4u), 8u)); }

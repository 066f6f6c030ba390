fn value(i: u32) -> f32 { return bitcast<f32>((weight_word(i / 2u) >> (16u * (i % 2u))) << 16u); }

fn value(i: u32) -> f32 { return unpack2x16float(weight_word(i / 2u) >> (16u * (i % 2u))).x; }

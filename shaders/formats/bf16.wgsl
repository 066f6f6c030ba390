fn value(i: u32) -> f32 { return bitcast<f32>((w[i / 2u] >> (16u * (i % 2u))) << 16u); }

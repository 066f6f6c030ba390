// With several splits: sums of values, then the denominator and the largest score of each.
fn finish(token: u32, head: u32, split: u32, d: u32, o: f32, sum: f32, top: f32) {
    let base = ((token * HEADS + head) * SPLITS + split) * (VALUE_DIM + 2u);
    out[base + d] = o;
    if d == 0u {
        out[base + VALUE_DIM] = sum;
        out[base + VALUE_DIM + 1u] = top;
    }
}

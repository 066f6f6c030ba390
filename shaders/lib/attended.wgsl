// Stores an element of attention's output, from its sum, the denominator and the largest score.
fn finish(token: u32, head: u32, d: u32, o: f32, sum: f32, top: f32) {
    let highest = max(top, sink(head));
    let factor = exp(top - highest);
    let all = sum * factor + select(0.0, exp(sink(head) - highest), HAS_SINK);
    out[(token * HEADS + head) * VALUE_DIM + d] = o * factor / all;
}

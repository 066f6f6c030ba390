// Joins the splits of an attention.

@compute @workgroup_size(64)
fn main(in: In) {
    let i = 64u * in.workgroup.x + in.local;
    let token = in.workgroup.y;
    if i >= HEADS * VALUE_DIM { return; }
    let head = i / VALUE_DIM;
    let base = (token * HEADS + head) * SPLITS * (VALUE_DIM + 2u);
    var top = sink(head);
    for (var s = 0u; s < SPLITS; s++) { top = max(top, x[base + s * (VALUE_DIM + 2u) + VALUE_DIM + 1u]); }
    var sum = select(0.0, exp(sink(head) - top), HAS_SINK);
    var o = 0.0;
    for (var s = 0u; s < SPLITS; s++) {
        let at = base + s * (VALUE_DIM + 2u);
        let factor = exp(x[at + VALUE_DIM + 1u] - top);
        sum += x[at + VALUE_DIM] * factor;
        o += x[at + i % VALUE_DIM] * factor;
    }
    out[token * HEADS * VALUE_DIM + i] = o / sum;
}

// Attention's results from those of splits of the cache; a workgroup has a head of a token.

@compute @workgroup_size(64)
fn main(in: In) {
    let head = in.workgroup.x;
    let token = in.workgroup.y;
    var top = -0x1.fffffep127;
    for (var s = 0u; s < step_splits(); s++) { top = max(top, splits[split_place(s, token, head) + VALUE_DIM]); }
    var sum = 0.0;
    for (var s = 0u; s < step_splits(); s++) {
        let at = split_place(s, token, head) + VALUE_DIM;
        sum += exp(splits[at] - top) * splits[at + 1u];
    }
    for (var d = in.local; d < VALUE_DIM; d += 64u) {
        var o = 0.0;
        for (var s = 0u; s < step_splits(); s++) {
            let at = split_place(s, token, head);
            o += exp(splits[at + VALUE_DIM] - top) * splits[at + d];
        }
        finish(token, head, d, o, sum, top);
    }
}

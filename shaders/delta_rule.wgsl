// The gated delta rule: an invocation has a column of a head's state, for a span.

@compute @workgroup_size(64)
fn main(in: In) {
    let column = 64u * in.workgroup.x + in.local;
    var token = in.workgroup.y;
    if column >= HEADS * VALUE_DIM || !is_first(token) { return; }
    let head = column / VALUE_DIM;
    let first = head * KEY_DIM * VALUE_DIM + column % VALUE_DIM;
    let key_first = head * KEY_DIM % KEYS;
    var s: array<f32, KEY_DIM>;
    if position(token) > 0u {
        let at = page_before(token) * HEADS * KEY_DIM * VALUE_DIM + first;
        for (var i = 0u; i < KEY_DIM; i += 1u) { s[i] = state[at + i * VALUE_DIM]; }
    }
    loop {
        let key = token * KEYS + key_first;
        let kept = exp(a[head] * softplus(decay[token * HEADS + head]));
        var known = 0.0;
        for (var i = 0u; i < KEY_DIM; i += 1u) {
            s[i] = kept * s[i];
            known += s[i] * k[key + i];
        }
        let at = token * HEADS * VALUE_DIM + column;
        let update = sigmoid(beta[token * HEADS + head]) * (v[at] - known);
        var sum = 0.0;
        for (var i = 0u; i < KEY_DIM; i += 1u) {
            s[i] += k[key + i] * update;
            sum += s[i] * q[key + i];
        }
        out[at] = SCALE * sum;
        let page = page_after(token);
        if page != NO_PAGE {
            let to = page * HEADS * KEY_DIM * VALUE_DIM + first;
            for (var i = 0u; i < KEY_DIM; i += 1u) { state[to + i * VALUE_DIM] = s[i]; }
        }
        if is_last(token) { break; }
        token += 1u;
    }
}

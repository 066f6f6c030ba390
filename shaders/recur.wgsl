// A linear recurrence: an invocation has a column of a head's state, for a span.

@compute @workgroup_size(64)
fn main(in: In) {
    let column = 64u * in.workgroup.x + in.local;
    var token = in.workgroup.y;
    if column >= HEADS * VALUE_DIM || !is_first(token) { return; }
    let head = column / VALUE_DIM;
    let first = head * KEY_DIM * VALUE_DIM + column % VALUE_DIM;
    var s: array<f32, KEY_DIM>;
    if position(token) > 0u {
        let at = page_before(token) * HEADS * KEY_DIM * VALUE_DIM + first;
        for (var i = 0u; i < KEY_DIM; i += 1u) { s[i] = state[at + i * VALUE_DIM]; }
    }
    loop {
        let key = (token * KEY_HEADS + key_head(head)) * KEY_DIM;
        let of_head = token * HEADS + head;
        let rate = softplus(decay[of_head]);
        let kept = exp(a[head] * rate);
        var known = 0.0;
        for (var i = 0u; i < KEY_DIM; i += 1u) {
            s[i] = kept * s[i];
            known += s[i] * k[key + i];
        }
        let at = token * HEADS * VALUE_DIM + column;
        let added = update(of_head, v[at], known, rate);
        var sum = 0.0;
        for (var i = 0u; i < KEY_DIM; i += 1u) {
            s[i] += k[key + i] * added;
            sum += s[i] * q[key + i];
        }
        out[at] = result(head, sum, v[at]);
        let page = page_after(token);
        if page != NO_PAGE {
            let to = page * HEADS * KEY_DIM * VALUE_DIM + first;
            for (var i = 0u; i < KEY_DIM; i += 1u) { state[to + i * VALUE_DIM] = s[i]; }
        }
        if is_last(token) { break; }
        token += 1u;
    }
}

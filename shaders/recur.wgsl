// A linear recurrence: an invocation has a column of a head's state, for a span.

// What remains of a row of the state: `of_all`, if a head has one decay and one factor.
fn kept(of_head: u32, head: u32, i: u32, rate: f32, of_all: f32) -> f32 {
    if RATES * FACTORS == 1u { return of_all; }
    var own = rate;
    if RATES > 1u { own = softplus(decay[of_head * RATES + i]); }
    return exp(a[head * FACTORS + i % FACTORS] * own);
}

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
        let rate = softplus(decay[of_head * RATES]);
        let of_all = exp(a[head * FACTORS] * rate);
        var known = 0.0;
        for (var i = 0u; i < KEY_DIM; i += 1u) {
            s[i] = kept(of_head, head, i, rate, of_all) * s[i];
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

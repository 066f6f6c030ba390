// A causal convolution of each channel: an invocation has a channel of a span.

@compute @workgroup_size(64)
fn main(in: In) {
    let channel = 64u * in.workgroup.x + in.local;
    var token = in.workgroup.y;
    if channel >= COLUMNS || !is_first(token) { return; }
    // The last inputs, oldest first.
    var past: array<f32, TAPS>;
    if position(token) > 0u {
        let kept = (page_before(token) * COLUMNS + channel) * (TAPS - 1u);
        for (var j = 0u; j < TAPS - 1u; j += 1u) { past[j] = state[kept + j]; }
    }
    loop {
        past[TAPS - 1u] = x[token * COLUMNS + channel];
        var sum = bias_of(channel);
        for (var j = 0u; j < TAPS; j += 1u) { sum += weight[channel * TAPS + j] * past[j]; }
        out[token * COLUMNS + channel] = sum;
        for (var j = 0u; j < TAPS - 1u; j += 1u) { past[j] = past[j + 1u]; }
        let page = page_after(token);
        if page != NO_PAGE {
            let kept = (page * COLUMNS + channel) * (TAPS - 1u);
            for (var j = 0u; j < TAPS - 1u; j += 1u) { state[kept + j] = past[j]; }
        }
        if is_last(token) { break; }
        token += 1u;
    }
}

// Chooses USED of EXPERTS for each token; ties go to the lower index, and NaN is above all numbers, so that it is seen.

fn above(a: f32, b: f32) -> bool {
    let nan = vec2(magnitude(a) > 0x7f800000u, magnitude(b) > 0x7f800000u);
    return select(a > b, nan.x && !nan.y, any(nan));
}

fn softmax(count: u32, p: ptr<function, array<f32, EXPERTS>>) {
    var largest = (*p)[0];
    for (var i = 1u; i < count; i++) { largest = max(largest, (*p)[i]); }
    var sum = 0.0;
    for (var i = 0u; i < count; i++) {
        (*p)[i] = or_nan(exp((*p)[i] - largest), (*p)[i]);
        sum += (*p)[i];
    }
    for (var i = 0u; i < count; i++) { (*p)[i] /= sum; }
}

@compute @workgroup_size(64)
fn main(in: In) {
    let token = 64u * in.workgroup.x + in.local;
    if token >= rows() { return; }
    var p: array<f32, EXPERTS>;
    for (var i = 0u; i < EXPERTS; i++) {
        p[i] = x[token * EXPERTS + i];
        if GATING == 2u { p[i] = sigmoid(p[i]); }
    }
    if GATING == 0u { softmax(EXPERTS, &p); }
    var chosen: array<f32, EXPERTS>;
    for (var n = 0u; n < USED; n++) {
        var best = 0u;
        for (var i = 1u; i < EXPERTS; i++) { if above(p[i], p[best]) { best = i; } }
        ids[token * USED + n] = best;
        chosen[n] = p[best];
        // Below every logit.
        p[best] = -0x1.fffffep127;
    }
    if GATING == 1u { softmax(USED, &chosen); }
    var sum = 0.0;
    for (var n = 0u; n < USED; n++) { sum += chosen[n]; }
    let factor = SCALE / select(1.0, sum, NORMALISE);
    for (var n = 0u; n < USED; n++) { out[token * USED + n] = chosen[n] * factor; }
}

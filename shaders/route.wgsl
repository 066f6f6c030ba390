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

// Below every logit.
const LOWEST = -0x1.fffffep127;

// Leaves only the groups whose two largest elements have the largest sums.
fn keep_groups(choice: ptr<function, array<f32, EXPERTS>>) {
    const EACH = EXPERTS / GROUPS;
    var sums: array<f32, GROUPS>;
    for (var group = 0u; group < GROUPS; group++) {
        var first = (*choice)[group * EACH];
        var second = LOWEST;
        for (var i = group * EACH + 1u; i < (group + 1u) * EACH; i++) {
            let v = (*choice)[i];
            if above(v, first) {
                second = first;
                first = v;
            } else if above(v, second) {
                second = v;
            }
        }
        sums[group] = first + second;
    }
    var kept: array<bool, GROUPS>;
    for (var n = 0u; n < GROUPS_USED; n++) {
        var best = GROUPS;
        for (var group = 0u; group < GROUPS; group++) {
            if !kept[group] && (best == GROUPS || above(sums[group], sums[min(best, GROUPS - 1u)])) { best = group; }
        }
        kept[min(best, GROUPS - 1u)] = true;
    }
    for (var i = 0u; i < EXPERTS; i++) { if !kept[i / EACH] { (*choice)[i] = LOWEST; } }
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
    // What the choice goes by.
    var choice: array<f32, EXPERTS>;
    for (var i = 0u; i < EXPERTS; i++) { choice[i] = p[i] + bias_of(i); }
    if GROUPS > 1u { keep_groups(&choice); }
    var chosen: array<f32, EXPERTS>;
    for (var n = 0u; n < USED; n++) {
        var best = 0u;
        for (var i = 1u; i < EXPERTS; i++) { if above(choice[i], choice[best]) { best = i; } }
        ids[token * USED + n] = best;
        chosen[n] = p[best];
        choice[best] = LOWEST;
    }
    if GATING == 1u { softmax(USED, &chosen); }
    var sum = 0.0;
    for (var n = 0u; n < USED; n++) { sum += chosen[n]; }
    let factor = SCALE / select(1.0, sum, NORMALISE);
    for (var n = 0u; n < USED; n++) {
        let at = token * USED + n;
        out[at] = chosen[n] * factor * scale_of(ids[at]);
    }
}

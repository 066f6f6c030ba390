// Rotary position embedding of the first 2 * PAIRS elements of each head; the rest are copied.

// Sine and cosine: those of a device may be off by 2^-11 (Vulkan), and by more at large angles.
fn sin_cos(x: f32) -> vec2<f32> {
    let quadrant = round(x * 0.63661977);
    // Half of pi in three parts (Cody & Waite).
    let r = ((x - quadrant * 1.5703125) - quadrant * 4.837513e-4) - quadrant * 7.54979e-8;
    let z = r * r;
    let sine = ((-1.9515296e-4 * z + 8.332161e-3) * z - 1.6666655e-1) * z * r + r;
    let cosine = ((2.4433157e-5 * z - 1.3887316e-3) * z + 4.1666646e-2) * z * z - 0.5 * z + 1.0;
    let n = i32(quadrant);
    let turned = select(vec2(sine, cosine), vec2(cosine, sine), (n & 1) != 0);
    return select(turned, -turned, vec2((n & 2) != 0, ((n + 1) & 2) != 0));
}

@compute @workgroup_size(64)
fn main(in: In) {
    let i = 64u * in.workgroup.x + in.local;
    let token = in.workgroup.y;
    // In each head, one invocation for each pair, then one for each element that stays.
    let lanes = HEAD_DIM - PAIRS;
    if i >= (COLUMNS / HEAD_DIM) * lanes { return; }
    let head = token * COLUMNS + (i / lanes) * HEAD_DIM;
    let pair = i % lanes;
    if pair >= PAIRS {
        let at = head + PAIRS + pair;
        out[at] = x[at];
        return;
    }
    let turned = sin_cos(f32(position(token)) * frequency(pair)) * MAGNITUDE;
    let s = turned.x;
    let c = turned.y;
    let first = head + select(pair, 2u * pair, ADJACENT);
    let second = head + select(PAIRS + pair, 2u * pair + 1u, ADJACENT);
    let a = x[first];
    let b = x[second];
    out[first] = a * c - b * s;
    out[second] = a * s + b * c;
}

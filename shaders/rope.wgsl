// Rotary position embedding of the first 2 * PAIRS elements of each head; the rest are copied.

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

// Rotary position embedding of queries and keys, of which the keys go to the cache, and so do the values. In each head of the
// queries, then of the keys, an invocation has a pair or an element that stays; then one has an element of the values.

const LANES: u32 = KEY_DIM - PAIRS;
const Q_HEADS: u32 = COLUMNS / KEY_DIM;

@compute @workgroup_size(64)
fn main(in: In) {
    let i = 64u * in.workgroup.x + in.local;
    let token = in.workgroup.y;
    let slot = position(token) % 64u;
    let page = page(token, position(token) / 64u);
    let head = i / LANES;
    let lane = i % LANES;
    if head >= Q_HEADS + KV_HEADS {
        let d = i - (Q_HEADS + KV_HEADS) * LANES;
        if d < VALUES { put_value(page, slot, d, v[token * VALUES + d]); }
        return;
    }
    let stays = lane >= PAIRS;
    let first = select(select(lane, 2u * lane, ADJACENT), PAIRS + lane, stays);
    let second = select(select(PAIRS + lane, 2u * lane + 1u, ADJACENT), first, stays);
    let of_q = head < Q_HEADS;
    let base = select(token * KEYS + (head - Q_HEADS) * KEY_DIM, token * COLUMNS + head * KEY_DIM, of_q);
    var pair: vec2<f32>;
    if of_q { pair = vec2(x[base + first], x[base + second]); } else { pair = vec2(k[base + first], k[base + second]); }
    if !stays {
        let turned = sin_cos(f32(position(token)) * frequency(lane)) * MAGNITUDE;
        pair = vec2(pair.x * turned.y - pair.y * turned.x, pair.x * turned.x + pair.y * turned.y);
    }
    if of_q {
        out[base + first] = pair.x;
        if !stays { out[base + second] = pair.y; }
    } else {
        let d = (head - Q_HEADS) * KEY_DIM;
        put_key(page, slot, d + first, pair.x);
        if !stays { put_key(page, slot, d + second, pair.y); }
    }
}

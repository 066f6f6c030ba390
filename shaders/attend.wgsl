// Attention of up to eight rows (a row is a query head of a token) that share a KV head and are of one sequence, with
// online softmax (Milakov & Gimelshein 2018; Dao et al. 2022). An invocation has a position of the page for the scores, and
// elements of the value for their sums.

// By element, in two fours of rows.
var<workgroup> q: array<vec4<f32>, 2u * KEY_DIM>;
// By position, in two fours of rows.
var<workgroup> p: array<vec4<f32>, 2u * 64u>;
var<workgroup> tops: array<vec4<f32>, 2u * 64u>;

const GROUP: u32 = HEADS / KV_HEADS;
const VALUE_RUNS: u32 = (VALUE_DIM + 63u) / 64u;
const LOWEST: f32 = -0x1.fffffep127;

// First token and number of tokens of a tile, and the end of the positions that their sequence has.
fn tile(i: u32) -> vec3<u32> {
    let at = STEP_TILES + 3u * i;
    return vec3(step[at], step[at + 1u], step[at + 2u]);
}

fn limit(score: vec4<f32>) -> vec4<f32> {
    if SOFTCAP == 0.0 { return score; }
    let s = score / SOFTCAP;
    return SOFTCAP * vec4(tanh_safe(s.x), tanh_safe(s.y), tanh_safe(s.z), tanh_safe(s.w));
}

// Parameters of their own: of a struct with a part that differs, browsers take every part to differ between invocations.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv_head = workgroup.x;
    let tokens = tile(workgroup.y / ROW_TILES);
    let row0 = 8u * (workgroup.y % ROW_TILES);
    let count = min(tokens.y * GROUP - min(row0, tokens.y * GROUP), 8u);
    // Positions that the rows see.
    var firsts = array<u32, 8>();
    var ends = array<u32, 8>();
    var owns = array<u32, 8>();
    var slopes = array<f32, 8>();
    var growths = array<f32, 8>();
    var lowest = 0xffffffffu;
    var highest = 0u;
    for (var r = 0u; r < 8u; r++) {
        if r < count {
            let own = position(tokens.x + (row0 + r) / GROUP) + 1u;
            ends[r] = own + min(tokens.z - own, AFTER);
            firsts[r] = select(own - min(own, WINDOW), own - 1u - (own - 1u) % WINDOW, ALIGNED);
            owns[r] = own - 1u;
            growths[r] = growth_of(own - 1u);
            slopes[r] = slope_of(kv_head * GROUP + (row0 + r) % GROUP);
            lowest = min(lowest, firsts[r]);
            highest = max(highest, ends[r]);
        }
    }
    let first0 = vec4(firsts[0], firsts[1], firsts[2], firsts[3]);
    let first1 = vec4(firsts[4], firsts[5], firsts[6], firsts[7]);
    let end0 = vec4(ends[0], ends[1], ends[2], ends[3]);
    let end1 = vec4(ends[4], ends[5], ends[6], ends[7]);
    let own0 = vec4(owns[0], owns[1], owns[2], owns[3]);
    let own1 = vec4(owns[4], owns[5], owns[6], owns[7]);
    let slope0 = vec4(slopes[0], slopes[1], slopes[2], slopes[3]);
    let slope1 = vec4(slopes[4], slopes[5], slopes[6], slopes[7]);
    let growth0 = vec4(growths[0], growths[1], growths[2], growths[3]);
    let growth1 = vec4(growths[4], growths[5], growths[6], growths[7]);
    for (var i = local; i < 2u * KEY_DIM; i += 64u) {
        let four = i / KEY_DIM;
        let d = i % KEY_DIM;
        var elements = vec4(0.0);
        for (var j = 0u; j < 4u; j++) {
            let row = row0 + 4u * four + j;
            let at = (tokens.x + row / GROUP) * HEADS * KEY_DIM + (kv_head * GROUP + row % GROUP) * KEY_DIM + d;
            elements[j] = select(0.0, x[at], 4u * four + j < count);
        }
        q[2u * d + four] = elements;
    }
    workgroupBarrier();
    var top0 = vec4(LOWEST);
    var top1 = vec4(LOWEST);
    // Each invocation's part of the denominators.
    var sum0 = vec4(0.0);
    var sum1 = vec4(0.0);
    var o0: array<vec4<f32>, VALUE_RUNS>;
    var o1: array<vec4<f32>, VALUE_RUNS>;
    let pages = pages_of(workgroup.z, min(lowest, highest) / 64u, (highest + 63u) / 64u);
    for (var chunk = pages.x; chunk < pages.y; chunk++) {
        let at = page(tokens.x, chunk);
        let place = 64u * chunk + local;
        var s0 = vec4(0.0);
        var s1 = vec4(0.0);
        if place < highest {
            for (var d = 0u; d < KEY_DIM; d++) {
                let element = key(at, kv_head * KEY_DIM + d, local);
                s0 += q[2u * d] * element;
                s1 += q[2u * d + 1u] * element;
            }
        }
        s0 *= SCALE;
        s1 *= SCALE;
        if GROWN {
            s0 *= growth0;
            s1 *= growth1;
        }
        s0 = limit(s0);
        s1 = limit(s1);
        if SLOPED {
            // The smaller difference of two that wrap around is the distance.
            s0 -= slope0 * vec4<f32>(min(vec4(place) - own0, own0 - vec4(place)));
            s1 -= slope1 * vec4<f32>(min(vec4(place) - own1, own1 - vec4(place)));
        }
        s0 = select(vec4(LOWEST), s0, (vec4(place) >= first0) & (vec4(place) < end0));
        s1 = select(vec4(LOWEST), s1, (vec4(place) >= first1) & (vec4(place) < end1));
        tops[2u * local] = s0;
        tops[2u * local + 1u] = s1;
        workgroupBarrier();
        for (var half = 32u; half > 0u; half = half / 2u) {
            if local < half {
                let other = local + half;
                tops[2u * local] = max(tops[2u * local], tops[2u * other]);
                tops[2u * local + 1u] = max(tops[2u * local + 1u], tops[2u * other + 1u]);
            }
            workgroupBarrier();
        }
        let new0 = max(top0, tops[0]);
        let new1 = max(top1, tops[1]);
        let factor0 = exp(top0 - new0);
        let factor1 = exp(top1 - new1);
        top0 = new0;
        top1 = new1;
        // Where a row sees nothing yet, every score is the lowest there is.
        s0 = select(exp(s0 - new0), vec4(0.0), s0 == vec4(LOWEST));
        s1 = select(exp(s1 - new1), vec4(0.0), s1 == vec4(LOWEST));
        sum0 = sum0 * factor0 + s0;
        sum1 = sum1 * factor1 + s1;
        p[2u * local] = s0;
        p[2u * local + 1u] = s1;
        workgroupBarrier();
        // Positions that no row sees may hold anything.
        let slot_first = max(lowest, 64u * chunk) - 64u * chunk;
        let slot_end = min(highest - 64u * chunk, 64u);
        for (var run = 0u; run < VALUE_RUNS; run++) {
            let d = 64u * run + local;
            if d < VALUE_DIM {
                var a0 = o0[run] * factor0;
                var a1 = o1[run] * factor1;
                for (var slot = slot_first; slot < slot_end; slot++) {
                    let element = value(at, kv_head * VALUE_DIM + d, slot);
                    a0 += p[2u * slot] * element;
                    a1 += p[2u * slot + 1u] * element;
                }
                o0[run] = a0;
                o1[run] = a1;
            }
        }
        workgroupBarrier();
    }
    // The denominators are the sums over the invocations.
    tops[2u * local] = sum0;
    tops[2u * local + 1u] = sum1;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half = half / 2u) {
        if local < half {
            tops[2u * local] += tops[2u * (local + half)];
            tops[2u * local + 1u] += tops[2u * (local + half) + 1u];
        }
        workgroupBarrier();
    }
    sum0 = tops[0];
    sum1 = tops[1];
    for (var r = 0u; r < count; r++) {
        let row = row0 + r;
        let token = tokens.x + row / GROUP;
        let head = kv_head * GROUP + row % GROUP;
        let top = select(top1, top0, r < 4u)[r % 4u];
        let sum = select(sum1, sum0, r < 4u)[r % 4u];
        for (var run = 0u; run < VALUE_RUNS; run++) {
            let d = 64u * run + local;
            let o = select(o1[run], o0[run], r < 4u)[r % 4u];
            if d < VALUE_DIM { keep(workgroup.z, token, head, d, o, sum, top); }
        }
    }
}

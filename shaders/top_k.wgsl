// The K largest of each piece of a row, largest first; a workgroup has a piece. Bitonic sorting (Batcher 1968).

// Rank and index.
var<workgroup> sorted: array<vec2<u32>, PIECE>;

fn comes_before(a: vec2<u32>, b: vec2<u32>) -> bool { return a.x > b.x || (a.x == b.x && a.y < b.y); }

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    for (var i = in.local; i < PIECE; i += WORKGROUP) {
        let at = PIECE * in.workgroup.x + i;
        // Below every number.
        sorted[i] = vec2(0u, 0xffffffffu);
        if at < COUNT { sorted[i] = element(in.workgroup.y, at); }
    }
    workgroupBarrier();
    for (var size = 2u; size <= PIECE; size *= 2u) {
        for (var half = size / 2u; half > 0u; half /= 2u) {
            for (var pair = in.local; pair < PIECE / 2u; pair += WORKGROUP) {
                let i = pair / half * 2u * half + pair % half;
                let a = sorted[i];
                let b = sorted[i + half];
                if comes_before(b, a) == ((i & size) == 0u) {
                    sorted[i] = b;
                    sorted[i + half] = a;
                }
            }
            workgroupBarrier();
        }
    }
    for (var i = in.local; i < K; i += WORKGROUP) { keep(in.workgroup.y, K * in.workgroup.x + i, sorted[i]); }
}

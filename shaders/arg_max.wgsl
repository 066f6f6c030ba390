// The index of each row's largest element, the lowest on ties; NOT_FINITE if that is not finite or an element is NaN.

const NOT_FINITE: u32 = 0xffffffffu;
// Ranks of the infinities.
const LEAST: u32 = 0x007fffffu;
const MOST: u32 = 0xff800000u;

var<workgroup> ranks: array<u32, WORKGROUP>;
var<workgroup> places: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let first = in.workgroup.y * COLUMNS;
    var best = 0u;
    // Below every number.
    var most = 0u;
    for (var i = in.local; i < COLUMNS; i += WORKGROUP) {
        let bits = x[first + i];
        // Both zeros are equal.
        let v = rank(select(bits, 0u, bits == 0x80000000u));
        if v > most { most = v; best = i; }
    }
    ranks[in.local] = most;
    places[in.local] = best;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if in.local < half {
            let other = in.local + half;
            let greater = ranks[other] > ranks[in.local];
            if greater || (ranks[other] == ranks[in.local] && places[other] < places[in.local]) {
                ranks[in.local] = ranks[other];
                places[in.local] = places[other];
            }
        }
        workgroupBarrier();
    }
    if in.local == 0u {
        let finite = ranks[0] > LEAST && ranks[0] < MOST;
        out[in.workgroup.y] = select(NOT_FINITE, places[0], finite);
    }
}

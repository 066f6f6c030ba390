// The index of each row's largest element; the lowest on ties.

var<workgroup> values: array<f32, WORKGROUP>;
var<workgroup> places: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let first = in.workgroup.y * COLUMNS;
    var best = 0u;
    var most = -3.4028235e38;
    for (var i = in.local; i < COLUMNS; i += WORKGROUP) {
        let v = x[first + i];
        if v > most { most = v; best = i; }
    }
    values[in.local] = most;
    places[in.local] = best;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if in.local < half {
            let other = in.local + half;
            let greater = values[other] > values[in.local];
            if greater || (values[other] == values[in.local] && places[other] < places[in.local]) {
                values[in.local] = values[other];
                places[in.local] = places[other];
            }
        }
        workgroupBarrier();
    }
    if in.local == 0u { out[in.workgroup.y] = places[0]; }
}

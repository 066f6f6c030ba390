// What a norm divides each run of GROUP elements by; a workgroup has one.

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let at = in.workgroup.y * GROUPS + in.workgroup.x;
    var sum = 0.0;
    for (var i = in.local; i < GROUP; i += WORKGROUP) { sum += x[at * GROUP + i]; }
    let mean = select(0.0, sum_all(in, sum) / f32(GROUP), CENTRED);
    var squares = 0.0;
    for (var i = in.local; i < GROUP; i += WORKGROUP) {
        let v = x[at * GROUP + i] - mean;
        squares += v * v;
    }
    let spread = sqrt(sum_all(in, squares) / f32(GROUP) + EPS);
    if in.local == 0u { out[at] = spread; }
}

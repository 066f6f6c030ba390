// Normalises each run of GROUP elements; a workgroup has one. `after` is what follows.

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let first = (in.workgroup.y * (COLUMNS / GROUP) + in.workgroup.x) * GROUP;
    var sum = 0.0;
    for (var i = in.local; i < GROUP; i += WORKGROUP) {
        let v = input(first + i);
        keep(first + i, v);
        sum += v;
    }
    let mean = select(0.0, sum_all(in, sum) / f32(GROUP), CENTRED);
    var squares = 0.0;
    for (var i = in.local; i < GROUP; i += WORKGROUP) {
        let v = input(first + i) - mean;
        squares += v * v;
    }
    let scale = 1.0 / sqrt(sum_all(in, squares) / f32(GROUP) + EPS);
    for (var i = in.local; i < GROUP; i += WORKGROUP) {
        out[first + i] = (input(first + i) - mean) * scale * weight_of(i) + bias_of(i);
    }
    after(in);
}

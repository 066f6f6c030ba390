// The experts' results, weighted and added in order.

@compute @workgroup_size(64)
fn main(in: In) {
    let column = 64u * in.workgroup.x + in.local;
    let token = in.workgroup.y;
    if column >= COLUMNS { return; }
    var sum = 0.0;
    for (var n = 0u; n < USED; n++) {
        sum += expert_weights[token * USED + n] * x[(token * USED + n) * COLUMNS + column];
    }
    out[token * COLUMNS + column] = sum;
}

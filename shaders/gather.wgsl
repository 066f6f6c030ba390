// Copies the rows of the tokens that have outputs.

@compute @workgroup_size(64)
fn main(in: In) {
    let column = 64u * in.workgroup.x + in.local;
    if column >= COLUMNS { return; }
    out[in.workgroup.y * COLUMNS + column] = x[output_token(in.workgroup.y) * COLUMNS + column];
}

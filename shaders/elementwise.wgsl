// A function of each element.

@compute @workgroup_size(64)
fn main(in: In) {
    let column = 64u * in.workgroup.x + in.local;
    if column >= COLUMNS { return; }
    let at = in.workgroup.y * COLUMNS + column;
    out[at] = element(at);
}

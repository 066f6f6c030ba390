// Rows of a table, times a factor.

@compute @workgroup_size(64)
fn main(in: In) {
    let four = 64u * in.workgroup.x + in.local;
    let token = in.workgroup.y;
    let row = row_of(token);
    if 4u * four >= K || row < FIRST || row - FIRST >= ROWS { return; }
    let values = four_weights(row - FIRST, 4u * four);
    for (var i = 0u; i < min(4u, K - 4u * four); i++) { out[token * K + 4u * four + i] = SCALE * values[i]; }
}

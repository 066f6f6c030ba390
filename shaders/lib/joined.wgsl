// An element of a row whose groups are FIRST elements of `a` and LAST of `b`, which may have one group for all.
fn joined(row: u32, column: u32) -> f32 {
    let group = column / GROUP;
    let d = column % GROUP;
    if d < FIRST { return a[row * A_COLUMNS + group * FIRST + d]; }
    return b[row * B_COLUMNS + (group * LAST + d - FIRST) % B_COLUMNS];
}

// What becomes of a product before it is stored: `row` of the outputs, column of ROWS.
fn store(row: u32, column: u32, matrix: u32, product: f32) {
    let at = row * COLUMNS + FIRST + column;
    out[at] = after(at, product + bias_of(matrix * COLUMNS + FIRST + column));
}

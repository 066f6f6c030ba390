// The weighted sum of a row's parts that is element `at` of the result.
fn mixed(at: u32) -> f32 {
    let row = at / COLUMNS;
    let column = at % COLUMNS;
    var sum = 0.0;
    for (var j = 0u; j < PARTS; j++) {
        sum += factors[row * FACTORS + column / LEN * PARTS + j] * x[(row * PARTS + j) * LEN + column % LEN];
    }
    return sum;
}

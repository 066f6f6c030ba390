// Rows of results in groups of TOKENS that share a matrix: each row of activations has a result of every matrix, in order.
fn row_of(i: u32) -> u32 {
    let group = i / TOKENS;
    return (group / MATRICES * TOKENS + i % TOKENS) * MATRICES + group % MATRICES;
}
fn matrix_of(first: u32) -> u32 { return first / TOKENS % MATRICES; }
fn count_at(first: u32) -> u32 {
    let row = first / TOKENS / MATRICES * TOKENS;
    return min(rows() - min(row, rows()), TOKENS);
}

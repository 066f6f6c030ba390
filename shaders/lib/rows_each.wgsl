// Rows of results as they come.
fn row_of(i: u32) -> u32 { return i; }
fn count_at(first: u32) -> u32 { return min(results() - min(first, results()), TOKENS); }

// Rows of results in groups of TOKENS that share a matrix, as group.wgsl has put them.
const NONE: u32 = 0xffffffffu;
fn row_of(i: u32) -> u32 { return order[i / TOKENS * (TOKENS + 1u) + 1u + i % TOKENS]; }
fn matrix_of(first: u32) -> u32 { return order[first / TOKENS * (TOKENS + 1u)]; }
fn count_at(first: u32) -> u32 {
    var count = 0u;
    while count < TOKENS && row_of(first + count) != NONE { count++; }
    return count;
}

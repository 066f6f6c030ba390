// Where a split of the cache has the results for a head of a token: the sums, then the largest score and the denominator.
fn split_place(split: u32, token: u32, head: u32) -> u32 {
    return ((split * step_tokens() + token) * HEADS + head) * (VALUE_DIM + 2u);
}

// All rows are interleaved, in groups of sixteen.

// Chooses the block that `word` reads: one of BLOCKS of a row, of ROWS in each of several matrices.
fn locate(matrix: u32, row: u32, block: u32) {
    let lane = row % 16u;
    let group = (matrix * ROWS + row - lane) * (BLOCKS * BLOCK_BYTES) + 16u * block * BLOCK_BYTES;
    head_at = group + lane * HEAD;
    words_at = (group + 16u * HEAD) / 4u + lane;
    tail_at = group + 16u * (HEAD + 4u * WORDS) + lane * TAIL;
}

fn word(i: u32) -> u32 { return weight_word(words_at + 16u * i); }

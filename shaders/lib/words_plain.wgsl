// Rows lie one after the other, in bytes that need not be aligned.

// Chooses the block that `word` reads: one of BLOCKS of a row, of ROWS in each of several matrices.
fn locate(matrix: u32, row: u32, block: u32) {
    head_at = ((matrix * ROWS + row) * BLOCKS + block) * BLOCK_BYTES;
    words_at = head_at + HEAD;
    tail_at = words_at + 4u * WORDS;
}

fn word(i: u32) -> u32 {
    let at = words_at + 4u * i;
    let shift = 8u * (at % 4u);
    // A shift by 32 would be one by 0.
    return (weight_word(at / 4u) >> shift) | ((weight_word(at / 4u + 1u) << 1u) << (31u - shift));
}

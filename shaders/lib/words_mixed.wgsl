// The first INTERLEAVED rows of a matrix are interleaved, in groups of sixteen; the rest lie one after the other.

var<private> apart: u32;

// Chooses the block that `word` reads: one of BLOCKS of a row, of ROWS in each of several matrices.
fn locate(matrix: u32, row: u32, block: u32) {
    let base = (matrix * ROWS + row) * (BLOCKS * BLOCK_BYTES);
    if row < INTERLEAVED {
        let lane = row % 16u;
        let group = base - lane * (BLOCKS * BLOCK_BYTES) + 16u * block * BLOCK_BYTES;
        head_at = group + lane * HEAD;
        words_at = group + 16u * HEAD + 4u * lane;
        tail_at = group + 16u * (HEAD + 4u * WORDS) + lane * TAIL;
        apart = 64u;
    } else {
        head_at = base + block * BLOCK_BYTES;
        words_at = head_at + HEAD;
        tail_at = words_at + 4u * WORDS;
        apart = 4u;
    }
}

fn word(i: u32) -> u32 {
    let at = words_at + apart * i;
    let shift = 8u * (at % 4u);
    // A shift by 32 would be one by 0.
    return (weight_word(at / 4u) >> shift) | ((weight_word(at / 4u + 1u) << 1u) << (31u - shift));
}

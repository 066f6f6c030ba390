// Where a row's blocks are. Rows are interleaved in groups of sixteen, but for those after the last whole group and for
// formats that never are, which lie one after the other in bytes that need not be aligned.
//
// LEN values in a block of HEAD bytes, WORDS words and TAIL bytes; BLOCKS in a row; of ROWS rows in a matrix the first
// INTERLEAVED are interleaved.

const BLOCK_BYTES: u32 = HEAD + 4u * WORDS + TAIL;
const ALL_INTERLEAVED: bool = INTERLEAVED == ROWS;

var<private> plain: bool;
var<private> head_at: u32;
var<private> words_at: u32;
var<private> tail_at: u32;

// Chooses the block that the functions below read: a block of a row of one of several matrices.
fn locate(matrix: u32, row: u32, block: u32) {
    let base = (matrix * ROWS + row) * (BLOCKS * BLOCK_BYTES);
    plain = !ALL_INTERLEAVED && row >= INTERLEAVED;
    if plain {
        head_at = base + block * BLOCK_BYTES;
        words_at = head_at + HEAD;
        tail_at = words_at + 4u * WORDS;
    } else {
        let lane = row % 16u;
        let group = base - lane * (BLOCKS * BLOCK_BYTES) + 16u * block * BLOCK_BYTES;
        head_at = group + lane * HEAD;
        words_at = (group + 16u * HEAD) / 4u + lane;
        tail_at = group + 16u * (HEAD + 4u * WORDS) + lane * TAIL;
    }
}

// Four bytes from any place.
fn unaligned(at: u32) -> u32 {
    let shift = 8u * (at % 4u);
    let low = w[at / 4u] >> shift;
    if shift == 0u { return low; }
    return low | (w[at / 4u + 1u] << (32u - shift));
}

fn word(i: u32) -> u32 {
    if plain { return unaligned(words_at + 4u * i); }
    return w[words_at + 16u * i];
}

// Two bytes of the words.
fn half_word(i: u32) -> u32 { return (word(i / 2u) >> (16u * (i % 2u))) & 0xffffu; }
fn byte(i: u32) -> u32 { return (word(i / 4u) >> (8u * (i % 4u))) & 0xffu; }

// What stands before and after the words, from the lowest bit on; no more than a word's part is needed of it.
fn head() -> u32 { return w[head_at / 4u] >> (8u * (head_at % 4u)); }
fn tail() -> u32 { return w[tail_at / 4u] >> (8u * (tail_at % 4u)); }
fn f16_low(bits: u32) -> f32 { return unpack2x16float(bits).x; }
fn f16_high(bits: u32) -> f32 { return unpack2x16float(bits).y; }

// The low (0) or high (1) nibbles of word i.
fn nibbles(i: u32, high: u32) -> u32 { return (word(i) >> (4u * high)) & 0x0f0f0f0fu; }

// In each byte, bit 4 is bit 4 k + byte of the word.
fn spread_bits(bits: u32, k: u32) -> u32 {
    return ((((bits >> (4u * k)) & 15u) * 0x00204081u) & 0x01010101u) << 4u;
}

// Each byte negated where bit `byte` of signs is set; no such byte may be 0.
fn negate(codes: u32, signs: u32) -> u32 {
    let flips = ((signs & 15u) * 0x00204081u) & 0x01010101u;
    return (codes ^ (flips * 255u)) + flips;
}

// The signs of eight values from a code of seven bits: their number is even.
fn even_signs(code: u32) -> u32 {
    let seven = code & 127u;
    return seven | ((countOneBits(seven) & 1u) << 7u);
}

// A signed byte of a word.
fn signed_byte(bits: u32, i: u32) -> i32 { return extractBits(bitcast<i32>(bits), 8u * i, 8u); }

// What formats read of a block: words, and pieces of them. A block has HEAD bytes, WORDS words and TAIL bytes; where they are,
// `locate` and `word` of one of the words_*.wgsl know.

const BLOCK_BYTES: u32 = HEAD + 4u * WORDS + TAIL;

var<private> head_at: u32;
var<private> words_at: u32;
var<private> tail_at: u32;

// Two bytes of the words.
fn half_word(i: u32) -> u32 { return (word(i / 2u) >> (16u * (i % 2u))) & 0xffffu; }
fn byte(i: u32) -> u32 { return (word(i / 4u) >> (8u * (i % 4u))) & 0xffu; }


// What stands before and after the words, from the lowest bit on; it never goes on in the next word.
fn head() -> u32 { return weight_word(head_at / 4u) >> (8u * (head_at % 4u)); }
fn tail() -> u32 { return weight_word(tail_at / 4u) >> (8u * (tail_at % 4u)); }
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

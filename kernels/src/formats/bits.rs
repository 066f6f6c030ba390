//! Bit fields that several formats share, eight codes to a 64-bit word: portable, and free of branches.

/// 1 in every byte.
pub const ONES: u64 = 0x0101_0101_0101_0101;

/// For each byte, a word whose byte i is 0xff where bit i is set, else 0.
static MASKS: [u64; 256] = {
    let mut masks = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        let mut i = 0;
        while i < 8 {
            masks[bits] |= (((bits >> i) & 1) as u64 * 0xff) << (8 * i);
            i += 1;
        }
        bits += 1;
    }
    masks
};

/// 0xff in byte i of the result where bit i of `bits` is set, else 0.
#[inline(always)]
pub fn mask(bits: u8) -> u64 {
    MASKS[usize::from(bits)]
}

/// The signs of four sign codes of 7 bits, the first lowest, one byte each: the eighth sign of a code makes
/// the number of negative values even.
#[inline(always)]
pub fn even_signs(codes: u32) -> u32 {
    let halves = (codes & 0x3fff) | ((codes << 2) & 0x3fff_0000);
    even_bytes((halves & 0x007f_007f) | ((halves << 1) & 0x7f00_7f00))
}

/// Sets the top bit of each byte to the parity of the other seven. The top bits must be 0.
#[inline(always)]
pub fn even_bytes(bytes: u32) -> u32 {
    let fold = bytes ^ (bytes >> 4);
    let fold = fold ^ (fold >> 2);
    let fold = fold ^ (fold >> 1);
    bytes | ((fold & 0x0101_0101) << 7)
}

/// Nibble `index` of `bytes`, the low one of each byte first.
#[inline(always)]
pub const fn nibble(bytes: &[u8], index: usize) -> u8 {
    (bytes[index / 2] >> (4 * (index % 2))) & 15
}

/// The eight scales and eight minimums, 6 bits each, of a Q4_K or Q5_K block.
///
/// Bytes 0 to 3 hold scales 0 to 3 and bytes 4 to 7 minimums 0 to 3 in their low 6 bits. Bytes 8 to 11 hold
/// the low nibbles of scales (low) and minimums (high) 4 to 7, whose upper two bits are the top bits of bytes
/// 0 to 7.
#[inline(always)]
pub fn six_bit_pairs(bytes: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    const NIBBLES: u64 = 0x0f0f_0f0f;
    const SIX: u64 = 0x3f3f_3f3f;
    const TOP: u64 = 0x3030_3030;
    let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]) as u64;
    let (scale, min, low) = (word(0), word(4), word(8));
    // Four values at a time, one a byte.
    let scales = (scale & SIX) | ((low & NIBBLES) | ((scale >> 2) & TOP)) << 32;
    let mins = (min & SIX) | (((low >> 4) & NIBBLES) | ((min >> 2) & TOP)) << 32;
    (scales.to_le_bytes(), mins.to_le_bytes())
}

/// The nearest integer, ties to even, of |x| < 2^22. NaN stays NaN; larger magnitudes stay beyond 2^22.
#[inline(always)]
pub const fn round_ties_even(x: f32) -> f32 {
    // At 1.5 * 2^23 one unit in the last place is 1, so the sum is rounded to an integer by the adder itself.
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

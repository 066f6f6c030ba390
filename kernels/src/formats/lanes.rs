//! Sixteen rows of blocks, interleaved: what every fast matrix product reads.
//!
//! A block is one odd piece of 0 to 2 bytes at its front, 32-bit words, and one odd piece at its end. Interleaved, the
//! pieces of sixteen rows follow each other: all fronts, then the first word of every row, the second word of every row, …,
//! then all ends. A vector of sixteen words so has one row in each lane, on every instruction set, and sums need no
//! reduction across lanes. The bytes are those of the sixteen blocks in another order: nothing is added.

use super::Bytes;
use crate::isa::Isa;

/// Rows that are interleaved.
pub const ROWS: usize = 16;

/// Most bytes of a row that [`Interleave::interleave`] takes at once: eight blocks of any format of short blocks.
pub const RUN_BYTES: usize = 8 * 34;

/// One block of each of [`ROWS`] rows: `HEAD` bytes of each, `WORDS` words of each, `TAIL` bytes of each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Lanes<const HEAD: usize, const WORDS: usize, const TAIL: usize> {
    /// What stands before the words, row by row.
    pub head: [[u8; HEAD]; ROWS],
    /// `words[w][4 * row..]`: word `w` of each row.
    pub words: [[u8; 4 * ROWS]; WORDS],
    /// What stands after the words, row by row.
    pub tail: [[u8; TAIL]; ROWS],
}

// SAFETY: `repr(C)` of byte arrays: alignment 1, no padding, no invalid pattern.
unsafe impl<const HEAD: usize, const WORDS: usize, const TAIL: usize> Bytes for Lanes<HEAD, WORDS, TAIL> {}

/// What the kernels need of any [`Lanes`].
pub trait Interleave: Bytes {
    /// All zero.
    const ZERO: Self;

    /// Interleaves as many blocks of each row as `out` takes, at most [`RUN_BYTES`]. Rows start `stride` bytes apart; bytes
    /// that are missing are zeros.
    fn interleave<I: Isa>(isa: I, rows: &[u8], stride: usize, out: &mut [Self]);

    /// The block of one row.
    fn row<B: Bytes>(&self, row: usize, out: &mut B);
}

impl<const HEAD: usize, const WORDS: usize, const TAIL: usize> Interleave for Lanes<HEAD, WORDS, TAIL> {
    const ZERO: Self =
        Lanes { head: [[0; HEAD]; ROWS], words: [[0; 4 * ROWS]; WORDS], tail: [[0; TAIL]; ROWS] };

    #[inline(always)]
    fn interleave<I: Isa>(isa: I, rows: &[u8], stride: usize, out: &mut [Self]) {
        const { assert!(WORDS >= 4) };
        let bytes = HEAD + 4 * WORDS + TAIL;
        if HEAD == 0 {
            for (i, out) in out.iter_mut().enumerate() {
                let rows = rows.get(i * bytes..).unwrap_or(&[]);
                transpose_words(isa, rows, stride, &mut out.words);
                for row in 0..ROWS {
                    let tail = rows.get(row * stride + 4 * WORDS..).and_then(|b| b.first_chunk());
                    out.tail[row] = *tail.unwrap_or(&[0; TAIL]);
                }
            }
            return;
        }
        // Words of the run first, wherever blocks start, then the words and heads of each block out of these.
        let mut run = [[0; 4 * ROWS]; RUN_BYTES / 4];
        let words = (out.len() * bytes).div_ceil(4).clamp(4, RUN_BYTES / 4);
        transpose_words(isa, rows, stride, &mut run[..words]);
        let word_at = |at: usize| {
            let word = isa.load_words(&run[(at / 4).min(RUN_BYTES / 4 - 1)]);
            if at.is_multiple_of(4) {
                return word;
            }
            let (next, bits) =
                (isa.load_words(&run[(at / 4 + 1).min(RUN_BYTES / 4 - 1)]), 8 * (at % 4) as u32);
            isa.or_i(isa.shr_by(word, bits), isa.shl_by(next, 32 - bits))
        };
        for (i, out) in out.iter_mut().enumerate() {
            let at = i * bytes;
            let mut heads = [[0; 2]; ROWS];
            isa.store_u16(word_at(at), &mut heads);
            for row in 0..ROWS {
                out.head[row].copy_from_slice(&heads[row][..HEAD]);
            }
            for w in 0..WORDS {
                isa.store_words(word_at(at + HEAD + 4 * w), &mut out.words[w]);
            }
        }
    }

    fn row<B: Bytes>(&self, row: usize, out: &mut B) {
        let bytes = B::bytes_of_mut(core::slice::from_mut(out));
        let (head, rest) = bytes.split_at_mut(HEAD);
        let (words, tail) = rest.split_at_mut(4 * WORDS);
        head.copy_from_slice(&self.head[row]);
        for (word, all) in words.as_chunks_mut::<4>().0.iter_mut().zip(&self.words) {
            *word = all.as_chunks::<4>().0[row];
        }
        tail.copy_from_slice(&self.tail[row]);
    }
}

impl<const HEAD: usize, const WORDS: usize, const TAIL: usize> Lanes<HEAD, WORDS, TAIL> {
    /// Word `w` of every row.
    #[inline(always)]
    pub fn word<I: Isa>(&self, isa: I, w: usize) -> I::I {
        isa.load_words(&self.words[w])
    }

    /// Nibbles of word `w`: the low ones if `high` is 0, the high ones if it is 1.
    #[inline(always)]
    pub fn nibbles<I: Isa>(&self, isa: I, w: usize, high: usize) -> I::I {
        isa.and_i(isa.shr_by(self.word(isa, w), 4 * high as u32), isa.splat_i(0x0f0f_0f0f))
    }
}

impl<const WORDS: usize, const TAIL: usize> Lanes<2, WORDS, TAIL> {
    /// The half-precision float at the front.
    #[inline(always)]
    pub fn head_f16<I: Isa>(&self, isa: I) -> I::F {
        isa.load_f16(&self.head.map(u16::from_le_bytes))
    }
}

impl<const HEAD: usize, const WORDS: usize> Lanes<HEAD, WORDS, 2> {
    /// The half-precision float at the end.
    #[inline(always)]
    pub fn tail_f16<I: Isa>(&self, isa: I) -> I::F {
        isa.load_f16(&self.tail.map(u16::from_le_bytes))
    }
}

/// Words of sixteen rows, transposed.
#[inline(always)]
fn transpose_words<I: Isa>(isa: I, rows: &[u8], stride: usize, out: &mut [[u8; 4 * ROWS]]) {
    for quad in 0..out.len().div_ceil(4) {
        // The last four words may overlap the four before them.
        let first = (4 * quad).min(out.len() - 4);
        let words = isa.transpose(rows.get(4 * first..).unwrap_or(&[]), stride);
        for i in 0..4 {
            isa.store_words(words[i], &mut out[first + i]);
        }
    }
}

/// In each byte, bit 4 is bit `4 k + byte` of the word.
#[inline(always)]
pub(super) fn spread_bits<I: Isa>(isa: I, word: I::I, k: usize) -> I::I {
    let four = isa.and_i(isa.shr_by(word, 4 * k as u32), isa.splat_i(15));
    // Each bit is moved to its byte: shifts by 0, 7, 14 and 21.
    let spread = isa.mul_i(four, isa.splat_i(0x0020_4081));
    isa.shl_by(isa.and_i(spread, isa.splat_i(0x0101_0101)), 4)
}

/// The scales (first two words) and minimums of Q4_K and Q5_K, one a byte; see [`super::six_bit_pairs`].
#[inline(always)]
pub(super) fn six_bit_words<I: Isa>(isa: I, scales: [I::I; 3]) -> [[I::I; 2]; 2] {
    let six = isa.splat_i(0x3f3f_3f3f);
    let (nibble, top) = (isa.splat_i(0x0f0f_0f0f), isa.splat_i(0x3030_3030));
    let [scale, min, low] = scales;
    let high = |x: I::I| isa.and_i(isa.shr_by(x, 2), top);
    [
        [isa.and_i(scale, six), isa.or_i(isa.and_i(low, nibble), high(scale))],
        [isa.and_i(min, six), isa.or_i(isa.and_i(isa.shr_by(low, 4), nibble), high(min))],
    ]
}

/// Each byte, which is below 64, less 32, as a signed byte.
#[inline(always)]
pub(super) fn less_32<I: Isa>(isa: I, x: I::I) -> I::I {
    // Bit 5 inverted becomes bits 5 to 7.
    let sign = isa.splat_i(0x2020_2020);
    let below = isa.sub_i(sign, isa.and_i(x, sign));
    let low = isa.and_i(x, isa.splat_i(0x1f1f_1f1f));
    isa.or_i(isa.or_i(low, below), isa.or_i(isa.shl_by(below, 1), isa.shl_by(below, 2)))
}

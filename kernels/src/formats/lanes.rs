//! Interleaved blocks of sixteen rows, the layout of packed files.
//!
//! A block consists of a head of 0 to 2 bytes, 32-bit words, and a tail of 0 to 2 bytes. An interleaved block
//! holds the heads of sixteen rows, then the first word of each row, the second word of each row, and so on,
//! then the tails. A vector of sixteen words therefore has one row in each lane on every instruction set, and
//! sums need no reduction across lanes. The bytes are those of the sixteen blocks in another order.

#![allow(clippy::manual_memcpy, reason = "loops by index over vectors are what inlines; see `isa`")]

use super::Bytes;
use crate::isa::Isa;

/// Rows that are interleaved.
pub const ROWS: usize = 16;

/// How the rows of a matrix lie in memory.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// One after the other, as published.
    #[default]
    Rows,
    /// In groups of [`ROWS`], each interleaved block by block ([`Lanes`]); rows after the last whole group
    /// one after the other.
    Interleaved,
}

/// One block of each of [`ROWS`] rows: `HEAD` bytes of each, `WORDS` words of each, `TAIL` bytes of each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Lanes<const HEAD: usize, const WORDS: usize, const TAIL: usize> {
    /// The heads, row by row.
    pub head: [[u8; HEAD]; ROWS],
    /// `words[w][4 * row..]`: word `w` of each row.
    pub words: [[u8; 4 * ROWS]; WORDS],
    /// The tails, row by row.
    pub tail: [[u8; TAIL]; ROWS],
}

// SAFETY: `repr(C)` of byte arrays: alignment 1, no padding, no invalid pattern.
unsafe impl<const HEAD: usize, const WORDS: usize, const TAIL: usize> Bytes for Lanes<HEAD, WORDS, TAIL> {}

/// The operations of all [`Lanes`] that kernels use.
pub trait Interleave: Bytes {
    /// Interleaves as many blocks of each row as `out` takes. Rows start `stride` bytes apart; bytes
    /// that are missing are zeros.
    fn interleave<I: Isa>(isa: I, rows: &[u8], stride: usize, out: &mut [Self]);

    /// Bytes of the head and number of words, if [`ShortBlocks::new`] can read the blocks.
    const SHORT: Option<(usize, usize)>;

    /// The block of one row.
    fn row<B: Bytes>(&self, row: usize, out: &mut B);

    /// Word `w` of every row.
    fn word_bytes(&self, w: usize) -> &[u8; 4 * ROWS];
    /// Two bytes of each head, as numbers.
    fn head_u16(&self) -> [u16; ROWS];
    /// The first byte of each head.
    fn head_u8(&self) -> [u8; ROWS];
    /// Two bytes of each tail, as numbers.
    fn tail_u16(&self) -> [u16; ROWS];
}

impl<const HEAD: usize, const WORDS: usize, const TAIL: usize> Interleave for Lanes<HEAD, WORDS, TAIL> {
    const SHORT: Option<(usize, usize)> =
        if HEAD <= 2 && WORDS <= SHORT_WORDS && TAIL == 0 { Some((HEAD, WORDS)) } else { None };

    #[inline(always)]
    fn interleave<I: Isa>(isa: I, rows: &[u8], stride: usize, out: &mut [Self]) {
        const { assert!(WORDS >= 4) };
        let bytes = HEAD + 4 * WORDS + TAIL;
        for (i, out) in out.iter_mut().enumerate() {
            let rows = rows.get(i * bytes..).unwrap_or(&[]);
            for quad in 0..WORDS.div_ceil(4) {
                // The last four words may overlap the four before them.
                let first = (4 * quad).min(WORDS - 4);
                let words = isa.transpose(rows.get(HEAD + 4 * first..).unwrap_or(&[]), stride);
                for i in 0..4 {
                    isa.store_words(words[i], &mut out.words[first + i]);
                }
            }
            for row in 0..ROWS {
                if HEAD > 0 {
                    out.head[row] =
                        *rows.get(row * stride..).and_then(|b| b.first_chunk()).unwrap_or(&[0; HEAD]);
                }
                if TAIL > 0 {
                    let tail = rows.get(row * stride + HEAD + 4 * WORDS..).and_then(|b| b.first_chunk());
                    out.tail[row] = *tail.unwrap_or(&[0; TAIL]);
                }
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

    #[inline(always)]
    fn word_bytes(&self, w: usize) -> &[u8; 4 * ROWS] {
        &self.words[w]
    }
    #[inline(always)]
    fn head_u16(&self) -> [u16; ROWS] {
        u16s(&self.head)
    }
    #[inline(always)]
    fn head_u8(&self) -> [u8; ROWS] {
        self.head.map(|head| head.first().copied().unwrap_or(0))
    }
    #[inline(always)]
    fn tail_u16(&self) -> [u16; ROWS] {
        u16s(&self.tail)
    }
}

/// Access to the words of one block of each of sixteen rows, wherever they are. Formats read blocks through
/// it.
pub trait Words<I: Isa> {
    /// Word `w` of every row.
    fn word(&self, isa: I, w: usize) -> I::I;
    /// The half-precision float in the head.
    fn head_f16(&self, isa: I) -> I::F;
    /// The byte in the head, as a number.
    fn head_u8(&self, isa: I) -> I::I;
    /// The half-precision float in the tail.
    fn tail_f16(&self, isa: I) -> I::F;

    /// Word `words[k]` of every row.
    #[inline(always)]
    fn pick(&self, isa: I, k: usize, words: [usize; 8]) -> I::I {
        self.word(isa, words[k])
    }

    /// All lanes `numbers[k]`, to go with [`Words::pick`].
    #[inline(always)]
    fn numbers(&self, isa: I, k: usize, numbers: [i32; 8]) -> I::I {
        isa.splat_i(numbers[k])
    }

    /// Nibbles of word `w`: the low ones if `high` is 0, the high ones if it is 1.
    #[inline(always)]
    fn nibbles(&self, isa: I, w: usize, high: usize) -> I::I {
        field(isa, self.word(isa, w), 4 * high, 0, 15)
    }

    /// Nibbles of 16 bytes from word `w` on, where the low ones come first: of these 32, numbers `4 k` to
    /// `4 k + 3`.
    #[inline(always)]
    fn split_nibbles(&self, isa: I, w: usize, k: usize) -> I::I {
        self.nibbles(isa, w + k % 4, k / 4)
    }
}

impl<I: Isa, L: Interleave> Words<I> for L {
    #[inline(always)]
    fn word(&self, isa: I, w: usize) -> I::I {
        isa.load_words(self.word_bytes(w))
    }
    #[inline(always)]
    fn head_f16(&self, isa: I) -> I::F {
        isa.load_f16(&self.head_u16())
    }
    #[inline(always)]
    fn head_u8(&self, isa: I) -> I::I {
        let heads = Interleave::head_u8(self);
        let mut lanes = [0; ROWS];
        for row in 0..ROWS {
            lanes[row] = heads[row].into();
        }
        isa.load_i(&lanes)
    }
    #[inline(always)]
    fn tail_f16(&self, isa: I) -> I::F {
        isa.load_f16(&self.tail_u16())
    }
}

/// Two bytes of each row as a number; zeros if there are not two.
#[inline(always)]
fn u16s<const N: usize>(bytes: &[[u8; N]; ROWS]) -> [u16; ROWS] {
    bytes.map(|bytes| bytes.first_chunk().map_or(0, |&two| u16::from_le_bytes(two)))
}

/// Maximum words of a short block: those of NVFP4.
const SHORT_WORDS: usize = 9;

/// One short block of each of sixteen plain rows, transposed in registers.
#[derive(Debug, Clone, Copy)]
pub struct ShortBlocks<I: Isa> {
    words: [I::I; SHORT_WORDS],
    /// The first word of the block, which contains the head.
    head: I::I,
}

impl<I: Isa> ShortBlocks<I> {
    /// Reads the first blocks of rows that start `stride` bytes apart. A block has a head of `head` bytes and
    /// `words` words. Missing blocks read as zeros. Meanwhile calls `prefetch` with 0, 1, 2 and 3.
    #[inline(always)]
    pub fn new(
        isa: I,
        rows: &[u8],
        stride: usize,
        head: usize,
        words: usize,
        prefetch: impl Fn(usize),
    ) -> Self {
        let mut blocks = ShortBlocks { words: [isa.splat_i(0); SHORT_WORDS], head: isa.splat_i(0) };
        prefetch(0);
        if head > 0 {
            blocks.head = isa.transpose(rows, stride)[0];
        }
        prefetch(1);
        let rows = rows.get(head..).unwrap_or(&[]);
        blocks.read_four(isa, rows, stride, 0);
        prefetch(2);
        if words > 8 {
            blocks.read_four(isa, rows, stride, 4);
        }
        if words > 4 {
            // These may overlap the four before them.
            blocks.read_four(isa, rows, stride, words - 4);
        }
        prefetch(3);
        blocks
    }
}

impl<I: Isa> ShortBlocks<I> {
    /// Reads four words of each row from number `first` on.
    #[inline(always)]
    fn read_four(&mut self, isa: I, rows: &[u8], stride: usize, first: usize) {
        let four = isa.transpose(rows.get(4 * first..).unwrap_or(&[]), stride);
        for i in 0..4 {
            self.words[first + i] = four[i];
        }
    }
}

impl<I: Isa> Words<I> for ShortBlocks<I> {
    #[inline(always)]
    fn word(&self, _: I, w: usize) -> I::I {
        self.words[w]
    }
    #[inline(always)]
    fn head_f16(&self, isa: I) -> I::F {
        isa.low_f16(self.head)
    }
    #[inline(always)]
    fn head_u8(&self, isa: I) -> I::I {
        isa.and_i(self.head, isa.splat_i(0xff))
    }
    /// No format with a tail is read this way.
    fn tail_f16(&self, isa: I) -> I::F {
        isa.splat(0.0)
    }
}

/// Shifts each byte so that bit `from` becomes bit `to`, and keeps the bits of `mask`.
#[inline(always)]
pub(super) fn field<I: Isa>(isa: I, word: I::I, from: usize, to: usize, mask: u8) -> I::I {
    let moved = if from < to {
        isa.shl_by(word, (to - from) as u32)
    } else if from > to {
        isa.shr_by(word, (from - to) as u32)
    } else {
        word
    };
    isa.and_i(moved, isa.splat_i(i32::from_le_bytes([mask; 4])))
}

/// In each byte, bit 4 is bit `4 k + byte` of the word.
#[inline(always)]
pub(super) fn spread_bits<I: Isa>(isa: I, word: I::I, k: usize) -> I::I {
    let four = isa.and_i(isa.shr_by(word, 4 * k as u32), isa.splat_i(15));
    // Each bit is moved to its byte: shifts by 0, 7, 14 and 21.
    let spread = isa.mul_i(four, isa.splat_i(0x0020_4081));
    isa.shl_by(isa.and_i(spread, isa.splat_i(0x0101_0101)), 4)
}

/// The scales (first two words) and minimums of Q4_K and Q5_K, one a byte; see
/// [`super::bits::six_bit_pairs`].
#[inline(always)]
pub(super) fn six_bit_words<I: Isa>(isa: I, scales: [I::I; 3]) -> [[I::I; 2]; 2] {
    let six = isa.splat_i(0x3f3f_3f3f);
    let (nibble, top) = (isa.splat_i(0x0f0f_0f0f), isa.splat_i(0x3030_3030));
    let [scale, min, low] = scales;
    let (scale_top, min_top) = (isa.and_i(isa.shr_by(scale, 2), top), isa.and_i(isa.shr_by(min, 2), top));
    [
        [isa.and_i(scale, six), isa.or_i(isa.and_i(low, nibble), scale_top)],
        [isa.and_i(min, six), isa.or_i(isa.and_i(isa.shr_by(low, 4), nibble), min_top)],
    ]
}

/// Subtracts 32 from each byte, which is below 64; the result is signed.
#[inline(always)]
pub(super) fn less_32<I: Isa>(isa: I, x: I::I) -> I::I {
    // Bit 5 inverted becomes bits 5 to 7.
    let sign = isa.splat_i(0x2020_2020);
    let below = isa.sub_i(sign, isa.and_i(x, sign));
    let low = isa.and_i(x, isa.splat_i(0x1f1f_1f1f));
    isa.or_i(isa.or_i(low, below), isa.or_i(isa.shl_by(below, 1), isa.shl_by(below, 2)))
}

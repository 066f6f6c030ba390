//! Formats whose codes are looked up in a grid, several at a time: magnitudes with signs beside them, or values
//! that are shifted up or down.

use super::bits::even_signs;
use super::grids::Quads;
use super::{F16, Plain, Quantised, Unpacked};
use crate::isa::{Isa, Scalar};

/// A format of 256 values whose codes are points of a grid with signs or shifts.
pub trait Gridded: Quantised {
    /// `None` if a set bit of [`Split::signs`] says that the code is the negative magnitude. Otherwise it says
    /// that the code is shifted down by 1, a clear bit that it is shifted up; magnitudes are then too large by
    /// this number less 1, and code bytes in kernels by this number.
    const RAISED: Option<u8> = None;

    /// The scale in the file times this, which is exact, is the scale of codes times sub-scales.
    const FACTOR: f32;

    /// The scale in the file.
    fn scale(&self) -> F16;

    /// Reads indices, signs and sub-scales.
    fn split(&self, out: &mut Split);

    /// Looks up the magnitudes of indices. (Not in `split`: indices are best computed as vectors and read
    /// back as numbers, after a while.)
    fn look_up<I: Isa>(isa: I, split: &mut Split);
}

/// The parts of a block.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// Integer sub-scales, one for each 16 values.
    pub subs: [i16; 16],
    /// Indices into the grid: one for each 8 values (the first 32), or one for each 4.
    pub indices: [u16; 64],
    /// Magnitudes of codes.
    pub magnitudes: [[u8; 8]; 32],
    /// For each 32 values, one bit each, the first lowest: set where the value is negative or shifted down.
    pub signs: [u32; 8],
}

impl Split {
    /// All zero.
    pub const ZERO: Split =
        Split { indices: [0; 64], magnitudes: [[0; 8]; 32], signs: [0; 8], subs: [0; 16] };

    /// The bytes of several, which start with sub-scales.
    #[inline(always)]
    pub(crate) fn all_bytes(all: &[Split]) -> &[u8] {
        const { assert!(size_of::<Split>() == 32 + 128 + 256 + 32 && core::mem::offset_of!(Split, subs) == 0) };
        // SAFETY: the size is the sum of the fields' sizes, so there is no padding.
        unsafe { core::slice::from_raw_parts(all.as_ptr().cast(), size_of_val(all)) }
    }

    /// The magnitudes of 32 values.
    #[inline(always)]
    pub(crate) fn part(&self, part: usize) -> &[u8; 32] {
        self.magnitudes.as_flattened().as_chunks().0.get(part).unwrap_or(&[0; 32])
    }

    /// The code bytes of two parts of `Q`, with these magnitudes and signs, as [`Gridded::RAISED`] has it: of two
    /// rows, or of one.
    #[inline(always)]
    pub(crate) fn code_bytes<I: Isa, Q: Gridded>(isa: I, magnitudes: I::I, signs: [u32; 2]) -> I::I {
        if Q::RAISED.is_none() {
            return isa.negate(magnitudes, signs);
        }
        // Up or down by 1 is 2 or nothing, with the excess.
        let twos = isa.splat_i(0x0202_0202);
        isa.add_i(magnitudes, isa.sub_i(twos, isa.and_i(isa.byte_masks(signs), twos)))
    }

    /// The codes.
    #[inline(always)]
    pub(crate) fn codes<I: Isa, Q: Gridded>(&self, isa: I, out: &mut Unpacked) {
        let out = out.octets().as_flattened_mut();
        let parts = self.magnitudes.as_flattened().as_chunks::<64>().0.iter().zip(self.signs.as_chunks().0);
        for (out, (magnitudes, &signs)) in out.as_chunks_mut().0.iter_mut().zip(parts) {
            let mut codes = Self::code_bytes::<I, Q>(isa, isa.load_words(magnitudes), signs);
            if let Some(raised) = Q::RAISED {
                // The top bits are flipped, so that nothing is borrowed from the next byte.
                let top = isa.splat_i(i32::from_le_bytes([0x80; 4]));
                codes = isa.add_i(codes, isa.splat_i(i32::from_le_bytes([0x80 - raised; 4])));
                codes = isa.sub_i(isa.or_i(codes, top), isa.and_i(codes, top));
            }
            isa.store_words(codes, out);
        }
    }

    /// Reads sub-scales `2 s + 1` of 16 values each: `s` is a nibble, the low one of each byte first.
    #[inline(always)]
    pub(super) fn read_subs(&mut self, nibbles: &[u8; 8]) {
        for i in 0..8 {
            self.subs[2 * i] = 2 * i16::from(nibbles[i] & 15) + 1;
            self.subs[2 * i + 1] = 2 * i16::from(nibbles[i] >> 4) + 1;
        }
    }

    /// Reads signs of one bit each.
    #[inline(always)]
    pub(super) fn read_signs(&mut self, bits: &[u8; 32]) {
        for (signs, bytes) in self.signs.iter_mut().zip(bits.as_chunks().0) {
            *signs = u32::from_le_bytes(*bytes);
        }
    }

    /// Reads words of 32 values: four sign codes of 7 bits, the first lowest, and above them the nibble `s` of
    /// the sub-scale `2 s + 1`. (Signs and sub-scales have a loop each: compilers vectorise these.)
    #[inline(always)]
    pub(super) fn read_coded_signs(&mut self, words: [u32; 8]) {
        self.signs = words.map(even_signs);
        for g in 0..8 {
            self.subs[2 * g] = 2 * (words[g] >> 28) as i16 + 1;
            self.subs[2 * g + 1] = self.subs[2 * g];
        }
    }

    /// Sets the first `N` indices: their low bytes, and their high bytes, four to a word.
    #[inline(always)]
    pub(super) fn read_indices<const N: usize, const M: usize>(&mut self, low: &[u8; N], high: [u32; M]) {
        const { assert!(N == 4 * M) };
        // (All are computed before one is stored: compilers vectorise this.)
        let mut indices = [0; N];
        let high = high.map(u32::to_le_bytes);
        for (i, &high) in high.as_flattened().iter().enumerate() {
            indices[i] = u16::from_le_bytes([low[i], high]);
        }
        self.indices[..N].copy_from_slice(&indices);
    }

    /// Looks up points of eight magnitudes.
    #[inline(always)]
    pub(super) fn look_up_octets<const N: usize>(&mut self, grid: &[u64; N]) {
        look_up_octets(grid, &self.indices, &mut self.magnitudes);
    }

    /// Looks up points of four magnitudes.
    #[inline(always)]
    pub(super) fn look_up_quads<I: Isa, const N: usize>(&mut self, isa: I, grid: &Quads<N>) {
        let out = self.magnitudes.as_flattened_mut().as_chunks_mut().0;
        let Some(out) = out.first_chunk_mut() else { return };
        isa.look_up_quads(&grid.points, &grid.planes, &self.indices, out);
    }
}

/// (Not inlined: with vector instructions, compilers put points together in vectors, which takes longer. Indices
/// are taken from words of four, lest compilers compute them in vectors and extract each.)
#[inline(never)]
fn look_up_octets<const N: usize>(grid: &[u64; N], indices: &[u16; 64], out: &mut [[u8; 8]; 32]) {
    for (out, four) in out.as_chunks_mut::<4>().0.iter_mut().zip(indices.as_chunks::<4>().0) {
        let [a, b, c, d] = four.map(u64::from);
        let four = a | (b << 16) | (c << 32) | (d << 48);
        for i in 0..4 {
            out[i] = grid[(four >> (16 * i)) as usize % N].to_le_bytes();
        }
    }
}

/// [`Quantised::unpack`] of these formats.
#[inline(always)]
pub(super) fn unpack<Q: Gridded>(block: &Q, out: &mut Unpacked) {
    let mut split = Split::ZERO;
    block.split(&mut split);
    Q::look_up(Scalar, &mut split);
    out.d[0] = block.scale().value() * Q::FACTOR;
    out.sub = split.subs;
    split.codes::<Scalar, Q>(Scalar, out);
}

//! Formats whose magnitudes are looked up in a grid, several at a time, with signs beside them.

use super::bits::{even_signs, mask, negate};
use super::{F16, Plain, Quantised, Unpacked};

/// A format of 256 values whose codes are points of a grid with signs.
pub trait Gridded: Quantised {
    /// The scale in the file times this, which is exact, is the scale of codes times sub-scales.
    const FACTOR: f32;

    /// The scale in the file.
    fn scale(&self) -> F16;

    /// Reads indices, signs and sub-scales.
    fn split(&self, out: &mut Split);

    /// Looks up the magnitudes of indices. (Not in `split`: indices are best computed as vectors and read
    /// back as numbers, after a while.)
    fn look_up(split: &mut Split);
}

/// The parts of a block.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// Indices into the grid: one for each 8 values (the first 32), or one for each 4.
    pub indices: [u16; 64],
    /// Magnitudes of codes.
    pub magnitudes: [[u8; 8]; 32],
    /// For each 32 values, one bit each, the first lowest: set where the value is negative.
    pub signs: [u32; 8],
    /// Integer sub-scales, one for each 16 values.
    pub subs: [i16; 16],
}

impl Split {
    /// All zero.
    pub const ZERO: Split =
        Split { indices: [0; 64], magnitudes: [[0; 8]; 32], signs: [0; 8], subs: [0; 16] };

    /// The magnitudes of 32 values.
    #[inline(always)]
    pub(crate) fn part(&self, part: usize) -> &[u8; 32] {
        self.magnitudes.as_flattened().as_chunks().0.get(part).unwrap_or(&[0; 32])
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

    /// Looks up points of eight magnitudes.
    #[inline(always)]
    pub(super) fn look_up_octets<const N: usize>(&mut self, grid: &[u64; N]) {
        for i in 0..32 {
            self.magnitudes[i] = grid[usize::from(self.indices[i]) % N].to_le_bytes();
        }
    }

    /// Looks up points of four magnitudes. (With vector instructions, compilers put the points together in
    /// vectors, which takes longer.)
    #[inline(never)]
    pub(super) fn look_up_quads<const N: usize>(&mut self, grid: &[u32; N]) {
        for i in 0..32 {
            let (low, high) = (usize::from(self.indices[2 * i]), usize::from(self.indices[2 * i + 1]));
            let octet = u64::from(grid[low % N]) | (u64::from(grid[high % N]) << 32);
            self.magnitudes[i] = octet.to_le_bytes();
        }
    }
}

/// [`Quantised::unpack`] of these formats.
#[inline(always)]
pub(super) fn unpack<Q: Gridded>(block: &Q, out: &mut Unpacked) {
    let mut split = Split::ZERO;
    block.split(&mut split);
    Q::look_up(&mut split);
    out.d[0] = block.scale().value() * Q::FACTOR;
    out.sub = split.subs;
    let octets = out.octets();
    for (i, octet) in octets.iter_mut().enumerate() {
        let signs = split.signs[i / 4].to_le_bytes()[i % 4];
        *octet = negate(u64::from_le_bytes(split.magnitudes[i]), mask(signs)).to_le_bytes();
    }
}

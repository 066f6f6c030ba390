//! Formats whose magnitudes are looked up in a grid, several at a time, with signs beside them.

use super::bits::{mask, negate};
use super::{F16, Plain, Quantised, Unpacked};

/// A format of 256 values whose codes are points of a grid with signs.
pub trait Gridded: Quantised {
    /// The scale in the file times this, which is exact, is the scale of codes times sub-scales.
    const FACTOR: f32;

    /// The scale in the file.
    fn scale(&self) -> F16;

    /// Reads all but the scale.
    fn split(&self, out: &mut Split);

    /// Eight magnitudes, one a byte: values `8 i` to `8 i + 7`.
    fn octet(split: &Split, i: usize) -> u64;
}

/// The parts of a block.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// Indices into the grid: one for each 8 values (the first 32), or one for each 4.
    pub indices: [u16; 64],
    /// For each 32 values, one bit each, the first lowest: set where the value is negative.
    pub signs: [u32; 8],
    /// Integer sub-scales, one for each 16 values.
    pub subs: [i16; 16],
}

impl Split {
    /// All zero.
    pub const ZERO: Split = Split { indices: [0; 64], signs: [0; 8], subs: [0; 16] };
}

/// [`Quantised::unpack`] of these formats.
#[inline(always)]
pub(super) fn unpack<Q: Gridded>(block: &Q, out: &mut Unpacked) {
    let mut split = Split::ZERO;
    block.split(&mut split);
    out.d[0] = block.scale().value() * Q::FACTOR;
    out.sub = split.subs;
    let octets = out.octets();
    for (i, octet) in octets.iter_mut().enumerate() {
        let signs = split.signs[i / 4].to_le_bytes()[i % 4];
        *octet = negate(Q::octet(&split, i), mask(signs)).to_le_bytes();
    }
}

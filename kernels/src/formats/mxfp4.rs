//! MXFP4: `value = 2^(e - 127) * E2M1(q)`, 4-bit q. Byte j holds q of values j (low nibble) and j + 16.
//!
//! Source of the elements: OCP Microscaling Formats (MX) 1.0. Codes are the elements doubled, which makes
//! them integers; the scale is halved.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, Format, Groups, Interleaved, Quantised, Raised, Unpacked};
use crate::isa::Isa;

/// Twice the value of each E2M1 code.
pub static E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// [`E2M1_DOUBLED`] plus 12.
pub(super) static E2M1_RAISED: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// The entry of [`E2M1_DOUBLED`] for a code of 0 to 15, in arithmetic that vectorises as no look-up does.
#[inline(always)]
pub(super) const fn e2m1_doubled(code: u8) -> i8 {
    let m = code & 7;
    // The steps are 1, from 4 on 2, and from 6 on 4.
    let magnitude = m + m.saturating_sub(4) + 2 * m.saturating_sub(6);
    if code & 8 != 0 { -(magnitude as i8) } else { magnitude as i8 }
}

/// The first of the codes that come nearest to a value under half a scale.
#[cfg(feature = "quantize")]
pub(super) fn nearest_e2m1(half: f32, x: f32) -> u8 {
    let errors = E2M1_DOUBLED.map(|value| (f32::from(value) * half - x).abs());
    (1..16).fold(0, |best: u8, i| if errors[usize::from(i)] < errors[usize::from(best)] { i } else { best })
}

layout! {
    /// A power of two, 2^(e - 127); 255 stands for NaN.
    pub struct E8M0 {
        /// The exponent e.
        e: u8,
    }
}

impl E8M0 {
    /// Half the value. That of the code for NaN is 2^127, as in the published decoders.
    #[inline(always)]
    pub const fn half(self) -> f32 {
        // 2^-128 and 2^-127 are denormal.
        f32::from_bits(if self.e < 2 { 0x0020_0000 << self.e } else { (self.e as u32 - 1) << 23 })
    }
}

/// [`E8M0::half`] of each lane's exponent.
#[inline(always)]
fn half<I: Isa>(isa: I, e: I::I) -> I::F {
    // An f32's exponent has the same bias, but 0 and 255 mean something else there.
    let power = isa.mul(isa.with_bits(isa.shl_i::<23>(e)), isa.splat(0.5));
    let number = isa.to_f32(e);
    let power =
        isa.select_gt(isa.splat(1.0), number, isa.splat(const { f32::from_bits(0x0020_0000) }), power);
    isa.select_gt(number, isa.splat(254.0), isa.splat(const { f32::from_bits(254 << 23) }), power)
}

layout! {
    /// 32 values in 17 bytes.
    pub struct MXFP4 {
        /// Scale.
        e: E8M0,
        /// E2M1 codes.
        qs: [u8; 16],
    }
}

impl Block for MXFP4 {
    const FORMAT: Format = Format::MXFP4;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.e.e != 0xff
    }

    fn set_scale(&mut self, scale: f32) {
        // The exponent field of an f32 has the same bias.
        self.e.e = (scale.to_bits() >> 23) as u8;
    }

    /// The exponent is that of the largest magnitude, less the 2 of the largest element; 255, which stands
    /// for NaN, if that is not finite. Of two elements as near, the first. (GGML takes the exponent from a
    /// logarithm in f32, which may round up just below a power of two that is far from 1.)
    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let exponent = (largest.to_bits() >> 23) as u8;
        let e = E8M0 { e: if exponent == 255 { 255 } else { exponent.saturating_sub(2) } };
        let code = |x: f32| nearest_e2m1(e.half(), x);
        Some(MXFP4 { e, qs: core::array::from_fn(|j| code(values[j]) | code(values[j + 16]) << 4) })
    }
}

impl Quantised for MXFP4 {
    type Shape = Groups<32, Raised<12>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.e.half();
        out.sub[..2].fill(1);
        for j in 0..16 {
            out.codes[j] = e2m1_doubled(self.qs[j] & 15);
            out.codes[j + 16] = e2m1_doubled(self.qs[j] >> 4);
        }
    }
}

impl Interleaved for MXFP4 {
    type Lanes = Lanes<1, 4, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        isa.lookup(&E2M1_RAISED, lanes.split_nibbles(isa, 0, k))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        half(isa, lanes.head_u8(isa))
    }
}

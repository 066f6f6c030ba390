//! Q4_K: `value = d * s * q - dmin * m`, 4-bit q, a 6-bit s and m for each 32 values.
//!
//! In each quarter of 64 values, byte l holds q of values l (low nibble) and 32 + l.

use super::bits::six_bit_pairs;
use super::bytes::layout;
use super::lanes::{Lanes, Words, six_bit_words};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, SuperBlock, Unpacked, WithMin};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 256 values in 144 bytes.
    pub struct Q4_K {
        /// Scale of the sub-scales.
        d: F16,
        /// Scale of the minimums, which are subtracted.
        dmin: F16,
        /// Eight sub-scales and eight minimums of 6 bits.
        scales: [u8; 12],
        /// Codes, 4 bits each, in four quarters.
        qs: [[u8; 32]; 4],
    }
}

impl Block for Q4_K {
    const FORMAT: Format = Format::Q4_K;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite() && self.dmin.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
        self.dmin = self.d;
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        Self::quantize_weights(values, None)
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let values: &[f32; 256] = values.try_into().ok()?;
        let fit = search::with_mins(values, importance, 32, 15, 63);
        let scales = search::pack_six_bit_pairs(&fit.subs, &fit.mins);
        Some(Q4_K { d: fit.d, dmin: fit.dmin, scales, qs: search::pack_nibbles(&fit.codes) })
    }
}

impl Quantised for Q4_K {
    type Shape = SuperBlock<32, WithMin>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.m[0] = -self.dmin.value();
        unpack_scales(&self.scales, out);
        for quarter in 0..4 {
            for l in 0..32 {
                out.codes[64 * quarter + l] = (self.qs[quarter][l] & 15) as i8;
                out.codes[64 * quarter + 32 + l] = (self.qs[quarter][l] >> 4) as i8;
            }
        }
    }
}

impl Interleaved for Q4_K {
    type Lanes = Lanes<0, 36, 0>;
    const HEADER: [usize; 2] = [0; 2];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        lanes.nibbles(isa, 4 + 8 * (part / 2) + k, part % 2)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        isa.low_f16(lanes.word(isa, 0))
    }

    #[inline(always)]
    fn m<I: Isa>(isa: I, lanes: &impl Words<I>) -> I::F {
        isa.mul(isa.low_f16(isa.shr_by(lanes.word(isa, 0), 16)), isa.splat(-1.0))
    }

    #[inline(always)]
    fn subs<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        let words = [lanes.word(isa, 1), lanes.word(isa, 2), lanes.word(isa, 3)];
        let [low, high] = six_bit_words(isa, words)[0];
        [low, high, isa.splat_i(0), isa.splat_i(0)]
    }

    #[inline(always)]
    fn mins<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        let words = [lanes.word(isa, 1), lanes.word(isa, 2), lanes.word(isa, 3)];
        let [low, high] = six_bit_words(isa, words)[1];
        [low, high, isa.splat_i(0), isa.splat_i(0)]
    }
}

/// Writes the sub-scales and minimums of a Q4_K or Q5_K block.
#[inline(always)]
pub(super) fn unpack_scales(scales: &[u8; 12], out: &mut Unpacked) {
    let (scales, mins) = six_bit_pairs(scales);
    for i in 0..16 {
        out.sub[i] = i16::from(scales[i / 2]);
        out.mins[i] = i16::from(mins[i / 2]);
    }
}

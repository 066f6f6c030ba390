//! Q2_K: `value = d * s * q - dmin * m`, 2-bit q, a 4-bit s and m for each 16 values.
//!
//! In each half of 128 values, bits 2k and 2k + 1 of byte l hold q of value 32k + l.

use super::bytes::layout;
use super::lanes::{Lanes, Words, field};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, SuperBlock, Unpacked, WithMin};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 256 values in 84 bytes.
    pub struct Q2_K {
        /// For each 16 values, the sub-scale (low nibble) and the factor of the minimum.
        scales: [u8; 16],
        /// Codes, 2 bits each, in two halves.
        qs: [[u8; 32]; 2],
        /// Scale of the sub-scales.
        d: F16,
        /// Scale of the minimums, which are subtracted.
        dmin: F16,
    }
}

impl Block for Q2_K {
    const FORMAT: Format = Format::Q2_K;
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
        let fit = search::with_mins(values, importance, 16, 3, 15);
        let scales = core::array::from_fn(|i| fit.subs[i] | fit.mins[i] << 4);
        Some(Q2_K { scales, qs: search::pack_two_bits(&fit.codes), d: fit.d, dmin: fit.dmin })
    }
}

impl Quantised for Q2_K {
    type Shape = SuperBlock<16, WithMin>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.m[0] = -self.dmin.value();
        for i in 0..16 {
            out.sub[i] = i16::from(self.scales[i] & 15);
            out.mins[i] = i16::from(self.scales[i] >> 4);
        }
        for half in 0..2 {
            for k in 0..4 {
                for l in 0..32 {
                    out.codes[128 * half + 32 * k + l] = ((self.qs[half][l] >> (2 * k)) & 3) as i8;
                }
            }
        }
    }
}

impl Interleaved for Q2_K {
    type Lanes = Lanes<0, 21, 0>;
    const HEADER: [usize; 2] = [0, 17];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        field(isa, lanes.word(isa, 4 + 8 * (part / 4) + k), 2 * (part % 4), 0, 3)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        isa.low_f16(lanes.word(isa, 20))
    }

    #[inline(always)]
    fn m<I: Isa>(isa: I, lanes: &impl Words<I>) -> I::F {
        isa.mul(isa.low_f16(isa.shr_by(lanes.word(isa, 20), 16)), isa.splat(-1.0))
    }

    #[inline(always)]
    fn subs<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        [
            lanes.nibbles(isa, 0, 0),
            lanes.nibbles(isa, 1, 0),
            lanes.nibbles(isa, 2, 0),
            lanes.nibbles(isa, 3, 0),
        ]
    }

    #[inline(always)]
    fn mins<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        [
            lanes.nibbles(isa, 0, 1),
            lanes.nibbles(isa, 1, 1),
            lanes.nibbles(isa, 2, 1),
            lanes.nibbles(isa, 3, 1),
        ]
    }
}

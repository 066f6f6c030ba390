//! Q5_K: `value = d * s * q - dmin * m`, 5-bit q, a 6-bit s and m for each 32 values.
//!
//! The low nibbles of q and the scales lie as in Q4_K; the top bit of value 32k + l is bit k of `qh[l]`.

use super::bytes::layout;
use super::lanes::{Lanes, Words, field, six_bit_words};
use super::q4_k::unpack_scales;
use super::{Block, F16, Format, Interleaved, Plain, Quantised, SuperBlock, Unpacked, WithMin};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 256 values in 176 bytes.
    pub struct Q5_K {
        /// Scale of the sub-scales.
        d: F16,
        /// Scale of the minimums, which are subtracted.
        dmin: F16,
        /// Eight sub-scales and eight minimums of 6 bits.
        scales: [u8; 12],
        /// Top bits of codes.
        qh: [u8; 32],
        /// Low nibbles of codes, in four quarters.
        qs: [[u8; 32]; 4],
    }
}

impl Block for Q5_K {
    const FORMAT: Format = Format::Q5_K;
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
        let fit = search::with_mins(values, importance, 32, 31, 63);
        let scales = search::pack_six_bit_pairs(&fit.subs, &fit.mins);
        let top = |l: usize| (0..8).fold(0, |byte, k| byte | (fit.codes[32 * k + l] >> 4) << k);
        let (qh, qs) = (core::array::from_fn(top), search::pack_nibbles(&fit.codes));
        Some(Q5_K { d: fit.d, dmin: fit.dmin, scales, qh, qs })
    }
}

impl Quantised for Q5_K {
    type Shape = SuperBlock<32, WithMin>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.m[0] = -self.dmin.value();
        unpack_scales(&self.scales, out);
        for quarter in 0..4 {
            for l in 0..32 {
                let (low, high) = (self.qs[quarter][l], self.qh[l] >> (2 * quarter));
                out.codes[64 * quarter + l] = ((low & 15) | ((high & 1) << 4)) as i8;
                out.codes[64 * quarter + 32 + l] = ((low >> 4) | ((high & 2) << 3)) as i8;
            }
        }
    }
}

impl Interleaved for Q5_K {
    type Lanes = Lanes<0, 44, 0>;
    const HEADER: [usize; 2] = [0; 2];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let top = field(isa, lanes.word(isa, 4 + k), part, 4, 0x10);
        isa.or_i(lanes.nibbles(isa, 12 + 8 * (part / 2) + k, part % 2), top)
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

//! Q4_1: `value = d * q + m`, 4-bit q. Byte j holds q of values j (low nibble) and j + 16.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Unpacked, WithMin};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 32 values in 20 bytes.
    pub struct Q4_1 {
        /// Scale.
        d: F16,
        /// Minimum, added to every value.
        m: F16,
        /// Codes, 4 bits each.
        qs: [u8; 16],
    }
}

impl Block for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite() && self.m.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
        self.m = self.d;
    }

    /// Codes divide the range of the values evenly; ties of rounding go up.
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let (min, max) = super::range(values);
        let d = (max - min) / 15.0;
        let inverse = super::inverse(d);
        let q = |x: f32| (((x - min) * inverse + 0.5) as u8).min(15);
        let qs = core::array::from_fn(|j| q(values[j]) | (q(values[j + 16]) << 4));
        Some(Q4_1 { d: F16::from_f32(d), m: F16::from_f32(min), qs })
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let Some(importance) = importance else { return Self::quantize(values) };
        let (d, m, q) = search::short_with_min(values.try_into().ok()?, importance, 15);
        Some(Q4_1 { d, m, qs: core::array::from_fn(|j| q[j] | (q[j + 16] << 4)) })
    }
}

impl Quantised for Q4_1 {
    type Shape = Groups<32, WithMin>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.m[0] = self.m.value();
        out.sub[..2].fill(1);
        out.mins[..2].fill(1);
        for j in 0..16 {
            out.codes[j] = (self.qs[j] & 15) as i8;
            out.codes[j + 16] = (self.qs[j] >> 4) as i8;
        }
    }
}

impl Interleaved for Q4_1 {
    type Lanes = Lanes<0, 5, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        lanes.split_nibbles(isa, 1, k)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        isa.low_f16(lanes.word(isa, 0))
    }

    #[inline(always)]
    fn m<I: Isa>(isa: I, lanes: &impl Words<I>) -> I::F {
        isa.low_f16(isa.shr_by(lanes.word(isa, 0), 16))
    }
}

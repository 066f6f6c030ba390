//! Q5_1: `value = d * q + m`, 5-bit q. Codes lie as in Q5_0.

use super::bytes::layout;
use super::lanes::{Lanes, Words, spread_bits};
use super::q5_0::{pack, unpack_codes};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Unpacked, WithMin};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 32 values in 24 bytes.
    pub struct Q5_1 {
        /// Scale.
        d: F16,
        /// Minimum, added to every value.
        m: F16,
        /// Top bits of codes.
        qh: [u8; 4],
        /// Low nibbles of codes.
        qs: [u8; 16],
    }
}

impl Block for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
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
        let d = (max - min) / 31.0;
        let inverse = super::inverse(d);
        let (qh, qs) = pack(values.map(|x| (((x - min) * inverse + 0.5) as u8).min(31)));
        Some(Q5_1 { d: F16::from_f32(d), m: F16::from_f32(min), qh, qs })
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let Some(importance) = importance else { return Self::quantize(values) };
        let (d, m, q) = search::short_with_min(values.try_into().ok()?, importance, 31);
        let (qh, qs) = pack(q);
        Some(Q5_1 { d, m, qh, qs })
    }
}

impl Quantised for Q5_1 {
    type Shape = Groups<32, WithMin>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.m[0] = self.m.value();
        out.sub[..2].fill(1);
        out.mins[..2].fill(1);
        unpack_codes(&self.qh, &self.qs, out);
        for code in &mut out.codes[..32] {
            *code += 16;
        }
    }
}

impl Interleaved for Q5_1 {
    type Lanes = Lanes<0, 6, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        isa.or_i(lanes.nibbles(isa, 2 + k % 4, k / 4), spread_bits(isa, lanes.word(isa, 1), k))
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

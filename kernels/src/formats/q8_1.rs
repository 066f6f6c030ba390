//! Q8_1: Q8_0 with `s = d * (sum of codes)` stored beside the scale, for formats with a minimum.

use super::bytes::layout;
use super::q8_0::symmetric_codes;
use super::{Block, F16, Format, Groups, Plain, Quantised, Signed, Unpacked};

layout! {
    /// 32 values in 36 bytes.
    pub struct Q8_1 {
        /// Scale.
        d: F16,
        /// Sum of the values. Derived: no value depends on it.
        s: F16,
        /// Codes.
        qs: [i8; 32],
    }
}

impl Q8_1 {
    fn sum(codes: &[i8; 32]) -> f32 {
        codes.iter().map(|&code| f32::from(code)).sum()
    }
}

impl Block for Q8_1 {
    const FORMAT: Format = Format::Q8_1;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite() && self.s.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
        self.s = F16::from_f32(self.d.value() * Q8_1::sum(&self.qs));
    }

    /// As Q8_0; the sum takes the scale before it is rounded.
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let (largest, qs) = symmetric_codes(values);
        let d = largest / 127.0;
        Some(Q8_1 { d: F16::from_f32(d), s: F16::from_f32(d * Q8_1::sum(&qs)), qs })
    }
}

impl Quantised for Q8_1 {
    type Shape = Groups<32, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub[..2].fill(1);
        out.codes[..32].copy_from_slice(&self.qs);
    }
}

//! Q8_0: `value = d * q`, 8-bit q.

use super::bits::round_ties_even;
use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Groups, Importance, Interleaved, Plain, Quantised, Signed, Unpacked};
use crate::isa::Isa;

layout! {
    /// 32 values in 34 bytes.
    pub struct Q8_0 {
        /// Scale.
        d: F16,
        /// Codes.
        qs: [i8; 32],
    }
}

impl Block for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    /// The largest magnitude becomes 127; see `symmetric_codes`.
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let (largest, qs) = symmetric_codes(values);
        Some(Q8_0 { d: F16::from_f32(largest / 127.0), qs })
    }

    /// As activations, but ties go away from zero, and the factor is the inverse of the rounded scale.
    fn quantize_weights(values: &[f32], _importance: Option<Importance>) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let d = largest / 127.0;
        let inverse = super::inverse(d);
        // Ties away from zero. (`core` has no `round`.)
        let round = |x: f32| (x.abs() + if x.abs() < 0.5 { 0.0 } else { 0.5 }).copysign(x) as i8;
        Some(Q8_0 { d: F16::from_f32(d), qs: values.map(|x| round(x * inverse)) })
    }
}

impl Q8_0 {
    /// The scale, and the codes by sixteens.
    #[inline(always)]
    pub(crate) fn parts(&self) -> (f32, [&[i8; 16]; 2]) {
        let [low, high] = self.qs.as_chunks::<16>().0 else { return (self.d.value(), [&[0; 16]; 2]) };
        (self.d.value(), [low, high])
    }
}

impl Quantised for Q8_0 {
    type Shape = Groups<32, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub[..2].fill(1);
        out.codes[..32].copy_from_slice(&self.qs);
    }
}

impl Interleaved for Q8_0 {
    type Lanes = Lanes<2, 8, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        isa.signed(lanes.word(isa, k))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

/// The largest magnitude of `values`, and `x * (127 / largest)` of each value, rounded to nearest even; 0 for
/// NaN.
pub(super) fn symmetric_codes<const N: usize>(values: &[f32; N]) -> (f32, [i8; N]) {
    let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    (largest, values.map(|x| round_ties_even(x * inverse) as i8))
}

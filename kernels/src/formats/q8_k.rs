//! Q8_K: `value = d * q`, 8-bit q, with the sums of codes by 16 stored beside, for formats with minimums.

use super::bytes::layout;
use super::q8_0::symmetric_codes;
use super::{Block, F32, Format, Plain, Quantised, Signed, SuperBlock, Unpacked};

layout! {
    /// 256 values in 292 bytes.
    pub struct Q8_K {
        /// Scale.
        d: F32,
        /// Codes.
        qs: [i8; 256],
        /// Sums of 16 codes each, i16 little-endian. Derived: no value depends on them.
        bsums: [[u8; 2]; 16],
    }
}

impl Block for Q8_K {
    const FORMAT: Format = Format::Q8_K;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F32::from_bits(scale.to_bits());
    }

    /// As Q8_0, with the scale that is the inverse of the factor by which values are multiplied.
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 256] = values.try_into().ok()?;
        let (largest, qs) = symmetric_codes(values);
        let d = if largest > 0.0 { 1.0 / (127.0 / largest) } else { 0.0 };
        let sum = |codes: &[i8]| codes.iter().map(|&code| i16::from(code)).sum::<i16>();
        let bsums = core::array::from_fn(|i| sum(&qs[16 * i..16 * i + 16]).to_le_bytes());
        Some(Q8_K { d: F32::from_bits(d.to_bits()), qs, bsums })
    }
}

impl Quantised for Q8_K {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub = [1; 16];
        out.codes = self.qs;
    }
}

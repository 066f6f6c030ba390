//! Q4_0: `value = d * (q - 8)`, 4-bit q. Byte j holds q of values j (low nibble) and j + 16.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Raised, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 32 values in 18 bytes.
    pub struct Q4_0 {
        /// Scale.
        d: F16,
        /// Codes plus 8, 4 bits each.
        qs: [u8; 16],
    }
}

impl Block for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    fn quantize(values: &[f32]) -> Option<Self> {
        let (d, q) = codes(values.try_into().ok()?);
        Some(Q4_0 { d: F16::from_f32(d), qs: core::array::from_fn(|j| q[j] | (q[j + 16] << 4)) })
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let Some(importance) = importance else { return Self::quantize(values) };
        let (d, q) = search::short(values.try_into().ok()?, importance, 8);
        Some(Q4_0 { d, qs: core::array::from_fn(|j| q[j] | (q[j + 16] << 4)) })
    }
}

/// A block's scale, and its codes plus 8. The value of largest magnitude becomes code -8; ties of rounding go
/// up.
pub(crate) fn codes(values: &[f32; 32]) -> (f32, [u8; 32]) {
    let d = super::extreme(values) / -8.0;
    let inverse = super::inverse(d);
    (d, values.map(|x| ((x * inverse + 8.5) as u8).min(15)))
}

impl Quantised for Q4_0 {
    type Shape = Groups<32, Raised<8>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub[..2].fill(1);
        for j in 0..16 {
            out.codes[j] = (self.qs[j] & 15) as i8 - 8;
            out.codes[j + 16] = (self.qs[j] >> 4) as i8 - 8;
        }
    }
}

impl Interleaved for Q4_0 {
    type Lanes = Lanes<2, 4, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        lanes.split_nibbles(isa, 0, k)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

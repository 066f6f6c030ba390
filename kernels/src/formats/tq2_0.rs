//! TQ2_0: `value = d * (q - 1)`, 2-bit q, which lies as in Q2_K.

use super::bytes::layout;
use super::lanes::{Lanes, Words, field};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, Raised, SuperBlock, Unpacked};
use crate::isa::Isa;

layout! {
    /// 256 values in 66 bytes.
    pub struct TQ2_0 {
        /// Codes plus 1, 2 bits each, in two halves.
        qs: [[u8; 32]; 2],
        /// Scale.
        d: F16,
    }
}

impl Block for TQ2_0 {
    const FORMAT: Format = Format::TQ2_0;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 256] = values.try_into().ok()?;
        let (d, codes) = super::tq1_0::ternary(values);
        Some(TQ2_0 { qs: super::search::pack_two_bits(&codes), d })
    }
}

impl Quantised for TQ2_0 {
    type Shape = SuperBlock<256, Raised<1>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub = [1; 16];
        for half in 0..2 {
            for k in 0..4 {
                for l in 0..32 {
                    out.codes[128 * half + 32 * k + l] = ((self.qs[half][l] >> (2 * k)) & 3) as i8 - 1;
                }
            }
        }
    }
}

impl Interleaved for TQ2_0 {
    type Lanes = Lanes<0, 16, 2>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        field(isa, lanes.word(isa, 8 * (part / 4) + k), 2 * (part % 4), 0, 3)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.tail_f16(isa)
    }
}

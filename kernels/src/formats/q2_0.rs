//! Q2_0: `value = d * (q - 1)`, 2-bit q. Bits 2k and 2k + 1 of byte j hold q of value 4j + k.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Raised, Unpacked};
use crate::isa::Isa;

layout! {
    /// 64 values in 18 bytes.
    pub struct Q2_0 {
        /// Scale.
        d: F16,
        /// Codes plus 1, 2 bits each.
        qs: [u8; 16],
    }
}

impl Block for Q2_0 {
    const FORMAT: Format = Format::Q2_0;
    const LEN: usize = 64;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    /// The scale is the largest magnitude, so that no code is 2.
    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 64] = values.try_into().ok()?;
        let d = values.iter().fold(0.0, |max: f32, x| if x.abs() > max { x.abs() } else { max });
        let inverse = super::inverse(d);
        let code = |x: f32| 1 + u8::from(x * inverse >= 0.5) - u8::from(x * inverse <= -0.5);
        let byte = |j: usize| (0..4).fold(0, |byte, k| byte | code(values[4 * j + k]) << (2 * k));
        Some(Q2_0 { d: F16::from_f32(d), qs: core::array::from_fn(byte) })
    }
}

impl Quantised for Q2_0 {
    type Shape = Groups<32, Raised<1>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[..2].fill(self.d.value());
        out.sub[..4].fill(1);
        for j in 0..16 {
            for k in 0..4 {
                out.codes[4 * j + k] = ((self.qs[j] >> (2 * k)) & 3) as i8 - 1;
            }
        }
    }
}

impl Interleaved for Q2_0 {
    type Lanes = Lanes<2, 4, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let word = lanes.word(isa, 2 * part + k / 4);
        let byte = isa.and_i(isa.shr_by(word, 8 * (k % 4) as u32), isa.splat_i(0xff));
        // Each pair of bits is moved to its byte: shifts by 0, 6, 12 and 18.
        let spread = isa.or_i(byte, isa.shl_by(byte, 12));
        isa.and_i(isa.or_i(spread, isa.shl_by(spread, 6)), isa.splat_i(0x0303_0303))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

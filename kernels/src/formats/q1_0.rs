//! Q1_0: `value = d` where bit i (the lowest bit of a byte first) is set, else `-d`.

use super::bits::{ONES, mask};
use super::bytes::layout;
use super::lanes::{Lanes, Words, field, spread_bits};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Raised, Unpacked};
use crate::isa::Isa;

layout! {
    /// 128 values in 18 bytes.
    pub struct Q1_0 {
        /// Scale.
        d: F16,
        /// Codes, 1 bit each.
        qs: [u8; 16],
    }
}

impl Block for Q1_0 {
    const FORMAT: Format = Format::Q1_0;
    const LEN: usize = 128;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 128] = values.try_into().ok()?;
        let sum = values.iter().fold(0.0, |sum, x| sum + x.abs());
        let bits = |j: usize| (0..8).fold(0, |byte, i| byte | u8::from(values[8 * j + i] >= 0.0) << i);
        Some(Q1_0 { d: F16::from_f32(sum / 128.0), qs: core::array::from_fn(bits) })
    }
}

impl Quantised for Q1_0 {
    type Shape = Groups<32, Raised<1>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[..4].fill(self.d.value());
        out.sub[..8].fill(1);
        let octets = out.octets();
        for j in 0..16 {
            // 1 where the bit is set, else -1.
            octets[j] = (!mask(self.qs[j]) | ONES).to_le_bytes();
        }
    }
}

impl Interleaved for Q1_0 {
    type Lanes = Lanes<2, 4, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        // Bit 4 becomes bit 1.
        field(isa, spread_bits(isa, lanes.word(isa, part), k), 4, 1, 2)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

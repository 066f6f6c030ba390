//! IQ4_NL: `value = d * TABLE[q]`, 4-bit q. Byte j holds q of values j (low nibble) and j + 16.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Signed, Unpacked};
use crate::isa::Isa;

/// The value of each code of IQ4_NL and IQ4_XS, before scaling.
pub static IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

layout! {
    /// 32 values in 18 bytes.
    pub struct IQ4_NL {
        /// Scale.
        d: F16,
        /// Indices into the table, 4 bits each.
        qs: [u8; 16],
    }
}

impl Block for IQ4_NL {
    const FORMAT: Format = Format::IQ4_NL;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ4_NL {
    type Shape = Groups<32, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub[..2].fill(1);
        for j in 0..16 {
            out.codes[j] = IQ4_VALUES[usize::from(self.qs[j] & 15)];
            out.codes[j + 16] = IQ4_VALUES[usize::from(self.qs[j] >> 4)];
        }
    }
}

impl Interleaved for IQ4_NL {
    type Lanes = Lanes<2, 4, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        isa.lookup_signed(&IQ4_VALUES, lanes.split_nibbles(isa, 0, k))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

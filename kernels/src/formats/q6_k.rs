//! Q6_K: `value = d * s * (q - 32)`, 6-bit q, an 8-bit s for each 16 values.
//!
//! In each half of 128 values, the low nibbles of values 32k + l are: k = 0, 1 in the low nibbles of bytes
//! 32k + l, k = 2, 3 in the high nibbles of bytes 32(k - 2) + l. Bits 2k and 2k + 1 of `qh` byte l are the
//! top bits.

use super::bytes::layout;
use super::lanes::{Lanes, Words, field};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, Raised, SuperBlock, Unpacked};
use crate::isa::Isa;

layout! {
    /// 256 values in 210 bytes.
    pub struct Q6_K {
        /// Low nibbles of codes plus 32, in two halves.
        ql: [[u8; 64]; 2],
        /// Top two bits of codes plus 32, in two halves.
        qh: [[u8; 32]; 2],
        /// Sub-scales.
        scales: [i8; 16],
        /// Scale of the sub-scales.
        d: F16,
    }
}

impl Block for Q6_K {
    const FORMAT: Format = Format::Q6_K;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for Q6_K {
    type Shape = SuperBlock<16, Raised<32>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        for i in 0..16 {
            out.sub[i] = i16::from(self.scales[i]);
        }
        for half in 0..2 {
            let (ql, qh) = (&self.ql[half], &self.qh[half]);
            for k in 0..2 {
                for l in 0..32 {
                    let (low, high) = (ql[32 * k + l], qh[l] >> (2 * k));
                    out.codes[128 * half + 32 * k + l] = ((low & 15) | ((high & 3) << 4)) as i8 - 32;
                    out.codes[128 * half + 32 * k + l + 64] = ((low >> 4) | (high & 0x30)) as i8 - 32;
                }
            }
        }
    }
}

impl Interleaved for Q6_K {
    type Lanes = Lanes<0, 52, 2>;
    const HEADER: [usize; 2] = [48; 2];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let (half, j) = (part / 4, part % 4);
        let top = field(isa, lanes.word(isa, 32 + 8 * half + k), 2 * j, 4, 0x30);
        isa.or_i(lanes.nibbles(isa, 16 * half + 8 * (j % 2) + k, j / 2), top)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.tail_f16(isa)
    }

    #[inline(always)]
    fn subs<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        [lanes.word(isa, 48), lanes.word(isa, 49), lanes.word(isa, 50), lanes.word(isa, 51)]
    }
}

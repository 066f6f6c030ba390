//! IQ4_XS: `value = d * (s - 32) * TABLE[q]`, 4-bit q into the table of IQ4_NL, a 6-bit s for each 32 values.
//! Of a group's 16 bytes, byte j holds q of its values j (low nibble) and j + 16.

use super::bits::nibble;
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ4_VALUES, Plain, Quantised, Unpacked};

layout! {
    /// 256 values in 136 bytes.
    pub struct IQ4_XS {
        /// Scale of the sub-scales.
        d: F16,
        /// Top two bits of the sub-scales plus 32, little-endian, the first in the lowest bits.
        scales_h: [u8; 2],
        /// Low nibbles of the sub-scales plus 32.
        scales_l: [u8; 4],
        /// Indices into the table, 4 bits each, in eight groups.
        qs: [[u8; 16]; 8],
    }
}

impl Block for IQ4_XS {
    const FORMAT: Format = Format::IQ4_XS;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ4_XS {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        let high = u16::from_le_bytes(self.scales_h);
        for group in 0..8 {
            let low = i16::from(nibble(&self.scales_l, group));
            let sub = (low | (((high >> (2 * group)) & 3) << 4) as i16) - 32;
            out.sub[2 * group] = sub;
            out.sub[2 * group + 1] = sub;
            for j in 0..16 {
                let byte = self.qs[group][j];
                out.codes[32 * group + j] = IQ4_VALUES[usize::from(byte & 15)];
                out.codes[32 * group + j + 16] = IQ4_VALUES[usize::from(byte >> 4)];
            }
        }
    }
}

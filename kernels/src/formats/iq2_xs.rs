//! IQ2_XS: `value = d * (2s + 1) / 8 * grid * sign`, a 4-bit s for each 16 values.

use super::bits::{even_mask, negate, nibble};
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ2_XS_GRID, Plain, Quantised, Unpacked};

layout! {
    /// 256 values in 74 bytes.
    pub struct IQ2_XS {
        /// Scale of the sub-scales.
        d: F16,
        /// For each 8 values, little-endian: a 9-bit grid index and, above it, a 7-bit sign code.
        qs: [[u8; 2]; 32],
        /// Sub-scales, 4 bits each, the low nibble first.
        scales: [u8; 8],
    }
}

impl Block for IQ2_XS {
    const FORMAT: Format = Format::IQ2_XS;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ2_XS {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value() * 0.125;
        for i in 0..16 {
            out.sub[i] = 2 * i16::from(nibble(&self.scales, i)) + 1;
        }
        let octets = out.octets();
        for i in 0..32 {
            let q = u16::from_le_bytes(self.qs[i]);
            let point = IQ2_XS_GRID[usize::from(q & 511)];
            octets[i] = negate(point, even_mask(u32::from(q >> 9))).to_le_bytes();
        }
    }
}

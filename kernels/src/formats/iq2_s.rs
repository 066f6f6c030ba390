//! IQ2_S: `value = d * (2s + 1) / 8 * grid * sign`, a 4-bit s for each 16 values.

use super::bits::{mask, negate, nibble};
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ2_S_GRID, Plain, Quantised, Unpacked};

layout! {
    /// 256 values in 82 bytes.
    pub struct IQ2_S {
        /// Scale of the sub-scales.
        d: F16,
        /// Low 8 bits of the grid index of each 8 values.
        qs: [u8; 32],
        /// Signs of each 8 values: bit i is set where value i is negative.
        signs: [u8; 32],
        /// Top two bits of the grid indices, the first in the lowest bits.
        qh: [u8; 8],
        /// Sub-scales, 4 bits each, the low nibble first.
        scales: [u8; 8],
    }
}

impl Block for IQ2_S {
    const FORMAT: Format = Format::IQ2_S;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ2_S {
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
            let high = (self.qh[i / 4] >> (2 * (i % 4))) & 3;
            let point = IQ2_S_GRID[usize::from(self.qs[i]) | (usize::from(high) << 8)];
            octets[i] = negate(point, mask(self.signs[i])).to_le_bytes();
        }
    }
}

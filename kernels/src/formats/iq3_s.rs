//! IQ3_S: `value = d * (2s + 1) * grid * sign`, a 4-bit s for each 32 values.

use super::bits::{mask, negate, nibble};
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ3_S_GRID, Plain, Quantised, Unpacked};

layout! {
    /// 256 values in 110 bytes.
    pub struct IQ3_S {
        /// Scale of the sub-scales.
        d: F16,
        /// Low 8 bits of the grid index of each 4 values.
        qs: [u8; 64],
        /// Top bit of the grid indices, the first in the lowest bit.
        qh: [u8; 8],
        /// Signs of each 8 values: bit i is set where value i is negative.
        signs: [u8; 32],
        /// Sub-scales, 4 bits each, the low nibble first.
        scales: [u8; 4],
    }
}

impl IQ3_S {
    /// The four magnitudes that index i points at.
    #[inline(always)]
    fn point(&self, i: usize) -> u64 {
        let high = (self.qh[i / 8] >> (i % 8)) & 1;
        u64::from(IQ3_S_GRID[usize::from(self.qs[i]) | (usize::from(high) << 8)])
    }
}

impl Block for IQ3_S {
    const FORMAT: Format = Format::IQ3_S;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ3_S {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        for i in 0..16 {
            out.sub[i] = 2 * i16::from(nibble(&self.scales, i / 2)) + 1;
        }
        let octets = out.octets();
        for i in 0..32 {
            let points = self.point(2 * i) | (self.point(2 * i + 1) << 32);
            octets[i] = negate(points, mask(self.signs[i])).to_le_bytes();
        }
    }
}

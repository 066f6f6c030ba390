//! IQ3_S: `value = d * (2s + 1) * grid * sign`, a 4-bit s for each 32 values.

use super::bits::{ONES, mask};
use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::{Activation, Block, F16, Format, IQ3_S_GRID, Quantised, Unpacked};

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
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ3_S {
    const FACTOR: f32 = 1.0;

    fn scale(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        for i in 0..4 {
            for k in 0..2 {
                let sub = 2 * i16::from((self.scales[i] >> (4 * k)) & 15) + 1;
                out.subs[4 * i + 2 * k] = sub;
                out.subs[4 * i + 2 * k + 1] = sub;
            }
        }
        for g in 0..8 {
            let high = (mask(self.qh[g]) & ONES).to_le_bytes();
            for k in 0..8 {
                out.indices[8 * g + k] = u16::from(self.qs[8 * g + k]) | (u16::from(high[k]) << 8);
            }
        }
        out.read_signs(&self.signs);
    }

    #[inline(always)]
    fn look_up(split: &mut Split) {
        split.look_up_quads(&IQ3_S_GRID);
    }
}

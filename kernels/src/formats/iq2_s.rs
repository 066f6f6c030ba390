//! IQ2_S: `value = d * (2s + 1) / 8 * grid * sign`, a 4-bit s for each 16 values.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::{Block, F16, Format, IQ2_S_GRID, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

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

#[cfg(feature = "quantize")]
static SEARCH: points::Magnitudes<8> = points::Magnitudes {
    grid: &points::IQ2_S,
    group: 16,
    even: false,
    spread: 2.0,
    flat: 0.25,
    least: 1e-8,
    fitted: false,
    tries: 9,
    step: 0.1,
    again: points::Again::OffGrid,
    factor: 0.9875,
};

impl Block for IQ2_S {
    const FORMAT: Format = Format::IQ2_S;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        Self::quantize_weights(values, None)
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let found = SEARCH.find(values.try_into().ok()?, importance);
        Some(IQ2_S {
            d: found.d,
            qs: found.lows(),
            signs: found.signs,
            qh: found.highs(2),
            scales: found.nibbles(),
        })
    }
}

impl Quantised for IQ2_S {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ2_S {
    const FACTOR: f32 = 0.125;

    fn scale(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        out.read_subs(&self.scales);
        for g in 0..8 {
            let high = u16::from(self.qh[g]);
            for k in 0..4 {
                out.indices[4 * g + k] = u16::from(self.qs[4 * g + k]) | ((high << (8 - 2 * k)) & 0x300);
            }
        }
        out.read_signs(&self.signs);
    }

    #[inline(always)]
    fn look_up<I: Isa>(_: I, split: &mut Split) {
        split.look_up_octets(&IQ2_S_GRID);
    }
}

//! IQ3_S: `value = d * (2s + 1) * grid * sign`, a 4-bit s for each 32 values.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::grids::IQ3_S_QUADS;
use super::{Block, F16, Format, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

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

#[cfg(feature = "quantize")]
static SEARCH: points::Magnitudes<4> = points::Magnitudes {
    grid: &points::IQ3_S,
    group: 32,
    even: false,
    spread: 2.0,
    flat: 0.0,
    least: f32::from_bits(1),
    fitted: false,
    tries: 9,
    step: 0.2,
    again: points::Again::AllIfOffGrid,
    factor: 1.033,
};

impl Block for IQ3_S {
    const FORMAT: Format = Format::IQ3_S;
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
        Some(IQ3_S {
            d: found.d,
            qs: found.lows(),
            qh: found.highs(1),
            signs: found.signs,
            scales: found.nibbles(),
        })
    }
}

impl Quantised for IQ3_S {
    type Shape = SuperBlock<16, Signed>;

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
        let mut high = [0; 16];
        for (g, &bits) in self.qh.iter().enumerate() {
            // Each bit is moved to its byte: shifts by 0, 7, 14 and 21.
            high[2 * g] = (u32::from(bits & 15) * 0x0020_4081) & 0x0101_0101;
            high[2 * g + 1] = (u32::from(bits >> 4) * 0x0020_4081) & 0x0101_0101;
        }
        out.read_indices(&self.qs, high);
        out.read_signs(&self.signs);
    }

    #[inline(always)]
    fn look_up<I: Isa>(isa: I, split: &mut Split) {
        split.look_up_quads(isa, &IQ3_S_QUADS);
    }
}

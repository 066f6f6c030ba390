//! IQ3_XXS: `value = d * (2s + 1) / 4 * grid * sign`, a 4-bit s for each 32 values.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::grids::IQ3_XXS_QUADS;
use super::{Block, F16, Format, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

layout! {
    /// 256 values in 98 bytes.
    pub struct IQ3_XXS {
        /// Scale of the sub-scales.
        d: F16,
        /// For each 8 values, two grid indices of 4 values.
        qs: [[u8; 2]; 32],
        /// For each 32 values, little-endian: four 7-bit sign codes, the first lowest, and the 4-bit
        /// sub-scale.
        signs: [[u8; 4]; 8],
    }
}

#[cfg(feature = "quantize")]
static SEARCH: points::Magnitudes<4> = points::Magnitudes {
    grid: &points::IQ3_XXS,
    group: 32,
    even: true,
    spread: 2.0,
    flat: 0.0,
    least: 1e-8,
    fitted: false,
    tries: 15,
    step: 0.2,
    again: points::Again::OffGrid,
    factor: 1.0125,
};

impl Block for IQ3_XXS {
    const FORMAT: Format = Format::IQ3_XXS;
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
        Some(IQ3_XXS {
            d: found.d,
            qs: core::array::from_fn(|i| [0, 1].map(|k| found.indices[2 * i + k] as u8)),
            signs: core::array::from_fn(|group| found.coded_signs(group)),
        })
    }
}

impl Quantised for IQ3_XXS {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ3_XXS {
    const FACTOR: f32 = 0.25;

    fn scale(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        let signs = self.signs.map(u32::from_le_bytes);
        out.read_coded_signs(signs);
        let mut lows = [0; 64];
        lows.copy_from_slice(self.qs.as_flattened());
        out.read_indices(&lows, [0; 16]);
    }

    #[inline(always)]
    fn look_up<I: Isa>(isa: I, split: &mut Split) {
        split.look_up_quads(isa, &IQ3_XXS_QUADS);
    }
}

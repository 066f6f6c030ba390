//! IQ3_XXS: `value = d * (2s + 1) / 4 * grid * sign`, a 4-bit s for each 32 values.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::grids::IQ3_XXS_QUADS;
use super::{Block, F16, Format, Quantised, Signed, SuperBlock, Unpacked};
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

impl Block for IQ3_XXS {
    const FORMAT: Format = Format::IQ3_XXS;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
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

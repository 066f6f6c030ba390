//! IQ3_XXS: `value = d * (2s + 1) / 4 * grid * sign`, a 4-bit s for each 32 values.

use super::bits::{even_mask, negate};
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ3_XXS_GRID, Plain, Quantised, Unpacked};

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
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value() * 0.25;
        for g in 0..8 {
            let signs = u32::from_le_bytes(self.signs[g]);
            let sub = 2 * (signs >> 28) as i16 + 1;
            out.sub[2 * g] = sub;
            out.sub[2 * g + 1] = sub;
            let octets = out.octets();
            for k in 0..4 {
                let [low, high] = self.qs[4 * g + k].map(|q| u64::from(IQ3_XXS_GRID[usize::from(q)]));
                let signs = even_mask(signs >> (7 * k));
                octets[4 * g + k] = negate(low | (high << 32), signs).to_le_bytes();
            }
        }
    }
}

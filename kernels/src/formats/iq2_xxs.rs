//! IQ2_XXS: `value = d * (2s + 1) / 8 * grid * sign`, a 4-bit s for each 32 values.
//!
//! A group of 32 is eight bytes: four grid indices, then a little-endian u32 of four 7-bit sign codes and, on
//! top, s.

use super::bits::{even_mask, negate};
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ2_XXS_GRID, Plain, Quantised, Unpacked};

layout! {
    /// Grid indices, sign codes and sub-scale of 32 values.
    pub struct IQ2_XXS_Group {
        /// Grid indices, one for each 8 values.
        grid: [u8; 4],
        /// Four 7-bit sign codes, the first lowest, and the 4-bit sub-scale.
        signs: [u8; 4],
    }
}

layout! {
    /// 256 values in 66 bytes.
    pub struct IQ2_XXS {
        /// Scale of the sub-scales.
        d: F16,
        /// Groups of 32 values.
        groups: [IQ2_XXS_Group; 8],
    }
}

impl Block for IQ2_XXS {
    const FORMAT: Format = Format::IQ2_XXS;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ2_XXS {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value() * 0.125;
        for g in 0..8 {
            let IQ2_XXS_Group { grid, signs } = self.groups[g];
            let signs = u32::from_le_bytes(signs);
            let sub = 2 * (signs >> 28) as i16 + 1;
            out.sub[2 * g] = sub;
            out.sub[2 * g + 1] = sub;
            let octets = out.octets();
            for k in 0..4 {
                let point = IQ2_XXS_GRID[usize::from(grid[k])];
                octets[4 * g + k] = negate(point, even_mask(signs >> (7 * k))).to_le_bytes();
            }
        }
    }
}

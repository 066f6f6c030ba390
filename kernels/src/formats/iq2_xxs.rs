//! IQ2_XXS: `value = d * (2s + 1) / 8 * grid * sign`, a 4-bit s for each 32 values.
//!
//! A group of 32 is eight bytes: four grid indices, then a little-endian u32 of four 7-bit sign codes and, on
//! top, s.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::{Block, F16, Format, IQ2_XXS_GRID, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

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

#[cfg(feature = "quantize")]
static SEARCH: points::Magnitudes<8> = points::Magnitudes {
    grid: &points::IQ2_XXS,
    group: 32,
    even: true,
    spread: 1.0,
    flat: 0.0,
    least: 1e-15,
    fitted: true,
    tries: 6,
    step: 0.1,
    again: points::Again::All,
    factor: 1.0,
};

impl Block for IQ2_XXS {
    const FORMAT: Format = Format::IQ2_XXS;
    const LEN: usize = 256;
    #[cfg(feature = "quantize")]
    const NEEDS_IMPORTANCE: bool = true;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        importance?;
        let found = SEARCH.find(values.try_into().ok()?, importance);
        Some(IQ2_XXS {
            d: found.d,
            groups: core::array::from_fn(|group| IQ2_XXS_Group {
                grid: core::array::from_fn(|k| found.indices[4 * group + k] as u8),
                signs: found.coded_signs(group),
            }),
        })
    }
}

impl Quantised for IQ2_XXS {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ2_XXS {
    const FACTOR: f32 = 0.125;

    fn scale(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        let signs = self.groups.map(|group| u32::from_le_bytes(group.signs));
        out.read_coded_signs(signs);
        for g in 0..8 {
            for k in 0..4 {
                out.indices[4 * g + k] = self.groups[g].grid[k].into();
            }
        }
    }

    #[inline(always)]
    fn look_up<I: Isa>(_: I, split: &mut Split) {
        split.look_up_octets(&IQ2_XXS_GRID);
    }
}

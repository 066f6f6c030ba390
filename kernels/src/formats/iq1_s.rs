//! IQ1_S: `value = d * (2s + 1) * (grid ± 1/8)`, a 3-bit s and a direction of the shift for each 32 values.
//!
//! In normal form codes are `8 * grid ± 1` and the scale is `d / 8`.

use super::bits::ONES;
use super::bytes::layout;
use super::{Activation, Block, F16, Format, IQ1_GRID, Plain, Quantised, Unpacked};

layout! {
    /// 256 values in 50 bytes.
    pub struct IQ1_S {
        /// Scale of the sub-scales.
        d: F16,
        /// Low 8 bits of the grid index of each 8 values, in groups of 32 values.
        qs: [[u8; 4]; 8],
        /// For each 32 values, little-endian: the top 3 bits of four grid indices, the first lowest, the
        /// 3-bit sub-scale, and a bit that is set where the shift is down.
        qh: [[u8; 2]; 8],
    }
}

impl Block for IQ1_S {
    const FORMAT: Format = Format::IQ1_S;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }
}

impl Quantised for IQ1_S {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value() * 0.125;
        for g in 0..8 {
            let qh = u16::from_le_bytes(self.qh[g]);
            let sub = 2 * ((qh >> 12) & 7) as i16 + 1;
            out.sub[2 * g] = sub;
            out.sub[2 * g + 1] = sub;
            for k in 0..4 {
                let index = u16::from(self.qs[g][k]) | (((qh >> (3 * k)) & 7) << 8);
                out.octets()[4 * g + k] = shifted_point(index, qh & 0x8000 != 0);
            }
        }
    }
}

/// Eight codes, `8 * grid + 1`, or `8 * grid - 1` where the shift is down; `index` is below 2048.
#[inline(always)]
pub(super) fn shifted_point(index: u16, down: bool) -> [u8; 8] {
    let point = IQ1_GRID[usize::from(index & 2047)];
    // Bytes are far from both ends while their top bits are flipped, so nothing carries.
    let shifted = if down { point - ONES } else { point + ONES };
    (shifted ^ (0x80 * ONES)).to_le_bytes()
}

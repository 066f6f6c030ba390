//! IQ1_M: `value = d * (2s + 1) * (grid ± 1/8)`, a 3-bit s for each 16 values, a direction of the shift for
//! each 8.
//!
//! Codes and scale are scaled by 8 as in IQ1_S, whose grid this is. The f16 scale lies in the top nibbles of
//! `scales`.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::{Block, F16, Format, IQ1_GRID, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

layout! {
    /// 256 values in 56 bytes.
    pub struct IQ1_M {
        /// Low 8 bits of the grid index of each 8 values.
        qs: [u8; 32],
        /// For each 8 values, the low nibble first: the top 3 bits of the grid index, and a bit that is set
        /// where the shift is down.
        qh: [u8; 16],
        /// For each 64 values, little-endian: four 3-bit sub-scales, the first lowest, and 4 bits of the
        /// scale, whose lowest 4 bits come first.
        scales: [[u8; 2]; 4],
    }
}

impl IQ1_M {
    /// The scale of the sub-scales.
    #[inline(always)]
    fn d(&self) -> F16 {
        let nibble = |i: usize| u16::from(self.scales[i][1] >> 4) << (4 * i);
        F16::from_bits(nibble(0) | nibble(1) | nibble(2) | nibble(3))
    }
}

#[cfg(feature = "quantize")]
static SEARCH: points::Shifted = points::Shifted { group: 16, least: 1e-7, refit: true, factor: 1.1125 };

impl Block for IQ1_M {
    const FORMAT: Format = Format::IQ1_M;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d().is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        let bits = F16::from_f32(scale).to_bits();
        for i in 0..4 {
            let nibble = (bits >> (4 * i)) as u8 & 15;
            self.scales[i][1] = (self.scales[i][1] & 15) | (nibble << 4);
        }
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        Self::quantize_weights(values, None)
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let found = SEARCH.find(values.try_into().ok()?, importance);
        Some(IQ1_M {
            qs: found.lows(),
            qh: core::array::from_fn(|at| {
                let high = |i: usize| (found.indices[i] >> 8) as u8 | (found.signs[i] & 8);
                high(2 * at) | high(2 * at + 1) << 4
            }),
            scales: core::array::from_fn(|at| {
                let sub = |i: usize| u16::from(found.subs[4 * at + i]) << (3 * i);
                let d = (found.d.to_bits() >> (4 * at)) << 12;
                (sub(0) | sub(1) | sub(2) | sub(3) | d).to_le_bytes()
            }),
        })
    }
}

impl Quantised for IQ1_M {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ1_M {
    const FACTOR: f32 = 0.125;
    const RAISED: Option<u8> = Some(9);

    fn scale(&self) -> F16 {
        self.d()
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        for i in 0..16 {
            let scales = u16::from_le_bytes(self.scales[i / 4]);
            out.subs[i] = 2 * ((scales >> (3 * (i % 4))) & 7) as i16 + 1;
        }
        let mut high = [0; 8];
        for (high, qh) in high.iter_mut().zip(self.qh.as_chunks().0) {
            let bits = u32::from(u16::from_le_bytes(*qh)) & 0x7777;
            *high = ((bits & 0xf) | (bits & 0xf0) << 4) | ((bits & 0xf00) << 8) | ((bits & 0xf000) << 12);
        }
        out.read_indices(&self.qs, high);
        for g in 0..8 {
            // Bits 3, 7, 11 and 15 tell the shifts of eight values each.
            let bits = u32::from(u16::from_le_bytes([self.qh[2 * g], self.qh[2 * g + 1]]));
            let low = ((bits >> 3) & 1) | ((bits << 1) & 0x100);
            let spread = low | ((bits << 5) & 0x1_0000) | ((bits << 9) & 0x100_0000);
            out.signs[g] = spread * 0xff;
        }
    }

    #[inline(always)]
    fn look_up<I: Isa>(_: I, split: &mut Split) {
        split.look_up_octets(&IQ1_GRID);
    }
}

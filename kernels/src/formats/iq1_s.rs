//! IQ1_S: `value = d * (2s + 1) * (grid ± 1/8)`, a 3-bit s and a direction of the shift for each 32 values.
//!
//! In normal form codes are `8 * grid ± 1` and the scale is `d / 8`.

use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::{Block, F16, Format, IQ1_GRID, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

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

#[cfg(feature = "quantize")]
static SEARCH: points::Shifted = points::Shifted { group: 32, least: 1e-12, refit: false, factor: 1.125 };

impl Block for IQ1_S {
    const FORMAT: Format = Format::IQ1_S;
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
        Some(IQ1_S {
            d: found.d,
            qs: core::array::from_fn(|group| core::array::from_fn(|k| found.indices[4 * group + k] as u8)),
            qh: core::array::from_fn(|group| {
                let high = |k: usize| (found.indices[4 * group + k] >> 8) << (3 * k);
                let high = high(0) | high(1) | high(2) | high(3) | u16::from(found.subs[group]) << 12;
                (high | u16::from(found.signs[4 * group] & 1) << 15).to_le_bytes()
            }),
        })
    }
}

impl Quantised for IQ1_S {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ1_S {
    const FACTOR: f32 = 0.125;
    const RAISED: Option<u8> = Some(9);

    fn scale(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        for g in 0..8 {
            let qh = u16::from_le_bytes(self.qh[g]);
            out.subs[2 * g] = 2 * ((qh >> 12) & 7) as i16 + 1;
            out.subs[2 * g + 1] = out.subs[2 * g];
            out.signs[g] = if qh & 0x8000 != 0 { !0 } else { 0 };
        }
        let high = self.qh.map(|qh| {
            let bits = u32::from(u16::from_le_bytes(qh));
            (bits & 7) | ((bits & 0x38) << 5) | ((bits & 0x1c0) << 10) | ((bits & 0xe00) << 15)
        });
        let mut low = [0; 32];
        low.copy_from_slice(self.qs.as_flattened());
        out.read_indices(&low, high);
    }

    #[inline(always)]
    fn look_up<I: Isa>(_: I, split: &mut Split) {
        split.look_up_octets(&IQ1_GRID);
    }
}

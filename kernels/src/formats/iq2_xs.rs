//! IQ2_XS: `value = d * (2s + 1) / 8 * grid * sign`, a 4-bit s for each 16 values.

use super::bits::even_bytes;
use super::bytes::layout;
use super::gridded::{self, Gridded, Split};
use super::{Block, F16, Format, IQ2_XS_GRID, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, points};
use crate::isa::Isa;

layout! {
    /// 256 values in 74 bytes.
    pub struct IQ2_XS {
        /// Scale of the sub-scales.
        d: F16,
        /// For each 8 values, little-endian: a 9-bit grid index and, above it, a 7-bit sign code.
        qs: [[u8; 2]; 32],
        /// Sub-scales, 4 bits each, the low nibble first.
        scales: [u8; 8],
    }
}

#[cfg(feature = "quantize")]
static SEARCH: points::Magnitudes<8> = points::Magnitudes {
    grid: &points::IQ2_XS,
    group: 16,
    even: true,
    spread: 1.0,
    flat: 0.0,
    least: 1e-15,
    fitted: false,
    tries: 9,
    step: 0.1,
    again: points::Again::OffGrid,
    factor: 1.0,
};

impl Block for IQ2_XS {
    const FORMAT: Format = Format::IQ2_XS;
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
        Some(IQ2_XS {
            d: found.d,
            qs: core::array::from_fn(|i| {
                (found.indices[i] | u16::from(found.signs[i] & 127) << 9).to_le_bytes()
            }),
            scales: found.nibbles(),
        })
    }
}

impl Quantised for IQ2_XS {
    type Shape = SuperBlock<16, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        gridded::unpack(self, out);
    }
}

impl Gridded for IQ2_XS {
    const FACTOR: f32 = 0.125;

    fn scale(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn split(&self, out: &mut Split) {
        out.read_subs(&self.scales);
        for i in 0..32 {
            out.indices[i] = u16::from_le_bytes(self.qs[i]) & 511;
        }
        for g in 0..8 {
            // The sign codes of four values stand in the upper seven bits of every second byte.
            let [_, a] = self.qs[4 * g];
            let [_, b] = self.qs[4 * g + 1];
            let [_, c] = self.qs[4 * g + 2];
            let [_, d] = self.qs[4 * g + 3];
            out.signs[g] = even_bytes((u32::from_le_bytes([a, b, c, d]) >> 1) & 0x7f7f_7f7f);
        }
    }

    #[inline(always)]
    fn look_up<I: Isa>(_: I, split: &mut Split) {
        split.look_up_octets(&IQ2_XS_GRID);
    }
}

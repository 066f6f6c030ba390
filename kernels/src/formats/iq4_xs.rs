//! IQ4_XS: `value = d * (s - 32) * TABLE[q]`, 4-bit q into the table of IQ4_NL, a 6-bit s for each 32 values.
//! Of a group's 16 bytes, byte j holds q of its values j (low nibble) and j + 16.

use super::bits::nibble;
use super::bytes::layout;
use super::lanes::{Lanes, Words, less_32};
use super::{Block, F16, Format, IQ4_VALUES, Interleaved, Plain, Quantised, Signed, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, iq4_nl, search};
use crate::isa::Isa;

layout! {
    /// 256 values in 136 bytes.
    pub struct IQ4_XS {
        /// Scale of the sub-scales.
        d: F16,
        /// Top two bits of the sub-scales plus 32, little-endian, the first in the lowest bits.
        scales_h: [u8; 2],
        /// Low nibbles of the sub-scales plus 32.
        scales_l: [u8; 4],
        /// Indices into the table, 4 bits each, in eight groups.
        qs: [[u8; 16]; 8],
    }
}

impl Block for IQ4_XS {
    const FORMAT: Format = Format::IQ4_XS;
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
        let values: &[f32; 256] = values.try_into().ok()?;
        let mean_square = values.iter().fold(0.0, |sum, x| sum + x * x) * (2.0 / 256.0);
        let scales: [f32; 8] = core::array::from_fn(|group| {
            let at = 32 * group..32 * (group + 1);
            let columns = importance.map(|importance| (&importance.columns[at.clone()], mean_square));
            iq4_nl::scale(&values[at], columns)
        });
        let d = -search::extreme(&scales) / 32.0;
        let inverse = super::inverse(d);
        let subs = scales.map(|scale| search::nearest(inverse * scale).clamp(-32, 31));
        let q = |group: usize, j: usize| {
            let inverse = super::inverse(d * subs[group] as f32);
            iq4_nl::index(inverse * values[32 * group + j])
        };
        let top = subs.iter().rev().fold(0, |bits, sub| bits << 2 | (sub + 32) as u16 >> 4);
        let low = |i: usize| ((subs[2 * i] + 32) & 15 | ((subs[2 * i + 1] + 32) & 15) << 4) as u8;
        Some(IQ4_XS {
            d: F16::from_f32(d),
            scales_h: top.to_le_bytes(),
            scales_l: core::array::from_fn(low),
            qs: core::array::from_fn(|group| core::array::from_fn(|j| q(group, j) | q(group, j + 16) << 4)),
        })
    }
}

impl Quantised for IQ4_XS {
    type Shape = SuperBlock<32, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        let high = u16::from_le_bytes(self.scales_h);
        for group in 0..8 {
            let low = i16::from(nibble(&self.scales_l, group));
            let sub = (low | (((high >> (2 * group)) & 3) << 4) as i16) - 32;
            out.sub[2 * group] = sub;
            out.sub[2 * group + 1] = sub;
            for j in 0..16 {
                let byte = self.qs[group][j];
                out.codes[32 * group + j] = IQ4_VALUES[usize::from(byte & 15)];
                out.codes[32 * group + j + 16] = IQ4_VALUES[usize::from(byte >> 4)];
            }
        }
    }
}

impl Interleaved for IQ4_XS {
    type Lanes = Lanes<0, 34, 0>;
    const HEADER: [usize; 2] = [0; 2];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        isa.lookup_signed(&IQ4_VALUES, lanes.split_nibbles(isa, 2 + 4 * part, k))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        isa.low_f16(lanes.word(isa, 0))
    }

    #[inline(always)]
    fn subs<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        let (low, high) = (lanes.word(isa, 1), isa.shr_by(lanes.word(isa, 0), 16));
        let mut subs = [isa.splat_i(0); 4];
        for g in 0..2 {
            // Fields of 4 and of 2 bits to bytes of their own, in two doublings.
            let low = isa.and_i(isa.shr_by(low, 16 * g as u32), isa.splat_i(0xffff));
            let low = isa.and_i(isa.or_i(low, isa.shl_by(low, 8)), isa.splat_i(0x00ff_00ff));
            let low = isa.and_i(isa.or_i(low, isa.shl_by(low, 4)), isa.splat_i(0x0f0f_0f0f));
            let high = isa.and_i(isa.shr_by(high, 8 * g as u32), isa.splat_i(0xff));
            let high = isa.and_i(isa.or_i(high, isa.shl_by(high, 12)), isa.splat_i(0x000f_000f));
            let high = isa.and_i(isa.or_i(high, isa.shl_by(high, 6)), isa.splat_i(0x0303_0303));
            subs[g] = less_32(isa, isa.or_i(low, isa.shl_by(high, 4)));
        }
        subs
    }
}

//! Q3_K: `value = d * (s - 32) * (q - 4)`, 3-bit q, a 6-bit s for each 16 values.
//!
//! The low two bits of q lie as in Q2_K; the top bit of value 128h + 32k + l is bit 4h + k of `hmask[l]`.

use super::bytes::layout;
use super::lanes::{Lanes, Words, field, less_32};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, Raised, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 256 values in 110 bytes.
    pub struct Q3_K {
        /// Top bits of codes plus 4.
        hmask: [u8; 32],
        /// Low two bits of codes plus 4, in two halves.
        qs: [[u8; 32]; 2],
        /// Sub-scales plus 32: the low 4 bits of sub-scale i are in byte i % 8, the low nibble first; the top
        /// two are in byte 8 + i % 4, from bit 2 * (i / 4).
        scales: [u8; 12],
        /// Scale of the sub-scales.
        d: F16,
    }
}

impl Block for Q3_K {
    const FORMAT: Format = Format::Q3_K;
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
        let (mut scales, mut codes, mut subs) = ([0.0; 16], [0; 256], [0; 16]);
        let (mut weights, mut total) = ([0.0; 16], [0.0; 16]);
        let mean_square = values.iter().fold(0.0, |sum, x| sum + x * x) / 128.0;
        for i in 0..16 {
            let at = 16 * i..16 * (i + 1);
            let (x, codes) = (&values[at.clone()], &mut codes[at.clone()]);
            scales[i] = match importance {
                Some(importance) => {
                    search::weigh(x, &importance.columns[at], mean_square, &mut weights);
                    total[i] = weights.iter().sum();
                    search::signed(4, x, &weights, codes)
                }
                None => search::signed_moved(4, x, codes),
            };
        }
        let d = match importance {
            Some(_) => F16::from_f32(search::signed(32, &scales, &total, &mut subs)),
            None => {
                let max = search::extreme(&scales);
                let inverse = if max != 0.0 { -32.0 / max } else { 0.0 };
                if max != 0.0 {
                    subs = scales.map(|scale| (search::nearest(inverse * scale).clamp(-32, 31) + 32) as u8);
                }
                F16::from_f32(super::inverse(inverse))
            }
        };
        search::signed_codes(values, 4, d, &subs.map(|sub| sub as i8 - 32), &mut codes);
        let top = |l: usize| (0..8).fold(0, |byte, k| byte | (codes[32 * k + l] >> 2) << k);
        let packed = |i: usize| match i {
            0..8 => (subs[i] & 15) | subs[i + 8] << 4,
            _ => (0..4).fold(0, |byte, k| byte | (subs[i - 8 + 4 * k] >> 4) << (2 * k)),
        };
        let (hmask, scales) = (core::array::from_fn(top), core::array::from_fn(packed));
        Some(Q3_K { hmask, qs: search::pack_two_bits(&codes), scales, d })
    }
}

impl Quantised for Q3_K {
    type Shape = SuperBlock<16, Raised<4>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        for i in 0..16 {
            let low = (self.scales[i % 8] >> (4 * (i / 8))) & 15;
            let high = (self.scales[8 + i % 4] >> (2 * (i / 4))) & 3;
            out.sub[i] = i16::from(low | (high << 4)) - 32;
        }
        for half in 0..2 {
            for k in 0..4 {
                for l in 0..32 {
                    let low = (self.qs[half][l] >> (2 * k)) & 3;
                    let high = (self.hmask[l] >> (4 * half + k)) & 1;
                    out.codes[128 * half + 32 * k + l] = (low | (high << 2)) as i8 - 4;
                }
            }
        }
    }
}

impl Interleaved for Q3_K {
    type Lanes = Lanes<0, 27, 2>;
    const HEADER: [usize; 2] = [23; 2];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let low = field(isa, lanes.word(isa, 8 + 8 * (part / 4) + k), 2 * (part % 4), 0, 3);
        isa.or_i(low, field(isa, lanes.word(isa, k), part, 2, 4))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.tail_f16(isa)
    }

    #[inline(always)]
    fn subs<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        let mut subs = [isa.splat_i(0); 4];
        for g in 0..4 {
            let top = isa.and_i(isa.shr_by(lanes.word(isa, 26), 2 * g as u32), isa.splat_i(0x0303_0303));
            subs[g] = less_32(isa, isa.or_i(lanes.nibbles(isa, 24 + g % 2, g / 2), isa.shl_by(top, 4)));
        }
        subs
    }
}

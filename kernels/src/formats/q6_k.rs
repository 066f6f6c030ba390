//! Q6_K: `value = d * s * (q - 32)`, 6-bit q, an 8-bit s for each 16 values.
//!
//! In each half of 128 values, the low nibbles of values 32k + l are: k = 0, 1 in the low nibbles of bytes
//! 32k + l, k = 2, 3 in the high nibbles of bytes 32(k - 2) + l. Bits 2k and 2k + 1 of `qh` byte l are the
//! top bits.

use super::bytes::layout;
use super::lanes::{Lanes, Words, field};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, Raised, SuperBlock, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 256 values in 210 bytes.
    pub struct Q6_K {
        /// Low nibbles of codes plus 32, in two halves.
        ql: [[u8; 64]; 2],
        /// Top two bits of codes plus 32, in two halves.
        qh: [[u8; 32]; 2],
        /// Sub-scales.
        scales: [i8; 16],
        /// Scale of the sub-scales.
        d: F16,
    }
}

impl Block for Q6_K {
    const FORMAT: Format = Format::Q6_K;
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
        let (mut scales, mut codes) = ([0.0; 16], [0; 256]);
        for i in 0..16 {
            let at = 16 * i..16 * (i + 1);
            let x = &values[at.clone()];
            let mut weights = [0.0; 16];
            match importance {
                Some(importance) => weights.copy_from_slice(&importance.columns[at.clone()]),
                None => weights.iter_mut().zip(x).for_each(|(weight, x)| *weight = x * x),
            }
            scales[i] = search::signed(32, x, &weights, &mut codes[at]);
        }
        let max = search::extreme(&scales);
        if max.abs() < search::LEAST {
            return Some(Q6_K { ql: [[0; 64]; 2], qh: [[0; 32]; 2], scales: [0; 16], d: F16::ZERO });
        }
        let inverse = -128.0 / max;
        let d = F16::from_f32(1.0 / inverse);
        let scales = scales.map(|scale| search::nearest(inverse * scale).min(127) as i8);
        search::signed_codes(values, 32, d, &scales, &mut codes);
        let code = |half: usize, k: usize, l: usize| codes[128 * half + 32 * k + l];
        let low = |half: usize, i: usize| {
            (code(half, i / 32, i % 32) & 15) | (code(half, i / 32 + 2, i % 32) & 15) << 4
        };
        let top = |half: usize, l: usize| (0..4).fold(0, |byte, k| byte | (code(half, k, l) >> 4) << (2 * k));
        let ql = core::array::from_fn(|half| core::array::from_fn(|i| low(half, i)));
        let qh = core::array::from_fn(|half| core::array::from_fn(|l| top(half, l)));
        Some(Q6_K { ql, qh, scales, d })
    }
}

impl Quantised for Q6_K {
    type Shape = SuperBlock<16, Raised<32>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        for i in 0..16 {
            out.sub[i] = i16::from(self.scales[i]);
        }
        for half in 0..2 {
            let (ql, qh) = (&self.ql[half], &self.qh[half]);
            for k in 0..2 {
                for l in 0..32 {
                    let (low, high) = (ql[32 * k + l], qh[l] >> (2 * k));
                    out.codes[128 * half + 32 * k + l] = ((low & 15) | ((high & 3) << 4)) as i8 - 32;
                    out.codes[128 * half + 32 * k + l + 64] = ((low >> 4) | (high & 0x30)) as i8 - 32;
                }
            }
        }
    }
}

impl Interleaved for Q6_K {
    type Lanes = Lanes<0, 52, 2>;
    const HEADER: [usize; 2] = [48; 2];

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let (half, j) = (part / 4, part % 4);
        let top = field(isa, lanes.word(isa, 32 + 8 * half + k), 2 * j, 4, 0x30);
        isa.or_i(lanes.nibbles(isa, 16 * half + 8 * (j % 2) + k, j / 2), top)
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.tail_f16(isa)
    }

    #[inline(always)]
    fn subs<I: Isa>(isa: I, lanes: &impl Words<I>) -> [I::I; 4] {
        [lanes.word(isa, 48), lanes.word(isa, 49), lanes.word(isa, 50), lanes.word(isa, 51)]
    }
}

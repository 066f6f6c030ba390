//! NVFP4: `value = UE4M3(d) * E2M1(q)`, 4-bit q, a scale for each 16 values. Of a group's eight bytes, byte j
//! holds q of its values j (low nibble) and j + 8.
//!
//! Codes and scale are doubled and halved as in MXFP4. A tensor of this format also has an f32 scale of its
//! own, which files keep beside it.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
#[cfg(feature = "quantize")]
use super::mxfp4::nearest_e2m1;
use super::mxfp4::{E2M1_RAISED, e2m1_doubled};
use super::{Block, Format, Groups, Interleaved, Quantised, Raised, Unpacked};
use crate::isa::Isa;

layout! {
    /// An unsigned float of 4 exponent bits (bias 7) and 3 fraction bits; the top bit is not looked at.
    pub struct UE4M3 {
        /// The bits; 0x7f stands for 0.
        bits: u8,
    }
}

impl UE4M3 {
    /// Half the value.
    #[inline(always)]
    pub const fn half(self) -> f32 {
        if self.bits == 0x7f {
            return 0.0;
        }
        let (exponent, fraction) = ((self.bits as u32 >> 3) & 15, self.bits as u32 & 7);
        if exponent == 0 {
            // Steps of 2^-9, halved.
            return fraction as f32 / 1024.0;
        }
        // The exponent moves from bias 7 to bias 127, less one to halve.
        f32::from_bits(((exponent + 127 - 7 - 1) << 23) | (fraction << 20))
    }

    /// The nearest value at or below `value`, from 0 to 448; 0 for NaN.
    pub const fn floor(value: f32) -> UE4M3 {
        // Exponent and fraction as one number, in steps of the last fraction bit; the first 8 are denormal.
        let steps = (value.to_bits() >> 20) as i32 - ((127 - 7) << 3);
        let bits = match steps {
            _ if value.is_nan() || value.is_sign_negative() => 0,
            ..8 => (value * 512.0) as u8,
            8..0x7e => steps as u8,
            _ => 0x7e,
        };
        UE4M3 { bits }
    }

    /// The nearest value, of two the greater; 0 for NaN. As GGML has it, all from 248 on become 448.
    #[cfg(feature = "quantize")]
    fn nearest(value: f32) -> UE4M3 {
        // As in `floor`, but in halves of steps.
        let halves = (value.to_bits() >> 19) as i32 - ((127 - 7) << 4);
        let bits = match (halves + 1) >> 1 {
            _ if value.is_nan() || value.is_sign_negative() => 0,
            _ if halves < 16 => ((value * 512.0 + 0.5) as u8).min(7),
            steps @ ..0x78 => steps as u8,
            _ => 0x7e,
        };
        UE4M3 { bits }
    }
}

/// [`UE4M3::half`] of the lowest byte of each lane.
#[inline(always)]
fn half<I: Isa>(isa: I, bits: I::I) -> I::F {
    // As a half-precision float the number, denormal ones too, is too small by the difference of the biases.
    let number = isa.low_f16(isa.shl_i::<7>(isa.and_i(bits, isa.splat_i(0x7f))));
    let value = isa.mul(number, isa.splat(const { (1 << (15 - 7 - 1)) as f32 }));
    // 0x7f is 0, and 0xff is not.
    let byte = isa.to_f32(isa.and_i(bits, isa.splat_i(0xff)));
    let top = isa.select_gt(byte, isa.splat(127.0), value, isa.splat(0.0));
    isa.select_gt(value, isa.splat(224.0), top, value)
}

layout! {
    /// 64 values in 36 bytes.
    pub struct NVFP4 {
        /// Scales of the four groups.
        d: [UE4M3; 4],
        /// E2M1 codes of the four groups.
        qs: [[u8; 8]; 4],
    }
}

impl Block for NVFP4 {
    const FORMAT: Format = Format::NVFP4;
    const LEN: usize = 64;

    /// Always: every scale byte has a finite value.
    fn is_finite(&self) -> bool {
        true
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = [UE4M3::floor(scale); 4];
    }

    /// The largest magnitude of each group becomes the largest element. The scale of the tensor is taken to be 1.
    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        let groups: &[[f32; 16]; 4] = values.as_chunks().0.try_into().ok().filter(|_| values.len() == 64)?;
        let d = groups.map(|group| {
            let largest = group.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            UE4M3::nearest(largest / 6.0)
        });
        let code = |group: usize, j: usize| nearest_e2m1(d[group].half(), groups[group][j]);
        let pair = |group: usize, j: usize| code(group, j) | code(group, j + 8) << 4;
        Some(NVFP4 { d, qs: core::array::from_fn(|group| core::array::from_fn(|j| pair(group, j))) })
    }
}

impl Quantised for NVFP4 {
    type Shape = Groups<16, Raised<12>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.sub[..4].fill(1);
        for group in 0..4 {
            out.d[group] = self.d[group].half();
            for j in 0..8 {
                let byte = self.qs[group][j];
                out.codes[16 * group + j] = e2m1_doubled(byte & 15);
                out.codes[16 * group + j + 8] = e2m1_doubled(byte >> 4);
            }
        }
    }
}

impl Interleaved for NVFP4 {
    /// The first word has the scales.
    type Lanes = Lanes<0, 9, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let group = 2 * part + k / 4;
        isa.lookup(&E2M1_RAISED, lanes.nibbles(isa, 1 + 2 * group + k % 2, k % 4 / 2))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, group: usize) -> I::F {
        half(isa, isa.shr_by(lanes.word(isa, 0), 8 * group as u32))
    }
}

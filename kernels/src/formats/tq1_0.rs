//! TQ1_0: `value = d * (q - 1)`, ternary q. A byte is a fraction of 256 whose first five base-3 digits are
//! codes.
//!
//! Digit n of bytes 0 to 31 gives values 32n + j, of bytes 32 to 47 values 160 + 16n + j, and of the four
//! bytes of `qh`, which have four digits, values 240 + 4n + j.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Interleaved, Plain, Quantised, Raised, SuperBlock, Unpacked};
use crate::isa::Isa;

layout! {
    /// 256 values in 54 bytes.
    pub struct TQ1_0 {
        /// Five codes a byte.
        qs: [u8; 48],
        /// Four codes a byte.
        qh: [u8; 4],
        /// Scale.
        d: F16,
    }
}

impl Block for TQ1_0 {
    const FORMAT: Format = Format::TQ1_0;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 256] = values.try_into().ok()?;
        let (d, codes) = ternary(values);
        // The codes at `first`, `first + step`, .. are digits of a fraction of 243, in 256ths, rounded up.
        let byte = |first: usize, step: usize, digits: usize| {
            let number = (0..5).fold(0, |number: u16, n| {
                number * 3 + if n < digits { u16::from(codes[first + n * step]) } else { 0 }
            });
            (number * 256).div_ceil(243) as u8
        };
        let qs = core::array::from_fn(|j| if j < 32 { byte(j, 32, 5) } else { byte(128 + j, 16, 5) });
        Some(TQ1_0 { qs, qh: core::array::from_fn(|j| byte(240 + j, 4, 4)), d })
    }
}

/// The digits of each of `N` bytes, less 1: first those of all bytes, then the second ones, and so on.
#[inline(always)]
fn digits<const N: usize>(bytes: &[u8], codes: &mut [i8]) {
    let mut fractions = [0; N];
    for (fraction, &byte) in fractions.iter_mut().zip(bytes) {
        *fraction = u16::from(byte);
    }
    for codes in codes.as_chunks_mut::<N>().0 {
        for j in 0..N {
            let tripled = fractions[j] * 3;
            codes[j] = (tripled >> 8) as i8 - 1;
            fractions[j] = tripled & 255;
        }
    }
}

impl Quantised for TQ1_0 {
    type Shape = SuperBlock<256, Raised<1>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub = [1; 16];
        digits::<32>(&self.qs[..32], &mut out.codes[..160]);
        digits::<16>(&self.qs[32..], &mut out.codes[160..240]);
        digits::<4>(&self.qh, &mut out.codes[240..]);
    }
}

impl Interleaved for TQ1_0 {
    type Lanes = Lanes<0, 13, 2>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I {
        let twice = [8, 9, 10, 11, 8, 9, 10, 11];
        match part {
            5 => digit(isa, lanes.pick(isa, k, twice), lanes.numbers(isa, k, [1, 1, 1, 1, 3, 3, 3, 3])),
            6 => digit(isa, lanes.pick(isa, k, twice), lanes.numbers(isa, k, [9, 9, 9, 9, 27, 27, 27, 27])),
            7 => {
                let words = lanes.pick(isa, k, [8, 9, 10, 11, 12, 12, 12, 12]);
                digit(isa, words, lanes.numbers(isa, k, [81, 81, 81, 81, 1, 3, 9, 27]))
            }
            _ => digit(isa, lanes.word(isa, k), isa.splat_i([1, 3, 9, 27, 81, 0, 0, 0][part % 8])),
        }
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.tail_f16(isa)
    }
}

/// The `n`-th digit of each byte; `power` is 3^n.
#[inline(always)]
fn digit<I: Isa>(isa: I, bytes: I::I, power: I::I) -> I::I {
    let even = isa.and_i(isa.shr_by(tripled(isa, bytes, power), 8), isa.splat_i(0x0003_0003));
    let odd = isa.and_i(tripled(isa, isa.shr_by(bytes, 8), power), isa.splat_i(0x0300_0300));
    isa.or_i(even, odd)
}

/// Of the first and the third byte of each lane, the fraction before the `n`-th digit, times 3: the digit is in
/// bits 8 and 9.
#[inline(always)]
fn tripled<I: Isa>(isa: I, bytes: I::I, power: I::I) -> I::I {
    let halves = isa.splat_i(0x00ff_00ff);
    let fraction = isa.and_i(isa.mul_i(isa.and_i(bytes, halves), power), halves);
    isa.add_i(fraction, isa.add_i(fraction, fraction))
}

/// The largest magnitude, and each value's code plus 1; ties of rounding go away from zero.
#[cfg(feature = "quantize")]
pub(super) fn ternary(values: &[f32; 256]) -> (F16, [u8; 256]) {
    let d = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let inverse = super::inverse(d);
    let code = |x: f32| if x >= 0.5 { 2 } else { u8::from(x > -0.5) };
    (F16::from_f32(d), values.map(|x| if x.is_nan() { 1 } else { code(x * inverse) }))
}

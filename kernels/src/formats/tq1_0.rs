//! TQ1_0: `value = d * (q - 1)`, ternary q. A byte is a fraction of 256 whose first five base-3 digits are
//! codes.
//!
//! Digit n of bytes 0 to 31 gives values 32n + j, of bytes 32 to 47 values 160 + 16n + j, and of the four
//! bytes of `qh`, which have four digits, values 240 + 4n + j.

use super::bytes::layout;
use super::{Activation, Block, F16, Format, Plain, Quantised, Unpacked};

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
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub = [1; 16];
        digits::<32>(&self.qs[..32], &mut out.codes[..160]);
        digits::<16>(&self.qs[32..], &mut out.codes[160..240]);
        digits::<4>(&self.qh, &mut out.codes[240..]);
    }
}

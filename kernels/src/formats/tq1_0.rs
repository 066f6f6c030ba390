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

/// The code that is digit n of `byte`, where `power` is 3^n.
#[inline(always)]
fn digit(byte: u8, power: u8) -> i8 {
    let fraction = byte.wrapping_mul(power);
    ((u16::from(fraction) * 3) >> 8) as i8 - 1
}

impl Quantised for TQ1_0 {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
        out.d[0] = self.d.value();
        out.sub = [1; 16];
        for n in 0..5 {
            for j in 0..32 {
                out.codes[32 * n + j] = digit(self.qs[j], POWERS[n]);
            }
            for j in 0..16 {
                out.codes[160 + 16 * n + j] = digit(self.qs[32 + j], POWERS[n]);
            }
        }
        for n in 0..4 {
            for j in 0..4 {
                out.codes[240 + 4 * n + j] = digit(self.qh[j], POWERS[n]);
            }
        }
    }
}

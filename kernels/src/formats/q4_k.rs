//! Q4_K: `value = d * s * q - dmin * m`, 4-bit q, a 6-bit s and m for each 32 values.
//!
//! In each quarter of 64 values, byte l holds q of values l (low nibble) and 32 + l.

use super::bits::six_bit_pairs;
use super::bytes::layout;
use super::{Activation, Block, F16, Format, Plain, Quantised, Unpacked};

layout! {
    /// 256 values in 144 bytes.
    pub struct Q4_K {
        /// Scale of the sub-scales.
        d: F16,
        /// Scale of the minimums, which are subtracted.
        dmin: F16,
        /// Eight sub-scales and eight minimums of 6 bits.
        scales: [u8; 12],
        /// Codes, 4 bits each, in four quarters.
        qs: [[u8; 32]; 4],
    }
}

impl Block for Q4_K {
    const FORMAT: Format = Format::Q4_K;
    const LEN: usize = 256;

    fn is_finite(&self) -> bool {
        self.d.is_finite() && self.dmin.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
        self.dmin = self.d;
    }
}

impl Quantised for Q4_K {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.m[0] = -self.dmin.value();
        unpack_scales(&self.scales, out);
        for quarter in 0..4 {
            for l in 0..32 {
                out.codes[64 * quarter + l] = (self.qs[quarter][l] & 15) as i8;
                out.codes[64 * quarter + 32 + l] = (self.qs[quarter][l] >> 4) as i8;
            }
        }
    }
}

/// Writes the sub-scales and minimums of a Q4_K or Q5_K block.
#[inline(always)]
pub(super) fn unpack_scales(scales: &[u8; 12], out: &mut Unpacked) {
    let (scales, mins) = six_bit_pairs(scales);
    for i in 0..16 {
        out.sub[i] = i16::from(scales[i / 2]);
        out.mins[i] = i16::from(mins[i / 2]);
    }
}

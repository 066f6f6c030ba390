//! Q5_0: `value = d * (q - 16)`, 5-bit q. Byte j holds the low nibbles of values j (low) and j + 16; bit i of
//! `qh` is the top bit of value i.

use super::bytes::layout;
use super::lanes::{Lanes, Words, spread_bits};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Raised, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

layout! {
    /// 32 values in 22 bytes.
    pub struct Q5_0 {
        /// Scale.
        d: F16,
        /// Top bits of codes plus 16.
        qh: [u8; 4],
        /// Low nibbles of codes plus 16.
        qs: [u8; 16],
    }
}

impl Block for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    /// The value of largest magnitude becomes code -16; ties of rounding go up.
    fn quantize(values: &[f32]) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let d = super::extreme(values) / -16.0;
        let inverse = super::inverse(d);
        let (qh, qs) = pack(values.map(|x| ((x * inverse + 16.5) as u8).min(31)));
        Some(Q5_0 { d: F16::from_f32(d), qh, qs })
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let Some(importance) = importance else { return Self::quantize(values) };
        let (d, q) = search::short(values.try_into().ok()?, importance, 16);
        let (qh, qs) = pack(q);
        Some(Q5_0 { d, qh, qs })
    }
}

impl Quantised for Q5_0 {
    type Shape = Groups<32, Raised<16>>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub[..2].fill(1);
        unpack_codes(&self.qh, &self.qs, out);
    }
}

impl Interleaved for Q5_0 {
    type Lanes = Lanes<2, 5, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        isa.or_i(lanes.nibbles(isa, 1 + k % 4, k / 4), spread_bits(isa, lanes.word(isa, 0), k))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

/// Writes 32 codes of -16 to 15.
#[inline(always)]
pub(super) fn unpack_codes(qh: &[u8; 4], qs: &[u8; 16], out: &mut Unpacked) {
    let (first, second) = (u16::from_le_bytes([qh[0], qh[1]]), u16::from_le_bytes([qh[2], qh[3]]));
    for j in 0..16 {
        // Without its top bit q - 16 is negative: all upper bits are set.
        let upper = |bits: u16| if bits & (1 << j) != 0 { 0 } else { 0xf0 };
        out.codes[j] = ((qs[j] & 15) | upper(first)) as i8;
        out.codes[j + 16] = ((qs[j] >> 4) | upper(second)) as i8;
    }
}

/// The `qh` and `qs` of 32 codes of 0 to 31.
pub(super) fn pack(codes: [u8; 32]) -> ([u8; 4], [u8; 16]) {
    let top = codes.iter().rev().fold(0u32, |bits, code| (bits << 1) | u32::from(code >> 4));
    (top.to_le_bytes(), core::array::from_fn(|j| (codes[j] & 15) | (codes[j + 16] << 4)))
}

//! Codes of four bits, by the formulas of [`crate::formats`]. Of each 32 codes, in the order in which they
//! lie, byte i has number i in its low half and number i + 16 in its high half, each plus 8.

use super::{BLOCK, Codes, KvFormat, PageShape};
use crate::formats::q4_0;
use crate::isa::Isa;
use crate::math;

/// Codes of four bits.
#[derive(Debug, Clone, Copy)]
pub struct Q4_0;

impl KvFormat for Q4_0 {
    type Raw = u8;
    const SCALED: bool = true;
    const PACKED: usize = 2;

    #[inline(always)]
    fn lanes<I: Isa, const R: usize>(isa: I, x: &[u8], at: usize) -> [I::F; R] {
        let x = x[at / BLOCK * 16..][..16 * R.div_ceil(2)].as_chunks::<16>().0;
        let mut lanes = [isa.splat(0.0); R];
        for (lanes, x) in lanes.chunks_mut(2).zip(x) {
            let halves = isa.load_nibbles(x);
            // One vector may be either half.
            let first = if R == 1 { at / 16 % 2 } else { 0 };
            lanes.copy_from_slice(&halves[first..first + lanes.len()]);
        }
        lanes
    }

    #[inline(always)]
    fn scales<I: Isa>(isa: I, page: &[u8], shape: PageShape, block: usize, slot: usize) -> I::F {
        Self::load_scales(isa, page, shape, block, slot)
    }

    fn write(page: &mut [u8], shape: PageShape, slot: usize, k: &[f32], v: &[f32]) {
        Self::write_codes(page, shape, slot, k, v);
    }
}

impl Codes for Q4_0 {
    fn quantise(x: &[f32; BLOCK]) -> (u16, [i8; BLOCK]) {
        let (scale, codes) = q4_0::codes(x);
        let finite = x.iter().all(|x| x.is_finite());
        (math::f32_to_f16(if finite { scale } else { f32::NAN }), codes.map(|code| code as i8))
    }

    fn put(page: &mut [u8], at: usize, code: i8) {
        let (byte, shift) = (&mut page[at / BLOCK * 16 + at % 16], at / 16 % 2 * 4);
        *byte = *byte & !(15 << shift) | (code as u8) << shift;
    }

    #[inline(always)]
    fn from_byte(byte: u8) -> u8 {
        byte
    }

    #[inline(always)]
    fn byte(raw: u8) -> u8 {
        raw
    }
}

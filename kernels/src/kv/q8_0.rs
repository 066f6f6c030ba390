//! Codes of eight bits, by the formulas of [`crate::activation`].

use super::{BLOCK, Codes, KvFormat, PageShape, loaded};
use crate::activation;
use crate::isa::Isa;

/// Codes of eight bits.
#[derive(Debug, Clone, Copy)]
pub struct Q8_0;

impl KvFormat for Q8_0 {
    type Raw = i8;
    const SCALED: bool = true;

    #[inline(always)]
    fn lanes<I: Isa, const R: usize>(isa: I, x: &[i8], at: usize) -> [I::F; R] {
        loaded(x, at, |x| isa.load_i8(x))
    }

    #[inline(always)]
    fn scales<I: Isa>(isa: I, page: &[i8], shape: PageShape, block: usize, slot: usize) -> I::F {
        Self::load_scales(isa, page, shape, block, slot)
    }

    fn write(page: &mut [i8], shape: PageShape, slot: usize, k: &[f32], v: &[f32]) {
        Self::write_codes(page, shape, slot, k, v);
    }
}

impl Codes for Q8_0 {
    fn quantise(x: &[f32; BLOCK]) -> (u16, [i8; BLOCK]) {
        activation::q8_0(x)
    }

    fn put(page: &mut [i8], at: usize, code: i8) {
        page[at] = code;
    }

    #[inline(always)]
    fn from_byte(byte: u8) -> i8 {
        byte as i8
    }

    #[inline(always)]
    fn byte(raw: i8) -> u8 {
        raw as u8
    }
}

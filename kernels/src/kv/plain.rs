//! Single and half precision.

use super::{KvFormat, PageShape, loaded, write_elements};
use crate::isa::Isa;
use crate::math;

/// Single precision.
#[derive(Debug, Clone, Copy)]
pub struct F32;

impl KvFormat for F32 {
    type Raw = f32;

    #[inline(always)]
    fn lanes<I: Isa, const R: usize>(isa: I, x: &[f32], at: usize) -> [I::F; R] {
        loaded(x, at, |x| isa.load(x))
    }

    fn write(page: &mut [f32], shape: PageShape, slot: usize, k: &[f32], v: &[f32]) {
        write_elements(page, shape, slot, k, v, |x| x);
    }
}

/// Half precision, rounded to nearest even.
#[derive(Debug, Clone, Copy)]
pub struct F16;

impl KvFormat for F16 {
    type Raw = u16;

    #[inline(always)]
    fn lanes<I: Isa, const R: usize>(isa: I, x: &[u16], at: usize) -> [I::F; R] {
        loaded(x, at, |x| isa.load_f16(x))
    }

    fn write(page: &mut [u16], shape: PageShape, slot: usize, k: &[f32], v: &[f32]) {
        write_elements(page, shape, slot, k, v, math::f32_to_f16);
    }
}

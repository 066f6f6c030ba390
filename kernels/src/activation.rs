//! Quantised activations: the right-hand side of every integer dot product.
//!
//! The formulas are GGML's: Q8_0 has `d = max|x| / 127` rounded to half precision and Q8_K has an f32 scale,
//! both with codes `round(x · 127 / max|x|)`, ties to even. (Q8_K as published carries the sign of the
//! largest element in its scale; codes and scale change sign together, so every product is the same.) The
//! layout is planar, and block sums are kept beside the codes for minimums and for codes that kernels hold
//! raised.
//!
//! A block whose largest magnitude is infinite or NaN gets the scale NaN and codes 0: it poisons its outputs
//! the same way on every instruction set.

pub use crate::formats::Activation;
use crate::isa::{Isa, Scalar, WithIsa, kernels};
use crate::math;

impl Activation {
    /// Values that share one scale.
    pub const fn block_len(self) -> usize {
        match self {
            Activation::Q8_0 => 32,
            Activation::Q8_K => 256,
        }
    }
}

/// Rows of activations in quantised form. Each row takes the place of a multiple of [`PADDING`] values, with
/// codes and sums of zero after its end, so that kernels read whole chunks.
#[derive(Debug, Clone, Copy)]
pub struct Quantised<'a> {
    /// Values of a row; a multiple of the block length.
    pub k: usize,
    /// Codes, `[rows][padded(k)]`; never -128.
    pub codes: &'a [i8],
    /// Scales, `[rows][padded(k) / block_len]`.
    pub scales: &'a [f32],
    /// [`SUMS`] numbers for each [`PADDING`] values: the sums of each 16 codes; of each 32; then the former
    /// as 8, and the latter as 4 pairs of 16-bit integers, of which number `2 i` has sums `4 i` (low) and
    /// `4 i + 2`, number `2 i + 1` sums `4 i + 1` and `4 i + 3`; then zeros.
    pub sums: &'a [i32],
}

/// Rows are padded to a multiple of this many values.
pub const PADDING: usize = 256;

/// Numbers kept in [`Quantised::sums`] for each [`PADDING`] values.
pub const SUMS: usize = 16 + 8 + 8 + 4 + 4;

/// The values that a row of `k` takes the place of.
pub const fn padded(k: usize) -> usize {
    k.next_multiple_of(PADDING)
}

/// Where [`Quantise`] writes; lengths as in [`Quantised`].
#[derive(Debug)]
pub struct QuantisedMut<'a> {
    /// Codes.
    pub codes: &'a mut [i8],
    /// Scales.
    pub scales: &'a mut [f32],
    /// Sums.
    pub sums: &'a mut [i32],
}

/// A kernel: quantises rows of values to one activation format, block by block.
#[derive(Debug)]
pub struct Quantise<'a> {
    /// The format.
    pub to: Activation,
    /// Values of a row; whole blocks.
    pub k: usize,
    /// `[rows][k]`.
    pub x: &'a [f32],
    /// Where the result goes.
    pub out: QuantisedMut<'a>,
}

kernels!(Quantise<'_>);

impl WithIsa for Quantise<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        if self.k == 0 {
            return;
        }
        let (width, blocks) = (padded(self.k), padded(self.k) / self.to.block_len());
        let out = self.out.codes.chunks_exact_mut(width).zip(self.out.scales.chunks_exact_mut(blocks));
        for ((x, (codes, scales)), sums) in
            self.x.chunks_exact(self.k).zip(out).zip(self.out.sums.chunks_exact_mut(width / PADDING * SUMS))
        {
            codes[self.k..].fill(0);
            scales[self.k / self.to.block_len()..].fill(0.0);
            match self.to {
                Activation::Q8_0 => quantise::<I, 2>(isa, x, codes, scales, |d, inverse| {
                    (math::f16_to_f32(math::f32_to_f16(d)), inverse)
                }),
                Activation::Q8_K => {
                    quantise::<I, 16>(isa, x, codes, scales, |_, inverse| (1.0 / inverse, inverse));
                }
            }
            let chunks = codes.as_chunks::<PADDING>().0.iter().zip(sums.as_chunks_mut::<SUMS>().0);
            chunks.for_each(|(codes, sums)| sum_up(codes, sums));
        }
    }
}

/// The sums of one chunk of codes.
#[inline(always)]
fn sum_up(codes: &[i8; PADDING], sums: &mut [i32; SUMS]) {
    for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<16>().0) {
        *sum = codes.iter().map(|&c| i32::from(c)).sum();
    }
    for g in 0..8 {
        sums[16 + g] = sums[2 * g] + sums[2 * g + 1];
    }
    let pair = |low: i32, high: i32| (low & 0xffff) | (high << 16);
    for i in 0..6 {
        // Four sums of 16, and further on of 32, become two pairs.
        sums[24 + 2 * i] = pair(sums[4 * i], sums[4 * i + 2]);
        sums[25 + 2 * i] = pair(sums[4 * i + 1], sums[4 * i + 3]);
    }
}

/// One block of Q8_0: its scale in half precision, and its codes.
pub fn q8_0(x: &[f32; 32]) -> (u16, [i8; 32]) {
    let (mut scale, mut codes) = ([0.0], [0; 32]);
    quantise::<Scalar, 2>(Scalar, x, &mut codes, &mut scale, |d, inverse| (d, inverse));
    (math::f32_to_f16(scale[0]), codes)
}

/// Blocks of `N` times 16 values. `scale` turns `(amax / 127, 127 / amax)` into the stored scale and the
/// factor.
#[inline(always)]
fn quantise<I: Isa, const N: usize>(
    isa: I,
    x: &[f32],
    codes: &mut [i8],
    scales: &mut [f32],
    scale: impl Fn(f32, f32) -> (f32, f32),
) {
    let x = x.as_chunks::<16>().0.as_chunks::<N>().0;
    let codes = codes.as_chunks_mut::<16>().0.as_chunks_mut::<N>().0;
    for ((x, codes), d) in x.iter().zip(codes).zip(scales) {
        // Magnitudes are compared as integers, in which order NaN is above infinity is above every number.
        let mut amax_bits = 0i32;
        for lanes in x {
            for &v in lanes {
                amax_bits = amax_bits.max((v.to_bits() & 0x7fff_ffff) as i32);
            }
        }
        let amax = f32::from_bits(amax_bits as u32);
        let (stored, factor) = scale(amax / 127.0, 127.0 / amax);
        if !amax.is_finite() || !factor.is_finite() {
            // Infinity or NaN poisons the block. Magnitudes so small that their inverse overflows are zero.
            *d = if amax.is_finite() { 0.0 } else { f32::NAN };
            *codes = [[0; 16]; N];
            continue;
        }
        *d = stored;
        let factor = isa.splat(factor);
        for (lanes, codes) in x.iter().zip(codes) {
            let mut rounded = [0i32; 16];
            isa.store_i(isa.to_i32(isa.mul(isa.load(lanes), factor)), &mut rounded);
            for (code, r) in codes.iter_mut().zip(rounded) {
                *code = r as i8;
            }
        }
    }
}

//! WebAssembly's vectors of 128 bits.

use super::{Isa, byte_pair_index, sixteen};
use crate::math;
use core::arch::wasm32::*;

/// The fixed-width SIMD of WebAssembly 2.0. A module that has its instructions only loads where they exist.
#[derive(Debug, Clone, Copy)]
pub struct Simd128(());

#[inline(always)]
fn four<T>(mut f: impl FnMut(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

/// Sixteen bytes, from vector number `i` on.
#[inline(always)]
fn load<T, const N: usize>(x: &[T; N], i: usize) -> v128 {
    const { assert!(size_of::<T>() * N >= 16) };
    let at = i * 16;
    assert!(at + 16 <= size_of::<T>() * N);
    // SAFETY: the bytes are inside the array, and a vector is plain bytes at any address.
    unsafe { v128_load(x.as_ptr().byte_add(at).cast()) }
}

/// The counterpart of [`load`].
#[inline(always)]
fn store<T, const N: usize>(x: &mut [T; N], i: usize, value: v128) {
    let at = i * 16;
    assert!(at + 16 <= size_of::<T>() * N);
    // SAFETY: as in `load`; `T` is a number, of which every bit pattern is one.
    unsafe { v128_store(x.as_mut_ptr().byte_add(at).cast(), value) };
}

/// Half precision in the low half of each lane to single, exactly.
#[inline(always)]
fn widen(x: v128) -> v128 {
    let magnitude = i32x4_shl(v128_and(x, i32x4_splat(0x7fff)), 13);
    let sign = i32x4_shl(v128_and(x, i32x4_splat(0x8000)), 16);
    // Exponents differ by 112; that of infinity and NaN becomes the largest.
    let finite = f32x4_mul(magnitude, f32x4_splat(f32::from_bits((112 + 127) << 23)));
    let is_finite = i32x4_lt(magnitude, i32x4_splat(0x7c00 << 13));
    let special = v128_or(magnitude, i32x4_splat(0x7f80_0000));
    v128_or(v128_bitselect(finite, special, is_finite), sign)
}

/// `a * b + c` in two lanes of f64, and whether rounding that to f32 would round twice: see [`math::fma`].
#[inline(always)]
fn sum(a: v128, b: v128, c: v128) -> (v128, v128) {
    let product = f64x2_mul(f64x2_promote_low_f32x4(a), f64x2_promote_low_f32x4(b));
    let sum = f64x2_add(product, f64x2_promote_low_f32x4(c));
    let is_tie = i64x2_eq(v128_and(sum, i64x2_splat(0x1fff_ffff)), i64x2_splat(0x1000_0000));
    let is_small = f64x2_lt(f64x2_abs(sum), f64x2_splat(f32::MIN_POSITIVE as f64));
    let is_zero = f64x2_eq(sum, f64x2_splat(0.0));
    (sum, v128_or(is_tie, v128_andnot(is_small, is_zero)))
}

/// `a * b + c`, rounded once.
#[inline(always)]
fn fma(a: v128, b: v128, c: v128) -> v128 {
    let high = |x| i32x4_shuffle::<2, 3, 2, 3>(x, x);
    let (low, low_doubt) = sum(a, b, c);
    let (high, high_doubt) = sum(high(a), high(b), high(c));
    if v128_any_true(v128_or(low_doubt, high_doubt)) {
        return fma_by_lane(a, b, c);
    }
    i32x4_shuffle::<0, 1, 4, 5>(f32x4_demote_f64x2_zero(low), f32x4_demote_f64x2_zero(high))
}

#[cold]
#[inline(never)]
fn fma_by_lane(a: v128, b: v128, c: v128) -> v128 {
    f32x4(
        math::fma(f32x4_extract_lane::<0>(a), f32x4_extract_lane::<0>(b), f32x4_extract_lane::<0>(c)),
        math::fma(f32x4_extract_lane::<1>(a), f32x4_extract_lane::<1>(b), f32x4_extract_lane::<1>(c)),
        math::fma(f32x4_extract_lane::<2>(a), f32x4_extract_lane::<2>(b), f32x4_extract_lane::<2>(c)),
        math::fma(f32x4_extract_lane::<3>(a), f32x4_extract_lane::<3>(b), f32x4_extract_lane::<3>(c)),
    )
}

/// The sums of adjacent lanes of `a`, then of `b`.
#[inline(always)]
fn add_pairs(a: v128, b: v128) -> v128 {
    i32x4_add(i32x4_shuffle::<0, 2, 4, 6>(a, b), i32x4_shuffle::<1, 3, 5, 7>(a, b))
}

impl Isa for Simd128 {
    const NAME: &'static str = "simd128";
    const SIGNED_BIAS: i32 = 0;
    const WIDE_TILES: bool = false;
    type F = [v128; 4];
    type I = [v128; 4];

    #[cfg(feature = "std")]
    fn detect() -> Option<Self> {
        Some(Simd128(()))
    }
    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [f32x4_splat(x); 4]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        four(|i| load(x, i))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; 16]) -> Self::F {
        let halves = [load(x, 0), load(x, 1)];
        four(|i| {
            let x = halves[i / 2];
            widen(if i % 2 == 0 { u32x4_extend_low_u16x8(x) } else { u32x4_extend_high_u16x8(x) })
        })
    }
    #[inline(always)]
    fn round_f16(self, x: Self::F) -> Self::F {
        let mut lanes = [0.0; 16];
        self.store(x, &mut lanes);
        for lane in &mut lanes {
            *lane = math::f16_to_f32(math::f32_to_f16(*lane));
        }
        self.load(&lanes)
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> Self::F {
        let halves = [load(x, 0), load(x, 1)];
        four(|i| {
            let x = halves[i / 2];
            i32x4_shl(if i % 2 == 0 { u32x4_extend_low_u16x8(x) } else { u32x4_extend_high_u16x8(x) }, 16)
        })
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> Self::F {
        let x = load(x, 0);
        let halves = [i16x8_extend_low_i8x16(x), i16x8_extend_high_i8x16(x)];
        four(|i| {
            let x = halves[i / 2];
            f32x4_convert_i32x4(if i % 2 == 0 {
                i32x4_extend_low_i16x8(x)
            } else {
                i32x4_extend_high_i16x8(x)
            })
        })
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; 16]) {
        for i in 0..4 {
            store(out, i, x[i]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        four(|i| f32x4_add(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        four(|i| f32x4_sub(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        four(|i| f32x4_mul(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        four(|i| f32x4_div(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        four(|i| fma(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // The instructions for a maximum have rules of their own for NaN and for zeros.
        self.select_gt(a, b, a, b)
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        four(|i| v128_bitselect(yes[i], no[i], f32x4_gt(a[i], b[i])))
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        four(|i| f32x4_abs(x[i]))
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let x = f32x4_add(f32x4_add(x[0], x[2]), f32x4_add(x[1], x[3]));
        let x = f32x4_add(x, i32x4_shuffle::<2, 3, 0, 1>(x, x));
        f32x4_extract_lane::<0>(x) + f32x4_extract_lane::<1>(x)
    }
    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        math::fma(a, b, c)
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [i32x4_splat(x); 4]
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; 16]) -> Self::I {
        four(|i| load(x, i))
    }
    #[inline(always)]
    fn store_i(self, x: Self::I, out: &mut [i32; 16]) {
        for i in 0..4 {
            store(out, i, x[i]);
        }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        four(|i| i32x4_add(a[i], b[i]))
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        four(|i| i32x4_sub(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        four(|i| i32x4_mul(a[i], b[i]))
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        four(|i| v128_and(a[i], b[i]))
    }
    #[inline(always)]
    fn shl_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        self.shl_by(x, BITS)
    }
    #[inline(always)]
    fn to_i32(self, x: Self::F) -> Self::I {
        four(|i| i32x4_trunc_sat_f32x4(f32x4_nearest(x[i])))
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I) -> Self::F {
        four(|i| f32x4_convert_i32x4(x[i]))
    }
    #[inline(always)]
    fn with_bits(self, x: Self::I) -> Self::F {
        x
    }
    #[inline(always)]
    fn low_f16(self, x: Self::I) -> Self::F {
        four(|i| widen(x[i]))
    }
    #[inline(always)]
    fn load_words(self, x: &[u8; 64]) -> Self::I {
        four(|i| load(x, i))
    }
    #[inline(always)]
    fn store_words(self, x: Self::I, out: &mut [u8; 64]) {
        for i in 0..4 {
            store(out, i, x[i]);
        }
    }
    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize) -> [Self::I; 4] {
        let Some(rows) = sixteen(rows, stride) else { return [self.splat_i(0); 4] };
        let quads = four(|i| {
            // SAFETY: sixteen bytes of each of sixteen rows are there.
            let [a, b, c, d] = four(|r| unsafe { v128_load(rows.add((4 * i + r) * stride).cast()) });
            let (ab, cd) = (i32x4_shuffle::<0, 4, 1, 5>(a, b), i32x4_shuffle::<0, 4, 1, 5>(c, d));
            let (ab_high, cd_high) = (i32x4_shuffle::<2, 6, 3, 7>(a, b), i32x4_shuffle::<2, 6, 3, 7>(c, d));
            [
                i64x2_shuffle::<0, 2>(ab, cd),
                i64x2_shuffle::<1, 3>(ab, cd),
                i64x2_shuffle::<0, 2>(ab_high, cd_high),
                i64x2_shuffle::<1, 3>(ab_high, cd_high),
            ]
        });
        four(|w| four(|i| quads[i][w]))
    }
    #[inline(always)]
    fn prefetch<const NEAR: bool, T>(self, _: &[T], _: usize) {}
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        four(|i| v128_or(a[i], b[i]))
    }
    #[inline(always)]
    fn shl_by(self, x: Self::I, bits: u32) -> Self::I {
        four(|i| i32x4_shl(x[i], bits))
    }
    #[inline(always)]
    fn shr_by(self, x: Self::I, bits: u32) -> Self::I {
        four(|i| u32x4_shr(x[i], bits))
    }
    #[inline(always)]
    fn sar_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        four(|i| i32x4_shr(x[i], BITS))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], x: Self::I) -> Self::I {
        let table = load(table, 0);
        four(|i| i8x16_swizzle(table, x[i]))
    }
    #[inline(always)]
    fn signed(self, codes: Self::I) -> Self::I {
        codes
    }
    #[inline(always)]
    fn dot4<const SIGNED: bool>(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        // Unsigned codes are at most 127, so both kinds read as signed bytes.
        four(|i| {
            let low = i32x4_extadd_pairwise_i16x8(i16x8_extmul_low_i8x16(codes[i], x[i]));
            let high = i32x4_extadd_pairwise_i16x8(i16x8_extmul_high_i8x16(codes[i], x[i]));
            i32x4_add(acc[i], add_pairs(low, high))
        })
    }
    #[inline(always)]
    fn dot2(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        four(|i| i32x4_add(acc[i], i32x4_dot_i16x8(w[i], x[i])))
    }
    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::I {
        four(|i| load(if i < 2 { a } else { b }, i % 2))
    }
    #[inline(always)]
    fn byte_masks(self, bits: [u32; 2]) -> Self::I {
        let bit = i64x2_splat(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
        let (low, high) = (
            i8x16(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            i8x16(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3),
        );
        four(|i| {
            let bytes = i8x16_swizzle(i32x4_splat(bits[i / 2] as i32), if i % 2 == 0 { low } else { high });
            i8x16_eq(v128_and(bytes, bit), bit)
        })
    }
    #[inline(always)]
    fn negate(self, x: Self::I, bits: [u32; 2]) -> Self::I {
        let negative = self.byte_masks(bits);
        four(|i| i8x16_sub(v128_xor(x[i], negative[i]), negative[i]))
    }
    #[inline(always)]
    fn load_nibble_halves(self, a: &[u8; 16], b: &[u8; 16]) -> Self::I {
        four(|i| {
            let x = load(if i < 2 { a } else { b }, 0);
            if i % 2 == 0 { v128_and(x, u8x16_splat(15)) } else { u8x16_shr(x, 4) }
        })
    }
    #[inline(always)]
    fn byte_pair(self, x: Self::I, bytes: [usize; 2]) -> Self::I {
        let index = load(&byte_pair_index(bytes), 0);
        four(|i| i16x8_shr(i8x16_swizzle(x[i], index), 8))
    }
    #[inline(always)]
    fn scales<const SAME: bool>(self, pairs: [i32; 2]) -> Self::I {
        four(|i| {
            let pair = pairs[i / 2];
            i32x4_splat(if SAME || i % 2 == 1 { pair >> 16 } else { i32::from(pair as i16) })
        })
    }
    #[inline(always)]
    fn sum_halves(self, x: &[[i32; 16]; 8]) -> Self::I {
        four(|i| {
            let row = |r: usize| {
                let lanes = &x[4 * (i % 2) + r];
                i32x4_add(load(lanes, 2 * (i / 2)), load(lanes, 2 * (i / 2) + 1))
            };
            add_pairs(add_pairs(row(0), row(1)), add_pairs(row(2), row(3)))
        })
    }
}

//! Instruction sets as tokens: a value of [`Avx2`] or [`Avx512`] can only exist where the CPU has the instructions.
//!
//! Kernels are written once over [`Isa`], whose vectors have 16 lanes on every instruction set. Each operation rounds
//! the same way everywhere, so a kernel's result is the same bits on all of them. (The idea of capability tokens is from
//! the `pulp` and `rten-simd` crates.)
//!
//! Vector code must be inlined into [`Isa::run`] to be compiled with the instructions. The array methods of `core` (`map`,
//! `from_fn`) are not reliably inlined: kernels loop over arrays of vectors instead.
#![allow(clippy::needless_range_loop, reason = "see above: loops by index are what inlines")]

use crate::math;

/// Sixteen lanes of arithmetic.
///
/// Multiply-add is fused, conversions to integer round to nearest even, and `max` returns its second operand unless the
/// first is greater.
pub trait Isa: Copy + Send + Sync + 'static {
    /// The name in [`Cpu::from_name`].
    const NAME: &'static str;
    /// What [`Isa::dot4`] wants added to each code byte: 0 for signed codes, 128 where the dot product takes unsigned ones.
    const CODE_BIAS: u8;
    /// Whether there are registers for tiles of two vectors of rows.
    const WIDE_TILES: bool;
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;

    /// Runs `f` compiled for this instruction set.
    fn run<R>(self, f: impl FnOnce() -> R) -> R;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Lanes from memory.
    fn load(self, x: &[f32; 16]) -> Self::F;
    /// Lanes from half-precision floats, exactly.
    fn load_f16(self, x: &[u16; 16]) -> Self::F;
    /// Each lane rounded to half precision, ties to even.
    fn round_f16(self, x: Self::F) -> Self::F;
    /// Lanes from bfloat16, exactly.
    fn load_bf16(self, x: &[u16; 16]) -> Self::F;
    /// Lanes to memory.
    fn store(self, x: Self::F, out: &mut [f32; 16]);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? yes : no`, lane by lane.
    fn select_gt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// `|x|`.
    fn abs(self, x: Self::F) -> Self::F;
    /// The sum of all lanes by a fixed tree: lanes i and i + 8, then i and i + 4, i + 2, i + 1.
    fn sum(self, x: Self::F) -> f32;

    /// `a * b + c` of single numbers, rounded once.
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32;

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// Lanes from memory.
    fn load_i(self, x: &[i32; 16]) -> Self::I;
    /// Lanes from 16-bit integers.
    fn load_i16(self, x: &[i16; 16]) -> Self::I;
    /// Lanes to memory.
    fn store_i(self, x: Self::I, out: &mut [i32; 16]);
    /// `a + b`, wrapping.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a * b`, wrapping.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// The sum of all lanes, wrapping.
    fn sum_i(self, x: Self::I) -> i32;
    /// `a & b`.
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `x << BITS`.
    fn shl_i<const BITS: u32>(self, x: Self::I) -> Self::I;
    /// Rounds to nearest even; undefined lanes beyond the range of i32.
    fn to_i32(self, x: Self::F) -> Self::I;
    /// Converts, rounding to nearest even.
    fn to_f32(self, x: Self::I) -> Self::F;
    /// The float with these bits.
    fn with_bits(self, x: Self::I) -> Self::F;

    /// `acc[lane] + Σ (codes[4 lane + i] - CODE_BIAS) · x[i] + CODE_BIAS · Σ x[i]` for i < 4: the dot of four code bytes
    /// of each lane with the four signed bytes of `x`. A caller that starts `acc` at `-CODE_BIAS · Σ x` gets the exact dot
    /// of signed codes.
    fn dot4(self, acc: Self::I, codes: &[u8; 64], x: [i8; 4]) -> Self::I;

    /// `acc[lane] + w[2 lane] · x[0] + w[2 lane + 1] · x[1]`.
    fn dot2(self, acc: Self::I, w: &[i16; 32], x: [i16; 2]) -> Self::I;

    /// The sixteen sums, in order, of products of 16 adjacent pairs: `out[g] = Σ codes[16 g + i] · x[16 g + i]`, where
    /// `sums[g] = Σ x[16 g + i]`.
    fn dot16(self, codes: &[i8; 256], x: &[i8; 256], sums: &[i32; 16]) -> Self::I;
    /// In both lanes of each adjacent pair their sum.
    fn add_pairs(self, x: Self::I) -> Self::I;
}

/// Plain scalar code: what every CPU can run.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

#[inline(always)]
fn map1<T: Copy, U>(x: [T; 16], f: impl Fn(T) -> U) -> [U; 16] {
    core::array::from_fn(|i| f(x[i]))
}

#[inline(always)]
fn map2<T: Copy, U>(a: [T; 16], b: [T; 16], f: impl Fn(T, T) -> U) -> [U; 16] {
    core::array::from_fn(|i| f(a[i], b[i]))
}

impl Isa for Scalar {
    const NAME: &'static str = "scalar";
    const CODE_BIAS: u8 = 0;
    const WIDE_TILES: bool = false;
    type F = [f32; 16];
    type I = [i32; 16];

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; 16]) -> Self::F {
        map1(*x, math::f16_to_f32)
    }
    #[inline(always)]
    fn round_f16(self, x: Self::F) -> Self::F {
        map1(x, |x| math::f16_to_f32(math::f32_to_f16(x)))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> Self::F {
        map1(*x, |bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; 16]) {
        *out = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        core::array::from_fn(|i| math::fma(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        core::array::from_fn(|i| if a[i] > b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        map1(x, |x| f32::from_bits(x.to_bits() & 0x7fff_ffff))
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let a: [f32; 8] = core::array::from_fn(|i| x[i] + x[i + 8]);
        let b: [f32; 4] = core::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        math::fma(a, b, c)
    }
    #[inline(always)]
    fn sum_i(self, x: Self::I) -> i32 {
        x.iter().fold(0, |sum, &x| sum.wrapping_add(x))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; 16]
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; 16]) -> Self::I {
        *x
    }
    #[inline(always)]
    fn load_i16(self, x: &[i16; 16]) -> Self::I {
        map1(*x, i32::from)
    }
    #[inline(always)]
    fn store_i(self, x: Self::I, out: &mut [i32; 16]) {
        *out = x;
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        map2(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        map2(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        map2(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shl_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        map1(x, |x| x << BITS)
    }
    #[inline(always)]
    fn to_i32(self, x: Self::F) -> Self::I {
        map1(x, math::round_to_i32)
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I) -> Self::F {
        map1(x, |x| x as f32)
    }
    #[inline(always)]
    fn with_bits(self, x: Self::I) -> Self::F {
        map1(x, |x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, codes: &[u8; 64], x: [i8; 4]) -> Self::I {
        core::array::from_fn(|lane| {
            let products: [i32; 4] =
                core::array::from_fn(|i| i32::from(codes[4 * lane + i] as i8) * i32::from(x[i]));
            acc[lane] + products.iter().sum::<i32>()
        })
    }
    #[inline(always)]
    fn dot2(self, acc: Self::I, w: &[i16; 32], x: [i16; 2]) -> Self::I {
        let product = |i: usize, j: usize| i32::from(w[i]) * i32::from(x[j]);
        core::array::from_fn(|lane| acc[lane] + product(2 * lane, 0) + product(2 * lane + 1, 1))
    }
    #[inline(always)]
    fn dot16(self, codes: &[i8; 256], x: &[i8; 256], _: &[i32; 16]) -> Self::I {
        let (codes, x) = (codes.as_chunks::<16>().0, x.as_chunks::<16>().0);
        core::array::from_fn(|g| (0..16).map(|i| i32::from(codes[g][i]) * i32::from(x[g][i])).sum())
    }
    #[inline(always)]
    fn add_pairs(self, x: Self::I) -> Self::I {
        core::array::from_fn(|i| x[i] + x[i ^ 1])
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Isa;
    use core::arch::x86_64::*;

    /// AVX2 with FMA and F16C (Haswell, Zen and later).
    #[derive(Debug, Clone, Copy)]
    pub struct Avx2(());

    /// AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake, Ice Lake, Zen 4 and later).
    #[derive(Debug, Clone, Copy)]
    pub struct Avx512(());

    impl Avx2 {
        /// The token, where the CPU has the instructions.
        #[cfg(feature = "std")]
        pub fn detect() -> Option<Self> {
            let all = std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c");
            all.then_some(Avx2(()))
        }
    }

    impl Avx512 {
        /// The token, where the CPU has the instructions.
        #[cfg(feature = "std")]
        pub fn detect() -> Option<Self> {
            let all = std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512dq")
                && std::arch::is_x86_feature_detected!("avx512vl")
                && std::arch::is_x86_feature_detected!("avx512vnni")
                && Avx2::detect().is_some();
            all.then_some(Avx512(()))
        }
    }

    /// Wraps intrinsics. The token that every method takes proves that the CPU has them.
    macro_rules! op {
        ($e:expr) => {
            // SAFETY: `self` exists only where the CPU has these instructions; pointers come from array references of
            // at least the size that is read or written, and unaligned forms are used.
            unsafe { $e }
        };
    }

    #[inline(always)]
    fn pair<T: Copy, U>(x: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
        [f(x[0]), f(x[1])]
    }

    #[inline(always)]
    fn both<T: Copy, U>(a: [T; 2], b: [T; 2], f: impl Fn(T, T) -> U) -> [U; 2] {
        [f(a[0], b[0]), f(a[1], b[1])]
    }

    impl Isa for Avx2 {
        const NAME: &'static str = "avx2";
        const CODE_BIAS: u8 = 0;
        const WIDE_TILES: bool = false;
        type F = [__m256; 2];
        type I = [__m256i; 2];

        #[inline(always)]
        fn run<R>(self, f: impl FnOnce() -> R) -> R {
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            fn inner<R>(f: impl FnOnce() -> R) -> R {
                f()
            }
            op!(inner(f))
        }
        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            op!([_mm256_set1_ps(x); 2])
        }
        #[inline(always)]
        fn load(self, x: &[f32; 16]) -> Self::F {
            let p = x.as_ptr();
            op!([_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))])
        }
        #[inline(always)]
        fn load_f16(self, x: &[u16; 16]) -> Self::F {
            let p = x.as_ptr().cast::<__m128i>();
            op!([_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))])
        }
        #[inline(always)]
        fn round_f16(self, x: Self::F) -> Self::F {
            op!(pair(x, |x| _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))))
        }
        #[inline(always)]
        fn load_bf16(self, x: &[u16; 16]) -> Self::F {
            let p = x.as_ptr().cast::<__m128i>();
            op!(pair([_mm_loadu_si128(p), _mm_loadu_si128(p.add(1))], |x| {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
            }))
        }
        #[inline(always)]
        fn store(self, x: Self::F, out: &mut [f32; 16]) {
            let p = out.as_mut_ptr();
            op!({
                _mm256_storeu_ps(p, x[0]);
                _mm256_storeu_ps(p.add(8), x[1]);
            })
        }
        #[inline(always)]
        fn add(self, a: Self::F, b: Self::F) -> Self::F {
            op!(both(a, b, |a, b| _mm256_add_ps(a, b)))
        }
        #[inline(always)]
        fn sub(self, a: Self::F, b: Self::F) -> Self::F {
            op!(both(a, b, |a, b| _mm256_sub_ps(a, b)))
        }
        #[inline(always)]
        fn mul(self, a: Self::F, b: Self::F) -> Self::F {
            op!(both(a, b, |a, b| _mm256_mul_ps(a, b)))
        }
        #[inline(always)]
        fn div(self, a: Self::F, b: Self::F) -> Self::F {
            op!(both(a, b, |a, b| _mm256_div_ps(a, b)))
        }
        #[inline(always)]
        fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            op!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
        }
        #[inline(always)]
        fn max(self, a: Self::F, b: Self::F) -> Self::F {
            op!(both(a, b, |a, b| _mm256_max_ps(a, b)))
        }
        #[inline(always)]
        fn select_gt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
            op!({
                let mask = both(a, b, |a, b| _mm256_cmp_ps::<_CMP_GT_OQ>(a, b));
                [_mm256_blendv_ps(no[0], yes[0], mask[0]), _mm256_blendv_ps(no[1], yes[1], mask[1])]
            })
        }
        #[inline(always)]
        fn abs(self, x: Self::F) -> Self::F {
            op!(pair(x, |x| _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)))
        }
        #[inline(always)]
        fn sum(self, x: Self::F) -> f32 {
            op!(sum8(_mm256_add_ps(x[0], x[1])))
        }
        #[inline(always)]
        fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
            op!(_mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))))
        }
        #[inline(always)]
        fn sum_i(self, x: Self::I) -> i32 {
            op!({
                let x = _mm256_add_epi32(x[0], x[1]);
                let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
                _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
            })
        }
        #[inline(always)]
        fn splat_i(self, x: i32) -> Self::I {
            op!([_mm256_set1_epi32(x); 2])
        }
        #[inline(always)]
        fn load_i(self, x: &[i32; 16]) -> Self::I {
            let p = x.as_ptr().cast::<__m256i>();
            op!([_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))])
        }
        #[inline(always)]
        fn load_i16(self, x: &[i16; 16]) -> Self::I {
            let p = x.as_ptr().cast::<__m128i>();
            op!([_mm256_cvtepi16_epi32(_mm_loadu_si128(p)), _mm256_cvtepi16_epi32(_mm_loadu_si128(p.add(1)))])
        }
        #[inline(always)]
        fn store_i(self, x: Self::I, out: &mut [i32; 16]) {
            let p = out.as_mut_ptr().cast::<__m256i>();
            op!({
                _mm256_storeu_si256(p, x[0]);
                _mm256_storeu_si256(p.add(1), x[1]);
            })
        }
        #[inline(always)]
        fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
            op!(both(a, b, |a, b| _mm256_add_epi32(a, b)))
        }
        #[inline(always)]
        fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
            op!(both(a, b, |a, b| _mm256_mullo_epi32(a, b)))
        }
        #[inline(always)]
        fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
            op!(both(a, b, |a, b| _mm256_and_si256(a, b)))
        }
        #[inline(always)]
        fn shl_i<const BITS: u32>(self, x: Self::I) -> Self::I {
            op!(pair(x, |x| _mm256_sll_epi32(x, _mm_cvtsi32_si128(BITS as i32))))
        }
        #[inline(always)]
        fn to_i32(self, x: Self::F) -> Self::I {
            op!(pair(x, |x| _mm256_cvtps_epi32(x)))
        }
        #[inline(always)]
        fn to_f32(self, x: Self::I) -> Self::F {
            op!(pair(x, |x| _mm256_cvtepi32_ps(x)))
        }
        #[inline(always)]
        fn with_bits(self, x: Self::I) -> Self::F {
            op!(pair(x, |x| _mm256_castsi256_ps(x)))
        }
        #[inline(always)]
        fn dot4(self, acc: Self::I, codes: &[u8; 64], x: [i8; 4]) -> Self::I {
            let p = codes.as_ptr().cast::<__m256i>();
            op!({
                let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(|b| b as u8)));
                let dots =
                    pair([_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))], |codes| dot_signed(codes, x));
                both(acc, dots, |acc, dot| _mm256_add_epi32(acc, dot))
            })
        }
        #[inline(always)]
        fn dot2(self, acc: Self::I, w: &[i16; 32], x: [i16; 2]) -> Self::I {
            let p = w.as_ptr().cast::<__m256i>();
            op!({
                let x = _mm256_set1_epi32(i32::from(x[0] as u16) | i32::from(x[1]) << 16);
                [
                    _mm256_add_epi32(acc[0], _mm256_madd_epi16(_mm256_loadu_si256(p), x)),
                    _mm256_add_epi32(acc[1], _mm256_madd_epi16(_mm256_loadu_si256(p.add(1)), x)),
                ]
            })
        }
        #[inline(always)]
        fn dot16(self, codes: &[i8; 256], x: &[i8; 256], _: &[i32; 16]) -> Self::I {
            let (c, x) = (codes.as_ptr().cast::<__m256i>(), x.as_ptr().cast::<__m256i>());
            op!({
                // Each vector holds two groups, one a 128-bit lane; two levels of pairwise sums leave group 2i + lane.
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                let mut out = [order; 2];
                for half in 0..2 {
                    let mut dots = [order; 4];
                    for i in 0..4 {
                        let at = 4 * half + i;
                        dots[i] = dot_signed(_mm256_loadu_si256(c.add(at)), _mm256_loadu_si256(x.add(at)));
                    }
                    let sums = _mm256_hadd_epi32(
                        _mm256_hadd_epi32(dots[0], dots[1]),
                        _mm256_hadd_epi32(dots[2], dots[3]),
                    );
                    out[half] = _mm256_permutevar8x32_epi32(sums, order);
                }
                out
            })
        }
        #[inline(always)]
        fn add_pairs(self, x: Self::I) -> Self::I {
            op!(pair(x, |x| _mm256_add_epi32(x, _mm256_shuffle_epi32::<0b10_11_00_01>(x))))
        }
    }

    /// The dots of four adjacent signed bytes in each 32-bit lane; neither operand's products pass 2 · 128 · 127 as long
    /// as `x` is never -128, so the 16-bit step cannot saturate.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn dot_signed(codes: __m256i, x: __m256i) -> __m256i {
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn sum8(x: __m256) -> f32 {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        let x = _mm_add_ss(x, _mm_movehdup_ps(x));
        _mm_cvtss_f32(x)
    }

    impl Isa for Avx512 {
        const NAME: &'static str = "avx512";
        const CODE_BIAS: u8 = 128;
        const WIDE_TILES: bool = true;
        type F = __m512;
        type I = __m512i;

        #[inline(always)]
        fn run<R>(self, f: impl FnOnce() -> R) -> R {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            #[inline]
            fn inner<R>(f: impl FnOnce() -> R) -> R {
                f()
            }
            op!(inner(f))
        }
        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            op!(_mm512_set1_ps(x))
        }
        #[inline(always)]
        fn load(self, x: &[f32; 16]) -> Self::F {
            op!(_mm512_loadu_ps(x.as_ptr()))
        }
        #[inline(always)]
        fn load_f16(self, x: &[u16; 16]) -> Self::F {
            op!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
        }
        #[inline(always)]
        fn round_f16(self, x: Self::F) -> Self::F {
            op!(_mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)))
        }
        #[inline(always)]
        fn load_bf16(self, x: &[u16; 16]) -> Self::F {
            op!({
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            })
        }
        #[inline(always)]
        fn store(self, x: Self::F, out: &mut [f32; 16]) {
            op!(_mm512_storeu_ps(out.as_mut_ptr(), x))
        }
        #[inline(always)]
        fn add(self, a: Self::F, b: Self::F) -> Self::F {
            op!(_mm512_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(self, a: Self::F, b: Self::F) -> Self::F {
            op!(_mm512_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(self, a: Self::F, b: Self::F) -> Self::F {
            op!(_mm512_mul_ps(a, b))
        }
        #[inline(always)]
        fn div(self, a: Self::F, b: Self::F) -> Self::F {
            op!(_mm512_div_ps(a, b))
        }
        #[inline(always)]
        fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            op!(_mm512_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn max(self, a: Self::F, b: Self::F) -> Self::F {
            op!(_mm512_max_ps(a, b))
        }
        #[inline(always)]
        fn select_gt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
            op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), no, yes))
        }
        #[inline(always)]
        fn abs(self, x: Self::F) -> Self::F {
            op!(_mm512_abs_ps(x))
        }
        #[inline(always)]
        fn sum(self, x: Self::F) -> f32 {
            op!(sum8(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x))))
        }
        #[inline(always)]
        fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
            op!(_mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))))
        }
        #[inline(always)]
        fn sum_i(self, x: Self::I) -> i32 {
            op!(_mm512_reduce_add_epi32(x))
        }
        #[inline(always)]
        fn splat_i(self, x: i32) -> Self::I {
            op!(_mm512_set1_epi32(x))
        }
        #[inline(always)]
        fn load_i(self, x: &[i32; 16]) -> Self::I {
            op!(_mm512_loadu_si512(x.as_ptr().cast()))
        }
        #[inline(always)]
        fn load_i16(self, x: &[i16; 16]) -> Self::I {
            op!(_mm512_cvtepi16_epi32(_mm256_loadu_si256(x.as_ptr().cast())))
        }
        #[inline(always)]
        fn store_i(self, x: Self::I, out: &mut [i32; 16]) {
            op!(_mm512_storeu_si512(out.as_mut_ptr().cast(), x))
        }
        #[inline(always)]
        fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
            op!(_mm512_add_epi32(a, b))
        }
        #[inline(always)]
        fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
            op!(_mm512_mullo_epi32(a, b))
        }
        #[inline(always)]
        fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
            op!(_mm512_and_si512(a, b))
        }
        #[inline(always)]
        fn shl_i<const BITS: u32>(self, x: Self::I) -> Self::I {
            op!(_mm512_slli_epi32::<BITS>(x))
        }
        #[inline(always)]
        fn to_i32(self, x: Self::F) -> Self::I {
            op!(_mm512_cvtps_epi32(x))
        }
        #[inline(always)]
        fn to_f32(self, x: Self::I) -> Self::F {
            op!(_mm512_cvtepi32_ps(x))
        }
        #[inline(always)]
        fn with_bits(self, x: Self::I) -> Self::F {
            op!(_mm512_castsi512_ps(x))
        }
        #[inline(always)]
        fn dot4(self, acc: Self::I, codes: &[u8; 64], x: [i8; 4]) -> Self::I {
            op!({
                let x = _mm512_set1_epi32(i32::from_le_bytes(x.map(|b| b as u8)));
                _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(codes.as_ptr().cast()), x)
            })
        }
        #[inline(always)]
        fn dot2(self, acc: Self::I, w: &[i16; 32], x: [i16; 2]) -> Self::I {
            op!({
                let x = _mm512_set1_epi32(i32::from(x[0] as u16) | i32::from(x[1]) << 16);
                _mm512_dpwssd_epi32(acc, _mm512_loadu_si512(w.as_ptr().cast()), x)
            })
        }
        #[inline(always)]
        fn dot16(self, codes: &[i8; 256], x: &[i8; 256], x_sums: &[i32; 16]) -> Self::I {
            let (c, x) = (codes.as_ptr().cast::<__m512i>(), x.as_ptr().cast::<__m512i>());
            op!({
                let bias = _mm512_set1_epi8(-128);
                let zero = _mm512_setzero_si512();
                let mut dots = [zero; 4];
                for (i, dot) in dots.iter_mut().enumerate() {
                    let x = _mm512_loadu_si512(x.add(i));
                    let biased = _mm512_xor_si512(_mm512_loadu_si512(c.add(i)), bias);
                    *dot = _mm512_dpbusd_epi32(zero, biased, x);
                }
                let low = _mm512_add_epi32(
                    _mm512_unpacklo_epi32(dots[0], dots[1]),
                    _mm512_unpackhi_epi32(dots[0], dots[1]),
                );
                let high = _mm512_add_epi32(
                    _mm512_unpacklo_epi32(dots[2], dots[3]),
                    _mm512_unpackhi_epi32(dots[2], dots[3]),
                );
                // Lane 4 l + v now holds group 4 v + l.
                let sums =
                    _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
                let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                // The bias is taken out again: 128 for each activation.
                let excess = _mm512_slli_epi32::<7>(_mm512_loadu_si512(x_sums.as_ptr().cast()));
                _mm512_sub_epi32(_mm512_permutexvar_epi32(order, sums), excess)
            })
        }
        #[inline(always)]
        fn add_pairs(self, x: Self::I) -> Self::I {
            op!(_mm512_add_epi32(x, _mm512_shuffle_epi32::<0b10_11_00_01>(x)))
        }
    }
}

/// The instruction sets that this CPU can run, best last, as one value.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Cpu {
    /// No vector instructions beyond the target's baseline.
    Scalar(Scalar),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// A kernel call that works with any instruction set.
pub trait WithIsa {
    /// What it returns.
    type Out;
    /// The kernel.
    fn call<I: Isa>(self, isa: I) -> Self::Out;
}

impl Cpu {
    /// Names of the instruction sets that exist for this target, slowest first.
    pub const NAMES: &'static [&'static str] = {
        #[cfg(target_arch = "x86_64")]
        let names = &["scalar", "avx2", "avx512"];
        #[cfg(not(target_arch = "x86_64"))]
        let names = &["scalar"];
        names
    };

    /// The best that the CPU has.
    #[cfg(feature = "std")]
    pub fn detect() -> Cpu {
        Cpu::NAMES.iter().rev().find_map(|name| Cpu::from_name(name)).unwrap_or(Cpu::Scalar(Scalar))
    }

    /// The named one, if the CPU has it.
    #[cfg(feature = "std")]
    pub fn from_name(name: &str) -> Option<Cpu> {
        match name {
            "scalar" => Some(Cpu::Scalar(Scalar)),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Avx2::detect().map(Cpu::Avx2),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::detect().map(Cpu::Avx512),
            _ => None,
        }
    }

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Cpu::Scalar(_) => Scalar::NAME,
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx2(_) => Avx2::NAME,
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx512(_) => Avx512::NAME,
        }
    }

    /// Runs a kernel with this instruction set.
    #[inline]
    pub fn run<K: WithIsa>(self, kernel: K) -> K::Out {
        match self {
            Cpu::Scalar(isa) => kernel.call(isa),
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx2(isa) => isa.run(
                #[inline(always)]
                || kernel.call(isa),
            ),
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx512(isa) => isa.run(
                #[inline(always)]
                || kernel.call(isa),
            ),
        }
    }
}

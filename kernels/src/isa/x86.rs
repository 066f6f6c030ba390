//! AVX2 and AVX-512.
#![allow(clippy::needless_range_loop, reason = "loops by index are what inlines; see `isa`")]

use super::{Isa, byte_pair_index, sixteen};
use core::arch::x86_64::*;

/// AVX2 with FMA and F16C (Haswell, Zen and later), if `VNNI` with AVX-VNNI (Alder Lake, Zen 5 and later).
#[derive(Debug, Clone, Copy)]
pub struct Avx2<const VNNI: bool>(());

/// AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake, Ice Lake, Zen 4 and later).
#[derive(Debug, Clone, Copy)]
pub struct Avx512 {
    /// Whether there are permutations of bytes (VBMI; all but Cascade Lake).
    vbmi: bool,
}

/// Wraps intrinsics. The token that every method takes proves that the CPU has them.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` exists only where the CPU has these instructions; pointers come from array
        // references of at least the size that is read or written, and unaligned forms are used.
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

impl<const VNNI: bool> Isa for Avx2<VNNI> {
    const NAME: &'static str = if VNNI { "avxvnni" } else { "avx2" };
    const SIGNED_BIAS: i32 = if VNNI { 128 } else { 0 };
    const WIDE_TILES: bool = false;
    type F = [__m256; 2];
    type I = [__m256i; 2];

    #[cfg(feature = "std")]
    fn detect() -> Option<Self> {
        let all = std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("fma")
            && std::arch::is_x86_feature_detected!("f16c")
            && (!VNNI || std::arch::is_x86_feature_detected!("avxvnni"));
        all.then_some(Avx2(()))
    }
    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn inner<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        #[inline]
        fn with_vnni<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        op!(if VNNI { with_vnni(f) } else { inner(f) })
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
    fn load_i8(self, x: &[i8; 16]) -> Self::F {
        let p = x.as_ptr().cast::<__m128i>();
        op!({
            let x = _mm_loadu_si128(p);
            pair([x, _mm_unpackhi_epi64(x, x)], |x| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)))
        })
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
    fn largest(self, x: Self::F) -> f32 {
        op!(largest8(_mm256_max_ps(x[0], x[1])))
    }
    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        op!(_mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))))
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
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        op!(both(a, b, |a, b| _mm256_sub_epi32(a, b)))
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
    fn low_f16(self, x: Self::I) -> Self::F {
        op!(pair(x, |x| {
            let halves =
                _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
            _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b00_00_10_00>(halves)))
        }))
    }
    #[inline(always)]
    fn load_words(self, x: &[u8; 64]) -> Self::I {
        let p = x.as_ptr().cast::<__m256i>();
        op!([_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))])
    }
    #[inline(always)]
    fn store_words(self, x: Self::I, out: &mut [u8; 64]) {
        let p = out.as_mut_ptr().cast::<__m256i>();
        op!({
            _mm256_storeu_si256(p, x[0]);
            _mm256_storeu_si256(p.add(1), x[1]);
        })
    }
    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize) -> [Self::I; 4] {
        let Some(rows) = sixteen(rows, stride) else { return [self.splat_i(0); 4] };
        let stride = opaque(stride);
        op!({
            let load = |r: usize| _mm_loadu_si128(rows.add(r * stride).cast());
            let mut out = [[_mm256_setzero_si256(); 2]; 4];
            for half in 0..2 {
                // Rows i and i + 4 side by side: after the transposition of each 128-bit lane, rows are in
                // order.
                let two = |i: usize| {
                    _mm256_inserti128_si256::<1>(
                        _mm256_castsi128_si256(load(8 * half + i)),
                        load(8 * half + i + 4),
                    )
                };
                let (a, b, c, d) = (two(0), two(1), two(2), two(3));
                let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                out[0][half] = _mm256_unpacklo_epi64(ab, cd);
                out[1][half] = _mm256_unpackhi_epi64(ab, cd);
                let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                out[2][half] = _mm256_unpacklo_epi64(ab, cd);
                out[3][half] = _mm256_unpackhi_epi64(ab, cd);
            }
            out
        })
    }
    #[inline(always)]
    fn prefetch<const NEAR: bool, T>(self, place: &[T], ahead: usize) {
        let line = place.as_ptr().wrapping_byte_add(ahead).cast();
        if NEAR { op!(_mm_prefetch::<_MM_HINT_T0>(line)) } else { op!(_mm_prefetch::<_MM_HINT_T1>(line)) }
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        op!(both(a, b, |a, b| _mm256_or_si256(a, b)))
    }
    #[inline(always)]
    fn shl_by(self, x: Self::I, bits: u32) -> Self::I {
        op!(pair(x, |x| _mm256_sll_epi32(x, _mm_cvtsi32_si128(bits as i32))))
    }
    #[inline(always)]
    fn shr_by(self, x: Self::I, bits: u32) -> Self::I {
        op!(pair(x, |x| _mm256_srl_epi32(x, _mm_cvtsi32_si128(bits as i32))))
    }
    #[inline(always)]
    fn sar_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        op!(pair(x, |x| _mm256_sra_epi32(x, _mm_cvtsi32_si128(BITS as i32))))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], x: Self::I) -> Self::I {
        op!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, x[0]), _mm256_shuffle_epi8(table, x[1])]
        })
    }
    #[inline(always)]
    fn signed(self, codes: Self::I) -> Self::I {
        if VNNI { op!(pair(codes, |x| _mm256_xor_si256(x, _mm256_set1_epi8(-128)))) } else { codes }
    }
    #[inline(always)]
    fn dot4<const SIGNED: bool>(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        op!(if VNNI {
            [_mm256_dpbusd_avx_epi32(acc[0], codes[0], x[0]), _mm256_dpbusd_avx_epi32(acc[1], codes[1], x[1])]
        } else {
            [dot_bytes::<SIGNED>(acc[0], codes[0], x[0]), dot_bytes::<SIGNED>(acc[1], codes[1], x[1])]
        })
    }
    #[inline(always)]
    fn dot2(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        op!([
            _mm256_add_epi32(acc[0], _mm256_madd_epi16(w[0], x[0])),
            _mm256_add_epi32(acc[1], _mm256_madd_epi16(w[1], x[1])),
        ])
    }
    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::I {
        op!([_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())])
    }
    #[inline(always)]
    fn byte_masks(self, bits: [u32; 2]) -> Self::I {
        op!(pair(
            bits,
            #[inline(always)]
            |bits| {
                // Each byte gets the byte of bits that has its bit.
                let bytes = _mm256_shuffle_epi8(
                    _mm256_set1_epi32(bits as i32),
                    _mm256_setr_epi64x(
                        0,
                        0x0101_0101_0101_0101,
                        0x0202_0202_0202_0202,
                        0x0303_0303_0303_0303,
                    ),
                );
                let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit)
            }
        ))
    }
    #[inline(always)]
    fn negate(self, x: Self::I, bits: [u32; 2]) -> Self::I {
        let negative = self.byte_masks(bits);
        op!(both(x, negative, |x, negative| _mm256_sub_epi8(_mm256_xor_si256(x, negative), negative)))
    }
    #[inline(always)]
    fn load_nibble_halves(self, a: &[u8; 16], b: &[u8; 16]) -> Self::I {
        op!(pair(
            [a, b],
            #[inline(always)]
            |x| {
                let twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(x.as_ptr().cast()));
                let shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
                _mm256_and_si256(shifted, _mm256_set1_epi8(15))
            }
        ))
    }
    #[inline(always)]
    fn byte_pair(self, x: Self::I, bytes: [usize; 2]) -> Self::I {
        let index = byte_pair_index(bytes);
        op!({
            let index = _mm256_broadcastsi128_si256(_mm_loadu_si128(index.as_ptr().cast()));
            pair(
                x,
                #[inline(always)]
                |x| _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(x, index)),
            )
        })
    }
    #[inline(always)]
    fn scales<const SAME: bool>(self, pairs: [i32; 2]) -> Self::I {
        op!(pair(
            pairs,
            #[inline(always)]
            |x| {
                let x = _mm256_set1_epi32(x);
                if SAME {
                    return x;
                }
                let (low, high) = (0x0100_0100, 0x0302_0302);
                _mm256_shuffle_epi8(x, _mm256_setr_epi32(low, low, low, low, high, high, high, high))
            }
        ))
    }
    #[inline(always)]
    fn dot4_scaled<const SIGNED: bool>(
        self,
        acc: Self::I,
        codes: Self::I,
        x: Self::I,
        scales: Self::I,
    ) -> Self::I {
        let mut out = acc;
        for i in 0..2 {
            out[i] = op!(if VNNI && SIGNED {
                let dots = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes[i], x[i]);
                _mm256_add_epi32(acc[i], _mm256_mullo_epi32(dots, _mm256_srai_epi32::<16>(scales[i])))
            } else if VNNI {
                _mm256_dpwssd_avx_epi32(acc[i], _mm256_maddubs_epi16(codes[i], x[i]), scales[i])
            } else {
                let dots = dot_pairs::<SIGNED>(codes[i], x[i]);
                _mm256_add_epi32(acc[i], _mm256_madd_epi16(dots, scales[i]))
            });
        }
        out
    }
    #[inline(always)]
    fn look_up_quads<const N: usize>(
        self,
        points: &[u32; N],
        _: &[[u8; N]; 4],
        indices: &[u16; 64],
        out: &mut [[u8; 4]; 64],
    ) {
        op!(insert_quads(points, indices, out));
    }
    #[inline(always)]
    fn sum_halves(self, x: &[[i32; 16]; 8]) -> Self::I {
        let mut sums = self.splat_i(0);
        for half in 0..2 {
            op!({
                let mut rows = [_mm256_setzero_si256(); 8];
                for r in 0..8 {
                    rows[r] = _mm256_loadu_si256(x[r].as_ptr().add(8 * half).cast());
                }
                // Two rows in each 128-bit lane, then four.
                for i in 0..4 {
                    let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                    rows[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                }
                for i in 0..2 {
                    let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                    rows[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
                }
                sums[half] = _mm256_add_epi32(
                    _mm256_permute2x128_si256::<0x20>(rows[0], rows[1]),
                    _mm256_permute2x128_si256::<0x31>(rows[0], rows[1]),
                );
            });
        }
        sums
    }
}

/// [`Isa::look_up_quads`], each point put in its place in a vector.
#[inline(never)]
#[target_feature(enable = "avx2")]
fn insert_quads<const N: usize>(points: &[u32; N], indices: &[u16; 64], out: &mut [[u8; 4]; 64]) {
    for (out, four) in out.as_chunks_mut::<4>().0.iter_mut().zip(indices.as_chunks::<4>().0) {
        let [a, b, c, d] = four.map(|i| points[usize::from(i) % N] as i32);
        let x = _mm_insert_epi32::<2>(_mm_insert_epi32::<1>(_mm_cvtsi32_si128(a), b), c);
        // SAFETY: writes an array of 16 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_insert_epi32::<3>(x, d)) };
    }
}

/// The same number, of which the compiler knows nothing: otherwise it keeps sixteen multiples of a stride in
/// memory.
#[inline(always)]
fn opaque(mut x: usize) -> usize {
    // SAFETY: no instruction.
    unsafe { core::arch::asm!("/* {0} */", inout(reg) x, options(nomem, nostack, preserves_flags)) };
    x
}

/// The dots of two adjacent bytes in each 16-bit lane. No sum of two products passes 2 · 128 · 127, so it
/// cannot saturate.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_pairs<const SIGNED: bool>(codes: __m256i, x: __m256i) -> __m256i {
    if SIGNED {
        _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes))
    } else {
        _mm256_maddubs_epi16(codes, x)
    }
}

/// `acc` plus the dots of four adjacent bytes in each 32-bit lane.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_bytes<const SIGNED: bool>(acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    _mm256_add_epi32(acc, _mm256_madd_epi16(dot_pairs::<SIGNED>(codes, x), _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn largest8(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
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
    const SIGNED_BIAS: i32 = 128;
    const WIDE_TILES: bool = true;
    type F = __m512;
    type I = __m512i;

    #[cfg(feature = "std")]
    fn detect() -> Option<Self> {
        let all = std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512vnni")
            && Avx2::<false>::detect().is_some();
        all.then(|| Avx512 { vbmi: std::arch::is_x86_feature_detected!("avx512vbmi") })
    }
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
    fn load_i8(self, x: &[i8; 16]) -> Self::F {
        op!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }
    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 16]) -> [Self::F; 2] {
        const TABLE: [f32; 16] =
            [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        // A permutation looks at the low four bits of its indices.
        op!({
            let x = _mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let table = _mm512_loadu_ps(TABLE.as_ptr());
            [x, _mm512_srli_epi32::<4>(x)].map(|x| _mm512_permutexvar_ps(x, table))
        })
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
    fn largest(self, x: Self::F) -> f32 {
        op!(largest8(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x))))
    }
    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        op!(_mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))))
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
    fn store_i(self, x: Self::I, out: &mut [i32; 16]) {
        op!(_mm512_storeu_si512(out.as_mut_ptr().cast(), x))
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_sub_epi32(a, b))
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
    fn low_f16(self, x: Self::I) -> Self::F {
        op!(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)))
    }
    #[inline(always)]
    fn load_words(self, x: &[u8; 64]) -> Self::I {
        op!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_words(self, x: Self::I, out: &mut [u8; 64]) {
        op!(_mm512_storeu_si512(out.as_mut_ptr().cast(), x))
    }
    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize) -> [Self::I; 4] {
        let Some(rows) = sixteen(rows, stride) else { return [self.splat_i(0); 4] };
        let stride = opaque(stride);
        op!({
            // Rows i, i + 4, i + 8 and i + 12 side by side: after the transposition of each 128-bit lane,
            // rows are in order.
            let four = |i: usize| {
                let load = |r: usize| _mm_loadu_si128(rows.add(r * stride).cast());
                let x = _mm512_castsi128_si512(load(i));
                let x = _mm512_mask_broadcast_i32x4(x, 0x00f0, load(i + 4));
                let x = _mm512_mask_broadcast_i32x4(x, 0x0f00, load(i + 8));
                _mm512_mask_broadcast_i32x4(x, 0xf000, load(i + 12))
            };
            let (a, b, c, d) = (four(0), four(1), four(2), four(3));
            let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (low2, high2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(low, low2),
                _mm512_unpackhi_epi64(low, low2),
                _mm512_unpacklo_epi64(high, high2),
                _mm512_unpackhi_epi64(high, high2),
            ]
        })
    }
    #[inline(always)]
    fn prefetch<const NEAR: bool, T>(self, place: &[T], ahead: usize) {
        let line = place.as_ptr().wrapping_byte_add(ahead).cast();
        if NEAR { op!(_mm_prefetch::<_MM_HINT_T0>(line)) } else { op!(_mm_prefetch::<_MM_HINT_T1>(line)) }
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn shl_by(self, x: Self::I, bits: u32) -> Self::I {
        op!(_mm512_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)))
    }
    #[inline(always)]
    fn shr_by(self, x: Self::I, bits: u32) -> Self::I {
        op!(_mm512_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)))
    }
    #[inline(always)]
    fn sar_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        op!(_mm512_srai_epi32::<BITS>(x))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], x: Self::I) -> Self::I {
        op!(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), x))
    }
    #[inline(always)]
    fn signed(self, codes: Self::I) -> Self::I {
        op!(_mm512_xor_si512(codes, _mm512_set1_epi8(-128)))
    }
    #[inline(always)]
    fn dot4<const SIGNED: bool>(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        op!(_mm512_dpbusd_epi32(acc, codes, x))
    }
    #[inline(always)]
    fn dot2(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        op!(_mm512_dpwssd_epi32(acc, w, x))
    }
    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::I {
        op!(halves(_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())))
    }
    #[inline(always)]
    fn byte_masks(self, bits: [u32; 2]) -> Self::I {
        op!(_mm512_movm_epi8(u64::from(bits[0]) | (u64::from(bits[1]) << 32)))
    }
    #[inline(always)]
    fn negate(self, x: Self::I, bits: [u32; 2]) -> Self::I {
        let negative = u64::from(bits[0]) | (u64::from(bits[1]) << 32);
        op!(_mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x))
    }
    #[inline(always)]
    fn load_nibble_halves(self, a: &[u8; 16], b: &[u8; 16]) -> Self::I {
        op!({
            let (a, b) = (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()));
            let twice = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(a), 0xff00, b);
            let shifted = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
            _mm512_and_si512(shifted, _mm512_set1_epi8(15))
        })
    }
    #[inline(always)]
    fn byte_pair(self, x: Self::I, bytes: [usize; 2]) -> Self::I {
        let index = byte_pair_index(bytes);
        op!({
            let index = _mm512_broadcast_i32x4(_mm_loadu_si128(index.as_ptr().cast()));
            _mm512_srai_epi16::<8>(_mm512_shuffle_epi8(x, index))
        })
    }
    #[inline(always)]
    fn scales<const SAME: bool>(self, pairs: [i32; 2]) -> Self::I {
        op!({
            let x = _mm512_mask_set1_epi32(_mm512_set1_epi32(pairs[0]), 0xff00, pairs[1]);
            if SAME {
                return x;
            }
            let index = _mm512_broadcast_i64x4(_mm256_setr_epi32(
                0x0100_0100,
                0x0100_0100,
                0x0100_0100,
                0x0100_0100,
                0x0302_0302,
                0x0302_0302,
                0x0302_0302,
                0x0302_0302,
            ));
            _mm512_shuffle_epi8(x, index)
        })
    }
    #[inline(always)]
    fn dot4_scaled<const SIGNED: bool>(
        self,
        acc: Self::I,
        codes: Self::I,
        x: Self::I,
        scales: Self::I,
    ) -> Self::I {
        op!(if SIGNED {
            let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x);
            _mm512_add_epi32(acc, _mm512_mullo_epi32(dots, _mm512_srai_epi32::<16>(scales)))
        } else {
            _mm512_dpwssd_epi32(acc, _mm512_maddubs_epi16(codes, x), scales)
        })
    }
    #[inline(always)]
    fn look_up_quads<const N: usize>(
        self,
        points: &[u32; N],
        planes: &[[u8; N]; 4],
        indices: &[u16; 64],
        out: &mut [[u8; 4]; 64],
    ) {
        if self.vbmi {
            op!(permute_quads(planes, indices, out));
        } else {
            op!(insert_quads(points, indices, out));
        }
    }
    #[inline(always)]
    fn sum_halves(self, x: &[[i32; 16]; 8]) -> Self::I {
        op!({
            let mut rows = [_mm512_setzero_si512(); 8];
            for r in 0..8 {
                rows[r] = self.load_i(&x[r]);
            }
            // Two rows in each 128-bit lane, then four.
            for i in 0..4 {
                let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                rows[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            }
            for i in 0..2 {
                let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                rows[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
            }
            let sums = _mm512_add_epi32(
                _mm512_shuffle_i32x4::<0b10_00_10_00>(rows[0], rows[1]),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(rows[0], rows[1]),
            );
            _mm512_shuffle_i32x4::<0b11_01_10_00>(sums, sums)
        })
    }
}

/// Two halves as one vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(a: __m256i, b: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
}

/// [`Isa::look_up_quads`] by permutations of bytes, which find 64 magnitudes among 128.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn permute_quads<const N: usize>(planes: &[[u8; N]; 4], indices: &[u16; 64], out: &mut [[u8; 4]; 64]) {
    const { assert!(N == 256 || N == 512) };
    let load = |bytes: &[u8; 64]| {
        // SAFETY: reads an array.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    };
    let [first, second] = indices.as_chunks::<32>().0 else { return };
    // SAFETY: reads arrays of 64 bytes.
    let indices =
        unsafe { [_mm512_loadu_si512(first.as_ptr().cast()), _mm512_loadu_si512(second.as_ptr().cast())] };
    // Fours of indices are put where the fours of magnitudes that come of them end up in order.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let bytes = |[a, b]: [__m512i; 2]| {
        _mm512_permutexvar_epi32(order, halves(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b)))
    };
    let low = bytes(indices);
    let high = bytes([_mm512_srli_epi16::<8>(indices[0]), _mm512_srli_epi16::<8>(indices[1])]);
    let (bit7, bit8) = (_mm512_movepi8_mask(low), _mm512_test_epi8_mask(high, high));
    let mut found = [_mm512_setzero_si512(); 4];
    for (found, plane) in found.iter_mut().zip(planes) {
        for (i, table) in plane.as_chunks::<64>().0.as_chunks::<4>().0.iter().enumerate() {
            let here = _mm512_mask_blend_epi8(
                bit7,
                _mm512_permutex2var_epi8(load(&table[0]), low, load(&table[1])),
                _mm512_permutex2var_epi8(load(&table[2]), low, load(&table[3])),
            );
            *found = if i == 0 { here } else { _mm512_mask_blend_epi8(bit8, *found, here) };
        }
    }
    let [a, b, c, d] = found;
    let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
    let (ab2, cd2) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
    let quads = [
        _mm512_unpacklo_epi16(ab, cd),
        _mm512_unpackhi_epi16(ab, cd),
        _mm512_unpacklo_epi16(ab2, cd2),
        _mm512_unpackhi_epi16(ab2, cd2),
    ];
    for (out, quads) in out.as_chunks_mut::<16>().0.iter_mut().zip(quads) {
        // SAFETY: writes an array of 64 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), quads) };
    }
}

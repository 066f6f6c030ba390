//! NEON, with and without dot products and matrix products of bytes.

use super::{Isa, byte_pair_index, dot4_four_times, sixteen};
use core::arch::aarch64::*;
use core::arch::asm;

/// NEON (every 64-bit Arm CPU with floats), if `DOT` with the dot products of bytes of Armv8.2 (Cortex-A55
/// and A75, Neoverse N1, Apple A11 and later), if `I8MM` with the matrix products of bytes of Armv8.6 too
/// (Neoverse N2 and V1, Apple A15 and later).
#[derive(Debug, Clone, Copy)]
pub struct Neon<const DOT: bool, const I8MM: bool>(());

/// Wraps intrinsics. The token that every method takes proves that the CPU has them.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` exists only where the CPU has these instructions; pointers come from array
        // references of at least the size that is read or written.
        unsafe { $e }
    };
}

/// The same for each of the four vectors that make up sixteen lanes; `$i` is its number.
macro_rules! each {
    ($i:ident => $e:expr) => {
        op!(four(
            #[inline(always)]
            |$i| $e
        ))
    };
}

#[inline(always)]
fn four<T>(mut f: impl FnMut(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

impl<const DOT: bool, const I8MM: bool> Isa for Neon<DOT, I8MM> {
    const NAME: &'static str = match (DOT, I8MM) {
        (_, true) => "i8mm",
        (true, _) => "dotprod",
        _ => "neon",
    };
    const SIGNED_BIAS: i32 = 0;
    const WIDE_TILES: bool = false;
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];

    #[cfg(feature = "std")]
    fn detect() -> Option<Self> {
        let all = std::arch::is_aarch64_feature_detected!("neon")
            && (!DOT || std::arch::is_aarch64_feature_detected!("dotprod"))
            && (!I8MM || std::arch::is_aarch64_feature_detected!("i8mm"));
        all.then_some(Neon(()))
    }
    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "neon,dotprod")]
        #[inline]
        fn with_dot<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "neon,dotprod,i8mm")]
        #[inline]
        fn with_i8mm<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        match (DOT, I8MM) {
            (_, true) => op!(with_i8mm(f)),
            (true, _) => op!(with_dot(f)),
            _ => f(),
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        op!([vdupq_n_f32(x); 4])
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        each!(i => vld1q_f32(x.as_ptr().add(4 * i)))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; 16]) -> Self::F {
        each!(i => vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x.as_ptr().add(4 * i)))))
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> Self::F {
        op!({
            let x = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            let words = [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ];
            self.to_f32(words)
        })
    }
    #[inline(always)]
    fn round_f16(self, x: Self::F) -> Self::F {
        each!(i => vcvt_f32_f16(vcvt_f16_f32(x[i])))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> Self::F {
        each!(i => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(4 * i)))))
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; 16]) {
        each!(i => vst1q_f32(out.as_mut_ptr().add(4 * i), x[i]));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // The instruction for a maximum has rules of its own for NaN and for zeros.
        self.select_gt(a, b, a, b)
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        each!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), yes[i], no[i]))
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        each!(i => vabsq_f32(x[i]))
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        op!({
            let x = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
            vaddv_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)))
        })
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        op!(vmaxvq_f32(vmaxq_f32(vmaxq_f32(x[0], x[1]), vmaxq_f32(x[2], x[3]))))
    }
    #[inline(always)]
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32 {
        op!(vfmas_lane_f32::<0>(c, a, vdup_n_f32(b)))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        op!([vdupq_n_s32(x); 4])
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; 16]) -> Self::I {
        each!(i => vld1q_s32(x.as_ptr().add(4 * i)))
    }
    #[inline(always)]
    fn store_i(self, x: Self::I, out: &mut [i32; 16]) {
        each!(i => vst1q_s32(out.as_mut_ptr().add(4 * i), x[i]));
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        each!(i => vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        each!(i => vsubq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        each!(i => vmulq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        each!(i => vandq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn shl_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        self.shl_by(x, BITS)
    }
    #[inline(always)]
    fn to_i32(self, x: Self::F) -> Self::I {
        each!(i => vcvtnq_s32_f32(x[i]))
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I) -> Self::F {
        each!(i => vcvtq_f32_s32(x[i]))
    }
    #[inline(always)]
    fn with_bits(self, x: Self::I) -> Self::F {
        each!(i => vreinterpretq_f32_s32(x[i]))
    }
    #[inline(always)]
    fn low_f16(self, x: Self::I) -> Self::F {
        each!(i => vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(x[i]))))
    }
    #[inline(always)]
    fn load_words(self, x: &[u8; 64]) -> Self::I {
        each!(i => vreinterpretq_s32_u8(vld1q_u8(x.as_ptr().add(16 * i))))
    }
    #[inline(always)]
    fn store_words(self, x: Self::I, out: &mut [u8; 64]) {
        each!(i => vst1q_u8(out.as_mut_ptr().add(16 * i), vreinterpretq_u8_s32(x[i])));
    }
    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize) -> [Self::I; 4] {
        let Some(rows) = sixteen(rows, stride) else { return [self.splat_i(0); 4] };
        let quads = each!(i => {
            let [a, b, c, d] = four(|r| vreinterpretq_s32_u8(vld1q_u8(rows.add((4 * i + r) * stride))));
            let [ab, cd] = [[vtrn1q_s32(a, b), vtrn2q_s32(a, b)], [vtrn1q_s32(c, d), vtrn2q_s32(c, d)]];
            four(|w| {
                let (ab, cd) = (vreinterpretq_s64_s32(ab[w % 2]), vreinterpretq_s64_s32(cd[w % 2]));
                vreinterpretq_s32_s64(if w < 2 { vtrn1q_s64(ab, cd) } else { vtrn2q_s64(ab, cd) })
            })
        });
        four(|w| four(|i| quads[i][w]))
    }
    #[inline(always)]
    fn prefetch<const NEAR: bool, T>(self, place: &[T], ahead: usize) {
        let place = place.as_ptr().wrapping_byte_add(ahead);
        // (The intrinsic is not stable.)
        if NEAR {
            op!(asm!("prfm pldl1keep, [{}]", in(reg) place, options(readonly, nostack, preserves_flags)));
        } else {
            op!(asm!("prfm pldl2keep, [{}]", in(reg) place, options(readonly, nostack, preserves_flags)));
        }
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        each!(i => vorrq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn shl_by(self, x: Self::I, bits: u32) -> Self::I {
        each!(i => vshlq_s32(x[i], vdupq_n_s32(bits as i32)))
    }
    #[inline(always)]
    fn shr_by(self, x: Self::I, bits: u32) -> Self::I {
        // A shift to the left by less than nothing.
        each!(i => {
            let x = vshlq_u32(vreinterpretq_u32_s32(x[i]), vdupq_n_s32(-(bits as i32)));
            vreinterpretq_s32_u32(x)
        })
    }
    #[inline(always)]
    fn sar_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        each!(i => vshlq_s32(x[i], vdupq_n_s32(-(BITS as i32))))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], x: Self::I) -> Self::I {
        let table = op!(vld1q_s8(table.as_ptr()));
        each!(i => vreinterpretq_s32_s8(vqtbl1q_s8(table, vreinterpretq_u8_s32(x[i]))))
    }
    #[inline(always)]
    fn signed(self, codes: Self::I) -> Self::I {
        codes
    }
    #[inline(always)]
    fn dot4<const SIGNED: bool>(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        // Unsigned codes are at most 127, so both kinds read as signed bytes.
        each!(i => if DOT { sdot(acc[i], codes[i], x[i]) } else { dot_bytes(acc[i], codes[i], x[i]) })
    }
    /// Eight codes of one row after the other: the first two rows of each four, then the other two.
    #[inline(always)]
    fn pair(self, [a, b]: [Self::I; 2]) -> [Self::I; 2] {
        if !I8MM {
            return [a, b];
        }
        [each!(i => vzip1q_s32(a[i], b[i])), each!(i => vzip2q_s32(a[i], b[i]))]
    }
    #[inline(always)]
    fn unpair(self, [a, b]: [Self::I; 2]) -> [Self::I; 2] {
        if !I8MM {
            return [a, b];
        }
        [each!(i => vuzp1q_s32(a[i], b[i])), each!(i => vuzp2q_s32(a[i], b[i]))]
    }
    #[inline(always)]
    fn splat_pair(self, x: [i32; 2]) -> [Self::I; 2] {
        self.pair([self.splat_i(x[0]), self.splat_i(x[1])])
    }
    #[inline(always)]
    fn dot8<const SIGNED: bool>(
        self,
        acc: [Self::I; 2],
        codes: [Self::I; 2],
        x: [[i32; 2]; 2],
    ) -> [Self::I; 2] {
        if I8MM {
            // Both kinds of codes read as signed bytes, see `dot4`.
            let x = op!(vcombine_s32(vld1_s32(x[0].as_ptr()), vld1_s32(x[1].as_ptr())));
            return [
                each!(i => smmla(acc[0][i], codes[0][i], x)),
                each!(i => smmla(acc[1][i], codes[1][i], x)),
            ];
        }
        dot4_four_times::<Self, SIGNED>(self, acc, codes, x)
    }
    #[inline(always)]
    fn dot2(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        each!(i => {
            let (w, x) = (vreinterpretq_s16_s32(w[i]), vreinterpretq_s16_s32(x[i]));
            let low = vmull_s16(vget_low_s16(w), vget_low_s16(x));
            vaddq_s32(acc[i], vpaddq_s32(low, vmull_high_s16(w, x)))
        })
    }
    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::I {
        each!(i => {
            let half = if i < 2 { a } else { b };
            vreinterpretq_s32_u8(vld1q_u8(half.as_ptr().add(16 * (i % 2))))
        })
    }
    #[inline(always)]
    fn byte_masks(self, bits: [u32; 2]) -> Self::I {
        const BYTES: [[u8; 16]; 2] = [
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
            [2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3],
        ];
        const BIT: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        each!(i => {
            let bits = vreinterpretq_u8_u32(vdupq_n_u32(bits[i / 2]));
            let bytes = vqtbl1q_u8(bits, vld1q_u8(BYTES[i % 2].as_ptr()));
            vreinterpretq_s32_u8(vtstq_u8(bytes, vld1q_u8(BIT.as_ptr())))
        })
    }
    #[inline(always)]
    fn negate(self, x: Self::I, bits: [u32; 2]) -> Self::I {
        let negative = self.byte_masks(bits);
        each!(i => {
            let (x, negative) = (vreinterpretq_u8_s32(x[i]), vreinterpretq_u8_s32(negative[i]));
            vreinterpretq_s32_u8(vsubq_u8(veorq_u8(x, negative), negative))
        })
    }
    #[inline(always)]
    fn load_nibble_halves(self, a: &[u8; 16], b: &[u8; 16]) -> Self::I {
        each!(i => {
            let x = vld1q_u8(if i < 2 { a } else { b }.as_ptr());
            let nibbles = if i % 2 == 0 { vandq_u8(x, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(x) };
            vreinterpretq_s32_u8(nibbles)
        })
    }
    #[inline(always)]
    fn byte_pair(self, x: Self::I, bytes: [usize; 2]) -> Self::I {
        let index = op!(vld1q_u8(byte_pair_index(bytes).as_ptr()));
        each!(i => {
            let tops = vqtbl1q_u8(vreinterpretq_u8_s32(x[i]), index);
            vreinterpretq_s32_s16(vshrq_n_s16::<8>(vreinterpretq_s16_u8(tops)))
        })
    }
    #[inline(always)]
    fn scales<const SAME: bool>(self, pairs: [i32; 2]) -> Self::I {
        each!(i => {
            let pair = pairs[i / 2];
            if SAME || i % 2 == 1 {
                vshrq_n_s32::<16>(vdupq_n_s32(pair))
            } else {
                vdupq_n_s32(i32::from(pair as i16))
            }
        })
    }
    #[inline(always)]
    fn sum_halves(self, x: &[[i32; 16]; 8]) -> Self::I {
        each!(i => {
            let mut rows = [vdupq_n_s32(0); 4];
            for r in 0..4 {
                let lanes = x[4 * (i % 2) + r].as_ptr().add(8 * (i / 2));
                rows[r] = vaddq_s32(vld1q_s32(lanes), vld1q_s32(lanes.add(4)));
            }
            vpaddq_s32(vpaddq_s32(rows[0], rows[1]), vpaddq_s32(rows[2], rows[3]))
        })
    }
}

/// `acc` plus the dots of four adjacent bytes in each 32-bit lane.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, codes: int32x4_t, x: int32x4_t) -> int32x4_t {
    // SAFETY: works on registers alone. (The intrinsic is not stable.)
    unsafe {
        asm!(
            "sdot {:v}.4s, {:v}.16b, {:v}.16b",
            inout(vreg) acc, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// `acc` plus the dots of eight bytes of each of two rows with eight of each of two tokens: row by row, token
/// by token.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut acc: int32x4_t, codes: int32x4_t, x: int32x4_t) -> int32x4_t {
    // SAFETY: works on registers alone. (The intrinsic is not stable.)
    unsafe {
        asm!(
            "smmla {:v}.4s, {:v}.16b, {:v}.16b",
            inout(vreg) acc, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// [`sdot`] without the instruction. No sum of two products passes 2 · 128 · 127, so the 16-bit step cannot
/// overflow.
#[inline]
#[target_feature(enable = "neon")]
fn dot_bytes(acc: int32x4_t, codes: int32x4_t, x: int32x4_t) -> int32x4_t {
    let (codes, x) = (vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x));
    let low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
    vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(codes, x)))
}

//! Instruction sets as tokens: a value of `Avx2` or `Neon` can only exist where the CPU has the instructions.
//!
//! Kernels are written once over [`Isa`], whose vectors have 16 lanes on every instruction set. Each
//! operation rounds the same way everywhere, so a kernel's result is the same bits on all of them. (The idea
//! of capability tokens is from the `pulp` and `rten-simd` crates.)
//!
//! Vector code must be inlined into [`Isa::run`] to be compiled with the instructions. The array methods of
//! `core` (`map`, `from_fn`) are not reliably inlined: kernels loop over arrays of vectors instead.
#![allow(clippy::needless_range_loop, reason = "see above: loops by index are what inlines")]

use crate::math;

/// Sixteen lanes of arithmetic.
///
/// Multiply-add is fused, conversions to integer round to nearest even, and `max` returns its second operand
/// unless the first is greater.
pub trait Isa: Copy + Send + Sync + 'static {
    /// The name in [`Cpu::from_name`].
    const NAME: &'static str;
    /// The number that [`Isa::signed`] adds to each code: 128 if the dot product takes unsigned codes, else
    /// 0.
    const SIGNED_BIAS: i32;
    /// Whether there are enough registers for tiles of two vectors of rows.
    const WIDE_TILES: bool;
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;

    /// The token, where the CPU has the instructions.
    #[cfg(feature = "std")]
    fn detect() -> Option<Self>;

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
    /// Lanes from signed bytes.
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> Self::F {
        let mut lanes = [0.0; 16];
        for i in 0..16 {
            lanes[i] = f32::from(x[i]);
        }
        self.load(&lanes)
    }
    /// Lanes from the low halves of bytes and from the high ones, each less 8.
    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 16]) -> [Self::F; 2] {
        [self.load_i8(&x.map(|x| (x & 15) as i8 - 8)), self.load_i8(&x.map(|x| (x >> 4) as i8 - 8))]
    }
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

    /// The largest lane; none may be NaN.
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; 16];
        self.store(x, &mut lanes);
        let mut max = lanes[0];
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        max
    }

    /// `a * b + c` of single numbers, rounded once.
    fn fma_one(self, a: f32, b: f32, c: f32) -> f32;

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// Lanes from memory.
    fn load_i(self, x: &[i32; 16]) -> Self::I;
    /// Lanes to memory.
    fn store_i(self, x: Self::I, out: &mut [i32; 16]);
    /// `a + b`, wrapping.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a - b`, wrapping.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a * b`, wrapping.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
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

    /// The half-precision float in the low half of each lane, exactly.
    fn low_f16(self, x: Self::I) -> Self::F;
    /// Each lane's four bytes from memory.
    fn load_words(self, x: &[u8; 64]) -> Self::I;
    /// Lanes to memory, four bytes each.
    fn store_words(self, x: Self::I, out: &mut [u8; 64]);
    /// Four words of each of sixteen rows that start `stride` bytes apart, transposed: word `w` of row `r` in
    /// lane `r` of result `w`. Zeros if not all of them are there.
    fn transpose(self, rows: &[u8], stride: usize) -> [Self::I; 4];
    /// Prefetches the cache line `ahead` bytes after the start of `place`, which may lie outside it: into the
    /// first-level cache if `NEAR`, else into the second.
    fn prefetch<const NEAR: bool, T>(self, place: &[T], ahead: usize);
    /// `a | b`.
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `x << bits`, each lane; `bits` < 32.
    fn shl_by(self, x: Self::I, bits: u32) -> Self::I;
    /// `x >> bits`, each lane, filled with zeros; `bits` < 32.
    fn shr_by(self, x: Self::I, bits: u32) -> Self::I;
    /// `x >> BITS`, each lane, filled with the sign.
    fn sar_i<const BITS: u32>(self, x: Self::I) -> Self::I;
    /// Replaces each byte of `x`, which is below 16, by that entry of `table`.
    fn lookup(self, table: &[i8; 16], x: Self::I) -> Self::I;
    /// [`Isa::signed`] of [`Isa::lookup`].
    #[inline(always)]
    fn lookup_signed(self, table: &[i8; 16], x: Self::I) -> Self::I {
        let mut raised = *table;
        for entry in &mut raised {
            *entry = entry.wrapping_add(Self::SIGNED_BIAS as i8);
        }
        self.lookup(&raised, x)
    }
    /// Adds [`Isa::SIGNED_BIAS`] to signed code bytes, as [`Isa::dot4`] takes them.
    fn signed(self, codes: Self::I) -> Self::I;

    /// `acc` plus, in each lane, the dot of the four code bytes with the four signed bytes of `x`, none of
    /// which is -128. Codes are unsigned and at most 127, or if `SIGNED` what [`Isa::signed`] makes of signed
    /// ones: then the sum is too large by [`Isa::SIGNED_BIAS`] times the sum of the bytes of `x`.
    fn dot4<const SIGNED: bool>(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I;

    /// Arranges two words of codes as [`Isa::dot8`] takes them.
    #[inline(always)]
    fn pair(self, codes: [Self::I; 2]) -> [Self::I; 2] {
        codes
    }
    /// Undoes [`Isa::pair`] and [`Isa::splat_pair`].
    #[inline(always)]
    fn unpair(self, pair: [Self::I; 2]) -> [Self::I; 2] {
        pair
    }
    /// All lanes of the first `x[0]`, of the second `x[1]`, together.
    #[inline(always)]
    fn splat_pair(self, x: [i32; 2]) -> [Self::I; 2] {
        x.map(
            #[inline(always)]
            |x| self.splat_i(x),
        )
    }
    /// [`Isa::dot4`] of two words of codes with two words of each of two tokens: a pair of sums, of a pair of
    /// codes.
    #[inline(always)]
    fn dot8<const SIGNED: bool>(
        self,
        acc: [Self::I; 2],
        codes: [Self::I; 2],
        x: [[i32; 2]; 2],
    ) -> [Self::I; 2] {
        dot4_four_times::<Self, SIGNED>(self, acc, codes, x)
    }

    /// `acc` plus, in each lane, the dot of two 16-bit integers with two of `x`.
    fn dot2(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;

    // Vectors of two rows, for kernels whose lanes run along a row: lanes 0 to 7 belong to one row, lanes 8
    // to 15 to another.

    /// The bytes of two rows.
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::I;
    /// Bytes 0xff for bits that are set, else 0: bit `i` of `bits[row]` is that of byte `i` of a row.
    #[inline(always)]
    fn byte_masks(self, bits: [u32; 2]) -> Self::I {
        let mut words = [0; 64];
        for i in 0..64 {
            words[i] = if (bits[i / 32] >> (i % 32)) & 1 == 1 { 0xff } else { 0 };
        }
        self.load_words(&words)
    }
    /// Negates the bytes, none of which is -128, for which a bit is set, as in [`Isa::byte_masks`].
    #[inline(always)]
    fn negate(self, x: Self::I, bits: [u32; 2]) -> Self::I {
        let mut words = [0; 64];
        self.store_words(x, &mut words);
        for i in 0..64 {
            let negative = (bits[i / 32] >> (i % 32)) & 1 == 1;
            words[i] = if negative { words[i].wrapping_neg() } else { words[i] };
        }
        self.load_words(&words)
    }
    /// The nibbles of 16 bytes of each of two rows: 16 low ones, then 16 high ones.
    #[inline(always)]
    fn load_nibble_halves(self, a: &[u8; 16], b: &[u8; 16]) -> Self::I {
        let mut halves = [[0; 32]; 2];
        for i in 0..16 {
            halves[0][i] = a[i] & 15;
            halves[0][16 + i] = a[i] >> 4;
            halves[1][i] = b[i] & 15;
            halves[1][16 + i] = b[i] >> 4;
        }
        self.load_halves(&halves[0], &halves[1])
    }
    /// Two signed bytes of each lane as 16-bit integers, the first one low.
    #[inline(always)]
    fn byte_pair(self, x: Self::I, bytes: [usize; 2]) -> Self::I {
        let low = self.sar_i::<24>(self.shl_by(x, 24 - 8 * bytes[0] as u32));
        let high = self.shl_by(self.sar_i::<24>(self.shl_by(x, 24 - 8 * bytes[1] as u32)), 16);
        self.or_i(self.and_i(low, self.splat_i(0xffff)), high)
    }
    /// Integer scales as [`Isa::dot4_scaled`] takes them. `pairs` has two 16-bit integers for each of two
    /// rows: the low one scales the first four lanes of the row's eight, the high one the other four. If
    /// `SAME`, they are equal.
    #[inline(always)]
    fn scales<const SAME: bool>(self, pairs: [i32; 2]) -> Self::I {
        let mut lanes = [0; 16];
        for i in 0..4 {
            lanes[i] = i32::from(pairs[0] as i16);
            lanes[4 + i] = pairs[0] >> 16;
            lanes[8 + i] = i32::from(pairs[1] as i16);
            lanes[12 + i] = pairs[1] >> 16;
        }
        self.load_i(&lanes)
    }
    /// `acc` plus [`Isa::dot4`] times `scales`, which come from [`Isa::scales`]. Unsigned codes are at most
    /// 127, so that the sum of two products fits in 16 bits.
    #[inline(always)]
    fn dot4_scaled<const SIGNED: bool>(
        self,
        acc: Self::I,
        codes: Self::I,
        x: Self::I,
        scales: Self::I,
    ) -> Self::I {
        self.add_i(acc, self.mul_i(self.dot4::<SIGNED>(self.splat_i(0), codes, x), scales))
    }
    /// Looks up points of four bytes by number. `planes` has the first bytes of all points, the second ones, and
    /// so on. `N` is 256 or 512, above all indices.
    #[inline(always)]
    fn look_up_quads<const N: usize>(
        self,
        points: &[u32; N],
        _planes: &[[u8; N]; 4],
        indices: &[u16; 64],
        out: &mut [[u8; 4]; 64],
    ) {
        look_up_quads(points, indices, out);
    }
    /// The sums of the halves of eight vectors: lane `r` is that of the first half of `x[r]`, lane `8 + r`
    /// that of the second.
    #[inline(always)]
    fn sum_halves(self, x: &[[i32; 16]; 8]) -> Self::I {
        let mut sums = [0i32; 16];
        for r in 0..8 {
            for i in 0..8 {
                sums[r] = sums[r].wrapping_add(x[r][i]);
                sums[8 + r] = sums[8 + r].wrapping_add(x[r][8 + i]);
            }
        }
        self.load_i(&sums)
    }
}

/// [`Isa::dot8`] for instruction sets without an instruction for it.
#[inline(always)]
fn dot4_four_times<I: Isa, const SIGNED: bool>(
    isa: I,
    [mut a, mut b]: [I::I; 2],
    codes: [I::I; 2],
    x: [[i32; 2]; 2],
) -> [I::I; 2] {
    for k in 0..2 {
        a = isa.dot4::<SIGNED>(a, codes[k], isa.splat_i(x[0][k]));
        b = isa.dot4::<SIGNED>(b, codes[k], isa.splat_i(x[1][k]));
    }
    [a, b]
}

/// [`Isa::look_up_quads`], point by point. (Not inlined: with vector instructions, compilers do worse.)
#[inline(never)]
fn look_up_quads<const N: usize>(points: &[u32; N], indices: &[u16; 64], out: &mut [[u8; 4]; 64]) {
    for i in 0..64 {
        out[i] = points[usize::from(indices[i]) % N].to_le_bytes();
    }
}

/// Plain scalar code, which every CPU can run.
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

/// [`Isa::fma`], lane by lane. (Not inlined where it takes tens of instructions a lane: kernels would be several times as large.)
#[cfg_attr(not(target_os = "none"), inline(never))]
#[cfg_attr(target_os = "none", inline(always))]
fn fma_lanes(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
    core::array::from_fn(|i| math::fma(a[i], b[i], c[i]))
}

impl Isa for Scalar {
    const NAME: &'static str = "scalar";
    const SIGNED_BIAS: i32 = 0;
    const WIDE_TILES: bool = false;
    type F = [f32; 16];
    type I = [i32; 16];

    #[cfg(feature = "std")]
    fn detect() -> Option<Self> {
        Some(Scalar)
    }
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
        fma_lanes(a, b, c)
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
    fn splat_i(self, x: i32) -> Self::I {
        [x; 16]
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; 16]) -> Self::I {
        *x
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
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        map2(a, b, i32::wrapping_sub)
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
    fn low_f16(self, x: Self::I) -> Self::F {
        map1(x, |x| math::f16_to_f32(x as u16))
    }
    #[inline(always)]
    fn load_words(self, x: &[u8; 64]) -> Self::I {
        let words = x.as_chunks::<4>().0;
        core::array::from_fn(|i| i32::from_le_bytes(words[i]))
    }
    #[inline(always)]
    fn load_halves(self, a: &[u8; 32], b: &[u8; 32]) -> Self::I {
        let (a, b) = (a.as_chunks::<4>().0, b.as_chunks::<4>().0);
        core::array::from_fn(|i| i32::from_le_bytes(if i < 8 { a[i] } else { b[i - 8] }))
    }
    #[inline(always)]
    fn store_words(self, x: Self::I, out: &mut [u8; 64]) {
        for (word, lane) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
            *word = lane.to_le_bytes();
        }
    }
    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize) -> [Self::I; 4] {
        let word = |r: usize, w: usize| rows.get(r * stride + 4 * w..)?.first_chunk().copied();
        if word(15, 3).is_none() {
            return [[0; 16]; 4];
        }
        core::array::from_fn(|w| core::array::from_fn(|r| i32::from_le_bytes(word(r, w).unwrap_or([0; 4]))))
    }
    #[inline(always)]
    fn prefetch<const NEAR: bool, T>(self, _: &[T], _: usize) {}
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        map2(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn shl_by(self, x: Self::I, bits: u32) -> Self::I {
        map1(x, |x| x << bits)
    }
    #[inline(always)]
    fn shr_by(self, x: Self::I, bits: u32) -> Self::I {
        map1(x, |x| (x as u32 >> bits) as i32)
    }
    #[inline(always)]
    fn sar_i<const BITS: u32>(self, x: Self::I) -> Self::I {
        map1(x, |x| x >> BITS)
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], x: Self::I) -> Self::I {
        map1(x, |x| i32::from_le_bytes(x.to_le_bytes().map(|i| table[usize::from(i & 15)] as u8)))
    }
    #[inline(always)]
    fn signed(self, codes: Self::I) -> Self::I {
        codes
    }
    #[inline(always)]
    fn dot4<const SIGNED: bool>(self, acc: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        // Unsigned codes are at most 127, so both kinds read as signed bytes.
        core::array::from_fn(|lane| {
            let (codes, x) = (codes[lane].to_le_bytes(), x[lane].to_le_bytes());
            let products: [i32; 4] =
                core::array::from_fn(|i| i32::from(codes[i] as i8) * i32::from(x[i] as i8));
            acc[lane] + products.iter().sum::<i32>()
        })
    }
    #[inline(always)]
    fn dot2(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        core::array::from_fn(|lane| {
            let halves = |v: i32| (v as i16 as i32, v >> 16);
            let (w, x) = (halves(w[lane]), halves(x[lane]));
            acc[lane] + w.0 * x.0 + w.1 * x.1
        })
    }
}

/// The first of sixteen rows, if 16 bytes of each are there; row `r` is `r * stride` bytes after it.
#[inline(always)]
#[allow(dead_code, reason = "some targets have no vector instructions")]
fn sixteen(rows: &[u8], stride: usize) -> Option<*const u8> {
    (stride.checked_mul(15)?.checked_add(16)? <= rows.len()).then_some(rows.as_ptr())
}

/// The byte shuffle for [`Isa::byte_pair`]: moves two bytes of each 32-bit lane to the tops of its 16-bit
/// halves. An index above 127 gives zero.
#[inline(always)]
#[allow(dead_code, reason = "some targets have no vector instructions")]
fn byte_pair_index(bytes: [usize; 2]) -> [u8; 16] {
    let mut index = [0x80; 16];
    for lane in 0..4 {
        index[4 * lane + 1] = (4 * lane + bytes[0]) as u8;
        index[4 * lane + 3] = (4 * lane + bytes[1]) as u8;
    }
    index
}

#[cfg(all(target_arch = "arm", target_os = "none"))]
pub(crate) mod cortex_m;
#[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
mod neon;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod wasm;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
pub use neon::Neon;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
pub use wasm::Simd128;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// A kernel call, compiled once for each instruction set.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// Runs it with an instruction set.
    fn on(self, cpu: Cpu) -> Self::Out;
}

/// Makes [`Kernel`]s of types that are [`WithIsa`]. Their code is compiled here, once, and not wherever they
/// are called.
macro_rules! kernels {
    ($($kernel:ty),* $(,)?) => {
        $(impl $crate::isa::Kernel for $kernel {
            type Out = <Self as $crate::isa::WithIsa>::Out;

            #[inline(never)]
            fn on(self, cpu: $crate::isa::Cpu) -> Self::Out {
                cpu.run_inline(self)
            }
        })*
    };
}
pub(crate) use kernels;

/// A kernel call that works with any instruction set.
pub trait WithIsa {
    /// What it returns.
    type Out;
    /// The kernel.
    fn call<I: Isa>(self, isa: I) -> Self::Out;
}

/// Defines [`Cpu`]: scalar code, and a variant for each instruction set, slowest first, with the token that
/// proves it.
macro_rules! cpu {
    ($($(#[doc = $doc:literal])+ #[cfg($cfg:meta)] $name:ident: $token:ty,)+) => {
        /// An instruction set that this CPU can run.
        #[derive(Debug, Clone, Copy)]
        #[non_exhaustive]
        pub enum Cpu {
            /// No vector instructions beyond the target's baseline.
            Scalar(Scalar),
            $($(#[doc = $doc])+ #[cfg($cfg)] $name($token),)+
        }

        impl Cpu {
            /// Names of the instruction sets that exist for this target, slowest first.
            pub const NAMES: &'static [&'static str] = &[Scalar::NAME, $(#[cfg($cfg)] <$token>::NAME),+];

            /// The named one, if the CPU has it.
            #[cfg(feature = "std")]
            pub fn from_name(name: &str) -> Option<Cpu> {
                $(#[cfg($cfg)]
                if name == <$token>::NAME {
                    return <$token>::detect().map(Cpu::$name);
                })+
                (name == Scalar::NAME).then_some(Cpu::Scalar(Scalar))
            }

            /// The name.
            pub fn name(self) -> &'static str {
                match self {
                    Cpu::Scalar(_) => Scalar::NAME,
                    $(#[cfg($cfg)] Cpu::$name(_) => <$token>::NAME,)+
                }
            }

            /// Runs a kernel with this instruction set.
            #[inline]
            pub fn run<K: Kernel>(self, kernel: K) -> K::Out {
                kernel.on(self)
            }

            /// Runs a kernel of any kind: its code becomes part of the caller, for every instruction set.
            #[inline]
            pub fn run_inline<K: WithIsa>(self, kernel: K) -> K::Out {
                match self {
                    Cpu::Scalar(isa) => kernel.call(isa),
                    $(#[cfg($cfg)] Cpu::$name(isa) => isa.run(
                        #[inline(always)]
                        || kernel.call(isa),
                    ),)+
                }
            }

            /// As [`Cpu::run_inline`], for a kernel that has a scalar counterpart, which is not run.
            #[inline]
            pub(crate) fn run_vectors<K: WithIsa<Out = ()>>(self, kernel: K) {
                match self {
                    Cpu::Scalar(_) => drop(kernel),
                    $(#[cfg($cfg)] Cpu::$name(isa) => isa.run(
                        #[inline(always)]
                        || kernel.call(isa),
                    ),)+
                }
            }
        }
    };
}

cpu! {
    /// NEON.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
    Neon: Neon<false, false>,
    /// NEON with dot products of bytes.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
    NeonDot: Neon<true, false>,
    /// NEON with dot products and matrix products of bytes.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
    NeonI8mm: Neon<true, true>,
    /// The vectors of WebAssembly.
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    Simd128: Simd128,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2: Avx2<false>,
    /// AVX2 with AVX-VNNI.
    #[cfg(all(target_arch = "x86_64", feature = "fast"))]
    AvxVnni: Avx2<true>,
    /// AVX-512 with VNNI.
    #[cfg(all(target_arch = "x86_64", feature = "fast"))]
    Avx512: Avx512,
}

impl Cpu {
    /// The best that the CPU has.
    #[cfg(feature = "std")]
    pub fn detect() -> Cpu {
        Cpu::NAMES.iter().rev().find_map(|name| Cpu::from_name(name)).unwrap_or(Cpu::Scalar(Scalar))
    }
}

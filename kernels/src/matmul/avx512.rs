//! Hand-written decode for AVX-512, straight from the file's bytes.
//!
//! 256 values of a row are four vectors of codes and four dot instructions; a transposed reduction leaves one sum for each 32
//! or 16 values, and the chain of multiply-adds runs for four rows at once, so that its latency is hidden.

use core::arch::x86_64::*;

use super::{CHUNK, XChunk};
use crate::activation;
use crate::formats::{Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0, Quantised, six_bit_pairs};
use crate::isa::Avx512;
use crate::panel::PanelMut;

/// Rows computed side by side.
const ROWS: usize = 4;
/// Blocks of a chunk.
const BLOCKS: usize = CHUNK / 32;

/// A format whose block of 32 codes becomes unsigned bytes in order.
pub(super) trait Codes: Quantised {
    /// Every unsigned code is so much above the value.
    const OFFSET: i32;
    /// The codes of two blocks.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL.
    unsafe fn codes(two: &[Self; 2]) -> __m512i;
    /// The scale, as half-precision bits.
    fn scale(&self) -> u16;
}

impl Codes for Q8_0 {
    const OFFSET: i32 = 128;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn codes(two: &[Q8_0; 2]) -> __m512i {
        // SAFETY: as the caller promised; each load reads the 32 bytes of a block's codes.
        unsafe {
            let low = _mm256_loadu_si256(two[0].qs.as_ptr().cast());
            let high = _mm256_loadu_si256(two[1].qs.as_ptr().cast());
            let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            _mm512_xor_si512(codes, _mm512_set1_epi8(-128))
        }
    }
    #[inline(always)]
    fn scale(&self) -> u16 {
        self.d.to_bits()
    }
}

/// Sixteen bytes of nibbles of two blocks as 64 codes: low nibbles, then high ones, of each.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn nibbles(first: &[u8; 16], second: &[u8; 16]) -> __m512i {
    // SAFETY: as the caller promised; each load reads 16 bytes.
    unsafe {
        let first = _mm_loadu_si128(first.as_ptr().cast());
        let second = _mm_loadu_si128(second.as_ptr().cast());
        let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(first), _mm_srli_epi16::<4>(first));
        let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(second), _mm_srli_epi16::<4>(second));
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
        _mm512_and_si512(both, _mm512_set1_epi8(15))
    }
}

impl Codes for Q4_0 {
    const OFFSET: i32 = 8;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn codes(two: &[Q4_0; 2]) -> __m512i {
        // SAFETY: as the caller promised.
        unsafe { nibbles(&two[0].qs, &two[1].qs) }
    }
    #[inline(always)]
    fn scale(&self) -> u16 {
        self.d.to_bits()
    }
}

impl Codes for Q5_0 {
    const OFFSET: i32 = 16;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn codes(two: &[Q5_0; 2]) -> __m512i {
        let bits = |block: &Q5_0| u64::from(u32::from_le_bytes(block.qh));
        // SAFETY: as the caller promised.
        unsafe {
            let low = nibbles(&two[0].qs, &two[1].qs);
            _mm512_mask_add_epi8(low, bits(&two[0]) | bits(&two[1]) << 32, low, _mm512_set1_epi8(16))
        }
    }
    #[inline(always)]
    fn scale(&self) -> u16 {
        self.d.to_bits()
    }
}

/// Row by row, for a few tokens; see `super::rows`, whose bits it gives.
#[inline(always)]
pub(super) fn rows<Q: Codes>(
    _: Avx512,
    w: &[Q],
    row_blocks: usize,
    x: activation::Quantised<'_>,
    tokens: usize,
    out: PanelMut<'_>,
) {
    // SAFETY: the token proves the instructions.
    by_fours(w, row_blocks, tokens, out, |rows, t| unsafe { dot_rows(rows, row_blocks, &x, t) });
}

/// As [`rows`], for super-blocks.
#[inline(always)]
pub(super) fn super_rows<Q: SuperCodes>(
    _: Avx512,
    w: &[Q],
    row_blocks: usize,
    x: activation::Quantised<'_>,
    tokens: usize,
    out: PanelMut<'_>,
) {
    // SAFETY: the token proves the instructions.
    by_fours(w, row_blocks, tokens, out, |rows, t| unsafe { super_dot_rows(rows, row_blocks, &x, t) });
}

/// Fills `out` with `dot(rows, token)`, four rows at a time. A row is cut to its start only: what follows it are the next.
#[inline(always)]
fn by_fours<Q>(
    w: &[Q],
    row_blocks: usize,
    tokens: usize,
    mut out: PanelMut<'_>,
    dot: impl Fn([&[Q]; ROWS], usize) -> [f32; ROWS],
) {
    let count = (w.len() / row_blocks).min(out.cols());
    for first in (0..count).step_by(ROWS) {
        let here = (count - first).min(ROWS);
        // Rows past the end repeat the last one, and are not stored.
        let row = |r: usize| &w[(first + r.min(here - 1)) * row_blocks..];
        let rows = [row(0), row(1), row(2), row(3)];
        for t in 0..tokens {
            out.row(t)[first..first + here].copy_from_slice(&dot(rows, t)[..here]);
        }
    }
}

/// The dots of some rows with one token.
///
/// # Safety
/// The CPU has what [`Avx512`] stands for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn dot_rows<Q: Codes>(
    rows: [&[Q]; ROWS],
    row_blocks: usize,
    x: &activation::Quantised<'_>,
    token: usize,
) -> [f32; ROWS] {
    let mut acc = _mm_setzero_ps();
    for first in (0..row_blocks).step_by(BLOCKS) {
        let groups = (row_blocks - first).min(BLOCKS);
        let x = XChunk::new::<Q>(x, token, first / BLOCKS);
        let chunk = |r: usize| rows[r][first..].first_chunk::<BLOCKS>();
        // Activations past a row's end are zero, so it does not matter that the codes there are another row's.
        if let (Some(a), Some(b), Some(c), Some(d)) = (chunk(0), chunk(1), chunk(2), chunk(3)) {
            for chunk in [a, b, c, d] {
                prefetch(chunk, ROWS * row_blocks * size_of::<Q>());
            }
            // SAFETY: as the caller promised.
            acc = unsafe { chain([a, b, c, d], &x, groups, acc) };
            continue;
        }
        // Only at the end of the matrix is there nothing behind a row.
        let mut last = [[rows[0][0]; BLOCKS]; ROWS];
        for (last, row) in last.iter_mut().zip(rows) {
            last[..groups].copy_from_slice(&row[first..first + groups]);
        }
        // SAFETY: as the caller promised.
        acc = unsafe { chain([&last[0], &last[1], &last[2], &last[3]], &x, groups, acc) };
    }
    let mut sums = [0.0; ROWS];
    // SAFETY: the store writes four floats.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc) };
    sums
}

/// Asks for the bytes that lie `ahead` of these, wherever that is: the same place of the rows that come next. The CPU's own
/// prefetcher follows a row but not the step to the next ones.
#[inline(always)]
fn prefetch<T>(bytes: &T, ahead: usize) {
    for line in (0..size_of::<T>()).step_by(64) {
        let place = core::ptr::from_ref(bytes).cast::<i8>().wrapping_add(ahead + line);
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place) };
    }
}

/// `acc`, a lane a row, and the first `groups` blocks of a chunk in order, one fused multiply-add each.
///
/// # Safety
/// The CPU has what [`Avx512`] stands for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn chain<Q: Codes>(
    rows: [&[Q; BLOCKS]; ROWS],
    x: &XChunk<'_>,
    groups: usize,
    mut acc: __m128,
) -> __m128 {
    // SAFETY: as the caller promised; loads read arrays of the size that is read.
    unsafe {
        let x_sums = activation_sums(x, Q::OFFSET);
        let (s0, d0) = block_sums(rows[0], x, x_sums);
        let (s1, d1) = block_sums(rows[1], x, x_sums);
        let (s2, d2) = block_sums(rows[2], x, x_sums);
        let (s3, d3) = block_sums(rows[3], x, x_sums);
        let (sums, scales) = (transpose([s0, s1, s2, s3]), transpose([d0, d1, d2, d3]));
        let pairs = [
            (_mm256_castps256_ps128(sums[0]), _mm256_castps256_ps128(scales[0])),
            (_mm256_castps256_ps128(sums[1]), _mm256_castps256_ps128(scales[1])),
            (_mm256_castps256_ps128(sums[2]), _mm256_castps256_ps128(scales[2])),
            (_mm256_castps256_ps128(sums[3]), _mm256_castps256_ps128(scales[3])),
            (_mm256_extractf128_ps::<1>(sums[0]), _mm256_extractf128_ps::<1>(scales[0])),
            (_mm256_extractf128_ps::<1>(sums[1]), _mm256_extractf128_ps::<1>(scales[1])),
            (_mm256_extractf128_ps::<1>(sums[2]), _mm256_extractf128_ps::<1>(scales[2])),
            (_mm256_extractf128_ps::<1>(sums[3]), _mm256_extractf128_ps::<1>(scales[3])),
        ];
        for (sum, scale) in pairs.iter().take(groups) {
            acc = _mm_fmadd_ps(*sum, *scale, acc);
        }
        acc
    }
}

/// Four rows of eight: result i has element i of every row in its low half, element i + 4 in its high half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn transpose(rows: [__m256; 4]) -> [__m256; 4] {
    let low = [_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpacklo_ps(rows[2], rows[3])];
    let high = [_mm256_unpackhi_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[2], rows[3])];
    let [a, b] = [_mm256_castps_pd(low[0]), _mm256_castps_pd(low[1])];
    let [c, d] = [_mm256_castps_pd(high[0]), _mm256_castps_pd(high[1])];
    [
        _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
        _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)),
        _mm256_castpd_ps(_mm256_unpacklo_pd(c, d)),
        _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)),
    ]
}

/// `offset` times the sum of each 32 activations.
///
/// # Safety
/// The CPU has AVX2.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn activation_sums(x: &XChunk<'_>, offset: i32) -> __m256i {
    // SAFETY: as the caller promised; the two loads read the 16 sums.
    unsafe {
        let low = _mm256_loadu_si256(x.sums.as_ptr().cast());
        let high = _mm256_loadu_si256(x.sums.as_ptr().add(8).cast());
        let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(low, high));
        _mm256_mullo_epi32(sums, _mm256_set1_epi32(offset))
    }
}

/// The integer sum of each block with its activations, as f32, and the product of their scales.
///
/// # Safety
/// The CPU has what [`Avx512`] stands for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn block_sums<Q: Codes>(blocks: &[Q; BLOCKS], x: &XChunk<'_>, x_sums: __m256i) -> (__m256, __m256) {
    let (pairs, x_pairs) = (blocks.as_chunks::<2>().0, x.codes.as_chunks::<64>().0);
    // SAFETY: as the caller promised; every load reads an array of the size that is read.
    unsafe {
        let zero = _mm512_setzero_si512();
        let mut dots = [zero; 4];
        for i in 0..4 {
            let x = _mm512_loadu_si512(x_pairs[i].as_ptr().cast());
            dots[i] = _mm512_dpbusd_epi32(zero, Q::codes(&pairs[i]), x);
        }
        // Each 128-bit lane: its part of the sums of four pairs. Lanes 0 and 1 are first blocks, 2 and 3 second ones.
        let parts = four_sums(dots);
        let (first, second) = (_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64::<1>(parts));
        let first = _mm_add_epi32(_mm256_castsi256_si128(first), _mm256_extracti128_si256::<1>(first));
        let second = _mm_add_epi32(_mm256_castsi256_si128(second), _mm256_extracti128_si256::<1>(second));
        let total = _mm256_inserti128_si256::<1>(
            _mm256_castsi128_si256(_mm_unpacklo_epi32(first, second)),
            _mm_unpackhi_epi32(first, second),
        );
        let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(total, x_sums));
        let d = |i: usize| blocks[i].scale() as i16;
        let d = _mm256_cvtph_ps(_mm_set_epi16(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0)));
        let x_scales = x.scales.first_chunk::<BLOCKS>().unwrap_or(&[0.0; BLOCKS]);
        (sums, _mm256_mul_ps(d, _mm256_loadu_ps(x_scales.as_ptr())))
    }
}

/// A format of 256-value blocks with one f32 scale, whose codes become unsigned bytes in order.
pub(super) trait SuperCodes: Quantised {
    /// Every unsigned code is so much above the value.
    const OFFSET: i32;
    /// The codes, 64 a vector.
    ///
    /// # Safety
    /// The CPU has what [`Avx512`] stands for.
    unsafe fn codes(&self) -> [__m512i; 4];
    /// The integer sub-scale of each 16 values, in the order of [`GROUPS`].
    ///
    /// # Safety
    /// As [`SuperCodes::codes`].
    unsafe fn sub_scales(&self) -> __m512i;
    /// The integer minimum of each 32 values, in order.
    ///
    /// # Safety
    /// As [`SuperCodes::codes`].
    unsafe fn mins(&self) -> __m256i;
    /// The scale and the minimum's, as half-precision bits; the minimum is subtracted.
    fn scales(&self) -> (u16, u16);
}

/// The order in which [`group_sums`] leaves the sums of 16: lane 4 l + v is group 4 v + l.
const GROUPS: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

/// The sub-scales of Q4_K and Q5_K, one for each 32 values, in the order of [`GROUPS`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn six_bit_scales(packed: &[u8; 12]) -> __m512i {
    let scales = six_bit_pairs(packed).0;
    let order = _mm_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
    _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi64_si128(i64::from_le_bytes(scales)), order))
}

/// The minimums of Q4_K and Q5_K, one for each 32 values, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn six_bit_mins(packed: &[u8; 12]) -> __m256i {
    _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(six_bit_pairs(packed).1)))
}

/// Nibbles of 32 bytes: low ones, then high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn quarter(bytes: &[u8; 32]) -> __m512i {
    // SAFETY: the load reads 32 bytes.
    let low = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), _mm256_srli_epi16::<4>(low));
    _mm512_and_si512(both, _mm512_set1_epi8(15))
}

impl SuperCodes for Q4_K {
    const OFFSET: i32 = 0;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn codes(&self) -> [__m512i; 4] {
        [quarter(&self.qs[0]), quarter(&self.qs[1]), quarter(&self.qs[2]), quarter(&self.qs[3])]
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn sub_scales(&self) -> __m512i {
        six_bit_scales(&self.scales)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn mins(&self) -> __m256i {
        six_bit_mins(&self.scales)
    }
    #[inline(always)]
    fn scales(&self) -> (u16, u16) {
        (self.d.to_bits(), self.dmin.to_bits())
    }
}

impl SuperCodes for Q5_K {
    const OFFSET: i32 = 0;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn codes(&self) -> [__m512i; 4] {
        // SAFETY: the load reads 32 bytes.
        let high = unsafe { _mm256_loadu_si256(self.qh.as_ptr().cast()) };
        let mut codes = [_mm512_setzero_si512(); 4];
        for (q, codes) in codes.iter_mut().enumerate() {
            let bit = |n: usize| {
                u64::from(_mm256_test_epi8_mask(high, _mm256_set1_epi8(1u8.rotate_left(n as u32) as i8)))
            };
            let top = bit(2 * q) | bit(2 * q + 1) << 32;
            let low = quarter(&self.qs[q]);
            *codes = _mm512_mask_add_epi8(low, top, low, _mm512_set1_epi8(16));
        }
        codes
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn sub_scales(&self) -> __m512i {
        six_bit_scales(&self.scales)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn mins(&self) -> __m256i {
        six_bit_mins(&self.scales)
    }
    #[inline(always)]
    fn scales(&self) -> (u16, u16) {
        (self.d.to_bits(), self.dmin.to_bits())
    }
}

impl SuperCodes for Q6_K {
    const OFFSET: i32 = 32;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn codes(&self) -> [__m512i; 4] {
        let mut codes = [_mm512_setzero_si512(); 4];
        let nibble = _mm512_set1_epi8(15);
        let top = _mm512_set1_epi8(0x30);
        // The two halves of a vector take different bits of the same bytes.
        let left = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
        let right = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
        for half in 0..2 {
            // SAFETY: the loads read 64 and 32 bytes.
            let (low, high) = unsafe {
                let high = _mm256_loadu_si256(self.qh[half].as_ptr().cast());
                (_mm512_loadu_si512(self.ql[half].as_ptr().cast()), _mm512_broadcast_i64x4(high))
            };
            let first = _mm512_and_si512(_mm512_sllv_epi16(high, left), top);
            let second = _mm512_and_si512(_mm512_srlv_epi16(high, right), top);
            codes[2 * half] = _mm512_or_si512(_mm512_and_si512(low, nibble), first);
            codes[2 * half + 1] =
                _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16::<4>(low), nibble), second);
        }
        codes
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn sub_scales(&self) -> __m512i {
        // SAFETY: the loads read 16 bytes each.
        let (scales, order) = unsafe {
            (_mm_loadu_si128(self.scales.as_ptr().cast()), _mm_loadu_si128(GROUPS.as_ptr().cast()))
        };
        _mm512_cvtepi8_epi32(_mm_shuffle_epi8(scales, order))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn mins(&self) -> __m256i {
        _mm256_setzero_si256()
    }
    #[inline(always)]
    fn scales(&self) -> (u16, u16) {
        (self.d.to_bits(), 0)
    }
}

/// The dots of some rows with one token.
///
/// # Safety
/// The CPU has what [`Avx512`] stands for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn super_dot_rows<Q: SuperCodes>(
    rows: [&[Q]; ROWS],
    row_blocks: usize,
    x: &activation::Quantised<'_>,
    token: usize,
) -> [f32; ROWS] {
    // SAFETY: as the caller promised; loads and stores are of arrays of their size.
    unsafe {
        let mut acc = _mm_setzero_ps();
        for c in 0..row_blocks {
            let x = XChunk::new::<Q>(x, token, c);
            let blocks = [&rows[0][c], &rows[1][c], &rows[2][c], &rows[3][c]];
            let order = _mm512_cvtepu8_epi32(_mm_loadu_si128(GROUPS.as_ptr().cast()));
            let x_sums = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(x.sums.as_ptr().cast()));
            let excess = _mm512_mullo_epi32(x_sums, _mm512_set1_epi32(Q::OFFSET));
            let mut scaled = [excess; ROWS];
            for r in 0..ROWS {
                prefetch(blocks[r], ROWS * row_blocks * size_of::<Q>());
                let sums = _mm512_sub_epi32(group_sums(blocks[r].codes(), x.codes), excess);
                scaled[r] = _mm512_mullo_epi32(sums, blocks[r].sub_scales());
            }
            let bits = |i: usize| blocks[i].scales().0 as i16;
            let d = _mm_cvtph_ps(_mm_set_epi16(0, 0, 0, 0, bits(3), bits(2), bits(1), bits(0)));
            let x_scale = _mm_set1_ps(x.scales[0]);
            acc = _mm_fmadd_ps(_mm_cvtepi32_ps(row_sums(scaled)), _mm_mul_ps(d, x_scale), acc);
            if Q::HAS_MIN {
                let x_sums = activation_sums(&x, 1);
                let mins = |r: usize| _mm256_mullo_epi32(blocks[r].mins(), x_sums);
                let low = _mm256_hadd_epi32(mins(0), mins(1));
                let high = _mm256_hadd_epi32(mins(2), mins(3));
                let sums = _mm256_hadd_epi32(low, high);
                let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
                let bits = |i: usize| (blocks[i].scales().1 ^ 0x8000) as i16;
                let m = _mm_cvtph_ps(_mm_set_epi16(0, 0, 0, 0, bits(3), bits(2), bits(1), bits(0)));
                acc = _mm_fmadd_ps(_mm_cvtepi32_ps(sums), _mm_mul_ps(m, x_scale), acc);
            }
        }
        let mut sums = [0.0; ROWS];
        _mm_storeu_ps(sums.as_mut_ptr(), acc);
        sums
    }
}

/// The sums of products of 16 unsigned codes with 16 activations, in the order of [`GROUPS`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn group_sums(codes: [__m512i; 4], x: &[i8; CHUNK]) -> __m512i {
    let x = x.as_chunks::<64>().0;
    let zero = _mm512_setzero_si512();
    let mut dots = [zero; 4];
    for i in 0..4 {
        // SAFETY: the load reads 64 bytes.
        let x = unsafe { _mm512_loadu_si512(x[i].as_ptr().cast()) };
        dots[i] = _mm512_dpbusd_epi32(zero, codes[i], x);
    }
    four_sums(dots)
}

/// In each 128-bit lane the sums of that lane of four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn four_sums(x: [__m512i; 4]) -> __m512i {
    let low = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    let high = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high))
}

/// The sum of all lanes of each of four rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn row_sums(rows: [__m512i; ROWS]) -> __m128i {
    let parts = four_sums(rows);
    let half = _mm256_add_epi32(_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64::<1>(parts));
    _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
}

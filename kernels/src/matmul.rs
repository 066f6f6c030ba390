//! Products of weight rows with activations: `out[t][r] = w[r] · x[t]`.
//!
//! The contract. Quantised formats: exact integer sums inside a group (integer sub-scales applied in integers), then
//! `acc = fma(sum, d_w · d_x, acc)` once a group, in order from k = 0, a minimum as a second fma of the same kind after it.
//! Plain formats: 16 strided accumulators (lane = k mod 16), fma, then the fixed tree. A row's result never depends on its
//! tile or its neighbours.
//!
//! Every quantised format runs through its normal form ([`Unpacked`]) in one of two loops: `rows`, which unpacks a row and
//! dots it with a few tokens, for decode; and `tile`, which interleaves 16 rows so that a lane is a row, for prefill. Which
//! one runs never shows in the result.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::activation::{self, SUMS, padded};
use crate::formats::{Format, Plain, Quantised, Unpacked};
#[cfg(target_arch = "x86_64")]
use crate::formats::{Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0};
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512};
use crate::isa::{Cpu, Isa, Scalar};
use crate::panel::PanelMut;

/// Up to this many tokens are computed row by row; more in tiles.
const FEW_TOKENS: usize = 4;
/// Tokens that a tile keeps in registers.
const TILE_TOKENS: usize = 4;
/// Values of a row that are unpacked at a time.
const CHUNK: usize = 256;

/// Activations as the weight's format wants them.
#[derive(Debug, Clone, Copy)]
pub enum X<'a> {
    /// For plain formats: `[tokens][k]`.
    F32(&'a [f32]),
    /// For quantised formats.
    Quantised(activation::Quantised<'a>),
}

/// One product: some rows of a weight with all tokens.
#[derive(Debug)]
pub struct MatMul<'a, 'o> {
    /// The rows' bytes, one after the other.
    pub w: &'a [u8],
    /// Values of a row.
    pub k: usize,
    /// Activations.
    pub x: X<'a>,
    /// One row for each token, one column for each weight row.
    pub out: PanelMut<'o>,
}

/// A format's kernels, one for each instruction set.
#[derive(Debug)]
pub(crate) struct Kernels {
    scalar: fn(Scalar, MatMul<'_, '_>),
    #[cfg(target_arch = "x86_64")]
    avx2: fn(Avx2, MatMul<'_, '_>),
    #[cfg(target_arch = "x86_64")]
    avx512: fn(Avx512, MatMul<'_, '_>),
}

impl Kernels {
    pub(crate) const fn quantised<Q: Quantised>() -> Kernels {
        Kernels {
            scalar: quantised::<Scalar, Q>,
            #[cfg(target_arch = "x86_64")]
            avx2: quantised::<Avx2, Q>,
            #[cfg(target_arch = "x86_64")]
            avx512: match Q::FORMAT {
                Format::Q4_0 => blocks32::<Q4_0>,
                Format::Q5_0 => blocks32::<Q5_0>,
                Format::Q8_0 => blocks32::<Q8_0>,
                Format::Q4_K => blocks256::<Q4_K>,
                Format::Q5_K => blocks256::<Q5_K>,
                Format::Q6_K => blocks256::<Q6_K>,
                _ => quantised::<Avx512, Q>,
            },
        }
    }

    pub(crate) const fn plain<P: Plain>() -> Kernels {
        Kernels {
            scalar: plain::<Scalar, P>,
            #[cfg(target_arch = "x86_64")]
            avx2: plain::<Avx2, P>,
            #[cfg(target_arch = "x86_64")]
            avx512: plain::<Avx512, P>,
        }
    }
}

/// Computes a product of rows stored as `format`. Rows and tokens for which bytes or activations are missing are left
/// alone; if `x` is not of the kind that the format wants, all are.
pub fn matmul(cpu: Cpu, format: Format, product: MatMul<'_, '_>) {
    let kernels = format.kernels();
    match cpu {
        Cpu::Scalar(isa) => (kernels.scalar)(isa, product),
        #[cfg(target_arch = "x86_64")]
        Cpu::Avx2(isa) => (kernels.avx2)(isa, product),
        #[cfg(target_arch = "x86_64")]
        Cpu::Avx512(isa) => (kernels.avx512)(isa, product),
    }
}

fn quantised<I: Isa, Q: Quantised>(isa: I, product: MatMul<'_, '_>) {
    with_rows(isa, product, rows::<I, Q>);
}

/// Formats of short blocks on AVX-512.
#[cfg(target_arch = "x86_64")]
fn blocks32<Q: avx512::Codes>(isa: Avx512, product: MatMul<'_, '_>) {
    with_rows(isa, product, avx512::rows::<Q>);
}

/// Formats of super-blocks on AVX-512.
#[cfg(target_arch = "x86_64")]
fn blocks256<Q: avx512::SuperCodes>(isa: Avx512, product: MatMul<'_, '_>) {
    with_rows(isa, product, avx512::super_rows::<Q>);
}

/// Computes a product with `rows` for few tokens and with tiles for many.
#[inline(always)]
fn with_rows<I: Isa, Q: Quantised>(
    isa: I,
    product: MatMul<'_, '_>,
    rows: impl FnOnce(I, &[Q], usize, activation::Quantised<'_>, usize, PanelMut<'_>),
) {
    let X::Quantised(x) = product.x else { return };
    let row_blocks = product.k / Q::LEN;
    let w = Q::cast(product.w);
    let tokens = (x.codes.len() / padded(product.k).max(1)).min(product.out.rows());
    if row_blocks == 0 || product.k != x.k {
        return;
    }
    isa.run(
        #[inline(always)]
        || {
            if tokens <= FEW_TOKENS {
                rows(isa, w, row_blocks, x, tokens, product.out);
            } else {
                tile::<I, Q>(isa, w, row_blocks, x, tokens, product.out);
            }
        },
    );
}

/// One token's activations in one chunk.
struct XChunk<'a> {
    codes: &'a [i8; CHUNK],
    sums: &'a [i32; SUMS],
    scales: &'a [f32],
}

impl<'a> XChunk<'a> {
    #[inline(always)]
    fn new<Q: Quantised>(x: &activation::Quantised<'a>, token: usize, c: usize) -> Self {
        let start = token * padded(x.k) + c * CHUNK;
        let block = Q::ACTIVATION.block_len();
        XChunk {
            codes: x.codes[start..].first_chunk().unwrap_or(&[0; CHUNK]),
            sums: x.sums[start / CHUNK * SUMS..].first_chunk().unwrap_or(&[0; SUMS]),
            scales: &x.scales[start / block..(start + CHUNK) / block],
        }
    }
}

impl XChunk<'_> {
    /// The sum of each 16 codes.
    #[inline(always)]
    fn sums16(&self) -> &[i32; 16] {
        self.sums.first_chunk().unwrap_or(&[0; 16])
    }
}

/// Unpacks a row's chunk `c` and returns how many values it has. Codes past a row's end are arbitrary: activations there
/// are zero.
#[inline(always)]
fn unpack_chunk<Q: Quantised>(row: &[Q], c: usize, out: &mut Unpacked) -> usize {
    let per_chunk = CHUNK / Q::LEN;
    let blocks = &row[c * per_chunk..row.len().min((c + 1) * per_chunk)];
    if Q::LEN == CHUNK {
        blocks[0].unpack(out);
        return CHUNK;
    }
    for (i, block) in blocks.iter().enumerate() {
        unpack_at(block, i, out);
    }
    blocks.len() * Q::LEN
}

/// Unpacks a short block to its place in a chunk.
#[inline(always)]
fn unpack_at<Q: Quantised>(block: &Q, i: usize, out: &mut Unpacked) {
    let mut one = Unpacked::ZERO;
    block.unpack(&mut one);
    let groups = Q::LEN / Q::GROUP;
    // Formats of short blocks have no integer sub-scales: `sub` and `mins` are ones, which nobody reads.
    out.codes[i * Q::LEN..(i + 1) * Q::LEN].copy_from_slice(&one.codes[..Q::LEN]);
    out.d[i * groups..(i + 1) * groups].copy_from_slice(&one.d[..groups]);
    if Q::HAS_MIN {
        out.m[i * groups..(i + 1) * groups].copy_from_slice(&one.m[..groups]);
    }
}

/// Rows that are computed side by side, so that one's chain of multiply-adds hides the other's.
const ROWS: usize = 2;

/// Row by row, for a few tokens.
#[inline(always)]
fn rows<I: Isa, Q: Quantised>(
    isa: I,
    w: &[Q],
    row_blocks: usize,
    x: activation::Quantised<'_>,
    tokens: usize,
    mut out: PanelMut<'_>,
) {
    let count = (w.len() / row_blocks).min(out.cols());
    let mut chunks = [Unpacked::ZERO; ROWS];
    for first in (0..count).step_by(ROWS) {
        let here = (count - first).min(ROWS);
        let mut acc = [[0.0f32; ROWS]; FEW_TOKENS];
        for c in 0..x.k.div_ceil(CHUNK) {
            let mut len = 0;
            for r in 0..here {
                len = unpack_chunk(&w[(first + r) * row_blocks..][..row_blocks], c, &mut chunks[r]);
            }
            for t in 0..tokens {
                acc[t] = dot_chunk::<I, Q>(isa, &chunks, &XChunk::new::<Q>(&x, t, c), len, acc[t]);
            }
        }
        for t in 0..tokens {
            out.row(t)[first..first + here].copy_from_slice(&acc[t][..here]);
        }
    }
}

/// `acc` and the dots of some rows' unpacked chunk with one token's.
#[inline(always)]
fn dot_chunk<I: Isa, Q: Quantised>(
    isa: I,
    w: &[Unpacked; ROWS],
    x: &XChunk<'_>,
    len: usize,
    mut acc: [f32; ROWS],
) -> [f32; ROWS] {
    if Q::GROUP == CHUNK {
        let scale = x.scales[0];
        for r in 0..ROWS {
            let sums = isa.mul_i(isa.dot16(&w[r].codes, x.codes, x.sums16()), isa.load_i16(&w[r].sub));
            acc[r] = isa.fma_one(isa.sum_i(sums) as f32, w[r].d[0] * scale, acc[r]);
            if Q::HAS_MIN {
                let mins = isa.mul_i(isa.load_i16(&w[r].mins), isa.load_i(x.sums16()));
                acc[r] = isa.fma_one(isa.sum_i(mins) as f32, w[r].m[0] * scale, acc[r]);
            }
        }
        return acc;
    }
    // Sums of 16 become sums of a group: the same for 16, of adjacent pairs for 32.
    let grouped = |sums: I::I| isa.to_f32(if Q::GROUP == 32 { isa.add_pairs(sums) } else { sums });
    let step = Q::GROUP / 16;
    let mut sums = [[0.0; 16]; ROWS];
    let mut scales = [[0.0; 16]; ROWS];
    let mut min_sums = [0.0; 16];
    let mut min_scales = [[0.0; 16]; ROWS];
    if Q::HAS_MIN {
        isa.store(grouped(isa.load_i(x.sums16())), &mut min_sums);
    }
    let groups = len / Q::GROUP;
    for r in 0..ROWS {
        isa.store(grouped(isa.dot16(&w[r].codes, x.codes, x.sums16())), &mut sums[r]);
        for g in 0..groups {
            let scale = x.scales[g * Q::GROUP / Q::ACTIVATION.block_len()];
            scales[r][g] = w[r].d[g] * scale;
            if Q::HAS_MIN {
                min_scales[r][g] = w[r].m[g] * scale;
            }
        }
    }
    for g in 0..groups {
        for r in 0..ROWS {
            acc[r] = isa.fma_one(sums[r][g * step], scales[r][g], acc[r]);
            if Q::HAS_MIN {
                acc[r] = isa.fma_one(min_sums[g * step], min_scales[r][g], acc[r]);
            }
        }
    }
    acc
}

/// Sixteen rows of one chunk, interleaved: everything about one row stands in one lane.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Tile {
    /// `codes[k / 4][4 · row + k % 4]`, with the instruction set's bias.
    codes: [[u8; 64]; CHUNK / 4],
    sub: [[i32; 16]; 16],
    /// `mins[k / 32][2 · row + k / 16 % 2]`.
    mins: [[i16; 32]; 8],
    d: [[f32; 16]; 16],
    m: [[f32; 16]; 16],
}

impl Tile {
    const ZERO: Tile = Tile {
        codes: [[0; 64]; CHUNK / 4],
        sub: [[0; 16]; 16],
        mins: [[0; 32]; 8],
        d: [[0.0; 16]; 16],
        m: [[0.0; 16]; 16],
    };

    /// Puts a row's chunk in a lane.
    #[inline(always)]
    fn set<I: Isa, Q: Quantised>(&mut self, lane: usize, chunk: &Unpacked) {
        for (codes, four) in self.codes.iter_mut().zip(chunk.codes.as_chunks::<4>().0) {
            let biased = four.map(|c| (c as u8) ^ I::CODE_BIAS);
            codes[4 * lane..4 * lane + 4].copy_from_slice(&biased);
        }
        for g in 0..CHUNK / Q::GROUP {
            self.d[g][lane] = chunk.d[g];
            if Q::HAS_MIN {
                self.m[g][lane] = chunk.m[g];
            }
        }
        // Only formats with one f32 scale for 256 have integer sub-scales.
        if Q::GROUP == CHUNK {
            for g in 0..16 {
                self.sub[g][lane] = chunk.sub[g].into();
                if Q::HAS_MIN {
                    self.mins[g / 2][2 * lane + g % 2] = chunk.mins[g];
                }
            }
        }
    }
}

/// Tiles of rows, for many tokens: as wide as the registers allow.
#[inline(always)]
fn tile<I: Isa, Q: Quantised>(
    isa: I,
    w: &[Q],
    row_blocks: usize,
    x: activation::Quantised<'_>,
    tokens: usize,
    out: PanelMut<'_>,
) {
    if I::WIDE_TILES {
        tiles::<I, Q, 2>(isa, w, row_blocks, x, tokens, out);
    } else {
        tiles::<I, Q, 1>(isa, w, row_blocks, x, tokens, out);
    }
}

/// `G` tiles of 16 rows side by side.
#[inline(always)]
fn tiles<I: Isa, Q: Quantised, const G: usize>(
    isa: I,
    w: &[Q],
    row_blocks: usize,
    x: activation::Quantised<'_>,
    tokens: usize,
    mut out: PanelMut<'_>,
) {
    let rows = (w.len() / row_blocks).min(out.cols());
    let mut tiles = [Tile::ZERO; G];
    let mut chunk = Unpacked::ZERO;
    for first in (0..rows).step_by(16 * G) {
        let here = (rows - first).min(16 * G);
        for c in 0..x.k.div_ceil(CHUNK) {
            let mut len = 0;
            for row in 0..here {
                len = unpack_chunk(&w[(first + row) * row_blocks..][..row_blocks], c, &mut chunk);
                tiles[row / 16].set::<I, Q>(row % 16, &chunk);
            }
            for t in (0..tokens).step_by(TILE_TOKENS) {
                // A block of fewer tokens at the end repeats its last one, and stores it once.
                let n = (tokens - t).min(TILE_TOKENS);
                let mut lanes = [[[0.0f32; 16]; G]; TILE_TOKENS];
                if c > 0 {
                    for i in 0..n {
                        let (whole, rest) = out.row(t + i)[first..first + here].as_chunks::<16>();
                        lanes[i][..whole.len()].copy_from_slice(whole);
                        if !rest.is_empty() {
                            lanes[i][whole.len()][..rest.len()].copy_from_slice(rest);
                        }
                    }
                }
                let chunk = |i: usize| XChunk::new::<Q>(&x, t + i.min(n - 1), c);
                tile_dot::<I, Q, G>(isa, &tiles, &[chunk(0), chunk(1), chunk(2), chunk(3)], len, &mut lanes);
                for i in 0..n {
                    let (whole, rest) = out.row(t + i)[first..first + here].as_chunks_mut::<16>();
                    whole.copy_from_slice(&lanes[i][..whole.len()]);
                    if !rest.is_empty() {
                        rest.copy_from_slice(&lanes[i][whole.len()][..rest.len()]);
                    }
                }
            }
        }
    }
}

/// Adds the dots of tiles with some tokens' chunk to `sums`.
#[inline(always)]
fn tile_dot<I: Isa, Q: Quantised, const G: usize>(
    isa: I,
    tiles: &[Tile; G],
    x: &[XChunk<'_>; TILE_TOKENS],
    len: usize,
    sums: &mut [[[f32; 16]; G]; TILE_TOKENS],
) {
    let block = Q::ACTIVATION.block_len();
    let zero = isa.splat_i(0);
    let mut acc = [[isa.splat(0.0); G]; TILE_TOKENS];
    for i in 0..TILE_TOKENS {
        for r in 0..G {
            acc[i][r] = isa.load(&sums[i][r]);
        }
    }
    // Values of one integer accumulation: one sub-scale, or one f32 scale.
    let step = if Q::GROUP == 32 { 32 } else { 16 };
    let starts = if Q::GROUP == 32 { 32 } else { 16 };
    let mut group = [[zero; G]; TILE_TOKENS];
    for s in 0..len.min(CHUNK) / step {
        let mut dot = [[zero; G]; TILE_TOKENS];
        for i in 0..TILE_TOKENS {
            let start = isa.splat_i(x[i].sums[starts + s]);
            for r in 0..G {
                dot[i][r] = start;
            }
        }
        for k in s * step / 4..(s + 1) * step / 4 {
            for i in 0..TILE_TOKENS {
                let four = x[i].codes.as_chunks::<4>().0[k];
                for r in 0..G {
                    dot[i][r] = isa.dot4(dot[i][r], &tiles[r].codes[k], four);
                }
            }
        }
        if Q::GROUP == CHUNK {
            for r in 0..G {
                let sub = isa.load_i(&tiles[r].sub[s]);
                for i in 0..TILE_TOKENS {
                    group[i][r] = isa.add_i(group[i][r], isa.mul_i(dot[i][r], sub));
                }
            }
            continue;
        }
        for i in 0..TILE_TOKENS {
            let scale = isa.splat(x[i].scales[s * Q::GROUP / block]);
            let min = (0..step / 16).map(|j| x[i].sums[s * step / 16 + j]).sum::<i32>() as f32;
            for r in 0..G {
                let d = isa.mul(isa.load(&tiles[r].d[s]), scale);
                acc[i][r] = isa.fma(isa.to_f32(dot[i][r]), d, acc[i][r]);
                if Q::HAS_MIN {
                    let m = isa.mul(isa.load(&tiles[r].m[s]), scale);
                    acc[i][r] = isa.fma(isa.splat(min), m, acc[i][r]);
                }
            }
        }
    }
    if Q::GROUP == CHUNK {
        for i in 0..TILE_TOKENS {
            let scale = isa.splat(x[i].scales[0]);
            for r in 0..G {
                let d = isa.mul(isa.load(&tiles[r].d[0]), scale);
                acc[i][r] = isa.fma(isa.to_f32(group[i][r]), d, acc[i][r]);
                if Q::HAS_MIN {
                    let mut mins = zero;
                    for j in 0..8 {
                        let pair = [x[i].sums[2 * j] as i16, x[i].sums[2 * j + 1] as i16];
                        mins = isa.dot2(mins, &tiles[r].mins[j], pair);
                    }
                    let m = isa.mul(isa.load(&tiles[r].m[0]), scale);
                    acc[i][r] = isa.fma(isa.to_f32(mins), m, acc[i][r]);
                }
            }
        }
    }
    for i in 0..TILE_TOKENS {
        for r in 0..G {
            isa.store(acc[i][r], &mut sums[i][r]);
        }
    }
}

/// Plain formats: four rows by four tokens in registers.
fn plain<I: Isa, P: Plain>(isa: I, product: MatMul<'_, '_>) {
    let X::F32(x) = product.x else { return };
    let (k, mut out) = (product.k, product.out);
    let w = P::cast(product.w);
    if k == 0 {
        return;
    }
    let (rows, tokens) = ((w.len() / k).min(out.cols()), (x.len() / k).min(out.rows()));
    isa.run(
        #[inline(always)]
        || {
            const N: usize = 4;
            for first in (0..rows).step_by(N) {
                for t in (0..tokens).step_by(N) {
                    // Short blocks at the edges repeat their last row or token, and store it once.
                    let w: [&[P]; N] = core::array::from_fn(|i| &w[(first + i).min(rows - 1) * k..][..k]);
                    let x: [&[f32]; N] = core::array::from_fn(|i| &x[(t + i).min(tokens - 1) * k..][..k]);
                    if tokens - t == 1 {
                        let sums = plain_dot::<I, P, N, 1>(isa, w, [x[0]]);
                        for (i, sum) in sums.iter().enumerate().take(rows - first) {
                            out.row(t)[first + i] = sum[0];
                        }
                        continue;
                    }
                    let sums = plain_dot::<I, P, N, N>(isa, w, x);
                    for i in 0..N.min(rows - first) {
                        for j in 0..N.min(tokens - t) {
                            out.row(t + j)[first + i] = sums[i][j];
                        }
                    }
                }
            }
        },
    );
}

/// The dots of `R` weight rows with `T` tokens.
#[inline(always)]
fn plain_dot<I: Isa, P: Plain, const R: usize, const T: usize>(
    isa: I,
    w: [&[P]; R],
    x: [&[f32]; T],
) -> [[f32; T]; R] {
    let w_runs = w.map(|w| w.as_chunks::<16>());
    let x_runs = x.map(|x| x.as_chunks::<16>());
    let mut acc = [[isa.splat(0.0); T]; R];
    for run in 0..w_runs[0].0.len() {
        plain_step::<I, P, R, T>(isa, &mut acc, w_runs.map(|w| &w.0[run]), x_runs.map(|x| &x.0[run]));
    }
    let rest = w_runs[0].1.len();
    if rest > 0 {
        // Past the end of a row, activations are zero; the weight that stands there is finite if the row's last one is.
        let w = w_runs.map(|w| {
            let mut run = [w.1[rest - 1]; 16];
            run[..rest].copy_from_slice(w.1);
            run
        });
        let x = x_runs.map(|x| {
            let mut run = [0.0; 16];
            run[..rest].copy_from_slice(x.1);
            run
        });
        plain_step::<I, P, R, T>(isa, &mut acc, w.each_ref(), x.each_ref());
    }
    let mut sums = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            sums[r][t] = isa.sum(acc[r][t]);
        }
    }
    sums
}

/// One run of 16 values of `R` weight rows and `T` tokens.
#[inline(always)]
fn plain_step<I: Isa, P: Plain, const R: usize, const T: usize>(
    isa: I,
    acc: &mut [[I::F; T]; R],
    w: [&[P; 16]; R],
    x: [&[f32; 16]; T],
) {
    let mut x_lanes = [isa.splat(0.0); T];
    for t in 0..T {
        x_lanes[t] = isa.load(x[t]);
    }
    for r in 0..R {
        let w = load_plain::<I, P>(isa, w[r]);
        for t in 0..T {
            acc[r][t] = isa.fma(w, x_lanes[t], acc[r][t]);
        }
    }
}

/// Sixteen plain values as vector lanes.
#[inline(always)]
fn load_plain<I: Isa, P: Plain>(isa: I, w: &[P; 16]) -> I::F {
    let bits16 = || {
        let words = P::bytes_of(w).as_chunks::<2>().0;
        core::array::from_fn(|i| u16::from_le_bytes(words[i]))
    };
    match P::FORMAT {
        Format::F16 => isa.load_f16(&bits16()),
        Format::BF16 => isa.load_bf16(&bits16()),
        _ => isa.load(&w.map(|v| v.value())),
    }
}

/// Reads rows of a table as f32: `out` is filled with row `row`, times `scale`.
pub fn embed(format: Format, table: &[u8], row: usize, scale: f32, out: &mut [f32]) {
    let Some(bytes) = format.row_bytes(out.len()) else { return };
    let Some(row) = row.checked_mul(bytes).and_then(|at| table.get(at..)?.get(..bytes)) else { return };
    if format.dequantize(row, out).is_ok() && scale != 1.0 {
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

//! Attention of query tokens over a paged KV cache, in one pass with online softmax (Milakov & Gimelshein
//! 2018; Dao et al. 2022).
//!
//! The contract: the cache is walked in chunks of [`CHUNK`] positions, counted from position 0. In a chunk, a
//! score is the sequential fused dot over the key's elements, times the scale; probabilities are
//! `exp(score - max)`, summed with lane = position mod 16, four runs in order, then the fixed tree; values
//! are accumulated position by position with fused multiply-adds. Chunks are merged in order. How work is
//! split never shows.
//!
//! Pages are those of [`crate::kv`].
//!
//! Scores and sums of values are the same product of a few rows (a row is a query head of a token) with 64
//! columns: positions the one time, elements the other. Its second factor is read where it lies in the page
//! and turned to f32 in registers; codes that many rows share are turned to f32 once.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use core::ops::Range;

use crate::isa::{Isa, WithIsa, kernels};
pub use crate::kv::{BLOCK, CHUNK, PageShape, Pages, PagesMut, write};
use crate::kv::{F32, KvFormat, raw, with_format};
use crate::math;

const RUNS: usize = CHUNK / 16;

/// A kernel: the attention of consecutive tokens of one sequence, for some query heads that share one KV
/// head.
#[derive(Debug)]
pub struct Attend<'a> {
    /// `[tokens][q_stride]`, of which each token's `[heads][key_dim]` come first; the last token may end
    /// there.
    pub q: &'a [f32],
    /// Elements from a token's queries to the next's.
    pub q_stride: usize,
    /// `[tokens][out_stride]`, of which each token's `[heads][value_dim]` come first; the last token may end
    /// there.
    pub out: &'a mut [f32],
    /// Elements from a token's outputs to the next's.
    pub out_stride: usize,
    /// Tokens.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// The layer's cache.
    pub pages: Pages<'a>,
    /// Its shape.
    pub shape: PageShape,
    /// The sequence's pages in order.
    pub table: &'a [u32],
    /// The KV head.
    pub kv_head: usize,
    /// The position of the first token.
    pub position: usize,
    /// The end of the positions that the sequence has.
    pub end: usize,
    /// Which of them a token sees.
    pub sight: Sight,
    /// A factor on scores.
    pub scale: f32,
    /// One more, by the token's position.
    pub growth: Option<Growth<'a>>,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Each head's factor on the distance of positions, `[heads]`, which is taken off the score (ALiBi).
    pub slopes: Option<&'a [f32]>,
    /// Sinks: an extra logit in each head's denominator, `[heads]`.
    pub sinks: Option<&'a [f32]>,
}

/// A kernel: the first part of [`Attend`] where chunks are split between threads; [`Merge`] is the second.
#[derive(Debug)]
pub struct AttendChunks<'a> {
    /// The attention of one token and at most [`ROWS`] heads. `out` is `[chunks][heads][value_dim + 2]`: each
    /// head's values, their weights' maximum and sum.
    pub attend: Attend<'a>,
    /// Chunks of which the token sees positions.
    pub chunks: Range<usize>,
}

/// A kernel: merges what [`AttendChunks`] found for one head, chunks in order.
#[derive(Debug)]
pub struct Merge<'a> {
    /// `[chunks][stride]`, of which each chunk's `[value_dim + 2]` come first; the last chunk may end there.
    pub chunks: &'a [f32],
    /// Elements from a chunk to the next.
    pub stride: usize,
    /// The output so far, `[value_dim]`, its maximum and its sum; `fresh` if these hold nothing yet.
    pub out: &'a mut [f32],
    /// See `out`.
    pub max: &'a mut f32,
    /// See `out`.
    pub sum: &'a mut f32,
    /// See `out`.
    pub fresh: bool,
    /// Whether these are the last chunks.
    pub last: bool,
    /// One more logit in the denominator.
    pub sink: Option<f32>,
}

/// Which positions around its own a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sight {
    /// How many up to its own, which counts; `None`: all.
    pub window: Option<u32>,
    /// How many after its own, as far as the sequence has them; 0: attention is causal.
    pub after: u32,
    /// Whether windows lie side by side, the first at position 0: a token sees its own window up to its own position, and
    /// nothing of those before.
    pub aligned: bool,
}

impl Sight {
    /// Returns the positions that the token at `position` sees of a sequence that has `end`.
    pub const fn positions(self, position: usize, end: usize) -> Range<usize> {
        let own = position.saturating_add(1);
        let first = match self.window {
            // A window of nothing has no borders.
            Some(window) if self.aligned && window > 0 => position - position % window as usize,
            Some(window) => own.saturating_sub(window as usize),
            None => 0,
        };
        let last = own.saturating_add(self.after as usize);
        first..if last < end { last } else { end }
    }

    /// Returns the chunks of these positions.
    pub const fn chunks(self, position: usize, end: usize) -> Range<usize> {
        let Range { start, end } = self.positions(position, end);
        start / CHUNK..end.div_ceil(CHUNK)
    }
}

/// Factors on the scores of a token by its position: `factors[(position + ahead) / period]`, and the last one beyond.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth<'a> {
    /// One for each `period` positions.
    pub factors: &'a [f32],
    /// Positions that have the same factor.
    pub period: u32,
    /// Added to positions.
    pub ahead: u32,
}

impl Growth<'_> {
    /// Returns the factor of a position.
    pub fn at(&self, position: usize) -> f32 {
        let step = position.saturating_add(self.ahead as usize) / (self.period as usize).max(1);
        self.factors.get(step).or(self.factors.last()).copied().unwrap_or(1.0)
    }

    /// Returns the factor of a position on scores that have another one already.
    pub fn scale(growth: Option<Self>, scale: f32, position: usize) -> f32 {
        growth.map_or(scale, |growth| scale * growth.at(position))
    }
}

kernels!(Attend<'_>, AttendChunks<'_>, Merge<'_>);

impl WithIsa for Attend<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let Pages { format, bytes } = self.pages;
        let mut work = Work::NEW;
        with_format!(format, F => attend::<I, F>(isa, self, raw(bytes), &mut work), ());
    }
}

impl WithIsa for AttendChunks<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let Pages { format, bytes } = self.attend.pages;
        let mut work = Work::NEW;
        with_format!(format, F => attend_chunks::<I, F>(isa, self, raw(bytes), &mut work), ());
    }
}

impl WithIsa for Merge<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let mut fresh = self.fresh;
        for chunk in self.chunks.chunks(self.stride) {
            let Some((values, &[chunk_max, chunk_sum, ..])) = chunk.split_at_checked(self.out.len()) else {
                return;
            };
            let new_max = if chunk_max > *self.max { chunk_max } else { *self.max };
            let (old, new) = (exp_one(isa, *self.max - new_max), exp_one(isa, chunk_max - new_max));
            let merged = isa.fma_one(*self.sum, old, chunk_sum * new);
            *self.sum = if fresh { chunk_sum } else { merged };
            *self.max = if fresh { chunk_max } else { new_max };
            merge(isa, self.out, values, (!fresh).then_some((old, new)));
            fresh = false;
        }
        if self.last {
            finish(isa, self.out, *self.max, *self.sum, self.sink);
        }
    }
}

/// Maximum rows that share a pass over the cache; few where the stack is small.
pub const ROWS: usize = if cfg!(target_os = "none") { 16 } else { 64 };

/// More rows than this make it worth to compute what codes stand for once for all of them.
const FEW_ROWS: usize = 16;

/// Memory of a pass, in order of use: a part of the page, scores that become probabilities, and what the page
/// adds to the output.
struct Work {
    tile: [[f32; CHUNK]; CHUNK],
    p: [[f32; CHUNK]; ROWS],
    added: [[f32; CHUNK]; ROWS],
}

impl Work {
    const NEW: Work =
        Work { tile: [[0.0; CHUNK]; CHUNK], p: [[0.0; CHUNK]; ROWS], added: [[0.0; CHUNK]; ROWS] };
}

#[inline(always)]
fn attend<I: Isa, T: KvFormat>(isa: I, mut a: Attend<'_>, data: &[T::Raw], work: &mut Work) {
    let out = core::mem::take(&mut a.out);
    let tokens = (ROWS / a.heads.max(1)).max(1);
    for t in (0..a.tokens).step_by(tokens) {
        let t = t..(t + tokens).min(a.tokens);
        for h in (0..a.heads).step_by(ROWS) {
            let h = h..(h + ROWS).min(a.heads);
            let value_dim = a.shape.value_dim;
            let rows = (&mut *out, value_dim);
            let (max, sum) =
                attend_rows::<I, T>(isa, &a, data, t.clone(), h.clone(), 0..usize::MAX, rows, work);
            for r in 0..t.len() * h.len() {
                let (t, h) = (t.start + r / h.len(), h.start + r % h.len());
                let out = &mut out[t * a.out_stride + h * value_dim..][..value_dim];
                finish(isa, out, max[r], sum[r], a.sinks.and_then(|s| s.get(h).copied()));
            }
        }
    }
}

#[inline(always)]
fn attend_chunks<I: Isa, T: KvFormat>(isa: I, mut a: AttendChunks<'_>, data: &[T::Raw], work: &mut Work) {
    let out = core::mem::take(&mut a.attend.out);
    let (a, chunks) = (a.attend, a.chunks);
    let head = a.shape.value_dim + 2;
    for (chunk, out) in chunks.zip(out.chunks_exact_mut(a.heads * head)) {
        let rows = (&mut *out, head);
        let (max, sum) =
            attend_rows::<I, T>(isa, &a, data, 0..1, 0..a.heads.min(ROWS), chunk..chunk + 1, rows, work);
        for (r, out) in out.chunks_exact_mut(head).enumerate() {
            out[head - 2..].copy_from_slice(&[max[r], sum[r]]);
        }
    }
}

/// The attention of tokens `t` and heads `h`, at most [`ROWS`] rows, to those of `chunks` that they see:
/// values times weights, and the maximum and the sum of the weights. Outputs of a token's heads are as far
/// apart as `out` says. Compiled once for both kernels.
#[inline(never)]
#[allow(
    clippy::too_many_arguments,
    reason = "what is passed on from kernel to kernel, and what differs between them"
)]
fn attend_rows<I: Isa, T: KvFormat>(
    isa: I,
    a: &Attend<'_>,
    data: &[T::Raw],
    t: Range<usize>,
    h: Range<usize>,
    chunks: Range<usize>,
    (out, out_head): (&mut [f32], usize),
    work: &mut Work,
) -> ([f32; ROWS], [f32; ROWS]) {
    isa.run(
        #[inline(always)]
        || attend_rows_inline::<I, T>(isa, a, data, t, h, chunks, (out, out_head), work),
    )
}

/// [`attend_rows`] as vector code.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "see there")]
fn attend_rows_inline<I: Isa, T: KvFormat>(
    isa: I,
    a: &Attend<'_>,
    data: &[T::Raw],
    t: Range<usize>,
    h: Range<usize>,
    chunks: Range<usize>,
    (out, out_head): (&mut [f32], usize),
    work: &mut Work,
) -> ([f32; ROWS], [f32; ROWS]) {
    let Work { tile, p, added } = work;
    let (key_dim, value_dim) = (a.shape.key_dim, a.shape.value_dim);
    let n = t.len() * h.len();
    let shared = T::SCALED && n > FEW_ROWS;
    let (mut q_at, mut out_at, mut p_at) = ([0; ROWS], [0; ROWS], [0; ROWS]);
    let mut positions = [const { 0..0 }; ROWS];
    for r in 0..n {
        let (t, h) = (t.start + r / h.len(), h.start + r % h.len());
        (q_at[r], out_at[r]) = (t * a.q_stride + h * key_dim, t * a.out_stride + h * out_head);
        (p_at[r], positions[r]) = (r * CHUNK, a.sight.positions(a.position + t, a.end));
    }
    let (mut max, mut sum, mut started) = ([f32::NEG_INFINITY; ROWS], [0.0f32; ROWS], [false; ROWS]);
    let (mut old, mut new) = ([0.0; ROWS], [0.0; ROWS]);
    let (mut chunk_max, mut chunk_sum) = ([0.0; ROWS], [0.0; ROWS]);
    let mut valid = [(0, 0); ROWS];
    let end = positions[n - 1].end.div_ceil(CHUNK);
    let chunks = chunks.start.max(positions[0].start / CHUNK)..chunks.end.min(end);
    let len = a.shape.bytes(a.pages.format) / size_of::<T::Raw>();
    let start = |chunk: usize| a.table.get(chunk).map_or(usize::MAX, |&p| (p as usize).saturating_mul(len));
    for chunk in chunks {
        let Some(page) = data.get(start(chunk)..).and_then(|rest| rest.get(..len)) else { continue };
        // Each line of the next page is asked for while its counterpart in this one is read.
        let next = if chunk + 1 < end { start(chunk + 1) } else { start(chunk) };
        let ahead = next.wrapping_sub(start(chunk)).wrapping_mul(size_of::<T::Raw>());
        // The positions of this chunk that each row sees, and all that any row sees.
        let mut all = (CHUNK, 0);
        for r in 0..n {
            let place = |x: usize| x.saturating_sub(chunk * CHUNK).min(CHUNK);
            valid[r] = (place(positions[r].start), place(positions[r].end));
            all = (all.0.min(valid[r].0), all.1.max(valid[r].1));
        }

        let runs = all.1.div_ceil(16);
        for d in (0..key_dim).step_by(CHUNK) {
            let first = a.kv_head * key_dim + d;
            let keys = Factor {
                elements: &page[a.shape.key(first) / T::PACKED..],
                stride: CHUNK,
                rows: (0, (key_dim - d).min(CHUNK)),
                scales: &scales::<I, T>(isa, page, a.shape, first / BLOCK),
                ahead,
            };
            let (q, at) = (&a.q[d..], &q_at[..n]);
            if shared {
                let keys = keys.copy::<I, true>(isa, CHUNK, tile);
                products::<I, F32, true>(isa, q, at, keys, runs, d == 0, p);
            } else {
                products::<I, T, true>(isa, q, at, keys, runs, d == 0, p);
            }
        }
        // Weights of what is kept of the output so far, and of what is added. Few steps at a time for all
        // rows, because the steps of one row wait for each other.
        for r in 0..n {
            if valid[r].0 < valid[r].1 {
                let (t, h) = (t.start + r / h.len(), h.start + r % h.len());
                // The token's own position, counted from the chunk's first.
                let own = (a.position + t) as f32 - (chunk * CHUNK) as f32;
                let bias = a.slopes.map(|slopes| (slopes[h], own));
                let scale = Growth::scale(a.growth, a.scale, a.position + t);
                chunk_max[r] = scores(isa, &mut p[r], scale, a.softcap, bias, valid[r]);
            }
        }
        for r in 0..n {
            if valid[r].0 < valid[r].1 {
                chunk_sum[r] = probabilities(isa, &mut p[r], chunk_max[r]);
                let new_max = if chunk_max[r] > max[r] { chunk_max[r] } else { max[r] };
                (old[r], new[r]) = (max[r] - new_max, chunk_max[r] - new_max);
                max[r] = new_max;
            }
        }
        for weights in [&mut old, &mut new] {
            for x in weights[..n.next_multiple_of(16)].as_chunks_mut::<16>().0 {
                isa.store(math::exp_falling(isa, isa.load(x)), x);
            }
        }
        for r in 0..n {
            if valid[r].0 < valid[r].1 {
                let merged = isa.fma_one(sum[r], old[r], chunk_sum[r] * new[r]);
                sum[r] = if started[r] { merged } else { chunk_sum[r] };
            }
        }
        for d in (0..value_dim).step_by(CHUNK) {
            let width = (value_dim - d).min(CHUNK);
            // Latent values lie as keys do.
            let (first, place, stride, rows) = match a.shape.latent {
                true => (d, a.shape.key(d), CHUNK, (0, width)),
                false => (
                    a.shape.kv_heads * key_dim + a.kv_head * value_dim + d,
                    a.shape.value(a.kv_head, 0) + d,
                    value_dim,
                    all,
                ),
            };
            let values = Factor {
                elements: &page[place / T::PACKED..],
                stride,
                rows,
                scales: &scales::<I, T>(isa, page, a.shape, first / BLOCK),
                ahead,
            };
            let copied = if a.shape.latent {
                values.copy::<I, true>(isa, CHUNK, tile);
                transpose(tile);
                let elements = tile.as_flattened();
                Some(Factor { elements, stride: CHUNK, rows: all, scales: values.scales, ahead: 0 })
            } else {
                (shared || width < CHUNK).then(|| values.copy::<I, false>(isa, width, tile))
            };
            let mut r = 0;
            while r < n {
                let (low, high) = valid[r];
                let same = valid[r..n].iter().take_while(|&&v| v == (low, high)).count();
                if low < high {
                    let (at, out) = (&p_at[r..r + same], &mut added[r..r + same]);
                    let (p, runs) = (p.as_flattened(), width.div_ceil(16));
                    let rows = (low, high);
                    if let Some(copied) = copied {
                        products::<I, F32, false>(isa, p, at, Factor { rows, ..copied }, runs, true, out);
                    } else {
                        products::<I, T, false>(isa, p, at, Factor { rows, ..values }, runs, true, out);
                    }
                }
                r += same;
            }
            for r in 0..n {
                if valid[r].0 < valid[r].1 {
                    let out = &mut out[out_at[r] + d..][..width];
                    merge(isa, out, &added[r], started[r].then_some((old[r], new[r])));
                }
            }
        }
        for r in 0..n {
            started[r] |= valid[r].0 < valid[r].1;
        }
    }
    (max, sum)
}

/// Exchanges rows and columns.
#[inline(always)]
fn transpose(tile: &mut [[f32; CHUNK]; CHUNK]) {
    for i in 0..CHUNK {
        for j in 0..i {
            (tile[i][j], tile[j][i]) = (tile[j][i], tile[i][j]);
        }
    }
}

/// Adds the sink and divides by the sum.
#[inline(always)]
fn finish<I: Isa>(isa: I, out: &mut [f32], max: f32, mut sum: f32, sink: Option<f32>) {
    let mut scale = 1.0;
    if let Some(sink) = sink {
        let new_max = if sink > max { sink } else { max };
        scale = exp_one(isa, max - new_max);
        sum = isa.fma_one(sum, scale, exp_one(isa, sink - new_max));
    }
    let inverse = scale / sum;
    for x in out {
        *x *= inverse;
    }
}

#[inline(always)]
fn exp_one<I: Isa>(isa: I, x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    isa.store(math::exp(isa, isa.splat(x)), &mut lanes);
    lanes[0]
}

/// The scales of two blocks of all positions, from number `first` on; the second may not be there.
type Scales = [[f32; CHUNK]; CHUNK / BLOCK];

#[inline(always)]
fn scales<I: Isa, T: KvFormat>(isa: I, page: &[T::Raw], shape: PageShape, first: usize) -> Scales {
    let mut scales = [[1.0; CHUNK]; CHUNK / BLOCK];
    if T::SCALED {
        for (i, scales) in scales.iter_mut().enumerate() {
            for (run, scales) in scales.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                isa.store(T::scales(isa, page, shape, first + i, 16 * run), scales);
            }
        }
    }
    scales
}

/// The second factor of a product: rows of elements in the cache or in a tile.
#[derive(Clone, Copy)]
struct Factor<'a, T: KvFormat> {
    elements: &'a [T::Raw],
    /// Elements from a row to the next.
    stride: usize,
    /// The first row that counts, and the end.
    rows: (usize, usize),
    scales: &'a Scales,
    /// Bytes from a row to its counterpart in the next page.
    ahead: usize,
}

impl<'a, T: KvFormat> Factor<'a, T> {
    /// `R` times sixteen columns of a row, from run number `first` on.
    #[inline(always)]
    fn lanes<I: Isa, const KEYS: bool, const R: usize>(&self, isa: I, row: usize, first: usize) -> [I::F; R] {
        let mut x = T::lanes::<I, R>(isa, self.elements, row * self.stride + 16 * first);
        if T::SCALED {
            for run in 0..R {
                x[run] = self.scaled::<I, KEYS>(isa, x[run], row, first + run);
            }
        }
        x
    }

    /// Sixteen codes times their scales.
    #[inline(always)]
    fn scaled<I: Isa, const KEYS: bool>(&self, isa: I, x: I::F, row: usize, run: usize) -> I::F {
        if KEYS {
            isa.mul(x, isa.load(&self.scales[row / BLOCK].as_chunks::<16>().0[run]))
        } else {
            isa.mul(x, isa.splat(self.scales[run * 16 / BLOCK][row]))
        }
    }

    /// The first `width` columns in f32.
    #[inline(always)]
    fn copy<'b, I: Isa, const KEYS: bool>(
        &self,
        isa: I,
        width: usize,
        tile: &'b mut [[f32; CHUNK]; CHUNK],
    ) -> Factor<'b, F32>
    where
        'a: 'b,
    {
        for k in self.rows.0..self.rows.1 {
            for (run, out) in tile[k].as_chunks_mut::<16>().0.iter_mut().take(width.div_ceil(16)).enumerate()
            {
                let at = k * self.stride + 16 * run;
                let [x] = if at + 16 <= self.elements.len() * T::PACKED {
                    self.lanes::<I, KEYS, 1>(isa, k, run)
                } else {
                    // Zeros after the end of the page, which is within a run only where nothing is packed.
                    let (rest, mut padded) = (&self.elements[at / T::PACKED..], [T::Raw::default(); 16]);
                    padded[..rest.len()].copy_from_slice(rest);
                    T::lanes::<I, 1>(isa, &padded, 0)
                };
                isa.store(x, out);
            }
        }
        Factor {
            elements: tile.as_flattened(),
            stride: CHUNK,
            rows: self.rows,
            scales: self.scales,
            ahead: 0,
        }
    }
}

/// Adds to each row of `out`, or to zeros if it is `fresh`, the product of a row of `a`, which starts at its
/// place of `at`, with `b`; in order of the rows of `b`. What is in `out` after so many runs of sixteen
/// columns is arbitrary. Rows of `KEYS` are their elements, columns positions; of values the other way round.
#[inline(always)]
fn products<I: Isa, T: KvFormat, const KEYS: bool>(
    isa: I,
    a: &[f32],
    at: &[usize],
    b: Factor<'_, T>,
    runs: usize,
    fresh: bool,
    out: &mut [[f32; CHUNK]],
) {
    let wide = I::WIDE_TILES && runs > 2;
    let mut r = 0;
    while r < at.len() {
        let (at, out) = (&at[r..], &mut out[r..]);
        // The first rows ask for the next page.
        let b = Factor { ahead: if r == 0 { b.ahead } else { 0 }, ..b };
        r += match (at.len(), wide) {
            (8.., _) if I::WIDE_TILES => product::<I, T, KEYS, 8, 2>(isa, a, at, b, runs, fresh, out),
            (4.., true) => product::<I, T, KEYS, 4, 4>(isa, a, at, b, runs, fresh, out),
            (4.., false) => product::<I, T, KEYS, 4, 1>(isa, a, at, b, runs, fresh, out),
            (2.., true) => product::<I, T, KEYS, 2, 4>(isa, a, at, b, runs, fresh, out),
            (2.., false) => product::<I, T, KEYS, 2, 2>(isa, a, at, b, runs, fresh, out),
            _ => product::<I, T, KEYS, 1, 4>(isa, a, at, b, runs, fresh, out),
        };
    }
}

/// [`products`] of the first `N` rows, `R` runs at a time; returns `N`.
#[inline(always)]
fn product<I: Isa, T: KvFormat, const KEYS: bool, const N: usize, const R: usize>(
    isa: I,
    a: &[f32],
    at: &[usize],
    b: Factor<'_, T>,
    runs: usize,
    fresh: bool,
    out: &mut [[f32; CHUNK]],
) -> usize {
    let mut rows: [&[f32]; N] = [&[]; N];
    for h in 0..N {
        rows[h] = &a[at[h]..][..b.rows.1];
    }
    for first in (0..runs).step_by(R) {
        let mut acc = [[isa.splat(0.0); R]; N];
        for h in 0..N {
            for run in 0..R {
                if !fresh {
                    acc[h][run] = isa.load(&out[h].as_chunks::<16>().0[first + run]);
                }
            }
        }
        for k in b.rows.0..b.rows.1 {
            let ahead = &b.elements[(k * b.stride + 16 * first) / T::PACKED..];
            for line in (0..16 * R * size_of::<T::Raw>() / T::PACKED).step_by(64) {
                isa.prefetch::<false, _>(ahead, b.ahead.wrapping_add(line));
            }
            let x = b.lanes::<I, KEYS, R>(isa, k, first);
            for h in 0..N {
                let factor = isa.splat(rows[h][k]);
                for run in 0..R {
                    acc[h][run] = isa.fma(factor, x[run], acc[h][run]);
                }
            }
        }
        for h in 0..N {
            for run in 0..R {
                isa.store(acc[h][run], &mut out[h].as_chunks_mut::<16>().0[first + run]);
            }
        }
    }
    N
}

/// Turns dots into scores, those of positions that are not `valid` into minus infinity, and returns the
/// largest.
#[inline(always)]
fn scores<I: Isa>(
    isa: I,
    p: &mut [f32; CHUNK],
    scale: f32,
    softcap: Option<f32>,
    bias: Option<(f32, f32)>,
    valid: (usize, usize),
) -> f32 {
    let p = p.as_chunks_mut::<16>().0;
    let mut x = [isa.splat(0.0); RUNS];
    for run in 0..RUNS {
        x[run] = isa.mul(isa.load(&p[run]), isa.splat(scale));
    }
    if let Some(cap) = softcap {
        for run in 0..RUNS {
            x[run] = isa.mul(isa.splat(cap), math::tanh(isa, isa.div(x[run], isa.splat(cap))));
        }
    }
    if let Some((slope, own)) = bias {
        for run in 0..RUNS {
            let position = isa.add(isa.load(&LANES), isa.splat(16.0 * run as f32));
            let ahead = isa.sub(position, isa.splat(own));
            let distance = isa.max(ahead, isa.sub(isa.splat(0.0), ahead));
            x[run] = isa.fma(isa.splat(-slope), distance, x[run]);
        }
    }
    let none = isa.splat(f32::NEG_INFINITY);
    if valid != (0, CHUNK) {
        let (low, high) = (isa.splat(valid.0 as f32 - 0.5), isa.splat(valid.1 as f32 - 0.5));
        for run in 0..RUNS {
            let position = isa.add(isa.load(&LANES), isa.splat(16.0 * run as f32));
            x[run] = isa.select_gt(position, low, x[run], none);
            x[run] = isa.select_gt(high, position, x[run], none);
        }
    }
    let mut max = none;
    for run in 0..RUNS {
        isa.store(x[run], &mut p[run]);
        max = isa.max(x[run], max);
    }
    isa.largest(max)
}

/// Turns scores into `exp(score - max)`, which is zero for minus infinity, and returns their sum.
#[inline(always)]
fn probabilities<I: Isa>(isa: I, p: &mut [f32; CHUNK], max: f32) -> f32 {
    let mut sum = isa.splat(0.0);
    for p in p.as_chunks_mut::<16>().0 {
        let x = math::exp_falling(isa, isa.sub(isa.load(p), isa.splat(max)));
        isa.store(x, p);
        sum = isa.add(sum, x);
    }
    isa.sum(sum)
}

/// The number of each lane.
const LANES: [f32; 16] = {
    let mut lanes = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        lanes[i] = i as f32;
        i += 1;
    }
    lanes
};

/// `out = old · out + new · added`, or what was added if there are no weights.
#[inline(always)]
fn merge<I: Isa>(isa: I, out: &mut [f32], added: &[f32], weights: Option<(f32, f32)>) {
    let Some((old, new)) = weights else {
        out.copy_from_slice(&added[..out.len()]);
        return;
    };
    let (runs, rest) = out.as_chunks_mut::<16>();
    let (added_runs, added_rest) = added.split_at(16 * runs.len());
    for (run, x) in runs.iter_mut().zip(added_runs.as_chunks::<16>().0) {
        let x = isa.mul(isa.load(x), isa.splat(new));
        isa.store(isa.fma(isa.load(run), isa.splat(old), x), run);
    }
    for (out, x) in rest.iter_mut().zip(added_rest) {
        *out = isa.fma_one(*out, old, x * new);
    }
}

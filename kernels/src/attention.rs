//! One query token's attention over a paged KV cache, in one pass with online softmax (Milakov & Gimelshein 2018; Dao et
//! al. 2022).
//!
//! The contract: the cache is walked in chunks of [`CHUNK`] positions, counted from position 0. In a chunk, a score is the
//! sequential fused dot over the key's elements, times the scale; probabilities are `exp(score - max)`, summed with lane
//! = position mod 16, four runs in order, then the fixed tree; values are accumulated position by position with fused
//! multiply-adds. Chunks are merged in order. How work is split never shows.
//!
//! A page holds one chunk: keys transposed, `[kv_heads][key_dim][CHUNK]`, so that a lane is a position and no score needs a
//! reduction; then values `[kv_heads][CHUNK][value_dim]`.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use crate::isa::{Isa, WithIsa};
use crate::math;

/// Positions in a chunk and in a page.
pub const CHUNK: usize = 64;
const RUNS: usize = CHUNK / 16;

/// The shape of a layer's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageShape {
    /// Heads with keys and values of their own.
    pub kv_heads: usize,
    /// Elements of a key.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
}

impl PageShape {
    /// Elements of a page.
    pub const fn elements(&self) -> usize {
        self.kv_heads * (self.key_dim + self.value_dim) * CHUNK
    }

    const fn key(&self, head: usize) -> usize {
        head * self.key_dim * CHUNK
    }

    const fn value(&self, head: usize) -> usize {
        (self.kv_heads * self.key_dim + head * self.value_dim) * CHUNK
    }
}

/// A cache's elements.
#[derive(Debug, Clone, Copy)]
pub enum Pages<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [u16]),
}

/// A cache's elements, to write.
#[derive(Debug)]
pub enum PagesMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision, rounded to nearest even.
    F16(&'a mut [u16]),
}

/// Stores one position's keys `[kv_heads][key_dim]` and values `[kv_heads][value_dim]` at `slot` of page `page`.
/// Does nothing if the page is not there.
pub fn write(pages: &mut PagesMut<'_>, shape: PageShape, page: usize, slot: usize, k: &[f32], v: &[f32]) {
    match pages {
        PagesMut::F32(data) => write_as(data, shape, page, slot, k, v, |x| x),
        PagesMut::F16(data) => write_as(data, shape, page, slot, k, v, math::f32_to_f16),
    }
}

fn write_as<T>(
    data: &mut [T],
    shape: PageShape,
    page: usize,
    slot: usize,
    k: &[f32],
    v: &[f32],
    convert: impl Fn(f32) -> T,
) {
    let start = page.saturating_mul(shape.elements());
    let Some(data) = data.get_mut(start..).and_then(|d| d.get_mut(..shape.elements())) else { return };
    let (keys, values) = data.split_at_mut(shape.value(0));
    for (column, &x) in keys.chunks_exact_mut(CHUNK).zip(k) {
        column[slot] = convert(x);
    }
    for (head, v) in values.chunks_exact_mut(CHUNK * shape.value_dim).zip(v.chunks_exact(shape.value_dim)) {
        for (out, &x) in head[slot * shape.value_dim..].iter_mut().zip(v) {
            *out = convert(x);
        }
    }
}

/// A kernel: the attention of some query heads that share one KV head.
#[derive(Debug)]
pub struct Attend<'a> {
    /// `[heads][key_dim]`.
    pub q: &'a [f32],
    /// `[heads][value_dim]`.
    pub out: &'a mut [f32],
    /// The layer's cache.
    pub pages: Pages<'a>,
    /// Its shape.
    pub shape: PageShape,
    /// The sequence's pages in order.
    pub table: &'a [u32],
    /// The KV head.
    pub kv_head: usize,
    /// First position attended to.
    pub first: usize,
    /// One past the last.
    pub end: usize,
    /// A factor on scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// One more logit in each head's denominator.
    pub sinks: Option<&'a [f32]>,
}

/// An element type of the cache.
trait Element: Copy {
    fn load<I: Isa>(isa: I, x: &[Self; 16]) -> I::F;
}

impl Element for f32 {
    #[inline(always)]
    fn load<I: Isa>(isa: I, x: &[f32; 16]) -> I::F {
        isa.load(x)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<I: Isa>(isa: I, x: &[u16; 16]) -> I::F {
        isa.load_f16(x)
    }
}

impl WithIsa for Attend<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        match self.pages {
            Pages::F32(data) => attend(isa, self, data),
            Pages::F16(data) => attend(isa, self, data),
        }
    }
}

/// Heads in fours, that keys and values may be read once for several, then those that are left.
#[inline(always)]
fn attend<I: Isa, T: Element>(isa: I, mut a: Attend<'_>, data: &[T]) {
    let out = core::mem::take(&mut a.out);
    let (key_dim, value_dim) = (a.shape.key_dim, a.shape.value_dim);
    let heads = a.q.len() / key_dim;
    let (mut q_rest, mut out_rest) = (a.q, out);
    let mut head = 0;
    while head < heads {
        let n = match heads - head {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let (q, q_after) = q_rest.split_at(n * key_dim);
        let (out, out_after) = out_rest.split_at_mut(n * value_dim);
        match n {
            4 => attend_heads::<I, T, 4>(isa, &a, data, head, q, out),
            2 => attend_heads::<I, T, 2>(isa, &a, data, head, q, out),
            _ => attend_heads::<I, T, 1>(isa, &a, data, head, q, out),
        }
        (q_rest, out_rest) = (q_after, out_after);
        head += n;
    }
}

/// The attention of `N` heads from number `head` on.
#[inline(always)]
fn attend_heads<I: Isa, T: Element, const N: usize>(
    isa: I,
    a: &Attend<'_>,
    data: &[T],
    head: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let (key_dim, value_dim) = (a.shape.key_dim, a.shape.value_dim);
    let mut max = [f32::NEG_INFINITY; N];
    let mut sum = [0.0f32; N];
    let mut started = false;
    for chunk in a.first / CHUNK..a.end.div_ceil(CHUNK) {
        let page = a.table.get(chunk).map_or(usize::MAX, |&p| p as usize);
        let start = page.saturating_mul(a.shape.elements());
        let Some(page) = data.get(start..).and_then(|d| d.get(..a.shape.elements())) else { continue };
        let k = &page[a.shape.key(a.kv_head)..][..key_dim * CHUNK];
        let v = &page[a.shape.value(a.kv_head)..][..value_dim * CHUNK];
        let low = a.first.saturating_sub(chunk * CHUNK);
        let high = (a.end - chunk * CHUNK).min(CHUNK);

        let mut p = scores::<I, T, N>(isa, q, k, a.scale, a.softcap);
        // What is kept of the output so far, and what is added of this chunk.
        let mut merge = [(0.0, 1.0); N];
        for h in 0..N {
            let chunk_max = p[h][low..high].iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
            let chunk_sum = probabilities(isa, &mut p[h], chunk_max, low..high);
            if !started {
                (max[h], sum[h]) = (chunk_max, chunk_sum);
                continue;
            }
            let new_max = if chunk_max > max[h] { chunk_max } else { max[h] };
            let (old, new) = (exp_one(isa, max[h] - new_max), exp_one(isa, chunk_max - new_max));
            sum[h] = isa.fma_one(sum[h], old, chunk_sum * new);
            max[h] = new_max;
            merge[h] = (old, new);
        }
        let rows = &v[low * value_dim..high * value_dim];
        weighted_sum::<I, T, N>(isa, &p, low, rows, value_dim, out, started.then_some(merge));
        started = true;
    }
    for (h, out) in out.chunks_exact_mut(value_dim).enumerate() {
        let mut scale = 1.0;
        if let Some(&sink) = a.sinks.and_then(|s| s.get(head + h)) {
            let new_max = if sink > max[h] { sink } else { max[h] };
            scale = exp_one(isa, max[h] - new_max);
            sum[h] = isa.fma_one(sum[h], scale, exp_one(isa, sink - new_max));
        }
        let inverse = scale / sum[h];
        for x in out.iter_mut() {
            *x *= inverse;
        }
    }
}

#[inline(always)]
fn exp_one<I: Isa>(isa: I, x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    isa.store(math::exp(isa, isa.splat(x)), &mut lanes);
    lanes[0]
}

/// The scores of queries with all positions of a chunk; those of positions never written are arbitrary.
#[inline(always)]
fn scores<I: Isa, T: Element, const N: usize>(
    isa: I,
    q: &[f32],
    k: &[T],
    scale: f32,
    softcap: Option<f32>,
) -> [[f32; CHUNK]; N] {
    let key_dim = q.len() / N;
    let mut acc = [[isa.splat(0.0); RUNS]; N];
    for (d, column) in k.as_chunks::<CHUNK>().0.iter().enumerate() {
        let runs = column.as_chunks::<16>().0;
        for run in 0..RUNS {
            let k = T::load(isa, &runs[run]);
            for h in 0..N {
                acc[h][run] = isa.fma(isa.splat(q[h * key_dim + d]), k, acc[h][run]);
            }
        }
    }
    let mut out = [[0.0; CHUNK]; N];
    for h in 0..N {
        let out = out[h].as_chunks_mut::<16>().0;
        for run in 0..RUNS {
            let mut score = isa.mul(acc[h][run], isa.splat(scale));
            if let Some(cap) = softcap {
                score = isa.mul(isa.splat(cap), math::tanh(isa, isa.div(score, isa.splat(cap))));
            }
            isa.store(score, &mut out[run]);
        }
    }
    out
}

/// Turns scores into `exp(score - max)`, zero outside `valid`, and returns their sum.
#[inline(always)]
fn probabilities<I: Isa>(isa: I, p: &mut [f32; CHUNK], max: f32, valid: core::ops::Range<usize>) -> f32 {
    let mut acc = isa.splat(0.0);
    for run in p.as_chunks_mut::<16>().0 {
        isa.store(math::exp(isa, isa.sub(isa.load(run), isa.splat(max))), run);
    }
    p[..valid.start].fill(0.0);
    p[valid.end..].fill(0.0);
    for run in p.as_chunks::<16>().0 {
        acc = isa.add(acc, isa.load(run));
    }
    isa.sum(acc)
}

/// `Σ p[h][first + j] · v[j]` over the rows of `v` into each head's part of `out`, merged with what is there as
/// `old · out + new · sum` if `merge` has `(old, new)` of each head.
#[inline(always)]
fn weighted_sum<I: Isa, T: Element, const N: usize>(
    isa: I,
    p: &[[f32; CHUNK]; N],
    first: usize,
    v: &[T],
    value_dim: usize,
    out: &mut [f32],
    merge: Option<[(f32, f32); N]>,
) {
    // A few runs of 16 elements for all heads stay in registers.
    const WIDTH: usize = 4;
    let mut d = 0;
    while d < value_dim {
        let runs = ((value_dim - d) / 16).min(WIDTH);
        let mut acc = [[isa.splat(0.0); WIDTH]; N];
        let width = if runs == WIDTH {
            for (j, row) in v.chunks_exact(value_dim).enumerate() {
                let row = row[d..d + 16 * WIDTH].as_chunks::<16>().0;
                for run in 0..WIDTH {
                    let v = T::load(isa, &row[run]);
                    for h in 0..N {
                        acc[h][run] = isa.fma(isa.splat(p[h][first + j]), v, acc[h][run]);
                    }
                }
            }
            16 * WIDTH
        } else {
            let n = (value_dim - d).min(16);
            for (j, row) in v.chunks_exact(value_dim).enumerate() {
                let mut run = [row[d]; 16];
                run[..n].copy_from_slice(&row[d..d + n]);
                let v = T::load(isa, &run);
                for h in 0..N {
                    acc[h][0] = isa.fma(isa.splat(p[h][first + j]), v, acc[h][0]);
                }
            }
            n
        };
        for h in 0..N {
            let mut lanes = [0.0f32; 16 * WIDTH];
            let out = &mut out[h * value_dim + d..][..width];
            lanes[..width].copy_from_slice(out);
            for (run, lanes) in lanes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let mut sum = acc[h][run];
                if let Some(merge) = merge {
                    let (old, new) = merge[h];
                    sum = isa.fma(isa.load(lanes), isa.splat(old), isa.mul(sum, isa.splat(new)));
                }
                isa.store(sum, lanes);
            }
            out.copy_from_slice(&lanes[..width]);
        }
        d += width;
    }
}

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

#[inline(always)]
fn attend<I: Isa, T: Element>(isa: I, a: Attend<'_>, data: &[T]) {
    let (key_dim, value_dim) = (a.shape.key_dim, a.shape.value_dim);
    let heads = a.q.chunks_exact(key_dim).zip(a.out.chunks_exact_mut(value_dim)).enumerate();
    for (head, (q, out)) in heads {
        let mut max = f32::NEG_INFINITY;
        let mut sum = 0.0f32;
        let mut started = false;
        for chunk in a.first / CHUNK..a.end.div_ceil(CHUNK) {
            let page = a.table.get(chunk).map_or(usize::MAX, |&p| p as usize);
            let start = page.saturating_mul(a.shape.elements());
            let Some(page) = data.get(start..).and_then(|d| d.get(..a.shape.elements())) else { continue };
            let k = &page[a.shape.key(a.kv_head)..][..key_dim * CHUNK];
            let v = &page[a.shape.value(a.kv_head)..][..value_dim * CHUNK];
            let low = a.first.saturating_sub(chunk * CHUNK);
            let high = (a.end - chunk * CHUNK).min(CHUNK);

            let mut p = scores(isa, q, k, a.scale, a.softcap);
            let chunk_max = p[low..high].iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
            let chunk_sum = probabilities(isa, &mut p, chunk_max, low..high);
            if !started {
                weighted_sum(isa, &p[low..high], &v[low * value_dim..], value_dim, out, None);
                (max, sum, started) = (chunk_max, chunk_sum, true);
            } else {
                let new_max = if chunk_max > max { chunk_max } else { max };
                let (old, new) = (exp_one(isa, max - new_max), exp_one(isa, chunk_max - new_max));
                weighted_sum(isa, &p[low..high], &v[low * value_dim..], value_dim, out, Some((old, new)));
                sum = isa.fma_one(sum, old, chunk_sum * new);
                max = new_max;
            }
        }
        let mut scale = 1.0;
        if let Some(&sink) = a.sinks.and_then(|s| s.get(head)) {
            let new_max = if sink > max { sink } else { max };
            scale = exp_one(isa, max - new_max);
            sum = isa.fma_one(sum, scale, exp_one(isa, sink - new_max));
        }
        let inverse = scale / sum;
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

/// The scores of a query with all positions of a chunk; those of positions never written are arbitrary.
#[inline(always)]
fn scores<I: Isa, T: Element>(isa: I, q: &[f32], k: &[T], scale: f32, softcap: Option<f32>) -> [f32; CHUNK] {
    let mut acc = [isa.splat(0.0); RUNS];
    for (&q, column) in q.iter().zip(k.as_chunks::<CHUNK>().0) {
        let q = isa.splat(q);
        let runs = column.as_chunks::<16>().0;
        for (acc, run) in acc.iter_mut().zip(runs) {
            *acc = isa.fma(q, T::load(isa, run), *acc);
        }
    }
    let mut out = [0.0; CHUNK];
    for (acc, out) in acc.into_iter().zip(out.as_chunks_mut::<16>().0) {
        let mut score = isa.mul(acc, isa.splat(scale));
        if let Some(cap) = softcap {
            score = isa.mul(isa.splat(cap), math::tanh(isa, isa.div(score, isa.splat(cap))));
        }
        isa.store(score, out);
    }
    out
}

/// Turns scores into `exp(score - max)`, zero outside `valid`, and returns their sum.
#[inline(always)]
fn probabilities<I: Isa>(isa: I, p: &mut [f32; CHUNK], max: f32, valid: core::ops::Range<usize>) -> f32 {
    let mut acc = isa.splat(0.0);
    for (i, run) in p.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        isa.store(math::exp(isa, isa.sub(isa.load(run), isa.splat(max))), run);
        for (j, x) in run.iter_mut().enumerate() {
            if !valid.contains(&(16 * i + j)) {
                *x = 0.0;
            }
        }
        acc = isa.add(acc, isa.load(run));
    }
    isa.sum(acc)
}

/// `Σ p[j] · v[j]` into `out`, merged with what is there as `old · out + new · sum` if `merge` is `(old, new)`.
#[inline(always)]
fn weighted_sum<I: Isa, T: Element>(
    isa: I,
    p: &[f32],
    v: &[T],
    value_dim: usize,
    out: &mut [f32],
    merge: Option<(f32, f32)>,
) {
    let store = |isa: I, acc: I::F, out: &mut [f32; 16]| match merge {
        None => isa.store(acc, out),
        Some((old, new)) => {
            let scaled = isa.mul(acc, isa.splat(new));
            isa.store(isa.fma(isa.load(out), isa.splat(old), scaled), out);
        }
    };
    let whole = value_dim / 16 * 16;
    let mut d = 0;
    while d + 64 <= whole {
        let mut acc = [isa.splat(0.0); 4];
        for (&p, row) in p.iter().zip(v.chunks_exact(value_dim)) {
            let p = isa.splat(p);
            for (acc, run) in acc.iter_mut().zip(row[d..d + 64].as_chunks::<16>().0) {
                *acc = isa.fma(p, T::load(isa, run), *acc);
            }
        }
        for (acc, out) in acc.into_iter().zip(out[d..d + 64].as_chunks_mut::<16>().0) {
            store(isa, acc, out);
        }
        d += 64;
    }
    while d < value_dim {
        let n = (value_dim - d).min(16);
        let mut acc = isa.splat(0.0);
        for (&p, row) in p.iter().zip(v.chunks_exact(value_dim)) {
            let mut run = [row[d]; 16];
            run[..n].copy_from_slice(&row[d..d + n]);
            acc = isa.fma(isa.splat(p), T::load(isa, &run), acc);
        }
        let mut lanes = [0.0; 16];
        lanes[..n].copy_from_slice(&out[d..d + n]);
        store(isa, acc, &mut lanes);
        out[d..d + n].copy_from_slice(&lanes[..n]);
        d += n;
    }
}

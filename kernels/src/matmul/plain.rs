//! Plain formats: lanes along k. F32, F16 and BF16 have a kernel each; the others, which hardly any file has, share one that
//! turns values to f32 first.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use super::tiles::prefetch_next;
use super::{CHUNK, MatMul, TILE_TOKENS, X};
use crate::formats::{Format, Plain};
use crate::isa::{Cpu, Isa, WithIsa, kernels};
use crate::panel::PanelMut;

/// Plain formats: one row after the other, or blocks of rows and tokens whose sums fill the registers.
pub(super) fn plain<I: Isa, P: Plain>(isa: I, product: MatMul<'_, '_>) {
    let X::F32(x) = product.x else { return };
    let (k, mut out) = (product.k, product.out);
    let w = P::cast(product.w);
    if k == 0 {
        return;
    }
    let w = Rows { values: w, k, count: (w.len() / k).min(out.cols()) };
    let x = Rows { values: x, k, count: (x.len() / k).min(out.rows()) };
    isa.run(
        #[inline(always)]
        || {
            if x.count == 1 {
                // Memory is read fastest in order.
                for row in 0..w.count {
                    let [[sum]] = plain_dot::<I, P, 1, 1>(isa, w.some(row), x.some(0), true);
                    out.row(0)[row] = sum;
                }
                return;
            }
            for row in (0..w.count).step_by(if I::WIDE_TILES { 8 } else { 2 }) {
                let mut token = 0;
                while token < x.count {
                    let (here, left) = ((row, token), x.count - token);
                    token += match (I::WIDE_TILES, left) {
                        (true, 3..) => block::<I, P, 8, 3>(isa, w, x, here, &mut out),
                        (true, 2) => block::<I, P, 8, 2>(isa, w, x, here, &mut out),
                        (true, _) => block::<I, P, 8, 1>(isa, w, x, here, &mut out),
                        (false, 2..) => block::<I, P, 2, 2>(isa, w, x, here, &mut out),
                        (false, _) => block::<I, P, 2, 1>(isa, w, x, here, &mut out),
                    }
                }
            }
        },
    );
}

/// Plain formats that share a kernel.
pub(crate) fn converted<P: Plain>(cpu: Cpu, product: MatMul<'_, '_>) {
    cpu.run(Converted { format: P::FORMAT, product });
}

/// A kernel: a product with rows of any plain format.
struct Converted<'a, 'o> {
    format: Format,
    product: MatMul<'a, 'o>,
}

kernels!(Converted<'_, '_>);

impl WithIsa for Converted<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let (MatMul { w, k, x, mut out, .. }, bytes) = (self.product, self.format.block_bytes());
        let X::F32(x) = x else { return };
        if k == 0 || k > isize::MAX as usize / bytes {
            return;
        }
        let tokens = (x.len() / k).min(out.rows());
        let mut values = [0.0; CHUNK];
        for (row, w) in w.chunks_exact(k * bytes).enumerate().take(out.cols()) {
            for first in (0..tokens).step_by(TILE_TOKENS) {
                let count = (tokens - first).min(TILE_TOKENS);
                let mut acc = [isa.splat(0.0); TILE_TOKENS];
                for (c, piece) in w.chunks(CHUNK * bytes).enumerate() {
                    let len = piece.len() / bytes;
                    let _ = self.format.dequantize(piece, &mut values[..len]);
                    // As in `plain_dot`.
                    let padded = len.next_multiple_of(16);
                    let last = values[len - 1];
                    values[len..padded].fill(last);
                    for t in 0..count {
                        let x = &x[(first + t) * k + c * CHUNK..][..len];
                        for (run, w) in values[..padded].as_chunks::<16>().0.iter().enumerate() {
                            let mut lanes = [0.0; 16];
                            let x = &x[16 * run..len.min(16 * run + 16)];
                            lanes[..x.len()].copy_from_slice(x);
                            acc[t] = isa.fma(isa.load(w), isa.load(&lanes), acc[t]);
                        }
                    }
                }
                for t in 0..count {
                    out.row(first + t)[row] = isa.sum(acc[t]);
                }
            }
        }
    }
}

/// `count` rows of `k` values.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    values: &'a [T],
    k: usize,
    count: usize,
}

impl<'a, T> Rows<'a, T> {
    /// `N` rows from number `first` on. Those past the end repeat the last one.
    #[inline(always)]
    fn some<const N: usize>(self, first: usize) -> [&'a [T]; N] {
        let mut rows = [&self.values[..self.k]; N];
        for i in 0..N {
            rows[i] = &self.values[(first + i).min(self.count - 1) * self.k..][..self.k];
        }
        rows
    }
}

/// `R` rows by `T` tokens. Only those that are there are stored. Returns `T`.
#[inline(always)]
fn block<I: Isa, P: Plain, const R: usize, const T: usize>(
    isa: I,
    w: Rows<'_, P>,
    x: Rows<'_, f32>,
    (row, token): (usize, usize),
    out: &mut PanelMut<'_>,
) -> usize {
    let sums = plain_dot::<I, P, R, T>(isa, w.some(row), x.some(token), token == 0);
    for r in 0..R.min(w.count - row) {
        for t in 0..T.min(x.count - token) {
            out.row(token + t)[row + r] = sums[r][t];
        }
    }
    T
}

/// The dots of `R` weight rows with `T` tokens. Meanwhile prefetches the next rows, if asked to.
#[inline(always)]
fn plain_dot<I: Isa, P: Plain, const R: usize, const T: usize>(
    isa: I,
    w: [&[P]; R],
    x: [&[f32]; T],
    prefetch: bool,
) -> [[f32; T]; R] {
    let mut w_runs = [w[0].as_chunks::<16>(); R];
    for r in 1..R {
        w_runs[r] = w[r].as_chunks();
    }
    let mut x_runs = [x[0].as_chunks::<16>(); T];
    for t in 1..T {
        x_runs[t] = x[t].as_chunks();
    }
    let mut acc = [[isa.splat(0.0); T]; R];
    for run in 0..w_runs[0].0.len() {
        if prefetch {
            prefetch_next::<I, P, R>(isa, w[0], w[0].len(), 16 * run, 16);
        }
        let mut w_run = [&w_runs[0].0[run]; R];
        for r in 1..R {
            w_run[r] = &w_runs[r].0[run];
        }
        let mut x_run = [&x_runs[0].0[run]; T];
        for t in 1..T {
            x_run[t] = &x_runs[t].0[run];
        }
        plain_step::<I, P, R, T>(isa, &mut acc, w_run, x_run);
    }
    let rest = w_runs[0].1.len();
    if rest > 0 {
        // Past the end of a row, activations are zero; the weight that stands there is finite if the row's
        // last one is.
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

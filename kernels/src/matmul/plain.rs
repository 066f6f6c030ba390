//! Plain formats: four rows by four tokens in registers, lanes along k.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use super::tiles::prefetch_next;
use super::{MatMul, X};
use crate::formats::{Format, Plain};
use crate::isa::Isa;

/// Plain formats: four rows by four tokens in registers.
pub(super) fn plain<I: Isa, P: Plain>(isa: I, product: MatMul<'_, '_>) {
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
        if T == 1 {
            prefetch_next::<I, P, R>(isa, w[0], w[0].len(), 16 * run, 16);
        }
        plain_step::<I, P, R, T>(isa, &mut acc, w_runs.map(|w| &w.0[run]), x_runs.map(|x| &x.0[run]));
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

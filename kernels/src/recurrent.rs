//! Recurrent layers: what they keep of a sequence is a state of fixed size, not a cache of all positions.
//!
//! The contract: tokens are computed one after the other, each with the state that the one before left. So it never shows
//! how a sequence was cut into steps. Channels and heads are independent of each other.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use core::ops::Range;

use crate::isa::{Isa, WithIsa, kernels};
use crate::kv::CHUNK;
use crate::math;
use crate::panel::PanelMut;

/// Maximum taps of a convolution.
pub const MAX_TAPS: usize = 8;
/// Maximum elements of a key of a linear recurrence.
pub const MAX_KEY: usize = 256;

/// Consecutive tokens of a sequence whose state is in the same page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// The page with the state before the first token; `None`: zeros.
    pub from: Option<u32>,
    /// The page that receives the state after the last token.
    pub to: u32,
    /// The tokens, counted from the first one of the run.
    pub tokens: Range<usize>,
}

/// Returns the stretches of a run of `len` tokens from position `start` on. `table` has a page for each [`CHUNK`]
/// positions; where `is_page` says that it has none, the state moves on to the next page that it has.
pub fn stretches(
    table: &[u32],
    start: usize,
    len: usize,
    is_page: impl Fn(u32) -> bool + Copy,
) -> impl Iterator<Item = Stretch> {
    let page_of = move |position: usize| {
        let rest = table.iter().enumerate().skip(position / CHUNK);
        rest.map(|(i, &page)| (i, page)).find(|&(_, page)| is_page(page))
    };
    let before = start.checked_sub(1).and_then(page_of);
    let mut from = before.map(|(_, page)| page);
    let mut next = 0;
    core::iter::from_fn(move || {
        if next >= len {
            return None;
        }
        let (i, to) = page_of(start + next)?;
        let end = ((i + 1) * CHUNK - start).min(len);
        let stretch = Stretch { from, to, tokens: next..end };
        (from, next) = (Some(to), end);
        Some(stretch)
    })
}

/// A kernel: the convolution of some channels over the tokens of a stretch.
#[derive(Debug)]
pub struct Conv<'a> {
    /// `[tokens][width]`, from the first token of the stretch on.
    pub x: &'a [f32],
    /// Elements of a row of `x`.
    pub width: usize,
    /// The first channel.
    pub first: usize,
    /// `[channels][taps]`, of all channels of `x`.
    pub weight: &'a [f32],
    /// `[channels]`, or zeros.
    pub bias: Option<&'a [f32]>,
    /// Inputs that a result is computed from, the token's own included; 2 to [`MAX_TAPS`].
    pub taps: usize,
    /// `[channels of out][taps - 1]`: the last inputs, oldest first.
    pub state: &'a mut [f32],
    /// Tokens of the stretch: rows of `out`.
    pub tokens: Range<usize>,
    /// The results of these channels.
    pub out: PanelMut<'a>,
}

/// What a token adds to the state, and what its result is; see `Rule` of the library.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a> {
    /// The gated delta rule.
    Delta {
        /// `[tokens][heads]`: what the strength of an update is computed from.
        beta: &'a [f32],
        /// A factor on the results.
        scale: f32,
    },
    /// The state-space scan.
    Scan {
        /// The head's factor of the values that are added to the results.
        d: f32,
    },
}

/// A kernel: a linear recurrence of one head over the tokens of a stretch; see `Op::Recur` of the library.
#[derive(Debug)]
pub struct Recur<'a> {
    /// `[tokens][key_width]`: queries of the step.
    pub q: &'a [f32],
    /// `[tokens][key_width]`: keys of the step.
    pub k: &'a [f32],
    /// Elements of all queries of a token.
    pub key_width: usize,
    /// The first element of the head's query and key.
    pub key: usize,
    /// Elements of a key, at most [`MAX_KEY`].
    pub key_dim: usize,
    /// `[tokens][heads * value_dim]`: values of the step.
    pub v: &'a [f32],
    /// `[tokens][heads][rates]`: what decay is computed from.
    pub decay: &'a [f32],
    /// Decays of a head: 1, or with the delta rule `key_dim`, one for each row of the state.
    pub rates: usize,
    /// The head's factors of the decay: 1, or `key_dim`.
    pub a: &'a [f32],
    /// The rule.
    pub rule: Rule<'a>,
    /// Heads of values.
    pub heads: usize,
    /// This head.
    pub head: usize,
    /// `[key_dim][value_dim]`: the head's state.
    pub state: &'a mut [f32],
    /// Tokens of the stretch: rows of the operands and of `out`.
    pub tokens: Range<usize>,
    /// The head's results, of `value_dim` columns.
    pub out: PanelMut<'a>,
}

/// A kernel: the state-space scan of some heads of one value each, which share a query and a key, over the tokens of a stretch; see
/// `Op::Recur` of the library.
#[derive(Debug)]
pub struct Channels<'a> {
    /// `[tokens][key_dim]`: queries of the step.
    pub q: &'a [f32],
    /// `[tokens][key_dim]`: keys of the step.
    pub k: &'a [f32],
    /// Elements of a key, at most [`MAX_KEY`].
    pub key_dim: usize,
    /// `[tokens][heads]`: values of the step.
    pub v: &'a [f32],
    /// `[tokens][heads]`: what decay is computed from.
    pub decay: &'a [f32],
    /// `[heads][factors]`: factors of the decay.
    pub a: &'a [f32],
    /// Factors of a head: 1, or `key_dim`.
    pub factors: usize,
    /// `[heads]`: factors of the values that are added to the results.
    pub d: &'a [f32],
    /// All heads.
    pub heads: usize,
    /// The first head of these.
    pub first: usize,
    /// `[heads of out][key_dim]`: their states.
    pub state: &'a mut [f32],
    /// Tokens of the stretch: rows of the operands and of `out`.
    pub tokens: Range<usize>,
    /// The results of these heads.
    pub out: PanelMut<'a>,
}

kernels!(Conv<'_>, Recur<'_>, Channels<'_>);

impl WithIsa for Channels<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(mut self, isa: I) {
        let key_dim = self.key_dim.min(MAX_KEY);
        // A lane is a head.
        let (mut rows, mut factors) = ([[0.0; 16]; MAX_KEY], [[0.0; 16]; MAX_KEY]);
        let (rows, factors) = (&mut rows[..key_dim], &mut factors[..key_dim]);
        for first in (0..self.out.cols()).step_by(16) {
            let len = (self.out.cols() - first).min(16);
            let head = self.first + first;
            for i in 0..key_dim {
                for lane in 0..len {
                    rows[i][lane] = self.state[(first + lane) * key_dim + i];
                    factors[i][lane] = self.a[(head + lane) * self.factors + i.min(self.factors - 1)];
                }
            }
            let d = sixteen(isa, &self.d[..head + len], head);
            for t in self.tokens.clone() {
                let of_token = |x: &'_ [f32]| sixteen(isa, &x[t * self.heads..][..head + len], head);
                let (v, rate) = (of_token(self.v), math::softplus(isa, of_token(self.decay)));
                let update = isa.mul(rate, v);
                let [q, k] = [self.q, self.k].map(
                    #[inline(always)]
                    |x| &x[t * key_dim..][..key_dim],
                );
                let mut out = isa.splat(0.0);
                for i in 0..key_dim {
                    let kept = math::exp(isa, isa.mul(isa.load(&factors[i]), rate));
                    let s = isa.fma(isa.splat(k[i]), update, isa.mul(kept, isa.load(&rows[i])));
                    isa.store(s, &mut rows[i]);
                    out = isa.fma(s, isa.splat(q[i]), out);
                }
                let mut y = [0.0; 16];
                isa.store(isa.fma(d, v, out), &mut y);
                self.out.row(t)[first..][..len].copy_from_slice(&y[..len]);
            }
            for i in 0..key_dim {
                for lane in 0..len {
                    self.state[(first + lane) * key_dim + i] = rows[i][lane];
                }
            }
        }
    }
}

impl WithIsa for Conv<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(mut self, isa: I) {
        let (taps, kept) = (self.taps.clamp(2, MAX_TAPS), self.taps.clamp(2, MAX_TAPS) - 1);
        for first in (0..self.out.cols()).step_by(16) {
            let len = (self.out.cols() - first).min(16);
            let channel = self.first + first;
            let (mut weight, mut past) = ([[0.0; 16]; MAX_TAPS], [[0.0; 16]; MAX_TAPS]);
            let mut bias = [0.0; 16];
            for lane in 0..len {
                for j in 0..taps {
                    weight[j][lane] = self.weight[(channel + lane) * taps + j];
                }
                for j in 0..kept {
                    past[j][lane] = self.state[(first + lane) * kept + j];
                }
                if let Some(all) = self.bias {
                    bias[lane] = all[channel + lane];
                }
            }
            for (row, t) in self.tokens.clone().enumerate() {
                past[kept][..len].copy_from_slice(&self.x[row * self.width + channel..][..len]);
                let mut acc = isa.load(&bias);
                for j in 0..taps {
                    acc = isa.fma(isa.load(&weight[j]), isa.load(&past[j]), acc);
                }
                let mut y = [0.0; 16];
                isa.store(acc, &mut y);
                self.out.row(t)[first..][..len].copy_from_slice(&y[..len]);
                for j in 0..kept {
                    past[j] = past[j + 1];
                }
            }
            for lane in 0..len {
                for j in 0..kept {
                    self.state[(first + lane) * kept + j] = past[j][lane];
                }
            }
        }
    }
}

/// Sixteen elements from `first` on, and zeros behind the end.
#[inline(always)]
fn sixteen<I: Isa>(isa: I, x: &[f32], first: usize) -> I::F {
    let mut all = [0.0; 16];
    let x = &x[first..x.len().min(first + 16)];
    all[..x.len()].copy_from_slice(x);
    isa.load(&all)
}

/// Columns of a state that are computed together: they stay in the first-level cache over all tokens.
const COLUMNS: usize = 64;
const VECTORS: usize = COLUMNS / 16;

impl WithIsa for Recur<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(mut self, isa: I) {
        let (key_dim, value_dim) = (self.key_dim.min(MAX_KEY), self.out.cols());
        let mut rows = [[[0.0; 16]; VECTORS]; MAX_KEY];
        let rows = &mut rows[..key_dim];
        // What remains of each row of the state.
        let mut kept = [[1.0; 16]; MAX_KEY / 16];
        for first in (0..value_dim).step_by(COLUMNS) {
            let len = (value_dim - first).min(COLUMNS);
            for (i, row) in rows.iter_mut().enumerate() {
                row.as_flattened_mut()[..len].copy_from_slice(&self.state[i * value_dim + first..][..len]);
            }
            for t in self.tokens.clone() {
                let at = t * self.heads + self.head;
                let [q, k] = [self.q, self.k].map(
                    #[inline(always)]
                    |x| &x[t * self.key_width + self.key..][..key_dim],
                );
                let mut v = [[0.0; 16]; VECTORS];
                v.as_flattened_mut()[..len].copy_from_slice(&self.v[at * value_dim + first..][..len]);
                let decay = &self.decay[at * self.rates..][..self.rates];
                let rate = math::softplus(isa, isa.splat(decay[0]));
                if let (&[_], &[a]) = (decay, self.a) {
                    let all = math::exp(isa, isa.mul(isa.splat(a), rate));
                    for kept in &mut kept[..key_dim.div_ceil(16)] {
                        isa.store(all, kept);
                    }
                } else {
                    for (n, kept) in kept[..key_dim.div_ceil(16)].iter_mut().enumerate() {
                        let rate = match decay {
                            [_] => rate,
                            _ => math::softplus(isa, sixteen(isa, decay, 16 * n)),
                        };
                        let a = match self.a {
                            &[a] => isa.splat(a),
                            all => sixteen(isa, all, 16 * n),
                        };
                        isa.store(math::exp(isa, isa.mul(a, rate)), kept);
                    }
                }
                let kept = kept.as_flattened();

                let mut known = [isa.splat(0.0); VECTORS];
                let mut update = known;
                match self.rule {
                    Rule::Delta { beta, .. } => {
                        for ((row, &k), &kept) in rows.iter_mut().zip(k).zip(kept) {
                            let (k, kept) = (isa.splat(k), isa.splat(kept));
                            for n in 0..VECTORS {
                                let s = isa.mul(kept, isa.load(&row[n]));
                                isa.store(s, &mut row[n]);
                                known[n] = isa.fma(s, k, known[n]);
                            }
                        }
                        let strength = math::sigmoid(isa, isa.splat(beta[at]));
                        for n in 0..VECTORS {
                            update[n] = isa.mul(strength, isa.sub(isa.load(&v[n]), known[n]));
                        }
                    }
                    Rule::Scan { .. } => {
                        for n in 0..VECTORS {
                            update[n] = isa.mul(rate, isa.load(&v[n]));
                        }
                    }
                }
                // The delta rule has applied it.
                let is_kept = matches!(self.rule, Rule::Delta { .. });
                let mut out = [isa.splat(0.0); VECTORS];
                for (((row, &k), &q), &kept) in rows.iter_mut().zip(k).zip(q).zip(kept) {
                    let (k, q) = (isa.splat(k), isa.splat(q));
                    let kept = isa.splat(if is_kept { 1.0 } else { kept });
                    for n in 0..VECTORS {
                        let s = isa.fma(k, update[n], isa.mul(kept, isa.load(&row[n])));
                        isa.store(s, &mut row[n]);
                        out[n] = isa.fma(s, q, out[n]);
                    }
                }
                for n in 0..VECTORS {
                    let y = match self.rule {
                        Rule::Delta { scale, .. } => isa.mul(isa.splat(scale), out[n]),
                        Rule::Scan { d } => isa.fma(isa.splat(d), isa.load(&v[n]), out[n]),
                    };
                    isa.store(y, &mut v[n]);
                }
                self.out.row(t)[first..][..len].copy_from_slice(&v.as_flattened()[..len]);
            }
            for (i, row) in rows.iter().enumerate() {
                self.state[i * value_dim + first..][..len].copy_from_slice(&row.as_flattened()[..len]);
            }
        }
    }
}

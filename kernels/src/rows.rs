//! Kernels on rows of f32: norms, gates, element-wise functions, rotary embeddings, routing.
//!
//! Sums over a row use 16 strided accumulators (lane = index mod 16) and a fixed tree.

use crate::isa::{Isa, WithIsa, kernels};
use crate::math;

/// Maximum experts of a router.
pub const MAX_EXPERTS: usize = 1024;

/// The activation of a gated linear unit: `f(gate) * up`.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Gate {
    /// `gate · σ(gate)` (SwiGLU, Shazeer 2020).
    Silu,
    /// The tanh approximation of GELU (Hendrycks & Gimpel 2016), from and to half precision as in GGML.
    Gelu,
    /// GELU by the error function.
    GeluErf,
    /// `max(gate, 0)`.
    Relu,
    /// `σ(gate)` (Dauphin et al. 2017).
    Sigmoid,
    /// `gate` (bilinear, Mnih & Hinton 2007).
    Identity,
    /// `Φ(gate)`, the normal distribution function: what is its own gate becomes GELU, by the error function.
    Normal,
    /// gpt-oss: `g σ(alpha g) · (clamp(up, ±limit) + 1)` with `g = min(gate, limit)`.
    SiluClamped {
        /// The sigmoid's factor.
        alpha: f32,
        /// The clamp.
        limit: f32,
    },
}

/// A function of one element.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Unary {
    /// `x · σ(x)`.
    Silu,
    /// The tanh approximation of GELU (Hendrycks & Gimpel 2016), from and to half precision as in GGML.
    Gelu,
    /// GELU by the error function.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    ReluSquared,
    /// `x · factor`.
    Scale(f32),
    /// `cap · tanh(x / cap)`.
    SoftCap(f32),
    /// `max(-limit, min(x, limit))`.
    Clamp(f32),
    /// `x + term`.
    Shift(f32),
}

#[inline(always)]
fn silu<I: Isa>(isa: I, x: I::F) -> I::F {
    let one = isa.splat(1.0);
    isa.div(x, isa.add(one, math::exp(isa, isa.sub(isa.splat(0.0), x))))
}

/// From half precision to half precision, as in GGML's table of 2^16 entries, so that models give the same
/// logits as with GGML.
#[inline(always)]
fn gelu<I: Isa>(isa: I, x: I::F) -> I::F {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    /// From here on GELU is the identity, and below its negative zero.
    const LINEAR: f32 = 10.0;
    let h = isa.round_f16(x);
    let cubic = isa.fma(isa.mul(isa.splat(0.044_715), isa.mul(h, h)), h, h);
    let t = math::tanh(isa, isa.mul(isa.splat(SQRT_2_OVER_PI), cubic));
    let half = isa.mul(isa.splat(0.5), h);
    let y = isa.round_f16(isa.fma(half, t, half));
    let y = isa.select_gt(isa.splat(LINEAR), x, y, x);
    isa.select_gt(isa.splat(-LINEAR), x, isa.splat(0.0), y)
}

#[inline(always)]
fn gelu_erf<I: Isa>(isa: I, x: I::F) -> I::F {
    let t = math::erf(isa, isa.mul(x, isa.splat(core::f32::consts::FRAC_1_SQRT_2)));
    let half = isa.mul(isa.splat(0.5), x);
    isa.fma(half, t, half)
}

#[inline(always)]
fn relu<I: Isa>(isa: I, x: I::F) -> I::F {
    // NaN propagates, as the second operand of a comparison; the sum turns -0 into zero.
    let zero = isa.splat(0.0);
    isa.add(isa.max(zero, x), zero)
}

/// NaN propagates.
#[inline(always)]
fn clamp<I: Isa>(isa: I, x: I::F, limit: f32) -> I::F {
    let (low, high) = (isa.splat(-limit), isa.splat(limit));
    let x = isa.select_gt(x, high, high, x);
    isa.select_gt(low, x, low, x)
}

#[inline(always)]
fn unary<I: Isa>(isa: I, f: Unary, x: I::F) -> I::F {
    match f {
        Unary::Silu => silu(isa, x),
        Unary::Gelu => gelu(isa, x),
        Unary::GeluErf => gelu_erf(isa, x),
        Unary::Relu => relu(isa, x),
        Unary::ReluSquared => {
            let y = relu(isa, x);
            isa.mul(y, y)
        }
        Unary::Scale(factor) => isa.mul(x, isa.splat(factor)),
        Unary::SoftCap(cap) => isa.mul(isa.splat(cap), math::tanh(isa, isa.div(x, isa.splat(cap)))),
        Unary::Clamp(limit) => clamp(isa, x, limit),
        Unary::Shift(term) => isa.add(x, isa.splat(term)),
    }
}

#[inline(always)]
fn gate<I: Isa>(isa: I, f: Gate, gate: I::F, up: I::F) -> I::F {
    match f {
        Gate::Silu => isa.mul(silu(isa, gate), up),
        Gate::Gelu => isa.mul(gelu(isa, gate), up),
        Gate::GeluErf => isa.mul(gelu_erf(isa, gate), up),
        Gate::Relu => isa.mul(relu(isa, gate), up),
        Gate::Sigmoid => isa.mul(math::sigmoid(isa, gate), up),
        Gate::Identity => isa.mul(gate, up),
        Gate::Normal => {
            let t = math::erf(isa, isa.mul(gate, isa.splat(core::f32::consts::FRAC_1_SQRT_2)));
            let half = isa.splat(0.5);
            isa.mul(isa.fma(half, t, half), up)
        }
        Gate::SiluClamped { alpha, limit } => {
            let high = isa.splat(limit);
            let g = isa.select_gt(gate, high, high, gate);
            let u = clamp(isa, up, limit);
            let s = isa.mul(g, math::sigmoid(isa, isa.mul(isa.splat(alpha), g)));
            isa.fma(s, u, s)
        }
    }
}

/// Calls `f` for each run of 16 elements of `out` and the same places of `inputs`; the last run is padded
/// with zeros.
#[inline(always)]
fn each16<const N: usize>(inputs: [&[f32]; N], out: &mut [f32], f: impl Fn([&[f32; 16]; N], &mut [f32; 16])) {
    let len = inputs.iter().fold(out.len(), |len, x| len.min(x.len()));
    let whole = len / 16;
    let chunks = inputs.map(|x| x.as_chunks::<16>().0);
    let (out_chunks, _) = out.as_chunks_mut::<16>();
    for (i, out) in out_chunks.iter_mut().enumerate().take(whole) {
        f(chunks.map(|x| &x[i]), out);
    }
    let start = 16 * whole;
    if start < len {
        let padded = inputs.map(|x| {
            let mut lanes = [0.0; 16];
            lanes[..len - start].copy_from_slice(&x[start..len]);
            lanes
        });
        let mut result = [0.0; 16];
        f(core::array::from_fn(|n| &padded[n]), &mut result);
        out[start..len].copy_from_slice(&result[..len - start]);
    }
}

/// Folds runs of 16 elements into a vector; the last run is padded with zeros.
#[inline(always)]
fn fold16<I: Isa>(isa: I, x: &[f32], mut acc: I::F, f: impl Fn(I::F, I::F) -> I::F) -> I::F {
    let (chunks, rest) = x.as_chunks::<16>();
    for lanes in chunks {
        acc = f(acc, isa.load(lanes));
    }
    if !rest.is_empty() {
        let mut lanes = [0.0; 16];
        lanes[..rest.len()].copy_from_slice(rest);
        acc = f(acc, isa.load(&lanes));
    }
    acc
}

/// `x = f(x)`, element by element.
#[inline(always)]
fn replace16<I: Isa>(isa: I, x: &mut [f32], f: impl Fn(I::F) -> I::F) {
    let (chunks, rest) = x.as_chunks_mut::<16>();
    for lanes in chunks {
        isa.store(f(isa.load(lanes)), lanes);
    }
    if !rest.is_empty() {
        let mut lanes = [0.0; 16];
        lanes[..rest.len()].copy_from_slice(rest);
        isa.store(f(isa.load(&lanes)), &mut lanes);
        rest.copy_from_slice(&lanes[..rest.len()]);
    }
}

/// A kernel: `out = f(x)`, element by element.
#[derive(Debug)]
pub struct Elementwise<'a> {
    /// The function.
    pub f: Unary,
    /// Elements.
    pub x: &'a [f32],
    /// As many results.
    pub out: &'a mut [f32],
}

kernels!(
    Elementwise<'_>,
    Exp<'_>,
    Glu<'_>,
    Add<'_>,
    AddScaled<'_>,
    Norm<'_>,
    Spread<'_>,
    Rope<'_>,
    Softmax<'_>,
    Sigmoid<'_>,
    ArgMax<'_>
);

impl WithIsa for Elementwise<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        each16(
            [self.x],
            self.out,
            #[inline(always)]
            |[x], out| isa.store(unary(isa, self.f, isa.load(x)), out),
        );
    }
}

/// A kernel: `out = f(gate) * up`, element by element.
#[derive(Debug)]
pub struct Glu<'a> {
    /// The activation.
    pub f: Gate,
    /// Gates.
    pub gate: &'a [f32],
    /// As many values.
    pub up: &'a [f32],
    /// As many results.
    pub out: &'a mut [f32],
}

impl WithIsa for Glu<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        each16(
            [self.gate, self.up],
            self.out,
            #[inline(always)]
            |[g, u], out| {
                isa.store(gate(isa, self.f, isa.load(g), isa.load(u)), out);
            },
        );
    }
}

/// A kernel: `out = a + b`, element by element.
#[derive(Debug)]
pub struct Add<'a> {
    /// Elements.
    pub a: &'a [f32],
    /// As many.
    pub b: &'a [f32],
    /// As many results.
    pub out: &'a mut [f32],
}

impl WithIsa for Add<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        each16(
            [self.a, self.b],
            self.out,
            #[inline(always)]
            |[a, b], out| isa.store(isa.add(isa.load(a), isa.load(b)), out),
        );
    }
}

/// A kernel: `acc = weight * x + acc`, element by element, each rounded once.
#[derive(Debug)]
pub struct AddScaled<'a> {
    /// The factor.
    pub weight: f32,
    /// Elements.
    pub x: &'a [f32],
    /// As many sums.
    pub acc: &'a mut [f32],
}

impl WithIsa for AddScaled<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let weight = isa.splat(self.weight);
        let len = self.acc.len().min(self.x.len());
        let (x, x_rest) = self.x[..len].as_chunks::<16>();
        let (acc, acc_rest) = self.acc[..len].as_chunks_mut::<16>();
        for (x, acc) in x.iter().zip(acc) {
            isa.store(isa.fma(weight, isa.load(x), isa.load(acc)), acc);
        }
        for (x, acc) in x_rest.iter().zip(acc_rest) {
            let mut lanes = [0.0; 16];
            isa.store(isa.fma(weight, isa.splat(*x), isa.splat(*acc)), &mut lanes);
            *acc = lanes[0];
        }
    }
}

/// A kernel: one group's norm, `out = (x - mean) / sqrt(var + eps) * weight + bias`; the mean is 0 for a
/// root-mean-square norm.
#[derive(Debug)]
pub struct Norm<'a> {
    /// The group.
    pub x: &'a [f32],
    /// As many factors, or ones.
    pub weight: Option<&'a [f32]>,
    /// As many terms, or zeros.
    pub bias: Option<&'a [f32]>,
    /// Added under the root.
    pub eps: f32,
    /// Whether to subtract the mean.
    pub centred: bool,
    /// As many results.
    pub out: &'a mut [f32],
}

/// A kernel: what [`Norm`] divides a group by.
#[derive(Debug)]
pub struct Spread<'a> {
    /// The group.
    pub x: &'a [f32],
    /// Added under the root.
    pub eps: f32,
    /// Whether to subtract the mean.
    pub centred: bool,
}

impl WithIsa for Spread<'_> {
    type Out = f32;
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) -> f32 {
        let (n, zero) = (self.x.len() as f32, isa.splat(0.0));
        let mut mean = 0.0;
        if self.centred {
            mean = isa.sum(fold16(
                isa,
                self.x,
                zero,
                #[inline(always)]
                |acc, x| isa.add(acc, x),
            )) / n;
        }
        let (chunks, rest) = self.x.as_chunks::<16>();
        let (mean_v, mut squares) = (isa.splat(mean), zero);
        for lanes in chunks {
            let x = isa.sub(isa.load(lanes), mean_v);
            squares = isa.fma(x, x, squares);
        }
        if !rest.is_empty() {
            // The padding must stay zero.
            let mut lanes = [0.0; 16];
            lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane = x - mean);
            let x = isa.load(&lanes);
            squares = isa.fma(x, x, squares);
        }
        math::sqrt(isa.sum(squares) / n + self.eps)
    }
}

impl WithIsa for Norm<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let n = self.x.len() as f32;
        let zero = isa.splat(0.0);
        let mean = if self.centred {
            isa.sum(fold16(
                isa,
                self.x,
                zero,
                #[inline(always)]
                |acc, x| isa.add(acc, x),
            )) / n
        } else {
            0.0
        };
        let (mean_v, out) = (isa.splat(mean), self.out);
        let squares = if self.centred {
            // The padding of the last run must stay zero, so the centred values are stored first.
            each16(
                [self.x],
                out,
                #[inline(always)]
                |[x], out| isa.store(isa.sub(isa.load(x), mean_v), out),
            );
            isa.sum(fold16(
                isa,
                out,
                zero,
                #[inline(always)]
                |acc, x| isa.fma(x, x, acc),
            ))
        } else {
            isa.sum(fold16(
                isa,
                self.x,
                zero,
                #[inline(always)]
                |acc, x| isa.fma(x, x, acc),
            ))
        };
        let scale = isa.splat(1.0 / math::sqrt(squares / n + self.eps));
        match (self.weight, self.bias) {
            (None, None) => each16(
                [self.x],
                out,
                #[inline(always)]
                |[x], out| isa.store(normalised(isa, x, mean_v, scale), out),
            ),
            (Some(w), None) => {
                each16(
                    [self.x, w],
                    out,
                    #[inline(always)]
                    |[x, w], out| isa.store(isa.mul(normalised(isa, x, mean_v, scale), isa.load(w)), out),
                );
            }
            (None, Some(b)) => {
                each16(
                    [self.x, b],
                    out,
                    #[inline(always)]
                    |[x, b], out| isa.store(isa.add(normalised(isa, x, mean_v, scale), isa.load(b)), out),
                );
            }
            (Some(w), Some(b)) => each16(
                [self.x, w, b],
                out,
                #[inline(always)]
                |[x, w, b], out| {
                    isa.store(isa.fma(normalised(isa, x, mean_v, scale), isa.load(w), isa.load(b)), out);
                },
            ),
        }
    }
}

/// Sixteen elements, centred and scaled.
#[inline(always)]
fn normalised<I: Isa>(isa: I, x: &[f32; 16], mean: I::F, scale: I::F) -> I::F {
    isa.mul(isa.sub(isa.load(x), mean), scale)
}

/// A kernel: rotates the pairs of every head of one token by `position · frequency`.
#[derive(Debug)]
pub struct Rope<'a> {
    /// `[heads][head_dim]`.
    pub x: &'a [f32],
    /// The same shape.
    pub out: &'a mut [f32],
    /// Elements of a head.
    pub head_dim: usize,
    /// The token's position.
    pub position: u32,
    /// Radians per position of each pair.
    pub frequencies: &'a [f32],
    /// Divides the frequencies.
    pub factors: Option<&'a [f32]>,
    /// A factor on sine and cosine.
    pub magnitude: f32,
    /// Pairs are `(2i, 2i + 1)`; otherwise `(i, i + pairs)`.
    pub adjacent: bool,
}

impl WithIsa for Rope<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let pairs = self.frequencies.len();
        let position = isa.splat(self.position as f32);
        let magnitude = isa.splat(self.magnitude);
        for (x, out) in self.x.chunks_exact(self.head_dim).zip(self.out.chunks_exact_mut(self.head_dim)) {
            out[2 * pairs..].copy_from_slice(&x[2 * pairs..]);
        }
        for start in (0..pairs).step_by(16) {
            let n = (pairs - start).min(16);
            let mut f = [0.0; 16];
            f[..n].copy_from_slice(&self.frequencies[start..start + n]);
            if let Some(factors) = self.factors {
                for (f, factor) in f.iter_mut().zip(&factors[start..start + n]) {
                    *f /= factor;
                }
            }
            let (sin, cos) = math::sin_cos(isa, isa.mul(position, isa.load(&f)));
            let (sin, cos) = (isa.mul(sin, magnitude), isa.mul(cos, magnitude));
            let place = |i: usize| {
                let i = start + i;
                if self.adjacent { (2 * i, 2 * i + 1) } else { (i, i + pairs) }
            };
            for (x, out) in self.x.chunks_exact(self.head_dim).zip(self.out.chunks_exact_mut(self.head_dim)) {
                let (mut a, mut b) = ([0.0; 16], [0.0; 16]);
                for i in 0..n {
                    let (first, second) = place(i);
                    (a[i], b[i]) = (x[first], x[second]);
                }
                let (va, vb) = (isa.load(&a), isa.load(&b));
                isa.store(isa.fma(va, cos, isa.sub(isa.splat(0.0), isa.mul(vb, sin))), &mut a);
                isa.store(isa.fma(va, sin, isa.mul(vb, cos)), &mut b);
                for i in 0..n {
                    let (first, second) = place(i);
                    (out[first], out[second]) = (a[i], b[i]);
                }
            }
        }
    }
}

/// A kernel: e to the power of each element of `x`, in place.
#[derive(Debug)]
pub struct Exp<'a> {
    /// Exponents in, powers out.
    pub x: &'a mut [f32],
}

impl WithIsa for Exp<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        replace16(
            isa,
            self.x,
            #[inline(always)]
            |x| math::exp(isa, x),
        );
    }
}

/// A kernel: softmax of `x` in place.
#[derive(Debug)]
pub struct Softmax<'a> {
    /// Logits in, probabilities out.
    pub x: &'a mut [f32],
}

impl WithIsa for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        let max = self.x.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        let max = isa.splat(max);
        replace16(
            isa,
            self.x,
            #[inline(always)]
            |x| math::exp(isa, isa.sub(x, max)),
        );
        let sum = isa.sum(fold16(
            isa,
            self.x,
            isa.splat(0.0),
            #[inline(always)]
            |acc, x| isa.add(acc, x),
        ));
        for x in self.x.iter_mut() {
            *x /= sum;
        }
    }
}

/// A kernel: sigmoid of `x` in place.
#[derive(Debug)]
pub struct Sigmoid<'a> {
    /// Logits in, probabilities out.
    pub x: &'a mut [f32],
}

impl WithIsa for Sigmoid<'_> {
    type Out = ();
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) {
        replace16(
            isa,
            self.x,
            #[inline(always)]
            |x| math::sigmoid(isa, x),
        );
    }
}

/// A kernel: the lowest index of the largest element; `None` if that is not finite, or an element is NaN.
#[derive(Debug)]
pub struct ArgMax<'a> {
    /// Elements.
    pub x: &'a [f32],
}

impl WithIsa for ArgMax<'_> {
    type Out = Option<usize>;
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) -> Option<usize> {
        let (chunks, rest) = self.x.as_chunks::<16>();
        let mut best = isa.splat(f32::NEG_INFINITY);
        // Magnitudes as integers: NaN is above infinity.
        let mut magnitudes = [0; 16];
        for lanes in chunks {
            best = isa.max(isa.load(lanes), best);
            for i in 0..16 {
                magnitudes[i] = (lanes[i].to_bits() & 0x7fff_ffff).max(magnitudes[i]);
            }
        }
        let mut lanes = [0.0; 16];
        isa.store(best, &mut lanes);
        let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        let nan = magnitudes.iter().any(|&m| m > f32::INFINITY.to_bits()) || rest.iter().any(|x| x.is_nan());
        if nan || !max.is_finite() {
            return None;
        }
        self.x.iter().position(|&x| x == max)
    }
}

/// Writes the indices of the `ids.len()` largest elements, largest first, the lower index first on ties; NaN
/// counts as the largest, so that it is seen.
pub fn top_k(x: &[f32], ids: &mut [i32]) {
    let above = |a: f32, b: f32| a > b || (a.is_nan() && !b.is_nan());
    let mut found = 0;
    for i in 0..x.len() {
        let at = ids[..found].iter().position(|&j| above(x[i], x[j as usize])).unwrap_or(found);
        if at == ids.len() {
            continue;
        }
        found = (found + 1).min(ids.len());
        ids[at..found].rotate_right(1);
        ids[at] = i as i32;
    }
}

/// Leaves only the `used` groups of `x`, of `count`, whose two largest elements have the largest sums, by the rules of [`top_k`]; the
/// others become minus infinity.
pub fn keep_groups(x: &mut [f32], count: usize, used: usize) {
    let each = (x.len() / count.max(1)).max(1);
    let (mut sums, mut kept) = ([0.0; MAX_EXPERTS], [0; MAX_EXPERTS]);
    let (sums, kept) = (&mut sums[..count.min(MAX_EXPERTS)], &mut kept[..used.min(count).min(MAX_EXPERTS)]);
    for (sum, group) in sums.iter_mut().zip(x.chunks_exact(each)) {
        let mut best = [0; 2];
        top_k(group, &mut best);
        *sum = group[best[0] as usize] + group[best[1] as usize];
    }
    top_k(sums, kept);
    for (i, group) in x.chunks_exact_mut(each).enumerate() {
        if !kept.contains(&(i as i32)) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Writes the `ids.len()` largest elements and their indices, largest first, the lower index first on ties,
/// in the total order of IEEE 754; but NaN counts as the largest, so that it is seen.
pub fn largest(x: &[f32], ids: &mut [i32], values: &mut [f32]) {
    let k = ids.len().min(values.len());
    let rank = |v: f32| {
        let bits = v.to_bits() as i32;
        if v.is_nan() { i32::MAX } else { bits ^ ((bits >> 31) & i32::MAX) }
    };
    // The least rank that was found, once there are `k`.
    let (mut found, mut least) = (0, i32::MIN);
    for (i, &v) in x.iter().enumerate() {
        let new = rank(v);
        if found == k && new <= least {
            continue;
        }
        let at = values[..found].partition_point(|&old| rank(old) >= new);
        if at == k {
            continue;
        }
        found = (found + 1).min(k);
        ids[at..found].rotate_right(1);
        values[at..found].rotate_right(1);
        (ids[at], values[at]) = (i as i32, v);
        least = rank(values[found - 1]);
    }
}

//! The definition of every op, in plain scalar code. Every kernel, shader and simulated instruction is tested
//! against it, and exact backends match its bits. It shares only formats and elementary functions with
//! `halite-kernels`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use halite_kernels::attention::{BLOCK, CHUNK, Growth, PageShape, Pages, PagesMut};
use halite_kernels::formats::{Activation, Format, Kind, Unpacked};
use halite_kernels::isa::{self, Isa, Scalar, WithIsa};
use halite_kernels::math;
use halite_kernels::panel::PanelMut;
use halite_kernels::recurrent::Stretch;
use halite_kernels::rows::{Gate, Unary};

use super::driver::{Driver, Listed};
use super::host::{
    self, Attention, HostOp, HostPlan, HostState, HostStep, HostTensor, Kernels, Matrix, memory,
};
use super::{Backend, Buffer, Caps, Contract, DeviceOp, Limits, OpSig, Plan, Step, Support, Usage};
use crate::error::Result;
use crate::map::Region;
use crate::program::{
    Epilogue, Gating, Groups, NOT_FINITE, NormKind, Op, Part, Program, RopePairs, Rotation, Rule,
};

/// The driver of the reference backend.
pub const DRIVER: Driver = Driver::new("reference", |_, _| Ok(Arc::new(Reference::new())))
    .list(|| Ok(vec![Listed::of(Reference::new().caps())]));

/// The reference backend: slow, and correct by definition.
#[derive(Debug)]
pub struct Reference {
    caps: Caps,
}

impl Reference {
    /// Creates the reference backend. It requests no fusions, but runs all of them.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Reference {
        let caps =
            Caps::new("reference", "scalar definitions of all ops, one thread").contract(Contract::Exact);
        Reference { caps }
    }
}

impl Backend for Reference {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, _: &OpSig<'_>) -> Support {
        Support::Native
    }

    fn alloc(&self, bytes: u64, _: Usage) -> Result<Buffer> {
        memory::alloc(&self.caps.name, bytes, self.caps.memory_bytes)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        Ok(memory::import(region))
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        memory::fill(&self.caps.name, dst, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        memory::read(&self.caps.name, src, offset, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        Ok(Box::new(HostPlan::new(&self.caps.name, program, limits, Definitions)?))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        host::scratch_bytes(program, limits)
    }
}

/// Runs one op by definition, for a device that has memory of its own and no kernel for the op.
///
/// It copies what the op reads out of the backend's buffers with [`Backend::read`], computes on the host, and
/// copies what the op writes back with [`Backend::fill`]. The result has the bits of the reference. It is
/// slow: call it to bring a chip up, and for ops that take no time. The backend reads weights in plain rows
/// ([`Rows::Plain`](super::Rows::Plain)), and [`check_step`](super::check_step) has accepted the step.
///
/// # Errors
/// What copying says, [`Error::Argument`](crate::Error::Argument) for a token id or a position that the
/// program has no row for, and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn run(backend: &dyn Backend, program: &Program, op: &DeviceOp<'_>, step: &Step<'_>) -> Result<()> {
    host::run_on_copies(&mut Definitions, backend, program, op, step)
}

/// Evaluates one lane of an elementary function.
macro_rules! scalar {
    ($f:ident($x:expr)) => {
        math::$f(Scalar, [$x; 16])[0]
    };
}

fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

/// Adds `a` times each x to each y. Compiled for each instruction set, because attention spends its time here and without
/// the CPU's instruction each fma is a call.
struct AddScaled<'a>(f32, &'a [f32], &'a mut [f32]);

impl WithIsa for AddScaled<'_> {
    type Out = ();

    #[inline(always)]
    fn call<I: Isa>(self, _: I) {
        let AddScaled(a, x, y) = self;
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = fma(a, x, *y));
    }
}

/// Sixteen strided accumulators, then the tree: lanes i and i + 8, i and i + 4, i + 2, i + 1.
fn strided(values: impl Iterator<Item = (f32, f32)>) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (k, (a, b)) in values.enumerate() {
        lanes[k % 16] = fma(a, b, lanes[k % 16]);
    }
    tree(lanes)
}

fn tree(lanes: [f32; 16]) -> f32 {
    let mut lanes = lanes.to_vec();
    while lanes.len() > 1 {
        let half = lanes.len() / 2;
        lanes = (0..half).map(|i| lanes[i] + lanes[i + half]).collect();
    }
    lanes[0]
}

/// One block of activations: codes and scale. See `halite_kernels::activation`.
fn quantise(to: Activation, x: &[f32]) -> (Vec<i32>, f32) {
    let amax = x.iter().fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    if x.iter().any(|v| !v.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let inverse = 127.0 / amax;
    if amax == 0.0 || !inverse.is_finite() {
        return (vec![0; x.len()], 0.0);
    }
    let codes = x.iter().map(|v| (v * inverse).round_ties_even() as i32).collect();
    let scale = match to {
        Activation::Q8_0 => half::f16::from_f32(amax / 127.0).to_f32(),
        Activation::Q8_K => 1.0 / inverse,
    };
    (codes, scale)
}

/// Returns the dot product of a weight row with a token's activations.
fn dot(w: Matrix<'_>, row: usize, x: &[f32]) -> f32 {
    let row = w.rows(row..row + 1).bytes;
    let Kind::Quantised { activation, group, has_min } = w.format.kind() else {
        let mut values = vec![0.0; w.cols];
        // The lengths match: the row has whole blocks.
        let _ = w.format.dequantize(row, &mut values);
        return strided(values.into_iter().zip(x.iter().copied()));
    };
    let block_len = activation.block_len();
    let blocks: Vec<(Vec<i32>, f32)> = x.chunks(block_len).map(|x| quantise(activation, x)).collect();
    let code = |k: usize| blocks[k / block_len].0[k % block_len];
    let mut acc = 0.0f32;
    let mut block = Unpacked::ZERO;
    for (n, bytes) in row.chunks(w.format.block_bytes()).enumerate() {
        let _ = w.format.unpack(bytes, &mut block);
        for g in 0..w.format.block_len() / group {
            let places = g * group..(g + 1) * group;
            let first = n * w.format.block_len();
            let scale = blocks[(first + places.start) / block_len].1;
            let sum: i32 = places
                .clone()
                .map(|i| i32::from(block.sub[i / 16]) * i32::from(block.codes[i]) * code(first + i))
                .sum();
            acc = fma(sum as f32, block.d[g] * scale, acc);
            if has_min {
                let sum: i32 = places.map(|i| i32::from(block.mins[i / 16]) * code(first + i)).sum();
                acc = fma(sum as f32, block.m[g] * scale, acc);
            }
        }
    }
    acc
}

fn unary(f: Unary, x: f32) -> f32 {
    match f {
        Unary::Silu => x / (1.0 + scalar!(exp(0.0 - x))),
        Unary::Gelu if x <= -10.0 => 0.0,
        Unary::Gelu if x >= 10.0 => x,
        Unary::Gelu => {
            let half = |x| half::f16::from_f32(x).to_f32();
            let h = half(x);
            let t = scalar!(tanh(0.797_884_6 * fma(0.044_715 * (h * h), h, h)));
            half(fma(0.5 * h, t, 0.5 * h))
        }
        Unary::GeluErf => fma(0.5 * x, scalar!(erf(x * std::f32::consts::FRAC_1_SQRT_2)), 0.5 * x),
        Unary::Relu => {
            if x > 0.0 || x.is_nan() {
                x
            } else {
                0.0
            }
        }
        Unary::ReluSquared => unary(Unary::Relu, x) * unary(Unary::Relu, x),
        Unary::Scale(factor) => x * factor,
        Unary::SoftCap(cap) => cap * scalar!(tanh(x / cap)),
        Unary::Clamp(limit) if x.abs() > limit => limit.copysign(x),
        Unary::Clamp(_) => x,
        Unary::Shift(term) => x + term,
        _ => f32::NAN,
    }
}

pub(crate) fn gate(f: Gate, g: f32, up: f32) -> f32 {
    match f {
        Gate::Silu => unary(Unary::Silu, g) * up,
        Gate::Gelu => unary(Unary::Gelu, g) * up,
        Gate::GeluErf => unary(Unary::GeluErf, g) * up,
        Gate::Relu => unary(Unary::Relu, g) * up,
        Gate::Sigmoid => scalar!(sigmoid(g)) * up,
        Gate::Identity => g * up,
        Gate::Normal => fma(0.5, scalar!(erf(g * std::f32::consts::FRAC_1_SQRT_2)), 0.5) * up,
        Gate::SiluClamped { alpha, limit } => {
            let g = if g > limit { limit } else { g };
            let up = if up > limit { limit } else { up };
            let up = if -limit > up { -limit } else { up };
            let s = g * scalar!(sigmoid(alpha * g));
            fma(s, up, s)
        }
        _ => f32::NAN,
    }
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    exp_below(max, x);
    let mut lanes = [0.0f32; 16];
    x.iter().enumerate().for_each(|(i, x)| lanes[i % 16] += x);
    let sum = tree(lanes);
    x.iter_mut().for_each(|x| *x /= sum);
}

/// One page of a cache.
fn page_of<'a>(pages: &Pages<'a>, shape: PageShape, page: usize) -> &'a [u8] {
    &pages.bytes[page * shape.bytes(pages.format)..][..shape.bytes(pages.format)]
}

/// Returns the bytes of a page before its scales: elements of 8 or 4 bits.
fn code_bytes(format: Format, shape: PageShape) -> usize {
    if format == Format::Q4_0 { shape.elements() / 2 } else { shape.elements() }
}

/// Reads element `at` of a page as f32; in quantised formats, it has scale number `scale`.
fn element(format: Format, shape: PageShape, page: &[u8], at: usize, scale: usize) -> f32 {
    let half = |at: usize| half::f16::from_le_bytes([page[at], page[at + 1]]).to_f32();
    let scale = || half(code_bytes(format, shape) + 2 * scale);
    match format {
        Format::F16 => half(2 * at),
        Format::Q8_0 => scale() * f32::from(page[at] as i8),
        Format::Q4_0 => {
            let byte = page[at / 32 * 16 + at % 16];
            let code = if at % 32 < 16 { byte & 15 } else { byte >> 4 };
            scale() * (f32::from(code) - 8.0)
        }
        _ => f32::from_le_bytes([0, 1, 2, 3].map(|i| page[4 * at + i])),
    }
}

/// Stores a block of elements in a page: element `i` at index `at(i)`, with scale number `scale`.
fn put(
    format: Format,
    shape: PageShape,
    page: &mut [u8],
    scale: usize,
    x: &[f32],
    at: impl Fn(usize) -> usize,
) {
    let magnitude = x.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m });
    let finite = x.iter().all(|x| x.is_finite());
    let scale_at = code_bytes(format, shape) + 2 * scale;
    let put_scale = |page: &mut [u8], d: f32| {
        let d = half::f16::from_f32(if finite { d } else { f32::NAN });
        page[scale_at..][..2].copy_from_slice(&d.to_le_bytes());
    };
    match format {
        Format::F16 => {
            for (i, &x) in x.iter().enumerate() {
                page[2 * at(i)..][..2].copy_from_slice(&half::f16::from_f32(x).to_le_bytes());
            }
        }
        Format::Q8_0 => {
            let inverse = 127.0 / magnitude;
            let none = !finite || !inverse.is_finite();
            for (i, x) in x.iter().enumerate() {
                page[at(i)] = if none { 0 } else { (x * inverse).round_ties_even() as i8 as u8 };
            }
            put_scale(page, if none { 0.0 } else { magnitude / 127.0 });
        }
        Format::Q4_0 => {
            // The first element of largest magnitude, with its sign.
            let largest = x.iter().copied().find(|x| x.abs() == magnitude).unwrap_or(0.0);
            let d = largest / -8.0;
            let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
            for (i, x) in x.iter().enumerate() {
                let code = ((x * inverse + 8.5) as u8).min(15);
                let byte = &mut page[at(i) / 32 * 16 + at(i) % 16];
                *byte = if at(i) % 32 < 16 { *byte & 0xf0 | code } else { *byte & 0x0f | code << 4 };
            }
            put_scale(page, d);
        }
        _ => {
            for (i, &x) in x.iter().enumerate() {
                page[4 * at(i)..][..4].copy_from_slice(&x.to_le_bytes());
            }
        }
    }
}

/// The elements of a page.
struct Elements {
    /// `[kv_heads][key_dim][CHUNK]`.
    keys: Vec<f32>,
    /// `[kv_heads][CHUNK][value_dim]`; of a latent cache the first elements of its keys.
    values: Vec<f32>,
}

impl Elements {
    fn of(format: Format, shape: PageShape, page: &[u8]) -> Elements {
        let PageShape { kv_heads, key_dim, value_dim, .. } = shape;
        let row_of_keys = kv_heads * key_dim;
        let key =
            |row: usize, j: usize| element(format, shape, page, row * CHUNK + j, row / BLOCK * CHUNK + j);
        let value = |head: usize, j: usize, d: usize| {
            if shape.latent {
                return key(head * key_dim + d, j);
            }
            // Rows of elements before this head's values.
            let row = row_of_keys + head * value_dim;
            let scale = (row + d) / BLOCK * CHUNK + j;
            element(format, shape, page, row * CHUNK + j * value_dim + d, scale)
        };
        let keys = (0..row_of_keys * CHUNK).map(|i| key(i / CHUNK, i % CHUNK)).collect();
        let values = (0..kv_heads * CHUNK * value_dim)
            .map(|i| value(i / value_dim / CHUNK, i / value_dim % CHUNK, i % value_dim))
            .collect();
        Elements { keys, values }
    }
}

/// Replaces each x by exp(x - max).
fn exp_below(max: f32, x: &mut [f32]) {
    for x in x.chunks_mut(16) {
        let mut lanes = [0.0; 16];
        lanes.iter_mut().zip(&*x).for_each(|(lane, x)| *lane = x - max);
        x.copy_from_slice(&math::exp(Scalar, lanes)[..x.len()]);
    }
}

/// Computes one query head's attention over positions `seen`, whose pages are given.
fn attend(
    q: &[f32],
    a: &Attention<'_>,
    pages: &[&Elements],
    head: usize,
    position: usize,
    seen: Range<usize>,
    out: &mut [f32],
) {
    let PageShape { kv_heads, key_dim, value_dim, .. } = a.shape;
    let kv_head = head * kv_heads / a.heads;
    let [slope, sink] = [a.slopes, a.sinks].map(|of_heads| of_heads.map(|of_heads| of_heads[head]));
    let cpu = isa::Cpu::detect();
    let mut state: Option<(f32, f32, Vec<f32>)> = None;
    let first_page = seen.start / CHUNK;
    for (chunk, page) in pages.iter().enumerate() {
        let first = (first_page + chunk) * CHUNK;
        let valid = seen.start.max(first) - first..seen.end.min(first + CHUNK) - first;
        let keys = &page.keys[kv_head * key_dim * CHUNK..][..key_dim * CHUNK];
        let values = &page.values[kv_head * CHUNK * value_dim..][..CHUNK * value_dim];
        let mut scores = vec![0.0f32; valid.len()];
        for (&q, keys) in q.iter().zip(keys.chunks_exact(CHUNK)) {
            cpu.run_inline(AddScaled(q, &keys[valid.clone()], &mut scores));
        }
        for (score, at) in scores.iter_mut().zip(first + valid.start..) {
            *score *= Growth::scale(a.growth, a.scale, position);
            *score = a.softcap.map_or(*score, |cap| unary(Unary::SoftCap(cap), *score));
            *score = slope.map_or(*score, |slope| fma(-slope, at.abs_diff(position) as f32, *score));
        }
        let max = scores.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
        exp_below(max, &mut scores);
        let mut lanes = [0.0f32; 16];
        valid.clone().zip(&scores).for_each(|(j, p)| lanes[j % 16] += p);
        let sum = tree(lanes);
        let mut o = vec![0.0f32; value_dim];
        for (value, &p) in values.chunks_exact(value_dim).skip(valid.start).zip(&scores) {
            cpu.run_inline(AddScaled(p, value, &mut o));
        }
        state = Some(match state {
            None => (max, sum, o),
            Some((old_max, old_sum, old_o)) => {
                let new_max = if max > old_max { max } else { old_max };
                let (old, new) = (scalar!(exp(old_max - new_max)), scalar!(exp(max - new_max)));
                let o = old_o.iter().zip(&o).map(|(a, b)| fma(*a, old, b * new)).collect();
                (new_max, fma(old_sum, old, sum * new), o)
            }
        });
    }
    let Some((max, mut sum, o)) = state else { return };
    let mut scale = 1.0;
    if let Some(sink) = sink {
        let new_max = if sink > max { sink } else { max };
        scale = scalar!(exp(max - new_max));
        sum = fma(sum, scale, scalar!(exp(sink - new_max)));
    }
    for (out, o) in out.iter_mut().zip(o) {
        *out = o * (scale / sum);
    }
}

/// Computes the products of a row of activations with each row of a weight, and adds the bias.
fn product(w: Matrix<'_>, bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let element = |r| bias.map_or(dot(w, r, x), |b| dot(w, r, x) + b[r]);
    (0..w.rows).map(element).collect()
}

/// Computes the products of a row of activations with an expert's matrix; `bias` has a row per expert.
fn of_expert(w: &HostTensor<'_>, bias: Option<&HostTensor<'_>>, expert: usize, x: &[f32]) -> Vec<f32> {
    product(w.expert(expert), bias.map(|b| &b.floats()[expert * b.cols..][..b.cols]), x)
}

/// What a norm subtracts.
fn mean_of(x: &[f32], kind: NormKind) -> f32 {
    match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => {
            let mut lanes = [0.0f32; 16];
            x.iter().enumerate().for_each(|(i, x)| lanes[i % 16] += x);
            tree(lanes) / x.len() as f32
        }
    }
}

/// What a norm divides by.
fn spread_around(mean: f32, x: &[f32], eps: f32) -> f32 {
    let squares = strided(x.iter().map(|x| (x - mean, x - mean)));
    (squares / x.len() as f32 + eps).sqrt()
}

fn norm(x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, kind: NormKind, eps: f32, out: &mut [f32]) {
    let mean = mean_of(x, kind);
    let scale = 1.0 / spread_around(mean, x, eps);
    for (i, (x, out)) in x.iter().zip(out).enumerate() {
        let scaled = (x - mean) * scale;
        *out = match (weight, bias) {
            (None, None) => scaled,
            (Some(w), None) => scaled * w[i],
            (None, Some(b)) => scaled + b[i],
            (Some(w), Some(b)) => fma(scaled, w[i], b[i]),
        };
    }
}

/// The indices of elements in decreasing order.
fn decreasing(x: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    // A stable sort keeps the lower index first on ties. NaN sorts first, so that it is detected.
    order.sort_by(|&i, &j| {
        let nan_first = x[j].is_nan().cmp(&x[i].is_nan());
        nan_first.then(x[j].partial_cmp(&x[i]).unwrap_or(std::cmp::Ordering::Equal))
    });
    order
}

#[allow(clippy::too_many_arguments)]
fn route(
    logits: &[f32],
    bias: Option<&[f32]>,
    groups: Option<Groups>,
    gating: Gating,
    normalise: bool,
    scale: f32,
    ids: &mut [i32],
    weights: &mut [f32],
) {
    let mut p = logits.to_vec();
    match gating {
        Gating::Softmax => softmax(&mut p),
        Gating::Sigmoid => p.iter_mut().for_each(|p| *p = scalar!(sigmoid(*p))),
        Gating::SoftmaxOfTop => {}
    }
    let mut choice: Vec<f32> =
        (p.iter().enumerate()).map(|(i, p)| bias.map_or(*p, |bias| p + bias[i])).collect();
    if let Some(Groups { count, used }) = groups {
        let each = p.len() / count as usize;
        let best_two = |group: &[f32]| decreasing(group).iter().take(2).map(|&i| group[i]).sum();
        let sums: Vec<f32> = choice.chunks(each).map(best_two).collect();
        let kept = &decreasing(&sums)[..used as usize];
        let groups = choice.chunks_mut(each).enumerate().filter(|(group, _)| !kept.contains(group));
        groups.for_each(|(_, group)| group.fill(f32::NEG_INFINITY));
    }
    let order = decreasing(&choice);
    for ((id, weight), &expert) in ids.iter_mut().zip(weights.iter_mut()).zip(&order) {
        (*id, *weight) = (expert as i32, p[expert]);
    }
    if gating == Gating::SoftmaxOfTop {
        softmax(weights);
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    if scale != 1.0 {
        weights.iter_mut().for_each(|w| *w *= scale);
    }
}

/// Writes one token's keys and values to position `slot` of `page`.
fn kv_write(pages: &mut PagesMut<'_>, shape: PageShape, page: usize, slot: usize, k: &[f32], v: &[f32]) {
    let key = |i: usize| i * CHUNK + slot;
    let keys = shape.kv_heads * shape.key_dim;
    let value = |i: usize| {
        let (head, d) = (i / shape.value_dim, i % shape.value_dim);
        (keys + head * shape.value_dim) * CHUNK + slot * shape.value_dim + d
    };
    // A latent value is the first part of the key.
    let joined = if shape.latent { [v, k].concat() } else { k.to_vec() };
    let (k, v) = (&*joined, if shape.latent { &[] } else { v });
    let (format, bytes) = (pages.format, shape.bytes(pages.format));
    let page = &mut pages.bytes[page * bytes..][..bytes];
    for (block, x) in k.chunks(BLOCK).enumerate() {
        put(format, shape, page, block * CHUNK + slot, x, |i| key(block * BLOCK + i));
    }
    for (block, x) in v.chunks(BLOCK).enumerate() {
        let scale = (k.len() / BLOCK + block) * CHUNK + slot;
        put(format, shape, page, scale, x, |i| value(block * BLOCK + i));
    }
}

/// The keys and values of all tokens of a step into the cache.
fn kv_write_all(k: &[f32], v: &[f32], state: &mut HostState<'_>, step: &HostStep<'_>) {
    let (shape, group) = (state.shape, state.group);
    let rows = k.chunks_exact(shape.kv_heads * shape.key_only());
    let rows = rows.zip(v.chunks_exact(shape.kv_heads * shape.value_dim));
    let mut pages = state.pages_mut();
    for (t, (k, v)) in rows.enumerate() {
        let (table, position) = step.place(t, group);
        let (page, slot) = (table[position as usize / CHUNK] as usize, position as usize % CHUNK);
        kv_write(&mut pages, shape, page, slot, k, v);
    }
}

/// Calls `f` with each token and the state that the token before left, to change.
fn recur(step: &HostStep<'_>, group: usize, states: &mut PanelMut<'_>, f: &mut dyn FnMut(usize, &mut [f32])) {
    step.stretches(group, |Stretch { from, to, tokens }| {
        let mut state = match from {
            Some(from) => states.row(from as usize).to_vec(),
            None => vec![0.0; states.cols()],
        };
        tokens.for_each(|t| f(t, &mut state));
        states.row(to as usize).copy_from_slice(&state);
    });
}

/// A rotary embedding; see [`Op::Rope`].
fn rope(x: &[f32], cols: usize, r: &Rotation<HostTensor<'_>>, positions: &[u32], out: &mut [f32]) {
    let (count, factors) = (r.frequencies.len(), r.factors.as_ref().map(|f| f.floats()));
    out.copy_from_slice(x);
    for (out, &position) in out.chunks_exact_mut(cols).zip(positions) {
        for head in out.chunks_exact_mut(r.head_dim as usize) {
            for i in 0..count {
                let frequency = factors.map_or(r.frequencies[i], |f| r.frequencies[i] / f[i]);
                let (sin, cos) = math::sin_cos(Scalar, [position as f32 * frequency; 16]);
                let (sin, cos) = (sin[0] * r.magnitude, cos[0] * r.magnitude);
                let (first, second) = match r.pairs {
                    RopePairs::Adjacent => (2 * i, 2 * i + 1),
                    RopePairs::Halves => (i, i + count),
                };
                let (x, y) = (head[first], head[second]);
                head[first] = fma(x, cos, 0.0 - y * sin);
                head[second] = fma(x, sin, y * cos);
            }
        }
    }
}

/// `out[i] = f(i)`.
fn each(out: &mut HostTensor<'_>, f: impl Fn(usize) -> f32) {
    out.floats_mut().iter_mut().enumerate().for_each(|(i, out)| *out = f(i));
}

/// The definition of every op, as [`Kernels`].
struct Definitions;

impl Kernels for Definitions {
    fn run(&mut self, op: &mut HostOp<'_>, step: &HostStep<'_>) -> Result<()> {
        match op {
            Op::Embed { table, index, out, scale } => {
                let (table, rows) = (table.matrix(), step.rows(*index, table.rows)?);
                for (out, &row) in out.floats_mut().chunks_exact_mut(table.cols).zip(rows) {
                    let row = table.rows(row as usize..row as usize + 1);
                    let _ = row.format.dequantize(row.bytes, out);
                    if *scale != 1.0 {
                        out.iter_mut().for_each(|x| *x *= *scale);
                    }
                }
            }
            Op::Gather { x, out } => {
                let (x, cols, rows) = (x.floats(), x.cols, step.step.outputs);
                each(out, |i| x[rows[i / cols] as usize * cols + i % cols]);
            }
            Op::Norm { x, add, sum, weight, bias, out, kind, eps, group } => {
                let mut x = x.floats().to_vec();
                if let (Some(add), Some(sum)) = (add, sum) {
                    x.iter_mut().zip(add.floats()).for_each(|(x, add)| *x += add);
                    sum.floats_mut().copy_from_slice(&x);
                }
                let weight = weight.as_ref().map(|w| w.floats());
                let bias = bias.as_ref().map(|b| b.floats());
                let group = *group as usize;
                for (x, out) in x.chunks_exact(group).zip(out.floats_mut().chunks_exact_mut(group)) {
                    norm(x, weight, bias, *kind, *eps, out);
                }
            }
            Op::MatMul { x, parts, epilogue, outs } => {
                let of_part = |part: &Part<HostTensor<'_>>| -> Vec<f32> {
                    let (w, bias) = (part.weight.matrix(), part.bias.as_ref().map(|b| b.floats()));
                    x.floats().chunks_exact(w.cols).flat_map(|x| product(w, bias, x)).collect()
                };
                let products: Vec<Vec<f32>> = parts.iter().map(of_part).collect();
                for (out, y) in outs.iter_mut().zip(&products) {
                    match &*epilogue {
                        Epilogue::None => each(out, |i| y[i]),
                        Epilogue::Glu(act) => each(out, |i| gate(*act, y[i], products[1][i])),
                        Epilogue::Add(residual) => each(out, |i| residual.floats()[i] + y[i]),
                    }
                }
            }
            Op::Rope { x, out, rotation } => {
                rope(x.floats(), x.cols, rotation, step.positions, out.floats_mut());
            }
            Op::KvWrite { k, v, state } => kv_write_all(k.floats(), v.floats(), state, step),
            Op::RopeKv { q, k, v, out, state, rotation } => {
                rope(q.floats(), q.cols, rotation, step.positions, out.floats_mut());
                let mut rotated = vec![0.0; k.floats().len()];
                rope(k.floats(), k.cols, rotation, step.positions, &mut rotated);
                kv_write_all(&rotated, v.floats(), state, step);
            }
            Op::Attend { .. } => {
                let Some((a, out)) = op.attention(step) else { return Ok(()) };
                let PageShape { key_dim, value_dim, .. } = a.shape;
                let (q_cols, out_cols) = (a.heads * key_dim, a.heads * value_dim);
                let mut pages = HashMap::new();
                for (t, (q, out)) in a.q.chunks_exact(q_cols).zip(out.chunks_exact_mut(out_cols)).enumerate()
                {
                    let (table, position, end) = a.place(t);
                    let first = match a.sight.window {
                        Some(w) if a.sight.aligned => position / w as usize * w as usize,
                        Some(w) => (position + 1).saturating_sub(w as usize),
                        None => 0,
                    };
                    let end = end.min((position + 1).saturating_add(a.sight.after as usize));
                    let table = &table[first / CHUNK..end.div_ceil(CHUNK)];
                    for &page in table {
                        let bytes = || page_of(&a.pages, a.shape, page as usize);
                        pages.entry(page).or_insert_with(|| Elements::of(a.pages.format, a.shape, bytes()));
                    }
                    let pages: Vec<&Elements> = table.iter().map(|page| &pages[page]).collect();
                    let heads = q.chunks_exact(key_dim).zip(out.chunks_exact_mut(value_dim));
                    for (h, (q, out)) in heads.enumerate() {
                        attend(q, &a, &pages, h, position, first..end, out);
                    }
                }
            }
            Op::Conv { x, weight, bias, state, out } => {
                let (channels, taps, group) = (x.cols, weight.cols, state.group);
                let (x, weight, bias) = (x.floats(), weight.floats(), bias.as_ref().map(|b| b.floats()));
                let (mut states, mut out) = (state.rows_mut(), PanelMut::new(out.floats_mut(), channels));
                recur(step, group, &mut states, &mut |t, state| {
                    let kept = state.chunks_exact_mut(taps - 1).zip(weight.chunks_exact(taps));
                    for (c, (past, weight)) in kept.enumerate() {
                        let now = x[t * channels + c];
                        let inputs = past.iter().copied().chain([now]);
                        let bias = bias.map_or(0.0, |bias| bias[c]);
                        out.row(t)[c] = inputs.zip(weight).fold(bias, |sum, (x, &w)| fma(w, x, sum));
                        past.rotate_left(1);
                        past[taps - 2] = now;
                    }
                });
            }
            Op::Recur { q, k, v, decay, a, rule, state, out } => {
                let PageShape { kv_heads: heads, key_dim, value_dim, .. } = state.shape;
                let (keys, group, cols) = (k.cols, state.group, out.cols);
                // Of each head: one, or one for each row of its state.
                let (rates, factors) = (decay.cols / heads, a.cols / heads);
                let [q, k, v, decay, a] = [q, k, v, decay, a].map(|x| x.floats());
                let (mut states, mut out) = (state.rows_mut(), PanelMut::new(out.floats_mut(), cols));
                recur(step, group, &mut states, &mut |t, states| {
                    for (h, s) in states.chunks_exact_mut(key_dim * value_dim).enumerate() {
                        let key = rule.key_head(h, heads, keys / key_dim) * key_dim;
                        let [q, k] = [q, k].map(|x| &x[t * keys + key..][..key_dim]);
                        let v = &v[(t * heads + h) * value_dim..][..value_dim];
                        let rate = |i: usize| scalar!(softplus(decay[(t * heads + h) * rates + i % rates]));
                        for (i, s) in s.chunks_exact_mut(value_dim).enumerate() {
                            let kept = scalar!(exp(a[h * factors + i % factors] * rate(i)));
                            s.iter_mut().for_each(|s| *s *= kept);
                        }
                        for (j, &v) in v.iter().enumerate() {
                            let update = match rule {
                                Rule::Delta { beta, .. } => {
                                    let known =
                                        (0..key_dim).fold(0.0, |sum, i| fma(s[i * value_dim + j], k[i], sum));
                                    scalar!(sigmoid(beta.floats()[t * heads + h])) * (v - known)
                                }
                                Rule::Scan { .. } => rate(0) * v,
                            };
                            let mut sum = 0.0;
                            for i in 0..key_dim {
                                let s = &mut s[i * value_dim + j];
                                *s = fma(k[i], update, *s);
                                sum = fma(*s, q[i], sum);
                            }
                            out.row(t)[h * value_dim + j] = match rule {
                                Rule::Delta { scale, .. } => *scale * sum,
                                Rule::Scan { d } => fma(d.floats()[h], v, sum),
                            };
                        }
                    }
                });
            }
            Op::Slice { x, out, group, first } => {
                let (x, cols, out_cols) = (x.floats(), x.cols, out.cols);
                let (group, first) = (*group as usize, *first as usize);
                let len = out_cols / (cols / group);
                each(out, |i| {
                    let (row, col) = (i / out_cols, i % out_cols);
                    x[row * cols + col / len * group + first + col % len]
                });
            }
            Op::Join { a, b, out, group, first } => {
                let (cols, group, first) = (out.cols, *group as usize, *first as usize);
                let (a_cols, b_cols, last) = (a.cols, b.cols, group - first);
                let (a, b) = (a.floats(), b.floats());
                each(out, |i| {
                    let (row, n, d) = (i / cols, i % cols / group, i % group);
                    match d.checked_sub(first) {
                        None => a[row * a_cols + n * first + d],
                        Some(d) => b[row * b_cols + (n * last + d) % b_cols],
                    }
                });
            }
            Op::BlockMatMul { x, weight, out } => {
                let blocks = x.floats().chunks_exact(weight.cols).enumerate();
                let outs = out.floats_mut().chunks_exact_mut(weight.rows);
                for ((i, x), out) in blocks.zip(outs) {
                    out.copy_from_slice(&product(weight.expert(i % weight.experts), None, x));
                }
            }
            Op::Mul { x, weight, out } => {
                let (x, weight) = (x.floats(), weight.floats());
                each(out, |i| x[i] * weight[i % weight.len()]);
            }
            Op::Spread { x, out, kind, eps, group } => {
                for (x, out) in x.floats().chunks_exact(*group as usize).zip(out.floats_mut()) {
                    *out = spread_around(mean_of(x, *kind), x, *eps);
                }
            }
            Op::Mix { x, factors, out, parts } => {
                let (parts, cols) = (*parts as usize, x.cols);
                let (len, factor_cols, out_cols) = (cols / parts, factors.cols, out.cols);
                let (x, factors) = (x.floats(), factors.floats());
                each(out, |at| {
                    let (row, sum, i) = (at / out_cols, at % out_cols / len, at % len);
                    let factors = &factors[row * factor_cols + sum * parts..][..parts];
                    let x = |j: usize| x[row * cols + j * len + i];
                    factors.iter().enumerate().fold(0.0, |sum, (j, f)| fma(*f, x(j), sum))
                });
            }
            Op::Glu { gate: g, up, out, act } => {
                let (g, up) = (g.floats(), up.floats());
                each(out, |i| gate(*act, g[i], up[i]));
            }
            Op::Add { a, b, out } => {
                let (a, b) = (a.floats(), b.floats());
                each(out, |i| a[i] + b[i]);
            }
            Op::Unary { x, out, f } => {
                let x = x.floats();
                each(out, |i| unary(*f, x[i]));
            }
            Op::Route { logits, bias, groups, ids, weights, gating, normalise, scale, scales } => {
                let (experts, used) = (logits.cols, ids.cols);
                let bias = bias.as_ref().map(|bias| bias.floats());
                let rows = ids.ints_mut().chunks_exact_mut(used);
                let rows = rows.zip(weights.floats_mut().chunks_exact_mut(used));
                for (logits, (ids, weights)) in logits.floats().chunks_exact(experts).zip(rows) {
                    route(logits, bias, *groups, *gating, *normalise, *scale, ids, weights);
                    if let Some(scales) = scales {
                        weights.iter_mut().zip(&*ids).for_each(|(w, &id)| *w *= scales.floats()[id as usize]);
                    }
                }
            }
            Op::Experts { x, ids, weights, gate: gate_weight, up, down, biases, out, act } => {
                let (cols, used, biases) = (x.cols, ids.cols, biases.as_ref());
                let chosen = ids.ints().chunks_exact(used).zip(weights.floats().chunks_exact(used));
                let rows = x.floats().chunks_exact(cols).zip(out.floats_mut().chunks_exact_mut(cols));
                for ((x, out), (ids, weights)) in rows.zip(chosen) {
                    out.fill(0.0);
                    for (id, weight) in ids.iter().zip(weights) {
                        let e = *id as usize;
                        let g = of_expert(gate_weight, biases.map(|b| &b[0]), e, x);
                        let up = of_expert(up, biases.map(|b| &b[1]), e, x);
                        let hidden: Vec<f32> = g.iter().zip(&up).map(|(g, up)| gate(*act, *g, *up)).collect();
                        let y = of_expert(down, biases.map(|b| &b[2]), e, &hidden);
                        for (out, y) in out.iter_mut().zip(y) {
                            *out = fma(*weight, y, *out);
                        }
                    }
                }
            }
            Op::TopK { x, ids, values } => {
                let (k, cols) = (ids.cols, x.cols);
                let rows = ids.ints_mut().chunks_exact_mut(k).zip(values.floats_mut().chunks_exact_mut(k));
                for (x, (ids, values)) in x.floats().chunks_exact(cols).zip(rows) {
                    let mut order: Vec<usize> = (0..cols).collect();
                    order.sort_by(|&i, &j| x[j].total_cmp(&x[i]));
                    order.sort_by_key(|&i| !x[i].is_nan());
                    for (i, (id, value)) in order.into_iter().zip(ids.iter_mut().zip(values)) {
                        (*id, *value) = (i as i32, x[i]);
                    }
                }
            }
            Op::ArgMax { x, out } => {
                for (x, out) in x.floats().chunks_exact(x.cols).zip(out.ints_mut()) {
                    let better =
                        |best: (usize, f32), (i, &x): (usize, &f32)| if x > best.1 { (i, x) } else { best };
                    let best = x.iter().enumerate().fold((0, f32::NEG_INFINITY), better);
                    let finite = best.1.is_finite() && x.iter().all(|x| !x.is_nan());
                    *out = if finite { best.0 as i32 } else { NOT_FINITE };
                }
            }
        }
        Ok(())
    }
}

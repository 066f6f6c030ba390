//! Runs the ops of a checked image, one after the other. How a result is computed is the kernels' business; this
//! only finds their operands.

use core::ops::Range;

use halite_kernels::activation::{Activation, Quantise, Quantised, QuantisedMut};
use halite_kernels::attention::{self, Attend, Sight};
use halite_kernels::formats::{Kind, Layout};
use halite_kernels::isa::{Cpu, Scalar};
use halite_kernels::kv::{CHUNK, Pages, PagesMut};
use halite_kernels::matmul::{self, MatMul, X};
use halite_kernels::panel::PanelMut;
use halite_kernels::rows;

use crate::Error;
use crate::image::{Image, State, Tensor};
use crate::layout::{chunks, quantised_words};
use crate::ops::Op;
use crate::record::{Gating, Index, Rows, Span};

/// The instruction set: scalar code gives the same bits as any other.
pub(crate) const CPU: Cpu = Cpu::Scalar(Scalar);

/// The tokens of a step.
pub(crate) struct Step<'a> {
    pub tokens: &'a [u32],
    /// The position of the first one.
    pub position: u32,
    /// Tokens that have outputs: the last ones.
    pub outputs: usize,
}

/// An image, its memory and a step.
pub(crate) struct Run<'a, 'm> {
    pub image: &'a Image<'a>,
    pub memory: &'m mut [u32],
    pub step: Step<'a>,
}

/// What should have been found when the image was checked.
const UNCHECKED: Error = Error::Corrupt { what: "an operand of an op", at: u32::MAX };

/// A matrix in the image.
#[derive(Clone, Copy)]
struct Weight<'a> {
    tensor: Tensor,
    bytes: &'a [u8],
}

impl<'a> Weight<'a> {
    fn rows(&self) -> usize {
        if let Rows::Fixed(rows) = self.tensor.rows { rows as usize } else { 0 }
    }

    fn cols(&self) -> usize {
        self.tensor.cols as usize
    }

    /// One of its matrices.
    fn expert(&self, n: usize) -> Weight<'a> {
        let bytes = self.bytes.len() / self.tensor.experts.max(1) as usize;
        let all = self.bytes.get(n * bytes..(n + 1) * bytes);
        Weight { tensor: Tensor { experts: 1, ..self.tensor }, bytes: all.unwrap_or(&[]) }
    }
}

/// `out[t] = weight · x[t] + bias`.
fn product(
    weight: Weight<'_>,
    bias: Option<&[f32]>,
    x: &[f32],
    out: &mut [f32],
    work: &mut [u32],
) -> Option<()> {
    let (k, rows) = (weight.cols(), weight.rows());
    let w = weight.bytes;
    let mut compute = |x| {
        let out = PanelMut::new(out, rows);
        matmul::matmul(CPU, weight.tensor.format, MatMul { w, layout: Layout::Rows, k, x, out });
    };
    match weight.tensor.format.kind() {
        Kind::Float => compute(X::F32(x)),
        Kind::Quantised { activation, .. } => {
            compute(X::Quantised(quantise(activation, k, x, work)?));
        }
    }
    if let Some(bias) = bias {
        for out in out.chunks_exact_mut(rows) {
            out.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
    Some(())
}

/// Quantises rows of `k` values into `work`.
fn quantise<'w>(to: Activation, k: usize, x: &[f32], work: &'w mut [u32]) -> Option<Quantised<'w>> {
    let [codes, scales, sums] = quantised_words(to, k).map(|words| x.len() / k * words);
    let (codes, rest) = work.split_at_mut_checked(codes)?;
    let (scales, rest) = rest.split_at_mut_checked(scales)?;
    let (sums, _) = rest.split_at_mut_checked(sums)?;
    let (codes, scales): (&mut [i8], &mut [f32]) =
        (bytemuck::cast_slice_mut(codes), bytemuck::cast_slice_mut(scales));
    let sums: &mut [i32] = bytemuck::cast_slice_mut(sums);
    CPU.run(Quantise {
        to,
        k,
        x,
        out: QuantisedMut { codes: &mut *codes, scales: &mut *scales, sums: &mut *sums },
    });
    Some(Quantised { k, codes, scales, sums })
}

impl<'a> Run<'a, '_> {
    /// Runs all ops.
    pub fn run(&mut self) -> Result<(), Error> {
        for (at, op) in (0..).zip(self.image.ops()) {
            self.op(&op?).map_err(|error| match error {
                Error::Corrupt { what, .. } => Error::Corrupt { what, at },
                error => error,
            })?;
        }
        Ok(())
    }

    /// The place of a tensor's rows of this step in memory.
    pub fn place(&self, n: u32) -> Result<Range<usize>, Error> {
        let t = self.image.tensor(n)?;
        let rows = match t.rows {
            Rows::Tokens => self.step.tokens.len(),
            Rows::Outputs => self.step.outputs,
            Rows::Fixed(rows) => rows as usize,
        };
        let first = t.first as usize;
        Ok(first..first + rows * t.cols as usize)
    }

    /// The kernels' own memory.
    fn work(&self) -> Range<usize> {
        let work = self.image.header.work;
        work.first as usize..(work.first + work.len) as usize
    }

    /// Places in memory that do not overlap.
    fn memory<const N: usize>(&mut self, places: [Range<usize>; N]) -> Result<[&mut [u32]; N], Error> {
        self.memory.get_disjoint_mut(places).map_err(|_| UNCHECKED)
    }

    /// Tensors of f32 in memory.
    fn floats<const N: usize>(&mut self, tensors: [u32; N]) -> Result<[&mut [f32]; N], Error> {
        let mut places = [const { 0..0 }; N];
        for (place, n) in places.iter_mut().zip(tensors) {
            *place = self.place(n)?;
        }
        Ok(self.memory(places)?.map(bytemuck::cast_slice_mut))
    }

    fn weight(&self, n: u32) -> Result<Weight<'a>, Error> {
        let tensor = self.image.tensor(n)?;
        let row = tensor.format.row_bytes(tensor.cols as usize).ok_or(UNCHECKED)?;
        let Rows::Fixed(rows) = tensor.rows else { return Err(UNCHECKED) };
        let first = tensor.first as usize * 4;
        let bytes: &'a [u8] = bytemuck::cast_slice(self.image.words);
        let len = rows as usize * tensor.experts as usize * row;
        Ok(Weight { tensor, bytes: bytes.get(first..first + len).ok_or(UNCHECKED)? })
    }

    fn vector(&self, n: Option<u32>) -> Result<Option<&'a [f32]>, Error> {
        n.map(|n| bytemuck::try_cast_slice(self.weight(n)?.bytes).map_err(|_| UNCHECKED)).transpose()
    }

    fn op(&mut self, op: &Op) -> Result<(), Error> {
        match *op {
            Op::Embed { table, index, out, scale } => {
                let table = self.weight(table)?;
                let (tokens, position) = (self.step.tokens, self.step.position);
                let [out] = self.floats([out])?;
                for (i, out) in out.chunks_exact_mut(table.cols()).enumerate() {
                    let row = match index {
                        Index::Token => tokens[i],
                        Index::Position => position + i as u32,
                        Index::First => 0,
                    };
                    matmul::embed(table.tensor.format, Layout::Rows, table.bytes, row as usize, scale, out);
                }
            }
            Op::Gather { x, out } => {
                let [x, out] = self.floats([x, out])?;
                // The outputs are those of the last tokens.
                out.copy_from_slice(&x[x.len() - out.len()..]);
            }
            Op::Norm { x, weight, bias, out, centred, eps, group } => {
                let (weight, bias) = (self.vector(weight)?, self.vector(bias)?);
                let [x, out] = self.floats([x, out])?;
                for (x, out) in x.chunks_exact(group as usize).zip(out.chunks_exact_mut(group as usize)) {
                    CPU.run(rows::Norm { x, weight, bias, eps, centred, out });
                }
            }
            Op::MatMul { x, weight, bias, out } => {
                let (weight, bias) = (self.weight(weight)?, self.vector(bias)?);
                let [x, out, work] = self.memory([self.place(x)?, self.place(out)?, self.work()])?;
                product(weight, bias, bytemuck::cast_slice(x), bytemuck::cast_slice_mut(out), work)
                    .ok_or(UNCHECKED)?;
            }
            Op::Rope { x, out, head_dim, frequencies, factors, magnitude, adjacent } => {
                let frequencies = bytemuck::cast_slice(self.image.span(frequencies, 1).ok_or(UNCHECKED)?);
                let (factors, first) = (self.vector(factors)?, self.step.position);
                let (head_dim, cols) = (head_dim as usize, self.image.tensor(x)?.cols as usize);
                let [x, out] = self.floats([x, out])?;
                for (position, (x, out)) in
                    (first..).zip(x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)))
                {
                    CPU.run(rows::Rope {
                        x,
                        out,
                        head_dim,
                        position,
                        frequencies,
                        factors,
                        magnitude,
                        adjacent,
                    });
                }
            }
            Op::KvWrite { k, v, state } => self.kv_write(k, v, self.image.state(state)?)?,
            Op::Attend { q, state, out, heads, scale, softcap, slopes, sinks } => {
                let (state, sinks) = (self.image.state(state)?, self.vector(sinks)?);
                let slopes = match slopes.len {
                    0 => None,
                    _ => Some(bytemuck::cast_slice(self.image.span(slopes, 1).ok_or(UNCHECKED)?)),
                };
                let attend = Attention { heads: heads as usize, scale, softcap, slopes, sinks };
                self.attend(q, state, out, attend)?;
            }
            Op::Glu { gate, up, out, act } => {
                let [gate, up, out] = self.floats([gate, up, out])?;
                CPU.run(rows::Glu { f: act, gate, up, out });
            }
            Op::Add { a, b, out } => {
                let [a, b, out] = self.floats([a, b, out])?;
                CPU.run(rows::Add { a, b, out });
            }
            Op::Unary { x, out, f } => {
                let [x, out] = self.floats([x, out])?;
                CPU.run(rows::Elementwise { f, x, out });
            }
            Op::Route { logits, ids, weights, gating, normalise, scale } => {
                let (experts, used) =
                    (self.image.tensor(logits)?.cols as usize, self.image.tensor(ids)?.cols as usize);
                let places = [self.place(logits)?, self.place(ids)?, self.place(weights)?];
                let [logits, ids, weights] = self.memory(places)?;
                let logits: &[f32] = bytemuck::cast_slice(logits);
                let (ids, weights): (&mut [i32], &mut [f32]) =
                    (bytemuck::cast_slice_mut(ids), bytemuck::cast_slice_mut(weights));
                let chosen = ids.chunks_exact_mut(used).zip(weights.chunks_exact_mut(used));
                for (logits, (ids, weights)) in logits.chunks_exact(experts).zip(chosen) {
                    route(logits, ids, weights, gating, normalise, scale);
                }
            }
            Op::Experts { x, ids, weights, gate, up, down, gate_bias, up_bias, down_bias, out, act } => {
                let matrices = [self.weight(gate)?, self.weight(up)?, self.weight(down)?];
                let biases = [self.vector(gate_bias)?, self.vector(up_bias)?, self.vector(down_bias)?];
                let (used, cols) = (self.image.tensor(ids)?.cols as usize, matrices[2].rows());
                let places =
                    [self.place(x)?, self.place(ids)?, self.place(weights)?, self.place(out)?, self.work()];
                let [x, ids, weights, out, work] = self.memory(places)?;
                let (x, weights): (&[f32], &[f32]) = (bytemuck::cast_slice(x), bytemuck::cast_slice(weights));
                let out: &mut [f32] = bytemuck::cast_slice_mut(out);
                let chosen = ids.chunks_exact(used).zip(weights.chunks_exact(used));
                for ((x, out), (ids, weights)) in
                    x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)).zip(chosen)
                {
                    out.fill(0.0);
                    for (&id, &weight) in ids.iter().zip(weights) {
                        let y = expert(id as usize, matrices, biases, act, x, work).ok_or(UNCHECKED)?;
                        CPU.run(rows::AddScaled { weight, x: y, acc: out });
                    }
                }
            }
        }
        Ok(())
    }

    fn kv_write(&mut self, k: u32, v: u32, state: State) -> Result<(), Error> {
        let (shape, first) = (state.shape(), self.step.position as usize);
        let ranges = [self.place(k)?, self.place(v)?, pages(&state)?];
        // Keys and values may be the same tensor.
        let same = ranges[0] == ranges[1];
        let (k, v, bytes): (&[u32], &[u32], &mut [u32]) = if same {
            let [_, kv, bytes] = ranges;
            let [kv, bytes] = self.memory([kv, bytes])?;
            (&*kv, &*kv, bytes)
        } else {
            let [k, v, bytes] = self.memory(ranges)?;
            (&*k, &*v, bytes)
        };
        let (k, v): (&[f32], &[f32]) = (bytemuck::cast_slice(k), bytemuck::cast_slice(v));
        let mut pages = PagesMut { format: state.format, bytes: bytemuck::cast_slice_mut(bytes) };
        let (keys, values) = (shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim);
        for (i, (k, v)) in k.chunks_exact(keys).zip(v.chunks_exact(values)).enumerate() {
            let position = first + i;
            let page = position / CHUNK % state.pages as usize;
            attention::write(&mut pages, shape, page, position % CHUNK, k, v);
        }
        Ok(())
    }

    fn attend(&mut self, q: u32, state: State, out: u32, a: Attention<'_>) -> Result<(), Error> {
        let (shape, tokens, position) = (state.shape(), self.step.tokens.len(), self.step.position as usize);
        let chunks = chunks((position + tokens) as u32);
        let table = self.image.span(Span { first: state.table, len: chunks }, 1);
        let table = table.ok_or(UNCHECKED)?;
        let ranges = [self.place(q)?, self.place(out)?, pages(&state)?];
        let [q, out, bytes] = self.memory(ranges)?;
        let (q, out): (&[f32], &mut [f32]) = (bytemuck::cast_slice(q), bytemuck::cast_slice_mut(out));
        let pages = Pages { format: state.format, bytes: bytemuck::cast_slice(bytes) };
        let group = a.heads / shape.kv_heads;
        for kv_head in 0..shape.kv_heads {
            let first = kv_head * group;
            CPU.run(Attend {
                q: &q[first * shape.key_dim..],
                q_stride: a.heads * shape.key_dim,
                out: &mut out[first * shape.value_dim..],
                out_stride: a.heads * shape.value_dim,
                tokens,
                heads: group,
                pages,
                shape,
                table,
                kv_head,
                position,
                end: position + tokens,
                sight: Sight { window: state.window, after: state.after, aligned: false },
                scale: a.scale,
                growth: None,
                softcap: a.softcap,
                slopes: a.slopes.map(|s| &s[first..first + group]),
                sinks: a.sinks.map(|s| &s[first..first + group]),
            });
        }
        Ok(())
    }
}

/// The options of an attention.
struct Attention<'a> {
    heads: usize,
    scale: f32,
    softcap: Option<f32>,
    slopes: Option<&'a [f32]>,
    sinks: Option<&'a [f32]>,
}

/// The place of a state's pages in memory.
fn pages(state: &State) -> Result<Range<usize>, Error> {
    let words = state.words().and_then(|words| usize::try_from(words).ok()).ok_or(UNCHECKED)?;
    Ok(state.first as usize..state.first as usize + words)
}

fn route(logits: &[f32], ids: &mut [i32], weights: &mut [f32], gating: Gating, normalise: bool, scale: f32) {
    let mut p = [0.0f32; rows::MAX_EXPERTS];
    let p = &mut p[..logits.len()];
    p.copy_from_slice(logits);
    match gating {
        Gating::Softmax => CPU.run(rows::Softmax { x: p }),
        Gating::Sigmoid => CPU.run(rows::Sigmoid { x: p }),
        Gating::SoftmaxOfTop => {}
    }
    rows::top_k(p, ids);
    for (weight, &id) in weights.iter_mut().zip(&*ids) {
        *weight = p[id as usize];
    }
    if gating == Gating::SoftmaxOfTop {
        CPU.run(rows::Softmax { x: weights });
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    if scale != 1.0 {
        weights.iter_mut().for_each(|w| *w *= scale);
    }
}

/// One expert's output for one token, in `work`.
fn expert<'w>(
    id: usize,
    [gate, up, down]: [Weight<'_>; 3],
    biases: [Option<&[f32]>; 3],
    act: rows::Gate,
    x: &[f32],
    work: &'w mut [u32],
) -> Option<&'w [f32]> {
    if id >= gate.tensor.experts as usize {
        return None;
    }
    let (hidden, cols) = (gate.rows(), down.rows());
    let bias = |n: usize, rows: usize| biases[n].and_then(|bias| bias.get(id * rows..(id + 1) * rows));
    let (values, work) = work.split_at_mut_checked(3 * hidden + cols)?;
    let values: &mut [f32] = bytemuck::cast_slice_mut(values);
    let (gates, rest) = values.split_at_mut(hidden);
    let (ups, rest) = rest.split_at_mut(hidden);
    let (activated, out) = rest.split_at_mut(hidden);
    product(gate.expert(id), bias(0, hidden), x, gates, work)?;
    product(up.expert(id), bias(1, hidden), x, ups, work)?;
    CPU.run(rows::Glu { f: act, gate: gates, up: ups, out: activated });
    product(down.expert(id), bias(2, cols), activated, out, work)?;
    Some(out)
}

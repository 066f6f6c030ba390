//! Computes the steps of products and of attention, on the slots of a tile.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use halite_kernels::activation::{Activation, PADDING, Quantise, Quantised, QuantisedMut, SUMS, padded};
use halite_kernels::attention::{Attend as AttendPage, AttendChunks, Merge, PageShape, Pages};
use halite_kernels::formats::{Format, Layout};
use halite_kernels::isa::{Cpu, Isa, WithIsa};
use halite_kernels::matmul::{MatMul, X, matmul, matmul_onto};
use halite_kernels::panel::PanelMut;
use halite_kernels::rows;

use super::chip::{Chip, Numerics};
use super::native;
use super::tile::{Form, Step};
use halite::backend::host::Attention;
use halite::error::{Error, Result};
use halite::program::Epilogue;
use halite_profiles::numerics::Dtype;
use twox_hash::XxHash3_128;

pub fn floats(bytes: &[u8]) -> &[f32] {
    bytemuck::try_cast_slice(bytes).unwrap_or(&[])
}

pub fn floats_mut<'a>(writes: &'a mut [&mut [u8]], i: usize) -> &'a mut [f32] {
    writes.get_mut(i).and_then(|out| bytemuck::try_cast_slice_mut(out).ok()).unwrap_or(&mut [])
}

pub fn unknown(step: &Step) -> Error {
    Error::Program(format!("unexpected step in this op: {step:?}"))
}

/// Kernels that compute the steps of products.
pub struct Machine {
    pub isa: Cpu,
    pub chip: Arc<Chip>,
    pub decoded: native::Decoded,
    /// Unfinished sums of products, by place in the matrix unit: one number each, or in exact numerics the sixteen that the contract
    /// has for sums of floats.
    pub sums: [Vec<f32>; 2],
    /// Sums of a row's elements so far, which the vector unit keeps from one piece of the row to the next.
    pub lanes: [f32; LANES],
    /// Weights in the chip's formats: tiles that share columns unpack the same ones, and so does the next step.
    pub unpacked: Unpacked,
}

/// Accumulators of a sum of floats: one for each position mod 16.
pub const LANES: usize = 16;

/// Adds products of floats to their accumulators.
struct Strided<'a> {
    x: &'a [f32],
    w: &'a [f32],
    k: usize,
    columns: usize,
    sums: &'a mut [[f32; LANES]],
}

impl WithIsa for Strided<'_> {
    type Out = ();
    fn call<I: Isa>(self, isa: I) {
        let k = self.k.max(1);
        for (x, sums) in self.x.chunks_exact(k).zip(self.sums.chunks_exact_mut(self.columns.max(1))) {
            for (w, sum) in self.w.chunks_exact(k).zip(sums) {
                let ((x, x_rest), (w, w_rest)) = (x.as_chunks(), w.as_chunks());
                let add = |acc, (x, w)| isa.fma(isa.load(w), isa.load(x), acc);
                isa.store(x.iter().zip(w).fold(isa.load(sum), add), sum);
                for ((x, w), sum) in x_rest.iter().zip(w_rest).zip(sum) {
                    *sum = isa.fma_one(*w, *x, *sum);
                }
            }
        }
    }
}

/// Adds the accumulators of each sum, by the contract's tree.
pub struct Reduce<'a> {
    pub sums: &'a [[f32; LANES]],
    pub out: &'a mut [f32],
}

impl WithIsa for Reduce<'_> {
    type Out = ();
    fn call<I: Isa>(self, isa: I) {
        self.out.iter_mut().zip(self.sums).for_each(|(out, sum)| *out = isa.sum(isa.load(sum)));
    }
}

/// Unpacked weights by what they were unpacked from.
#[derive(Default)]
pub struct Unpacked {
    found: HashMap<(u128, u32, Format, Dtype), Box<[u8]>>,
    bytes: usize,
}

impl Unpacked {
    /// Maximum bytes that are kept. Of a larger model, a part is unpacked in each step.
    const MOST_BYTES: usize = 1 << 30;

    /// Calls `unpack` with `to` if the result of these bytes is not known.
    fn get(
        &mut self,
        (k, from, dtype): (u32, Format, Dtype),
        bytes: &[u8],
        to: &mut [u8],
        unpack: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let key = (XxHash3_128::oneshot(bytes), k, from, dtype);
        match self.found.get(&key) {
            Some(found) if found.len() == to.len() => to.copy_from_slice(found),
            _ => {
                unpack(to)?;
                if self.bytes + to.len() <= Self::MOST_BYTES {
                    self.bytes += to.len();
                    self.found.insert(key, (&*to).into());
                }
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Rounds a unit's results to the vector unit's format.
    pub fn round(&self, x: &mut [f32]) {
        if self.chip.numerics == Numerics::Native {
            native::round(self.chip.vector_dtype(), self.chip.profile.rounding.elements, x);
        }
    }

    /// The steps of products: converting activations, unpacking weights, products, and the epilogue.
    pub fn product(
        &mut self,
        step: &Step,
        reads: &[&[u8]],
        writes: &mut [&mut [u8]],
        epilogue: Epilogue<()>,
    ) -> Result<()> {
        let rules = self.chip.profile.rounding.rules();
        match step {
            Step::Convert { k, to: Form::Quantised(activation), .. } => {
                let (k, x) = (*k as usize, floats(reads[0]));
                let out = quantised_mut(*activation, x.len() / k.max(1), k, writes[0]);
                self.isa.run(Quantise { to: *activation, k, x, out });
            }
            Step::Convert { k, to: Form::Chip(dtype), .. } => {
                native::encode(*dtype, rules, *k as usize, floats(reads[0]), writes[0])?;
            }
            Step::Unpack { k, rows, from, to: Form::Chip(dtype) } => {
                self.unpacked.get((*k, *from, *dtype), reads[0], writes[0], |to| {
                    let mut values = vec![0.0; *k as usize * *rows as usize];
                    from.dequantize(reads[0], &mut values).map_err(|e| Error::Program(e.to_string()))?;
                    native::encode(*dtype, rules, *k as usize, &values, to)
                })?;
            }
            Step::Product { k, last, .. } if k.start > 0 || !last => self.sum(step, reads, writes)?,
            Step::Product { rows, columns, k, x, w, .. } => {
                let (k, rows) = (k.len(), *rows as usize);
                let out = floats_mut(writes, 0);
                let (format, x) = match (w, x) {
                    (Form::Chip(w), Form::Chip(x)) => {
                        let (x, w) = ((*x, reads[0]), (*w, reads[1]));
                        return native::product(self.isa, &mut self.decoded, x, w, k, out);
                    }
                    (Form::File(w), Form::F32) => (*w, X::F32(floats(reads[0]))),
                    (Form::File(w), Form::Quantised(a)) => {
                        (*w, X::Quantised(quantised(*a, rows, k, reads[0])))
                    }
                    _ => return Err(unknown(step)),
                };
                let out = PanelMut::new(out, *columns as usize);
                matmul(self.isa, format, MatMul { w: reads[1], layout: Layout::Rows, k, x, out });
            }
            Step::Finish { columns, biases } => {
                let reads: Vec<&[f32]> = reads.iter().map(|bytes| floats(bytes)).collect();
                let (products, mut rest) = reads.split_at(biases.len());
                let mut products: Vec<Vec<f32>> = products.iter().map(|p| p.to_vec()).collect();
                for (product, _) in products.iter_mut().zip(biases).filter(|(_, has_bias)| **has_bias) {
                    let Some((bias, later)) = rest.split_first() else { return Err(unknown(step)) };
                    rest = later;
                    for row in product.chunks_exact_mut(*columns as usize) {
                        row.iter_mut().zip(*bias).for_each(|(y, b)| *y += b);
                    }
                }
                let out = floats_mut(writes, 0);
                match (epilogue, products.as_slice(), rest) {
                    (Epilogue::None, [product], []) => out.copy_from_slice(product),
                    (Epilogue::Glu(f), [gate, up], []) => self.isa.run(rows::Glu { f, gate, up, out }),
                    (Epilogue::Add(()), [product], [residual]) => {
                        self.isa.run(rows::Add { a: residual, b: product, out });
                    }
                    _ => return Err(unknown(step)),
                }
                self.round(out);
            }
            _ => return Err(unknown(step)),
        }
        Ok(())
    }

    /// Adds a chunk of a product to the sums of those before it.
    fn sum(&mut self, step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()> {
        let Step::Product { rows, columns, k, last, sums: place, x, w } = step else {
            return Err(unknown(step));
        };
        let (rows, columns, is_first) = (*rows as usize, *columns as usize, k.start == 0);
        let (k, count) = (k.len(), rows * columns);
        let Some(sums) = self.sums.get_mut(*place) else { return Err(unknown(step)) };
        let mut start = |lanes: usize| {
            if is_first {
                sums.clear();
                sums.resize(count * lanes, 0.0);
            }
        };
        match (w, x) {
            (Form::Chip(w), Form::Chip(x)) => {
                start(1);
                let mut chunk = vec![0.0; count];
                native::product(self.isa, &mut self.decoded, (*x, reads[0]), (*w, reads[1]), k, &mut chunk)?;
                sums.iter_mut().zip(chunk).for_each(|(sum, chunk)| *sum += chunk);
            }
            (Form::File(format), Form::Quantised(a)) => {
                start(1);
                let x = X::Quantised(quantised(*a, rows, k, reads[0]));
                let out = PanelMut::new(sums, columns);
                matmul_onto(*format, MatMul { w: reads[1], layout: Layout::Rows, k, x, out });
            }
            (Form::File(format), Form::F32) => {
                start(LANES);
                let mut w = vec![0.0; columns * k];
                format.dequantize(reads[1], &mut w).map_err(|e| Error::Program(e.to_string()))?;
                let (sums, _) = sums.as_chunks_mut();
                self.isa.run_inline(Strided { x: floats(reads[0]), w: &w, k, columns, sums });
                if *last {
                    let out = floats_mut(writes, 0);
                    self.isa.run_inline(Reduce { sums, out });
                    return Ok(());
                }
            }
            _ => return Err(unknown(step)),
        }
        if *last {
            floats_mut(writes, 0).copy_from_slice(sums);
        }
        Ok(())
    }

    /// The steps of attention.
    pub fn attend(
        &mut self,
        a: &Attention<'_>,
        step: &Step,
        reads: &[&[u8]],
        writes: &mut [&mut [u8]],
    ) -> Result<()> {
        // A page in the scratchpad has one head.
        let shape = PageShape { kv_heads: 1, ..a.shape };
        let found = shape.value_dim + 2;
        let out = floats_mut(writes, 0);
        match step {
            Step::Pages { rows, chunks: range } => {
                let heads = rows.heads as usize;
                let mut q = floats(reads[0]).to_vec();
                self.round_products(&mut q);
                let pages = Pages { bytes: reads[1], ..a.pages };
                // The scratchpad has the pages of the range alone.
                let table: Vec<u32> = (0..range.end).map(|chunk| chunk.saturating_sub(range.start)).collect();
                let mut by_chunk = vec![0.0; range.len() * heads * found];
                let outs = out.chunks_exact_mut(heads * range.len() * found);
                for (i, (out, q)) in outs.zip(q.chunks_exact(heads * shape.key_dim)).enumerate() {
                    let position = rows.position as usize + i;
                    let seen = visible(a, position, rows.end, range);
                    if seen.is_empty() {
                        continue;
                    }
                    let by_chunk = &mut by_chunk[..seen.len() * heads * found];
                    let attend = AttendPage {
                        q,
                        q_stride: q.len(),
                        out_stride: by_chunk.len(),
                        out: &mut *by_chunk,
                        tokens: 1,
                        heads,
                        pages,
                        shape,
                        table: &table,
                        kv_head: 0,
                        position,
                        end: rows.end as usize,
                        sight: a.sight,
                        scale: a.scale,
                        growth: a.growth,
                        softcap: a.softcap,
                        slopes: a.slopes.and_then(|s| s.get(rows.head as usize..)?.get(..heads)),
                        sinks: None,
                    };
                    self.isa.run(AttendChunks { attend, chunks: seen.clone() });
                    let first = range.start as usize;
                    for (chunk, results) in seen.zip(by_chunk.chunks_exact(heads * found)) {
                        let chunk = chunk - first;
                        for (head, result) in results.chunks_exact(found).enumerate() {
                            out[(head * range.len() + chunk) * found..][..found].copy_from_slice(result);
                        }
                    }
                }
            }
            Step::Merge { rows, chunks: range, fresh, last } => {
                let reads: Vec<&[f32]> = reads.iter().map(|bytes| floats(bytes)).collect();
                let (new, rest) = reads.split_first().ok_or_else(|| unknown(step))?;
                let (state, rest) =
                    if *fresh { (None, rest) } else { (rest.first(), rest.get(1..).unwrap_or(&[])) };
                let heads = rows.heads as usize;
                let stride = if *last { shape.value_dim } else { found };
                for (row, out) in out.chunks_exact_mut(stride).enumerate() {
                    let position = rows.position as usize + row / heads;
                    let seen = visible(a, position, rows.end, range);
                    let first = range.start as usize;
                    let old = state.map(|state| &state[row * found..][..found]);
                    let mut values = old.map_or(vec![0.0; found], <[f32]>::to_vec);
                    let (values, ends) = values.split_at_mut(shape.value_dim);
                    let [max, sum] = ends else { return Err(unknown(step)) };
                    let new = &new[row * range.len() * found..][..range.len() * found];
                    self.isa.run(Merge {
                        chunks: &new[(seen.start - first) * found..(seen.end - first) * found],
                        stride: found,
                        out: values,
                        max,
                        sum,
                        fresh: first <= a.sight.chunks(position, rows.end as usize).start,
                        last: *last,
                        sink: rest.first().map(|sinks| sinks[row % heads]),
                    });
                    out[..shape.value_dim].copy_from_slice(values);
                    if !last {
                        out[shape.value_dim..].copy_from_slice(&[*max, *sum]);
                    }
                }
                if *last {
                    self.round(out);
                }
            }
            _ => return Err(unknown(step)),
        }
        Ok(())
    }

    /// Rounds the operands of attention to the chip's product format.
    fn round_products(&self, x: &mut [f32]) {
        if self.chip.numerics == Numerics::Native {
            let (dtype, ..) = self.chip.formats(self.chip.attention_rate());
            native::round(dtype, self.chip.profile.rounding.elements, x);
        }
    }
}

/// Returns which of the chunks in a range the token at a position sees.
fn visible(a: &Attention<'_>, position: usize, end: u32, range: &Range<u32>) -> Range<usize> {
    let seen = a.sight.chunks(position, end as usize);
    let at = |chunk: usize| chunk.clamp(range.start as usize, range.end as usize);
    at(seen.start)..at(seen.end)
}

/// Reads quantised activations from a slot: codes, scales, sums.
fn quantised(to: Activation, rows: usize, k: usize, bytes: &[u8]) -> Quantised<'_> {
    let width = rows * padded(k);
    let (codes, rest) = bytes.split_at(width.min(bytes.len()));
    let (scales, sums) = rest.split_at((4 * width / to.block_len()).min(rest.len()));
    Quantised {
        k,
        codes: bytemuck::cast_slice(codes),
        scales: floats(scales),
        sums: bytemuck::try_cast_slice(sums).unwrap_or(&[]),
    }
}

/// The same, to write.
fn quantised_mut(to: Activation, rows: usize, k: usize, bytes: &mut [u8]) -> QuantisedMut<'_> {
    let width = rows * padded(k);
    let (codes, rest) = bytes.split_at_mut(width.min(bytes.len()));
    let (scales, sums) = rest.split_at_mut((4 * width / to.block_len()).min(rest.len()));
    let sums = &mut sums[..4 * width / PADDING * SUMS];
    QuantisedMut {
        codes: bytemuck::cast_slice_mut(codes),
        scales: bytemuck::try_cast_slice_mut(scales).unwrap_or(&mut []),
        sums: bytemuck::try_cast_slice_mut(sums).unwrap_or(&mut []),
    }
}

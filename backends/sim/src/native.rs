//! Matrix products in a chip's own number formats.
//!
//! Operands are rounded to the formats of the matrix unit's rate. [`halite_profiles::numerics`] defines block
//! formats and small floats. Integers have one scale per row, `largest magnitude / largest code` (absmax
//! quantisation, Dettmers et al. 2022). Sums are exact in an `int32` accumulator. An `fp32` accumulator adds
//! in the order of the numeric contract, because a profile does not state the chip's own order.

use halite_kernels::formats::{Format, Layout};
use halite_kernels::isa::Cpu;
use halite_kernels::matmul::{MatMul, X, matmul};
use halite_kernels::panel::PanelMut;

use super::tile::Form;
use halite::error::Result;
use halite_profiles::numerics::{self, Dtype, Element, Overflow, Rounding, Rules, Scale};

/// Rounds rows of `k` floats to codes of a format. The scale of a row of integers, or the scales of its
/// blocks, follow the row's codes.
///
/// # Errors
/// If the lengths of the slices do not match.
pub fn encode(to: Dtype, rules: Rules, k: usize, x: &[f32], out: &mut [u8]) -> Result<()> {
    let row_bytes = super::chip::form_bytes(Form::Chip(to), 1, k as u32) as usize;
    for (x, out) in x.chunks_exact(k.max(1)).zip(out.chunks_exact_mut(row_bytes.max(1))) {
        match to.format() {
            numerics::Format::Element(element @ Element::Fixed { .. }) => {
                let width = element.bits().div_ceil(8) as usize;
                let (codes, scale) = out.split_at_mut(k * width);
                let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let step = largest / element.max();
                scale.copy_from_slice(&step.to_le_bytes());
                for (code, x) in codes.chunks_exact_mut(width).zip(x) {
                    let x = if step > 0.0 { x / step } else { 0.0 };
                    put(code, element.encode(x, rules.rounding, Overflow::Saturate));
                }
            }
            numerics::Format::Element(element) => {
                let width = element.bits().div_ceil(8) as usize;
                for (code, x) in out.chunks_exact_mut(width).zip(x) {
                    put(code, encode_float(to, element, rules.rounding, *x));
                }
            }
            numerics::Format::Block(block) => {
                let (codes, scales) = out.split_at_mut(k);
                let mut found = vec![Scale::default(); k / block.len.max(1)];
                block.quantize(x, rules, &mut found, codes)?;
                for (out, scale) in scales.as_chunks_mut::<2>().0.iter_mut().zip(found) {
                    *out = [scale.exponent, scale.shifts];
                }
            }
        }
    }
    Ok(())
}

/// Converts a float to a code, with the host's instructions for formats that it has.
fn encode_float(to: Dtype, element: Element, rounding: Rounding, x: f32) -> u32 {
    match (to, rounding) {
        (Dtype::Fp32, _) => x.to_bits(),
        (Dtype::Bf16, Rounding::NearestEven) => half::bf16::from_f32(x).to_bits().into(),
        (Dtype::Fp16, Rounding::NearestEven) => half::f16::from_f32(x).to_bits().into(),
        _ => element.encode(x, rounding, Overflow::Saturate),
    }
}

fn put(out: &mut [u8], code: u32) {
    out.copy_from_slice(&code.to_le_bytes()[..out.len()]);
}

fn get(code: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    bytes[..code.len()].copy_from_slice(code);
    u32::from_le_bytes(bytes)
}

/// Converts codes from [`encode`] to values. Does not apply the scales of integers.
fn decode(from: Dtype, k: usize, bytes: &[u8], out: &mut Vec<f32>) -> Result<()> {
    out.clear();
    let row_bytes = super::chip::form_bytes(Form::Chip(from), 1, k as u32) as usize;
    let rows = bytes.chunks_exact(row_bytes.max(1));
    match from.format() {
        numerics::Format::Element(element) => {
            let width = element.bits().div_ceil(8) as usize;
            let table = if width == 1 { table(element) } else { Vec::new() };
            for row in rows {
                let codes = row[..k * width].chunks_exact(width).map(get);
                match from {
                    Dtype::Bf16 => out.extend(codes.map(|code| f32::from_bits(code << 16))),
                    Dtype::Fp16 => out.extend(codes.map(|code| half::f16::from_bits(code as u16).to_f32())),
                    Dtype::Fp32 => out.extend(codes.map(f32::from_bits)),
                    _ if width == 1 => out.extend(row[..k].iter().map(|&code| table[usize::from(code)])),
                    _ => out.extend(codes.map(|code| element.decode(code))),
                }
            }
        }
        numerics::Format::Block(block) => {
            let decoder = block.decoder();
            let mut scales = Vec::new();
            for row in rows {
                let (codes, bytes) = row.split_at(k);
                let scale = |s: &[u8; 2]| Scale { exponent: s[0], shifts: s[1] };
                scales.clear();
                scales.extend(bytes.as_chunks::<2>().0.iter().map(scale));
                let start = out.len();
                out.resize(start + k, 0.0);
                decoder.dequantize(&scales, codes, &mut out[start..])?;
            }
        }
    }
    Ok(())
}

fn table(element: Element) -> Vec<f32> {
    (0..256).map(|code| element.decode(code)).collect()
}

/// Rounds floats to values of a format.
pub fn round(to: Dtype, rounding: Rounding, x: &mut [f32]) {
    if let numerics::Format::Element(element @ Element::Float { .. }) = to.format()
        && to != Dtype::Fp32
    {
        for x in x {
            *x = element.decode(element.encode(*x, rounding, Overflow::Saturate));
        }
    }
}

/// Reusable memory for decoded operands.
#[derive(Debug, Default)]
pub struct Decoded {
    x: Vec<f32>,
    w: Vec<f32>,
}

/// Computes `out[row][column] = Σ x[row][i] w[column][i]` from codes of [`encode`].
///
/// # Errors
/// If the lengths of the slices do not match.
pub fn product(
    cpu: Cpu,
    memory: &mut Decoded,
    (x_dtype, x): (Dtype, &[u8]),
    (w_dtype, w): (Dtype, &[u8]),
    k: usize,
    out: &mut [f32],
) -> Result<()> {
    let rows = x.len() / (super::chip::form_bytes(Form::Chip(x_dtype), 1, k as u32) as usize).max(1);
    let columns = out.len() / rows.max(1);
    decode(x_dtype, k, x, &mut memory.x)?;
    decode(w_dtype, k, w, &mut memory.w)?;
    let scale = |dtype: Dtype, bytes: &[u8], row: usize| -> Option<f32> {
        let numerics::Format::Element(Element::Fixed { .. }) = dtype.format() else { return Some(1.0) };
        let row_bytes = super::chip::form_bytes(Form::Chip(dtype), 1, k as u32) as usize;
        let end = (row + 1) * row_bytes;
        Some(f32::from_le_bytes(*bytes.get(end - 4..end)?.first_chunk()?))
    };
    let is_fixed = |dtype: Dtype| matches!(dtype.format(), numerics::Format::Element(Element::Fixed { .. }));
    if !(is_fixed(x_dtype) && is_fixed(w_dtype)) {
        let panel = PanelMut::new(out, columns);
        let w: &[u8] = bytemuck::cast_slice(&memory.w);
        matmul(cpu, Format::F32, MatMul { w, layout: Layout::Rows, k, x: X::F32(&memory.x), out: panel });
    } else {
        // Sums of up to `EXACT` products of 8-bit codes are exact in f32 in any order. Add them up as
        // integers.
        for (row, out) in out.chunks_exact_mut(columns.max(1)).enumerate() {
            let x = &memory.x[row * k..][..k];
            for (column, out) in out.iter_mut().enumerate() {
                let w = &memory.w[column * k..][..k];
                let sum: i64 = x
                    .chunks(EXACT)
                    .zip(w.chunks(EXACT))
                    .map(|(x, w)| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>() as i64)
                    .sum();
                *out = sum as f32;
            }
        }
    }
    for (row, out) in out.chunks_exact_mut(columns.max(1)).enumerate() {
        let x_scale = scale(x_dtype, x, row).unwrap_or(f32::NAN);
        for (column, out) in out.iter_mut().enumerate() {
            *out *= x_scale * scale(w_dtype, w, column).unwrap_or(f32::NAN);
        }
    }
    Ok(())
}

/// Number of products whose sum is exact in f32: `EXACT * 127 * 127 < 2^24`.
const EXACT: usize = 1024;

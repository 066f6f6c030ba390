//! Quantised products without vector instructions: one kernel for all formats but Q8_0, which needs no unpacking. Each block
//! is unpacked to its normal form once for all tokens. Small, for microcontrollers and for CPUs that have nothing better.

use super::{CHUNK, Inputs, MatMul, XChunk};
use crate::formats::{Block, Bytes, Format, Kind, Layout, MAX_BLOCK_BYTES, Q8_0, Unpacked};
use crate::math::fma;
use crate::panel::PanelMut;

/// Blocks of a chunk, at most.
const BLOCKS: usize = CHUNK / 32;

/// Computes a product of rows of a quantised format, `onto` the sums that are in the output or from zero.
pub(super) fn quantised(format: Format, product: MatMul<'_, '_>, onto: bool) {
    let Kind::Quantised { activation, group, has_min } = format.kind() else { return };
    let Some(unpack) = format.unpacker() else { return };
    let (len, bytes) = (format.block_len(), format.block_bytes());
    let MatMul { w, layout, k, x, mut out } = product;
    let Some(x) = Inputs::new(x, k, len, activation, out.rows()) else { return };
    if x.tokens == 0 {
        return;
    }
    if format == Format::Q8_0 && layout == Layout::Rows {
        return q8_0(Q8_0::cast(w), &x, out, onto);
    }
    let row_blocks = k / len;
    let mut copy = [0; MAX_BLOCK_BYTES];
    let copy = &mut copy[..bytes];
    let mut blocks = [const { Unpacked::ZERO }; BLOCKS];
    for (row, row_bytes) in w.chunks_exact(row_blocks * bytes).enumerate().take(out.cols()) {
        for (c, chunk) in row_bytes.chunks(CHUNK / len * bytes).enumerate() {
            let mut count = 0;
            for ((n, block), bytes) in blocks.iter_mut().enumerate().zip(chunk.chunks_exact(bytes)) {
                match layout {
                    Layout::Rows => unpack(bytes, block),
                    Layout::Interleaved => {
                        let _ = format.copy_block(layout, w, row_blocks, row, c * (CHUNK / len) + n, copy);
                        unpack(copy, block);
                    }
                }
                count += 1;
            }
            for t in 0..x.tokens {
                let Some(out) = out.row(t).get_mut(row) else { continue };
                let x = x.chunk(t, c);
                let mut acc = if c == 0 && !onto { 0.0 } else { *out };
                for (n, block) in blocks[..count].iter().enumerate() {
                    acc = add(block, &x, n * len..(n + 1) * len, group, has_min, acc);
                }
                *out = acc;
            }
        }
    }
}

/// A product of rows of Q8_0: their codes need no unpacking.
fn q8_0(w: &[Q8_0], x: &Inputs<'_>, mut out: PanelMut<'_>, onto: bool) {
    for (row, blocks) in w.chunks_exact(x.k / Q8_0::LEN).enumerate().take(out.cols()) {
        for t in 0..x.tokens {
            let codes = x.codes.get(t * x.chunks..).unwrap_or(&[]).as_flattened().as_flattened();
            let scales = x.scales.get(t * x.chunks * x.chunk_scales..).unwrap_or(&[]);
            let Some(out) = out.row(t).get_mut(row) else { continue };
            let mut acc = if onto { *out } else { 0.0 };
            for ((block, codes), scale) in
                blocks.iter().zip(codes.as_chunks::<16>().0.as_chunks::<2>().0).zip(scales)
            {
                let (d, w) = block.parts();
                let sum = dot(w[0], &codes[0]) + dot(w[1], &codes[1]);
                acc = fma(sum as f32, d * scale, acc);
            }
            *out = acc;
        }
    }
}

/// Adds the product of a block with the activations at some places of a chunk to `acc`.
#[inline]
fn add(
    block: &Unpacked,
    x: &XChunk<'_>,
    places: core::ops::Range<usize>,
    group: usize,
    has_min: bool,
    mut acc: f32,
) -> f32 {
    let first = places.start / 16;
    let codes = block.codes.as_chunks::<16>().0;
    let xs = x.codes.as_flattened().as_chunks::<16>().0.get(first..).unwrap_or(&[]);
    let sums = x.sums.get(first..).unwrap_or(&[]);
    let mut sixteens = codes.iter().zip(xs).zip(sums).zip(block.sub.iter().zip(&block.mins));
    let mut at = places.start;
    for (d, m) in block.d.iter().zip(&block.m) {
        let (mut sum, mut min, next) = (0, 0, at + group);
        while at < next
            && let Some((((w, x), x_sum), (&sub, &factor))) = sixteens.next()
        {
            sum += i32::from(sub) * dot(w, x);
            min += i32::from(factor) * x_sum;
            at += 16;
        }
        let scale = if group == CHUNK { x.scale } else { x.scales[(next - group) / 32] };
        acc = fma(sum as f32, d * scale, acc);
        if has_min {
            acc = fma(min as f32, m * scale, acc);
        }
        if at >= places.end {
            break;
        }
    }
    acc
}

/// The dot product of sixteen codes with sixteen others.
#[inline(always)]
#[cfg(not(all(feature = "dsp", target_arch = "arm", target_os = "none")))]
fn dot(w: &[i8; 16], x: &[i8; 16]) -> i32 {
    let mut sum = 0;
    // By fours, so that compilers for size unroll that much.
    for (w, x) in w.as_chunks::<4>().0.iter().zip(x.as_chunks::<4>().0) {
        let product = |i: usize| i32::from(w[i]) * i32::from(x[i]);
        sum += product(0) + product(1) + product(2) + product(3);
    }
    sum
}
#[cfg(all(feature = "dsp", target_arch = "arm", target_os = "none"))]
use crate::isa::cortex_m::dot;

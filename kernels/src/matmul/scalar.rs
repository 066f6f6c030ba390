//! Quantised products without vector instructions: one kernel for all formats. Each block is unpacked to its normal
//! form once for all tokens. Small, for microcontrollers and for CPUs that have nothing better.

use super::{CHUNK, Inputs, MatMul, XChunk};
use crate::formats::{Format, Kind, MAX_BLOCK_BYTES, Unpacked};
use crate::math::fma;

/// Computes a product of rows of a quantised format.
pub(super) fn quantised(format: Format, product: MatMul<'_, '_>) {
    let Kind::Quantised { activation, group, has_min } = format.kind() else { return };
    let (len, bytes) = (format.block_len(), format.block_bytes());
    let MatMul { w, layout, k, x, mut out } = product;
    let Some(x) = Inputs::new(x, k, len, activation, out.rows()) else { return };
    let row_blocks = k / len;
    let mut copy = [0; MAX_BLOCK_BYTES];
    let copy = &mut copy[..bytes];
    let mut block = Unpacked::ZERO;
    for row in 0..(w.len() / (row_blocks * bytes)).min(out.cols()) {
        for n in 0..row_blocks {
            if format.copy_block(layout, w, row_blocks, row, n, copy).is_none()
                || format.unpack(copy, &mut block).is_err()
            {
                return;
            }
            for t in 0..x.tokens {
                let x = x.chunk(t, n * len / CHUNK);
                let Some(out) = out.row(t).get_mut(row) else { continue };
                let acc = if n == 0 { 0.0 } else { *out };
                *out = add(&block, &x, n * len % CHUNK..(n * len % CHUNK + len), group, has_min, acc);
            }
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
    let codes = x.codes.as_flattened().as_chunks::<16>().0;
    let first = places.start / 16;
    for (g, start) in places.step_by(group).enumerate() {
        let scale = if group == CHUNK { x.scale } else { x.scales[start / 32] };
        let sixteens = start / 16..(start + group) / 16;
        let (mut sum, mut min) = (0, 0);
        for s in sixteens {
            let codes = block.codes.as_chunks::<16>().0[s - first].iter().zip(&codes[s]);
            let dot: i32 = codes.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
            sum += i32::from(block.sub[s - first]) * dot;
            min += i32::from(block.mins[s - first]) * x.sums[s];
        }
        acc = fma(sum as f32, block.d[g] * scale, acc);
        if has_min {
            acc = fma(min as f32, block.m[g] * scale, acc);
        }
    }
    acc
}

//! Norms of rows that a tile reads in pieces: the stages that [`super::lower`] has for rows that do not fit the scratchpad.

use halite_kernels::math::fma;

use super::machine::{LANES, Machine, Reduce, floats, floats_mut, unknown};
use super::tile::Step;
use halite::backend::host::HostStep;
use halite::error::Result;
use halite::program::{NormKind, Op};

/// Computes a command of a stage: sums of elements, if the mean is subtracted; sums of squares; results.
///
/// # Errors
/// [`halite::Error::Program`] for another step, or another op.
pub fn norm(
    machine: &mut Machine,
    step: &HostStep<'_>,
    command: &Step,
    reads: &[&[u8]],
    writes: &mut [&mut [u8]],
) -> Result<()> {
    let Op::Norm { kind, eps, group, weight, bias, add, .. } = step.op else { return Err(unknown(command)) };
    let Step::Units { stage, first, count } = *command else { return Err(unknown(command)) };
    let (n, centred) = (*group as f32, *kind == NormKind::Layer);
    let is_last = stage == 1 + u32::from(centred);
    let mut reads = reads.iter().map(|bytes| floats(bytes));
    let mut read = |is_read: bool| if is_read { reads.next() } else { None };
    let mut x = read(true).unwrap_or(&[]).to_vec();
    if let Some(added) = read(stage == 0 && add.is_some()) {
        x.iter_mut().zip(added).for_each(|(x, added)| *x += added);
        let sum = floats_mut(writes, 1);
        sum.copy_from_slice(&x);
        machine.round(sum);
    }
    let (elements, squares) = (read(centred && stage > 0), read(is_last));
    let (weight, bias) = (read(is_last && weight.is_some()), read(is_last && bias.is_some()));
    let piece = (x.len() / (count as usize).max(1)).max(1);
    let pieces = (*group / piece as u32).max(1);
    let isa = machine.isa;
    let sum = |all: Option<&[f32]>, unit: usize| {
        let mut sum = [0.0];
        let lanes = all.and_then(|all| all.as_chunks().0.get(unit..=unit)).unwrap_or(&[]);
        isa.run_inline(Reduce { sums: lanes, out: &mut sum });
        sum[0]
    };
    let out = floats_mut(writes, 0);
    for (unit, x) in x.chunks_exact(piece).enumerate() {
        let mean = sum(elements, unit) / n;
        if is_last {
            let scale = 1.0 / (sum(squares, unit) / n + eps).sqrt();
            let at = |all: Option<&[f32]>, i: usize| all.and_then(|all| all.get(i).copied());
            for (i, x) in (unit * piece..).zip(x) {
                let scaled = (x - mean) * scale;
                out[i] = match (at(weight, i), at(bias, i)) {
                    (None, None) => scaled,
                    (Some(weight), None) => scaled * weight,
                    (None, Some(bias)) => scaled + bias,
                    (Some(weight), Some(bias)) => fma(scaled, weight, bias),
                };
            }
        } else {
            let lanes = &mut machine.lanes;
            if (first + unit as u32).is_multiple_of(pieces) {
                lanes.fill(0.0);
            }
            for run in x.chunks(LANES) {
                for (lane, x) in lanes.iter_mut().zip(run) {
                    *lane = if centred && stage == 0 { *lane + x } else { fma(x - mean, x - mean, *lane) };
                }
            }
            out[unit * LANES..][..LANES].copy_from_slice(lanes);
        }
    }
    if is_last {
        machine.round(out);
    }
    Ok(())
}

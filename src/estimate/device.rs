//! The time of a step on a device that is not simulated: the sum of its kernels, by the formulas that were fitted to measured
//! ones (`driver = "gpu"`), or by the rates of this machine's (`driver = "cpu"`).

use super::host;
use super::kernel::{self, Formats, Kernel, Machine};
use crate::backend::sim::{OpTime, Queue, Report};
use crate::cost::{self, Extent};
use crate::numerics::Dtype;
use crate::passes;
use crate::profile::Profile;
use crate::program::{Op, Program};
use crate::{Error, Result};

/// What the ops of a step take: of each sequence the tokens from a first position on, with an output for each sequence.
///
/// # Errors
/// [`Error::Argument`] for what was never measured: formats without a calibration; on a CPU, several sequences.
pub fn time(
    profile: &Profile,
    program: &Program,
    spans: &[(u32, u32)],
    threads: Option<usize>,
) -> Result<Report> {
    let mut report = Report::default();
    for (_, op) in program.greedy_ops() {
        let time = match threads {
            Some(threads) => on_host(profile, program, op, spans, threads)?,
            None => on_gpu(profile, program, op, spans)?,
        };
        if time.seconds > 0.0 {
            report.add(&crate::backend::sim::name(program, op), time);
        }
    }
    Ok(report)
}

/// Cost of an op over all sequences.
fn cost_of(program: &Program, op: &Op, spans: &[(u32, u32)]) -> cost::Cost {
    let extent = |&(start, tokens): &(u32, u32)| Extent { start, tokens, outputs: 1 };
    match op {
        Op::Attend { .. } => spans.iter().map(|span| cost::op(program, op, extent(span))).sum(),
        _ => {
            let tokens = spans.iter().map(|(_, len)| len).sum();
            cost::op(program, op, Extent { start: 0, tokens, outputs: spans.len() as u32 })
        }
    }
}

fn on_host(
    profile: &Profile,
    program: &Program,
    op: &Op,
    spans: &[(u32, u32)],
    threads: usize,
) -> Result<OpTime> {
    let [(start, tokens)] = *spans else {
        return Err(Error::argument("batch", "1, as kernels of a CPU were measured", spans.len()));
    };
    let rates = host::rates(profile, threads)?;
    let seconds = host::op_seconds(rates, program, op, Extent { start, tokens, outputs: 1 })?;
    let cost = cost_of(program, op, spans);
    Ok(OpTime {
        seconds,
        read_bytes: cost.memory_bytes() as f64,
        matrix_ops: cost.ops() as f64,
        ..OpTime::default()
    })
}

const BF16: Formats = Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };

fn on_gpu(profile: &Profile, program: &Program, op: &Op, spans: &[(u32, u32)]) -> Result<OpTime> {
    let cost = cost_of(program, op, spans);
    if cost == cost::Cost::default() {
        return Ok(OpTime::default());
    }
    let machine = Machine::new(profile, BF16)?;
    let tokens: u32 = spans.iter().map(|(_, len)| len).sum();
    let product = |m: u64, n: u64, k: u64| kernel::estimate(profile, BF16, Kernel::MatMul { m, n, k });
    // A kernel of one result is the overhead of any.
    let overhead_s = product(1, 1, 1)?.seconds;
    let stored = cost.weight_bytes as f64 + cost.kv_bytes as f64;
    let bytes = stored + cost.activation_bytes as f64 * Dtype::Bf16.bits() / Dtype::Fp32.bits();
    let seconds = match op {
        Op::MatMul { x, parts, .. } => {
            if let Some(part) = parts.iter().find(|p| program.tensor(p.weight).format.name() != "BF16") {
                let format = program.tensor(part.weight).format.name();
                let found = format!("{format}, which no product was measured in");
                return Err(Error::argument("weight format", "BF16 for chips with driver = \"gpu\"", found));
            }
            let n = parts.iter().map(|p| passes::rows(program.tensor(p.weight).rows, 0, 0)).sum();
            let m = passes::rows(program.tensor(*x).rows, tokens, spans.len() as u32);
            product(m, n, program.tensor(*x).cols.into())?.seconds
        }
        Op::Attend { state, heads, .. } if spans.iter().all(|(_, len)| *len == 1) => {
            let Some(state) = program.states.get(state.0 as usize) else { return Ok(OpTime::default()) };
            let longest = spans.iter().map(|(start, _)| start + 1).max().unwrap_or(1);
            let kernel = Kernel::Attention {
                batch: spans.len() as u64,
                heads: (*heads).into(),
                kv_heads: state.kv_heads.into(),
                head_dim: state.key_dim.into(),
                kv_len: longest.min(state.window.unwrap_or(u32::MAX)).into(),
            };
            kernel::estimate(profile, BF16, kernel)?.seconds
        }
        Op::Experts { .. } => {
            let expected = "a model without experts, for chips with driver = \"gpu\"";
            return Err(Error::argument("op", expected, "Experts, of which no kernel was measured"));
        }
        // A prompt's attention multiplies as products do, and the rest moves bytes.
        _ => {
            let fit = profile.calibration.as_ref().and_then(|c| c.matmul.first());
            let fraction = |value: Option<f64>| value.unwrap_or(1.0);
            let compute = fraction(fit.map(|f| f.compute_fraction.value)) * machine.ops_per_s;
            let memory = fraction(fit.map(|f| f.memory_fraction.value)) * machine.bytes_per_s;
            overhead_s + (cost.ops() as f64 / compute).max(bytes / memory)
        }
    };
    let mut busy_s = [0.0; 4];
    busy_s[Queue::Matrix as usize] = cost.ops() as f64 / machine.ops_per_s;
    Ok(OpTime {
        seconds,
        launch_s: overhead_s,
        busy_s,
        device_s: bytes / machine.bytes_per_s,
        read_bytes: bytes,
        matrix_ops: cost.ops() as f64,
        ..OpTime::default()
    })
}

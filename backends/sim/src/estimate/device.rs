//! The time of a step on a device that is not simulated: the sum of its kernels, by formulas fitted to
//! measurements (`driver = "gpu"`) or by this machine's rates (`driver = "cpu"`).

use halite_kernels::formats::Format;

use super::host;
use super::kernel::{self, Formats, Kernel, Machine, Stored};
use crate::{OpTime, Queue, Report};
use halite::cost::{self, Extent};
use halite::passes;
use halite::program::{Op, Part, Program};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::Profile;

/// Returns the times of the ops of a step, with one output per sequence. `spans` has the first position and
/// number of tokens of each sequence.
///
/// # Errors
/// [`Error::Argument`] for kernels without measurements: on a GPU, mixtures of experts, and all kernels
/// without a calibration in bf16, which is used for other formats too (see [`unmeasured`]); on a CPU, several
/// sequences.
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
            report.add(&crate::name(program, op), time);
        }
    }
    Ok(report)
}

/// Cost of an op over all sequences.
fn cost_of(program: &Program, op: &Op, spans: &[(u32, u32)]) -> cost::Cost {
    cost::op(program, op, &extents(spans))
}

fn extents(spans: &[(u32, u32)]) -> Vec<Extent> {
    spans.iter().map(|&(start, tokens)| Extent { start, tokens, outputs: 1 }).collect()
}

fn on_host(
    profile: &Profile,
    program: &Program,
    op: &Op,
    spans: &[(u32, u32)],
    threads: usize,
) -> Result<OpTime> {
    if spans.len() != 1 {
        return Err(Error::argument("batch", "1, as kernels of a CPU were measured", spans.len()));
    }
    let rates = host::rates(profile, threads)?;
    let seconds = host::op_seconds(rates, program, op, &extents(spans))?;
    let cost = cost_of(program, op, spans);
    Ok(OpTime {
        seconds,
        read_bytes: cost.memory_bytes() as f64,
        matrix_ops: cost.ops() as f64,
        ..OpTime::default()
    })
}

/// Returns the formats of a program that were not measured on a GPU, one line each. The error of products is
/// then unknown.
pub fn unmeasured(program: &Program) -> Vec<String> {
    let products = program.greedy_ops().flat_map(|(_, op)| match op {
        Op::MatMul { parts, .. } => &parts[..],
        _ => &[],
    });
    let weights = products.map(|part| program.tensor(part.weight).format);
    let caches = program.states.iter().map(|state| state.format).filter(|f| stored_bits(*f) != 16.0);
    let mut lines = Vec::new();
    for (what, kernels, formats) in [
        ("weights", "products", weights.filter(|f| *f != Format::BF16).collect::<Vec<_>>()),
        ("KV cache", "attention", caches.collect()),
    ] {
        let mut names: Vec<&str> = formats.iter().map(|format| format.name()).collect();
        names.sort_unstable();
        names.dedup();
        if !names.is_empty() {
            lines.push(format!(
                "{what} of {}: {kernels} as measured in bf16, with their own bytes; the time of unpacking is not included",
                names.join(", ")
            ));
        }
    }
    lines
}

/// Returns the bits per value, scales included.
fn stored_bits(format: Format) -> f64 {
    8.0 * format.block_bytes() as f64 / format.block_len() as f64
}

const BF16: Formats = Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };

fn on_gpu(profile: &Profile, program: &Program, op: &Op, spans: &[(u32, u32)]) -> Result<OpTime> {
    let cost = cost_of(program, op, spans);
    if cost == cost::Cost::default() {
        return Ok(OpTime::default());
    }
    let machine = Machine::new(profile, BF16)?;
    let tokens: u32 = spans.iter().map(|(_, len)| len).sum();
    // The time of a kernel with one result is the overhead.
    let overhead_s = kernel::estimate(profile, BF16, Kernel::MatMul { m: 1, n: 1, k: 1 })?.seconds;
    let stored = cost.weight_bytes as f64 + cost.kv_bytes as f64;
    let bytes = stored + cost.activation_bytes as f64 * Dtype::Bf16.bits() / Dtype::Fp32.bits();
    let seconds = match op {
        Op::MatMul { x, parts, .. } => {
            let rows = |p: &Part| passes::rows(program.tensor(p.weight).rows, 0, 0);
            let n: u64 = parts.iter().map(rows).sum();
            let bits = parts.iter().map(|p| rows(p) as f64 * stored_bits(program.tensor(p.weight).format));
            let bits = bits.sum::<f64>() / n.max(1) as f64;
            let m = passes::rows(program.tensor(*x).rows, tokens, spans.len() as u32);
            let kernel = Kernel::MatMul { m, n, k: program.tensor(*x).cols.into() };
            kernel::estimate_stored(profile, BF16, Stored { weight_bits: bits, ..Stored::of(BF16) }, kernel)?
                .seconds
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
            let stored = Stored { weight_bits: stored_bits(state.format), ..Stored::of(BF16) };
            kernel::estimate_stored(profile, BF16, stored, kernel)?.seconds
        }
        Op::Experts { .. } => {
            let expected = "a model without experts, for chips with driver = \"gpu\"";
            return Err(Error::argument("op", expected, "Experts, of which no kernel was measured"));
        }
        // Prefill attention counts as products; the other ops move bytes.
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

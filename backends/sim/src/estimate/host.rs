//! The time of a step on the backend `cpu`, from the rates of its kernels in a profile.

use halite_kernels::formats::Format;

use halite::cost::{self, Extent};
use halite::program::{Op, Program};
use halite::{Error, Result};
use halite_profiles::profile::{HostRates, Profile};

/// Returns the rates of a profile for `threads` threads.
///
/// # Errors
/// `Error::Argument` if the profile has none for them.
pub fn rates(profile: &Profile, threads: usize) -> Result<&HostRates> {
    let all = profile.calibration.as_ref().map_or(&[][..], |c| &c.host);
    all.iter().find(|r| r.threads.value == threads as f64).ok_or_else(|| {
        let has: Vec<_> = all.iter().map(|r| r.threads.value).collect();
        let found = format!("profile {} with those for {has:?} threads", profile.name);
        Error::argument(
            "profile",
            format!("[[calibration.host]] for {threads} threads (`halite calibrate`)"),
            found,
        )
    })
}

/// Returns the seconds of a step of these sequences: the sum over its ops, which run one after the other.
///
/// # Errors
/// `Error::Argument` if a weight's format was not measured.
pub fn step_seconds(rates: &HostRates, program: &Program, sequences: &[Extent]) -> Result<f64> {
    program.greedy_ops().map(|(_, op)| op_seconds(rates, program, op, sequences)).sum()
}

/// Returns the seconds of an op: its bytes or its operations, whichever take longer, and its barrier.
///
/// # Errors
/// As [`step_seconds`].
pub fn op_seconds(rates: &HostRates, program: &Program, op: &Op, sequences: &[Extent]) -> Result<f64> {
    let cost = cost::op(program, op, sequences);
    if cost == cost::Cost::default() {
        return Ok(0.0);
    }
    let weight = match op {
        Op::MatMul { parts, .. } => parts.first().map(|part| part.weight),
        Op::Experts { gate, .. } => Some(*gate),
        _ => None,
    };
    let seconds = if let Some(weight) = weight {
        let product = product(rates, program.tensor(weight).format)?;
        let bytes_s = cost.weight_bytes as f64 / product.weight_bytes_per_s.value;
        bytes_s.max(cost.ops() as f64 / product.product_ops_per_s.value) + rates.op_ns.value * 1e-9
    } else if let Op::Attend { .. } = op {
        let bytes_s = cost.kv_bytes as f64 / rates.attend_bytes_per_s.value;
        bytes_s.max(cost.ops() as f64 / rates.attend_ops_per_s.value) + rates.op_ns.value * 1e-9
    } else {
        // Threads wake up only for much work; then the bytes count.
        (cost.activation_bytes + cost.weight_bytes) as f64 / rates.row_bytes_per_s.value
    };
    Ok(seconds)
}

fn product(rates: &HostRates, format: Format) -> Result<&halite_profiles::profile::HostProduct> {
    rates.product.iter().find(|p| p.format == format.name()).ok_or_else(|| {
        let has: Vec<_> = rates.product.iter().map(|p| p.format.as_str()).collect();
        Error::argument(
            "profile",
            format!("a rate for {} (`halite calibrate --formats`)", format.name()),
            has.join(", "),
        )
    })
}

//! The time of a step on the backend `cpu`: from the rates of its kernels in a profile, or from stated
//! fractions of the profile's peaks.

use halite_kernels::formats::{Format, Kind};

use super::measure::Rates;
use super::work::Work;
use halite::cost::Extent;
use halite::program::{Op, Program};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{HostRates, Profile};

/// Returns the measured rates of a profile for `threads` threads.
///
/// # Errors
/// `Error::Argument` if the profile has none for them.
pub fn rates(profile: &Profile, threads: usize) -> Result<Rates> {
    let all = profile.calibration.as_ref().map_or(&[][..], |c| &c.host);
    let found = all.iter().find(|r| r.threads.value == threads as f64);
    found.map(Rates::from).ok_or_else(|| {
        let has: Vec<_> = all.iter().map(|r| r.threads.value).collect();
        let found = format!("profile {} with those for {has:?} threads", profile.name);
        Error::argument(
            "profile",
            format!("[[calibration.host]] for {threads} threads (`halite calibrate`)"),
            found,
        )
    })
}

impl From<&HostRates> for Rates {
    fn from(rates: &HostRates) -> Rates {
        let product = |p: &halite_profiles::profile::HostProduct| {
            Some((Format::from_name(&p.format)?, p.weight_bytes_per_s.value, p.product_ops_per_s.value))
        };
        Rates {
            threads: rates.threads.value as usize,
            isa: "",
            op_s: rates.op_ns.value * 1e-9,
            integer_ops_per_s: rates.integer_ops_per_s.value,
            float_ops_per_s: rates.float_ops_per_s.value,
            row_bytes_per_s: rates.row_bytes_per_s.value,
            attend_bytes_per_s: rates.attend_bytes_per_s.value,
            attend_ops_per_s: rates.attend_ops_per_s.value,
            levels: rates
                .level
                .iter()
                .map(|l| (l.read_bytes_per_s.value, l.copy_bytes_per_s.value))
                .collect(),
            products: rates.product.iter().filter_map(product).collect(),
        }
    }
}

/// Fractions of peaks of a machine that was not measured. Two that were, each on one thread with AVX-512,
/// reached 53 to 82 % of their bandwidth in products of one token, and 27 to 44 % of their arithmetic in
/// products of 512 tokens; the second alone, about 30 % of both in attention and 50 % of the bandwidth in row
/// ops.
pub const MEMORY_FRACTION: f64 = 0.6;
/// Fraction of the peak of dot products.
pub const COMPUTE_FRACTION: f64 = 0.35;
/// Fraction of both peaks in attention.
pub const ATTEND_FRACTION: f64 = 0.3;
/// Fraction of the bandwidth in row ops.
pub const ROW_FRACTION: f64 = 0.5;

/// Returns the rates of a machine that was not measured: fractions of its peaks. Quantised weights are
/// multiplied as 8-bit integers, and plain ones as 32-bit floats.
pub fn assumed(profile: &Profile, threads: usize) -> Rates {
    let share = (threads as f64 / profile.tiles()).min(1.0);
    let peak = |dtype: Dtype| profile.vector.rate.iter().find(|r| r.dtype == dtype);
    let first = profile.vector.rate.first();
    let ops_per_s = |dtypes: &[Dtype]| {
        let rate = dtypes.iter().find_map(|d| peak(*d)).or(first);
        rate.map_or(f64::INFINITY, |rate| share * profile.vector_ops_per_s(rate))
    };
    let float_ops_per_s = ops_per_s(&[Dtype::Fp32]);
    let integer_ops_per_s = ops_per_s(&[Dtype::Int8, Dtype::Fp32]);
    let bytes_per_s = profile.memory.last().map_or(f64::INFINITY, |m| profile.read_bytes_per_s(m));
    let product = |&format: &Format| {
        let peak = match format.kind() {
            Kind::Quantised { .. } => integer_ops_per_s,
            Kind::Float => float_ops_per_s,
        };
        (format, MEMORY_FRACTION * bytes_per_s, COMPUTE_FRACTION * peak)
    };
    Rates {
        threads,
        isa: "",
        op_s: profile.launch.kernel_ns.value * 1e-9,
        integer_ops_per_s,
        float_ops_per_s,
        row_bytes_per_s: ROW_FRACTION * bytes_per_s,
        attend_bytes_per_s: ATTEND_FRACTION * bytes_per_s,
        attend_ops_per_s: ATTEND_FRACTION * float_ops_per_s,
        levels: Vec::new(),
        products: Format::ALL.iter().map(product).collect(),
    }
}

/// Returns the rates of products whose weights are nearest to a format: quantised or plain like it, and then
/// by bits.
pub fn nearest(rates: &Rates, format: Format) -> Option<(Format, f64, f64)> {
    let bits = |format: Format| (format.block_bytes() as f64 / format.block_len() as f64).ln();
    let is_plain = |format: Format| format.kind() == Kind::Float;
    let distance = |other: Format| {
        (other != format, is_plain(other) != is_plain(format), (bits(other) - bits(format)).abs())
    };
    let order = |a: &&(Format, f64, f64), b: &&(Format, f64, f64)| {
        let (a, b) = (distance(a.0), distance(b.0));
        (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2))
    };
    rates.products.iter().min_by(order).copied()
}

/// Returns the seconds of a step of these sequences: the sum over its ops, which run one after the other.
///
/// # Errors
/// `Error::Argument` if a weight's format was not measured.
pub fn step_seconds(rates: &Rates, program: &Program, sequences: &[Extent]) -> Result<f64> {
    program.greedy_ops().map(|(_, op)| op_seconds(rates, program, op, sequences)).sum()
}

/// Returns the format of the weights that an op multiplies.
pub fn multiplied(program: &Program, op: &Op) -> Option<Format> {
    let weight = match op {
        Op::MatMul { parts, .. } => parts.first()?.weight,
        Op::Experts { gate: weight, .. } | Op::BlockMatMul { weight, .. } => *weight,
        _ => return None,
    };
    Some(program.tensor(weight).format)
}

/// Returns the seconds of an op: its bytes or its operations, whichever take longer, and its barrier. All
/// sequences of a step share the bytes of weights.
///
/// # Errors
/// As [`step_seconds`].
pub fn op_seconds(rates: &Rates, program: &Program, op: &Op, sequences: &[Extent]) -> Result<f64> {
    Work::of(program, op, sequences).map_or(Ok(0.0), |work| work_seconds(rates, &work))
}

/// As [`op_seconds`], of work that was counted.
///
/// # Errors
/// As [`step_seconds`].
pub fn work_seconds(rates: &Rates, work: &Work) -> Result<f64> {
    let cost = &work.cost;
    let seconds = if let Some(format) = work.multiplied {
        let found = rates.products.iter().find(|(f, ..)| *f == format);
        let &(_, bytes_per_s, ops_per_s) = found.ok_or_else(|| {
            let has: Vec<_> = rates.products.iter().map(|(f, ..)| f.name()).collect();
            let expected = format!("a rate for {} (`halite calibrate --formats`)", format.name());
            Error::argument("profile", expected, has.join(", "))
        })?;
        let bytes_s = work.weight_bytes / bytes_per_s;
        bytes_s.max(cost.ops() as f64 / ops_per_s) + rates.op_s
    } else if work.attends {
        let bytes_s = cost.kv_bytes as f64 / rates.attend_bytes_per_s;
        bytes_s.max(cost.ops() as f64 / rates.attend_ops_per_s) + rates.op_s
    } else {
        // Threads wake up only for much work; then the bytes count.
        (cost.activation_bytes + cost.weight_bytes) as f64 / rates.row_bytes_per_s
    };
    Ok(seconds)
}

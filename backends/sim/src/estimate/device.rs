//! The time of a step on a device that is not simulated: the sum of its kernels (`driver = "gpu"`) or of the
//! ops of the backend `cpu` (`driver = "cpu"`), measured or assumed.

use std::collections::BTreeSet;

use halite_kernels::formats::Format;

use super::host;
use super::kernel::{self, Estimate, Formats, Kernel, Machine, Source, Stored};
use super::measure::Rates;
use crate::chip::stored_as;
use crate::shape;
use crate::{OpTime, Queue, Report};
use halite::cost::{self, Extent};
use halite::passes;
use halite::program::{Op, Part, Program};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Driver, Profile};

/// First positions and numbers of tokens of the sequences of a step.
type Spans<'a> = &'a [(u32, u32)];

/// A device.
#[derive(Debug)]
pub struct Device<'a> {
    profile: &'a Profile,
    products: Option<Dtype>,
    /// Rates of a CPU, and whether they were measured.
    host: Option<(Rates, bool)>,
}

/// The time of an op. Of kernels that multiply, also the formats of their stored operands, and what their time
/// rests on.
#[derive(Debug, Default)]
struct Timed {
    time: OpTime,
    rests_on: Vec<(Kernel, Vec<Format>, Estimate)>,
}

impl<'a> Device<'a> {
    /// Creates a device whose products are in a format of the chip [`None`: the nearest to each weight's].
    /// A CPU uses as many threads as were measured, or else all.
    ///
    /// # Errors
    /// [`Error::Argument`] if a GPU has no products of that format.
    pub fn new(profile: &'a Profile, products: Option<Dtype>) -> Result<Device<'a>> {
        if profile.driver == Driver::Cpu {
            let measured = profile.calibration.iter().flat_map(|c| &c.host);
            let widest = measured.map(|rates| rates.threads.value as usize).max();
            let host = match widest {
                Some(threads) => (completed(host::rates(profile, threads)?, profile), true),
                None => (host::assumed(profile, profile.tiles() as usize), false),
            };
            return Ok(Device { profile, products: None, host: Some(host) });
        }
        let all = kernel::products(profile);
        if let Some(dtype) = products
            && !all.iter().any(|(f, _)| f.weights == dtype)
        {
            let have: Vec<_> = all.iter().map(|(f, _)| f.weights.name()).collect();
            return Err(Error::argument("product format", have.join(", "), dtype.name()));
        }
        Ok(Device { profile, products, host: None })
    }

    /// Returns the times of the ops of a step, with one output per sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] if the chip multiplies no format.
    pub fn time(&self, program: &Program, spans: Spans<'_>) -> Result<Report> {
        let mut report = Report::default();
        for (_, op) in program.greedy_ops() {
            let time = self.op(program, op, spans)?.time;
            if time.seconds > 0.0 {
                report.add(&crate::name(program, op), time);
            }
        }
        Ok(report)
    }

    /// Returns the largest mean error of the products of steps on held-out shapes, absent if some kernels were
    /// not measured; and what is assumed of those, one line each.
    ///
    /// # Errors
    /// As [`Device::time`].
    pub fn error(&self, program: &Program, steps: &[Spans<'_>]) -> Result<(Option<f64>, Vec<String>)> {
        let mut assumed = BTreeSet::new();
        let mut most = None;
        for spans in steps {
            for (_, op) in program.greedy_ops() {
                for (kernel, formats, Estimate { source, .. }) in self.op(program, op, spans)?.rests_on {
                    if let Source::Measured(error) = source {
                        let is_product = matches!(kernel, Kernel::MatMul { .. } | Kernel::Experts { .. });
                        if is_product {
                            most = Some(error.max(most.unwrap_or(0.0)));
                        }
                    } else {
                        assumed.insert(assumption(kernel, &formats, source));
                    }
                }
            }
        }
        if let Some((rates, is_measured)) = &self.host {
            assumed.extend(assumptions_of_host(program, steps, rates, *is_measured, self.profile));
        }
        Ok((most.filter(|_| assumed.is_empty()), assumed.into_iter().collect()))
    }

    /// Returns the seconds between which a step is expected to lie in 8 of 10 cases, if kernels like all of its
    /// products and attentions were measured. Their errors may have one cause, so that all are low or all are
    /// high; the other ops count as they are.
    ///
    /// # Errors
    /// As [`Device::time`].
    pub fn interval_s(&self, program: &Program, spans: Spans<'_>) -> Result<Option<[f64; 2]>> {
        if self.host.is_some() {
            return Ok(None);
        }
        let mut ends = [0.0; 2];
        for (_, op) in program.greedy_ops() {
            let Timed { time, rests_on } = self.op(program, op, spans)?;
            let mut rest_s = time.seconds;
            for (_, _, Estimate { seconds, interval, .. }) in rests_on {
                let Some(ratios) = interval else { return Ok(None) };
                rest_s -= seconds;
                (0..2).for_each(|i| ends[i] += seconds * ratios[i]);
            }
            ends.iter_mut().for_each(|end| *end += rest_s);
        }
        Ok(Some(ends))
    }

    fn op(&self, program: &Program, op: &Op, spans: Spans<'_>) -> Result<Timed> {
        let cost = cost::op(program, op, &extents(spans));
        if cost == cost::Cost::default() {
            return Ok(Timed::default());
        }
        match &self.host {
            Some((rates, _)) => {
                let seconds = host::op_seconds(rates, program, op, &extents(spans))?;
                let (read_bytes, matrix_ops) = (cost.memory_bytes() as f64, cost.ops() as f64);
                let mut busy_s = [0.0; 4];
                busy_s[Queue::Vector as usize] = cost.integer_ops as f64 / rates.integer_ops_per_s
                    + cost.float_ops as f64 / rates.float_ops_per_s;
                let memory = self.profile.memory.last();
                let bytes_per_s =
                    memory.map_or(f64::INFINITY, |memory| self.profile.read_bytes_per_s(memory));
                let time = OpTime {
                    seconds,
                    launch_s: if matrix_ops > 0.0 { rates.op_s } else { 0.0 },
                    busy_s,
                    device_s: read_bytes / bytes_per_s,
                    read_bytes,
                    matrix_ops,
                    ..OpTime::default()
                };
                Ok(Timed { time, rests_on: Vec::new() })
            }
            None => self.kernels(program, op, spans, cost),
        }
    }

    /// Times an op as kernels of a GPU.
    fn kernels(&self, program: &Program, op: &Op, spans: Spans<'_>, cost: cost::Cost) -> Result<Timed> {
        let profile = self.profile;
        let plain = self.plain();
        let tokens = spans.iter().fold(0u32, |sum, (_, len)| sum.saturating_add(*len));
        let mut weight_bytes = cost.weight_bytes as f64;
        let mut rests_on = Vec::new();
        let mut used = plain;
        let (mut seconds, mut overhead_s) = (0.0, 0.0);
        let mut add = |formats: Formats, weight_bits, of: Vec<Format>, kernel| -> Result<()> {
            let stored = Stored { weight_bits, ..Stored::of(formats) };
            let estimate = kernel::assume(profile, formats, stored, kernel)?;
            seconds += estimate.seconds;
            overhead_s += estimate.overhead_s;
            rests_on.push((kernel, of, estimate));
            Ok(())
        };
        match op {
            Op::MatMul { x, parts, .. } => {
                let rows = |p: &Part| passes::rows(program.tensor(p.weight).rows, 0, 0);
                let n: u64 = parts.iter().map(rows).sum();
                let format = |p: &Part| program.tensor(p.weight).format;
                let bits = parts.iter().map(|p| rows(p) as f64 * stored_bits(format(p))).sum::<f64>();
                used = parts.first().map_or(plain, |p| self.formats(format(p)));
                let m = passes::rows(program.tensor(*x).rows, tokens, spans.len() as u32);
                let kernel = Kernel::MatMul { m, n, k: program.tensor(*x).cols.into() };
                add(used, bits / n.max(1) as f64, parts.iter().map(format).collect(), kernel)?;
            }
            Op::BlockMatMul { x, weight, .. } => {
                // As one product with all matrices, which has as many weights and as many operations.
                let t = program.tensor(*weight);
                let n = u64::from(t.experts) * passes::rows(t.rows, 0, 0);
                used = self.formats(t.format);
                let m = passes::rows(program.tensor(*x).rows, tokens, spans.len() as u32);
                add(used, stored_bits(t.format), vec![t.format], Kernel::MatMul { m, n, k: t.cols.into() })?;
            }
            Op::Experts { ids, gate, up, down, .. } => {
                let weights = [gate, up, down].map(|weight| program.tensor(*weight));
                let (held, each) = (f64::from(weights[0].experts), program.tensor(*ids).cols);
                // Others may have the rest of the experts.
                let all = shape::routed(program, *ids).map_or(held, f64::from);
                let share = held / all.max(1.0);
                let pairs = f64::from(tokens) * f64::from(each);
                let experts = share * kernel::distinct_experts(all, each.into(), tokens.into());
                let most = pairs.min(held).max(1.0);
                weight_bytes *= experts / most;
                let bits = weights.iter().map(|w| stored_bits(w.format)).sum::<f64>() / 3.0;
                used = self.formats(weights[0].format);
                let kernel = Kernel::Experts {
                    experts: (experts.round() as u64).max(1),
                    rows: (pairs * share).ceil() as u64,
                    columns: weights[0].cols.into(),
                    hidden: passes::rows(weights[0].rows, 0, 0),
                };
                add(used, bits, weights.iter().map(|w| w.format).collect(), kernel)?;
            }
            Op::Attend { state, heads, .. } => {
                let Some(state) = program.states.get(state.0 as usize) else { return Ok(Timed::default()) };
                let bits = stored_bits(state.format);
                let (heads, kv_heads): (u64, u64) = ((*heads).into(), state.kv_heads.into());
                let head_dim = u64::from(state.key_dim);
                let reach = |end: u32| u64::from(end.min(state.window.unwrap_or(u32::MAX)));
                let (one, many): (Vec<_>, Vec<_>) = spans.iter().partition(|(_, tokens)| *tokens == 1);
                if let Some(longest) = one.iter().map(|(start, _)| start.saturating_add(1)).max() {
                    let (batch, kv_len) = (one.len() as u64, reach(longest));
                    let kernel = Kernel::Attention { batch, heads, kv_heads, head_dim, kv_len };
                    add(plain, bits, vec![state.format], kernel)?;
                }
                for span in many {
                    let ops = cost::op(program, op, &extents(&[span])).float_ops;
                    let (tokens, window) = (u64::from(span.1), state.window.unwrap_or(u32::MAX));
                    let kv_len = u64::from(span.0.min(window)) + tokens;
                    let per_pair = 2 * heads * u64::from(state.key_dim + state.value_dim);
                    let seen = ops / per_pair.max(1);
                    let batch = 1;
                    let kernel = Kernel::Prefill { batch, heads, kv_heads, head_dim, tokens, kv_len, seen };
                    add(plain, bits, vec![state.format], kernel)?;
                }
            }
            _ => {}
        }
        let machine = Machine::new(profile, used)?;
        let activations = cost.activation_bytes as f64 * used.activations.bits() / Dtype::Fp32.bits();
        let bytes = weight_bytes + cost.kv_bytes as f64 + activations;
        if rests_on.is_empty() {
            // The other ops move bytes, as fast as products do.
            let c = kernel::matmul_constants(profile, plain, plain.weights.bits(), false).values;
            overhead_s = c.overhead_s;
            seconds = overhead_s + bytes / (c.memory_fraction * machine.bytes_per_s);
        }
        let mut busy_s = [0.0; 4];
        busy_s[Queue::Matrix as usize] = cost.ops() as f64 / machine.ops_per_s;
        let time = OpTime {
            seconds,
            launch_s: overhead_s,
            busy_s,
            device_s: bytes / machine.bytes_per_s,
            read_bytes: bytes,
            matrix_ops: cost.ops() as f64,
            ..OpTime::default()
        };
        Ok(Timed { time, rests_on })
    }

    /// Returns the formats in which a GPU multiplies a weight: the requested ones, else the weight's own, else
    /// those of 16-bit activations, as kernels of serving stacks do that unpack weights only.
    fn formats(&self, weight: Format) -> Formats {
        let own = stored_as(weight);
        if let Some(found) = self.products.or(own).and_then(|dtype| self.find(dtype)) {
            return found;
        }
        let plain = self.plain();
        let packed = own.filter(|own| own.bits() < plain.activations.bits());
        Formats { weights: packed.unwrap_or(plain.weights), ..plain }
    }

    /// Returns the formats of attention, and of activations of ops that do not multiply: of 16 bits, if there are.
    fn plain(&self) -> Formats {
        let floats = [Dtype::Bf16, Dtype::Fp16, Dtype::Tf32, Dtype::Fp32];
        let any = || kernel::products(self.profile).first().map_or(BF16, |(formats, _)| *formats);
        floats.into_iter().find_map(|dtype| self.find(dtype)).unwrap_or_else(any)
    }

    fn find(&self, weights: Dtype) -> Option<Formats> {
        let all = kernel::products(self.profile);
        all.into_iter().map(|(formats, _)| formats).find(|formats| formats.weights == weights)
    }
}

const BF16: Formats = Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };

fn extents(spans: Spans<'_>) -> Vec<Extent> {
    spans.iter().map(|&(start, tokens)| Extent { start, tokens, outputs: 1 }).collect()
}

/// Returns the bits per value, scales included.
fn stored_bits(format: Format) -> f64 {
    8.0 * format.block_bytes() as f64 / format.block_len() as f64
}

fn names(formats: impl IntoIterator<Item = Format>) -> String {
    let names: BTreeSet<&str> = formats.into_iter().map(|format| format.name()).collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// Says what the time of a kernel that was not measured assumes.
fn assumption(kernel: Kernel, formats: &[Format], source: Source) -> String {
    let (what, kernels) = match kernel {
        Kernel::MatMul { .. } => ("weights", "products"),
        Kernel::Experts { .. } => ("experts", "products"),
        Kernel::Attention { .. } => ("KV cache", "attention"),
        Kernel::Prefill { .. } => ("KV cache", "prefill attention"),
    };
    let how = match source {
        Source::Measured(_) => "measured".into(),
        Source::Nearest(Formats { activations, weights }) => {
            format!("as measured in {activations} x {weights}, with their own bytes")
        }
        Source::Assumed => format!("uncalibrated, {}", kernel::assumption(kernel)),
    };
    format!("{what} of {}: {kernels} {how}", names(formats.iter().copied()))
}

/// Adds the products of formats that were not measured: those of the nearest, or, without any, the assumed
/// ones.
fn completed(mut rates: Rates, profile: &Profile) -> Rates {
    let measured = rates.clone();
    let assumed = host::assumed(profile, rates.threads);
    for &format in Format::ALL {
        if !measured.products.iter().any(|(f, ..)| *f == format) {
            let near = host::nearest(&measured, format).or_else(|| host::nearest(&assumed, format));
            rates.products.extend(near.map(|(_, bytes_per_s, ops_per_s)| (format, bytes_per_s, ops_per_s)));
        }
    }
    rates
}

/// Says what the times of a CPU assume.
fn assumptions_of_host(
    program: &Program,
    steps: &[Spans<'_>],
    rates: &Rates,
    is_measured: bool,
    profile: &Profile,
) -> Vec<String> {
    if !is_measured {
        let percent = |fraction: f64| 100.0 * fraction;
        return vec![format!(
            "uncalibrated: products assumed to reach {:.0} % of the bandwidth and {:.0} % of the dot products of {} threads, \
             attention {:.0} %",
            percent(host::MEMORY_FRACTION),
            percent(host::COMPUTE_FRACTION),
            rates.threads,
            percent(host::ATTEND_FRACTION)
        )];
    }
    let mut lines = Vec::new();
    if let Ok(measured) = host::rates(profile, rates.threads) {
        let weights = program.greedy_ops().filter_map(|(_, op)| host::multiplied(program, op));
        let has = |format: &Format| measured.products.iter().any(|(f, ..)| f == format);
        for format in weights.filter(|format| !has(format)) {
            let near = host::nearest(&measured, format).map_or("none", |(near, ..)| near.name());
            lines.push(format!("weights of {}: products as measured in {near}", format.name()));
        }
    }
    if steps.iter().any(|spans| spans.len() > 1) {
        lines.push(
            "several sequences: by the rates of one token and of 512, and weights are read once".into(),
        );
    }
    lines
}

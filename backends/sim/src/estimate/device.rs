//! The time of a step on a device that is not simulated: the sum of its kernels (`driver = "gpu"`) or of the
//! ops of the backend `cpu` (`driver = "cpu"`), measured or assumed.

use std::collections::BTreeSet;

use halite_kernels::formats::Format;

use super::host;
use super::kernel::{self, Estimate, Formats, Kernel, Machine, Source, Stored};
use super::measure::Rates;
use super::work::{Asked, Work, Works, extents};
use crate::chip::stored_as;
use crate::{OpTime, Queue, Report};
use halite::program::Program;
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
    /// Format of the KV cache of a GPU, if it is none of the program's.
    cache: Option<Dtype>,
    /// The formats that a GPU multiplies, with the operations per second.
    rates: Vec<(Formats, f64)>,
    /// Rates of a CPU, and whether they were measured.
    host: Option<(Rates, bool)>,
}

/// The time of an op, and those of its kernels that multiply.
#[derive(Debug)]
struct Timed {
    time: OpTime,
    kernels: Vec<Estimate>,
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
            return Ok(Device { profile, products: None, cache: None, rates: Vec::new(), host: Some(host) });
        }
        let rates = kernel::products(profile);
        if let Some(dtype) = products
            && !rates.iter().any(|(f, _)| f.weights == dtype)
        {
            let have: Vec<_> = rates.iter().map(|(f, _)| f.weights.name()).collect();
            return Err(Error::argument("product format", have.join(", "), dtype.name()));
        }
        Ok(Device { profile, products, cache: None, rates, host: None })
    }

    /// The same, with a KV cache in a format of the chip, if there is one.
    pub fn with_cache(self, cache: Option<Dtype>) -> Device<'a> {
        Device { cache, ..self }
    }

    /// Returns the times of the ops of a step, with one output per sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] if the chip multiplies no format.
    pub fn time(&self, program: &Program, spans: Spans<'_>) -> Result<Report> {
        let mut report = Report::default();
        let sequences = extents(spans);
        for (_, op) in program.greedy_ops() {
            let Some(work) = Work::of(program, op, &sequences) else { continue };
            let time = self.timed(&work)?.time;
            if time.seconds > 0.0 {
                report.add(&crate::name(program, op), time);
            }
        }
        Ok(report)
    }

    /// Returns the seconds of each step of some works.
    ///
    /// # Errors
    /// As [`Device::time`].
    pub fn seconds(&self, works: &Works) -> Result<Vec<f64>> {
        let each = works.distinct.iter().map(|work| Ok(self.timed(work)?.time.seconds));
        Ok(works.sums(&each.collect::<Result<Vec<f64>>>()?).collect())
    }

    /// Returns the largest mean error of the products of steps on held-out shapes, absent if some kernels were
    /// not measured; and what is assumed of those, one line each.
    ///
    /// # Errors
    /// As [`Device::time`].
    pub fn error(&self, program: &Program, steps: &[Spans<'_>]) -> Result<(Option<f64>, Vec<String>)> {
        let mut works = Works::default();
        steps.iter().for_each(|spans| works.add(program, spans));
        let mut assumed = BTreeSet::new();
        let mut most = None;
        for work in &works.distinct {
            for (Asked { kernel, formats, .. }, estimate) in
                work.kernels.iter().zip(self.timed(work)?.kernels)
            {
                if let Source::Measured(error) = estimate.source {
                    let is_product = matches!(kernel, Kernel::MatMul { .. } | Kernel::Experts { .. });
                    if is_product {
                        most = Some(error.max(most.unwrap_or(0.0)));
                    }
                } else {
                    let cache = self.cache.filter(|_| work.attends);
                    let names =
                        cache.map_or_else(|| names(formats.iter().copied()), |dtype| dtype.name().to_owned());
                    assumed.insert(assumption(*kernel, &names, estimate.source));
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
        let mut works = Works::default();
        works.add(program, spans);
        let mut ends = [Vec::new(), Vec::new()];
        for work in &works.distinct {
            let Timed { time, kernels } = self.timed(work)?;
            let mut both = [0.0; 2];
            let mut rest_s = time.seconds;
            for Estimate { seconds, interval, .. } in kernels {
                let Some(ratios) = interval else { return Ok(None) };
                rest_s -= seconds;
                (0..2).for_each(|i| both[i] += seconds * ratios[i]);
            }
            ends.iter_mut().zip(both).for_each(|(ends, end)| ends.push(end + rest_s));
        }
        Ok(Some(ends.map(|each| works.sums(&each).sum())))
    }

    fn timed(&self, work: &Work) -> Result<Timed> {
        let Some((rates, _)) = &self.host else { return self.kernels(work) };
        let seconds = host::work_seconds(rates, work)?;
        let cost = &work.cost;
        let (read_bytes, matrix_ops) = (cost.memory_bytes() as f64, cost.ops() as f64);
        let mut busy_s = [0.0; 4];
        busy_s[Queue::Vector as usize] =
            cost.integer_ops as f64 / rates.integer_ops_per_s + cost.float_ops as f64 / rates.float_ops_per_s;
        let memory = self.profile.memory.last();
        let bytes_per_s = memory.map_or(f64::INFINITY, |memory| self.profile.read_bytes_per_s(memory));
        let time = OpTime {
            seconds,
            launch_s: if matrix_ops > 0.0 { rates.op_s } else { 0.0 },
            busy_s,
            device_s: read_bytes / bytes_per_s,
            read_bytes,
            matrix_ops,
            ..OpTime::default()
        };
        Ok(Timed { time, kernels: Vec::new() })
    }

    /// Times an op as kernels of a GPU.
    fn kernels(&self, work: &Work) -> Result<Timed> {
        let (profile, cost, plain) = (self.profile, &work.cost, self.plain());
        let cache = self.cache.filter(|_| work.attends);
        let used = work.multiplied.map_or(plain, |weight| self.formats(weight));
        let used = Formats { weights: cache.unwrap_or(used.weights), ..used };
        let stored_bits = |asked: &Asked| cache.map_or(asked.bits, Dtype::bits);
        let narrower = work.kernels.first().map_or(1.0, |asked| stored_bits(asked) / asked.bits);
        let kv_bytes = cost.kv_bytes as f64 * if cache.is_some() { narrower } else { 1.0 };
        let machine = Machine::of(profile, &self.rates, used)?;
        let activations = cost.activation_bytes as f64 * used.activations.bits() / Dtype::Fp32.bits();
        let bytes = work.weight_bytes + kv_bytes + activations;
        let estimate = |asked: &Asked| {
            let stored = Stored { weight_bits: stored_bits(asked), ..Stored::of(used) };
            kernel::assume_on(profile, &self.rates, used, stored, asked.kernel)
        };
        let kernels = work.kernels.iter().map(estimate).collect::<Result<Vec<_>>>()?;
        let mut overhead_s = kernels.iter().map(|kernel| kernel.overhead_s).sum();
        let mut seconds = kernels.iter().map(|kernel| kernel.seconds).sum();
        if kernels.is_empty() {
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
        Ok(Timed { time, kernels })
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
        let any = || self.rates.first().map_or(BF16, |(formats, _)| *formats);
        floats.into_iter().find_map(|dtype| self.find(dtype)).unwrap_or_else(any)
    }

    fn find(&self, weights: Dtype) -> Option<Formats> {
        self.rates.iter().map(|(formats, _)| *formats).find(|formats| formats.weights == weights)
    }
}

const BF16: Formats = Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };

fn names(formats: impl IntoIterator<Item = Format>) -> String {
    let names: BTreeSet<&str> = formats.into_iter().map(|format| format.name()).collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// Says what the time of a kernel that was not measured assumes.
fn assumption(kernel: Kernel, formats: &str, source: Source) -> String {
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
    format!("{what} of {formats}: {kernels} {how}")
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

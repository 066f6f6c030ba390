//! What serving a model on a chip takes: time to the first token, tokens per second, energy and money, from shapes alone.
//!
//! A prompt is processed in steps of [`Workload::chunk`] tokens, one sequence after the other; then all sequences generate
//! together. Steps of a prompt cost linearly more towards its end, and so do generated tokens: each kind is timed once, at its
//! middle.

use std::collections::BTreeMap;

use super::device;
use crate::step;
use crate::{Bound, Chip, Numerics, OpTime, Report};
use halite::backend::Fusions;
use halite::error::Result;
use halite::passes;
use halite::program::{PAGE_POSITIONS, Program};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Basis, Driver, Profile};

/// What is asked of a chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Sequences at a time.
    pub batch: u32,
    /// Tokens of each one's prompt.
    pub prompt: u32,
    /// Tokens that each one generates.
    pub generate: u32,
    /// Most prompt tokens of a step.
    pub chunk: u32,
}

impl Workload {
    /// Steps of one prompt, and the one in the middle.
    fn prefill(&self) -> (u32, (u32, u32)) {
        let chunk = self.chunk.clamp(1, self.prompt.max(1));
        let steps = self.prompt.div_ceil(chunk);
        (steps, (steps.saturating_sub(1) / 2 * chunk, chunk))
    }

    /// The position of a token in the middle of what is generated.
    fn middle(&self) -> u32 {
        self.prompt + self.generate / 2
    }

    /// Seconds of everything, from those of a prompt's step and of a generating one.
    fn seconds(&self, prefill_s: f64, decode_s: f64) -> f64 {
        self.first_token_s(prefill_s) + f64::from(self.generate.saturating_sub(1)) * decode_s
    }

    fn first_token_s(&self, prefill_s: f64) -> f64 {
        f64::from(self.batch) * f64::from(self.prefill().0) * prefill_s
    }
}

/// What a workload takes.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// Seconds until every sequence has its first token.
    pub first_token_s: f64,
    /// Seconds of a step that generates a token for each sequence, in the middle.
    pub step_s: f64,
    /// Seconds of everything.
    pub seconds: f64,
    /// Generated tokens per second, of all sequences, while generating.
    pub tokens_per_s: f64,
    /// Joules of each generated token, prompts included; absent where the profile does not have the numbers.
    pub joules_per_token: Option<f64>,
    /// Price of a million generated tokens, prompts included; absent where the profile does not have one.
    pub usd_per_million_tokens: Option<f64>,
    /// Bytes of weights and of the KV cache of all sequences.
    pub need_bytes: u64,
    /// Bytes of the memory that holds them.
    pub have_bytes: u64,
    /// The mean error of products on shapes that were held out, as a fraction; absent where nothing was measured.
    pub error: Option<f64>,
    /// What was not measured and stands for what was, one line each.
    pub unmeasured: Vec<String>,
    /// The ops of a prompt's step.
    pub prefill: Report,
    /// The ops of a generating step.
    pub decode: Report,
    /// The share of a generating step that each resource is busy, the busiest first: what limits it, and what comes next.
    pub shares: Vec<(Bound, f64)>,
    /// How much each number of the profile matters, the most first.
    pub sensitivities: Vec<Sensitivity>,
}

/// How the time depends on a number of the profile.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// The number, as `halite profile --numbers` has it.
    pub path: String,
    /// How sure it is.
    pub basis: Basis,
    /// Per cent of time for each per cent of the number: `d ln seconds / d ln number`.
    pub exponent: f64,
}

impl Estimate {
    /// Whether weights and cache fit the chip.
    pub fn fits(&self) -> bool {
        self.need_bytes <= self.have_bytes
    }

    /// The part of the answer that rests on numbers of each basis: their share of all sensitivities.
    pub fn rests_on(&self) -> BTreeMap<Basis, f64> {
        let all: f64 = self.sensitivities.iter().map(|s| s.exponent.abs()).sum();
        let mut shares = BTreeMap::new();
        for s in &self.sensitivities {
            *shares.entry(s.basis).or_insert(0.0) += s.exponent.abs() / all.max(f64::MIN_POSITIVE);
        }
        shares
    }
}

/// The program as the chip gets it.
fn adapted(program: &Program) -> Program {
    passes::fuse(program, Fusions::ALL)
}

/// What may be chosen on a chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choices {
    /// The format in which it multiplies, if not the nearest to each weight's.
    pub products: Option<Dtype>,
    /// The format in which activations lie in device memory between ops.
    pub activations: Dtype,
}

impl Default for Choices {
    fn default() -> Choices {
        Choices { products: None, activations: Dtype::Fp32 }
    }
}

impl Choices {
    /// The chip of a profile, for times.
    ///
    /// # Errors
    /// As [`Chip::new`].
    pub fn chip(self, profile: Profile) -> Result<Chip> {
        let mut chip = Chip::new(profile, Numerics::Exact, self.products)?;
        chip.activations = self.activations;
        Ok(chip)
    }
}

/// What tells how long steps take.
enum Timer<'a> {
    /// Commands of a simulated chip.
    Chip(Box<Chip>),
    /// Kernels of a device that were measured; of a CPU with so many threads.
    Device(&'a Profile, Option<usize>),
}

impl<'a> Timer<'a> {
    fn new(profile: &'a Profile, choices: Choices) -> Result<Timer<'a>> {
        Ok(match profile.driver {
            Driver::Sim => Timer::Chip(Box::new(choices.chip(profile.clone())?)),
            Driver::Gpu => Timer::Device(profile, None),
            Driver::Cpu => {
                // As many threads as were measured.
                let rates = profile.calibration.iter().flat_map(|c| &c.host);
                let most = rates.map(|rates| rates.threads.value as usize).max();
                Timer::Device(profile, Some(most.unwrap_or(profile.tiles() as usize)))
            }
        })
    }

    fn report(&self, program: &Program, spans: &[(u32, u32)]) -> Result<Report> {
        match self {
            Timer::Chip(chip) => step::time(chip, program, spans, true),
            Timer::Device(profile, threads) => device::time(profile, program, spans, *threads),
        }
    }

    /// Seconds, in closed form where there is a quicker one than the report's.
    fn seconds(&self, program: &Program, spans: &[(u32, u32)]) -> Result<f64> {
        match self {
            Timer::Chip(chip) => step::closed(chip, program, spans, true),
            Timer::Device(..) => Ok(self.report(program, spans)?.total().seconds),
        }
    }
}

/// Estimates a workload of a program on the chip of a profile.
///
/// # Errors
/// What [`Chip::new`] says, and ops that do not fit the chip; of devices that are not simulated, what was not measured.
pub fn estimate(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
) -> Result<Estimate> {
    let program = &adapted(program);
    let unmeasured = match profile.driver {
        Driver::Gpu => device::unmeasured(program),
        Driver::Cpu | Driver::Sim => Vec::new(),
    };
    let timer = Timer::new(profile, choices)?;
    let (_, chunk) = workload.prefill();
    let spans = vec![(workload.middle(), 1); workload.batch as usize];
    let prefill = timer.report(program, &[chunk])?;
    let decode = timer.report(program, &spans)?;
    let (prefill_total, decode_total) = (prefill.total(), decode.total());
    let seconds = workload.seconds(prefill_total.seconds, decode_total.seconds);
    let tokens = f64::from(workload.batch) * f64::from(workload.generate);
    let positions = u64::from(workload.prompt) + u64::from(workload.generate);
    // A window begins and ends within a page.
    let page = u64::from(PAGE_POSITIONS);
    let kept = |window: Option<u32>| window.map_or(positions, |w| positions.min(u64::from(w) + page));
    let each = program.kv_bytes(|window| kept(window).div_ceil(page));
    let cache = each.saturating_mul(workload.batch.into());
    Ok(Estimate {
        first_token_s: workload.first_token_s(prefill_total.seconds),
        step_s: decode_total.seconds,
        seconds,
        tokens_per_s: f64::from(workload.batch) / decode_total.seconds,
        joules_per_token: joules(profile, workload, seconds, prefill_total, decode_total).map(|j| j / tokens),
        usd_per_million_tokens: usd_per_s(profile).map(|usd| 1e6 * usd * seconds / tokens),
        need_bytes: program.weight_bytes().saturating_add(cache),
        have_bytes: profile.memory.last().map_or(0, |memory| memory.capacity_bytes.value as u64),
        error: error(profile).filter(|_| unmeasured.is_empty()),
        unmeasured,
        shares: decode_total.shares().to_vec(),
        prefill,
        decode,
        sensitivities: sensitivities(profile, choices, program, workload)?,
    })
}

/// How far off kernels of a device were on shapes that no constant was fitted to. Schedules of simulated chips were never
/// measured.
fn error(profile: &Profile) -> Option<f64> {
    let fit = profile.calibration.as_ref().filter(|_| profile.driver == Driver::Gpu)?.matmul.first()?;
    Some(fit.errors.mean_error_fraction.value)
}

/// Joules of everything: of operations and moved bytes, and of what the chip takes while it does nothing.
fn joules(
    profile: &Profile,
    workload: &Workload,
    seconds: f64,
    prefill: OpTime,
    decode: OpTime,
) -> Option<f64> {
    let moving = workload.seconds(prefill.joules?, decode.joules?);
    let idle_w = profile.power.as_ref()?.idle_w.as_ref()?.value;
    Some(moving + idle_w * seconds)
}

/// Money a second: rent, or what is written off, and energy at the chip's full power.
fn usd_per_s(profile: &Profile) -> Option<f64> {
    let price = profile.price.as_ref()?;
    if let Some(rent) = &price.usd_per_hour {
        return Some(rent.value / 3600.0);
    }
    let years = price.lifetime_years.as_ref()?.value;
    let used = price.utilisation_fraction.as_ref().map_or(1.0, |fraction| fraction.value);
    let year_s = 365.25 * 24.0 * 3600.0;
    let energy = price.usd_per_kwh.as_ref().zip(profile.power.as_ref()).map(|(usd, power)| {
        let watts = power.provisioned_w.as_ref().unwrap_or(&power.tdp_w).value;
        usd.value * watts / 3.6e6
    });
    Some(price.chip_usd.as_ref()?.value / (years * year_s * used) + energy.unwrap_or(0.0))
}

/// Seconds of a workload, in closed form: quickly, and near what [`estimate`] says.
///
/// # Errors
/// As [`estimate`].
pub fn closed_s(profile: &Profile, choices: Choices, program: &Program, workload: &Workload) -> Result<f64> {
    let timer = Timer::new(profile, choices)?;
    let (_, chunk) = workload.prefill();
    let spans = vec![(workload.middle(), 1); workload.batch as usize];
    let prefill_s = timer.seconds(program, &[chunk])?;
    Ok(workload.seconds(prefill_s, timer.seconds(program, &spans)?))
}

/// A number is changed by this factor to see what depends on it.
const CHANGE: f64 = 1.05;

fn sensitivities(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
) -> Result<Vec<Sensitivity>> {
    let seconds = |profile: Profile| closed_s(&profile, choices, program, workload);
    let before = seconds(profile.clone())?;
    let mut found = Vec::new();
    for (path, quantity) in &profile.quantities {
        // Counts are what they are.
        let counts = ["clusters", "tiles_per_cluster", "engines", "rows", "columns", "capacity_bytes"];
        if path.rsplit('.').next().is_some_and(|key| counts.contains(&key)) {
            continue;
        }
        let after = seconds(profile.with(path, quantity.value * CHANGE)?)?;
        let exponent = (after / before).ln() / CHANGE.ln();
        if exponent.abs() > 1e-4 {
            found.push(Sensitivity { path: path.clone(), basis: quantity.basis, exponent });
        }
    }
    found.sort_by(|a, b| b.exponent.abs().total_cmp(&a.exponent.abs()));
    Ok(found)
}

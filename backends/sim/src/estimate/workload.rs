//! Predicts serving of a model on a chip: time to the first token, tokens per second, energy and cost, from
//! shapes alone.
//!
//! Prefill runs in steps of [`Workload::chunk`] tokens, one sequence after the other; then all sequences
//! decode together. The time of a step grows linearly with its position, so one prefill step and one decode
//! step are timed, each in the middle.

use std::collections::BTreeMap;

use super::device::Device;
use crate::{Bound, Chip, Numerics, OpTime, Report};
use crate::{measured, step};
use halite::error::Result;
use halite::passes;
use halite::program::{PAGE_POSITIONS, Program};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Basis, Driver, Profile};

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Workload {
    /// Batch size in sequences.
    pub batch: u32,
    /// Prompt tokens per sequence.
    pub prompt: u32,
    /// Generated tokens per sequence.
    pub generate: u32,
    /// Maximum prompt tokens of a step.
    pub chunk: u32,
}

impl Default for Workload {
    fn default() -> Workload {
        Workload { batch: 1, prompt: 512, generate: 128, chunk: 512 }
    }
}

halite::setters!(const Workload { batch: u32, prompt: u32, generate: u32, chunk: u32 });

impl Workload {
    /// The number of prefill steps, and the middle one.
    fn prefill(&self) -> (u32, (u32, u32)) {
        let chunk = self.chunk.clamp(1, self.prompt.max(1));
        let steps = self.prompt.div_ceil(chunk);
        (steps, (steps.saturating_sub(1) / 2 * chunk, chunk))
    }

    /// The position of the middle generated token.
    fn middle(&self) -> u32 {
        self.prompt + self.generate / 2
    }

    /// Total seconds, from those of a prefill step and of a decode step.
    fn seconds(&self, prefill_s: f64, decode_s: f64) -> f64 {
        self.first_token_s(prefill_s) + f64::from(self.generate.saturating_sub(1)) * decode_s
    }

    fn first_token_s(&self, prefill_s: f64) -> f64 {
        f64::from(self.batch) * f64::from(self.prefill().0) * prefill_s
    }
}

/// The estimate of a workload.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Estimate {
    /// Seconds until every sequence has its first token.
    pub first_token_s: f64,
    /// Seconds of the middle decode step, of one token per sequence.
    pub step_s: f64,
    /// Seconds between which it is expected to lie in 8 of 10 cases, by the errors of measured kernels; absent if
    /// nothing like them was measured.
    pub step_interval_s: Option<[f64; 2]>,
    /// Total seconds.
    pub seconds: f64,
    /// Generated tokens per second of all sequences, during decode.
    pub tokens_per_s: f64,
    /// Joules per generated token, prompts included; absent if the profile lacks the numbers.
    pub joules_per_token: Option<f64>,
    /// Price per million generated tokens, prompts included; absent if the profile has no price.
    pub usd_per_million_tokens: Option<f64>,
    /// Bytes of weights and of the KV cache of all sequences.
    pub need_bytes: u64,
    /// Bytes of the memory that holds them.
    pub have_bytes: u64,
    /// Mean relative error of products on held-out shapes; absent if nothing was measured.
    pub error: Option<f64>,
    /// What is assumed of kernels without measurements, one line each.
    pub unmeasured: Vec<String>,
    /// The ops of a prefill step.
    pub prefill: Report,
    /// The ops of a decode step.
    pub decode: Report,
    /// The share of a decode step that each resource is busy, the busiest first.
    pub shares: Vec<(Bound, f64)>,
    /// Sensitivity to each number of the profile, the largest first.
    pub sensitivities: Vec<Sensitivity>,
}

/// The sensitivity of the time to a number of the profile.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sensitivity {
    /// The number's path, as in `halite profile --numbers`.
    pub path: String,
    /// Its certainty.
    pub basis: Basis,
    /// Change of the time in percent per percent of the number: `d ln seconds / d ln number`.
    pub exponent: f64,
}

impl Estimate {
    /// Whether weights and cache fit the chip.
    pub fn fits(&self) -> bool {
        self.need_bytes <= self.have_bytes
    }

    /// Returns the share of the sensitivities by basis: how much of the result depends on numbers of each.
    pub fn rests_on(&self) -> BTreeMap<Basis, f64> {
        let all: f64 = self.sensitivities.iter().map(|s| s.exponent.abs()).sum();
        let mut shares = BTreeMap::new();
        for s in &self.sensitivities {
            *shares.entry(s.basis).or_insert(0.0) += s.exponent.abs() / all.max(f64::MIN_POSITIVE);
        }
        shares
    }
}

/// The program as prepared for the chip.
fn adapted(program: &Program) -> Program {
    passes::fuse(program, crate::FUSIONS)
}

/// Options of a chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choices {
    /// Format of products; `None`: the nearest to each weight's.
    pub products: Option<Dtype>,
    /// Format of activations in device memory between ops.
    pub activations: Dtype,
}

impl Default for Choices {
    fn default() -> Choices {
        Choices { products: None, activations: Dtype::Fp32 }
    }
}

halite::setters!(const Choices { products: Option<Dtype>, activations: Dtype });

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

/// The model that times steps.
enum Timer<'a> {
    /// Commands of a simulated chip.
    Chip(Box<Chip>),
    /// Kernels of a device.
    Device(Device<'a>),
}

impl<'a> Timer<'a> {
    fn new(profile: &'a Profile, choices: Choices) -> Result<Timer<'a>> {
        Ok(match profile.driver {
            Driver::Sim => Timer::Chip(Box::new(choices.chip(profile.clone())?)),
            Driver::Gpu | Driver::Cpu => Timer::Device(Device::new(profile, choices.products)?),
        })
    }

    fn report(&self, program: &Program, spans: &[(u32, u32)]) -> Result<Report> {
        match self {
            Timer::Chip(chip) => step::time(chip, program, spans, true),
            Timer::Device(device) => device.time(program, spans),
        }
    }

    /// Returns seconds, by the quicker closed form if there is one.
    fn seconds(&self, program: &Program, spans: &[(u32, u32)]) -> Result<f64> {
        match self {
            Timer::Chip(chip) => step::closed(chip, program, spans, true),
            Timer::Device(..) => Ok(self.report(program, spans)?.total().seconds),
        }
    }

    /// Returns the mean relative error of products on held-out shapes, and what is assumed of steps that were
    /// not measured.
    fn error(&self, program: &Program, steps: &[&[(u32, u32)]]) -> Result<(Option<f64>, Vec<String>)> {
        match self {
            Timer::Chip(chip) => Ok(measured::error(chip, program)),
            Timer::Device(device) => device.error(program, steps),
        }
    }

    /// Returns the seconds between which a step is expected to lie in 8 of 10 cases.
    fn interval_s(&self, program: &Program, spans: &[(u32, u32)]) -> Result<Option<[f64; 2]>> {
        match self {
            Timer::Chip(_) => Ok(None),
            Timer::Device(device) => device.interval_s(program, spans),
        }
    }
}

/// Estimates a workload of a program on the chip of a profile.
///
/// # Errors
/// Errors of [`Chip::new`] and [`Device::new`], and ops that do not fit the chip.
pub fn estimate(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
) -> Result<Estimate> {
    let program = &adapted(program);
    let timer = Timer::new(profile, choices)?;
    let (_, chunk) = workload.prefill();
    let spans = vec![(workload.middle(), 1); workload.batch as usize];
    let (error, unmeasured) = timer.error(program, &[&[chunk], &spans])?;
    let prefill = timer.report(program, &[chunk])?;
    let decode = timer.report(program, &spans)?;
    let (prefill_total, decode_total) = (prefill.total(), decode.total());
    let seconds = workload.seconds(prefill_total.seconds, decode_total.seconds);
    let tokens = f64::from(workload.batch) * f64::from(workload.generate);
    let positions = u64::from(workload.prompt) + u64::from(workload.generate);
    // A window may begin and end in the middle of a page.
    let page = u64::from(PAGE_POSITIONS);
    let kept = |window: Option<u32>| window.map_or(positions, |w| positions.min(u64::from(w) + page));
    let each = program.kv_bytes(|window| kept(window).div_ceil(page));
    let cache = each.saturating_mul(workload.batch.into());
    Ok(Estimate {
        first_token_s: workload.first_token_s(prefill_total.seconds),
        step_s: decode_total.seconds,
        step_interval_s: timer.interval_s(program, &spans)?,
        seconds,
        tokens_per_s: f64::from(workload.batch) / decode_total.seconds,
        joules_per_token: joules(profile, workload, seconds, prefill_total, decode_total).map(|j| j / tokens),
        usd_per_million_tokens: usd_per_s(profile).map(|usd| 1e6 * usd * seconds / tokens),
        need_bytes: program.weight_bytes().saturating_add(cache),
        have_bytes: profile.memory.last().map_or(0, |memory| memory.capacity_bytes.value as u64),
        error,
        unmeasured,
        shares: decode_total.shares().to_vec(),
        prefill,
        decode,
        sensitivities: sensitivities(profile, choices, program, workload)?,
    })
}

/// Returns the total joules: of operations, moved bytes and idle power.
fn joules(
    profile: &Profile,
    workload: &Workload,
    seconds: f64,
    prefill: OpTime,
    decode: OpTime,
) -> Option<f64> {
    profile.joules(workload.seconds(prefill.joules?, decode.joules?), seconds)
}

/// Returns US$ per second: rent, or depreciation and energy at the chip's full power.
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

/// Returns the seconds of a workload by the closed form, a quick approximation of [`estimate`].
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

/// Factor by which a number is changed to measure the sensitivity.
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
        // Counts are not varied, and errors change no time.
        let counts = ["clusters", "tiles_per_cluster", "engines", "rows", "columns", "capacity_bytes"];
        if path.contains(".errors.") || path.rsplit('.').next().is_some_and(|key| counts.contains(&key)) {
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

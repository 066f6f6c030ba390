//! Predicts serving of a model on a chip: time to the first token, tokens per second, energy and cost, from
//! shapes alone.
//!
//! Prefill runs in steps of [`Workload::chunk`] tokens: parts of one long prompt, or several short ones; then all sequences
//! decode together. The time of a step grows linearly with its position, so one prefill step and one decode
//! step are timed, each in the middle.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::collective::{Collective, Fabric};
use super::device::Device;
use super::figures::{Figures, Metric};
use super::system::{Layout, Stage, layouts, stages};
use super::work::Works;
use crate::chip::file_bits;
use crate::places::{Amounts, Data};
use crate::step::Distinct;
use crate::{Bound, Chip, Joules, Numerics, OpTime, Report};
use crate::{measured, step};
use halite::error::{Error, Result};
use halite::passes;
use halite::program::{Op, Program, StateKind};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Basis, Driver, Profile};

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Workload {
    /// Batch size in sequences.
    pub batch: u32,
    /// Prompt tokens per sequence.
    pub prompt: u32,
    /// Generated tokens per sequence.
    pub generate: u32,
    /// Maximum prompt tokens of a step: of one prompt, or of several short ones.
    pub chunk: u32,
}

impl Default for Workload {
    fn default() -> Workload {
        Workload { batch: 1, prompt: 512, generate: 128, chunk: 512 }
    }
}

halite::setters!(const Workload { batch: u32, prompt: u32, generate: u32, chunk: u32 });

impl Workload {
    /// Returns the positions of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for more than the model's context.
    pub fn positions(&self, context: u32) -> Result<u32> {
        let positions = self.prompt.saturating_add(self.generate);
        if positions > context {
            let expected = format!("at most the model's context of {context} tokens together");
            let got = format!("{} and {}", self.prompt, self.generate);
            return Err(Error::argument("prompt and generate", expected, got));
        }
        Ok(positions)
    }

    /// The number of prefill steps of some sequences; and of the middle one its sequences, the first position and the tokens of each.
    fn prefill(&self, sequences: u32) -> (f64, u32, (u32, u32)) {
        let (chunk, prompt) = (self.chunk.max(1), self.prompt.max(1));
        let steps = prompt.div_ceil(chunk);
        if steps > 1 {
            return (f64::from(sequences) * f64::from(steps), 1, ((steps - 1) / 2 * chunk, chunk));
        }
        let together = (chunk / prompt).clamp(1, sequences.max(1));
        (f64::from(sequences.div_ceil(together)), together, (0, prompt))
    }

    /// Tokens of a prefill step on each chip of a layout.
    pub fn prefill_tokens(&self, layout: Layout) -> u32 {
        self.spans(layout)[0].iter().fold(0, |sum, (_, tokens)| sum.saturating_add(*tokens))
    }

    /// Sequences of a copy of the model.
    fn sequences(&self, layout: Layout) -> u32 {
        let (each, parts) = self.parts(layout);
        each.saturating_mul(parts)
    }

    /// The position of the middle generated token.
    fn middle(&self) -> u32 {
        self.prompt + self.generate / 2
    }

    /// Divides the batch among replicas and parts for stages, two for each where exchanges overlap with computation: the sequences of a part, and the number of parts.
    fn parts(&self, layout: Layout) -> (u32, u32) {
        let batch = self.batch.div_ceil(layout.data.max(1)).max(1);
        let under_way = layout.pipeline.max(1).saturating_mul(if layout.overlap { 2 } else { 1 });
        let each = batch.div_ceil(under_way.min(batch));
        (each, batch.div_ceil(each))
    }

    /// Returns the bytes of each kind of data of all sequences, on a chip of each stage.
    fn amounts(&self, choices: Choices, stages: &[Stage]) -> Vec<Amounts> {
        let positions = u64::from(self.prompt) + u64::from(self.generate);
        let positions = positions.div_ceil(choices.layout.context.max(1).into());
        let sequences = u64::from(self.sequences(choices.layout));
        let [prompt, texts] = self.spans(choices.layout);
        let tokens = |spans: &[(u32, u32)]| spans.iter().fold(0u32, |sum, (_, n)| sum.saturating_add(*n));
        let most = tokens(&prompt).max(tokens(&texts));
        let of = |stage: &Stage| {
            stage.amounts(choices, stage.cache_bytes(positions, sequences), most, texts.len() as u32)
        };
        stages.iter().map(of).collect()
    }

    /// Returns the first chip of a model's, with its data in their places.
    ///
    /// # Errors
    /// As [`estimate`].
    pub fn chip(&self, choices: Choices, profile: &Profile, program: &Program) -> Result<Chip> {
        let mut chip = choices.chip(profile.clone())?;
        let stages = stages(program, choices.layout)?;
        if let (Some(stage), Some(amounts)) = (stages.first(), self.amounts(choices, &stages).first()) {
            choices.place(&mut chip, stage, *amounts);
        }
        Ok(chip)
    }

    /// The spans of a prefill step and of a decode step, on one of the chips that share positions. Each has its part of a prompt's tokens,
    /// which see as many positions on average as all, and its part of the positions that a generated token sees.
    fn spans(&self, layout: Layout) -> [Vec<(u32, u32)>; 2] {
        let (_, together, (start, tokens)) = self.prefill(self.sequences(layout));
        let context = layout.context.max(1);
        let own = tokens.div_ceil(context);
        let chunk = (start + (tokens - own) / 2, own);
        [vec![chunk; together as usize], vec![(self.middle() / context, 1); self.parts(layout).0 as usize]]
    }

    /// Total seconds, from those to the first token and those of a decode step.
    fn seconds(&self, first_token_s: f64, decode_s: f64) -> f64 {
        first_token_s + f64::from(self.generate.saturating_sub(1)) * decode_s
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
    /// Seconds between which it is expected to lie in 8 of 10 cases, by the errors of measured kernels, of other
    /// chips if need be; absent for CPUs.
    pub step_interval_s: Option<[f64; 2]>,
    /// Total seconds.
    pub seconds: f64,
    /// Generated tokens per second of all sequences, during decode.
    pub tokens_per_s: f64,
    /// Joules per generated token, prompts included; absent if the profile lacks the numbers.
    pub joules_per_token: Option<Joules>,
    /// Price per million generated tokens, prompts included; absent if the profile has no price.
    pub usd_per_million_tokens: Option<f64>,
    /// Bytes of weights and of the KV cache of all sequences, on the chip that needs most.
    pub need_bytes: u64,
    /// Bytes of a chip's memory that holds them.
    pub have_bytes: u64,
    /// How the model is divided over chips.
    pub layout: Layout,
    /// The share of a decode step in which chips exchange.
    pub exchange_fraction: f64,
    /// What every chip does alike because it cannot be divided, one line each.
    pub repeated: Vec<String>,
    /// Mean relative error of products on held-out shapes; absent if nothing was measured.
    pub error: Option<f64>,
    /// What is assumed of kernels without measurements, one line each.
    pub unmeasured: Vec<String>,
    /// Parts of the batch that a pipeline works on in turns, and the sequences of one.
    pub parts: (u32, u32),
    /// The ops of a prefill step, of all stages and of one chip in each.
    pub prefill: Report,
    /// The ops of a decode step. A pipeline works on several parts of the batch at the same time; these are the ops of one.
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
    /// The number's path, as in `halite profile NAME --numbers`.
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

/// Options of an estimate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choices {
    /// Format of products; `None`: the nearest to each weight's.
    pub products: Option<Dtype>,
    /// Format of activations in device memory between ops.
    pub activations: Dtype,
    /// Format of the weights of products in device memory, one of numbers of a chip; `None`: that of the file. For simulated chips.
    pub stored: Option<Dtype>,
    /// Format of the KV cache in device memory, one of numbers of a chip; `None`: that of the program. For simulated chips and GPUs.
    pub cache: Option<Dtype>,
    /// Whether two of each four weights of products are zeros, which a chip with a sparse rate neither stores nor multiplies. For
    /// simulated chips.
    pub sparse: bool,
    /// How the model is divided over chips.
    pub layout: Layout,
}

impl Default for Choices {
    fn default() -> Choices {
        Choices {
            products: None,
            activations: Dtype::Fp32,
            stored: None,
            cache: None,
            sparse: false,
            layout: Layout::default(),
        }
    }
}

halite::setters!(const Choices { products: Option<Dtype>, activations: Dtype, stored: Option<Dtype>, cache: Option<Dtype>, sparse: bool, layout: Layout });

impl Choices {
    /// The chip of a profile, for times. All data lie in its last memory: see [`Workload::chip`].
    ///
    /// # Errors
    /// As [`Chip::new`].
    pub fn chip(self, profile: impl Into<Arc<Profile>>) -> Result<Chip> {
        let mut chip = Chip::new(profile, Numerics::Exact, self.products)?;
        chip.activations = self.activations;
        chip.stored = self.stored;
        chip.sparse = self.sparse;
        let mut rates = chip.profile().matrix.iter().flat_map(|unit| &unit.rate);
        if self.sparse && !rates.any(|rate| rate.sparse_ops_per_s.is_some()) {
            let found = format!("{}, which has none", chip.profile().name);
            return Err(Error::argument("sparse", "a chip with a sparse_ops_per_s", found));
        }
        Ok(chip)
    }

    /// Bytes that a program's KV cache takes in device memory, per byte of its own format.
    pub(super) fn cache_fraction(self, program: &Program) -> f64 {
        let kept = program.states.iter().find(|state| state.kind != StateKind::Recurrent);
        kept.zip(self.cache).map_or(1.0, |(state, dtype)| dtype.bits() / file_bits(state.format))
    }

    /// Gives the data of a stage their formats and places on a chip.
    fn place(self, chip: &mut Chip, stage: &Stage, amounts: Amounts) {
        chip.cache_fraction = self.cache_fraction(&stage.program);
        chip.place(amounts);
    }

    /// Refuses what only a simulated chip has.
    fn check_device(self, profile: &Profile) -> Result<()> {
        let asked = [
            ("stored", self.stored.map(Dtype::name)),
            ("KV cache", self.cache.filter(|_| profile.driver == Driver::Cpu).map(Dtype::name)),
            ("sparse", self.sparse.then_some("2:4")),
        ];
        let refused = asked.into_iter().find_map(|(what, format)| Some((what, format?)));
        refused.map_or(Ok(()), |(what, format)| {
            let found = format!("{format} on {}, whose kernels have the formats of files", profile.name);
            Err(Error::argument(what, "another chip", found))
        })
    }
}

/// Ratios measured / simulated between which 8 of 10 times lie on a chip whose numbers were measured: of 61 products in three formats on
/// 13 x 10 and 11 x 10 cores of a p150 (`tests/silicon.rs`). For ops that are not products it is extrapolated. It holds if ops differ from
/// their simulation as products do, and all in the same way.
pub const SIMULATED_RATIOS: [f64; 2] = [0.93, 1.06];

/// The same for a chip without measurements: of the p150, and of the n150, to which nothing was fitted, each chip as much. Two chips of one
/// maker are not many: how wrong the numbers of a profile are comes on top.
pub const UNMEASURED_RATIOS: [f64; 2] = [0.94, 1.55];

/// The name of attention in reports.
const ATTEND: &str = "Attend";

/// The model that times steps.
pub(super) enum Timer<'a> {
    /// Commands of a simulated chip.
    Chip(Box<Chip>),
    /// Kernels of a device.
    Device(Device<'a>),
}

impl<'a> Timer<'a> {
    /// As [`Timer::new`], without a copy of the profile.
    fn on(profile: &'a Arc<Profile>, choices: Choices) -> Result<Timer<'a>> {
        match profile.driver {
            Driver::Sim => Ok(Timer::Chip(Box::new(choices.chip(profile.clone())?))),
            Driver::Gpu | Driver::Cpu => Timer::new(profile, choices),
        }
    }

    pub(super) fn new(profile: &'a Profile, choices: Choices) -> Result<Timer<'a>> {
        Ok(match profile.driver {
            Driver::Sim => Timer::Chip(Box::new(choices.chip(profile.clone())?)),
            Driver::Gpu | Driver::Cpu => {
                choices.check_device(profile)?;
                Timer::Device(Device::new(profile, choices.products)?.with_cache(choices.cache))
            }
        })
    }

    pub(super) fn report(&self, program: &Program, spans: &[(u32, u32)]) -> Result<Report> {
        match self {
            Timer::Chip(chip) => step::time(chip, program, spans, true),
            Timer::Device(device) => device.time(program, spans),
        }
    }

    /// Returns the seconds of a step's attention, or of its other ops, as [`Timer::seconds`].
    fn part_s(&self, program: &Program, spans: &[(u32, u32)], is_attention: bool) -> Result<f64> {
        match self {
            Timer::Chip(chip) => step::closed_part(chip, program, spans, is_attention),
            Timer::Device(..) => {
                let report = self.report(program, spans)?;
                let ops = report.ops.iter().filter(|op| (op.name == ATTEND) == is_attention);
                Ok(ops.map(|op| op.time.seconds).sum())
            }
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
}

/// A model on chips: what runs where, and what times it.
pub(super) struct System<'a> {
    /// One for all stages, or one for each where the data of each have places of their own.
    timers: Vec<Timer<'a>>,
    fabric: Option<Fabric>,
    pub(super) layout: Layout,
    pub(super) stages: Cow<'a, [Stage]>,
    activation_bytes: f64,
    /// Seconds of the host for a step of a stage.
    host_s: f64,
}

/// An exchange between chips.
pub(super) struct Timed {
    name: &'static str,
    /// Bytes of the whole tensor.
    bytes: f64,
    seconds: f64,
    /// Joules of one chip.
    joules: f64,
}

/// The time of a step.
pub(super) struct StepTime {
    /// Seconds from the start of a part of the batch to its end.
    latency_s: f64,
    /// Seconds of the slowest stage for a part.
    pace_s: f64,
}

impl<'a> System<'a> {
    pub(super) fn new(
        profile: &'a Profile,
        choices: Choices,
        stages: impl Into<Cow<'a, [Stage]>>,
        amounts: &[Amounts],
    ) -> Result<System<'a>> {
        System::of(Timer::new(profile, choices)?, profile, choices, stages, amounts)
    }

    fn of(
        timer: Timer<'a>,
        profile: &Profile,
        choices: Choices,
        stages: impl Into<Cow<'a, [Stage]>>,
        amounts: &[Amounts],
    ) -> Result<System<'a>> {
        let (layout, stages) = (choices.layout, stages.into());
        let several = layout.of_copy() > 1;
        let fabric = several.then(|| Fabric::new(profile)).transpose()?;
        let chips = layout.of_copy();
        if let Some(most) = fabric.as_ref().and_then(Fabric::most_chips).filter(|most| chips > *most) {
            let expected = format!("at most the {most} that {} joins", profile.name);
            return Err(Error::argument("chips", expected, chips));
        }
        let activation_bytes = match &timer {
            Timer::Chip(chip) => chip.activations.bits() / 8.0,
            // Devices that are not simulated keep activations in 16 bits.
            Timer::Device(..) => 2.0,
        };
        let timers = match timer {
            Timer::Chip(chip) => {
                let placed = |(stage, amounts): (&Stage, &Amounts)| {
                    let mut chip = chip.clone();
                    choices.place(&mut chip, stage, *amounts);
                    Timer::Chip(chip)
                };
                // With one memory, all stages have the same places.
                let chips = if profile.holding().count() > 1 { stages.len() } else { 1 };
                stages.iter().zip(amounts).take(chips).map(placed).collect()
            }
            timer => vec![timer],
        };
        Ok(System { timers, fabric, layout, stages, activation_bytes, host_s: profile.host_s() })
    }

    fn timer(&self, stage: usize) -> &Timer<'a> {
        &self.timers[stage % self.timers.len()]
    }

    /// Returns a stage's exchanges.
    fn exchanges(&self, stage: &Stage, spans: &[(u32, u32)]) -> Vec<Timed> {
        let mut all = self.exchanged(stage, spans);
        all.extend(self.exchanged_positions(stage, spans));
        all
    }

    /// Returns what chips that share layers exchange in a stage, and send to the next one.
    fn exchanged(&self, stage: &Stage, spans: &[(u32, u32)]) -> Vec<Timed> {
        let Some(fabric) = &self.fabric else { return Vec::new() };
        let tokens = spans.iter().fold(0u32, |sum, (_, len)| sum.saturating_add(*len));
        let rows = |dim| passes::rows(dim, tokens, spans.len() as u32) as f64;
        let bytes = |rows: f64, cols: u32| rows * f64::from(cols) * self.activation_bytes;
        let exchanges = stage.exchanges.iter().map(|e| {
            let bytes = bytes(rows(e.rows), e.cols);
            let chips = self.layout.tensor;
            let seconds = fabric.seconds(e.collective, bytes, chips);
            let joules = fabric.joules(e.collective, bytes, chips);
            Timed { name: e.collective.name(), bytes, seconds, joules }
        });
        let sent = (stage.sent_cols > 0).then(|| {
            // Each chip sends its part to its counterpart, which are as far apart as a stage is large.
            let bytes = bytes(f64::from(tokens), stage.sent_cols);
            let (chips, apart) = (self.layout.tensor, self.layout.of_stage());
            let part = bytes / f64::from(chips);
            let seconds = fabric.send_s(part, apart) + fabric.seconds(Collective::AllGather, bytes, chips);
            let joules = fabric.send_j(part, apart) + fabric.joules(Collective::AllGather, bytes, chips);
            Timed { name: "send", bytes, seconds, joules }
        });
        exchanges.chain(sent).collect()
    }

    /// Returns what chips with different positions exchange in a stage.
    fn exchanged_positions(&self, stage: &Stage, spans: &[(u32, u32)]) -> Vec<Timed> {
        // Designs are timed by the thousand, few of them so.
        let Some(fabric) = self.fabric.as_ref().filter(|_| self.layout.context > 1) else {
            return Vec::new();
        };
        let ops = stage.program.greedy_ops();
        ops.flat_map(|(_, op)| self.of_positions(fabric, stage, op, spans)).collect()
    }

    /// Returns what chips with different positions exchange for an attention. Of generated tokens, they add up their results, of which each
    /// has a largest score and a sum of exponentials. Of prompts, they pass keys and values around, or queries and results, whichever is quicker.
    fn of_positions(&self, fabric: &Fabric, stage: &Stage, op: &Op, spans: &[(u32, u32)]) -> Vec<Timed> {
        let Layout { context, tensor, .. } = self.layout;
        let Op::Attend { state, heads, .. } = op else { return Vec::new() };
        let Some(state) = stage.program.states.get(state.0 as usize) else { return Vec::new() };
        let timed = |exchanged: &[(Collective, f64)]| {
            let sum = |of: &dyn Fn(&(Collective, f64)) -> f64| exchanged.iter().map(of).sum();
            Timed {
                name: "positions",
                bytes: sum(&|(_, bytes)| *bytes),
                seconds: sum(&|(collective, bytes)| {
                    fabric.seconds_apart(*collective, *bytes, context, tensor)
                }),
                joules: sum(&|(collective, bytes)| fabric.joules_apart(*collective, *bytes, context, tensor)),
            }
        };
        let queries = |tokens: u32, dim: u32| {
            f64::from(tokens) * f64::from(*heads) * f64::from(dim) * self.activation_bytes
        };
        let results = |tokens: u32| queries(tokens, state.value_dim.saturating_add(2));
        let (texts, prompts): (Vec<_>, Vec<_>) = spans.iter().partition(|(_, tokens)| *tokens == 1);
        let merged =
            (!texts.is_empty()).then(|| timed(&[(Collective::AllReduce, results(texts.len() as u32))]));
        let passed = prompts.into_iter().map(|&(start, own)| {
            let tokens = own.saturating_mul(context);
            let positions = f64::from(start.saturating_sub((tokens - own) / 2)) + f64::from(tokens);
            let values = f64::from(state.kv_heads) * f64::from(state.key_only() + state.value_dim);
            let kv_bytes =
                positions * values * state.format.block_bytes() as f64 / state.format.block_len() as f64;
            let keys = timed(&[(Collective::AllGather, kv_bytes)]);
            let queries = timed(&[
                (Collective::AllGather, queries(tokens, state.key_dim)),
                (Collective::ReduceScatter, results(tokens)),
            ]);
            if keys.seconds < queries.seconds { keys } else { queries }
        });
        merged.into_iter().chain(passed).collect()
    }

    /// Returns the time of a step, its ops and its seconds of exchanges. `seconds` times the ops of a stage.
    fn step(
        &self,
        spans: &[(u32, u32)],
        mut ops_s: impl FnMut(&Timer<'a>, &Stage, &[(u32, u32)], &[Timed]) -> Result<f64>,
    ) -> Result<StepTime> {
        let mut time = StepTime { latency_s: 0.0, pace_s: 0.0 };
        for (number, stage) in self.stages.iter().enumerate() {
            let exchanges = self.exchanges(stage, spans);
            let exchanged = exchanges.iter().fold(0.0, |sum, exchange| sum + exchange.seconds);
            let computed = self.host_s + ops_s(self.timer(number), stage, spans, &exchanges)?;
            time.latency_s += computed + exchanged;
            // With overlap, one part computes while another one exchanges.
            let pace_s = if self.layout.overlap { computed.max(exchanged) } else { computed + exchanged };
            time.pace_s = time.pace_s.max(pace_s);
        }
        Ok(time)
    }

    /// Returns the ops of a step, and its time by the event engine.
    pub(super) fn report(&self, spans: &[(u32, u32)]) -> Result<(Report, StepTime)> {
        let mut all = Report::default();
        let time = self.step(spans, |timer, stage, spans, exchanges| {
            let report = timer.report(&stage.program, spans)?;
            let seconds = report.total().seconds;
            for op in &report.ops {
                all.add_all(op);
            }
            if self.host_s > 0.0 {
                all.add("host", OpTime::of_host(self.host_s));
            }
            for Timed { name, bytes, seconds, joules } in exchanges {
                let joules = Some(Joules { links: *joules, ..Joules::default() });
                let time = OpTime { seconds: *seconds, exchanged_bytes: *bytes, joules, ..OpTime::default() };
                all.add(name, time);
            }
            Ok(seconds)
        })?;
        Ok((all, time))
    }

    /// Returns the seconds of a step's attention, or of all else, by the closed form: those that chips and their host compute, and those
    /// that chips exchange for it.
    pub(super) fn part_s(&self, spans: &[(u32, u32)], is_attention: bool) -> Result<[f64; 2]> {
        let mut sum = [0.0; 2];
        for (number, stage) in self.stages.iter().enumerate() {
            let host_s = if is_attention { 0.0 } else { self.host_s };
            sum[0] += host_s + self.timer(number).part_s(&stage.program, spans, is_attention)?;
            let exchanges = match is_attention {
                true => self.exchanged_positions(stage, spans),
                false => self.exchanged(stage, spans),
            };
            sum[1] += exchanges.iter().map(|exchange| exchange.seconds).sum::<f64>();
        }
        Ok(sum)
    }

    /// Returns the largest mean error of a stage's kernels, absent if some were not measured, and what is assumed of those.
    fn error(&self, steps: &[&[(u32, u32)]]) -> Result<(Option<f64>, Vec<String>)> {
        let mut most = Some(0.0f64);
        let mut assumed: Vec<String> = Vec::new();
        for (number, stage) in self.stages.iter().enumerate() {
            let (error, lines) = self.timer(number).error(&stage.program, steps)?;
            most = most.zip(error).map(|(most, error)| most.max(error));
            lines.into_iter().for_each(|line| {
                if !assumed.contains(&line) {
                    assumed.push(line);
                }
            });
        }
        Ok((most, assumed))
    }

    /// Returns the seconds between which a decode step of all sequences is expected to lie in 8 of 10 cases, in the proportion of a
    /// part of the batch, which takes `part_s`, and `exchanged_s` of these for exchanges.
    fn interval_s(
        &self,
        part: &[(u32, u32)],
        [exchanged_s, part_s]: [f64; 2],
        step_s: f64,
    ) -> Result<Option<[f64; 2]>> {
        let mut computed = [0.0; 2];
        match self.timer(0) {
            Timer::Chip(chip) => {
                let measured = chip.profile().calibration.as_ref().is_some_and(|c| !c.matmul.is_empty());
                let ratios = if measured { SIMULATED_RATIOS } else { UNMEASURED_RATIOS };
                computed = ratios.map(|ratio| ratio * (part_s - exchanged_s));
            }
            Timer::Device(device) => {
                for stage in self.stages.iter() {
                    let Some(ends) = device.interval_s(&stage.program, part)? else { return Ok(None) };
                    (0..2).for_each(|i| computed[i] += ends[i]);
                }
            }
        }
        Ok(Some(computed.map(|seconds| (exchanged_s + seconds) / part_s * step_s)))
    }

    /// Returns the seconds to the first token of every sequence, and of a decode step of all.
    fn times(&self, workload: &Workload, prefill: &StepTime, decode: &StepTime) -> (f64, f64) {
        let (_, parts) = workload.parts(self.layout);
        let (steps, ..) = workload.prefill(workload.sequences(self.layout));
        let first_token_s = prefill.latency_s + (steps - 1.0) * prefill.pace_s;
        (first_token_s, decode.latency_s.max(f64::from(parts) * decode.pace_s))
    }
}

/// Estimates a workload of a program on chips of a profile.
///
/// # Errors
/// Errors of [`Chip::new`] and [`Device::new`], ops that do not fit the chip, and layouts that the model or the links do not
/// have.
pub fn estimate(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
) -> Result<Estimate> {
    let layout = choices.layout;
    let stages = &stages(program, layout)?;
    let amounts = workload.amounts(choices, stages);
    let system = System::new(profile, choices, stages, &amounts)?;
    let [prompt, spans] = workload.spans(layout);
    let (error, mut unmeasured) = system.error(&[&prompt, &spans])?;
    let (prefill, prefill_time) = system.report(&prompt)?;
    let (decode, decode_time) = system.report(&spans)?;
    let (first_token_s, step_s) = system.times(workload, &prefill_time, &decode_time);
    let slowed = |name: &str, report: &Report, time: &StepTime| {
        let joules = report.total().joules.map(|joules| joules.total() / stages.len() as f64);
        power_limit(profile, joules? / time.pace_s).map(|(watts, times)| {
            let line = format!(
                "power: a {name} step would take {watts:.0} W, more than power.tdp_w; it takes {times:.2} times as long"
            );
            (times, line)
        })
    };
    let limits = [slowed("prefill", &prefill, &prefill_time), slowed("decode", &decode, &decode_time)];
    let times = limits.each_ref().map(|limit| limit.as_ref().map_or(1.0, |(times, _)| *times));
    let (first_token_s, step_s) = (times[0] * first_token_s, times[1] * step_s);
    unmeasured.extend(limits.into_iter().flatten().map(|(_, line)| line));
    let seconds = workload.seconds(first_token_s, step_s);
    let tokens = f64::from(workload.batch) * f64::from(workload.generate);
    let chips = f64::from(layout.chips());
    let (each, parts) = workload.parts(layout);
    let exchanges = stages.iter().flat_map(|stage| system.exchanges(stage, &spans));
    // A sum of nothing would be -0.
    let exchanged = exchanges.fold(0.0, |sum, exchange| sum + exchange.seconds);
    // Of all chips: each of a stage does the same work, and each replica all of it.
    let alike = f64::from(layout.of_stage()) * f64::from(layout.data);
    let joules = prefill.total().joules.zip(decode.total().joules).and_then(|(prefill, decode)| {
        let prompts = workload.prefill(workload.sequences(layout)).0 * prefill;
        let generated = (f64::from(workload.generate.saturating_sub(1)) * f64::from(parts)) * decode;
        let idle = profile.idle_joules(chips * seconds)?;
        Some(Joules { idle, ..alike * (prompts + generated) })
    });
    let mut repeated: Vec<String> = stages.iter().flat_map(|stage| stage.repeated.clone()).collect();
    repeated.dedup();
    Ok(Estimate {
        first_token_s,
        step_s,
        step_interval_s: system.interval_s(&spans, [exchanged, decode_time.latency_s], step_s)?,
        seconds,
        tokens_per_s: f64::from(workload.batch) / step_s,
        joules_per_token: joules.map(|joules| tokens.recip() * joules),
        usd_per_million_tokens: usd_per_s(profile).map(|usd| 1e6 * chips * usd * seconds / tokens),
        need_bytes: need_bytes(&amounts),
        have_bytes: profile.holding_bytes(),
        layout,
        exchange_fraction: exchanged / decode_time.latency_s,
        repeated,
        error,
        unmeasured,
        parts: (parts, each),
        shares: decode.total().shares().to_vec(),
        prefill,
        decode,
        sensitivities: Quick::new(choices, stages, workload)?.sensitivities(profile)?,
    })
}

/// Returns the watts of a chip whose work takes `working_w`, and how many times as long the work takes within the chip's power; `None` if
/// it is within. A lower clock takes as much energy here.
fn power_limit(profile: &Profile, working_w: f64) -> Option<(f64, f64)> {
    let power = profile.power.as_ref()?;
    let idle_w = power.idle_w.as_ref().map_or(0.0, |idle| idle.value);
    let most_w = (power.tdp_w.value - idle_w).max(f64::MIN_POSITIVE);
    (working_w > most_w).then_some((working_w + idle_w, working_w / most_w))
}

/// Returns the bytes of weights and of the KV cache on the chip that needs most.
fn need_bytes(amounts: &[Amounts]) -> u64 {
    let bytes = |amounts: &Amounts| (amounts.of(Data::Weights) + amounts.of(Data::Cache)) as u64;
    amounts.iter().map(bytes).max().unwrap_or(0)
}

/// Returns US$ per second: rent, or depreciation and energy at the chip's full power.
pub(super) fn usd_per_s(profile: &Profile) -> Option<f64> {
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

/// A workload on a divided model, prepared to be timed on many chips by the closed form: a quick approximation of
/// [`estimate`].
#[derive(Debug)]
pub struct Quick<'a> {
    choices: Choices,
    stages: &'a [Stage],
    workload: Workload,
    spans: [Vec<(u32, u32)>; 2],
    /// The ops of a prefill step of each stage, and then of a decode step.
    distinct: Distinct,
    /// The same for devices that are not simulated.
    works: Works,
    /// Of each stage.
    amounts: Vec<Amounts>,
}

/// The times of a workload.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Times {
    /// Seconds until every sequence has its first token.
    pub first_token_s: f64,
    /// Seconds of the middle decode step, of one token per sequence.
    pub step_s: f64,
    /// Total seconds.
    pub seconds: f64,
}

impl<'a> Quick<'a> {
    /// Prepares a workload. `stages` are those of `choices.layout`.
    ///
    /// # Errors
    /// [`Error::Program`] for an op that is not simulated.
    pub fn new(choices: Choices, stages: &'a [Stage], workload: &Workload) -> Result<Quick<'a>> {
        let spans = workload.spans(choices.layout);
        let (mut distinct, mut works) = (Distinct::default(), Works::default());
        for (spans, stage) in spans.iter().flat_map(|spans| stages.iter().map(move |stage| (spans, stage))) {
            distinct.add(&stage.program, spans, true)?;
            works.add(&stage.program, spans);
        }
        let amounts = workload.amounts(choices, stages);
        Ok(Quick { choices, stages, workload: *workload, spans, distinct, works, amounts })
    }

    /// Returns the times on the chips of a profile.
    ///
    /// # Errors
    /// As [`estimate`].
    pub fn times(&self, profile: &Profile) -> Result<Times> {
        self.times_on(&Arc::new(profile.clone()))
    }

    /// As [`Quick::times`], without a copy of the profile.
    pub(super) fn times_on(&self, profile: &Arc<Profile>) -> Result<Times> {
        let timer = Timer::on(profile, self.choices)?;
        let system = System::of(timer, profile, self.choices, self.stages, &self.amounts)?;
        let chips = system.timers.iter().filter_map(|timer| match timer {
            Timer::Chip(chip) => Some(&**chip),
            Timer::Device(..) => None,
        });
        let chips: Vec<&Chip> = chips.collect();
        let closed_s = match &system.timers[..] {
            [Timer::Device(device)] => device.seconds(&self.works)?,
            _ => self.distinct.closed_s(&chips)?,
        };
        let mut closed_s = closed_s.into_iter();
        let mut step =
            |spans: &[(u32, u32)]| system.step(spans, |_, _, _, _| Ok(closed_s.next().unwrap_or(f64::NAN)));
        let (prefill, decode) = (step(&self.spans[0])?, step(&self.spans[1])?);
        let (first_token_s, step_s) = system.times(&self.workload, &prefill, &decode);
        Ok(Times { first_token_s, step_s, seconds: self.workload.seconds(first_token_s, step_s) })
    }

    /// Returns the bytes of weights and of the KV cache of all sequences, on the chip that needs most.
    pub(super) fn need_bytes(&self) -> u64 {
        need_bytes(&self.amounts)
    }

    /// Returns the figures on the chips of a profile.
    pub(super) fn figures(&self, profile: &Arc<Profile>) -> Result<Figures> {
        let Times { first_token_s, step_s, seconds } = self.times_on(profile)?;
        let Workload { batch, generate, .. } = self.workload;
        let tokens = f64::from(batch) * f64::from(generate);
        let layout = self.choices.layout;
        let usd = usd_per_s(profile).map(|usd| 1e6 * f64::from(layout.chips()) * usd * seconds / tokens);
        Ok(Figures {
            layout,
            batch,
            first_token_s,
            step_s,
            seconds,
            usd_per_million_tokens: usd,
            need_bytes: self.need_bytes(),
            have_bytes: profile.holding_bytes(),
        })
    }

    /// Returns the sensitivity of the total time to each number of a profile, the largest first.
    fn sensitivities(&self, profile: &Profile) -> Result<Vec<Sensitivity>> {
        let before = self.times(profile)?.seconds;
        let mut found = Vec::new();
        let mut variant = Arc::new(profile.clone());
        for (path, quantity) in &profile.quantities {
            // Counts are not varied.
            let counts = [
                "clusters",
                "tiles_per_cluster",
                "engines",
                "rows",
                "columns",
                "capacity_bytes",
                "chips",
                "links",
            ];
            // Errors change no time.
            if path.contains(".errors.") || path.rsplit('.').next().is_some_and(|key| counts.contains(&key)) {
                continue;
            }
            Arc::make_mut(&mut variant).set(path, quantity.value * CHANGE)?;
            let after = self.times_on(&variant)?.seconds;
            Arc::make_mut(&mut variant).set(path, quantity.value)?;
            let exponent = (after / before).ln() / CHANGE.ln();
            if exponent.abs() > 1e-4 {
                found.push(Sensitivity { path: path.clone(), basis: quantity.basis, exponent });
            }
        }
        found.sort_by(|a, b| b.exponent.abs().total_cmp(&a.exponent.abs()));
        Ok(found)
    }
}

/// Factor by which a number is changed to measure the sensitivity.
const CHANGE: f64 = 1.05;

/// Estimates a workload with the best of all layouts on `chips` chips, and returns these; without a number of chips, with the layout
/// of `choices`.
///
/// # Errors
/// As [`estimate`] and [`candidates`].
pub fn estimate_best(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
    chips: Option<u32>,
    best: &'static Metric,
) -> Result<(Estimate, Vec<Figures>)> {
    let found =
        chips.map(|chips| candidates(profile, choices, program, workload, chips, best)).transpose()?;
    let found = found.unwrap_or_default();
    let layout = found.first().map_or(choices.layout, |best| best.layout);
    Ok((estimate(profile, choices.layout(layout), program, workload)?, found))
}

/// Returns the layouts of a workload on `chips` chips by the closed form: those that fit first, the best first by a metric.
/// `choices.layout` fixes the numbers that are not 0.
///
/// # Errors
/// Why the first layout is not possible, if none is.
pub fn candidates(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
    chips: u32,
    best: &'static Metric,
) -> Result<Vec<Figures>> {
    let profile = Arc::new(profile.clone());
    let mut all = Vec::new();
    let mut failed = None;
    for layout in layouts(program, chips, choices.layout) {
        let found = stages(program, layout)
            .and_then(|stages| Quick::new(choices.layout(layout), &stages, workload)?.figures(&profile));
        match found {
            Ok(candidate) => all.push(candidate),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        Some(error) if all.is_empty() => Err(error),
        _ if all.is_empty() => {
            let ways = choices.layout.ways();
            let given = ways.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name} {n}"));
            let expected = format!("numbers that divide {chips} chips, and ep that divides tp");
            Err(Error::argument("layout", expected, given.collect::<Vec<_>>().join(", ")))
        }
        _ => {
            all.sort_by(|a, b| b.fits().cmp(&a.fits()).then(best.order(a, b)));
            Ok(all)
        }
    }
}

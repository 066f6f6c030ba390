//! Times programs on any backend, by the backend's own clock, and measures its ceilings with its own kernels.
//!
//! A [`Trial`] is a program with random weights, a filled KV cache and random inputs: a single op, cut out of
//! a model with [`passes::fragment`], or a program from a [`Builder`]. [`Ceilings`] are the rates of four ops
//! that are easy to run fast. They say what a backend's kernels reach, which may be less than its hardware
//! can.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Instant;

use halite_kernels::formats::{Format, Layout};

use crate::backend::{
    Backend, Bindings, Buffer, Cancel, Clock, Limits, Plan, Span, Step, Ticket, Timing, Usage, prepare,
    upload,
};
use crate::conformance::random_weight;
use crate::cost::Rates;
use crate::error::{Error, Result};
use crate::passes;
use crate::program::{Builder, Dim, Index, Op, PAGE_POSITIONS, Program, State, TensorId, WeightInfo};
use crate::rng::SplitMix64;

/// The step of a trial, and its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrialOptions {
    /// Tokens of the step, all of one sequence.
    pub tokens: u32,
    /// Tokens that have outputs: the last ones.
    pub outputs: u32,
    /// Positions in the KV cache before the step's tokens.
    pub depth: u32,
    /// Copies of weights and KV cache. Runs take them in turn: if all copies together are larger than the
    /// caches, each run reads memory.
    pub copies: u32,
}

impl Default for TrialOptions {
    /// One token with an output, an empty cache, one copy.
    fn default() -> Self {
        TrialOptions { tokens: 1, outputs: 1, depth: 0, copies: 1 }
    }
}

crate::setters!(const TrialOptions { tokens: u32, outputs: u32, depth: u32, copies: u32 });

/// A program on a backend with random data, ready to be timed.
pub struct Trial {
    program: Arc<Program>,
    plan: Box<dyn Plan>,
    copies: Vec<Copy>,
    io: Vec<Buffer>,
    /// The copy that the next run takes.
    next: usize,
    options: TrialOptions,
    tables: Vec<Vec<u32>>,
    ids: Vec<u32>,
    outputs: Vec<u32>,
    cancel: Cancel,
}

/// One copy of weights and KV cache.
struct Copy {
    weights: Vec<Buffer>,
    states: Vec<Buffer>,
}

/// The time of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Measured {
    /// Median seconds of a run, by `clock`.
    pub seconds: f64,
    /// Seconds of the fastest sample.
    pub least_seconds: f64,
    /// Seconds of the slowest sample.
    pub most_seconds: f64,
    /// Range of the middle half of the samples, as a share of the median.
    pub spread: f64,
    /// Number of samples.
    pub samples: u32,
    /// Runs of each sample. Short runs are timed together.
    pub runs_per_sample: u32,
    /// The backend's clock.
    pub clock: Clock,
    /// Median seconds of a run by the host's clock.
    pub host_seconds: f64,
}

/// Samples of a measurement, if there is time for them.
const SAMPLES: u32 = 10;
/// Fewest samples of a measurement that does not take much longer than wanted.
const FEWEST_SAMPLES: usize = 5;
/// How much longer a measurement may take to have [`FEWEST_SAMPLES`].
const PATIENCE: f64 = 10.0;

impl Trial {
    /// Prepares a program and fills its memory. The program is one that the backend reads: see
    /// [`passes::for_backend`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the backend lacks ops of the program, or errors of the device.
    pub fn new(backend: &dyn Backend, program: &Program, options: TrialOptions) -> Result<Trial> {
        let program = Arc::new(program.clone());
        let TrialOptions { tokens, depth, .. } = options;
        let outputs = options.outputs.min(tokens);
        let limits = Limits { tokens, outputs: outputs.max(1) };
        let plan = prepare(backend, &program, limits)?;
        let mut rng = SplitMix64::new(1);
        let pages = u64::from(depth.saturating_add(tokens).div_ceil(PAGE_POSITIONS));
        let patterns = program.weights.iter().map(|&id| weight_pattern(&program, id, &mut rng));
        let patterns = patterns.collect::<Result<Vec<_>>>()?;
        let pages_of: Vec<Vec<u8>> = program.states.iter().map(|state| page(state, &mut rng)).collect();
        let mut copies = Vec::new();
        for _ in 0..options.copies.max(1) {
            let weights = program.weights.iter().zip(&patterns).map(|(&id, pattern)| {
                filled(backend, program.fixed_bytes(id).unwrap_or(0), Usage::Weight, pattern)
            });
            let states = program.states.iter().zip(&pages_of);
            let states =
                states.map(|(state, page)| filled(backend, pages * state.page_bytes(), Usage::State, page));
            copies.push(Copy {
                weights: weights.collect::<Result<_>>()?,
                states: states.collect::<Result<_>>()?,
            });
        }
        let mut io = Vec::new();
        for &id in &program.io {
            let words = inputs(&program, id, limits, &mut rng);
            let buffer = backend.alloc(4 * words.len() as u64, Usage::Io)?;
            upload(backend, &buffer, 0, bytemuck::cast_slice(&words))?;
            io.push(buffer);
        }
        let vocab = u64::from(vocab(&program)).max(1);
        Ok(Trial {
            plan,
            copies,
            io,
            next: 0,
            options,
            tables: vec![(0..pages as u32).collect(); program.windows.len()],
            ids: (0..tokens).map(|_| (rng.next() % vocab) as u32).collect(),
            outputs: (tokens - outputs..tokens).collect(),
            cancel: Cancel::default(),
            program,
        })
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Returns a handle that stops the work from another thread.
    pub fn cancel_handle(&self) -> Cancel {
        self.cancel.clone()
    }

    fn submit(&mut self) -> Result<Ticket> {
        let Some(Copy { weights, states }) = self.copies.get(self.next) else {
            return Err(Error::argument("trial", "at least one copy of its memory", 0));
        };
        let spans = [Span { tables: &self.tables, start: self.options.depth, len: self.options.tokens }];
        let step = Step { spans: &spans, tokens: &self.ids, outputs: &self.outputs, cancel: &self.cancel };
        let bindings = Bindings { weights, states, io: &self.io };
        let ticket = self.plan.submit(&step, 0..self.program.segments.len(), &bindings);
        self.next = (self.next + 1) % self.copies.len();
        ticket
    }

    /// Runs once, and returns the time by the backend's clock and by the host's.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn run(&mut self) -> Result<(Timing, Duration)> {
        let start = Instant::now();
        let ticket = self.submit()?;
        let timing = self.plan.wait(ticket)?;
        Ok((timing, start.elapsed()))
    }

    /// Runs `runs` times, and returns the seconds of a run by `clock` and by the host's. Returns `None` if
    /// the backend used another clock.
    fn sample(&mut self, runs: u32, clock: Clock) -> Result<Option<(f64, f64)>> {
        let start = Instant::now();
        let mut elapsed = Duration::ZERO;
        if clock == Clock::Host {
            // Without waiting in between: the host's part of a submission may overlap with the last run.
            let mut last = None;
            for _ in 0..runs {
                last = Some(self.submit()?);
            }
            if let Some(last) = last {
                self.plan.wait(last)?;
            }
            elapsed = start.elapsed();
        } else {
            for _ in 0..runs {
                let (timing, _) = self.run()?;
                if timing.clock != clock {
                    return Ok(None);
                }
                elapsed += timing.elapsed;
            }
        }
        let of_one = |total: Duration| total.as_secs_f64() / f64::from(runs.max(1));
        Ok(Some((of_one(elapsed), of_one(start.elapsed()))))
    }

    /// Times runs for about `seconds` of the host's time, after a warm-up. Simulated time does not vary: one
    /// run is enough.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn measure(&mut self, seconds: f64) -> Result<Measured> {
        let (first, host) = self.run()?;
        let once = first.elapsed.as_secs_f64();
        let simulated = Measured {
            seconds: once,
            least_seconds: once,
            most_seconds: once,
            spread: 0.0,
            samples: 1,
            runs_per_sample: 1,
            clock: first.clock,
            host_seconds: host.as_secs_f64(),
        };
        if first.clock == Clock::Simulated {
            return Ok(simulated);
        }
        let (second, host) = self.run()?;
        let clock = second.clock;
        let runs = seconds / f64::from(SAMPLES) / host.as_secs_f64().max(1e-9);
        let runs = runs.clamp(1.0, 100_000.0) as u32;
        let (mut times, mut host_times) = (Vec::new(), Vec::new());
        let start = Instant::now();
        loop {
            if let Some((time, host_time)) = self.sample(runs, clock)? {
                times.push(time);
                host_times.push(host_time);
            }
            let spent = start.elapsed().as_secs_f64();
            if spent >= seconds && (times.len() >= FEWEST_SAMPLES || spent >= PATIENCE * seconds) {
                break;
            }
        }
        times.sort_by(f64::total_cmp);
        host_times.sort_by(f64::total_cmp);
        let middle = quantile(&times, 0.5);
        if times.is_empty() {
            // The device's clock failed in every sample; the second run is all there is.
            let seconds = second.elapsed.as_secs_f64();
            return Ok(Measured {
                seconds,
                least_seconds: seconds,
                most_seconds: seconds,
                clock,
                ..simulated
            });
        }
        Ok(Measured {
            seconds: middle,
            least_seconds: quantile(&times, 0.0),
            most_seconds: quantile(&times, 1.0),
            spread: (quantile(&times, 0.75) - quantile(&times, 0.25)) / middle.max(f64::MIN_POSITIVE),
            samples: times.len() as u32,
            runs_per_sample: runs,
            clock,
            host_seconds: quantile(&host_times, 0.5),
        })
    }
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trial")
            .field("program", &self.program.name)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// Returns the value at a share of sorted values, between two of them if need be; 0 if there are none.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => low + (high - low) * at.fract(),
        _ => 0.0,
    }
}

/// Bytes of weights to generate. Larger weights repeat them: no kernel's time depends on values.
const PATTERN_BYTES: u64 = 1 << 20;

/// Returns random bytes of a weight, to repeat until it is full.
fn weight_pattern(program: &Program, id: TensorId, rng: &mut SplitMix64) -> Result<Vec<u8>> {
    let t = program.tensor(id);
    let (Dim::Fixed(rows), Some(bytes)) = (t.rows, program.fixed_bytes(id)) else { return Ok(Vec::new()) };
    // Whole groups of interleaved rows, so that scales stay where they belong.
    let group = halite_kernels::formats::ROWS as u64;
    let row_bytes = bytes / (u64::from(rows) * u64::from(t.experts)).max(1);
    let few = (PATTERN_BYTES / row_bytes.max(1)).next_multiple_of(group);
    let mut part = program.clone();
    let whole_groups = t.layout == Layout::Rows || u64::from(rows).is_multiple_of(group);
    if few < u64::from(rows) && whole_groups {
        part.tensors[id.0 as usize].rows = Dim::Fixed(few as u32);
    }
    if whole_groups {
        part.tensors[id.0 as usize].experts = 1;
    }
    let plain = random_weight(&part, id, rng);
    if t.layout == Layout::Rows {
        return Ok(plain);
    }
    let mut out = vec![0; plain.len()];
    let matrix = plain.len() / part.tensor(id).experts.max(1) as usize;
    for (rows, out) in plain.chunks_exact(matrix.max(1)).zip(out.chunks_exact_mut(matrix.max(1))) {
        let interleaved = t.format.interleave(t.cols as usize, rows, out);
        interleaved.map_err(|e| Error::Program(format!("`{}`: {e}", t.name)))?;
    }
    Ok(out)
}

/// Returns a page of a KV cache with values from -1 to 1.
fn page(state: &State, rng: &mut SplitMix64) -> Vec<u8> {
    let bytes = state.page_bytes() as usize;
    let value = |rng: &mut SplitMix64| 2.0 * rng.unit() - 1.0;
    match state.format {
        Format::F32 => (0..bytes / 4).flat_map(|_| value(rng).to_le_bytes()).collect(),
        Format::F16 => (0..bytes / 2).flat_map(|_| half::f16::from_f32(value(rng)).to_le_bytes()).collect(),
        format => {
            // Codes, then a scale for each block.
            let mut page = vec![0; bytes];
            let scales = bytes / format.block_bytes() * size_of::<half::f16>();
            let (codes, scales) = page.split_at_mut(bytes - scales);
            rng.fill(codes);
            let scale = half::f16::from_f32(0.01).to_le_bytes();
            scales.as_chunks_mut::<2>().0.fill(scale);
            page
        }
    }
}

/// Allocates a buffer and fills it with repetitions of `pattern`.
fn filled(backend: &dyn Backend, bytes: u64, usage: Usage, pattern: &[u8]) -> Result<Buffer> {
    let buffer = backend.alloc(bytes, usage)?;
    let mut at = 0;
    let whole: Range<u64> = 0..if pattern.is_empty() { 0 } else { bytes };
    backend.fill(&buffer, whole, &mut |mut to| {
        while !to.is_empty() {
            let rest = pattern.get(at..).unwrap_or(&[]);
            let (now, later) = to.split_at_mut(rest.len().min(to.len()));
            now.copy_from_slice(&rest[..now.len()]);
            at = (at + now.len()) % pattern.len();
            to = later;
        }
    })?;
    Ok(buffer)
}

/// Returns the words of an input or output: floats from -1 to 1, or the ids of experts.
fn inputs(program: &Program, id: TensorId, limits: Limits, rng: &mut SplitMix64) -> Vec<u32> {
    let t = program.tensor(id);
    let rows = passes::rows(t.rows, limits.tokens, limits.outputs);
    if t.format != Format::I32 {
        return (0..rows * u64::from(t.cols)).map(|_| (2.0 * rng.unit() - 1.0).to_bits()).collect();
    }
    let experts = program.ops().find_map(|(_, op)| match op {
        Op::Experts { ids, gate, .. } if *ids == id => Some(program.tensor(*gate).experts),
        _ => None,
    });
    let experts = experts.unwrap_or(1).max(1);
    // The experts of a token differ.
    let row = |first: u64| (0..t.cols).map(move |i| ((first + u64::from(i)) % u64::from(experts)) as u32);
    (0..rows).flat_map(|_| row(rng.next() % u64::from(experts))).collect()
}

/// Returns the number of token ids that every embedding table of a program has; 1 without a table.
fn vocab(program: &Program) -> u32 {
    let tables = program.ops().filter_map(|(_, op)| match op {
        Op::Embed { table, index: Index::Token, .. } => Some(program.tensor(*table).rows),
        _ => None,
    });
    tables.map(|rows| if let Dim::Fixed(rows) = rows { rows } else { 1 }).min().unwrap_or(1)
}

/// What a backend reaches with its own kernels, by its own clock. `None`: it lacks the op that would show it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Ceilings {
    /// Bytes read per second: a matrix product of one token with a large matrix.
    pub read_bytes_per_s: Option<f64>,
    /// Bytes read and written per second: an addition of large rows.
    pub copy_bytes_per_s: Option<f64>,
    /// Integer operations per second: a matrix product of 512 tokens with weights in `Q8_0`, or in `Q4_K` if
    /// that is faster.
    pub integer_ops_per_s: Option<f64>,
    /// Floating-point operations per second: a matrix product of 512 tokens with weights in half precision,
    /// or in single precision if that is faster.
    pub float_ops_per_s: Option<f64>,
    /// Seconds of the smallest op, an addition of one element: what a launch costs.
    pub launch_seconds: Option<f64>,
    /// The backend's clock.
    pub clock: Clock,
}

impl Ceilings {
    /// Returns the rates for [`Cost::least_seconds`](crate::cost::Cost::least_seconds), if all are known.
    pub fn rates(&self) -> Option<Rates> {
        Some(Rates {
            bytes_per_s: self.read_bytes_per_s?,
            integer_ops_per_s: self.integer_ops_per_s?,
            float_ops_per_s: self.float_ops_per_s?,
        })
    }
}

/// Columns of the largest matrices.
const COLS: u32 = 4096;
/// Tokens of products that multiply as fast as they can.
const TOKENS: u32 = 512;
/// Host time from which a run is long enough, if the rate no longer grows.
const ENOUGH: Duration = Duration::from_millis(20);
/// Host time from which no larger run is tried.
const LONG: Duration = Duration::from_millis(300);
/// Growth of the rate with four times the work, from which larger work is tried.
const GROWTH: f64 = 1.05;

/// Measures the ceilings of a backend, in a few seconds. Work starts small and grows until a run takes 20
/// milliseconds of the host's time, or until buffers have `most_bytes`.
///
/// # Errors
/// Errors of the device. A missing op is no error.
pub fn ceilings(backend: &dyn Backend, most_bytes: u64) -> Result<Ceilings> {
    let most = most_bytes.min(backend.caps().memory_bytes / 4).max(1 << 20);
    let launch = launch(backend)?;
    let read = best(backend, |n| {
        let rows = 64 << (2 * n);
        let bytes = Format::Q8_0.row_bytes(COLS as usize)? as u64 * u64::from(rows);
        (bytes <= most).then(|| (product(Format::Q8_0, COLS, rows), 1, bytes as f64))
    })?;
    let copy = best(backend, |n| {
        let tokens = 16u32 << (2 * n);
        let bytes = 3 * 4 * u64::from(tokens) * u64::from(COLS);
        (bytes <= most).then(|| (addition(COLS), tokens, bytes as f64))
    })?;
    let multiply = |format: Format| {
        best(backend, move |n| {
            // Tokens grow first, then rows, then columns; each step has four times the work.
            let grown = |start: u32, by: u32, most: u32| (start << (2 * by).min(20)).min(most);
            let tokens = grown(32, n, TOKENS);
            let rows = grown(64, n.saturating_sub(2), 4096);
            let cols = grown(1024, n.saturating_sub(5), COLS);
            let ops = 2.0 * f64::from(tokens) * f64::from(rows) * f64::from(cols);
            (n <= 6).then(|| (product(format, cols, rows), tokens, ops))
        })
    };
    let faster = |a: Option<f64>, b: Option<f64>| a.into_iter().chain(b).reduce(f64::max);
    let integer = faster(multiply(Format::Q8_0)?, multiply(Format::Q4_K)?);
    let float = faster(multiply(Format::F16)?, multiply(Format::F32)?);
    Ok(Ceilings {
        read_bytes_per_s: read,
        copy_bytes_per_s: copy,
        integer_ops_per_s: integer,
        float_ops_per_s: float,
        launch_seconds: launch.map(|launch| launch.seconds),
        clock: launch.map_or(Clock::Host, |launch| launch.clock),
    })
}

/// Measures the smallest op. Returns `None` if the backend lacks it.
///
/// # Errors
/// Errors of the device.
pub fn launch(backend: &dyn Backend) -> Result<Option<Measured>> {
    let program = passes::for_backend(&addition(1)?, backend.caps());
    match Trial::new(backend, &program, TrialOptions::default()) {
        Ok(mut trial) => trial.measure(ENOUGH.as_secs_f64()).map(Some),
        Err(Error::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the work per second of the largest of growing programs. `sized` returns the program, the tokens
/// and the work of a size, or `None` if it is too large.
fn best(
    backend: &dyn Backend,
    sized: impl Fn(u32) -> Option<(Result<Program>, u32, f64)>,
) -> Result<Option<f64>> {
    let mut rate: Option<f64> = None;
    for size in 0.. {
        let Some((program, tokens, work)) = sized(size) else { break };
        let program = passes::for_backend(&program?, backend.caps());
        let mut trial = match Trial::new(backend, &program, TrialOptions::default().tokens(tokens)) {
            Ok(trial) => trial,
            Err(Error::Unsupported { .. }) => break,
            Err(Error::OutOfMemory { .. }) if rate.is_some() => break,
            Err(error) => return Err(error),
        };
        let (timing, mut host) = trial.run()?;
        let mut seconds = timing.elapsed.as_secs_f64();
        if timing.clock != Clock::Simulated {
            let measured = trial.measure(ENOUGH.as_secs_f64() / 2.0)?;
            seconds = measured.least_seconds;
            host = Duration::from_secs_f64(measured.host_seconds);
        }
        let last = rate.replace(work / seconds.max(1e-12));
        let grows = last.is_none_or(|last| rate.is_none_or(|rate| rate > GROWTH * last));
        if host >= LONG || (host >= ENOUGH && !grows) {
            break;
        }
    }
    Ok(rate)
}

/// A product with one matrix.
fn product(format: Format, cols: u32, rows: u32) -> Result<Program> {
    let lookup = |_: &str| Some(WeightInfo::new(vec![cols.into(), rows.into()], format));
    let mut b = Builder::new("product", &lookup);
    let x = b.input("x", Dim::Tokens, cols);
    let weight = b.weight("weight", rows, cols);
    let y = b.linear("y", x, weight, None);
    b.output(y);
    b.finish()
}

/// An addition of rows.
fn addition(cols: u32) -> Result<Program> {
    let mut b = Builder::new("addition", &|_| None);
    let (x, y) = (b.input("x", Dim::Tokens, cols), b.input("y", Dim::Tokens, cols));
    let sum = b.add("sum", x, y);
    b.output(sum);
    b.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::template::Template;

    #[test]
    fn quantiles() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0, 5.0], 0.5), 3.0);
        assert_eq!((quantile(&[1.0, 2.0], 1.0), quantile(&[7.0], 0.25), quantile(&[], 0.5)), (2.0, 7.0, 0.0));
    }

    #[test]
    fn runs_take_the_copies_in_turn() {
        let cpu = Cpu::with_threads(1).unwrap();
        let program = passes::for_backend(&product(Format::Q4_K, 256, 40).unwrap(), cpu.caps());
        let mut trial = Trial::new(&cpu, &program, TrialOptions::default().tokens(3).copies(2)).unwrap();
        let mut places = Vec::new();
        for _ in 0..3 {
            places.push(trial.next);
            trial.run().unwrap();
        }
        assert_eq!((places, trial.copies.len()), (vec![0, 1, 0], 2));
        let measured = trial.measure(1e-4).unwrap();
        assert!(measured.seconds > 0.0 && measured.clock == Clock::Host && measured.samples > 0);
        assert!(measured.least_seconds <= measured.seconds && measured.seconds <= measured.most_seconds);
    }

    /// Weights are finite, also those that repeat a pattern, in rows and interleaved.
    #[test]
    fn data_is_finite() {
        let cpu = Cpu::with_threads(1).unwrap();
        for layout in [Layout::Rows, Layout::Interleaved] {
            let rows = 1024;
            let mut program = product(Format::Q8_0, 2048, rows).unwrap();
            let weight = program.weights[0];
            program.tensors[weight.0 as usize].layout = layout;
            let mut trial = Trial::new(&cpu, &program, TrialOptions::default()).unwrap();
            trial.run().unwrap();
            let mut out = vec![0f32; rows as usize];
            let y = program.find("y").unwrap();
            let slot = program.io.iter().position(|&id| id == y).unwrap();
            cpu.read(&trial.io[slot], 0, bytemuck::cast_slice_mut(&mut out)).unwrap();
            assert!(out.iter().all(|y| y.is_finite() && *y != 0.0 && y.abs() < 1e3), "{layout:?}");
        }
    }

    #[test]
    fn a_backend_without_ops_has_no_ceilings() {
        let ceilings = ceilings(&Template::new(), 1 << 20).unwrap();
        assert!(ceilings.rates().is_none() && ceilings.launch_seconds.is_none());
    }
}

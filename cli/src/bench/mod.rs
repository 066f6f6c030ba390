//! `halite bench`: times prefill and decode, and compares them with the machine's measured peaks. `ops.rs`
//! times single ops.

pub mod ops;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use halite::backend::Clock;
use halite::backend::cpu::{self, Cpu};
use halite::cost::{self, Cost, Extent, Rates};
use halite::kernels::formats::Format;
use halite::measure;
use halite::model::ProgramOptions;
use halite::program::PAGE_POSITIONS;
use halite::session::{MAX_RUNS, OutputKind, OutputTokens, Run, SequenceId, Session, SessionOptions};
#[cfg(feature = "sim")]
use halite_profiles::profile::Profile;
#[cfg(feature = "sim")]
use halite_sim::estimate::host;
use serde_json::{Value, json};

use crate::device::DeviceArgs;
use crate::{Failure, MemoryArgs, bytes, kv_format, open_adapted, print};

/// Largest buffer for the bandwidth measurement: larger than any cache.
const MOST_BUFFER_BYTES: u64 = 1 << 30;
/// How peaks were measured: with loops of the CPU's widest instructions.
const BY_INSTRUCTIONS: &str = "instructions";
/// How peaks were measured: with the backend's own kernels.
const BY_KERNELS: &str = "kernels";
/// Tokens generated in a warm-up.
const WARM_UP_TOKENS: u32 = 4;

/// Each prompt length is a test, and each generation length with each number of sequences. All are run at every
/// depth and every number of threads.
#[derive(Args)]
pub struct BenchArgs {
    /// GGUF file (first file of a split model) [default: the built-in model]. With --ops also a shape of
    /// `halite synth`.
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Prompt lengths in tokens.
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "512")]
    prompt: Vec<u32>,
    /// Generation lengths in tokens.
    #[arg(short = 'n', long, value_name = "N,…", value_delimiter = ',', default_value = "128")]
    generate: Vec<u32>,
    /// Sequences that generate together, a token each in every step.
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=MAX_RUNS as i64))]
    sequences: Vec<u32>,
    /// Tokens of each sequence already in the KV cache (depth).
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    depth: Vec<u32>,
    /// CPU threads; 0: all cores.
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    threads: Vec<usize>,
    /// Timed repetitions of each test, after a warm-up.
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Prefill batch size in tokens.
    #[arg(long, value_name = "N", default_value_t = SessionOptions::default().batch)]
    batch: u32,
    /// Format of the KV cache.
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = kv_format())]
    kv: Format,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Skip the roofline measurement.
    #[arg(long)]
    no_roofline: bool,
    /// Also print predicted times, from this profile (`halite calibrate`).
    #[cfg(feature = "sim")]
    #[arg(long, value_name = "FILE")]
    profile: Option<String>,
    /// Output format.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Output,
    #[command(flatten)]
    single: ops::OpsArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Markdown table.
    Md,
    /// One line per test or op, with a header.
    Csv,
    /// Array of objects, with every repetition; of --ops, one object for `halite card`.
    Json,
}

/// A test of prefill or decode.
#[derive(Clone, Copy)]
struct Test {
    depth: u32,
    prompt: u32,
    /// Tokens that each sequence generates.
    generate: u32,
    sequences: u32,
}

impl Test {
    fn name(self) -> String {
        let mut name =
            if self.prompt > 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generate) };
        if self.sequences > 1 {
            name += &format!(" x {}", self.sequences);
        }
        if self.depth > 0 {
            name += &format!(" @ d{}", self.depth);
        }
        name
    }

    /// Tokens of each sequence.
    fn tokens(self) -> u32 {
        self.prompt + self.generate
    }

    /// Tokens of all sequences.
    fn all_tokens(self) -> u64 {
        u64::from(self.tokens()) * u64::from(self.sequences)
    }

    /// The steps that [`run`] executes.
    fn steps(self, batch: u32) -> impl Iterator<Item = Vec<Extent>> {
        let prompt = (0..self.prompt).step_by(batch.max(1) as usize).map(move |done| {
            let tokens = batch.min(self.prompt - done);
            Extent { start: self.depth + done, tokens, outputs: u32::from(done + tokens == self.prompt) }
        });
        let first = self.depth + self.prompt;
        let generate =
            (0..self.generate).map(move |done| Extent { start: first + done, tokens: 1, outputs: 1 });
        prompt.chain(generate).map(move |extent| vec![extent; self.sequences as usize])
    }
}

pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    if args.single.wanted() {
        if args.memory.bytes().is_some() {
            return Err("bench --ops: --memory limits whole models, not single ops".into());
        }
        return ops::ops(args);
    }
    let model = open_adapted(args.model.as_deref(), &[], args.memory.maps())?;
    let prompts = args.prompt.iter().map(|&prompt| Test { depth: 0, prompt, generate: 0, sequences: 1 });
    let generations = args.generate.iter().flat_map(|&generate| {
        args.sequences.iter().map(move |&sequences| Test { depth: 0, prompt: 0, generate, sequences })
    });
    let tests: Vec<Test> = prompts.chain(generations).filter(|test| test.tokens() > 0).collect();
    let tests: Vec<Test> =
        args.depth.iter().flat_map(|&depth| tests.iter().map(move |&test| Test { depth, ..test })).collect();
    let positions = tests.iter().map(|t| {
        // Sequences do not share pages.
        let each = t.depth.saturating_add(t.tokens()).checked_next_multiple_of(PAGE_POSITIONS);
        t.sequences.saturating_mul(each.unwrap_or(u32::MAX))
    });
    let most_sequences = tests.iter().map(|test| test.sequences).max().unwrap_or(1);
    let options = SessionOptions::default()
        .context(positions.max().ok_or("bench: nothing to do")?)
        .batch(args.batch)
        .sequences(most_sequences)
        .outputs(most_sequences)
        .program(ProgramOptions::default().kv_format(args.kv))
        .memory(args.memory.bytes())
        // Every repetition starts at the same depth.
        .rewind(tests.iter().map(|test| test.tokens()).max().unwrap_or(0));
    #[cfg(feature = "sim")]
    let profile = args.profile.as_deref().map(Profile::open).transpose()?;
    let mut rows = Rows::new(args.output);
    for &threads in &args.threads {
        let backend = args.device.on_threads(threads).open()?;
        let on_cpu = args.device.name() == cpu::DRIVER.name;
        let cpu = (on_cpu && !args.no_roofline).then(|| Cpu::with_threads(threads)).transpose()?;
        let kernels = (!on_cpu && !args.no_roofline)
            .then(|| measure::ceilings(&*backend, MOST_BUFFER_BYTES))
            .transpose()?;
        let mut session = Session::new(&model, &backend, &options)?;
        args.device.report_placement(session.program());
        for &test in &tests {
            let costs: Vec<Cost> =
                test.steps(session.batch()).map(|step| cost::step(session.program(), &step)).collect();
            let step_bytes = costs.iter().map(Cost::memory_bytes).max().unwrap_or(0);
            let rates = match (&cpu, &kernels) {
                (Some(cpu), _) => Some((cpu.rates(step_bytes.min(MOST_BUFFER_BYTES))?, BY_INSTRUCTIONS)),
                (None, Some(kernels)) => kernels.rates().map(|rates| (rates, BY_KERNELS)),
                (None, None) => None,
            };
            #[cfg(feature = "sim")]
            let predicted = profile.as_ref().map(|p| predicted(p, &session, test, threads)).transpose()?;
            #[cfg(not(feature = "sim"))]
            let predicted = None;
            let times = time(&mut session, test, args.repetitions)?;
            rows.add(row(&session, test, &costs, rates, predicted, &times))?;
        }
    }
    rows.finish()
}

/// Predicted seconds of a test on the CPU.
#[cfg(feature = "sim")]
fn predicted(profile: &Profile, session: &Session, test: Test, threads: usize) -> Result<f64, Failure> {
    let threads = Cpu::with_threads(threads)?.threads();
    let rates = host::rates(profile, threads)?;
    let steps = test.steps(session.batch());
    Ok(steps.map(|step| host::step_seconds(&rates, session.program(), &step)).sum::<halite::Result<f64>>()?)
}

/// The seconds of each repetition of a test.
struct Times {
    /// Clock of `seconds`.
    clock: Clock,
    /// By the backend's clock.
    seconds: Vec<f64>,
    /// By the host's clock.
    host_seconds: Vec<f64>,
}

/// Runs a test after an untimed warm-up.
fn time(session: &mut Session, test: Test, repetitions: u32) -> Result<Times, Failure> {
    let tokens = tokens(session.model().hparams().vocab_size, test.depth + test.tokens());
    let (before, tokens) = tokens.split_at(test.depth as usize);
    let sequences: Vec<SequenceId> = (0..test.sequences).map(|_| session.add_sequence()).collect();
    for &sequence in &sequences {
        session.prefill(sequence, before, OutputKind::ArgMax)?;
    }
    let mut repeat = |test: Test| -> Result<(Ticks, f64), Failure> {
        let (prompt, generated) = tokens[..test.tokens() as usize].split_at(test.prompt as usize);
        let start = Instant::now();
        let ticks = run(session, &sequences, prompt, generated)?;
        let seconds = start.elapsed().as_secs_f64();
        for &sequence in &sequences {
            session.truncate(sequence, test.depth)?;
        }
        Ok((ticks, seconds))
    };
    repeat(Test { generate: test.generate.min(WARM_UP_TOKENS), ..test })?;
    let repetitions = (0..repetitions).map(|_| repeat(test)).collect::<Result<Vec<_>, _>>();
    for sequence in sequences {
        session.remove(sequence)?;
    }
    let (ticks, host_seconds): (Vec<_>, Vec<_>) = repetitions?.into_iter().unzip();
    // All repetitions by one clock: the device's if it timed every step.
    let clock = ticks.iter().map(|ticks| ticks.clock).reduce(common).unwrap_or(Clock::Host);
    let seconds = match clock {
        Clock::Host => host_seconds.clone(),
        _ => ticks.iter().map(|ticks| ticks.elapsed.as_secs_f64()).collect(),
    };
    Ok(Times { clock, seconds, host_seconds })
}

/// The clock of times that two clocks measured: the host's, unless they are the same.
fn common(a: Clock, b: Clock) -> Clock {
    if a == b { a } else { Clock::Host }
}

/// The name of a clock.
fn clock_name(clock: Clock) -> &'static str {
    match clock {
        Clock::Device => "device",
        Clock::Simulated => "simulated",
        _ => "host",
    }
}

/// The backend's time of some steps.
struct Ticks {
    elapsed: Duration,
    clock: Clock,
}

/// Prefills a prompt and then decodes the given tokens one by one. The work does not depend on the output.
fn run(
    session: &mut Session,
    sequences: &[SequenceId],
    prompt: &[u32],
    generated: &[u32],
) -> halite::Result<Ticks> {
    let mut ticks: Option<Ticks> = None;
    let mut step = |session: &mut Session, runs: &[Run<'_>]| -> halite::Result<()> {
        session.step(runs, OutputKind::ArgMax)?;
        if let Some(step) = session.last_timing() {
            let so_far = ticks.take().unwrap_or(Ticks { elapsed: Duration::ZERO, clock: step.clock });
            ticks = Some(Ticks {
                elapsed: so_far.elapsed + step.elapsed,
                clock: common(so_far.clock, step.clock),
            });
        }
        Ok(())
    };
    let batch = session.batch() as usize;
    for &sequence in sequences {
        for (i, tokens) in prompt.chunks(batch).enumerate() {
            let last = (i + 1) * batch >= prompt.len();
            let outputs = if last { OutputTokens::Last } else { OutputTokens::None };
            step(session, &[Run::new(sequence, tokens).outputs(outputs)])?;
        }
    }
    for token in generated.chunks(1) {
        let runs: Vec<Run> = sequences.iter().map(|&sequence| Run::new(sequence, token)).collect();
        step(session, &runs)?;
    }
    Ok(ticks.unwrap_or(Ticks { elapsed: Duration::ZERO, clock: Clock::Host }))
}

/// Pseudo-random tokens, the same in every run.
fn tokens(vocab: u32, len: u32) -> Vec<u32> {
    let next = |x: &u32| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    // The low bits of a generator modulo 2^32 are the least random.
    let scale = |x: u32| ((u64::from(x) * u64::from(vocab)) >> 32) as u32;
    std::iter::successors(Some(1), next).map(scale).take(len as usize).collect()
}

/// The columns of a result: names and values.
type Row = Vec<(&'static str, Value)>;

fn row(
    session: &Session,
    test: Test,
    costs: &[Cost],
    peaks: Option<(Rates, &str)>,
    predicted: Option<f64>,
    times: &Times,
) -> Row {
    let seconds = times.seconds.as_slice();
    let rates = peaks.map(|(rates, _)| rates);
    let program = session.program();
    let caps = session.backend().caps();
    let rate = |seconds: &f64| test.all_tokens() as f64 / seconds;
    let (speeds, typical) = (seconds.iter().map(rate).collect::<Vec<_>>(), median(seconds));
    let (mean, deviation) = mean_and_deviation(&speeds);
    let total: Cost = costs.iter().copied().sum();
    let least = rates.map(|rates| costs.iter().map(|cost| cost.least_seconds(&rates)).sum::<f64>());
    let tokens = test.all_tokens();
    vec![
        ("model", json!(session.model().name())),
        ("weight_bytes", json!(program.weight_bytes())),
        ("backend", json!(caps.name)),
        ("device", json!(caps.device)),
        ("clock", json!(clock_name(times.clock))),
        ("test", json!(test.name())),
        ("depth", json!(test.depth)),
        ("prompt_tokens", json!(test.prompt)),
        ("generated_tokens", json!(test.generate)),
        ("sequences", json!(test.sequences)),
        ("repetitions", json!(seconds.len())),
        ("mean_tokens_per_s", json!(mean)),
        ("deviation_tokens_per_s", json!(deviation)),
        ("median_tokens_per_s", json!(tokens as f64 / typical)),
        ("bytes_per_token", json!(total.memory_bytes() / tokens)),
        ("ops_per_token", json!(total.ops() / tokens)),
        ("bytes_per_s", json!(total.memory_bytes() as f64 / typical)),
        ("ops_per_s", json!(total.ops() as f64 / typical)),
        ("roofline_by", json!(peaks.map(|(_, by)| by))),
        ("roofline_bytes_per_s", json!(rates.map(|r| r.bytes_per_s))),
        ("roofline_ops_per_s", json!(rates.map(|r| total.ops() as f64 / total.arithmetic_seconds(&r)))),
        ("roofline_integer_ops_per_s", json!(rates.map(|r| r.integer_ops_per_s))),
        ("roofline_float_ops_per_s", json!(rates.map(|r| r.float_ops_per_s))),
        ("roofline_percent", json!(least.map(|least| 100.0 * least / typical))),
        ("predicted_tokens_per_s", json!(predicted.map(|predicted| tokens as f64 / predicted))),
        ("seconds", json!(seconds)),
        ("host_seconds", json!(times.host_seconds)),
    ]
}

/// The middle value, or the mean of the middle two; 0 if there are none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().saturating_sub(1) / 2..sorted.len() / 2 + 1;
    sorted.get(middle).map_or(0.0, |middle| middle.iter().sum::<f64>() / middle.len() as f64)
}

/// Mean and sample standard deviation.
fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    (mean, (squares / (n - 1.0).max(1.0)).sqrt())
}

/// Prints results.
struct Rows {
    output: Output,
    /// The results so far. JSON prints them at the end; the others need to know whether a header was printed.
    rows: Vec<Value>,
}

impl Rows {
    fn new(output: Output) -> Rows {
        Rows { output, rows: Vec::new() }
    }

    fn add(&mut self, row: Row) -> Result<(), Failure> {
        let first = self.rows.is_empty();
        let text = match self.output {
            Output::Md => markdown(&row, first),
            Output::Csv => csv(&row, first),
            Output::Json => String::new(),
        };
        self.rows.push(row.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
        print(&text)
    }

    fn finish(self) -> Result<(), Failure> {
        let by_kernels = self.rows.iter().any(|row| row["roofline_by"] == BY_KERNELS);
        match self.output {
            Output::Json => print(&format!("{:#}\n", Value::from(self.rows))),
            Output::Md if by_kernels => {
                print("\nPeaks: what the backend reaches by its own kernels, not what its hardware can do.\n")
            }
            _ => Ok(()),
        }
    }
}

fn csv(row: &Row, heading: bool) -> String {
    let columns: Vec<_> = row.iter().filter(|(_, value)| !value.is_array()).collect();
    let line = |fields: Vec<String>| fields.join(",") + "\n";
    let quoted = |value: &Value| match value {
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let names = if heading {
        line(columns.iter().map(|(name, _)| (*name).to_owned()).collect())
    } else {
        String::new()
    };
    names + &line(columns.iter().map(|(_, value)| quoted(value)).collect())
}

fn markdown(row: &Row, heading: bool) -> String {
    let get = |name| row.iter().find(|(n, _)| *n == name).map_or(&Value::Null, |(_, value)| value);
    let text = |name| get(name).as_str().unwrap_or("").replace('|', "\\|");
    let number = |name| get(name).as_f64();
    let scaled = |name, digits: usize, unit: f64| {
        number(name).map_or("-".into(), |x| format!("{:.digits$}", x / unit))
    };
    let speed =
        format!("{} ± {}", scaled("mean_tokens_per_s", 2, 1.0), scaled("deviation_tokens_per_s", 2, 1.0));
    // Header, minimum width, cell.
    let columns = [
        ("model", 30, text("model")),
        ("weights", 10, bytes(get("weight_bytes").as_u64().unwrap_or(0))),
        ("device", 19, text("device")),
        ("clock", 9, text("clock")),
        ("test", 14, text("test")),
        ("tokens/s", 19, speed),
        ("median", 9, scaled("median_tokens_per_s", 2, 1.0)),
        ("GB/s", 6, scaled("bytes_per_s", 1, 1e9)),
        ("peak GB/s", 9, scaled("roofline_bytes_per_s", 1, 1e9)),
        ("GOP/s", 7, scaled("ops_per_s", 1, 1e9)),
        ("peak GOP/s", 10, scaled("roofline_ops_per_s", 1, 1e9)),
        ("roofline %", 10, scaled("roofline_percent", 1, 1.0)),
        ("predicted", 9, scaled("predicted_tokens_per_s", 2, 1.0)),
    ];
    table(&columns, heading)
}

/// A row of a Markdown table: header, minimum width and cell of each column.
fn table(columns: &[(&str, usize, String)], heading: bool) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let of = |cell: fn(&(&str, usize, String)) -> String| line(columns.iter().map(cell).collect());
    let mut out = String::new();
    if heading {
        out += &of(|(name, width, _)| format!("{name:>width$}"));
        out += &of(|(_, width, _)| "-".repeat(width - 1) + ":");
    }
    out + &of(|(_, width, cell)| format!("{cell:>width$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_those_of_a_session() {
        let steps = |depth, prompt, generate| {
            let steps = Test { depth, prompt, generate, sequences: 2 }.steps(4);
            let of = |step: Vec<Extent>| {
                assert_eq!(step.len(), 2);
                (step[1].start, step[1].tokens, step[1].outputs)
            };
            steps.map(of).collect::<Vec<_>>()
        };
        assert_eq!(steps(10, 9, 0), [(10, 4, 0), (14, 4, 0), (18, 1, 1)]);
        assert_eq!(steps(0, 8, 0), [(0, 4, 0), (4, 4, 1)]);
        assert_eq!(steps(3, 0, 2), [(3, 1, 1), (4, 1, 1)]);
    }

    #[test]
    fn averages() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
    }

    #[test]
    fn csv_quotes_texts() {
        let row = vec![("a", json!("x \"y\", z")), ("b", json!(null)), ("c", json!([1])), ("d", json!(1.5))];
        assert_eq!(csv(&row, true), "a,b,d\n\"x \"\"y\"\", z\",,1.5\n");
    }
}

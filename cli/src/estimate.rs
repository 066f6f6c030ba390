//! `halite estimate`: predicts time, energy and cost of serving a model on a chip, from shapes alone.

mod load;
mod page;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::output::{self, Replace};
use halite::passes;
use halite::program::Program;
use halite::shard::Sums;
use halite::synth::{self, Formats, Synth};
use halite::{Error, Model};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Basis, Driver, Profile};
use halite_sim::estimate::figures::{Figures, Metric};
use halite_sim::estimate::system::Layout;
use halite_sim::estimate::workload::{Choices, Estimate, Workload, estimate_best};
use halite_sim::{Chip, Joules, OpTime, Queue, Report, step};
use serde_json::{Value, json};

use super::{Failure, bytes, interrupt, kv_format, plain, plain_json, print};

/// The model and the workload that times are predicted for.
#[derive(Args)]
pub struct WorkArgs {
    /// GGUF file, or a shape of `halite synth`.
    #[arg(short, long, value_name = "FILE|SHAPE")]
    model: PathBuf,
    /// Weight format of a shape.
    #[arg(long, value_parser = super::synth::format, default_value = "q4_0")]
    format: Format,
    /// Number format of the chip's products [default: nearest to each weight's format].
    #[arg(long, value_name = "FORMAT")]
    products: Option<String>,
    /// Number format of the chip in which the weights of products lie in device memory [default: that of the file]. For simulated
    /// chips.
    #[arg(long, value_name = "FORMAT")]
    stored: Option<String>,
    /// Format of activations in device memory between ops.
    #[arg(long, value_name = "FORMAT", default_value = "fp32")]
    activations: String,
    /// Number format of the chip in which the KV cache lies in device memory [default: that of --kv]. For simulated chips and GPUs.
    #[arg(long, value_name = "FORMAT")]
    kv_stored: Option<String>,
    /// Two of each four weights of products are zeros, which are neither stored nor multiplied. For simulated chips with a sparse rate.
    #[arg(long)]
    sparse: bool,
    /// Format of the KV cache.
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = kv_format())]
    kv: Format,
    /// Batch size [default: 1].
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: Option<u32>,
    /// Prompt length in tokens [default: 512].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt: Option<u32>,
    /// Generated tokens per sequence [default: 128].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    generate: Option<u32>,
    /// Tokens of a prefill step, at most: of one prompt, or of several short ones.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    chunk: u32,
}

/// Prints one column per profile. No weights are read and nothing is computed, so the model may be larger
/// than this machine.
#[derive(Args)]
pub struct EstimateArgs {
    #[command(flatten)]
    work: WorkArgs,
    /// Chip profiles: names or TOML files, comma-separated.
    #[arg(short, long, value_name = "FILE|NAME,…", value_delimiter = ',', required = true)]
    profile: Vec<String>,
    /// Number of chips. Without the numbers below, all ways to divide the model over them are tried.
    #[arg(long, value_name = "N", help_heading = "Several chips", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    chips: Option<u32>,
    /// Chips that share each layer (tensor parallelism).
    #[arg(long, value_name = "N", help_heading = "Several chips", value_parser = clap::value_parser!(u32).range(1..=4096))]
    tp: Option<u32>,
    /// Groups of those that hold different experts (expert parallelism); divides --tp.
    #[arg(long, value_name = "N", help_heading = "Several chips", value_parser = clap::value_parser!(u32).range(1..=4096))]
    ep: Option<u32>,
    /// Chips that hold different positions of each sequence (context parallelism).
    #[arg(long, value_name = "N", help_heading = "Several chips", value_parser = clap::value_parser!(u32).range(1..=4096))]
    cp: Option<u32>,
    /// Stages of consecutive layers (pipeline parallelism).
    #[arg(long, value_name = "N", help_heading = "Several chips", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pp: Option<u32>,
    /// Copies of the model that share the batch (data parallelism).
    #[arg(long, value_name = "N", help_heading = "Several chips", value_parser = clap::value_parser!(u32).range(1..=4096))]
    dp: Option<u32>,
    /// What the layout is chosen by if several are tried: a metric of `halite explore`.
    #[arg(long, value_name = "METRIC", help_heading = "Several chips", default_value = "seconds", value_parser = metric)]
    best: &'static Metric,
    /// How chips share products: `divided` adds the sums of their parts, `in-order` gathers parts of results and has the
    /// bits of one chip.
    #[arg(long, value_name = "HOW", help_heading = "Several chips", default_value = "divided", value_parser = ["divided", "in-order"])]
    sums: String,
    /// Divide the batch in two, so that one half computes while the other one exchanges; under load, the steps for which that is quicker.
    /// Nothing slows either down.
    #[arg(long, help_heading = "Several chips")]
    overlap: bool,
    /// List the ops of a prefill step and a decode step, longest first.
    #[arg(long)]
    ops: bool,
    /// Write a timeline of a decode step for Perfetto or chrome://tracing.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Number of tiles in the trace.
    #[arg(long, value_name = "N", default_value_t = 4)]
    trace_tiles: u32,
    /// Write a roofline plot as SVG.
    #[arg(long, value_name = "FILE")]
    roofline: Option<PathBuf>,
    /// Write a page that compares the chips: figures, ops, rooflines, and a layer on the units of a tile.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: load::LoadArgs,
}

impl WorkArgs {
    /// Opens a model file, or a shape without weights.
    pub fn open(&self) -> Result<Arc<Model>, Failure> {
        if let Some(shape) = self.model.to_str().and_then(synth::shape) {
            let formats = Formats::of(self.format);
            return Ok(Arc::new(Synth::new(shape, formats, 0)?.model()?));
        }
        let path = self.model();
        if !path.exists() {
            let names: Vec<_> = synth::SHAPES.iter().map(|shape| shape.name).collect();
            return Err(format!(
                "model `{}`: expected a GGUF file or one of {}",
                path.display(),
                names.join(", ")
            )
            .into());
        }
        super::open_model(Some(path))
    }

    /// The file of the model, if it is one.
    pub fn model(&self) -> &Path {
        &self.model
    }

    /// The formats of the chip.
    pub fn choices(&self) -> Result<Choices, Failure> {
        let products = self.products.as_deref().map(Dtype::named).transpose()?;
        let stored = self.stored.as_deref().map(Dtype::named).transpose()?;
        let activations = Dtype::named(&self.activations)?;
        let cache = self.kv_stored.as_deref().map(Dtype::named).transpose()?;
        let choices = Choices::default().products(products).activations(activations);
        Ok(choices.stored(stored).cache(cache).sparse(self.sparse))
    }

    /// The program of a model, for all positions of the workload.
    ///
    /// Fails if the model's context is too short for them.
    pub fn program(&self, model: &Model) -> Result<Program, Failure> {
        let positions = self.workload().positions(model.hparams().context_length)?;
        Ok(model.program(ProgramOptions::default().kv_format(self.kv), positions)?)
    }

    /// The workload.
    pub fn workload(&self) -> Workload {
        let usual = Workload::default();
        usual
            .prompt(self.prompt.unwrap_or(usual.prompt))
            .generate(self.generate.unwrap_or(usual.generate))
            .batch(self.batch.unwrap_or(usual.batch))
            .chunk(self.chunk)
    }

    /// Says what is predicted: the model and the workload, of `batch` sequences.
    pub fn heading(&self, model: &Model, program: &Program, batch: impl std::fmt::Display) -> String {
        let Workload { prompt, generate, .. } = self.workload();
        format!(
            "{}, {} of weights; {batch} x ({prompt} prompt + {generate} generated tokens)\n\n",
            model.name(),
            bytes(program.weight_bytes()),
        )
    }
}

/// The estimate of one profile, or why there is none.
struct Asked {
    profile: Profile,
    estimate: Result<Estimate, Error>,
    /// The layouts that were compared, the best first by this metric.
    candidates: Vec<Figures>,
    best: &'static Metric,
}

/// Parses the name of a metric.
fn metric(name: &str) -> Result<&'static Metric, String> {
    let names = || Metric::all().iter().map(|metric| metric.name).collect::<Vec<_>>().join(", ");
    Metric::named(name).ok_or_else(|| format!("expected one of {}, got `{name}`", names()))
}

impl EstimateArgs {
    fn layout(&self) -> Layout {
        let sums = if self.sums == "in-order" { Sums::InOrder } else { Sums::Divided };
        Layout::asked(self.chips, [self.tp, self.ep, self.cp, self.pp, self.dp], sums).overlap(self.overlap)
    }

    fn estimate(&self, profile: Profile, choices: Choices, program: &Program, workload: &Workload) -> Asked {
        let best = self.best;
        match estimate_best(&profile, choices, program, workload, self.chips, best) {
            Ok((estimate, candidates)) => Asked { profile, estimate: Ok(estimate), candidates, best },
            Err(error) => Asked { profile, estimate: Err(error), candidates: Vec::new(), best },
        }
    }
}

pub fn run(args: &EstimateArgs) -> Result<(), Failure> {
    let model = args.work.open()?;
    let choices = args.work.choices()?.layout(args.layout());
    if let Some(source) = args.load.source() {
        return load::run(args, source, &model, choices);
    }
    let (program, workload) = (args.work.program(&model)?, args.work.workload());
    let mut all = Vec::new();
    for name in &args.profile {
        let profile = Profile::open(name)?;
        all.push(args.estimate(profile, choices, &program, &workload));
    }
    // Of several chips, one that cannot be estimated does not hide the others.
    if all.iter().all(|asked| asked.estimate.is_err())
        && let Some(Asked { estimate: Err(error), .. }) = all.pop()
    {
        return Err(error.into());
    }
    let drawn = args.trace.is_some() || args.roofline.is_some();
    if let Some(first) = all.first().filter(|first| drawn && first.profile.driver != Driver::Sim) {
        let (name, driver) = (&first.profile.name, first.profile.driver.name());
        return Err(format!(
            "--trace and --roofline need a simulated chip as the first profile, got {name} (driver {driver})"
        )
        .into());
    }
    // Check both before writing either.
    let inputs: Vec<&Path> = args.profile.iter().map(Path::new).chain([args.work.model()]).collect();
    for (path, replace) in [(&args.trace, TRACE), (&args.roofline, SVG), (&args.html, HTML)] {
        path.iter().try_for_each(|path| output::check(path, replace, &inputs))?;
    }
    let files = [("--trace", &args.trace), ("--roofline", &args.roofline), ("--html", &args.html)];
    for (i, (one, path)) in files.iter().enumerate() {
        if let Some((other, _)) = files[..i].iter().find(|(_, other)| path.is_some() && other == path) {
            return Err(format!("{other} and {one}: expected two files, got the same name").into());
        }
    }
    if let (Some(path), Some(first)) = (&args.trace, all.first()) {
        let chip = workload.chip(choices, &first.profile, &program)?;
        write_trace(path, &chip, &program, &decode_spans(&workload), args.trace_tiles)?;
    }
    if let (Some(path), Some(first)) = (&args.roofline, all.first()) {
        let estimate = first.estimate.as_ref().map_err(Error::to_string)?;
        let svg = super::plot::roofline(&workload.chip(choices, &first.profile, &program)?, estimate)?;
        interrupt::write(path, SVG, &[], svg.as_bytes())?;
    }
    if let Some(path) = &args.html {
        let heading = args.work.heading(&model, &program, workload.batch);
        let page = page::page(&heading, &all, (choices, &workload, &program))?;
        interrupt::write(path, HTML, &[], page.as_bytes())?;
    }
    if args.json {
        let values: Vec<Value> = all.iter().map(as_json).collect();
        print(&plain_json(&Value::from(values)))?;
        return some_fits(&all);
    }
    let mut text = args.work.heading(&model, &program, workload.batch) + &table(&all);
    for asked in &all {
        text += &explain(asked);
        if let Ok(estimate) = &asked.estimate
            && args.ops
        {
            text += &format!(
                "\n{}, prefill step of {} tokens\n{}",
                asked.profile.name,
                workload.prefill_tokens(estimate.layout),
                ops(&estimate.prefill)
            );
            let (parts, each) = estimate.parts;
            let part = match parts {
                1 => String::new(),
                _ => format!(
                    " of {each} sequences, one of the {parts} parts that a pipeline works on in turns"
                ),
            };
            text += &format!("\n{}, decode step{part}\n{}", asked.profile.name, ops(&estimate.decode));
        }
    }
    print(&plain(&text))?;
    some_fits(&all)
}

/// The spans of the middle decode step.
fn decode_spans(workload: &Workload) -> Vec<(u32, u32)> {
    vec![(workload.prompt + workload.generate / 2, 1); workload.batch as usize]
}

/// Fails if the memory of no profile's chips has room.
fn some_fits(all: &[Asked]) -> Result<(), Failure> {
    let estimates = || all.iter().filter_map(|asked| asked.estimate.as_ref().ok());
    if estimates().any(Estimate::fits) {
        return Ok(());
    }
    let Some(least) = estimates().min_by_key(|e| e.need_bytes.saturating_sub(e.have_bytes)) else {
        return Ok(());
    };
    let (need, have) = (bytes(least.need_bytes), bytes(least.have_bytes));
    Err(format!("weights and cache do not fit: expected at most {have} for each chip, got {need}").into())
}

/// Describes a layout: the number of chips, and how they divide the model.
pub fn layout(l: &Layout) -> String {
    let ways = l.ways();
    let ways: Vec<_> = ways.iter().filter(|(_, n)| *n > 1).map(|(name, n)| format!("{name} {n}")).collect();
    match ways.len() {
        0 => l.chips().to_string(),
        _ => format!("{}: {}", l.chips(), ways.join(", ")),
    }
}

/// A layout as JSON: the number of chips, and of each way.
pub fn ways(l: &Layout) -> serde_json::Map<String, Value> {
    let chips = ("chips", l.chips());
    l.ways().into_iter().chain([chips]).map(|(name, n)| (name.to_owned(), json!(n))).collect()
}

/// Formats a number with up to so many decimals; four digits and a prefix or an exponent where that would take long.
pub fn number(value: f64, decimals: usize) -> String {
    let magnitude = value.abs();
    let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    if magnitude >= 1e18 || (magnitude > 0.0 && magnitude < 0.5 * 0.1f64.powi(decimals as i32)) {
        return format!("{value:.3e}");
    }
    match prefixes.into_iter().find(|(unit, _)| magnitude >= *unit).filter(|_| magnitude >= 1e5) {
        Some((unit, name)) => {
            let scaled = value / unit;
            let whole = 1 + scaled.abs().log10().floor().max(0.0) as usize;
            format!("{scaled:.*} {name}", 4usize.saturating_sub(whole))
        }
        None => format!("{value:.decimals$}"),
    }
}

/// Formats seconds with three decimals and a unit.
pub fn seconds(s: f64) -> String {
    if s >= 1e5 || (s > 0.0 && s < 1e-12) {
        return format!("{s:.3e} s");
    }
    let (unit, name) = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]
        .into_iter()
        .find(|(unit, _)| s >= *unit)
        .unwrap_or((1e-9, "ns"));
    format!("{:.3} {name}", s / unit)
}

/// The energy of an op. That of links is not known if no profile has it.
fn known(time: &OpTime) -> Option<f64> {
    let joules = time.joules?.total();
    (joules > 0.0 || time.exchanged_bytes == 0.0).then_some(joules)
}

/// Energy by what takes it, as JSON.
fn energy(joules: Joules) -> Value {
    joules.named().into_iter().map(|(name, joules)| (name.to_owned(), json!(joules))).collect()
}

/// The shares of energy, without those that are nothing.
fn shares(joules: Joules) -> String {
    let total = joules.total();
    let share = |(name, joules): &(&str, f64)| format!("{name} {:.0} %", 100.0 * joules / total);
    joules.named().iter().filter(|(_, joules)| *joules > 0.0).map(share).collect::<Vec<_>>().join(", ")
}

/// Formats an interval; without the error of all kernels it comes from kernels like them.
fn interval([low, high]: [f64; 2], error: Option<f64>) -> String {
    let extrapolated = if error.is_some() { "" } else { ", extrapolated" };
    format!("{} to {}{extrapolated}", seconds(low), seconds(high))
}

/// The rows of a profile's column: names and values.
fn column(asked: &Asked) -> [(&'static str, String); 14] {
    let Asked { profile, estimate, .. } = asked;
    let e = estimate.as_ref().ok();
    // What does not fit has no speed.
    let running = e.filter(|e| e.fits());
    let dash = || "-".to_owned();
    let time = |of: fn(&Estimate) -> f64| running.map_or_else(dash, |e| seconds(of(e)));
    let number = |value: Option<f64>, digits: usize| value.map_or_else(dash, |v| number(v, digits));
    let memory = |e: &Estimate| {
        let fits = if e.fits() { "" } else { ", DOES NOT FIT" };
        format!("{} of {}{fits}", bytes(e.need_bytes), bytes(e.have_bytes))
    };
    let guesses = |e: &Estimate| {
        let share = e.rests_on().get(&Basis::Guess).copied().unwrap_or(0.0);
        format!("{:.0} %", 100.0 * share)
    };
    let error = |e: &Estimate| match e.error {
        Some(error) => format!("products ± {:.1} %", 100.0 * error),
        None if e.unmeasured.is_empty() || profile.calibration.is_none() => "uncalibrated".into(),
        None => "unknown (formats not measured)".into(),
    };
    [
        ("", profile.name.clone()),
        ("chips", e.map_or_else(dash, |e| layout(&e.layout))),
        ("time to first token", time(|e| e.first_token_s)),
        ("decode step", time(|e| e.step_s)),
        (
            "  80 % interval",
            running.and_then(|e| Some(interval(e.step_interval_s?, e.error))).unwrap_or_else(dash),
        ),
        ("tokens/s", number(running.map(|e| e.tokens_per_s), 1)),
        ("total time", time(|e| e.seconds)),
        ("J/token, uncalibrated", number(running.and_then(|e| e.joules_per_token).map(|j| j.total()), 3)),
        ("  of which", running.and_then(|e| Some(shares(e.joules_per_token?))).unwrap_or_else(dash)),
        ("USD/million tokens", number(running.and_then(|e| e.usd_per_million_tokens), 2)),
        ("exchanges", running.map_or_else(dash, |e| format!("{:.0} %", 100.0 * e.exchange_fraction))),
        ("memory per chip", e.map_or_else(dash, memory)),
        ("share of guesses", e.map_or_else(dash, guesses)),
        ("error", e.map_or("no estimate, see below".into(), error)),
    ]
}

fn table(all: &[Asked]) -> String {
    let columns: Vec<_> = all.iter().map(column).collect();
    let has_several = all.iter().any(|a| a.estimate.as_ref().is_ok_and(|e| e.layout.chips() > 1));
    let mut text = String::new();
    for row in 0..columns.first().map_or(0, |column| column.len()) {
        if !has_several && matches!(columns[0][row].0, "chips" | "exchanges") {
            continue;
        }
        text += &format!("{:22}", columns[0][row].0);
        for column in &columns {
            let width = column.iter().map(|(_, cell)| cell.chars().count()).max().unwrap_or(0) + 2;
            text += &format!("{:>width$}", column[row].1);
        }
        text += "\n";
    }
    text
}

/// Reports how busy a chip's units are, and how sensitive the time is to its numbers.
fn explain(asked: &Asked) -> String {
    let Asked { profile, estimate, candidates, best } = asked;
    let estimate = match estimate {
        Ok(estimate) => estimate,
        Err(error) => return format!("\n{}\n  {error}\n", profile.name),
    };
    let busy: Vec<_> = estimate
        .shares
        .iter()
        .filter(|(_, share)| *share >= 0.005)
        .map(|(bound, share)| format!("{} {:.0} %", bound.name(), 100.0 * share))
        .collect();
    let numbers: Vec<_> = estimate
        .sensitivities
        .iter()
        .take(6)
        .map(|s| format!("    {:+.2} % for +1 % of {} ({})\n", s.exponent, s.path, s.basis.name()))
        .collect();
    let repeated =
        estimate.repeated.iter().map(|what| format!("  not divided, every chip does it: {what}\n"));
    let repeated: String = repeated.collect();
    let compared = compared(candidates, best);
    let unmeasured: Vec<_> = estimate.unmeasured.iter().map(|line| format!("  {line}\n")).collect();
    format!(
        "\n{}\n{compared}{repeated}{}  busy in a decode step: {}\n  sensitivity of the time\n{}",
        profile.name,
        unmeasured.concat(),
        busy.join(", "),
        numbers.concat()
    )
}

/// Maximum layouts to list.
const LISTED: usize = 8;

/// Lists the layouts that were compared, and says why the first one is the choice.
fn compared(candidates: &[Figures], by: &Metric) -> String {
    let [best, others @ ..] = candidates else { return String::new() };
    if others.is_empty() {
        return String::new();
    }
    let which = if best.fits() { "of those that fit" } else { "as none fits" };
    let most = if by.is_more_better { "most" } else { "least" };
    let mut text = format!(
        "  chosen of {} layouts by --best {}: the {most} {which}, by the closed form\n",
        candidates.len(),
        by.name
    );
    for candidate in candidates.iter().take(LISTED) {
        let fits = if candidate.fits() { "" } else { ", does not fit" };
        let (layout, time) = (layout(&candidate.layout), seconds(candidate.seconds));
        let rate = number(f64::from(candidate.batch) / candidate.step_s, 1);
        text += &format!(
            "    {layout:24} {time:>12} {rate:>9} tokens/s  {} per chip{fits}\n",
            bytes(candidate.need_bytes)
        );
    }
    if candidates.len() > LISTED {
        text += &format!("    and {} more\n", candidates.len() - LISTED);
    }
    text
}

/// The ops of a step, the longest first.
fn ops_by_time(report: &Report) -> Vec<&halite_sim::OpReport> {
    let mut ops: Vec<_> = report.ops.iter().collect();
    ops.sort_by(|a, b| b.time.seconds.total_cmp(&a.time.seconds));
    ops
}

fn ops(report: &Report) -> String {
    let total = report.total().seconds;
    let ops = ops_by_time(report);
    let exchanges = report.ops.iter().any(|op| op.time.exchanged_bytes > 0.0);
    let last = |cell: String| if exchanges { format!(" {cell:>9}") } else { String::new() };
    let mut text = format!(
        "  {:26} {:>5} {:>12} {:>6}  {:8} {:>9} {:>9} {:>9} {:>8}{}\n",
        "op",
        "times",
        "time",
        "share",
        "bound",
        "read",
        "written",
        "GOP",
        "mJ",
        last("exchanged".into())
    );
    for op in ops {
        let t = op.time;
        text += &format!(
            "  {:26} {:>5} {:>12} {:>5.1}%  {:8} {:>9} {:>9} {:>9.3} {:>8}{}\n",
            op.name,
            op.count,
            seconds(t.seconds),
            100.0 * t.seconds / total,
            t.bound().name(),
            bytes(t.read_bytes as u64),
            bytes(t.written_bytes as u64),
            t.matrix_ops / 1e9,
            match known(&t) {
                Some(joules) => format!("{:.3}", 1e3 * joules),
                None => "-".into(),
            },
            last(bytes(t.exchanged_bytes as u64))
        );
    }
    text
}

fn as_json(asked: &Asked) -> Value {
    let Asked { profile, estimate, candidates, best } = asked;
    let layout = |l: &Layout| {
        let sums = if l.sums == Sums::InOrder { "in-order" } else { "divided" };
        let mut all = ways(l);
        all.extend([("sums".to_owned(), json!(sums)), ("overlap".to_owned(), json!(l.overlap))]);
        Value::Object(all)
    };
    let e = match estimate {
        Ok(estimate) => estimate,
        Err(error) => return json!({ "profile": profile.name, "error": error.to_string() }),
    };
    // What does not fit has no speed.
    let running = e.fits().then_some(e);
    let report = |report: &Report| -> Vec<Value> {
        let op = |op: &halite_sim::OpReport| {
            json!({
                "name": op.name,
                "count": op.count,
                "seconds": op.time.seconds,
                "bound": op.time.bound().name(),
                "busy_s": Queue::ALL.map(|q| (q.name(), op.time.busy_s[q as usize])).into_iter().collect::<std::collections::BTreeMap<_, _>>(),
                "read_bytes": op.time.read_bytes,
                "written_bytes": op.time.written_bytes,
                "scratchpad_bytes": op.time.scratch_bytes,
                "exchanged_bytes": op.time.exchanged_bytes,
                "matrix_ops": op.time.matrix_ops,
                "joules": known(&op.time),
            })
        };
        report.ops.iter().map(op).collect()
    };
    let rests_on: serde_json::Map<String, Value> =
        e.rests_on().into_iter().map(|(basis, share)| (basis.name().to_owned(), json!(share))).collect();
    let sensitivities: Vec<Value> = e
        .sensitivities
        .iter()
        .map(|s| json!({ "path": s.path, "basis": s.basis.name(), "exponent": s.exponent }))
        .collect();
    json!({
        "profile": profile.name,
        "layout": layout(&e.layout),
        "exchange_fraction": running.map(|e| e.exchange_fraction),
        "repeated": e.repeated,
        "best": (!candidates.is_empty()).then_some(best.name),
        "candidates": candidates.iter().map(|c| json!({
            "layout": layout(&c.layout), "seconds": c.seconds, "tokens_per_s": f64::from(c.batch) / c.step_s,
            "need_bytes": c.need_bytes, "fits": c.fits(),
        })).collect::<Vec<_>>(),
        "parts": e.parts.0,
        "sequences_per_part": e.parts.1,
        "first_token_s": running.map(|e| e.first_token_s),
        "step_s": running.map(|e| e.step_s),
        "step_interval_s": running.and_then(|e| e.step_interval_s),
        "is_interval_extrapolated": e.step_interval_s.map(|_| e.error.is_none()),
        "seconds": running.map(|e| e.seconds),
        "tokens_per_s": running.map(|e| e.tokens_per_s),
        "joules_per_token": running.and_then(|e| e.joules_per_token).map(|j| j.total()),
        "joules_per_token_by": running.and_then(|e| e.joules_per_token).map(energy),
        "usd_per_million_tokens": running.and_then(|e| e.usd_per_million_tokens),
        "need_bytes": e.need_bytes,
        "have_bytes": e.have_bytes,
        "fits": e.fits(),
        "is_calibrated": e.error.is_some(),
        "mean_error_fraction": e.error,
        "unmeasured": e.unmeasured,
        "busy": e.shares.iter().map(|(bound, share)| (bound.name(), *share)).collect::<std::collections::BTreeMap<_, _>>(),
        "rests_on": rests_on,
        "sensitivities": sensitivities,
        "prefill": report(&e.prefill),
        "decode": report(&e.decode),
    })
}

/// Files that a plot and a trace may replace.
const SVG: Replace = Replace::StartingWith(b"<svg", "an SVG drawing");
const TRACE: Replace = Replace::StartingWith(b"[", "a trace");
const HTML: Replace = Replace::StartingWith(b"<!DOCTYPE html>", "an HTML page");

/// Writes a trace of a step in the Trace Event Format: one process for the ops, and one per tile with a
/// thread per queue.
fn write_trace(
    path: &Path,
    chip: &Chip,
    program: &Program,
    spans: &[(u32, u32)],
    tiles: u32,
) -> Result<(), Failure> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let program = passes::fuse(program, halite_sim::FUSIONS);
    let mut out = interrupt::File::create(path, TRACE, &[])?;
    write!(out, "[").map_err(io)?;
    let mut first = true;
    let mut event = |value: Value| {
        let comma = if std::mem::take(&mut first) { "" } else { ",\n" };
        write!(out, "{comma}{value}").map_err(io)
    };
    let us = |s: f64| 1e6 * s;
    let named = |what: &str, pid: u32, tid: u32, name: &str| json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } });
    event(named("process_name", 0, 0, "ops"))?;
    for tile in 0..tiles.min(chip.tiles) {
        event(named("process_name", tile + 1, 0, &format!("tile {tile}")))?;
        for queue in Queue::ALL {
            event(named("thread_name", tile + 1, queue as u32, queue.name()))?;
        }
    }
    for op in step::trace(chip, &program, spans, true)? {
        event(json!({
            "ph": "X", "pid": 0, "tid": 0, "name": op.name, "cat": op.segment,
            "ts": us(op.start_s), "dur": us(op.time.seconds),
            "args": { "segment": op.segment, "bound": op.time.bound().name(), "read_bytes": op.time.read_bytes },
        }))?;
        for busy in op.busy.iter().filter(|busy| busy.tile < tiles) {
            event(json!({
                "ph": "X", "pid": busy.tile + 1, "tid": busy.queue as u32, "name": busy.what, "cat": op.name,
                "ts": us(op.start_s + busy.start_s), "dur": us(busy.end_s - busy.start_s),
            }))?;
        }
    }
    writeln!(out, "]").map_err(io)?;
    out.commit()
}

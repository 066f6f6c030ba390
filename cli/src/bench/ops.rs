//! `halite bench --ops`: times every distinct op of a model, alone, by the backend's own clock.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{ArgGroup, Args};
use halite::backend::cpu::{self, Cpu};
use halite::backend::{Backend, Clock, OpSig};
use halite::cost::{self, Cost, Extent};
use halite::error::Error;
use halite::kernels::formats::{Format, Layout};
use halite::kernels::rows::Gate;
use halite::measure::{self, Measured, Trial, TrialOptions};
use halite::model::ProgramOptions;
use halite::passes;
use halite::program::{
    Builder, Dim, Epilogue, NormKind, Op, PAGE_POSITIONS, Program, Slot, State, TensorId, WeightInfo,
};
use halite::synth::{self, Formats, Synth};
use halite::{Model, backend::driver};
use serde_json::{Value, json};

use super::{BY_INSTRUCTIONS, BY_KERNELS, BenchArgs, MOST_BUFFER_BYTES, Output, Row, clock_name, csv, table};
use crate::card::{KIND, Target};
use crate::{Failure, open_model, plain, plain_json, print, progress, say};

/// Copies of weights that a cold measurement rotates over, at most.
const MOST_COPIES: u64 = 4096;
/// How many times the budget all copies together may take: an op may read only a part of its weights.
const MOST_BUDGETS: u64 = 8;
/// Dominated by its launch: an op that takes less than so many launches.
const LAUNCHES: f64 = 2.0;

/// Options of `halite bench --ops`.
#[derive(Args)]
#[command(group = ArgGroup::new("single").multiple(true).args(["ops", "op"]), next_help_heading = "Single ops")]
pub struct OpsArgs {
    /// Time every distinct op of the model, alone, for each of --tokens and --depth.
    #[arg(long)]
    ops: bool,
    /// Time these ops instead of a model's: matmul, attend, norm, glu, add, argmax.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    op: Vec<String>,
    /// Weight formats of --op matmul, or of a shape.
    #[arg(long, value_name = "FORMAT,…", value_delimiter = ',', default_value = "q4_0", value_parser = crate::synth::format, requires = "single")]
    format: Vec<Format>,
    /// Shapes of --op: inputs and outputs of a matmul, elements of a row of the others.
    #[arg(long, value_name = "IN[xOUT],…", value_delimiter = ',', default_value = "4096x4096", value_parser = shape, requires = "single")]
    shape: Vec<(u32, Option<u32>)>,
    /// Heads of --op attend: query heads, KV heads, elements.
    #[arg(long, value_name = "Q/KVxDIM,…", value_delimiter = ',', default_value = "32/8x128", value_parser = heads, requires = "single")]
    heads: Vec<(u32, u32, u32)>,
    /// Tokens of a step.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,512", requires = "single", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens: Vec<u32>,
    /// Least seconds of each measurement.
    #[arg(long, value_name = "S", default_value_t = 0.05, requires = "single")]
    seconds: f64,
    /// MiB of weights and KV cache that a cold measurement rotates over: several times the last cache.
    #[arg(long, value_name = "MIB", default_value_t = 256, requires = "single", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    cold_mib: u64,
    /// Also write a card of the device: one HTML page, or its roofline plot as SVG.
    #[arg(long, value_name = "FILE", requires = "single")]
    pub card: Option<PathBuf>,
    /// Results of `halite bench -o json` to show in the card; may be repeated.
    #[arg(long, value_name = "FILE", requires = "card")]
    pub card_bench: Vec<PathBuf>,
}

impl OpsArgs {
    /// Whether single ops are to be timed.
    pub fn wanted(&self) -> bool {
        self.ops || !self.op.is_empty()
    }
}

/// Reads `IN` or `INxOUT`.
fn shape(text: &str) -> Result<(u32, Option<u32>), String> {
    let expected = || format!("expected IN or INxOUT, as in 4096x14336, got `{text}`");
    let number = |text: &str| text.parse().ok().filter(|n| *n > 0).ok_or_else(expected);
    match text.split_once('x') {
        Some((a, b)) => Ok((number(a)?, Some(number(b)?))),
        None => Ok((number(text)?, None)),
    }
}

/// Reads `Q/KVxDIM`.
fn heads(text: &str) -> Result<(u32, u32, u32), String> {
    let parts = text.split_once('x').and_then(|(heads, dim)| {
        let (q, kv) = heads.split_once('/')?;
        Some((q.parse::<u32>().ok()?, kv.parse::<u32>().ok()?, dim.parse::<u32>().ok()?))
    });
    let valid = |&(q, kv, dim): &(u32, u32, u32)| kv > 0 && dim > 0 && q >= kv && q.is_multiple_of(kv);
    parts
        .filter(valid)
        .ok_or_else(|| format!("expected query heads/KV heads x elements, as in 32/8x128, got `{text}`"))
}

/// An op to time, as a program of its own.
struct Subject {
    program: Program,
    /// The names of its weights, without layer numbers, or of the tensor that it writes.
    name: String,
    /// How many ops of the model are like it.
    count: u32,
}

impl Subject {
    fn op(&self) -> Result<&Op, Failure> {
        let op = self.program.ops().next();
        op.map(|(_, op)| op).ok_or_else(|| "bench: a program without ops".into())
    }
}

/// Everything about an op but its operands' names: ops of equal signatures take the same time.
type Signature = Op<(Dim, u32, u32, Format, Layout, bool), (u32, u32, u32, Format, Option<u32>, u32)>;

fn signature(program: &Program, op: &Op) -> Signature {
    let signature: Result<Signature, std::convert::Infallible> = op.try_map(
        |&id, _| {
            let t = program.tensor(id);
            Ok((t.rows, t.cols, t.experts, t.format, t.layout, matches!(t.slot, Slot::Weight(_))))
        },
        |&id, _| {
            let state = program.states.get(id.0 as usize);
            Ok(state.map_or((0, 0, 0, Format::F32, None, 0), |s| {
                (s.kv_heads, s.key_dim, s.value_dim, s.format, s.window, s.after)
            }))
        },
    );
    let Ok(signature) = signature;
    signature
}

/// Returns the distinct ops of a program, in order of their first occurrence, with the index of that and the
/// number of occurrences.
fn distinct(program: &Program) -> Vec<(&Op, u32)> {
    let mut found: Vec<(Signature, &Op, u32)> = Vec::new();
    for (_, op) in program.ops() {
        let signature = signature(program, op);
        match found.iter_mut().find(|(known, ..)| *known == signature) {
            Some((.., count)) => *count += 1,
            None => found.push((signature, op, 1)),
        }
    }
    found.into_iter().map(|(_, op, count)| (op, count)).collect()
}

/// Names an op in a model: its matrices, or else what it writes.
fn name_of(program: &Program, op: &Op) -> String {
    let mut names: Vec<String> = Vec::new();
    let mut add = |id| {
        let name = program.tensor(id).name_in_layer();
        if !names.contains(&name) {
            names.push(name);
        }
    };
    match op {
        Op::MatMul { parts, .. } => parts.iter().for_each(|part| add(part.weight)),
        Op::Experts { gate, up, down, .. } => [*gate, *up, *down].into_iter().for_each(add),
        Op::Embed { table: weight, .. } | Op::BlockMatMul { weight, .. } => add(*weight),
        Op::Norm { weight: Some(weight), .. } => add(*weight),
        // It writes no tensor.
        Op::KvWrite { k, v, .. } => [*k, *v].into_iter().for_each(add),
        op => op.outputs(&mut add),
    }
    names.join("+")
}

/// The formats of an op's matrices, or of its cache.
fn format_of(program: &Program, op: &Op) -> String {
    let mut formats: Vec<&str> = Vec::new();
    let mut add = |format: Format| {
        if !formats.contains(&format.name()) {
            formats.push(format.name());
        }
    };
    match op {
        Op::MatMul { parts, .. } => parts.iter().for_each(|part| add(program.tensor(part.weight).format)),
        Op::Experts { gate, up, down, .. } => {
            [gate, up, down].into_iter().for_each(|&id| add(program.tensor(id).format))
        }
        Op::Embed { table: weight, .. } | Op::BlockMatMul { weight, .. } => {
            add(program.tensor(*weight).format)
        }
        Op::Attend { state, .. } | Op::KvWrite { state, .. } | Op::RopeKv { state, .. } => {
            program.states.get(state.0 as usize).iter().for_each(|state| add(state.format))
        }
        _ => add(Format::F32),
    }
    formats.join("+")
}

/// The sizes and parameters of an op, for people.
fn shape_of(program: &Program, op: &Op) -> String {
    let rows = |id: TensorId| match program.tensor(id).rows {
        Dim::Fixed(rows) => rows,
        _ => 0,
    };
    let cols = |id: TensorId| program.tensor(id).cols;
    match op {
        Op::MatMul { x, parts, epilogue, .. } => {
            let outs: Vec<String> = parts.iter().map(|part| rows(part.weight).to_string()).collect();
            let then = match epilogue {
                Epilogue::Glu(_) => " glu",
                Epilogue::Add(_) => " add",
                _ => "",
            };
            format!("{}x{}{then}", cols(*x), outs.join("+"))
        }
        Op::Experts { x, ids, gate, .. } => {
            let experts = program.tensor(*gate).experts;
            format!("{} of {experts} {}x{}", cols(*ids), cols(*x), rows(*gate))
        }
        Op::Embed { table, .. } => format!("{}x{}", rows(*table), cols(*table)),
        Op::BlockMatMul { weight, .. } => {
            format!("{} of {}x{}", program.tensor(*weight).experts, cols(*weight), rows(*weight))
        }
        Op::Norm { x, group, add, .. } => {
            let then = if add.is_some() { " add" } else { "" };
            match cols(*x) / group.max(&1) {
                1 => format!("{group}{then}"),
                groups => format!("{groups}x{group}{then}"),
            }
        }
        Op::Attend { state, heads, .. } => {
            let Some(s) = program.states.get(state.0 as usize) else { return String::new() };
            let values = if s.value_dim == s.key_dim { String::new() } else { format!("/{}", s.value_dim) };
            let window = s.window.map_or(String::new(), |window| format!(" window {window}"));
            format!("{heads}/{}x{}{values}{window}", s.kv_heads, s.key_dim)
        }
        Op::Rope { x, rotation, .. } => {
            format!("{}x{}", cols(*x) / rotation.head_dim.max(1), rotation.head_dim)
        }
        Op::RopeKv { q, k, rotation, .. } => {
            let dim = rotation.head_dim.max(1);
            format!("{}+{}x{dim}", cols(*q) / dim, cols(*k) / dim)
        }
        Op::KvWrite { k, v, .. } => format!("{}+{}", cols(*k), cols(*v)),
        Op::Route { logits, ids, .. } => format!("{} of {}", cols(*ids), cols(*logits)),
        Op::TopK { x, ids, .. } => format!("{} of {}", cols(*ids), cols(*x)),
        Op::Conv { weight, .. } => format!("{}x{} taps", rows(*weight), cols(*weight)),
        Op::Recur { k, state, .. } => {
            let Some(s) = program.states.get(state.0 as usize) else { return String::new() };
            let key_heads = cols(*k) / s.key_dim.max(1);
            format!("{}/{key_heads}x{}/{}", s.kv_heads, s.key_dim, s.value_dim)
        }
        Op::Slice { x, out, .. } => format!("{} of {}", cols(*out), cols(*x)),
        Op::Join { a, b, .. } => format!("{}+{}", cols(*a), cols(*b)),
        Op::Gather { x, .. }
        | Op::Unary { x, .. }
        | Op::ArgMax { x, .. }
        | Op::Glu { gate: x, .. }
        | Op::Mul { x, .. }
        | Op::Add { a: x, .. } => cols(*x).to_string(),
        _ => String::new(),
    }
}

/// Whether the time of an op depends on the number of cached positions, and whether on the number of tokens:
/// an op on outputs has one row, whatever the number of tokens.
fn depends(program: &Program, op: &Op) -> (bool, bool) {
    let mut on_tokens = false;
    op.tensors(|&id, _| on_tokens |= program.tensor(id).rows == Dim::Tokens);
    (matches!(op, Op::Attend { .. }), on_tokens)
}

/// The ops of the model, or of `--op`.
fn subjects(args: &BenchArgs, backend: &dyn Backend) -> Result<(Vec<Subject>, Option<String>), Failure> {
    if !args.single.op.is_empty() {
        return Ok((listed(args, backend)?, None));
    }
    let model = opened(args)?;
    let deepest = args.depth.iter().max().copied().unwrap_or(0);
    let positions = deepest.saturating_add(args.single.tokens.iter().max().copied().unwrap_or(1));
    let options = ProgramOptions::default().kv_format(args.kv);
    let program = passes::for_backend(&model.program(options, positions)?, backend.caps());
    let subject = |(op, count): (&Op, u32)| {
        let part = passes::fragment(&program, op.name(), std::slice::from_ref(op), |_| false);
        Subject { program: part.program, name: name_of(&program, op), count }
    };
    Ok((distinct(&program).into_iter().map(subject).collect(), Some(model.name())))
}

/// Opens a model file, or a shape without weights.
fn opened(args: &BenchArgs) -> Result<Arc<Model>, Failure> {
    let shape = args.model.as_deref().and_then(|path| synth::shape(path.to_str()?));
    let (Some(shape), Some(&format)) = (shape, args.single.format.first()) else {
        return open_model(args.model.as_deref());
    };
    Ok(Arc::new(Synth::new(shape, Formats::of(format), 0)?.model()?))
}

/// The ops of `--op`.
const KNOWN: [&str; 6] = ["matmul", "attend", "norm", "glu", "add", "argmax"];

fn listed(args: &BenchArgs, backend: &dyn Backend) -> Result<Vec<Subject>, Failure> {
    let single = &args.single;
    let mut subjects = Vec::new();
    let mut add = |name: &str, program: halite::Result<Program>| -> Result<(), Failure> {
        let program = passes::for_backend(&program?, backend.caps());
        subjects.push(Subject { program, name: name.into(), count: 1 });
        Ok(())
    };
    for name in &single.op {
        match name.as_str() {
            "matmul" => {
                for &format in &single.format {
                    for &(cols, rows) in &single.shape {
                        add(name, matmul(format, cols, rows.unwrap_or(cols)))?;
                    }
                }
            }
            "attend" => {
                for &heads in &single.heads {
                    add(name, attend(args.kv, heads))?;
                }
            }
            "norm" | "glu" | "add" | "argmax" => {
                for &(cols, _) in &single.shape {
                    add(name, row_op(name, cols))?;
                }
            }
            other => {
                let known = driver::or(KNOWN.iter().map(|&name| name.to_owned()));
                return Err(format!("--op {other}: expected {known}; --ops times all ops of a model").into());
            }
        }
    }
    Ok(subjects)
}

fn matmul(format: Format, cols: u32, rows: u32) -> halite::Result<Program> {
    let lookup = |_: &str| Some(WeightInfo::new(vec![cols.into(), rows.into()], format));
    let mut b = Builder::new("matmul", &lookup);
    let x = b.input("x", Dim::Tokens, cols);
    let weight = b.weight("weight", rows, cols);
    let y = b.linear("y", x, weight, None);
    b.output(y);
    b.finish()
}

fn attend(kv: Format, (heads, kv_heads, dim): (u32, u32, u32)) -> halite::Result<Program> {
    let mut b = Builder::new("attend", &|_| None);
    let q = b.input("q", Dim::Tokens, heads.saturating_mul(dim));
    let state = b.state(State::new("kv", kv_heads, dim, dim, kv));
    let y = b.attend(q, state, heads, 1.0 / (dim as f32).sqrt(), None, None);
    b.output(y);
    b.finish()
}

fn row_op(name: &str, cols: u32) -> halite::Result<Program> {
    let lookup = |_: &str| Some(WeightInfo::new(vec![cols.into()], Format::F32));
    let mut b = Builder::new(name, &lookup);
    let x = b.input("x", Dim::Tokens, cols);
    let y = match name {
        "norm" => {
            let weight = b.weight("weight", 1, cols);
            b.norm("y", x, NormKind::Rms, Some(weight), None, 1e-5, cols)
        }
        "argmax" => b.arg_max(x),
        _ => {
            let second = b.input("second", Dim::Tokens, cols);
            if name == "glu" { b.glu(x, second, Gate::Silu) } else { b.add("y", x, second) }
        }
    };
    b.output(y);
    b.finish()
}

/// What the backend can do, for shares of it.
struct Peaks {
    by: &'static str,
    read: Option<f64>,
    copy: Option<f64>,
    integer: Option<f64>,
    float: Option<f64>,
    launch: Option<f64>,
}

impl Peaks {
    fn measure(args: &BenchArgs, backend: &dyn Backend, threads: usize) -> Result<Peaks, Failure> {
        if args.device.name() == cpu::DRIVER.name {
            let cpu = Cpu::with_threads(threads)?;
            let buffer = args.single.cold_mib.saturating_mul(1 << 20).min(MOST_BUFFER_BYTES);
            let rates = (!args.no_roofline).then(|| cpu.rates(buffer)).transpose()?;
            let copy = (!args.no_roofline).then(|| cpu.copy_bytes_per_s(buffer)).transpose()?;
            return Ok(Peaks {
                by: BY_INSTRUCTIONS,
                read: rates.map(|rates| rates.bytes_per_s),
                copy,
                integer: rates.map(|rates| rates.integer_ops_per_s),
                float: rates.map(|rates| rates.float_ops_per_s),
                launch: measure::launch(backend)?.map(|launch| launch.seconds),
            });
        }
        if args.no_roofline {
            let launch = measure::launch(backend)?.map(|launch| launch.seconds);
            return Ok(Peaks { by: BY_KERNELS, read: None, copy: None, integer: None, float: None, launch });
        }
        let c = measure::ceilings(backend, MOST_BUFFER_BYTES)?;
        Ok(Peaks {
            by: BY_KERNELS,
            read: c.read_bytes_per_s,
            copy: c.copy_bytes_per_s,
            integer: c.integer_ops_per_s,
            float: c.float_ops_per_s,
            launch: c.launch_seconds,
        })
    }

    /// The least seconds of an op, for its memory and for its arithmetic.
    fn least(&self, cost: &Cost) -> Option<(f64, f64)> {
        if cost.ops() == 0 {
            // Not a product: rows are all that it moves.
            return Some((all_bytes(cost) as f64 / self.copy?, 0.0));
        }
        // A rate counts only where the op uses it.
        let part = |ops: u64, rate: Option<f64>| if ops == 0 { Some(0.0) } else { Some(ops as f64 / rate?) };
        let arithmetic = part(cost.integer_ops, self.integer)? + part(cost.float_ops, self.float)?;
        Some((cost.memory_bytes() as f64 / self.read?, arithmetic))
    }

    /// What limits an op.
    fn bound(&self, seconds: f64, least: Option<(f64, f64)>) -> Option<&'static str> {
        match (self.launch, least) {
            (Some(launch), _) if seconds < LAUNCHES * launch => Some("launch"),
            (_, Some((memory, arithmetic))) if memory >= arithmetic => Some("memory"),
            (_, Some(_)) => Some("compute"),
            (_, None) => None,
        }
    }

    fn json(&self) -> Value {
        json!({
            "by": self.by,
            "read_bytes_per_s": self.read,
            "copy_bytes_per_s": self.copy,
            "integer_ops_per_s": self.integer,
            "float_ops_per_s": self.float,
            "launch_seconds": self.launch,
        })
    }

    /// A line for people.
    fn line(&self) -> String {
        let scaled = |x: Option<f64>, unit: f64, name: &str| x.map(|x| format!("{:.1} {name}", x / unit));
        let parts = [
            ("read", scaled(self.read, 1e9, "GB/s")),
            ("copy", scaled(self.copy, 1e9, "GB/s")),
            ("integer", scaled(self.integer, 1e9, "GOP/s")),
            ("float", scaled(self.float, 1e9, "GOP/s")),
            ("launch", scaled(self.launch, 1e-6, "µs")),
        ];
        let by = match self.by {
            BY_KERNELS => "by its own kernels",
            _ => "by the CPU's instructions",
        };
        let known = parts.iter().filter_map(|(name, value)| Some(format!("{name} {}", value.as_ref()?)));
        format!("ceilings {by}: {}", known.collect::<Vec<_>>().join(", "))
    }
}

fn all_bytes(cost: &Cost) -> u64 {
    cost.memory_bytes().saturating_add(cost.activation_bytes)
}

/// The step of a measurement.
#[derive(Clone, Copy)]
struct At {
    tokens: u32,
    depth: u32,
}

pub fn ops(args: &BenchArgs) -> Result<(), Failure> {
    let &[threads] = args.threads.as_slice() else {
        return Err("--ops: expected one number of threads".into());
    };
    let backend = args.device.on_threads(threads).open()?;
    let inputs: Vec<&Path> = args.single.card_bench.iter().chain(&args.model).map(PathBuf::as_path).collect();
    let card = args.single.card.as_deref();
    let card = card.map(|file| Target::new(file, &args.single.card_bench, &inputs)).transpose()?;
    let (subjects, model) = subjects(args, &*backend)?;
    let peaks = Peaks::measure(args, &*backend, threads)?;
    let caps = backend.caps();
    if args.output == Output::Md {
        let what = model.as_deref().unwrap_or("single ops");
        print(&format!("{what} on {} ({})\n{}\n\n", caps.name, caps.device, peaks.line()))?;
    }
    let bar = progress(subjects.len() as u64, "measuring");
    let mut printed = false;
    let (mut rows, mut gaps): (Vec<Value>, Vec<String>) = (Vec::new(), Vec::new());
    for subject in &subjects {
        for at in steps(args, subject)? {
            let measured = match measure(args, &*backend, subject, at) {
                Ok(measured) => measured,
                Err(Error::Unsupported { gaps: found, .. }) => {
                    say(&format!("not measured: {}", found.join("; ")));
                    gaps.extend(found);
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            for (cache, measured) in measured {
                let row = row(&*backend, &peaks, subject, at, cache, &measured)?;
                match args.output {
                    Output::Md => print(&plain(&markdown(&row, !printed)))?,
                    Output::Csv => print(&plain(&csv(&row, !printed)))?,
                    Output::Json => {}
                }
                printed = true;
                rows.push(row.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let document = json!({
        "halite": env!("CARGO_PKG_VERSION"),
        "kind": KIND,
        "date": crate::machine::today(),
        "machine": crate::machine::machine(),
        "backend": caps.name,
        "device": caps.device,
        "contract": caps.contract.name(),
        "model": model,
        "clock": rows.first().map(|row| row["clock"].clone()),
        "ceilings": peaks.json(),
        "ops": rows,
        "gaps": gaps,
    });
    if let Some(card) = card {
        card.write(std::slice::from_ref(&document))?;
    }
    if args.output == Output::Json {
        print(&plain_json(&document))?;
    }
    Ok(())
}

/// The steps to time an op in.
fn steps(args: &BenchArgs, subject: &Subject) -> Result<Vec<At>, Failure> {
    let (on_depth, on_tokens) = depends(&subject.program, subject.op()?);
    let depths = if on_depth { &args.depth[..] } else { &args.depth[..1.min(args.depth.len())] };
    let tokens = if on_tokens { &args.single.tokens[..] } else { &[1] };
    Ok(depths.iter().flat_map(|&depth| tokens.iter().map(move |&tokens| At { tokens, depth })).collect())
}

/// The cost of a subject in a step.
fn cost(subject: &Subject, at: At) -> Cost {
    cost::step(&subject.program, &[Extent { start: at.depth, tokens: at.tokens, outputs: 1 }])
}

/// Returns the number of copies to rotate over, so that no run finds its data in a cache; 1 if one copy is
/// larger than the caches, `None` if the op reads too little.
fn copies(subject: &Subject, at: At, budget: u64) -> Option<u64> {
    let read = cost(subject, at).memory_bytes();
    let pages = u64::from(at.depth.saturating_add(at.tokens).div_ceil(PAGE_POSITIONS));
    let buffers = subject.program.weight_bytes().saturating_add(subject.program.kv_bytes(|_| pages));
    let copies = budget.div_ceil(read.max(1));
    let fits = copies.saturating_mul(buffers) <= budget.saturating_mul(MOST_BUDGETS) || copies == 1;
    (copies <= MOST_COPIES && fits).then_some(copies)
}

/// Times an op with its data in memory ("cold") and in the caches ("warm"), as far as these differ.
fn measure(
    args: &BenchArgs,
    backend: &dyn Backend,
    subject: &Subject,
    at: At,
) -> halite::Result<Vec<(&'static str, Measured)>> {
    let options = TrialOptions::default().tokens(at.tokens).depth(at.depth);
    let mut measured = Vec::new();
    let copies = copies(subject, at, args.single.cold_mib.saturating_mul(1 << 20));
    if let Some(copies) = copies {
        let mut trial = Trial::new(backend, &subject.program, options.copies(copies as u32))?;
        let cold = trial.measure(args.single.seconds)?;
        measured.push(("cold", cold));
        // One copy that is larger than the caches is never in them.
        if copies == 1 || cold.clock == Clock::Simulated {
            return Ok(measured);
        }
    }
    let mut trial = Trial::new(backend, &subject.program, options)?;
    let warm = trial.measure(args.single.seconds)?;
    // A simulated chip has no caches: each run reads memory.
    measured.push((if warm.clock == Clock::Simulated { "cold" } else { "warm" }, warm));
    Ok(measured)
}

fn row(
    backend: &dyn Backend,
    peaks: &Peaks,
    subject: &Subject,
    at: At,
    cache: &str,
    measured: &Measured,
) -> Result<Row, Failure> {
    let op = subject.op()?;
    let program = &subject.program;
    let cost = cost(subject, at);
    let seconds = measured.seconds;
    let least = peaks.least(&cost);
    let share = least.map(|(memory, arithmetic)| 100.0 * memory.max(arithmetic) / seconds);
    Ok(vec![
        ("op", json!(op.name())),
        ("name", json!(subject.name)),
        ("format", json!(format_of(program, op))),
        ("shape", json!(shape_of(program, op))),
        ("tokens", json!(at.tokens)),
        ("depth", json!(at.depth)),
        ("count", json!(subject.count)),
        ("cache", json!(cache)),
        ("clock", json!(clock_name(measured.clock))),
        ("seconds", json!(seconds)),
        ("least_seconds", json!(measured.least_seconds)),
        ("most_seconds", json!(measured.most_seconds)),
        ("spread", json!(measured.spread)),
        ("samples", json!(measured.samples)),
        ("runs_per_sample", json!(measured.runs_per_sample)),
        ("host_seconds", json!(measured.host_seconds)),
        ("weight_bytes", json!(cost.weight_bytes)),
        ("kv_bytes", json!(cost.kv_bytes)),
        ("activation_bytes", json!(cost.activation_bytes)),
        ("bytes", json!(all_bytes(&cost))),
        ("operations", json!(cost.ops())),
        ("bytes_per_s", json!(all_bytes(&cost) as f64 / seconds)),
        ("ops_per_s", json!(cost.ops() as f64 / seconds)),
        ("roofline_percent", json!(share)),
        ("bound", json!(peaks.bound(seconds, least))),
        ("kernel", json!(backend.explain(&OpSig { program, op }, at.tokens))),
    ])
}

fn markdown(row: &Row, heading: bool) -> String {
    let get = |name| row.iter().find(|(n, _)| *n == name).map_or(&Value::Null, |(_, value)| value);
    let text = |name| get(name).as_str().unwrap_or("-").replace('|', "\\|");
    let whole = |name| get(name).to_string();
    let scaled = |name, digits: usize, unit: f64| {
        get(name).as_f64().map_or("-".into(), |x| format!("{:.digits$}", x / unit))
    };
    let columns = [
        ("op", 7, text("op")),
        ("name", 22, text("name")),
        ("format", 6, text("format")),
        ("shape", 16, text("shape")),
        ("tokens", 6, whole("tokens")),
        ("depth", 5, whole("depth")),
        ("count", 5, whole("count")),
        ("cache", 5, text("cache")),
        ("µs", 9, scaled("seconds", 2, 1e-6)),
        ("± %", 5, scaled("spread", 1, 0.02)),
        ("MB", 8, scaled("bytes", 3, 1e6)),
        ("GB/s", 7, scaled("bytes_per_s", 2, 1e9)),
        ("GOP/s", 7, scaled("ops_per_s", 1, 1e9)),
        ("roofline %", 10, scaled("roofline_percent", 1, 1.0)),
        ("bound", 7, text("bound")),
        ("clock", 9, text("clock")),
    ];
    table(&columns, heading)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers that are alike, and a third of another shape.
    #[test]
    fn ops_that_are_alike_count_once() {
        let lookup = |name: &str| {
            let rows = if name.contains('2') { 64 } else { 32 };
            Some(WeightInfo::new(vec![32, rows], Format::Q8_0))
        };
        let mut b = Builder::new("three", &lookup);
        let mut x = b.input("x", Dim::Tokens, 32);
        for layer in 0..2 {
            b.segment(&format!("blk.{layer}"));
            let weight = b.weight(&format!("blk.{layer}.ffn_up.weight"), 32, 32);
            x = b.linear("y", x, weight, None);
            x = b.add("sum", x, x);
        }
        let weight = b.weight("blk.2.ffn_up.weight", 64, 32);
        let y = b.linear("z", x, weight, None);
        b.output(y);
        let program = b.finish().unwrap();
        let found = distinct(&program);
        let names: Vec<_> = found.iter().map(|(op, count)| (name_of(&program, op), *count)).collect();
        let expected = [("ffn_up", 2), ("sum", 2), ("ffn_up", 1)];
        assert_eq!(names.iter().map(|(name, n)| (name.as_str(), *n)).collect::<Vec<_>>(), expected);
        assert_eq!(shape_of(&program, found[2].0), "32x64");
        assert_eq!(
            (format_of(&program, found[0].0), format_of(&program, found[1].0)),
            ("Q8_0".into(), "F32".into())
        );
        assert_eq!(depends(&program, found[0].0), (false, true));
    }

    #[test]
    fn copies_exceed_the_caches() {
        let of = |rows, at, budget| {
            let program = matmul(Format::Q8_0, 1024, rows).unwrap();
            copies(&Subject { program, name: String::new(), count: 1 }, at, budget)
        };
        let one = At { tokens: 1, depth: 0 };
        // 1088 bytes a row.
        assert_eq!(of(1024, one, 1 << 20), Some(1));
        assert_eq!(of(1024, one, 10 << 20), Some(10));
        assert_eq!(of(1, one, 8 << 20), None);
        // A cache that fills pages, and is read to its depth.
        let program = attend(Format::F16, (8, 8, 64)).unwrap();
        let subject = Subject { program, name: String::new(), count: 1 };
        let deep = At { tokens: 1, depth: 1023 };
        assert_eq!(cost(&subject, deep).kv_bytes, 1024 * 8 * 128 * 2);
        assert_eq!(copies(&subject, deep, 8 << 20), Some(4));
        assert_eq!(copies(&subject, At { tokens: 1, depth: 0 }, 256 << 20), None);
    }

    #[test]
    fn bounds() {
        let peaks = Peaks {
            by: BY_KERNELS,
            read: Some(1e9),
            copy: Some(2e9),
            integer: Some(1e10),
            float: None,
            launch: Some(1e-6),
        };
        let product = Cost { weight_bytes: 1000, integer_ops: 20_000, ..Cost::default() };
        let least = peaks.least(&product);
        assert_eq!(least, Some((1e-6, 2e-6)));
        assert_eq!((peaks.bound(1.5e-6, least), peaks.bound(4e-6, least)), (Some("launch"), Some("compute")));
        assert_eq!(peaks.least(&Cost { float_ops: 1, ..Cost::default() }), None);
        let rows = peaks.least(&Cost { activation_bytes: 2000, weight_bytes: 2000, ..Cost::default() });
        assert_eq!((rows, peaks.bound(4e-6, rows)), (Some((2e-6, 0.0)), Some("memory")));
    }

    #[test]
    fn shapes_and_heads() {
        assert_eq!(shape("4096x14336"), Ok((4096, Some(14336))));
        assert_eq!(shape("64"), Ok((64, None)));
        assert!(shape("0").is_err() && shape("4x").is_err());
        assert_eq!(heads("32/8x128"), Ok((32, 8, 128)));
        assert!(heads("32/5x128").is_err() && heads("8x128").is_err());
    }
}

//! Finds the op at which two backends part.
//!
//! Both run the same tokens, with every result readable. Then each op is judged by its own error: what one backend
//! makes of the inputs that the other had. Errors that ops only pass on are told apart from errors that an op makes.
//! The first op beyond its bound is shrunk to few inputs, and becomes a [`Recording`] that runs alone.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use halite_kernels::formats::{Format, Kind, Layout};

use crate::backend::reference::Reference;
use crate::backend::{Backend, Cancel, Caps, Contract, Limits, Span, Step};
use crate::conformance::{
    Comparison, Failure, Output, PROBE_BOUND, PROBES, Recording, SpanData, StepData, compare, op_bound, probe,
};
use crate::error::{Error, Result};
use crate::loaded::{Ceiling, Loaded};
use crate::memory::zeroed;
use crate::model::{Model, ProgramOptions};
use crate::passes;
use crate::program::{Dim, Epilogue, Op, PAGE_POSITIONS, Program, Slot, State, StateId, TensorId};
use crate::weights::{Budget, Weights};

/// Most runs of an op while it is shrunk.
const SHRINK_RUNS: usize = 400;

/// What to run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BisectOptions {
    /// The tokens of the first step.
    pub tokens: Vec<u32>,
    /// Steps of one token after it: the most likely tokens by the second backend.
    pub decode: u32,
    /// Options of the program.
    pub program: ProgramOptions,
}

impl BisectOptions {
    /// Runs tokens in one step, and two steps of a token after it.
    pub fn new(tokens: Vec<u32>) -> BisectOptions {
        BisectOptions { tokens, decode: 2, program: ProgramOptions::default() }
    }
}

crate::setters!(BisectOptions { decode: u32, program: ProgramOptions });

/// What was found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Bisection {
    /// Every op that was compared, in order, up to the one at fault.
    pub ops: Vec<OpReport>,
    /// The op at fault: the first one whose own error is beyond its bound. `None`: all differences are explained by
    /// rounding, and [`Bisection::ops`] is the evidence.
    pub fault: Option<Fault>,
}

/// How the results of an op differ.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct OpReport {
    /// The step, from 0.
    pub step: usize,
    /// Name of the op's segment.
    pub segment: String,
    /// The op.
    pub op: &'static str,
    /// Name of its first result.
    pub result: String,
    /// Normalised mean squared error of its results in the whole run: its own error, and what its inputs brought.
    pub in_the_run: f64,
    /// Its own error: from the inputs of the second backend.
    pub own: f64,
    /// The largest own error that the contract allows; `None`: the same bits.
    pub bound: Option<f64>,
}

/// An op that is wrong.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Fault {
    /// The step, the segment and the op's results are those of this report.
    pub at: OpReport,
    /// How far its results are from those of the second backend.
    pub comparison: Option<Comparison>,
    /// What the backend said, if it failed.
    pub error: Option<String>,
    /// Whether the op is wrong alone too. If not, it is wrong only in the whole program: its memory is shared wrongly,
    /// or ops run in the wrong order.
    pub alone: bool,
    /// Which of the two is wrong by the reference's definition.
    pub wrong: Wrong,
    /// The smallest case found that still fails. With `alone`, it fails on the first backend.
    pub recording: Recording,
    /// What remained after shrinking, for people.
    pub shrunk: Vec<String>,
}

/// Which backend differs from the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wrong {
    /// The first.
    First,
    /// The second.
    Second,
    /// Both.
    Both,
    /// Neither: the two are on different sides of the reference.
    Neither,
}

impl Wrong {
    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Wrong::First => "the first",
            Wrong::Second => "the second",
            Wrong::Both => "both",
            Wrong::Neither => "neither",
        }
    }
}

/// A backend that runs a model with readable results.
struct Tapped {
    loaded: Loaded,
    groups: usize,
    pages: u32,
}

/// What a step left behind.
struct Taps {
    /// The words of each result, by name.
    words: HashMap<String, Vec<u32>>,
    /// The bytes of each state before the step and after it.
    before: Vec<Vec<u8>>,
    after: Vec<Vec<u8>>,
}

impl Tapped {
    fn new(
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        program: &Program,
        limits: Limits,
        pages: u32,
    ) -> Result<Tapped> {
        let loaded =
            Loaded::new(model, backend, program, limits, |_| pages.into(), Ceiling::default(), &mut |_| {})?;
        Ok(Tapped { groups: program.windows.len(), pages, loaded })
    }

    fn states(&self) -> Result<Vec<Vec<u8>>> {
        let read = |buffer: &crate::backend::Buffer| {
            let mut bytes = zeroed(buffer.bytes(), "a copy of the KV cache")?;
            self.loaded.backend.read(buffer, 0, &mut bytes)?;
            Ok(bytes)
        };
        self.loaded.states.iter().map(read).collect()
    }

    /// Runs a step in which the tokens from `outputs` on have outputs.
    fn run(&mut self, start: u32, tokens: &[u32], outputs: Range<u32>) -> Result<Taps> {
        let before = self.states()?;
        let tables: Vec<Vec<u32>> = (0..self.groups).map(|_| (0..self.pages).collect()).collect();
        let spans = [Span { tables: &tables, start, len: tokens.len() as u32 }];
        let (outputs, cancel): (Vec<u32>, _) = (outputs.collect(), Cancel::default());
        let step = Step { spans: &spans, tokens, outputs: &outputs, cancel: &cancel };
        let all = 0..self.loaded.program.segments.len();
        self.loaded.run(&step, std::slice::from_ref(&all))?;
        let mut words = HashMap::new();
        for &id in &self.loaded.program.io {
            let t = self.loaded.program.tensor(id);
            let rows = passes::rows(t.rows, tokens.len() as u32, outputs.len() as u32);
            let mut content = zeroed(rows * u64::from(t.cols), "a tap")?;
            self.loaded.read(Some(id), &mut content)?;
            words.insert(t.name.clone(), content);
        }
        Ok(Taps { words, before, after: self.states()? })
    }
}

/// Judges each op of a model's program on the first backend against the second. Calls `progress` with each report.
///
/// # Errors
/// [`Error::Unsupported`] if one of them lacks an op; other errors of the model or the backends.
pub fn bisect(
    model: &Arc<Model>,
    first: &Arc<dyn Backend>,
    second: &Arc<dyn Backend>,
    options: &BisectOptions,
    progress: &mut dyn FnMut(&OpReport),
) -> Result<Bisection> {
    let length = options.tokens.len() as u32;
    if length == 0 {
        return Err(Error::argument("tokens", "at least one", "none"));
    }
    let vocab = model.hparams().vocab_size;
    if let Some(bad) = options.tokens.iter().find(|&&id| id >= vocab) {
        return Err(Error::argument("token id", format!("below {vocab}"), bad));
    }
    let positions = length + options.decode;
    let program = model.program(options.program, positions.next_multiple_of(PAGE_POSITIONS))?;
    // The results that the first backend's fused program has are read on both; its fusions stay as they are.
    let fused = passes::for_backend(&program, first.caps());
    let mut names = HashSet::new();
    for (_, op) in fused.ops() {
        op.outputs(&mut |id| _ = names.insert(fused.tensor(id).name.clone()));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (exposed, _) = passes::expose(&program, &names);
    let limits = Limits { tokens: length, outputs: 1 };
    let pages = positions.div_ceil(PAGE_POSITIONS);
    let mut a = Tapped::new(model, first, &exposed, limits, pages)?;
    let mut b = Tapped::new(model, second, &exposed, limits, pages)?;
    let judge = Judge::new(model, first, second, a.loaded.program.clone());
    let mut found = Bisection { ops: Vec::new(), fault: None };
    let (mut start, mut tokens) = (0, options.tokens.clone());
    // States into which different inputs were written.
    let mut parted = vec![false; program.states.len()];
    for step in 0..=options.decode as usize {
        let last = tokens.len() as u32 - 1..tokens.len() as u32;
        let taps = [a.run(start, &tokens, last.clone())?, b.run(start, &tokens, last)?];
        let mut data = StepData::new(Vec::new(), tokens.clone(), vec![tokens.len() as u32 - 1], Vec::new());
        let tables = (0..a.groups).map(|_| (0..pages).collect()).collect();
        data.spans.push(SpanData::new(start, tokens.len() as u32, tables));
        for (segment, op) in judge.program.ops() {
            let Some((report, fault)) = judge.op(step, segment, op, &taps, &data, &mut parted)? else {
                continue;
            };
            progress(&report);
            found.ops.push(report);
            if fault.is_some() {
                found.fault = fault;
                return Ok(found);
            }
        }
        start += tokens.len() as u32;
        let best = judge.program.outputs.arg_max.map(|id| &judge.program.tensor(id).name);
        let best = best.and_then(|name| taps[1].words.get(name)).and_then(|words| words.first());
        match best {
            Some(&token) if token < vocab => tokens = vec![token],
            _ => break,
        }
    }
    Ok(found)
}

/// A result of a model beside that of another program.
#[cfg(feature = "replay")]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DumpReport {
    /// The result's name.
    pub result: String,
    /// Its name in the dump.
    pub dumped: String,
    /// Normalised mean squared error against the dump.
    pub nmse: f64,
    /// The element that is furthest off, `[token, element]`.
    pub worst: [usize; 2],
    /// The bound beyond which the two part: rounding does not explain it. With quantised weights, it is wide.
    pub bound: f64,
}

/// Compares a model's results on a backend with those that another program wrote for the same tokens.
///
/// The dump is a file in the safetensors format: `tokens` as I32, and results as F32 `[tokens, elements]`, by the
/// names that Halite or llama.cpp gives them. Results without a counterpart are left out. The reports are in the order of
/// the program.
///
/// # Errors
/// [`Error::Argument`] if the dump is malformed or nothing in it has a counterpart; errors of the model or the backend.
#[cfg(feature = "replay")]
pub fn against_dump(
    model: &Arc<Model>,
    backend: &Arc<dyn Backend>,
    dump: &[u8],
    options: ProgramOptions,
) -> Result<Vec<DumpReport>> {
    let wrong =
        |got: String| Error::argument("dump", "safetensors with `tokens` as I32 and results as F32", got);
    let file = safetensors::SafeTensors::deserialize(dump).map_err(|e| wrong(e.to_string()))?;
    let tokens = file.tensor("tokens").map_err(|e| wrong(e.to_string()))?;
    let words = |bytes: &[u8]| -> Vec<u32> {
        bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
    };
    let tokens = words(tokens.data());
    let (length, vocab) = (tokens.len() as u32, model.hparams().vocab_size);
    if tokens.is_empty() || tokens.iter().any(|&id| id >= vocab) {
        return Err(wrong(format!("{length} tokens, not all below {vocab}")));
    }
    let program = model.program(options, length.next_multiple_of(PAGE_POSITIONS))?;
    let mut found: HashMap<String, (&str, Vec<u32>)> = HashMap::new();
    for (name, view) in file.iter() {
        if let Some(ours) = counterpart(name, &program)
            && view.dtype() == safetensors::Dtype::F32
        {
            found.insert(ours, (name, words(view.data())));
        }
    }
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    let (exposed, _) = passes::expose(&program, &names);
    let limits = Limits { tokens: length, outputs: length };
    let mut tapped = Tapped::new(model, backend, &exposed, limits, length.div_ceil(PAGE_POSITIONS))?;
    let taps = tapped.run(0, &tokens, 0..length)?;
    let quantised =
        program.weights.iter().any(|&id| matches!(program.tensor(id).format.kind(), Kind::Quantised { .. }));
    let mut reports = Vec::new();
    for (_, op) in program.ops() {
        let mut outs = Vec::new();
        op.outputs(&mut |id| outs.push(id));
        for t in outs.into_iter().map(|id| program.tensor(id)) {
            let (Some((dumped, want)), Some(got)) = (found.get(&t.name), taps.words.get(&t.name)) else {
                continue;
            };
            if want.len() != got.len() {
                return Err(wrong(format!("{} elements of `{dumped}`, expected {}", want.len(), got.len())));
            }
            let output = |words: &[u32]| Output {
                step: 0,
                name: t.name.clone(),
                integers: false,
                cols: t.cols as usize,
                words: words.to_vec(),
            };
            let (comparison, _) = compare(&[output(got)], &[output(want)], Contract::Close, 0.0);
            let worst = comparison.worst.first().map_or([0, 0], |worst| [worst.row, worst.column]);
            let bound = if quantised { 3e-2 } else { 1e-5 };
            let (result, dumped) = (t.name.clone(), (*dumped).to_owned());
            reports.push(DumpReport { result, dumped, nmse: comparison.nmse, worst, bound });
        }
    }
    if reports.is_empty() {
        return Err(wrong("no result that this model has".into()));
    }
    Ok(reports)
}

/// Results as llama.cpp's graphs name them before the layer's number, and as Halite does behind it. The first that the
/// program has counts.
#[cfg(feature = "replay")]
const LLAMA_CPP: [(&str, &[&str]); 19] = [
    ("inp_embd", &["embedding.embed"]),
    ("inp_scaled", &["embedding.embed"]),
    ("attn_norm", &["attn_norm"]),
    ("Qcur_normed", &["q_norm"]),
    ("Qcur", &["q_rope", "q_norm", "q"]),
    ("Kcur", &["k_rope", "k_norm", "k"]),
    ("Vcur", &["v"]),
    ("kqv_out", &["attend"]),
    ("attn_out", &["attn_output"]),
    ("attn_post_norm", &["attn_post_norm"]),
    ("ffn_inp", &["attn_residual"]),
    ("sa_out", &["attn_residual"]),
    ("ffn_norm", &["ffn_norm"]),
    ("ffn_moe_logits", &["router"]),
    ("ffn_moe_out", &["experts"]),
    ("ffn_out", &["ffn_down"]),
    ("ffn_post_norm", &["ffn_post_norm"]),
    ("l_out", &["ffn_residual"]),
    ("result_output", &["logits"]),
];

/// Returns the name of the result that a dumped one is.
#[cfg(feature = "replay")]
fn counterpart(dumped: &str, program: &Program) -> Option<String> {
    let there = |name: &str| program.find(name).is_some().then(|| name.to_owned());
    if let Some(name) = there(dumped) {
        return Some(name);
    }
    let (name, layer) = match dumped.rsplit_once('-') {
        Some((name, layer)) => (name, Some(layer.parse::<u32>().ok()?)),
        None => (dumped, None),
    };
    let (_, ours) = LLAMA_CPP.iter().find(|(theirs, _)| *theirs == name)?;
    ours.iter().find_map(|ours| match layer {
        Some(layer) => there(&format!("blk.{layer}.{ours}")),
        None => there(ours),
    })
}

/// Compares single ops.
struct Judge<'a> {
    model: &'a Model,
    first: &'a dyn Backend,
    second: &'a dyn Backend,
    /// The program of the first backend.
    program: Arc<Program>,
    /// What the two promise together.
    contract: Contract,
}

/// Ops to run alone, the content of the cache before them, and the op that is wrong if their results are.
struct Attempt<'a> {
    ops: Vec<Op>,
    states: &'a [Vec<u8>],
    blamed: &'a Op,
}

/// The result of a judged op.
struct Verdict {
    comparison: Comparison,
    holds: bool,
}

impl<'a> Judge<'a> {
    fn new(
        model: &'a Model,
        first: &'a Arc<dyn Backend>,
        second: &'a Arc<dyn Backend>,
        program: Arc<Program>,
    ) -> Judge<'a> {
        let contracts = [first.caps().contract, second.caps().contract];
        let contract = match contracts {
            [Contract::Exact, Contract::Exact] => Contract::Exact,
            _ if contracts.contains(&Contract::Native) => Contract::Native,
            _ => Contract::Close,
        };
        Judge { model, first: &**first, second: &**second, program, contract }
    }

    /// Judges an op; `None` for one without results of its own, which is judged with the op that reads them.
    fn op(
        &self,
        step: usize,
        segment: usize,
        op: &Op,
        taps: &[Taps; 2],
        data: &StepData,
        parted: &mut [bool],
    ) -> Result<Option<(OpReport, Option<Fault>)>> {
        let (mut inputs, mut outs) = (Vec::new(), Vec::new());
        op.inputs(&mut |id| inputs.push(id));
        op.outputs(&mut |id| outs.push(id));
        inputs.retain(|&id| !matches!(self.program.tensor(id).slot, Slot::Weight(_)));
        let words = |side: usize, id: TensorId| taps[side].words.get(&self.program.tensor(id).name);
        let (reads, writes) = states_of(op);
        let same_inputs = inputs.iter().all(|&id| words(0, id) == words(1, id))
            && reads.iter().all(|s| !parted.get(s.0 as usize).copied().unwrap_or(true));
        for state in &writes {
            if let Some(parted) = parted.get_mut(state.0 as usize) {
                *parted |= !same_inputs;
            }
        }
        if outs.is_empty() {
            return Ok(None);
        }
        let results = |side: usize| -> Vec<Output> {
            outs.iter().map(|&id| self.output(id, words(side, id))).collect()
        };
        let in_the_run = self.compare(op, &results(0), &results(1));
        let segment_name = self.program.segments.get(segment).map_or("?", |s| &s.name);
        let mut report = OpReport {
            step,
            segment: segment_name.into(),
            op: op.name(),
            result: self.program.tensor(outs[0]).name.clone(),
            in_the_run: in_the_run.comparison.nmse,
            own: in_the_run.comparison.nmse,
            bound: in_the_run.comparison.bound,
        };
        if let Some(fault) = self.probed(step, &mut report, op, data)? {
            return Ok(Some((report, Some(fault))));
        }
        if same_inputs && in_the_run.holds {
            return Ok(Some((report, None)));
        }
        // The op alone, then with the op that fills its cache, each from the second backend's inputs.
        let writer = reads.first().and_then(|state| self.writer(segment, *state));
        let shared =
            reads.iter().any(|s| self.program.states.get(s.0 as usize).is_some_and(|s| !s.is_causal()));
        let mut attempts: Vec<Attempt<'_>> = Vec::new();
        if !shared {
            // An op that writes a state may read what was there.
            let states = if writes.is_empty() { &taps[1].after } else { &taps[1].before };
            attempts.push(Attempt { ops: vec![op.clone()], states, blamed: op });
        }
        if let Some(writer) = writer {
            let ops = vec![writer.clone(), op.clone()];
            attempts.push(Attempt { ops, states: &taps[1].before, blamed: writer });
        }
        for Attempt { ops, states, blamed } in attempts {
            let recording = self.record(segment_name, &ops, states, &taps[1], data, op)?;
            let (comparison, error) = match recording.run(self.first) {
                Ok(got) => {
                    let want = recording.expected.clone().unwrap_or_default();
                    let Verdict { comparison, holds } = self.compare(op, &got, &want);
                    report.own = comparison.nmse;
                    if holds {
                        continue;
                    }
                    (Some(comparison), None)
                }
                Err(why) => (None, Some(why.to_string())),
            };
            report.op = blamed.name();
            let wrong = self.wrong(&recording);
            let (recording, shrunk) = Shrink { first: self.first, runs: 0 }.shrink(recording);
            let fault =
                Fault { at: report.clone(), comparison, error, alone: true, wrong, recording, shrunk };
            return Ok(Some((report, Some(fault))));
        }
        // Alone it is right. With the same inputs, it was wrong in the whole program.
        if same_inputs {
            report.own = in_the_run.comparison.nmse;
            let recording =
                self.record(segment_name, std::slice::from_ref(op), &taps[1].after, &taps[1], data, op)?;
            let fault = Fault {
                at: report.clone(),
                comparison: Some(in_the_run.comparison),
                error: None,
                alone: false,
                wrong: Wrong::First,
                recording,
                shrunk: Vec::new(),
            };
            return Ok(Some((report, Some(fault))));
        }
        Ok(Some((report, None)))
    }

    /// Judges a product with quantised weights by probes too, once: its bound is wide, because devices may leave
    /// activations unquantised. Probes need no such bound.
    fn probed(&self, step: usize, report: &mut OpReport, op: &Op, data: &StepData) -> Result<Option<Fault>> {
        let Op::MatMul { x, parts, .. } = op else { return Ok(None) };
        let quantised = |id| matches!(self.program.tensor(id).format.kind(), Kind::Quantised { .. });
        if step > 0 || self.contract != Contract::Close || !parts.iter().any(|part| quantised(part.weight)) {
            return Ok(None);
        }
        let nothing = Taps { words: HashMap::new(), before: Vec::new(), after: Vec::new() };
        let tables = data.spans.first().map(|span| span.tables.clone()).unwrap_or_default();
        let all = PROBES as u32;
        let spans = vec![SpanData::new(0, all, tables)];
        let probes = StepData::new(spans, vec![0; PROBES], (0..all).collect(), Vec::new());
        let name = format!("{}, probed", report.segment);
        let mut recording = self.record(&name, std::slice::from_ref(op), &[], &nothing, &probes, op)?;
        recording.bound = PROBE_BOUND;
        let program = recording.program.clone();
        for (&id, input) in program.io.iter().zip(&mut recording.steps[0].inputs) {
            let Some(words) = input else { continue };
            let t = program.tensor(id);
            let is_x = t.name == self.program.tensor(*x).name;
            let row = |n| if is_x { probe(n, t.cols as usize) } else { vec![0; t.cols as usize] };
            *words = (0..PROBES).flat_map(row).collect();
        }
        let run = |backend| {
            recording.run(backend).map_err(|why| Error::Backend {
                backend: Backend::caps(backend).name.clone(),
                message: why.to_string(),
            })
        };
        let (got, want) = (run(self.first)?, run(self.second)?);
        let (comparison, holds) = compare(&got, &want, self.contract, PROBE_BOUND);
        if holds {
            return Ok(None);
        }
        recording.expected = Some(want);
        (report.own, report.bound) = (comparison.nmse, comparison.bound);
        let wrong = self.wrong(&recording);
        let (recording, shrunk) = Shrink { first: self.first, runs: 0 }.shrink(recording);
        let (at, comparison) = (report.clone(), Some(comparison));
        Ok(Some(Fault { at, comparison, error: None, alone: true, wrong, recording, shrunk }))
    }

    fn output(&self, id: TensorId, words: Option<&Vec<u32>>) -> Output {
        let t = self.program.tensor(id);
        let (integers, cols) = (t.format == Format::I32, t.cols as usize);
        Output { step: 0, name: t.name.clone(), integers, cols, words: words.cloned().unwrap_or_default() }
    }

    fn compare(&self, op: &Op, got: &[Output], want: &[Output]) -> Verdict {
        let (comparison, holds) = compare(got, want, self.contract, op_bound(&self.program, op));
        Verdict { comparison, holds }
    }

    /// The op that fills a state in a segment.
    fn writer(&self, segment: usize, state: StateId) -> Option<&Op> {
        let ops = &self.program.segments.get(segment)?.ops;
        ops.iter().find(|op| states_of(op).1.contains(&state))
    }

    /// Ops of the program with the inputs and the results that the second backend had; `judged` has the results.
    fn record(
        &self,
        name: &str,
        ops: &[Op],
        states: &[Vec<u8>],
        taps: &Taps,
        data: &StepData,
        judged: &Op,
    ) -> Result<Recording> {
        let name = format!("{} of {name}", judged.name());
        let mut fragment = passes::fragment(&self.program, &name, ops, |_| false);
        // Plain rows, so that every backend can run it.
        passes::lay_out(&mut fragment.program, &Caps::new("plain", ""));
        let host = Reference::new();
        let weights = Weights::load(
            self.model.gguf(),
            &fragment.program,
            &host,
            Budget::Copies(u64::MAX),
            &mut |_| {},
        )?;
        let bytes = weights.buffers.iter().map(|buffer| {
            let mut bytes = zeroed(buffer.bytes(), "a copy of a weight")?;
            host.read(buffer, 0, &mut bytes)?;
            Ok(bytes)
        });
        let bytes = bytes.collect::<Result<Vec<_>>>()?;
        let states = fragment.states.iter().filter_map(|id| states.get(id.0 as usize).cloned()).collect();
        let (mut written, mut expected) = (HashSet::new(), Vec::new());
        fragment.program.ops().for_each(|(_, op)| op.outputs(&mut |id| _ = written.insert(id)));
        let mut step = data.clone();
        for &id in &fragment.program.io {
            let words = taps.words.get(&fragment.program.tensor(id).name);
            step.inputs.push(if written.contains(&id) {
                None
            } else {
                Some(words.cloned().unwrap_or_default())
            });
            if written.contains(&id) {
                let whole = fragment.tensors.get(id.0 as usize).copied().unwrap_or(id);
                expected.push(self.output(whole, words));
            }
        }
        let program = Arc::new(fragment.program);
        let bound = op_bound(&self.program, judged);
        let mut recording = Recording::new(program, bytes, states, vec![step], bound);
        recording.expected = Some(expected);
        Ok(recording)
    }

    /// Which of the two is not what the reference defines.
    fn wrong(&self, recording: &Recording) -> Wrong {
        let Ok(want) = recording.run(&Reference::new()) else { return Wrong::Neither };
        let is_wrong = |result: std::result::Result<Vec<Output>, Failure>, contract| match result {
            Ok(got) => !compare(&got, &want, contract, recording.bound).1,
            Err(_) => true,
        };
        let first = is_wrong(recording.run(self.first), self.first.caps().contract);
        let second = is_wrong(recording.run(self.second), self.second.caps().contract);
        match (first, second) {
            (true, true) => Wrong::Both,
            (true, false) => Wrong::First,
            (false, true) => Wrong::Second,
            (false, false) => Wrong::Neither,
        }
    }
}

/// The states that an op reads, and those that it writes.
fn states_of(op: &Op) -> (Vec<StateId>, Vec<StateId>) {
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    let Ok(_) = op.try_map(
        |_, _| Ok::<_, std::convert::Infallible>(()),
        |&id, access| {
            match access {
                crate::program::Access::Read => reads.push(id),
                crate::program::Access::Write => writes.push(id),
            }
            Ok(())
        },
    );
    (reads, writes)
}

/// Makes a failing recording smaller.
struct Shrink<'a> {
    first: &'a dyn Backend,
    runs: usize,
}

impl Shrink<'_> {
    /// Returns the comparison of a recording that still fails against the reference, with what that gives as expected
    /// results.
    fn fails(&mut self, recording: &mut Recording) -> Option<Comparison> {
        self.runs += 1;
        if recording.program.validate().is_err() {
            return None;
        }
        recording.expected = None;
        let want = recording.run(&Reference::new()).ok()?;
        let got = recording.run(self.first).ok()?;
        let contract = self.first.caps().contract;
        let (comparison, holds) = compare(&got, &want, contract, recording.bound);
        recording.expected = Some(want);
        (!holds).then_some(comparison)
    }

    fn shrink(mut self, original: Recording) -> (Recording, Vec<String>) {
        let mut told = Vec::new();
        let mut best = original.clone();
        // Without an error against the reference there is nothing to shrink by.
        let Some(mut comparison) = self.fails(&mut best) else { return (original, told) };
        if let Some(worst) = comparison.worst.first() {
            let row = worst.row;
            if let Some(mut one) = one_token(&best, row)
                && let Some(smaller) = self.fails(&mut one)
            {
                told.push(format!("one token: row {row} of the step"));
                (best, comparison) = (one, smaller);
            }
        }
        if let Some(worst) = comparison.worst.first() {
            let (output, column) = (worst.output.clone(), worst.column);
            for rows in [column..column + 1, column / 16 * 16..(column / 16 + 1) * 16] {
                if let Some(mut few) = weight_rows(&best, &output, rows.clone())
                    && let Some(smaller) = self.fails(&mut few)
                {
                    told.push(format!("rows {} to {} of the weight", rows.start, rows.end - 1));
                    (best, comparison) = (few, smaller);
                    break;
                }
            }
        }
        self.zero(&mut best, &mut comparison);
        told.extend(remaining(&best));
        if let Some(worst) = comparison.worst.first() {
            told.push(format!("element {}[{}, {}]", worst.output, worst.row, worst.column));
        }
        (best, told)
    }

    /// Zeroes inputs, halves of the rest at first, as long as it still fails.
    fn zero(&mut self, best: &mut Recording, comparison: &mut Comparison) {
        let inputs = best.steps[0].inputs.len();
        for n in 0..inputs {
            let Some(len) = best.steps[0].inputs[n].as_ref().map(Vec::len) else { continue };
            let mut piece = len.next_power_of_two().max(2) / 2;
            while piece > 0 && self.runs < SHRINK_RUNS {
                for start in (0..len).step_by(piece) {
                    let range = start..(start + piece).min(len);
                    let all_zero = |words: &Vec<u32>| words[range.clone()].iter().all(|&w| w == 0);
                    if self.runs >= SHRINK_RUNS || best.steps[0].inputs[n].as_ref().is_none_or(all_zero) {
                        continue;
                    }
                    let mut zeroed = best.clone();
                    if let Some(words) = &mut zeroed.steps[0].inputs[n] {
                        words[range].fill(0);
                    }
                    if let Some(smaller) = self.fails(&mut zeroed) {
                        (*best, *comparison) = (zeroed, smaller);
                    }
                }
                piece /= 2;
            }
        }
    }
}

/// What is left of the inputs.
fn remaining(recording: &Recording) -> Vec<String> {
    let program = &recording.program;
    // Blocks of activations, if the op multiplies.
    let block = program.weights.iter().find_map(|&id| match program.tensor(id).format.kind() {
        Kind::Quantised { activation, .. } => Some(activation.block_len()),
        Kind::Float => None,
    });
    let mut told = Vec::new();
    for (words, &id) in recording.steps[0].inputs.iter().zip(&program.io) {
        let Some(words) = words else { continue };
        let t = program.tensor(id);
        let left: Vec<usize> = (0..words.len()).filter(|&i| words[i] != 0).collect();
        let (Some(&first), Some(&last)) = (left.first(), left.last()) else {
            told.push(format!("input {}: all zero", t.name));
            continue;
        };
        let cols = t.cols as usize;
        let mut text = format!("input {}: {} of {} elements are not zero", t.name, left.len(), words.len());
        if first / cols == last / cols {
            text += &format!(", columns {} to {}", first % cols, last % cols);
            if let Some(block) = block.filter(|block| first % cols / block == last % cols / block) {
                text += &format!(", block {} of {block}", first % cols / block);
            }
        }
        told.push(text);
    }
    told
}

/// The same with a single token of the step; `None` if other tokens matter to it.
fn one_token(recording: &Recording, row: usize) -> Option<Recording> {
    let program = &recording.program;
    let [step] = recording.steps.as_slice() else { return None };
    let [span] = step.spans.as_slice() else { return None };
    let by_token = program.io.iter().all(|&id| program.tensor(id).rows == Dim::Tokens);
    let writes = program.ops().any(|(_, op)| !states_of(op).1.is_empty());
    let causal = program.states.iter().all(State::is_causal);
    if !by_token || writes || !causal || span.len < 2 || row >= span.len as usize {
        return None;
    }
    let mut one = recording.clone();
    let to = &mut one.steps[0];
    to.spans[0] = SpanData::new(span.start + row as u32, 1, span.tables.clone());
    to.tokens = vec![*step.tokens.get(row)?];
    to.outputs = vec![0];
    for words in to.inputs.iter_mut().flatten() {
        let cols = words.len() / span.len as usize;
        *words = words.get(row * cols..(row + 1) * cols)?.to_vec();
    }
    Some(one)
}

/// The same with some rows of the weight that gives an output; `None` for other ops than plain products.
fn weight_rows(recording: &Recording, output: &str, rows: std::ops::Range<usize>) -> Option<Recording> {
    let program = &recording.program;
    let mut ops = program.ops();
    let (Some((_, Op::MatMul { x, parts, epilogue: Epilogue::None, outs })), None) = (ops.next(), ops.next())
    else {
        return None;
    };
    let at = outs.iter().position(|&out| program.tensor(out).name == output)?;
    let (part, &out) = (parts.get(at)?, outs.get(at)?);
    let weight = program.tensor(part.weight);
    let Dim::Fixed(all) = weight.rows else { return None };
    if rows.end > all as usize || weight.layout != Layout::Rows {
        return None;
    }
    // Only this part remains.
    let op = Op::product(*x, part.weight, part.bias, out);
    let fragment = passes::fragment(program, &program.name, std::slice::from_ref(&op), |_| false);
    let mut small = fragment.program;
    let old = |id: TensorId| fragment.tensors.get(id.0 as usize).copied();
    let mut to = recording.clone();
    to.weights.clear();
    for &id in &small.weights.clone() {
        let Slot::Weight(n) = program.tensor(old(id)?).slot else { return None };
        let bytes = recording.weights.get(n as usize)?;
        let is_matrix = old(id)? == part.weight;
        let t = small.tensors.get_mut(id.0 as usize)?;
        let unit = if is_matrix { t.format.row_bytes(t.cols as usize)? } else { 4 };
        to.weights.push(bytes.get(rows.start * unit..rows.end * unit)?.to_vec());
        if is_matrix {
            t.rows = Dim::Fixed(rows.len() as u32);
        } else {
            t.cols = rows.len() as u32;
        }
    }
    let mut inputs = Vec::new();
    for &id in &small.io.clone() {
        let Slot::Io(n) = program.tensor(old(id)?).slot else { return None };
        inputs.push(recording.steps[0].inputs.get(n as usize)?.clone());
        if old(id)? == out {
            small.tensors.get_mut(id.0 as usize)?.cols = rows.len() as u32;
        }
    }
    to.steps[0].inputs = inputs;
    to.states.clear();
    to.program = Arc::new(small);
    Some(to)
}

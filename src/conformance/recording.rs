//! A program with all data of its steps: what runs on a backend and can be stored.

use std::ops::Range;
use std::sync::Arc;

use halite_kernels::formats::{Format, Layout, LengthMismatch};

use super::{Failure, Inputs};
use crate::backend::{
    Backend, Bindings, Buffer, Cancel, Limits, NO_PAGE, Span, Step, Ticket, Timing, Usage, first_page, upload,
};
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::passes;
use crate::program::{Dim, Op, PAGE_POSITIONS, Program, TensorId};
use crate::rng::SplitMix64;

/// A program, the content of its buffers, and its steps.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Recording {
    /// The program.
    pub program: Arc<Program>,
    /// The bytes of each weight, in plain rows.
    pub weights: Vec<Vec<u8>>,
    /// The bytes of each state before the first step: whole pages.
    pub states: Vec<Vec<u8>>,
    /// The steps.
    pub steps: Vec<StepData>,
    /// Bound of the normalised mean squared error of a backend that is not exact.
    pub bound: f64,
    /// The outputs that it should have; `None`: those of the reference.
    pub expected: Option<Vec<Output>>,
}

/// The data of a step.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct StepData {
    /// As in [`Step::spans`].
    pub spans: Vec<SpanData>,
    /// As in [`Step::tokens`].
    pub tokens: Vec<u32>,
    /// As in [`Step::outputs`].
    pub outputs: Vec<u32>,
    /// For each tensor in an input and output slot, its words; `None` for one that the program writes.
    pub inputs: Vec<Option<Vec<u32>>>,
}

/// As [`Span`], with data of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpanData {
    /// Position of the first token.
    pub start: u32,
    /// Number of tokens.
    pub len: u32,
    /// For each KV group, the page table.
    pub tables: Vec<Vec<u32>>,
}

impl SpanData {
    /// Tokens of a sequence.
    pub fn new(start: u32, len: u32, tables: Vec<Vec<u32>>) -> SpanData {
        SpanData { start, len, tables }
    }
}

impl StepData {
    /// A step.
    pub fn new(
        spans: Vec<SpanData>,
        tokens: Vec<u32>,
        outputs: Vec<u32>,
        inputs: Vec<Option<Vec<u32>>>,
    ) -> StepData {
        StepData { spans, tokens, outputs, inputs }
    }
}

/// An output of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output {
    /// The step, from 0.
    pub step: usize,
    /// The tensor's name.
    pub name: String,
    /// Whether the words are integers, and not floats.
    pub integers: bool,
    /// Elements of a row.
    pub cols: usize,
    /// All elements.
    pub words: Vec<u32>,
}

const GUARD_BYTES: usize = 64;
const GUARD: u8 = 0xa5;
/// A NaN that no arithmetic produces.
const POISON: u32 = 0x7fba_dbad;

impl Recording {
    /// A recording without expected outputs.
    pub fn new(
        program: Arc<Program>,
        weights: Vec<Vec<u8>>,
        states: Vec<Vec<u8>>,
        steps: Vec<StepData>,
        bound: f64,
    ) -> Recording {
        Recording { program, weights, states, steps, bound, expected: None }
    }

    /// Draws the data of a case.
    pub(super) fn random(
        program: &Arc<Program>,
        steps: &[Vec<(u32, u32)>],
        bound: f64,
        inputs: Inputs,
        seed: u64,
    ) -> Recording {
        let mut rng = SplitMix64::new(seed);
        let weights = program.weights.iter().map(|&id| random_weight(program, id, &mut rng)).collect();
        let sequences = steps.iter().map(Vec::len).max().unwrap_or(1) as u32;
        let positions = steps.iter().flatten().map(|&(start, n)| start + n).max().unwrap_or(1);
        let pages_each = positions.div_ceil(PAGE_POSITIONS);
        // Pages of the sequences are interleaved and in decreasing order, different for each KV group, so a
        // backend that ignores page tables fails. So does one that reads pages before a window.
        let table = |sequence: usize, start: u32, group: usize| -> Vec<u32> {
            let all = pages_each * sequences;
            let page = |p: u32| (p * sequences + (sequence + group) as u32) % all;
            let mut table: Vec<u32> = (0..pages_each).rev().map(page).collect();
            let first = first_page(start, program.windows[group]).min(table.len());
            table[..first].fill(NO_PAGE);
            table
        };
        // Positions that were never written hold NaN, which must never be seen.
        let pages = u64::from(pages_each) * u64::from(sequences);
        let states = program.states.iter().map(|s| vec![0xff; (pages * s.page_bytes()) as usize]).collect();
        let vocab = program.ops().find_map(|(_, op)| match op {
            Op::Embed { table, .. } => Some(program.tensor(*table).rows),
            _ => None,
        });
        let vocab = if let Some(Dim::Fixed(rows)) = vocab { rows } else { 1 };
        let mut probes = 0;
        let steps = steps.iter().enumerate().map(|(turn, step)| {
            let spans = step.iter().enumerate().filter(|(_, (_, len))| *len > 0);
            let spans: Vec<SpanData> = spans
                .map(|(s, &(start, len))| {
                    let tables = (0..program.windows.len()).map(|group| table(s, start, group)).collect();
                    SpanData { start, len, tables }
                })
                .collect();
            let n: u32 = spans.iter().map(|span| span.len).sum();
            let tokens = (0..n).map(|_| (rng.next() % u64::from(vocab)) as u32).collect();
            // Steps of the same length have other outputs.
            let first = if turn % 2 == 1 && n > 1 { 1 } else { 0 };
            let outputs: Vec<u32> = (first..n).step_by(2).collect();
            let io = program.io.iter().map(|&id| {
                if is_written(program, id) {
                    return None;
                }
                let t = program.tensor(id);
                let rows = passes::rows(t.rows, n, outputs.len() as u32) as usize;
                let cols = t.cols as usize;
                Some(match inputs {
                    Inputs::Random => (0..rows * cols).map(|_| normal(&mut rng).to_bits()).collect(),
                    Inputs::Probes => (0..rows)
                        .flat_map(|_| {
                            probes += 1;
                            probe(probes - 1, cols)
                        })
                        .collect(),
                })
            });
            let inputs = io.collect();
            StepData { spans, tokens, outputs, inputs }
        });
        let steps = steps.collect();
        Recording::new(program.clone(), weights, states, steps, bound)
    }

    /// The largest step.
    pub(super) fn limits(&self) -> Limits {
        let most = |of: fn(&StepData) -> usize| self.steps.iter().map(of).max().unwrap_or(1).max(1) as u32;
        Limits { tokens: most(|step| step.tokens.len()), outputs: most(|step| step.outputs.len()) }
    }

    /// Runs all steps on a backend, and returns their outputs.
    ///
    /// # Errors
    /// What the backend says, and memory that it did not write or should not have written.
    pub fn run(&self, backend: &dyn Backend) -> std::result::Result<Vec<Output>, Failure> {
        self.open(backend)?.run()
    }

    /// Puts all data on a backend.
    ///
    /// # Errors
    /// What the backend says.
    pub(super) fn open<'a>(&'a self, backend: &'a dyn Backend) -> std::result::Result<Opened<'a>, Failure> {
        Opened::new(self, backend).map_err(|e| Failure::Error(e.to_string()))
    }
}

/// A recording with its buffers and its plan.
pub(super) struct Opened<'a> {
    pub(super) recording: &'a Recording,
    pub(super) backend: &'a dyn Backend,
    pub(super) program: Arc<Program>,
    weights: Vec<Buffer>,
    states: Vec<Buffer>,
    pub(super) io: Vec<Buffer>,
    plan: Box<dyn crate::backend::Plan>,
}

impl<'a> Opened<'a> {
    fn new(recording: &'a Recording, backend: &'a dyn Backend) -> Result<Opened<'a>> {
        let mut program = Program::clone(&recording.program);
        passes::lay_out(&mut program, backend.caps());
        let program = Arc::new(program);
        let limits = recording.limits();
        program.validate()?;
        // Declared gaps run too, to find those that should no longer be declared.
        let plan = backend.prepare(&program, limits)?;
        let full = |bytes: &[u8], usage| -> Result<Buffer> {
            let buffer = backend.alloc(bytes.len() as u64, usage)?;
            upload(backend, &buffer, 0, bytes)?;
            Ok(buffer)
        };
        let weights = program.weights.iter().zip(&recording.weights).map(|(&id, bytes)| {
            let need = program.fixed_bytes(id);
            if need != Some(bytes.len() as u64) {
                let expected = format!("{} bytes of `{}`", need.unwrap_or(0), program.tensor(id).name);
                return Err(Error::argument("recording", expected, bytes.len()));
            }
            match program.tensor(id).layout {
                Layout::Interleaved => full(&interleave(&program, id, bytes)?, Usage::Weight),
                _ => full(bytes, Usage::Weight),
            }
        });
        let weights = weights.collect::<Result<_>>()?;
        let states = recording.states.iter().map(|bytes| full(bytes, Usage::State)).collect::<Result<_>>()?;
        let mut opened = Opened { recording, backend, program, weights, states, io: Vec::new(), plan };
        opened.rebind()?;
        Ok(opened)
    }

    /// Takes new buffers of inputs and outputs, and returns the old ones.
    pub fn rebind(&mut self) -> Result<Vec<Buffer>> {
        let Opened { backend, program, .. } = self;
        let limits = self.recording.limits();
        let io = program.io.iter().map(|&id| {
            let t = program.tensor(id);
            let bytes = 4 * passes::rows(t.rows, limits.tokens, limits.outputs) as usize * t.cols as usize;
            let content = filled(bytes + GUARD_BYTES, GUARD, &t.name)?;
            let buffer = backend.alloc(content.len() as u64, Usage::Io)?;
            upload(*backend, &buffer, 0, &content)?;
            Ok(buffer)
        });
        let io = io.collect::<Result<_>>()?;
        Ok(std::mem::replace(&mut self.io, io))
    }

    /// Runs all steps, from the states as they are now.
    pub fn run(&mut self) -> std::result::Result<Vec<Output>, Failure> {
        let mut outputs = Vec::new();
        for n in 0..self.recording.steps.len() {
            self.step(n, &self.recording.steps[n].inputs, &Cancel::default())
                .map_err(|e| Failure::Error(e.to_string()))?;
            self.read(n, &mut outputs)?;
        }
        Ok(outputs)
    }

    /// Reads the states.
    pub fn states(&self) -> Result<Vec<Vec<u8>>> {
        let read = |buffer: &Buffer| {
            let mut bytes = filled(buffer.bytes() as usize, 0, "a state")?;
            self.backend.read(buffer, 0, &mut bytes)?;
            Ok(bytes)
        };
        self.states.iter().map(read).collect()
    }

    /// Sets the states back to what they were before the first step.
    pub fn restore(&mut self) -> Result<()> {
        let states = self.states.iter().zip(&self.recording.states);
        states.into_iter().try_for_each(|(buffer, bytes)| upload(self.backend, buffer, 0, bytes))
    }

    /// Runs a step with these inputs.
    pub fn step(&mut self, n: usize, inputs: &[Option<Vec<u32>>], cancel: &Cancel) -> Result<()> {
        let Opened { recording, backend, program, io, .. } = self;
        let recording: &Recording = recording;
        for ((buffer, input), &id) in io.iter().zip(inputs).zip(&program.io) {
            let words = (buffer.bytes() as usize - GUARD_BYTES) / 4;
            let poison = filled(if input.is_none() { words } else { 0 }, POISON, "an output")?;
            let content = input.as_ref().unwrap_or(&poison);
            if content.len() > words {
                let expected = format!("at most {words} elements of `{}`", program.tensor(id).name);
                return Err(Error::argument("recording", expected, content.len()));
            }
            upload(*backend, buffer, 0, bytemuck::cast_slice(content))?;
        }
        let (all, io) = (0..self.program.segments.len(), self.io.clone());
        self.submit(&recording.steps[n], all, &io, cancel).map(drop)
    }

    /// Submits a step as it is, and waits.
    fn submit(
        &mut self,
        step: &StepData,
        segments: Range<usize>,
        io: &[Buffer],
        cancel: &Cancel,
    ) -> Result<Timing> {
        let spans = step.spans.iter().map(|s| Span { tables: &s.tables, start: s.start, len: s.len });
        let spans: Vec<Span<'_>> = spans.collect();
        let bindings = Bindings { weights: &self.weights, states: &self.states, io };
        let step = Step { spans: &spans, tokens: &step.tokens, outputs: &step.outputs, cancel };
        let ticket = self.plan.submit(&step, segments, &bindings)?;
        self.plan.wait(ticket)
    }

    /// Runs some segments of a step, with the buffers as they are.
    pub fn run_segments(&mut self, n: usize, segments: Range<usize>) -> Result<Timing> {
        let io = self.io.clone();
        self.submit(&self.recording.steps[n], segments, &io, &Cancel::default())
    }

    /// Submits a step that may be impossible; with buffers of another backend unless `own`.
    pub fn submit_unchecked(&mut self, step: &StepData, segments: Range<usize>, own: bool) -> Result<()> {
        let foreign = self.io.iter().map(|buffer| Buffer::new(buffer.bytes(), ()));
        let io = if own { self.io.clone() } else { foreign.collect() };
        self.submit(step, segments, &io, &Cancel::default()).map(drop)
    }

    /// Waits for a submission.
    pub fn wait_for(&mut self, ticket: u64) -> Result<()> {
        self.plan.wait(Ticket(ticket)).map(|_| ())
    }

    /// Reads and checks the outputs of a step, and that its inputs are still as they were.
    pub fn read(&self, n: usize, outputs: &mut Vec<Output>) -> std::result::Result<(), Failure> {
        let Opened { recording, backend, program, io, .. } = self;
        let step = &recording.steps[n];
        for (n_io, (&id, buffer)) in program.io.iter().zip(io).enumerate() {
            let t = program.tensor(id);
            if !is_written(program, id) {
                let want: &[u8] = match step.inputs.get(n_io).and_then(Option::as_ref) {
                    Some(words) => bytemuck::cast_slice(words),
                    None => continue,
                };
                let error = |e: Error| Failure::Error(e.to_string());
                let mut content = filled(want.len(), 0, "an input").map_err(error)?;
                backend.read(buffer, 0, &mut content).map_err(error)?;
                if content != want {
                    return Err(Failure::InputChanged { step: n, input: t.name.clone() });
                }
                continue;
            }
            let (tokens, rows_out) = (step.tokens.len() as u32, step.outputs.len() as u32);
            let words = passes::rows(t.rows, tokens, rows_out) as usize * t.cols as usize;
            let error = |e: Error| Failure::Error(e.to_string());
            let mut content = filled(buffer.bytes() as usize, 0, "an output").map_err(error)?;
            backend.read(buffer, 0, &mut content).map_err(error)?;
            let (values, rest) = content.split_at(4 * words);
            let (unused, guard) = rest.split_at(rest.len() - GUARD_BYTES);
            let values: Vec<u32> = values.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
            let past = guard.iter().any(|&b| b != GUARD)
                || unused.as_chunks::<4>().0.iter().any(|&b| u32::from_le_bytes(b) != POISON);
            let (step, output) = (n, t.name.clone());
            if let Some(index) = values.iter().position(|&v| v == POISON) {
                return Err(Failure::NotWritten { step, output, index });
            }
            if past {
                return Err(Failure::Overrun { step, output });
            }
            let integers = t.format == Format::I32;
            outputs.push(Output { step, name: output, integers, cols: t.cols as usize, words: values });
        }
        Ok(())
    }
}

/// A list of equal items. Its length may come from a file.
fn filled<T: Copy>(len: usize, item: T, what: &str) -> Result<Vec<T>> {
    let mut list = reserved(len as u64, what)?;
    list.resize(len, item);
    Ok(list)
}

fn is_written(program: &Program, id: TensorId) -> bool {
    let mut found = false;
    program.ops().for_each(|(_, op)| op.outputs(&mut |out| found |= out == id));
    found
}

/// Probes that [`probe`] has.
pub(crate) const PROBES: usize = 12;

/// A row of zeros with one element of 127/64, which the formats of activations hold exactly.
pub(crate) fn probe(n: usize, cols: usize) -> Vec<u32> {
    let last = cols - 1;
    let places: [usize; PROBES] = [last, 0, 31, 32, 255, 256, last / 2, last - last.min(1), 15, 16, 63, 127];
    let mut row = vec![0; cols];
    row[places[n % places.len()].min(last)] = (127f32 / 64.0).to_bits();
    row
}

/// Roughly normal: a sum of four uniform draws, scaled to variance 1.
fn normal(rng: &mut SplitMix64) -> f32 {
    let sum: f32 = (0..4).map(|_| rng.unit()).sum();
    (sum - 2.0) * 3f32.sqrt()
}

/// Interleaves the rows of a weight's matrices.
fn interleave(program: &Program, id: TensorId, bytes: &[u8]) -> Result<Vec<u8>> {
    let t = program.tensor(id);
    let mut out = vec![0; bytes.len()];
    let matrix = bytes.len() / t.experts.max(1) as usize;
    for (rows, out) in bytes.chunks_exact(matrix).zip(out.chunks_exact_mut(matrix)) {
        let wrong = |e: LengthMismatch| Error::Program(format!("`{}`: {e}", t.name));
        t.format.interleave(t.cols as usize, rows, out).map_err(wrong)?;
    }
    Ok(out)
}

/// Random bytes with sane scales: every code and integer sub-scale of the format occurs.
/// Generates the bytes of a weight, with values around 0.01.
pub fn random_weight(program: &Program, id: TensorId, rng: &mut SplitMix64) -> Vec<u8> {
    let t = program.tensor(id);
    let bytes = program.fixed_bytes(id).unwrap_or(0) as usize;
    match t.format {
        // Divisors of angles: one near zero would make an angle too large for f32.
        Format::F32 if t.name == "factors" => {
            (0..bytes / 4).flat_map(|_| (1.0 + normal(rng).abs()).to_le_bytes()).collect()
        }
        Format::F32 => (0..bytes / 4).flat_map(|_| normal(rng).to_le_bytes()).collect(),
        format => {
            let mut content: Vec<u8> =
                std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(bytes).collect();
            let most = if t.name.starts_with("tiny") { 2e-5 } else { 0.01 };
            for block in content.chunks_exact_mut(format.block_bytes()) {
                let scale = most * (0.5 + rng.unit());
                format.set_scale(block, scale);
            }
            content
        }
    }
}

//! Matrices of importance: for each matrix of a model, the mean square of its input by column, in llama.cpp's
//! files.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::Format;

use crate::backend::reference::gate;
use crate::backend::{Backend, Cancel};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::gguf::write::Writer;
use crate::model::Model;
use crate::program::{Op, Program, TensorId};
use crate::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};

const ALIGNMENT: u32 = 32;

/// What files call themselves: `general.type`.
const TYPE: &str = "imatrix";

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// Sums over the inputs of a matrix, or of each expert's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sums {
    /// Sums of squares by column, expert after expert.
    pub squares: Vec<f32>,
    /// Summed rows, for each expert.
    pub counts: Vec<f32>,
}

impl Sums {
    fn new(cols: usize, experts: usize) -> Sums {
        Sums { squares: vec![0.0; cols * experts], counts: vec![0.0; experts] }
    }

    fn add(&mut self, expert: usize, row: &[f32]) {
        let squares = self.squares.chunks_exact_mut(row.len().max(1)).nth(expert);
        if let (Some(squares), Some(count)) = (squares, self.counts.get_mut(expert)) {
            squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
            *count += 1.0;
        }
    }

    /// The mean squares; ones for an expert without rows.
    pub(super) fn means(&self) -> Vec<f32> {
        let cols = self.squares.len() / self.counts.len().max(1);
        let experts = self.squares.chunks_exact(cols.max(1)).zip(&self.counts);
        let mean = |sum: f32, count: f32| if count > 0.0 { sum / count } else { 1.0 };
        experts.flat_map(|(sums, &count)| sums.iter().map(move |&sum| mean(sum, count))).collect()
    }
}

/// A matrix of importance.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Imatrix {
    /// Sums of each matrix, by its name in the model's file.
    pub sums: BTreeMap<String, Sums>,
    /// Names of the texts.
    pub datasets: Vec<String>,
    /// Number of pieces that the text was cut into.
    pub chunks: u32,
    /// Tokens of a piece.
    pub chunk_tokens: u32,
}

impl Imatrix {
    /// Reads a file of llama.cpp's or of [`Imatrix::write`].
    ///
    /// # Errors
    /// [`Error::Gguf`] for a malformed file, [`Error::Model`] for one that is no matrix of importance, or whose
    /// sums are not finite.
    pub fn open(path: &Path) -> Result<Imatrix> {
        Imatrix::from_gguf(&Gguf::open(path)?)
    }

    /// As [`Imatrix::open`], from an open file.
    ///
    /// # Errors
    /// As [`Imatrix::open`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Imatrix> {
        let wrong = |why: String| Error::Model(format!("{}: {why}", gguf.path().display()));
        let kind = gguf.optional_str("general.type")?.unwrap_or("none");
        if kind != TYPE {
            return Err(wrong(format!(
                "expected a matrix of importance (general.type `{TYPE}`), got general.type `{kind}`"
            )));
        }
        let mut found = Imatrix {
            chunks: gguf.optional_u32("imatrix.chunk_count")?.unwrap_or(0),
            chunk_tokens: gguf.optional_u32("imatrix.chunk_size")?.unwrap_or(0),
            ..Imatrix::default()
        };
        if let Some(datasets) = gguf.optional_strings("imatrix.datasets")? {
            found.datasets = datasets.iter().map(|name| String::from_utf8_lossy(name).into()).collect();
        }
        for tensor in gguf.tensors() {
            let Some(name) = tensor.record.name.strip_suffix(SUMS) else { continue };
            let floats = |name: String| {
                let tensor =
                    gguf.tensor(&name).ok_or_else(|| wrong(format!("tensor `{name}` is missing")))?;
                let format = tensor.record.format;
                if format != Format::F32 {
                    return Err(wrong(format!("tensor `{name}`: expected F32, got {}", format.name())));
                }
                let region = tensor.region()?;
                let bytes = region.load()?;
                let values = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value));
                let values: Vec<f32> = values.collect();
                match values.iter().find(|value| !value.is_finite() || **value < 0.0) {
                    Some(bad) => Err(wrong(format!(
                        "tensor `{name}`: expected finite numbers of at least 0, got {bad}"
                    ))),
                    None => Ok(values),
                }
            };
            let squares = floats(tensor.record.name.clone())?;
            let mut counts = floats(format!("{name}{COUNTS}"))?;
            counts.iter_mut().for_each(|count| *count = count.round());
            if counts.is_empty() || !squares.len().is_multiple_of(counts.len()) {
                let (sums, counts) = (squares.len(), counts.len());
                return Err(wrong(format!(
                    "matrix `{name}`: {sums} sums are no multiple of {counts} counts"
                )));
            }
            found.sums.insert(name.into(), Sums { squares, counts });
        }
        match found.sums.is_empty() {
            true => Err(wrong("expected sums of at least one matrix, got none".into())),
            false => Ok(found),
        }
    }

    /// Writes a file in llama.cpp's format.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that GGUF cannot have, [`Error::Io`] without a path from `out`.
    pub fn write(&self, out: &mut dyn Write) -> Result<()> {
        let mut writer = Writer::new(ALIGNMENT)?;
        writer.entry("general.type", TYPE)?;
        writer.entry("imatrix.datasets", &self.datasets[..])?;
        writer.entry("imatrix.chunk_count", self.chunks)?;
        writer.entry("imatrix.chunk_size", self.chunk_tokens)?;
        for (name, sums) in &self.sums {
            let experts = sums.counts.len() as u64;
            let cols = sums.squares.len() as u64 / experts.max(1);
            writer.tensor(&format!("{name}{SUMS}"), &[cols, experts], Format::F32)?;
            writer.tensor(&format!("{name}{COUNTS}"), &[1, experts], Format::F32)?;
        }
        let written = writer.write(out, &mut |tensor, out| {
            let of = |suffix| tensor.name.strip_suffix(suffix).and_then(|name| self.sums.get(name));
            let values = match (of(SUMS), of(COUNTS)) {
                (Some(sums), _) => &sums.squares,
                (_, Some(sums)) => &sums.counts,
                _ => return Err(io::ErrorKind::NotFound.into()),
            };
            values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
        });
        written.map_err(|source| Error::Io { path: Default::default(), source })
    }

    /// The mean squares of each matrix.
    pub(super) fn means(&self) -> HashMap<&str, Vec<f32>> {
        self.sums.iter().map(|(name, sums)| (&name[..], sums.means())).collect()
    }
}

/// An op's matrices and what is read of it: numbers of taps.
enum Tap {
    /// Matrices, by their names in the file, that multiply the same rows.
    Dense { x: usize, names: Vec<String> },
    /// Experts.
    Sparse { x: usize, ids: usize, op: Op, experts: usize },
}

/// Runs pieces of `chunk_tokens` tokens through a model, and sums the squares of what its layers multiply, as
/// llama.cpp's tool does. `first` replaces the first token of each piece. Calls `started` with what cancels the
/// work, and `progress` with the tokens of each step.
///
/// # Errors
/// [`Error::Argument`] for too few tokens or a piece of less than two, [`Error::Cancelled`], and errors of the
/// model and the backend.
pub fn collect(
    model: &Arc<Model>,
    backend: &Arc<dyn Backend>,
    tokens: &[u32],
    chunk_tokens: u32,
    first: Option<u32>,
    started: &mut dyn FnMut(Cancel),
    progress: &mut dyn FnMut(u64),
) -> Result<Imatrix> {
    let _floats = DefaultFloats::set();
    let size = chunk_tokens as usize;
    if size < 2 {
        return Err(Error::argument("tokens of a piece", "at least 2", size));
    }
    if tokens.len() < size {
        return Err(Error::argument("tokens", format!("at least {size}"), tokens.len()));
    }
    let options = SessionOptions::default().context(chunk_tokens).batch(chunk_tokens).outputs(chunk_tokens);
    let program = model.program(options.program, options.positions(model))?;
    let (taps, names) = taps(&program)?;
    let options = options.taps(names);
    let mut session = Session::new(model, backend, &options)?;
    started(session.cancel_handle());
    let mut found = Imatrix { chunk_tokens, ..Imatrix::default() };
    for piece in tokens.chunks_exact(size) {
        let mut piece = piece.to_vec();
        if let Some(first) = first {
            piece[0] = first;
        }
        let sequence = session.add_sequence();
        session.step(&[Run::new(sequence, &piece).outputs(OutputTokens::All)], OutputKind::ArgMax)?;
        for tap in &taps {
            add(tap, model, &program, &session, &mut found.sums)?;
        }
        session.remove(sequence)?;
        found.chunks += 1;
        progress(size as u64);
    }
    for (name, sums) in &found.sums {
        if let Some(bad) = sums.squares.iter().find(|sum| !sum.is_finite()) {
            return Err(Error::NotFinite { what: "sums of squares", got: format!("{bad} for `{name}`") });
        }
    }
    Ok(found)
}

/// The name in the file of a weight of a layer.
fn file_name(program: &Program, id: TensorId) -> Option<&str> {
    let t = program.tensor(id);
    let name = t.part.as_ref().map_or(&t.name[..], |part| &part.of);
    name.starts_with("blk.").then_some(name)
}

/// The products of a program, and the names of the tensors to read for them.
fn taps(program: &Program) -> Result<(Vec<Tap>, Vec<String>)> {
    let mut names: Vec<String> = Vec::new();
    let mut tap = |id: TensorId| {
        let name = &program.tensor(id).name;
        if program.find(name) != Some(id) {
            return Err(Error::Program(format!("two tensors are named `{name}`")));
        }
        let at = names.iter().position(|known| known == name).unwrap_or(names.len());
        if at == names.len() {
            names.push(name.clone());
        }
        Ok(at)
    };
    let mut taps = Vec::new();
    for (_, op) in program.ops() {
        match op {
            Op::MatMul { x, parts, .. } => {
                let weights = parts.iter().filter_map(|part| file_name(program, part.weight));
                let mut names: Vec<String> = weights.map(str::to_owned).collect();
                names.dedup();
                if !names.is_empty() {
                    taps.push(Tap::Dense { x: tap(*x)?, names });
                }
            }
            Op::Experts { x, ids, gate, .. } => {
                let experts = program.tensor(*gate).experts as usize;
                taps.push(Tap::Sparse { x: tap(*x)?, ids: tap(*ids)?, op: op.clone(), experts });
            }
            _ => {}
        }
    }
    Ok((taps, names))
}

/// Adds what an op multiplied in the last step.
fn add(
    tap: &Tap,
    model: &Model,
    program: &Program,
    session: &Session,
    all: &mut BTreeMap<String, Sums>,
) -> Result<()> {
    match tap {
        Tap::Dense { x, names } => {
            let values = session.tap(*x)?;
            let cols = session.tap_cols(*x);
            for name in names {
                let sums = all.entry(name.clone()).or_insert_with(|| Sums::new(cols, 1));
                values.chunks_exact(cols.max(1)).for_each(|row| sums.add(0, row));
            }
        }
        Tap::Sparse { x, ids, op, experts } => {
            let Op::Experts { gate: gate_weight, up, down, biases, act, .. } = op else { return Ok(()) };
            let (values, ids_words) = (session.tap(*x)?, session.tap(*ids)?);
            let (cols, used) = (session.tap_cols(*x), session.tap_cols(*ids));
            // The rows of each expert.
            let mut rows: Vec<Vec<&[f32]>> = vec![Vec::new(); *experts];
            for (row, ids) in values.chunks_exact(cols.max(1)).zip(ids_words.chunks_exact(used.max(1))) {
                for id in ids {
                    // Ids are words, which are read as they are.
                    if let Some(rows) = rows.get_mut(id.to_bits() as usize) {
                        rows.push(row);
                    }
                }
            }
            for name in [*gate_weight, *up].map(|id| file_name(program, id)).into_iter().flatten() {
                let sums = all.entry(name.to_owned()).or_insert_with(|| Sums::new(cols, *experts));
                for (expert, rows) in rows.iter().enumerate() {
                    rows.iter().for_each(|row| sums.add(expert, row));
                }
            }
            let Some(name) = file_name(program, *down) else { return Ok(()) };
            let hidden = program.tensor(*down).cols as usize;
            let gate_rows = Rows::of(model, program, *gate_weight, hidden)?;
            let up_rows = Rows::of(model, program, *up, hidden)?;
            let bias = |n: usize| biases.map(|biases| Rows::of(model, program, biases[n], 1)).transpose();
            let (gate_bias, up_bias) = (bias(0)?, bias(1)?);
            let sums = all.entry(name.to_owned()).or_insert_with(|| Sums::new(hidden, *experts));
            for (expert, rows) in rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                let mut inputs = vec![0.0; hidden * rows.len()];
                let added = |bias: &Option<Rows>| bias.as_ref().map(|bias| bias.row(expert, 0)).transpose();
                let (gate_bias, up_bias) = (added(&gate_bias)?, added(&up_bias)?);
                for at in 0..hidden {
                    let (g, u) = (gate_rows.row(expert, at)?, up_rows.row(expert, at)?);
                    let dot = |weights: &[f32], row: &[f32], bias: &Option<Vec<f32>>| {
                        let sum: f32 = weights.iter().zip(row).map(|(w, x)| w * x).sum();
                        sum + bias.as_ref().and_then(|bias| bias.get(at)).copied().unwrap_or(0.0)
                    };
                    for (row, input) in rows.iter().zip(inputs.chunks_exact_mut(hidden)) {
                        input[at] = gate(*act, dot(&g, row, &gate_bias), dot(&u, row, &up_bias));
                    }
                }
                inputs.chunks_exact(hidden).for_each(|row| sums.add(expert, row));
            }
        }
    }
    Ok(())
}

/// Rows of a weight of experts, as floats.
struct Rows {
    bytes: Vec<u8>,
    format: Format,
    row_bytes: usize,
    cols: usize,
    /// Rows of an expert, and the first of them that belongs to the weight.
    rows: usize,
    first: usize,
}

impl Rows {
    fn of(model: &Model, program: &Program, id: TensorId, rows: usize) -> Result<Rows> {
        let t = program.tensor(id);
        let (name, first) = match &t.part {
            Some(part) => (&part.of, part.first_element as usize / (t.cols as usize).max(1)),
            None => (&t.name, 0),
        };
        let missing = || Error::Model(format!("tensor `{name}` is missing"));
        let tensor = model.gguf().tensor(name).ok_or_else(missing)?;
        let (format, cols) = (tensor.record.format, t.cols as usize);
        let row_bytes = format.row_bytes(cols).ok_or_else(missing)?;
        // A tensor of which this is a part has more rows for each expert.
        let all = tensor.record.dims.get(1).map_or(rows, |&rows| rows as usize);
        let rows = if tensor.record.dims.len() > 2 { all } else { rows };
        Ok(Rows { bytes: tensor.rows()?, format, row_bytes, cols, rows, first })
    }

    fn row(&self, expert: usize, row: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.cols];
        let at = (expert * self.rows + self.first + row) * self.row_bytes;
        let bytes = self.bytes.get(at..at + self.row_bytes).unwrap_or(&[]);
        let wrong = |e| Error::Model(format!("rows of experts: {e}"));
        self.format.dequantize(bytes, &mut values).map_err(wrong)?;
        Ok(values)
    }
}

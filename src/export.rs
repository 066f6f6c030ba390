//! Exports a model as an image for `halite-micro`, which runs on microcontrollers: the program of one sequence with
//! all memory laid out, the weights, and the texts of tokens.

use std::collections::HashMap;

use halite_kernels::formats::Format;
use halite_micro::image::{CHECKED_FROM, Header, MAGIC, State, Tensor, VERSION, checksum};
use halite_micro::layout;
use halite_micro::ops::Op as ImageOp;
use halite_micro::record::{self, Field, Rows, Span};

use crate::backend::Gap;
use crate::error::{Error, Result};
use crate::model::{Model, ProgramOptions};
use crate::passes;
use crate::program::{
    Dim, Epilogue, Gating, Index, NormKind, Op, Program, RopePairs, Slot, StateKind, TensorId,
};
use crate::tokenizer::Tokenizer;
use crate::weights;

/// Options of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportOptions {
    /// Positions of the sequence.
    pub context: u32,
    /// Most tokens of a step. A prompt is read so many tokens at a time: more are faster where weights are slow to
    /// read, and take more memory. An encoder's step is a whole text, so it takes the context.
    pub tokens: u32,
    /// The program's options. An encoder's cache, which lasts for one step, is always F32.
    pub program: ProgramOptions,
}

impl Default for ExportOptions {
    fn default() -> Self {
        ExportOptions { context: 256, tokens: 1, program: ProgramOptions::default() }
    }
}

crate::setters!(const ExportOptions { context: u32, tokens: u32, program: ProgramOptions });

/// What an image consists of, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ImageSize {
    /// Weights.
    pub weight_bytes: u64,
    /// Texts of tokens.
    pub text_bytes: u64,
    /// The whole image.
    pub image_bytes: u64,
    /// Memory of a session: the KV cache.
    pub kv_bytes: u64,
    /// Memory of a session: results of ops, and what kernels need.
    pub working_bytes: u64,
}

/// Exports a model. Returns the image and its size.
///
/// # Errors
/// [`Error::Unsupported`] for a program with ops that images do not have, [`Error::Argument`] for options that do not
/// fit the model, [`Error::OutOfMemory`] for an image that its 32-bit places cannot hold; errors of the file.
pub fn export(model: &Model, options: &ExportOptions) -> Result<(Vec<u32>, ImageSize)> {
    let most = model.hparams().context_length;
    if options.context == 0 || options.context > most {
        let expected = format!("1 to {most}, the context of the model");
        return Err(Error::argument("context", expected, options.context));
    }
    if options.tokens == 0 || options.tokens > options.context {
        let expected = format!("1 to {}, the context", options.context);
        return Err(Error::argument("tokens of a step", expected, options.tokens));
    }
    let mut program = model.program(options.program, options.context)?;
    let mut options = *options;
    if program.outputs.hidden.is_some() {
        // An image tells by its causality whether each step is a text of its own.
        if program.states.iter().any(|state| state.is_causal()) {
            return Err(Error::Model("images have no decoder that gives vectors of texts".into()));
        }
        options = options.tokens(options.context);
        program = model.program(options.program.kv_format(Format::F32), options.context)?;
    }
    let program = passes::decompose(&program);
    let tokenizer = Tokenizer::from_gguf(model.gguf())?;
    Exporter::new(model, &program, &options)?.image(tokenizer.as_ref())
}

/// The part of a program that computes one result.
fn without_others(program: &Program, result: TensorId) -> Program {
    let mut out = program.clone();
    let needed = program.segments_for(&[result]);
    let mut n = 0;
    out.segments.retain(|_| {
        n += 1;
        needed.iter().any(|run| run.contains(&(n - 1)))
    });
    out
}

struct Exporter<'a> {
    model: &'a Model,
    program: Program,
    options: &'a ExportOptions,
    result: TensorId,
    outputs: u32,
    words: Vec<u32>,
    /// Numbers of the tensors that are in the image.
    numbers: HashMap<TensorId, u32>,
    tensors: Vec<Tensor>,
    constants: Vec<Span>,
    size: ImageSize,
}

fn too_large(need_words: u64) -> Error {
    let what = "the image, or the memory of its session,".into();
    Error::OutOfMemory { what, need_bytes: need_words.saturating_mul(4), have_bytes: u32::MAX.into() }
}

/// Words as the 32 bits that images have for bytes.
fn place(words: u64) -> Result<u32> {
    match u32::try_from(words) {
        Ok(place) if words.saturating_mul(4) <= u32::MAX.into() => Ok(place),
        _ => Err(too_large(words)),
    }
}

/// Records as words.
fn words_of<T: Field>(records: &[T]) -> Result<Vec<u32>> {
    let mut words = Vec::new();
    for record in records {
        let missing = || Error::Program("the image has no place for a number of the program".into());
        record.write(&mut |word| words.push(word)).ok_or_else(missing)?;
    }
    Ok(words)
}

impl<'a> Exporter<'a> {
    fn new(model: &'a Model, program: &Program, options: &'a ExportOptions) -> Result<Exporter<'a>> {
        let nothing = || Error::Program("the program has neither logits nor a hidden state".into());
        let (result, outputs) = match (program.outputs.logits, program.outputs.hidden) {
            (Some(logits), _) => (logits, 1),
            (None, Some(hidden)) => (hidden, options.tokens),
            (None, None) => return Err(nothing()),
        };
        let program = without_others(program, result);
        Ok(Exporter {
            model,
            program,
            options,
            result,
            outputs,
            words: vec![0; Header::WORDS],
            numbers: HashMap::new(),
            tensors: Vec::new(),
            constants: Vec::new(),
            size: ImageSize::default(),
        })
    }

    /// Appends words, and returns their place.
    fn append(&mut self, words: &[u32]) -> Result<Span> {
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let first = place(self.words.len() as u64)?;
        place(self.words.len() as u64 + words.len() as u64)?;
        self.words.try_reserve(words.len()).map_err(|_| too_large(words.len() as u64))?;
        self.words.extend_from_slice(words);
        Ok(Span { first, len: words.len() as u32 })
    }

    fn append_bytes(&mut self, bytes: &[u8]) -> Result<Span> {
        let mut words: Vec<u32> = Vec::new();
        let count = bytes.len().div_ceil(4);
        words.try_reserve_exact(count).map_err(|_| too_large(count as u64))?;
        words.resize(count, 0);
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        let span = self.append(&words)?;
        Ok(Span { first: span.first.saturating_mul(4), len: bytes.len() as u32 })
    }

    fn append_records<T: Field>(&mut self, records: &[T]) -> Result<Span> {
        Ok(Span { first: self.append(&words_of(records)?)?.first, len: records.len() as u32 })
    }

    fn image(mut self, tokenizer: Option<&Tokenizer>) -> Result<(Vec<u32>, ImageSize)> {
        let mut memory_words = self.lay_out_tensors()?;
        let ops = self.ops()?;
        let rows = u64::from(self.options.tokens);
        let tensor = |n: u32| self.tensors.get(n as usize).copied();
        let work = ops.iter().map(|op| layout::work_words(op, rows, tensor)).collect::<Option<Vec<_>>>();
        let work = work.and_then(|words| words.into_iter().max()).unwrap_or(0);
        let work = Span { first: place(memory_words)?, len: place(work)? };
        memory_words = memory_words.saturating_add(work.len.into());
        self.size.working_bytes = 4 * memory_words;
        let states = self.states(&mut memory_words)?;
        self.size.kv_bytes = 4 * memory_words - self.size.working_bytes;
        let states = self.append_records(&states)?;
        let tensors = self.append_records(&self.tensors.clone())?;
        let mut words = Vec::new();
        for op in &ops {
            op.write(&mut |word| words.push(word)).ok_or_else(|| self.unsupported(format!("{op:?}")))?;
        }
        let ops = self.append(&words)?;
        let (texts, text_bytes, ends) = self.texts(tokenizer)?;
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let image_bytes = place(self.words.len() as u64)? * 4;
        (self.size.image_bytes, self.size.text_bytes) = (image_bytes.into(), text_bytes.len.into());
        let result = self.numbers.get(&self.result).copied();
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            image_bytes,
            checksum: 0,
            memory_words: place(memory_words)?,
            work,
            context: self.options.context,
            tokens: self.options.tokens,
            outputs: self.outputs,
            vocabulary: self.vocabulary(),
            result: result.ok_or_else(|| Error::Program("nothing computes the result".into()))?,
            ops,
            tensors,
            states,
            texts,
            text_bytes,
            bos: tokenizer.filter(|t| t.adds_bos()).and_then(Tokenizer::bos),
            ends,
        };
        let start = words_of(&[header])?;
        self.words[..start.len()].copy_from_slice(&start);
        self.words[CHECKED_FROM / 4 - 1] = checksum(&bytemuck::cast_slice(&self.words)[CHECKED_FROM..]);
        // What no device could run is not written.
        let refused = |e| Error::Program(format!("its image would be refused: {e}"));
        halite_micro::Image::new(bytemuck::cast_slice(&self.words)).map_err(refused)?;
        Ok((self.words, self.size))
    }

    /// Rows of the table of embeddings.
    fn vocabulary(&self) -> u32 {
        let rows = self.program.ops().find_map(|(_, op)| match op {
            Op::Embed { table, index: Index::Token, .. } => Some(self.program.tensor(*table).rows),
            _ => None,
        });
        if let Some(Dim::Fixed(rows)) = rows { rows } else { 1 }
    }

    /// Gives each tensor of the ops a number and a place. Returns the words of memory in use.
    fn lay_out_tensors(&mut self) -> Result<u64> {
        let liveness = passes::liveness(&self.program);
        let rows = |dim| passes::rows(dim, self.options.tokens, self.outputs);
        let mut end = 0u64;
        let mut reserve = |words: u64| {
            let first = end;
            // Tensors start at whole vectors.
            end = end.saturating_add(words).next_multiple_of(4);
            place(first)
        };
        let mut places = Vec::new();
        for &(dim, cols) in &liveness.places {
            places.push(reserve(rows(dim).saturating_mul(cols.into()))?);
        }
        let mut used: Vec<TensorId> = Vec::new();
        for (_, op) in self.program.ops() {
            op.tensors(|&id, _| used.push(id));
        }
        used.sort_unstable();
        used.dedup();
        let mut weights = Vec::new();
        for &id in &used {
            let t = self.program.tensor(id);
            let in_memory = match t.slot {
                Slot::Weight(_) => None,
                Slot::Io(_) => Some(reserve(rows(t.rows).saturating_mul(t.cols.into()))?),
                Slot::Scratch => {
                    let place = liveness.place.get(id.0 as usize).copied().flatten();
                    let unwritten = || Error::Program(format!("`{}` is never written", t.name));
                    Some(places[place.ok_or_else(unwritten)?])
                }
            };
            if in_memory.is_none() {
                weights.push((self.tensors.len(), id));
            }
            self.numbers.insert(id, self.tensors.len() as u32);
            self.tensors.push(Tensor {
                in_memory: in_memory.is_some(),
                first: in_memory.unwrap_or(0),
                experts: t.experts,
                rows: match t.rows {
                    Dim::Tokens => Rows::Tokens,
                    Dim::Outputs => Rows::Outputs,
                    Dim::Fixed(rows) => Rows::Fixed(rows),
                },
                cols: t.cols,
                format: t.format,
            });
        }
        for (n, id) in weights {
            let bytes = weights::rows(self.model.gguf(), &self.program, id)?;
            self.size.weight_bytes += bytes.len() as u64;
            self.tensors[n].first = self.append_bytes(&bytes)?.first / 4;
        }
        Ok(end)
    }

    /// The states, with their pages at the end of memory and their tables.
    fn states(&mut self, memory_words: &mut u64) -> Result<Vec<State>> {
        let chunks = layout::chunks(self.options.context);
        let mut tables: HashMap<u32, u32> = HashMap::new();
        let mut states = Vec::new();
        for state in self.program.states.clone() {
            let pages = layout::pages(self.options.context, self.options.tokens, state.window);
            let table = match tables.get(&pages) {
                Some(&table) => table,
                None => {
                    let words: Vec<u32> = (0..chunks).map(|chunk| chunk % pages).collect();
                    let table = self.append(&words)?.first;
                    tables.insert(pages, table);
                    table
                }
            };
            let first = place(*memory_words)?;
            let words = (state.page_bytes() / 4).saturating_mul(pages.into());
            *memory_words = memory_words.saturating_add(words);
            states.push(State {
                kv_heads: state.kv_heads,
                key_dim: state.key_dim,
                value_dim: state.value_dim,
                format: state.format,
                window: state.window,
                after: state.after,
                first,
                pages,
                table,
            });
        }
        Ok(states)
    }

    /// The texts of tokens, and the tokens that end a generation.
    fn texts(&mut self, tokenizer: Option<&Tokenizer>) -> Result<(Span, Span, Span)> {
        let (mut bytes, mut ends, mut stops) = (Vec::new(), Vec::new(), Vec::new());
        if let Some(tokenizer) = tokenizer {
            for id in 0..tokenizer.len() as u32 {
                tokenizer.decode_token(id, false, &mut bytes);
                ends.push(bytes.len() as u32);
                stops.extend(Some(id).filter(|&id| tokenizer.is_end(id)));
            }
        }
        Ok((self.append(&ends)?, self.append_bytes(&bytes)?, self.append(&stops)?))
    }

    fn unsupported(&self, op: String) -> Error {
        Error::Unsupported {
            backend: "micro".into(),
            gaps: vec![Gap::NotYet(format!("{op} in an image")).to_string()],
        }
    }

    fn ops(&mut self) -> Result<Vec<ImageOp>> {
        let ops: Vec<Op> = self.program.ops().map(|(_, op)| op.clone()).collect();
        ops.iter().map(|op| self.op(op)).collect()
    }

    fn op(&mut self, op: &Op) -> Result<ImageOp> {
        let numbers = match op {
            Op::Rope { rotation, .. } => self.constants(&rotation.frequencies)?,
            Op::Attend { slopes: Some(slopes), .. } => self.constants(slopes)?,
            _ => Span::default(),
        };
        // Numbers of operands, first; every operand got one.
        let op = op.try_map(
            |id, _| {
                self.numbers.get(id).copied().ok_or_else(|| Error::Program("an operand is missing".into()))
            },
            |id, _| Ok::<u32, Error>(id.0),
        )?;
        let name = op.name();
        let is_plain = |state: u32| {
            let state = self.program.states.get(state as usize);
            state.is_some_and(|state| state.kind == StateKind::Cache && !state.aligned)
        };
        Ok(match op {
            Op::Embed { table, index, out, scale } => {
                let index = match index {
                    Index::Token => record::Index::Token,
                    Index::Position => record::Index::Position,
                    Index::First => record::Index::First,
                    Index::Part { .. } => return Err(self.unsupported("tables by parts of a text".into())),
                };
                ImageOp::Embed { table, index, out, scale }
            }
            Op::Gather { x, out } => ImageOp::Gather { x, out },
            Op::Norm { x, add: None, sum: None, weight, bias, out, kind, eps, group } => {
                ImageOp::Norm { x, weight, bias, out, centred: kind == NormKind::Layer, eps, group }
            }
            Op::MatMul { x, parts, epilogue: Epilogue::None, outs } => match (&parts[..], &outs[..]) {
                (&[part], &[out]) => ImageOp::MatMul { x, weight: part.weight, bias: part.bias, out },
                _ => return Err(self.unsupported(name.into())),
            },
            Op::Rope { x, out, rotation } => ImageOp::Rope {
                x,
                out,
                head_dim: rotation.head_dim,
                frequencies: numbers,
                factors: rotation.factors,
                magnitude: rotation.magnitude,
                adjacent: rotation.pairs == RopePairs::Adjacent,
            },
            Op::KvWrite { k, v, state } if is_plain(state) => ImageOp::KvWrite { k, v, state },
            Op::Attend { q, state, out, heads, scale, growth: None, softcap, slopes: _, sinks }
                if is_plain(state) =>
            {
                ImageOp::Attend { q, state, out, heads, scale, softcap, slopes: numbers, sinks }
            }
            Op::Glu { gate, up, out, act } => ImageOp::Glu { gate, up, out, act },
            Op::Add { a, b, out } => ImageOp::Add { a, b, out },
            Op::Unary { x, out, f } => ImageOp::Unary { x, out, f },
            Op::Route {
                bias: None,
                groups: None,
                scales: None,
                logits,
                ids,
                weights,
                gating,
                normalise,
                scale,
            } => {
                let gating = match gating {
                    Gating::Softmax => record::Gating::Softmax,
                    Gating::SoftmaxOfTop => record::Gating::SoftmaxOfTop,
                    Gating::Sigmoid => record::Gating::Sigmoid,
                };
                ImageOp::Route { logits, ids, weights, gating, normalise, scale }
            }
            Op::Experts { x, ids, weights, gate, up, down, biases, out, act } => {
                let [gate_bias, up_bias, down_bias] = match biases {
                    Some(biases) => biases.map(Some),
                    None => [None; 3],
                };
                ImageOp::Experts { x, ids, weights, gate, up, down, gate_bias, up_bias, down_bias, out, act }
            }
            _ => return Err(self.unsupported(name.into())),
        })
    }

    /// Places the frequencies of rotations or the slopes of heads, which most ops share.
    fn constants(&mut self, numbers: &[f32]) -> Result<Span> {
        let words: &[u32] = bytemuck::cast_slice(numbers);
        match self
            .constants
            .iter()
            .find(|span| self.words[span.first as usize..][..span.len as usize] == *words)
        {
            Some(&span) => Ok(span),
            None => {
                let span = self.append(words)?;
                self.constants.push(span);
                Ok(span)
            }
        }
    }
}

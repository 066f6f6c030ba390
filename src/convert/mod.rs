//! Converts Hugging Face model folders to GGUF: config.json, safetensors and a vocabulary become one file,
//! with the names of llama.cpp's converter.
//!
//! Tables have each family's names of weights and options (`decoder.rs`, `encoder.rs`); everything
//! else is shared. Before anything is written, the result's header is opened as a model: a folder that lacks
//! a weight or has a wrong shape is an error.

mod decoder;
mod encoder;
mod families;
mod folder;
mod options;
mod part;
mod pieces;
mod rope;
mod sentence;
mod vocabulary;
mod wordpiece;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::Format;

use crate::error::{Error, Result};
use crate::gguf::write::Writer;
use crate::gguf::{Gguf, printable};
use crate::map::Source;
use crate::model::{Model, ProgramOptions};
use crate::tokenizer::Tokenizer;
use families::Names;
use folder::{Files, Json};
use part::{Part, Scheme};

/// Alignment of tensor data: a cache line.
const ALIGNMENT: u32 = 64;

/// Matrices that stay F32, besides vectors and biases: small tables that are read row by row, taps of
/// convolutions, and routers, whose rounding would change the choice of experts.
const PLAIN: &[&str] = &[
    "position_embd.weight",
    "token_types.weight",
    ".ffn_gate_inp.weight",
    ".ssm_a",
    ".ssm_d",
    ".attn_q_norm.weight",
    ".attn_k_norm.weight",
    ".ssm_norm.weight",
    ".ssm_conv1d.weight",
    ".shortconv.conv.weight",
    ".bias",
];

/// Positions of the program that a header is checked with.
const CHECKED_POSITIONS: u32 = 256;

/// The mapping of a family's tensors.
#[derive(Default)]
struct Plan {
    /// How weights are quantised.
    scheme: Scheme,
    /// Prefixes of names to remove, at most one from each.
    prefixes: &'static [&'static str],
    /// Names in the folder and in GGUF files, both without `.weight` and `.bias` or both whole; the first `{}`
    /// is a layer, if both have one, and the next an expert.
    names: Vec<Names>,
    /// Names to ignore; a star at one end matches anything.
    unused: Vec<String>,
    /// Required names, without which the model could still be opened.
    required: Vec<String>,
    /// Names in GGUF files whose rows are reordered, with the number of heads.
    interleaved: Vec<(&'static str, usize)>,
    /// Whether rows of the gate and of up take turns, in tensors that stand for both.
    takes_turns: bool,
    /// Ends of names in GGUF files, without `.weight`, of plain matrices that are transposed; with a number of columns, only those
    /// that have another one.
    by_columns: Vec<(&'static str, Option<usize>)>,
    /// Names in GGUF files whose rows or columns follow value heads, and how they are reordered.
    by_value_head: Vec<(&'static str, Axis, ValueHeads)>,
    /// Names in GGUF files of vectors that are matrices there, with their columns.
    matrices: Vec<(&'static str, u64)>,
    /// Names in GGUF files of tensors that are some rows of others, and the names of these. Those of layers are left out.
    taken: Vec<(&'static str, &'static str, Rows)>,
    /// Other files of weights, and what stands before their names.
    beside: Vec<(String, String)>,
    /// Names in GGUF files without `.weight` of matrices that are multiplied by factors.
    factors: Factors,
    /// The name in GGUF files of a table that gets rows of zeros up to a number of rows.
    padded: Option<(&'static str, u64)>,
    /// Added to the weights of norms.
    norm_offset: f32,
    /// Vectors that no file of the folder has.
    vectors: Vec<(&'static str, Vec<f32>)>,
    /// Warnings: settings of the folder that the file lacks.
    left_out: Vec<String>,
    /// Keys of GGUF files, and what config.json calls them.
    keys: Vec<&'static [options::Key]>,
}

/// Beginnings of names of classification heads.
const HEADS: &[&str] = &["classifier.", "score."];

/// Names of matrices with their factors: the end of some rows, and what these are multiplied by.
type Factors = Vec<(&'static str, Vec<(usize, f32)>)>;

/// Rows of a matrix.
enum Rows {
    /// All but the first ones.
    From(usize),
    /// These, in order.
    Of(Vec<usize>),
    /// Parts of the rows of each head, which has so many in all: of all heads the first part, then the next.
    Heads { length: usize, parts: Vec<Range<usize>>, shape: Shape },
}

/// What becomes of parts of heads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// A matrix.
    Matrix,
    /// A matrix for each head.
    Heads,
    /// The same, transposed.
    Transposed,
}

/// A part of names that stands for two tensors: the first half of a matrix's rows is the gate's, the second up's, or rows take turns.
const GATE_UP: &str = ".ffn_gate_up";

/// What of a matrix is reordered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Axis {
    Rows,
    Columns,
}

/// Heads of values that share heads of keys (Qwen 3.5). Published weights have those that share a key side by
/// side; in GGUF files, the first heads of all keys come first, then the second ones.
#[derive(Clone, Copy)]
struct ValueHeads {
    /// Elements in front of the heads.
    start: usize,
    keys: usize,
    /// Heads for each key.
    shared: usize,
    length: usize,
}

impl ValueHeads {
    /// Parts of each head side by side, such as its query, key and value.
    fn interleaved(heads: u32, parts: usize, length: u32) -> ValueHeads {
        ValueHeads { start: 0, keys: heads as usize, shared: parts, length: length as usize }
    }

    fn len(&self) -> usize {
        self.start.saturating_add(self.keys.saturating_mul(self.shared).saturating_mul(self.length))
    }

    /// Returns the source of an element.
    fn source(&self, at: usize) -> usize {
        let Some(at) = at.checked_sub(self.start) else { return at };
        let (head, element) = (at / self.length, at % self.length);
        let (key, number) = (head % self.keys, head / self.keys);
        self.start + (key * self.shared + number) * self.length + element
    }
}

/// A tensor to write.
#[derive(Clone, Default)]
struct Target<'a> {
    /// Dimensions, innermost first.
    dims: Vec<u64>,
    /// Its parts in the folder's files; empty for a tensor that consists of `vector`.
    parts: Vec<Part<'a>>,
    vector: Vec<f32>,
    /// Its rows in the folder's files, if they are not all of them.
    rows: Option<Vec<usize>>,
    /// The number of rows that each become a column.
    transposed: Option<usize>,
    heads: Option<usize>,
    by_value_head: Option<(Axis, ValueHeads)>,
    /// The half of each matrix's rows that it is; of biases, the half of each row.
    half: Option<usize>,
    takes_turns: bool,
    is_bias: bool,
    offset: f32,
    /// Factors of rows, by the ends of their parts.
    factors: Vec<(usize, f32)>,
    /// Rows of zeros behind the others.
    padding: u64,
    /// Whether values are logarithms of rates, which files have as `-exp(value)`.
    is_rate: bool,
}

/// Whether a format is noise unless the importance of columns is known, which folders do not say.
fn needs_importance(format: Format) -> bool {
    use Format as F;
    matches!(format, F::IQ1_S | F::IQ1_M | F::IQ2_XXS | F::IQ2_XS | F::IQ2_S | F::IQ3_XXS)
}

fn has_quantiser(format: Format) -> bool {
    let zeros = vec![0.0; format.block_len()];
    format.quantize(&zeros, &mut vec![0; format.block_bytes()]).is_ok()
}

/// The formats that [`convert`] writes matrices in: those with a quantiser that needs no matrix of importance.
pub fn formats() -> impl Iterator<Item = Format> {
    Format::ALL.iter().copied().filter(|&format| !needs_importance(format) && has_quantiser(format))
}

/// Writes the model of a folder as GGUF, with matrices in `format`; vectors, biases and routers stay F32.
/// `progress` receives the bytes of each finished tensor.
///
/// Returns warnings, one line each, about settings of the folder that GGUF has no key for and that change
/// little, such as NFC normalisation before a byte-level vocabulary. Any other setting without a key is an
/// error.
///
/// Links must stay inside the folder, except in the cache of the Hugging Face hub. Only regular files are
/// read, and text files only up to 64 MiB.
///
/// Folders may be quantised: FP8 with scales, GPTQ, AWQ or compressed-tensors with 4 bits, MXFP4, BitNet. MXFP4 stays MXFP4, BitNet's
/// numbers become TQ2_0 where that has them, and symmetric groups of 4 bits have the same numbers in Q4_0; all else goes through
/// single precision.
///
/// # Errors
/// [`Error::Io`] if a file cannot be read, or `out` not written (then without a path). [`Error::Model`] or
/// [`Error::Tokenizer`] for an unknown family, option, tensor or vocabulary, a format that is not one of [`formats`] or
/// whose blocks do not fit, and values that are not finite. Errors of opening the result.
pub fn convert(
    folder: &Path,
    format: Format,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<String>> {
    let _floats = DefaultFloats::set();
    if needs_importance(format) {
        return Err(Error::Model(format!(
            "{} needs a matrix of importance: convert to F16, and quantise that with a matrix of importance",
            format.name()
        )));
    }
    if !has_quantiser(format) {
        return Err(Error::Model(format!("no quantiser for {}", format.name())));
    }
    folder::check(folder)?;
    let config = Json::open(folder, "config.json")?;
    let mut writer = Writer::new(ALIGNMENT)?;
    let model_type = config.str("model_type")?;
    let plan = match encoder::model_types().any(|encoder| encoder == model_type) {
        true => encoder::plan(folder, &config, &mut writer)?,
        false => decoder::plan(folder, &config, &mut writer)?,
    };
    let files = Files::open(folder, &plan.beside)?;
    let targets = plan.targets(plan.scheme.parts(files.tensors()?)?)?;
    for (name, target) in &targets {
        let plain = target.dims.len() < 2 || PLAIN.iter().any(|plain| name.ends_with(plain));
        let home = target.parts.first().and_then(Part::home);
        let format = if plain { Format::F32 } else { home.unwrap_or(format) };
        let columns = target.dims.first().copied().unwrap_or(0);
        if columns % format.block_len() as u64 != 0 {
            return Err(Error::Model(format!(
                "tensor `{name}`: rows of {columns} are not whole blocks of {}, which are a multiple of {}: convert to F16, and quantise that, which gives such rows another format",
                format.name(),
                format.block_len()
            )));
        }
        writer.tensor(name, &target.dims, format)?;
    }
    check(folder, &writer).map_err(|error| plan.in_config(error))?;

    let mut targets = targets.values();
    let mut failure = None;
    let written = writer.write(out, &mut |new, out| {
        let target = targets.next().ok_or(io::ErrorKind::NotFound)?;
        progress(new.bytes);
        target.write(new.format, out).map_err(|error| match error {
            Error::Io { source, .. } => source,
            error => {
                let why = match error {
                    Error::Model(why) => why,
                    error => error.to_string(),
                };
                failure = Some(Error::Model(format!("tensor `{}`: {why}", new.name)));
                io::ErrorKind::InvalidData.into()
            }
        })
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, written) => {
            written.map_err(|source| Error::Io { path: Default::default(), source })?;
            Ok(plan.left_out)
        }
    }
}

/// Opens the result's header as a model, without weights.
fn check(folder: &Path, writer: &Writer) -> Result<()> {
    let header = writer.header();
    let bytes = (header.len() as u64).saturating_add(writer.data_bytes());
    let name = folder.display().to_string();
    let model = Model::from_gguf(Gguf::from_header(Source::from_bytes(&name, &header), bytes)?)?;
    Tokenizer::from_gguf(model.gguf())?;
    let positions = model.hparams().context_length.min(CHECKED_POSITIONS);
    model.program(ProgramOptions::default(), positions).map(|_| ())
}

impl Plan {
    /// Says how config.json calls the key that an error is about.
    fn in_config(&self, error: Error) -> Error {
        let text = match &error {
            Error::Model(why) => why.clone(),
            other => other.to_string(),
        };
        let is_about = |(key, ..): &&options::Key| text.contains(&format!(".{key}`"));
        match self.keys.iter().flat_map(|keys| keys.iter()).find(is_about) {
            Some((_, names, _)) => {
                Error::Model(format!("{text} (of config.json: `{}`)", names.join("` or `")))
            }
            None => error,
        }
    }

    /// Returns the tensors to write, by name.
    fn targets<'a>(&self, parts: BTreeMap<String, Part<'a>>) -> Result<BTreeMap<String, Target<'a>>> {
        let has = |name: &str| parts.contains_key(name);
        let mut required = self.required.iter();
        let is_there =
            |name: &str| has(name) || self.prefixes.iter().any(|prefix| has(&format!("{prefix}{name}")));
        // Older folders name biases of norms otherwise.
        let older =
            |name: &str| name.strip_suffix(".bias").is_some_and(|stem| is_there(&format!("{stem}.beta")));
        if let Some(name) = required.find(|name| !is_there(name) && !older(name)) {
            return Err(Error::Model(format!("tensor `{name}` is missing")));
        }
        // Experts of one tensor are consecutive, in order of their numbers.
        let mut found: BTreeMap<String, BTreeMap<Option<usize>, Part<'a>>> = BTreeMap::new();
        let mut halves = BTreeMap::new();
        for (full, part) in parts {
            let short = self.prefixes.iter().find_map(|prefix| full.strip_prefix(prefix)).unwrap_or(&full);
            if self.unused.iter().any(|pattern| matches(pattern, short)) {
                continue;
            }
            let wrong = |why: &str| {
                Error::Model(format!("tensor `{}` {why}", printable(full.as_bytes()).trim_matches('"')))
            };
            let is_of_head = HEADS.iter().any(|head| short.starts_with(head));
            let unknown = match is_of_head {
                false => "is unknown to the family",
                true => {
                    "is unknown to the family; in `architectures` of config.json, the names of models that classify end with ForSequenceClassification"
                }
            };
            let (name, expert) = self.gguf_name(short).ok_or_else(|| wrong(unknown))?;
            let names = match name.split_once(GATE_UP) {
                Some((start, end)) => ["gate", "up"].map(|part| format!("{start}.ffn_{part}{end}")).to_vec(),
                None => vec![name],
            };
            for (half, name) in names.iter().enumerate().filter(|_| names.len() > 1) {
                halves.insert(name.clone(), half);
            }
            for name in names {
                if found.entry(name).or_default().insert(expert, part.clone()).is_some() {
                    return Err(wrong("appears twice, under different names"));
                }
            }
        }
        let mut targets = BTreeMap::new();
        for (name, parts) in found {
            let half = halves.get(&name).copied();
            let target =
                self.target(&name, parts, half).map_err(|e| Error::Model(format!("tensor `{name}`: {e}")))?;
            targets.insert(name, target);
        }
        let mut taken = Vec::new();
        for (name, of, rows) in &self.taken {
            for (from, whole) in &targets {
                let Some(numbers) = numbers(of, from) else { continue };
                let name = numbers.first().map_or((*name).to_owned(), |n| name.replace("{}", &n.to_string()));
                let part = rows.of(whole).map_err(|e| Error::Model(format!("tensor `{name}`: {e}")))?;
                taken.push((name, part));
            }
        }
        let of_layers = |of: &&str| of.contains("{}");
        for of in self.taken.iter().map(|(_, of, _)| *of).filter(of_layers) {
            targets.retain(|name, _| numbers(of, name).is_none());
        }
        targets.extend(taken);
        if let Some((name, rows)) = self.padded
            && let Some(table) = targets.get_mut(name)
            && let Some(own) = table.dims.get_mut(1).filter(|own| **own < rows)
        {
            table.padding = rows - *own;
            *own = rows;
        }
        for (name, vector) in &self.vectors {
            let target =
                Target { dims: vec![vector.len() as u64], vector: vector.clone(), ..Target::default() };
            targets.insert((*name).to_owned(), target);
        }
        Ok(targets)
    }

    /// Returns the name of a tensor in a GGUF file, and its expert.
    fn gguf_name(&self, name: &str) -> Option<(String, Option<usize>)> {
        let whole = self.names.iter().copied().flatten().find_map(|(from, to)| {
            let layer = numbers(from, name)?.first().map(u32::to_string).unwrap_or_default();
            Some((to.replace("{}", &layer), None))
        });
        if whole.is_some() {
            return whole;
        }
        let (stem, kind) = name.rsplit_once('.')?;
        let kind = match kind {
            "weight" | "gamma" => "weight",
            "bias" | "beta" => "bias",
            _ => return None,
        };
        self.names.iter().copied().flatten().find_map(|(from, to)| {
            let mut numbers = numbers(from, stem)?.into_iter();
            let layer = to.contains("{}").then(|| numbers.next()).flatten();
            let layer = layer.as_ref().map(u32::to_string).unwrap_or_default();
            let expert = numbers.next().map(|expert| expert as usize);
            Some((format!("{}.{kind}", to.replace("{}", &layer)), expert))
        })
    }

    /// Assembles a tensor from those of the folder. The caller adds its name to errors.
    fn target<'a>(
        &self,
        name: &str,
        parts: BTreeMap<Option<usize>, Part<'a>>,
        half: Option<usize>,
    ) -> Result<Target<'a>, String> {
        let (takes_turns, is_bias) = (self.takes_turns, name.ends_with(".bias"));
        let mut target = Target { half, takes_turns, is_bias, ..Target::default() };
        let matrix = name.strip_suffix(".weight");
        let by_columns = matrix.and_then(|name| self.by_columns.iter().find(|(end, _)| name.ends_with(end)));
        let by_columns = by_columns.map(|(_, columns)| columns);
        let experts = parts.len() as u64;
        for (place, (expert, part)) in parts.into_iter().enumerate() {
            if expert.is_some_and(|expert| expert != place) {
                return Err(format!("expert {place} is missing"));
            }
            let part = match by_columns {
                Some(columns) if *columns != Some(part.columns()) => part.transposed()?,
                _ => part,
            };
            let dims = part.shape().iter().rev().map(|&dim| dim as u64).chain(expert.map(|_| experts));
            let mut dims: Vec<u64> = dims.collect();
            // A convolution of each channel by itself.
            if let [taps, 1, channels] = dims[..]
                && expert.is_none()
            {
                dims = vec![taps, channels];
            }
            if let [count, 1] = dims[..]
                && is_bias
            {
                dims = vec![count];
            }
            if place > 0 && dims != target.dims {
                let expected = &target.dims;
                return Err(format!(
                    "expert {place}: expected the shape {expected:?} of the others, got {dims:?}"
                ));
            }
            target.dims = dims;
            target.parts.push(part);
        }
        let stem = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name);
        let interleaved = self.interleaved.iter().find(|(ending, _)| stem.ends_with(ending));
        target.heads = interleaved.map(|(_, heads)| *heads);
        if let (Some(heads), Some(part)) = (target.heads, target.parts.first()) {
            let rows = part.shape().first().copied().unwrap_or(0);
            if heads == 0 || rows % heads != 0 || rows / heads % 2 != 0 {
                return Err(format!("expected rows of pairs for {heads} heads, got {rows}"));
            }
        }
        if name.ends_with("norm.weight") && !name.ends_with("ssm_norm.weight") {
            target.offset = self.norm_offset;
        }
        if half.is_some() {
            let rows = target.dims.get_mut(usize::from(!is_bias)).filter(|rows| **rows % 2 == 0);
            *rows.ok_or("expected an even number of rows of the gate and up")? /= 2;
        }
        let matrix = self.matrices.iter().find(|(ending, _)| stem.ends_with(ending));
        if let (Some(&(_, cols)), &[all]) = (matrix, &target.dims[..]) {
            if cols == 0 || all % cols != 0 {
                return Err(format!("expected a multiple of {cols} elements, got {all}"));
            }
            target.dims = vec![cols, all / cols];
        }
        let factors = self.factors.iter().find(|(ending, _)| match name.strip_suffix(".weight") {
            Some(stem) if ending.starts_with('.') => stem.ends_with(ending),
            stem => stem == Some(ending),
        });
        target.factors = factors.map(|(_, factors)| factors.clone()).unwrap_or_default();
        target.is_rate = name.ends_with(".ssm_a");
        let reordered = self.by_value_head.iter().find(|(ending, ..)| stem.ends_with(ending));
        if let Some(&(_, axis, heads)) = reordered {
            let extent = if axis == Axis::Rows { target.dims.last() } else { target.dims.first() };
            if extent.copied().unwrap_or(0) != heads.len() as u64 {
                return Err(format!("expected {} elements of value heads, got {extent:?}", heads.len()));
            }
            target.by_value_head = Some((axis, heads));
        }
        Ok(target)
    }
}

impl Rows {
    /// Takes these rows of a matrix.
    fn of<'a>(&self, whole: &Target<'a>) -> Result<Target<'a>, String> {
        // A matrix without elements may say that it has any number of rows.
        let &[columns @ (1..), rows] = &whole.dims[..] else {
            return Err(format!("expected a matrix with elements, got the shape {:?}", whole.dims));
        };
        let all = usize::try_from(rows).unwrap_or(0);
        let taken: Vec<usize> = match self {
            Rows::From(first) => (*first..all).collect(),
            Rows::Of(rows) => rows.clone(),
            Rows::Heads { length, parts, .. } => {
                if *length == 0 || !all.is_multiple_of(*length) || parts.iter().any(|part| part.end > *length)
                {
                    return Err(format!("expected rows for heads of {length}, got {rows}"));
                }
                let heads = |part: &Range<usize>| {
                    let part = part.clone();
                    (0..all / length).flat_map(move |head| part.clone().map(move |row| head * length + row))
                };
                parts.iter().flat_map(heads).collect()
            }
        };
        match taken.iter().max().filter(|&&last| last < all) {
            Some(_) => {
                let count = taken.len() as u64;
                let (dims, transposed) = match self {
                    Rows::Heads { parts, shape, .. } if *shape != Shape::Matrix => {
                        let height: usize = parts.iter().map(Range::len).sum();
                        let (rows, heads) = (height as u64, count.checked_div(height as u64).unwrap_or(0));
                        match shape {
                            Shape::Transposed => (vec![rows, columns, heads], Some(height)),
                            _ => (vec![columns, rows, heads], None),
                        }
                    }
                    _ => (vec![columns, count], None),
                };
                Ok(Target { dims, rows: Some(taken), transposed, ..whole.clone() })
            }
            None => Err(format!("expected more rows, got {rows}")),
        }
    }
}

/// Whether a name matches a pattern, in which a star at one end matches anything.
fn matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (_, Some(start)) => name.starts_with(start),
        (None, None) => name == pattern,
    }
}

/// Returns the numbers at the places of a pattern, if a name matches it.
fn numbers(pattern: &str, name: &str) -> Option<Vec<u32>> {
    let mut pieces = pattern.split("{}");
    let mut rest = name.strip_prefix(pieces.next()?)?;
    let mut numbers = Vec::new();
    for piece in pieces {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        numbers.push(rest[..digits].parse().ok()?);
        rest = rest[digits..].strip_prefix(piece)?;
    }
    rest.is_empty().then_some(numbers)
}

/// Returns the source of row `row` of a head, when RoPE pairs `(i, i + n / 2)` become adjacent pairs.
fn halves_to_pairs(row: usize, rows_of_a_head: usize) -> usize {
    let (head, at) = (row / rows_of_a_head, row % rows_of_a_head);
    head * rows_of_a_head + at % 2 * (rows_of_a_head / 2) + at / 2
}

impl Target<'_> {
    /// Writes the rows in a format.
    fn write(&self, format: Format, out: &mut dyn Write) -> Result<()> {
        let wrong = |e: &dyn std::fmt::Display| Error::Model(e.to_string());
        let not_finite = || wrong(&format_args!("a value is not finite in {}", format.name()));
        let (mut blocks, mut values) = (Vec::new(), Vec::new());
        let mut put = |blocks: &[u8]| {
            out.write_all(blocks).map_err(|source| Error::Io { path: Default::default(), source })
        };
        let make = |values: &[f32], blocks: &mut Vec<u8>| {
            let bytes = format.row_bytes(values.len()).ok_or_else(|| wrong(&"rows are not whole blocks"))?;
            blocks.resize(bytes, 0);
            format.quantize(values, blocks).map_err(|e| wrong(&e))?;
            let finite = values.iter().all(|value| value.is_finite()) && format.is_finite(blocks);
            if finite { Ok(()) } else { Err(not_finite()) }
        };
        if !self.vector.is_empty() {
            make(&self.vector, &mut blocks)?;
            return put(&blocks);
        }
        // Halves of biases are elements of rows.
        let single = self.half.is_some() && self.is_bias;
        let of_matrix = if single { self.dims.first() } else { self.dims.get(1) };
        let of_matrix = of_matrix.map_or(1, |&rows| rows.max(1) as usize);
        let by_columns = matches!(self.by_value_head, Some((Axis::Columns, _)));
        for part in &self.parts {
            let reader = part.reader(if single { 1 } else { part.columns() })?;
            if let (Some(height), Some(rows)) = (self.transposed, &self.rows) {
                blocks.resize(format.row_bytes(height).unwrap_or(0), 0);
                for head in rows.chunks(height) {
                    let mut matrix = Vec::new();
                    head.iter().for_each(|&row| reader.read(row, &mut matrix));
                    let columns = part.columns();
                    for column in 0..columns {
                        values.clear();
                        values.extend(matrix.iter().skip(column).step_by(columns));
                        make(&values, &mut blocks)?;
                        put(&blocks)?;
                    }
                }
                continue;
            }
            let rows_of_a_head = self.heads.map(|heads| reader.rows() / heads);
            let count = match (self.half, &self.rows) {
                (Some(_), _) => reader.rows() / 2,
                (None, Some(rows)) => rows.len(),
                (None, None) => reader.rows(),
            };
            for at in 0..count {
                let at = self.rows.as_ref().map_or(at, |rows| rows[at]);
                let from = match (self.half, self.by_value_head) {
                    (Some(half), _) if self.takes_turns => 2 * at + half,
                    (Some(half), _) => at / of_matrix * 2 * of_matrix + half * of_matrix + at % of_matrix,
                    (None, Some((Axis::Rows, heads))) => heads.source(at),
                    _ => rows_of_a_head.map_or(at, |rows| halves_to_pairs(at, rows)),
                };
                let factor = self.factors.iter().find(|(end, _)| from < *end).map(|(_, factor)| *factor);
                let same = self.offset == 0.0 && !self.is_rate && !by_columns && factor.is_none();
                blocks.resize(format.row_bytes(part.columns()).unwrap_or(0), 0);
                if same && reader.carry(from, format, &mut blocks) {
                    if !format.is_finite(&blocks) {
                        return Err(not_finite());
                    }
                    put(&blocks)?;
                    continue;
                }
                values.clear();
                reader.read(from, &mut values);
                if let Some((Axis::Columns, heads)) = self.by_value_head {
                    let sources = (0..values.len()).map(|at| heads.source(at));
                    values = sources.filter_map(|from| values.get(from).copied()).collect();
                }
                for value in &mut values {
                    *value = match self.is_rate {
                        true => -f64::from(*value).exp() as f32,
                        false => *value * factor.unwrap_or(1.0) + self.offset,
                    };
                }
                make(&values, &mut blocks)?;
                put(&blocks)?;
            }
        }
        if self.padding > 0 {
            let columns = self.dims.first().map_or(0, |&columns| columns as usize);
            make(&vec![0.0; columns], &mut blocks)?;
        }
        (0..self.padding).try_for_each(|_| put(&blocks))
    }
}

//! Writes a model in other formats: a mix by its name, as llama.cpp's tool does, with or without a matrix of
//! importance.
//!
//! Tensors are read, quantised and written one after the other, some rows at a time. `mix.rs` has the mixes,
//! `imatrix.rs` the matrices of importance; the formats themselves quantise
//! ([`Format::quantize_weights`]).

mod imatrix;
mod mix;

use std::io::{self, Write};
use std::path::Path;

use halite_kernels::cores;
use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::{Format, Kind, Layout};
use regex_automata::meta::Regex;

pub use imatrix::{Imatrix, Sums, collect};
pub use mix::{MIXES, Mix, mix_named};

use crate::error::{Error, Result};
use crate::gguf::write::{NewTensor, Writer};
use crate::gguf::{Gguf, TensorInfo};
use mix::{Chooser, Shape, fitting, is_matrix, needs_importance};

/// Alignment of tensor data: a cache line.
const ALIGNMENT: u32 = 64;

/// Values that are quantised at once.
const SLAB_VALUES: usize = 1 << 22;

/// More would only take memory.
const MOST_THREADS: usize = 256;

/// The version of the formats, which all files of today have.
const QUANTIZATION_VERSION: u32 = 2;

/// Metadata that the new file does not copy.
const OWN: &[&str] = &[
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "quantize.imatrix.chunks_count",
    "quantize.imatrix.dataset",
    "quantize.imatrix.entries_count",
    "quantize.imatrix.file",
    "split.no",
    "split.count",
    "split.tensors.count",
];

/// How to quantise a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QuantizeOptions {
    /// The mix.
    pub mix: &'static Mix,
    /// Regular expressions for names of matrices, and their formats; the first one that matches counts.
    pub tensors: Vec<(String, Format)>,
    /// Whether all matrices take the mix's common format.
    pub pure: bool,
    /// Whether matrices may be in formats with larger errors than those of Q8_0.
    pub requantize: bool,
    /// Importance of columns.
    pub imatrix: Option<Imatrix>,
    /// The file of the importance, for the metadata.
    pub imatrix_file: String,
    /// Threads; 0: one for each core.
    pub threads: usize,
}

impl QuantizeOptions {
    /// The options of a mix.
    pub fn new(mix: &'static Mix) -> QuantizeOptions {
        let imatrix_file = String::new();
        let tensors = Vec::new();
        QuantizeOptions {
            mix,
            tensors,
            pure: false,
            requantize: false,
            imatrix: None,
            imatrix_file,
            threads: 0,
        }
    }
}

crate::setters!(QuantizeOptions {
    tensors: Vec<(String, Format)>,
    pure: bool,
    requantize: bool,
    imatrix: impl Into<Option<Imatrix>>,
    imatrix_file: String,
    threads: usize,
});

/// A tensor that was written.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Written {
    /// Its name.
    pub name: String,
    /// Its format before.
    pub from: Format,
    /// Its format now.
    pub to: Format,
    /// Its bytes before.
    pub from_bytes: u64,
    /// Its bytes now.
    pub to_bytes: u64,
    /// Whether the importance of its columns was known.
    pub important: bool,
    /// The root of the mean square of the error, relative to that of the values before; `None`: a copy.
    pub error: Option<f64>,
}

/// Writes the model `gguf`, split or not, with other formats. Calls `progress` with each written tensor.
///
/// # Errors
/// [`Error::Argument`] for a pattern that is no regular expression or matches no matrix. [`Error::Model`] for a file
/// that is not a model, a matrix that is quantised already (without the option), a format without a quantiser,
/// a mix that needs importance, importance of another shape, and values that are not finite.
/// [`Error::FileChanged`]; errors of `out` as [`Error::Io`] without a path.
pub fn quantize(
    gguf: &Gguf,
    options: &QuantizeOptions,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(&Written),
) -> Result<Vec<Written>> {
    let mut writer = Writer::new(ALIGNMENT)?;
    for (key, value) in gguf.encoded_metadata() {
        if !OWN.contains(&key) {
            writer.entry(key, value)?;
        }
    }
    writer.entry("general.file_type", options.mix.file_type)?;
    writer.entry("general.quantization_version", QUANTIZATION_VERSION)?;
    if let Some(imatrix) = &options.imatrix {
        writer.entry("quantize.imatrix.file", &options.imatrix_file[..])?;
        if let Some(dataset) = imatrix.datasets.first() {
            writer.entry("quantize.imatrix.dataset", &dataset[..])?;
        }
        writer.entry("quantize.imatrix.entries_count", imatrix.sums.len() as u32)?;
        writer.entry("quantize.imatrix.chunks_count", imatrix.chunks)?;
    }
    for (tensor, format) in gguf.tensors().zip(chosen_formats(gguf, options)?) {
        let layout = if format == tensor.record.format { tensor.record.layout } else { Layout::Rows };
        writer.tensor_in(layout, &tensor.record.name, &tensor.record.dims, format)?;
    }

    let means = options.imatrix.as_ref().map(Imatrix::means).unwrap_or_default();
    if options.imatrix.is_some() && !means.keys().any(|name| gguf.tensor(name).is_some()) {
        let got = format!("none in `{}`", options.imatrix_file);
        return Err(Error::argument("importance", "that of some of the model's matrices", got));
    }
    let threads = if options.threads > 0 { options.threads.min(MOST_THREADS) } else { cores::usable() };
    let (mut all, mut failure) = (Vec::new(), None);
    let written = writer.write(out, &mut |new, out| {
        let tensor = gguf.tensor(&new.name).ok_or(io::ErrorKind::NotFound)?;
        let importance = means.get(&new.name[..]).map(|means| &means[..]);
        match write(&tensor, new, importance, threads, out) {
            Ok(written) => {
                progress(&written);
                all.push(written);
                Ok(())
            }
            Err(Error::Io { path, source }) if path == Path::new("") => Err(source),
            Err(error) => {
                failure = Some(error);
                Err(io::ErrorKind::InvalidData.into())
            }
        }
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, Err(source)) => Err(Error::Io { path: Default::default(), source }),
        (None, Ok(())) => Ok(all),
    }
}

/// The new formats of a file's tensors, in its order.
fn chosen_formats(gguf: &Gguf, options: &QuantizeOptions) -> Result<Vec<Format>> {
    let mix = options.mix;
    let regex = |(pattern, format): &(String, Format)| match Regex::new(pattern) {
        Ok(regex) => Ok((regex, *format)),
        Err(e) => {
            Err(Error::argument("pattern of tensors", "a regular expression", format!("`{pattern}`: {e}")))
        }
    };
    let patterns = options.tensors.iter().map(regex).collect::<Result<Vec<_>>>()?;
    let mut matched = vec![false; patterns.len()];
    let shape = Shape::of(gguf)?;
    let tensors: Vec<TensorInfo<'_>> = gguf.tensors().collect();
    let names = tensors.iter().map(|tensor| &tensor.record.name[..]);
    let mut chooser = Chooser::new(mix, &shape, options.imatrix.is_some(), names);
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&at| Chooser::order(&tensors[at].record.name));
    let mut formats: Vec<Format> = tensors.iter().map(|tensor| tensor.record.format).collect();
    for at in order {
        let record = tensors[at].record;
        if !is_matrix(record) || matches!(record.format, Format::I8 | Format::I16 | Format::I32 | Format::I64)
        {
            continue;
        }
        let cols = record.dims.first().copied().unwrap_or(0);
        let chosen = patterns.iter().position(|(regex, _)| regex.is_match(&record.name[..]));
        let format = match chosen {
            Some(n) => {
                matched[n] = true;
                patterns[n].1
            }
            None if options.pure => mix.format,
            None => chooser.choose(record),
        };
        formats[at] = fitting(format, cols);
        if chosen.is_some() && formats[at] != format {
            let (name, block) = (&record.name, format.block_len());
            return Err(Error::Model(format!(
                "tensor `{name}`: {}: expected rows of whole blocks of {block} values, got {cols}",
                format.name()
            )));
        }
        check(record.name.as_str(), record.format, formats[at], options)?;
    }
    match matched.iter().position(|&matched| !matched) {
        Some(n) => {
            let got = format!("`{}`", options.tensors[n].0);
            Err(Error::argument("pattern of tensors", "one that matches a matrix", got))
        }
        None => Ok(formats),
    }
}

fn has_quantiser(format: Format) -> bool {
    let zeros = vec![0.0; format.block_len()];
    format.quantize_weights(&zeros, Some(&zeros), &mut vec![0; format.block_bytes()]).is_ok()
}

/// The formats that a matrix can take, some of them with importance alone.
pub fn formats() -> impl Iterator<Item = Format> {
    Format::ALL.iter().copied().filter(|&format| has_quantiser(format))
}

/// Checks that a matrix can change its format.
fn check(name: &str, from: Format, to: Format, options: &QuantizeOptions) -> Result<()> {
    let wrong = |why: String| Err(Error::Model(format!("tensor `{name}`: {why}")));
    if from == to {
        return Ok(());
    }
    let exact = matches!(from.kind(), Kind::Float) || from == Format::Q8_0;
    if !exact && !options.requantize {
        return wrong(format!(
            "expected F32, F16, BF16 or Q8_0, got {}: its errors would add up; start from the original model, or allow it with `requantize`",
            from.name()
        ));
    }
    if !has_quantiser(to) {
        return wrong(format!("no quantiser for {}", to.name()));
    }
    if needs_importance(options.mix, name, to) {
        let needs = format!("{} in the mix {} needs a matrix of importance", to.name(), options.mix.name);
        match &options.imatrix {
            None => return wrong(needs),
            Some(imatrix) if !imatrix.sums.contains_key(name) => {
                return wrong(format!("{needs}, and the one given lacks the tensor"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Writes one tensor.
fn write(
    tensor: &TensorInfo<'_>,
    new: &NewTensor,
    importance: Option<&[f32]>,
    threads: usize,
    out: &mut dyn Write,
) -> Result<Written> {
    let record = tensor.record;
    let mut written = Written {
        name: record.name.clone(),
        from: record.format,
        to: new.format,
        from_bytes: record.bytes.len() as u64,
        to_bytes: new.bytes,
        important: false,
        error: None,
    };
    let io = |source| Error::Io { path: Default::default(), source };
    let region = tensor.region()?;
    if record.format == new.format {
        out.write_all(&region.load()?).map_err(io)?;
        return Ok(written);
    }
    let wrong = |why: String| Error::Model(format!("tensor `{}`: {why}", record.name));
    let dim = |n: usize| record.dims.get(n).copied().unwrap_or(1) as usize;
    let (cols, experts) = (dim(0), dim(2));
    let importance = match importance {
        Some(columns) if columns.len() == cols * experts => Some(columns),
        // llama.cpp's tool writes some for embeddings, which read single rows.
        Some(_) if record.name.starts_with("token_embd") => None,
        Some(columns) => {
            let (expected, got) = (cols * experts, columns.len());
            return Err(wrong(format!("matrix of importance: expected {expected} columns, got {got}")));
        }
        None => None,
    };
    let whole = "rows are not whole blocks";
    let from_row = record.format.row_bytes(cols).ok_or_else(|| wrong(whole.into()))?;
    let to_row = new.format.row_bytes(cols).ok_or_else(|| wrong(whole.into()))?;
    let bytes = match record.layout {
        Layout::Rows => region.load()?,
        Layout::Interleaved => tensor.rows()?.into(),
    };
    let rows = Rows { from: record.format, to: new.format, cols, rows: dim(1), importance };
    let slab = (SLAB_VALUES / cols.max(1)).max(1);
    let mut blocks = Vec::new();
    let (mut errors, mut squares) = (0.0, 0.0);
    for (n, source) in bytes.chunks(slab * from_row).enumerate() {
        let count = source.len() / from_row;
        blocks.resize(count * to_row, 0);
        let share = count.div_ceil(threads.max(1)).max(1);
        let parts = source.chunks(share * from_row).zip(blocks.chunks_mut(share * to_row)).enumerate();
        let rows = &rows;
        let results: Vec<Result<Vec<(f64, f64)>, String>> = std::thread::scope(|scope| {
            let start = |(part, (source, blocks))| {
                let first = n * slab + part * share;
                let work = move || rows.quantize(first, source, blocks);
                std::thread::Builder::new().spawn_scoped(scope, work)
            };
            let threads: Vec<_> = parts.map(start).collect();
            let join = |thread: io::Result<std::thread::ScopedJoinHandle<'_, _>>| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err("a thread panicked".into())),
                Err(e) => Err(format!("cannot start a thread: {e}")),
            };
            threads.into_iter().map(join).collect()
        });
        for result in results {
            for (error, square) in result.map_err(wrong)? {
                errors += error;
                squares += square;
            }
        }
        out.write_all(&blocks).map_err(io)?;
    }
    written.important = importance.is_some();
    written.error = Some(if squares > 0.0 { (errors / squares).sqrt() } else { 0.0 });
    Ok(written)
}

/// How rows of a tensor change.
struct Rows<'a> {
    from: Format,
    to: Format,
    cols: usize,
    /// Rows of an expert.
    rows: usize,
    importance: Option<&'a [f32]>,
}

impl Rows<'_> {
    /// Quantises rows, of which the first is number `first`. Returns the sums of squares of each row's errors and values.
    fn quantize(&self, first: usize, source: &[u8], blocks: &mut [u8]) -> Result<Vec<(f64, f64)>, String> {
        let _floats = DefaultFloats::set();
        let (Some(from_row), Some(to_row)) = (self.from.row_bytes(self.cols), self.to.row_bytes(self.cols))
        else {
            return Err("rows are not whole blocks".into());
        };
        let (mut values, mut after) = (vec![0.0; self.cols], vec![0.0; self.cols]);
        let rows = source.chunks_exact(from_row).zip(blocks.chunks_exact_mut(to_row)).enumerate();
        let quantised = rows.map(|(n, (source, blocks))| {
            let row = first + n;
            let wrong = |e: &dyn std::fmt::Display| format!("row {row}: {e}");
            self.from.dequantize(source, &mut values).map_err(|e| wrong(&e))?;
            let columns =
                self.importance.and_then(|all| all.chunks_exact(self.cols).nth(row / self.rows.max(1)));
            self.to.quantize_weights(&values, columns, blocks).map_err(|e| wrong(&e))?;
            if !values.iter().all(|value| value.is_finite()) || !self.to.is_finite(blocks) {
                return Err(format!("row {row}: a value is not finite in {}", self.to.name()));
            }
            self.to.dequantize(blocks, &mut after).map_err(|e| wrong(&e))?;
            let square = |x: f32| f64::from(x) * f64::from(x);
            let errors = values.iter().zip(&after).map(|(x, y)| square(x - y)).sum();
            Ok((errors, values.iter().map(|&x| square(x)).sum()))
        });
        quantised.collect()
    }
}

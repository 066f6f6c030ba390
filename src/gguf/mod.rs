//! GGUF model files: a checked directory over mapped bytes. Nothing is copied; a split model has several
//! sources.

mod parse;
pub mod write;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use halite_kernels::formats::{Format, Layout};

pub(crate) use parse::printable;
pub use parse::{
    GgufError, Header, MAX_ALIGNMENT, MAX_ENTRIES, MAX_KEY_BYTES, MAX_NAME_BYTES, TensorRecord, Value,
    ValueType, parse, parse_header,
};

use crate::error::{Error, Result};
use crate::map::{Region, Source};
use crate::memory::reserved;

/// Maximum bytes of the header of a file that is not mapped. Those of large vocabularies have some 10 MB.
pub const MAX_HEADER_BYTES: u64 = 64 << 20;

/// What is read of a file first, if it is not mapped.
const FIRST_HEADER_BYTES: u64 = 1 << 20;

/// Maximum files of a split model.
pub const MAX_SPLITS: u64 = 1024;

/// What files are that are not models, by their `general.type`.
const NOT_MODELS: &[(&str, &str)] = &[
    ("adapter", "an adapter, which is applied to a model"),
    ("imatrix", "a matrix of importance, with which a model is quantised"),
    ("mmproj", "the part of a model that reads images or sound, which is not supported"),
];

/// An opened model file (or a set of split files).
#[derive(Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    keys: HashMap<String, usize>,
    tensors: HashMap<String, (usize, usize)>,
}

#[derive(Debug)]
struct Part {
    source: Arc<Source>,
    header: Header,
}

/// A tensor of the directory.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct TensorInfo<'a> {
    /// Name, dimensions, format and place in its file.
    pub record: &'a TensorRecord,
    source: &'a Arc<Source>,
}

impl TensorInfo<'_> {
    /// The tensor's bytes in its file.
    pub fn region(&self) -> Result<Region> {
        Region::new(self.source, self.record.bytes.clone()).ok_or_else(|| Error::FileChanged {
            path: self.source.path().to_owned(),
            detail: format!("tensor `{}` is beyond the end of the file", self.record.name),
        })
    }

    /// Calls `f` with each matrix of the tensor: its bytes, and values of a row.
    fn matrices(&self, f: &mut dyn FnMut(&[u8], usize)) -> Result<()> {
        let region = self.region()?;
        let all = region.load()?;
        let dim = |i: usize| self.record.dims.get(i).copied().unwrap_or(1) as usize;
        // The parser checked that the tensor lies in the file.
        let bytes = self.record.bytes.len() / (dim(2) * dim(3)).max(1);
        all.chunks_exact(bytes.max(1)).for_each(|matrix| f(matrix, dim(0)));
        Ok(())
    }

    /// Returns the tensor's bytes with plain rows, whatever the file's layout.
    ///
    /// # Errors
    /// [`Error::FileChanged`].
    pub fn rows(&self) -> Result<Vec<u8>> {
        let (format, layout) = (self.record.format, self.record.layout);
        let mut out = Vec::with_capacity(self.record.bytes.len());
        self.matrices(&mut |matrix, cols| {
            let mut rows = vec![0; matrix.len()];
            let (row_blocks, bytes) = (cols / format.block_len(), format.block_bytes());
            for (i, block) in rows.chunks_exact_mut(bytes).enumerate() {
                format.copy_block(layout, matrix, row_blocks, i / row_blocks, i % row_blocks, block);
            }
            out.extend(rows);
        })?;
        Ok(out)
    }

    /// Returns the tensor's bytes with interleaved rows, whatever the file's layout.
    ///
    /// # Errors
    /// [`Error::FileChanged`].
    pub fn interleaved(&self) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(self.record.bytes.len());
        self.matrices(&mut |matrix, cols| {
            let mut lanes = vec![0; matrix.len()];
            // The lengths are those of whole rows; interleaved rows stay as they are.
            match self.record.layout {
                Layout::Rows if self.record.format.interleave(cols, matrix, &mut lanes).is_ok() => {
                    out.extend(lanes)
                }
                _ => out.extend(matrix),
            }
        })?;
        Ok(out)
    }
}

impl Gguf {
    /// Maps a file and checks its header. If it is the first of a split model, maps its siblings in the same
    /// folder too.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Gguf`].
    pub fn open(path: &Path) -> Result<Gguf> {
        Gguf::open_parts(path, &|path| Gguf::from_source(Source::open(path)?))
    }

    /// As [`Gguf::open`], without a map: reads the header only, and tensors when they are needed.
    ///
    /// # Errors
    /// As [`Gguf::open`]; [`GgufError::Truncated`] or another error of the header if it has more than
    /// [`MAX_HEADER_BYTES`].
    pub fn open_unmapped(path: &Path) -> Result<Gguf> {
        Gguf::open_parts(path, &|path| {
            let mut start_bytes = FIRST_HEADER_BYTES;
            loop {
                let source = Source::open_unmapped(path, start_bytes)?;
                let file_bytes = source.len();
                match Gguf::from_header(source, file_bytes) {
                    // What a header that is cut off looks like depends on the place.
                    Err(Error::Gguf { source, .. })
                        if !matches!(source, GgufError::Magic { .. } | GgufError::Version { .. })
                            && start_bytes < file_bytes.min(MAX_HEADER_BYTES) =>
                    {
                        start_bytes = start_bytes.saturating_mul(2);
                    }
                    other => return other,
                }
            }
        })
    }

    fn open_parts(path: &Path, open: &dyn Fn(&Path) -> Result<Gguf>) -> Result<Gguf> {
        let mut gguf = open(path)?;
        let count = gguf.optional_u64("split.count")?.unwrap_or(1);
        if count > 1 {
            let split = |message: String| gguf_error(path, GgufError::Split(message));
            if count > MAX_SPLITS {
                return Err(split(format!("split.count: expected at most {MAX_SPLITS}, got {count}")));
            }
            let index = gguf.optional_u64("split.no")?.unwrap_or(0);
            if index != 0 {
                return Err(split(format!(
                    "this is file {} of {count}; open the first one",
                    index.saturating_add(1)
                )));
            }
            for index in 1..count {
                let sibling = split_sibling(path, index, count).ok_or_else(|| {
                    split(format!("the file name must end in -00001-of-{count:05}.gguf to find its siblings"))
                })?;
                let part = open(&sibling)?;
                let (no, n) = (part.optional_u64("split.no")?, part.optional_u64("split.count")?);
                if no != Some(index) || n != Some(count) {
                    let shown = |value: Option<u64>| value.map_or("none".into(), |value| value.to_string());
                    return Err(split(format!(
                        "{}: expected split.no {index} of {count}, got {} of {}",
                        sibling.display(),
                        shown(no),
                        shown(n)
                    )));
                }
                gguf.parts.extend(part.parts);
            }
            gguf.index_tensors()?;
            let declared = gguf.optional_u64("split.tensors.count")?;
            let got = gguf.tensors.len() + gguf.parts().map(|(_, header)| header.empty.len()).sum::<usize>();
            if let Some(declared) = declared
                && declared != got as u64
            {
                return Err(split(format!(
                    "split.tensors.count: expected {declared} tensors in all files, got {got}"
                )));
            }
        }
        Ok(gguf)
    }

    /// Checks the header of one file's bytes.
    ///
    /// # Errors
    /// [`Error::Gguf`].
    pub fn from_source(source: Arc<Source>) -> Result<Gguf> {
        let file_bytes = source.bytes().len() as u64;
        Gguf::from_header(source, file_bytes)
    }

    /// Checks the header of a file of `file_bytes` from its first bytes alone. Its tensors have shapes but no
    /// data: reading data is [`Error::FileChanged`].
    ///
    /// # Errors
    /// [`Error::Gguf`].
    pub fn from_header(source: Arc<Source>, file_bytes: u64) -> Result<Gguf> {
        let header = parse_header(source.bytes(), file_bytes).map_err(|e| gguf_error(source.path(), e))?;
        let keys = header.metadata.iter().enumerate().map(|(i, (key, _))| (key.clone(), i)).collect();
        let mut gguf = Gguf { parts: vec![Part { source, header }], keys, tensors: HashMap::new() };
        gguf.index_tensors()?;
        Ok(gguf)
    }

    /// Adds the tensors of another file, with `prefix` before their names, and ignores its metadata.
    pub(crate) fn join(&mut self, other: Gguf, prefix: &str) -> Result<()> {
        for mut part in other.parts {
            for record in &mut part.header.tensors {
                record.name.insert_str(0, prefix);
            }
            self.parts.push(part);
        }
        self.index_tensors()
    }

    fn index_tensors(&mut self) -> Result<()> {
        self.tensors.clear();
        for (p, part) in self.parts.iter().enumerate() {
            for (t, record) in part.header.tensors.iter().enumerate() {
                if self.tensors.insert(record.name.clone(), (p, t)).is_some() {
                    // The parser rejects duplicates within one file.
                    let message = format!("tensor `{}` is in two files", record.name);
                    return Err(gguf_error(part.source.path(), GgufError::Split(message)));
                }
            }
        }
        Ok(())
    }

    /// The first file's path.
    pub fn path(&self) -> &Path {
        self.parts.first().map_or(Path::new(""), |part| part.source.path())
    }

    /// The files, in order, with their headers.
    pub fn parts(&self) -> impl Iterator<Item = (&Arc<Source>, &Header)> {
        self.parts.iter().map(|part| (&part.source, &part.header))
    }

    /// Checks that none of the mapped files changed since they were opened.
    ///
    /// # Errors
    /// [`Error::FileChanged`].
    pub fn verify(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.source.verify())
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.parts.iter().flat_map(|part| {
            part.header.tensors.iter().map(|record| TensorInfo { record, source: &part.source })
        })
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<TensorInfo<'_>> {
        let &(p, t) = self.tensors.get(name)?;
        let part = self.parts.get(p)?;
        Some(TensorInfo { record: part.header.tensors.get(t)?, source: &part.source })
    }

    /// All metadata of the first file, in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        self.parts.first().map_or(&[], |part| &part.header.metadata)
    }

    /// All metadata of the first file, to write to another.
    pub fn encoded_metadata(&self) -> impl Iterator<Item = (&str, write::Encoded)> {
        self.parts.first().into_iter().flat_map(|part| {
            let file = part.source.bytes();
            part.header.metadata.iter().map(move |(key, v)| (key.as_str(), write::Encoded::copy(v, file)))
        })
    }

    fn value(&self, key: &str) -> Option<(&Value, &[u8])> {
        let part = self.parts.first()?;
        let (_, value) = part.header.metadata.get(*self.keys.get(key)?)?;
        Some((value, part.source.bytes().get(value.bytes.clone())?))
    }

    fn wrong_type(&self, key: &str, expected: &'static str, value: &Value) -> Error {
        gguf_error(self.path(), GgufError::ValueType { key: key.to_owned(), expected, got: value.describe() })
    }

    /// Returns the error for a missing key.
    pub(crate) fn missing(&self, key: &str) -> Error {
        gguf_error(self.path(), GgufError::MissingKey { key: key.to_owned() })
    }

    /// An unsigned integer of any width, or a signed one that is not negative; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`] if the value is of another type, [`GgufError::Invalid`] if it is negative.
    pub fn optional_u64(&self, key: &str) -> Result<Option<u64>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        match (value.array_len, integer(value.kind, bytes).filter(|_| value.kind != ValueType::Bool)) {
            (None, Some(v)) => u64::try_from(v).map(Some).map_err(|_| {
                let (what, at) = (format!("key `{key}`"), value.bytes.start as u64);
                let (expected, got) = ("an integer that is not negative", v.to_string());
                gguf_error(self.path(), GgufError::Invalid { what, at, expected, got })
            }),
            _ => Err(self.wrong_type(key, "an integer", value)),
        }
    }

    /// A required unsigned integer that fits in 32 bits.
    ///
    /// # Errors
    /// [`GgufError::MissingKey`], [`GgufError::ValueType`] or [`GgufError::Invalid`].
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.optional_u32(key)?.ok_or_else(|| self.missing(key))
    }

    /// An unsigned integer that fits in 32 bits; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`] or [`GgufError::Invalid`].
    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>> {
        let Some(v) = self.optional_u64(key)? else { return Ok(None) };
        let at = self.value(key).map_or(0, |(value, _)| value.bytes.start as u64);
        u32::try_from(v).map(Some).map_err(|_| {
            let what = format!("key `{key}`");
            gguf_error(
                self.path(),
                GgufError::Invalid { what, at, expected: "at most 2^32 - 1", got: v.to_string() },
            )
        })
    }

    /// A finite f32; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`] or [`GgufError::Invalid`].
    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        let v = match (value.array_len, value.kind, bytes) {
            (None, ValueType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            _ => return Err(self.wrong_type(key, "f32", value)),
        };
        if !v.is_finite() {
            let (what, at) = (format!("key `{key}`"), value.bytes.start as u64);
            let error = GgufError::Invalid { what, at, expected: "a finite number", got: v.to_string() };
            return Err(gguf_error(self.path(), error));
        }
        Ok(Some(v))
    }

    /// A required finite f32.
    ///
    /// # Errors
    /// [`GgufError::MissingKey`], [`GgufError::ValueType`] or [`GgufError::Invalid`].
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.optional_f32(key)?.ok_or_else(|| self.missing(key))
    }

    /// A bool; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`].
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        match (value.array_len, value.kind, bytes) {
            (None, ValueType::Bool, &[b]) => Ok(Some(b == 1)),
            _ => Err(self.wrong_type(key, "bool", value)),
        }
    }

    /// A UTF-8 string; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`] or [`GgufError::Invalid`].
    pub fn optional_str(&self, key: &str) -> Result<Option<&str>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        if value.array_len.is_some() || value.kind != ValueType::String {
            return Err(self.wrong_type(key, "string", value));
        }
        std::str::from_utf8(bytes).map(Some).map_err(|_| {
            let (what, at) = (format!("key `{key}`"), value.bytes.start as u64);
            gguf_error(self.path(), GgufError::Invalid { what, at, expected: "UTF-8", got: printable(bytes) })
        })
    }

    /// A required UTF-8 string.
    ///
    /// # Errors
    /// [`GgufError::MissingKey`], [`GgufError::ValueType`] or [`GgufError::Invalid`].
    pub fn str(&self, key: &str) -> Result<&str> {
        self.optional_str(key)?.ok_or_else(|| self.missing(key))
    }

    /// The architecture of a model.
    ///
    /// # Errors
    /// As [`Gguf::str`], and [`Error::Model`] for a file that says that it is something else.
    pub fn architecture(&self) -> Result<&str> {
        let kind = self.optional_str("general.type")?.unwrap_or("model");
        let what = NOT_MODELS.iter().find(|(name, _)| *name == kind).map(|(_, what)| *what);
        if let Some(what) = what {
            let file = self.path().display();
            return Err(Error::Model(format!(
                "{file}: expected a model, got {what} (general.type `{kind}`)"
            )));
        }
        self.str("general.architecture")
    }

    /// The strings of an array, as bytes (token texts need not be UTF-8); `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`].
    pub fn optional_strings(&self, key: &str) -> Result<Option<Strings<'_>>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        match (value.array_len, value.kind) {
            (Some(len), ValueType::String) => Ok(Some(Strings { bytes, len })),
            _ => Err(self.wrong_type(key, "array of string", value)),
        }
    }

    /// An integer or an array of integers, as `len` values: a scalar stands for all of them. `None` if
    /// absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`] or [`GgufError::Invalid`] if an array has another length or a negative value.
    pub fn optional_u32_per_layer(&self, key: &str, len: usize) -> Result<Option<Vec<u32>>> {
        let Some((value, _)) = self.value(key) else { return Ok(None) };
        if value.array_len.is_none() {
            return Ok(self.optional_u32(key)?.map(|v| vec![v; len]));
        }
        let values = self.optional_integers(key)?.filter(|values| values.len() == len);
        let values: Option<Vec<u32>> =
            values.and_then(|values| values.map(|v| u32::try_from(v).ok()).collect());
        match values {
            Some(values) => Ok(Some(values)),
            None => Err(gguf_error(
                self.path(),
                GgufError::Invalid {
                    what: format!("key `{key}`"),
                    at: value.bytes.start as u64,
                    expected: "one value of 0 to 2^32 - 1 for each layer",
                    got: self.display_value(value),
                },
            )),
        }
    }

    /// An array of integers (or bools, as 0 and 1); `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`].
    pub fn optional_integers(&self, key: &str) -> Result<Option<impl ExactSizeIterator<Item = i128>>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        let kind = value.kind;
        match (value.array_len, kind, kind.bytes()) {
            (None, ..) | (_, ValueType::F32 | ValueType::F64, _) | (_, _, None) => {
                Err(self.wrong_type(key, "array of integers", value))
            }
            (Some(_), _, Some(width)) => {
                Ok(Some(bytes.chunks_exact(width).map(move |b| integer(kind, b).unwrap_or(0))))
            }
        }
    }

    /// An array of bytes, signed or not; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`].
    pub fn optional_bytes(&self, key: &str) -> Result<Option<&[u8]>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        match (value.array_len, value.kind) {
            (Some(_), ValueType::U8 | ValueType::I8) => Ok(Some(bytes)),
            _ => Err(self.wrong_type(key, "array of bytes", value)),
        }
    }

    /// An array of f32 (integers are converted: some files store scores so); `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::ValueType`].
    pub fn optional_f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some((value, bytes)) = self.value(key) else { return Ok(None) };
        if value.array_len.is_some() && value.kind == ValueType::F32 {
            let (words, _) = bytes.as_chunks::<4>();
            let mut values = reserved(words.len() as u64, "an array of a model file")?;
            values.extend(words.iter().map(|&w| f32::from_le_bytes(w)));
            return Ok(Some(values));
        }
        match self.optional_integers(key) {
            Ok(values) => Ok(values.map(|values| values.map(|v| v as f32).collect())),
            Err(_) => Err(self.wrong_type(key, "array of numbers", value)),
        }
    }

    /// Formats a metadata value for people; truncates long arrays and texts.
    pub fn display_value(&self, value: &Value) -> String {
        let bytes = self.parts.first().and_then(|p| p.source.bytes().get(value.bytes.clone())).unwrap_or(&[]);
        let scalar = |bytes: &[u8]| match (value.kind, integer(value.kind, bytes)) {
            (ValueType::Bool, Some(v)) => (v == 1).to_string(),
            (_, Some(v)) => v.to_string(),
            (ValueType::F32, _) => {
                bytes.try_into().map_or(String::new(), |b| f32::from_le_bytes(b).to_string())
            }
            (ValueType::F64, _) => {
                bytes.try_into().map_or(String::new(), |b| f64::from_le_bytes(b).to_string())
            }
            _ => {
                const SHOWN_BYTES: usize = 1 << 16;
                let more = if bytes.len() > SHOWN_BYTES { "…" } else { "" };
                let shown = bytes.get(..SHOWN_BYTES).unwrap_or(bytes);
                format!("{:?}{more}", String::from_utf8_lossy(shown))
            }
        };
        let Some(len) = value.array_len else { return scalar(bytes) };
        const SHOWN: usize = 6;
        let shown: Vec<String> = match value.kind.bytes() {
            Some(width) => bytes.chunks_exact(width).take(SHOWN).map(scalar).collect(),
            None => Strings { bytes, len }.iter().take(SHOWN).map(scalar).collect(),
        };
        let more = if len > SHOWN { ", …" } else { "" };
        format!("{len} × {:?} [{}{more}]", value.kind, shown.join(", "))
    }
}

/// A string array of the metadata, read in place.
#[derive(Debug, Clone, Copy)]
pub struct Strings<'a> {
    bytes: &'a [u8],
    len: usize,
}

impl<'a> Strings<'a> {
    /// Returns the number of strings.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the array is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The strings in order, as bytes.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let (len, after) = rest.split_first_chunk::<8>()?;
            let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
            let text = after.get(..len)?;
            rest = after.get(len..)?;
            Some(text)
        })
    }
}

fn integer(kind: ValueType, bytes: &[u8]) -> Option<i128> {
    use ValueType::*;
    Some(match kind {
        U8 | Bool => i128::from(*bytes.first()?),
        I8 => i128::from(*bytes.first()? as i8),
        U16 => i128::from(u16::from_le_bytes(bytes.try_into().ok()?)),
        I16 => i128::from(i16::from_le_bytes(bytes.try_into().ok()?)),
        U32 => i128::from(u32::from_le_bytes(bytes.try_into().ok()?)),
        I32 => i128::from(i32::from_le_bytes(bytes.try_into().ok()?)),
        U64 => i128::from(u64::from_le_bytes(bytes.try_into().ok()?)),
        I64 => i128::from(i64::from_le_bytes(bytes.try_into().ok()?)),
        F32 | F64 | String | Array => return None,
    })
}

fn gguf_error(path: &Path, source: GgufError) -> Error {
    Error::Gguf { path: path.to_owned(), source }
}

/// `base-00001-of-00003.gguf` → its sibling with another index, in the same folder.
fn split_sibling(first: &Path, index: u64, count: u64) -> Option<PathBuf> {
    let suffix = format!("-00001-of-{count:05}.gguf");
    let name = first.file_name()?;
    #[cfg(unix)]
    let base = {
        use std::os::unix::ffi::OsStrExt;
        std::ffi::OsStr::from_bytes(name.as_bytes().strip_suffix(suffix.as_bytes())?)
    };
    #[cfg(not(unix))]
    let base = name.to_str()?.strip_suffix(&suffix)?;
    let mut sibling = std::ffi::OsString::from(base);
    sibling.push(format!("-{:05}-of-{count:05}.gguf", index + 1));
    Some(first.with_file_name(sibling))
}

/// Returns the bytes of a tensor of this format and shape, or `None` if its rows are not whole blocks.
pub fn tensor_bytes(format: Format, cols: u64, rows: u64) -> Option<u64> {
    let row = format.row_bytes(usize::try_from(cols).ok()?)?;
    (row as u64).checked_mul(rows)
}

//! The header parser, which checks untrusted bytes. This is the security boundary for model files.
//!
//! Every count is compared with the remaining bytes before an allocation, all arithmetic is checked, and
//! nothing is copied: strings and arrays are byte ranges of the file. Format: GGML's `docs/gguf.md`, versions
//! 2 and 3, little-endian.

use std::collections::HashSet;
use std::ops::Range;

use halite_kernels::formats::{Format, Layout, UnknownFormat};

/// Longest accepted key, in bytes (the format's own limit).
pub const MAX_KEY_BYTES: u64 = 65_535;
/// Longest accepted tensor name, in bytes (the format's own limit).
pub const MAX_NAME_BYTES: u64 = 64;
/// Maximum metadata entries.
pub const MAX_ENTRIES: u64 = 65_536;
/// Largest accepted `general.alignment`, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Smallest possible metadata entry: key length, one key byte, type, one value byte.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// Smallest possible tensor record: name length, one name byte, dimension count, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// An error in a GGUF file, with its byte offset in the file.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: expected magic 47 47 55 46, got {got:02x?}")]
    Magic {
        /// The first bytes.
        got: Vec<u8>,
    },
    /// The file is big-endian.
    #[error(
        "big-endian GGUF (version field {version:#010x}): only little-endian files are supported; convert it"
    )]
    BigEndian {
        /// The version as read in little-endian order.
        version: u32,
    },
    /// A version other than 2 or 3.
    #[error("GGUF version: expected 2 or 3, got {got}")]
    Version {
        /// The version in the file.
        got: u32,
    },
    /// The file ends too early.
    #[error("truncated at byte {at}: {what} needs {need} bytes, {have} remain")]
    Truncated {
        /// What was being read.
        what: String,
        /// Its offset.
        at: u64,
        /// Bytes needed.
        need: u64,
        /// Bytes available.
        have: u64,
    },
    /// A count or length above a limit, or more than the file can hold.
    #[error("byte {at}: {what}: expected at most {limit}, got {got}")]
    TooLarge {
        /// What is counted.
        what: String,
        /// The count's offset.
        at: u64,
        /// The largest acceptable value.
        limit: u64,
        /// The value in the file.
        got: u64,
    },
    /// A value that the format does not allow.
    #[error("byte {at}: {what}: expected {expected}, got {got}")]
    Invalid {
        /// The value's name.
        what: String,
        /// Its offset.
        at: u64,
        /// The expected value.
        expected: &'static str,
        /// The value in the file.
        got: String,
    },
    /// A duplicate metadata key.
    #[error("byte {at}: key `{key}` appears twice")]
    DuplicateKey {
        /// The key.
        key: String,
        /// Offset of the second entry.
        at: u64,
    },
    /// A duplicate tensor name.
    #[error("byte {at}: tensor `{name}` appears twice")]
    DuplicateTensor {
        /// The name.
        name: String,
        /// Offset of the second record.
        at: u64,
    },
    /// A tensor of an unsupported type.
    #[error("tensor `{name}`: {source}")]
    TensorType {
        /// The tensor.
        name: String,
        /// The type.
        source: UnknownFormat,
    },
    /// A tensor whose size does not fit in 64 bits, or whose rows are not whole blocks.
    #[error("tensor `{name}`: shape {dims:?} of {format}: {why}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Its dimensions, row length first.
        dims: Vec<u64>,
        /// Its type's name.
        format: &'static str,
        /// The problem.
        why: String,
    },
    /// A tensor's data lie outside the file.
    #[error("tensor `{name}`: data at bytes {start}..{end}, but the file has {file_bytes} bytes")]
    TensorRange {
        /// The tensor.
        name: String,
        /// Start of its data.
        start: u64,
        /// End of its data.
        end: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap at byte {at}")]
    Overlap {
        /// The tensor that starts first.
        first: String,
        /// The tensor that starts inside it.
        second: String,
        /// Start of the second tensor.
        at: u64,
    },
    /// A metadata value has another type than its reader expects.
    #[error("key `{key}`: expected {expected}, got {got}")]
    ValueType {
        /// The key.
        key: String,
        /// The expected type.
        expected: &'static str,
        /// The type in the file.
        got: String,
    },
    /// A required metadata key is absent.
    #[error("key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// The files of a split model do not match.
    #[error("split model: {0}")]
    Split(String),
}

/// The types that a metadata value can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    const BY_ID: [ValueType; 13] = {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64]
    };

    /// Bytes of one value; strings and arrays have no fixed size.
    pub fn bytes(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// One metadata value, as a range of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Its type; for an array the type of the elements.
    pub kind: ValueType,
    /// The number of elements if it is an array.
    pub array_len: Option<usize>,
    /// Its bytes: a string's text without the length, or an array's elements.
    pub bytes: Range<usize>,
}

/// Flag in a tensor's type id for interleaved rows ([`Layout::Interleaved`]). It is Halite's own: other
/// readers reject the unknown type, and so never misread the rows.
pub const INTERLEAVED: u32 = 1 << 16;

/// One tensor of the file's directory.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TensorRecord {
    /// Its name.
    pub name: String,
    /// Its dimensions, row length first, one to four.
    pub dims: Vec<u64>,
    /// How its elements are stored.
    pub format: Format,
    /// How the rows of each matrix lie.
    pub layout: Layout,
    /// The range of its data in the file.
    pub bytes: Range<usize>,
}

/// A checked GGUF header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Alignment of tensor data, in bytes.
    pub alignment: u64,
    /// Metadata in file order.
    pub metadata: Vec<(String, Value)>,
    /// Tensors in file order.
    pub tensors: Vec<TensorRecord>,
    /// Names of tensors without elements (a dimension is zero); `tensors` does not include them.
    pub empty: Vec<String>,
    /// Offset of tensor data in the file.
    pub data_start: usize,
}

/// Parses and checks the header of a whole GGUF file.
///
/// # Errors
/// A [`GgufError`] for the first violation of the format; never a panic, whatever the bytes.
pub fn parse(file: &[u8]) -> Result<Header, GgufError> {
    parse_header(file, file.len() as u64)
}

/// As [`parse`], from the first bytes of a file of `file_bytes`, which include the header.
///
/// # Errors
/// As [`parse`].
pub fn parse_header(file: &[u8], file_bytes: u64) -> Result<Header, GgufError> {
    let mut r = Reader { file, at: 0 };
    if file.get(..4) != Some(b"GGUF") {
        return Err(GgufError::Magic { got: file.iter().take(4).copied().collect() });
    }
    r.at = 4;
    let version = r.u32("version")?;
    if version != 0 && version & 0xffff == 0 {
        return Err(GgufError::BigEndian { version });
    }
    if version != 2 && version != 3 {
        return Err(GgufError::Version { got: version });
    }
    let tensor_count = r.u64("tensor count")?;
    let entry_count = r.u64("metadata count")?;
    r.check_count("metadata count", 16, entry_count, MIN_ENTRY_BYTES, MAX_ENTRIES)?;
    r.check_count("tensor count", 8, tensor_count, MIN_TENSOR_BYTES, u64::MAX)?;

    let mut metadata = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..entry_count {
        let at = r.at as u64;
        let key = r.name("key", MAX_KEY_BYTES)?;
        let value = r.value(key)?;
        if !seen.insert(key) {
            return Err(GgufError::DuplicateKey { key: key.into(), at });
        }
        metadata.push((key.to_owned(), value));
    }
    let alignment = alignment(file, &metadata)?;

    let (mut records, mut empty) = (Vec::new(), Vec::new());
    seen.clear();
    for _ in 0..tensor_count {
        let at = r.at as u64;
        let record = r.tensor()?;
        if !seen.insert(record.name) {
            return Err(GgufError::DuplicateTensor { name: record.name.into(), at });
        }
        match record.dims.contains(&0) {
            true => empty.push(record.name.to_owned()),
            false => records.push(record),
        }
    }
    let data_start = (r.at as u64).next_multiple_of(alignment);
    if !records.is_empty() && data_start > file_bytes {
        return Err(GgufError::Truncated {
            what: "padding before tensor data".into(),
            at: r.at as u64,
            need: data_start - r.at as u64,
            have: file_bytes.saturating_sub(r.at as u64),
        });
    }
    let tensors = records
        .into_iter()
        .map(|record| record.place(data_start, alignment, file_bytes))
        .collect::<Result<Vec<_>, _>>()?;
    check_overlap(&tensors)?;
    let data_start = data_start.min(file_bytes) as usize;
    Ok(Header { version, alignment, metadata, tensors, empty, data_start })
}

fn alignment(file: &[u8], metadata: &[(String, Value)]) -> Result<u64, GgufError> {
    let Some((key, value)) = metadata.iter().find(|(key, _)| key == "general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    if value.kind != ValueType::U32 || value.array_len.is_some() {
        return Err(GgufError::ValueType { key: key.clone(), expected: "u32", got: value.describe() });
    }
    let at = value.bytes.start;
    let got = u64::from(Reader { file, at }.u32("general.alignment")?);
    if !got.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&got) {
        return Err(GgufError::Invalid {
            what: "general.alignment".into(),
            at: at as u64,
            expected: "a power of two from 8 to 1048576",
            got: got.to_string(),
        });
    }
    Ok(got)
}

fn check_overlap(tensors: &[TensorRecord]) -> Result<(), GgufError> {
    let mut by_start: Vec<&TensorRecord> = tensors.iter().collect();
    by_start.sort_by_key(|t| t.bytes.start);
    for pair in by_start.windows(2) {
        if let [first, second] = pair
            && first.bytes.end > second.bytes.start
        {
            return Err(GgufError::Overlap {
                first: first.name.clone(),
                second: second.name.clone(),
                at: second.bytes.start as u64,
            });
        }
    }
    Ok(())
}

/// Quotes the start of a text from a file for messages: escaped, and at most a line.
pub(crate) fn printable(text: &[u8]) -> String {
    const SHOWN: usize = 64;
    let start = text.get(..SHOWN).unwrap_or(text);
    let mut out = String::from("\"");
    for chunk in start.utf8_chunks() {
        out.extend(chunk.valid().escape_debug());
        out.extend(chunk.invalid().escape_ascii().map(char::from));
    }
    out.push_str(if start.len() < text.len() { "\"…" } else { "\"" });
    out
}

impl Value {
    /// The type in words, for messages: `u32`, `array of string`.
    pub fn describe(&self) -> String {
        let kind = format!("{:?}", self.kind).to_lowercase();
        if self.array_len.is_some() { format!("array of {kind}") } else { kind }
    }
}

/// A tensor record before its data are located in the file.
struct Unplaced<'a> {
    name: &'a str,
    dims: Vec<u64>,
    format: Format,
    layout: Layout,
    offset: u64,
    at: u64,
}

impl Unplaced<'_> {
    fn place(self, data_start: u64, alignment: u64, file_bytes: u64) -> Result<TensorRecord, GgufError> {
        let shape_error = |why: String| GgufError::TensorShape {
            name: self.name.into(),
            dims: self.dims.clone(),
            format: self.format.name(),
            why,
        };
        let row_len = self.dims.first().copied().unwrap_or(0);
        if row_len % self.format.block_len() as u64 != 0 {
            let block = self.format.block_len();
            return Err(shape_error(format!("row length must be a multiple of the block length {block}")));
        }
        let elements = self
            .dims
            .iter()
            .try_fold(1u64, |n, &dim| n.checked_mul(dim))
            .filter(|&n| i64::try_from(n).is_ok())
            .ok_or_else(|| shape_error("more than 2^63 elements".into()))?;
        let bytes = (elements / self.format.block_len() as u64)
            .checked_mul(self.format.block_bytes() as u64)
            .ok_or_else(|| shape_error("more than 2^64 bytes".into()))?;
        if !self.offset.is_multiple_of(alignment) {
            return Err(GgufError::Invalid {
                what: format!("offset of tensor `{}`", self.name),
                at: self.at,
                expected: "a multiple of the alignment",
                got: format!("{} (alignment {alignment})", self.offset),
            });
        }
        let start = data_start.checked_add(self.offset);
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => Ok(TensorRecord {
                name: self.name.to_owned(),
                dims: self.dims,
                format: self.format,
                layout: self.layout,
                bytes: start as usize..end as usize,
            }),
            _ => Err(GgufError::TensorRange {
                name: self.name.into(),
                start: start.unwrap_or(u64::MAX),
                end: end.unwrap_or(u64::MAX),
                file_bytes,
            }),
        }
    }
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn remaining(&self) -> u64 {
        self.file.len().saturating_sub(self.at) as u64
    }

    fn take(&mut self, what: &str, need: u64) -> Result<&'a [u8], GgufError> {
        if need > self.remaining() {
            return Err(GgufError::Truncated {
                what: what.into(),
                at: self.at as u64,
                need,
                have: self.remaining(),
            });
        }
        let end = self.at + need as usize;
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(what, N as u64)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Rejects a count above `max_count`, or whose smallest possible content is longer than the rest of the
    /// file.
    fn check_count(
        &self,
        what: &str,
        at: u64,
        count: u64,
        each_bytes: u64,
        max_count: u64,
    ) -> Result<(), GgufError> {
        let limit = max_count.min(self.remaining() / each_bytes.max(1));
        if count > limit {
            return Err(GgufError::TooLarge { what: what.into(), at, limit, got: count });
        }
        Ok(())
    }

    /// Reads a length-prefixed string, as a range of the file.
    fn string(&mut self, what: &str) -> Result<Range<usize>, GgufError> {
        let len = self.u64(what)?;
        self.take(what, len)?;
        Ok(self.at - len as usize..self.at)
    }

    /// A non-empty UTF-8 name of limited length, without control characters.
    fn name(&mut self, what: &str, limit: u64) -> Result<&'a str, GgufError> {
        let at = self.at as u64;
        let len = self.u64(what)?;
        if len > limit {
            return Err(GgufError::TooLarge { what: format!("length of {what}"), at, limit, got: len });
        }
        let bytes = self.take(what, len)?;
        let invalid = |expected, got| GgufError::Invalid { what: what.into(), at, expected, got };
        match std::str::from_utf8(bytes) {
            Ok("") => Err(invalid("at least one byte", "an empty string".into())),
            // Names appear in messages, so they must not have control characters.
            Ok(name) if name.contains(char::is_control) => {
                Err(invalid("text without control characters", printable(bytes)))
            }
            Ok(name) => Ok(name),
            Err(_) => Err(invalid("UTF-8", printable(bytes))),
        }
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, GgufError> {
        let at = self.at as u64;
        let id = self.u32("value type")?;
        ValueType::BY_ID.get(id as usize).copied().ok_or_else(|| GgufError::Invalid {
            what: format!("value type of key `{key}`"),
            at,
            expected: "0 to 12",
            got: id.to_string(),
        })
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let kind = self.value_type(key)?;
        if kind != ValueType::Array {
            let bytes = self.values(key, kind, 1)?;
            let bytes = if kind == ValueType::String { bytes.start + 8..bytes.end } else { bytes };
            return Ok(Value { kind, array_len: None, bytes });
        }
        let at = self.at as u64;
        let kind = self.value_type(key)?;
        if kind == ValueType::Array {
            return Err(GgufError::Invalid {
                what: format!("element type of key `{key}`"),
                at,
                expected: "a scalar or a string (arrays do not nest)",
                got: "array".into(),
            });
        }
        let at = self.at as u64;
        let len = self.u64("array length")?;
        let what = format!("array length of key `{key}`");
        self.check_count(&what, at, len, kind.bytes().unwrap_or(8) as u64, u64::MAX)?;
        let bytes = self.values(key, kind, len)?;
        Ok(Value { kind, array_len: Some(len as usize), bytes })
    }

    /// Skips `len` consecutive values, and returns their bytes.
    fn values(&mut self, key: &str, kind: ValueType, len: u64) -> Result<Range<usize>, GgufError> {
        let what = format!("value of key `{key}`");
        let start = self.at;
        match kind.bytes() {
            Some(bytes) => {
                let bytes = self.take(&what, len.saturating_mul(bytes as u64))?;
                if kind == ValueType::Bool
                    && let Some(i) = bytes.iter().position(|&b| b > 1)
                {
                    return Err(GgufError::Invalid {
                        what,
                        at: (start + i) as u64,
                        expected: "a bool of 0 or 1",
                        got: bytes[i].to_string(),
                    });
                }
            }
            None => {
                for _ in 0..len {
                    self.string(&what)?;
                }
            }
        }
        Ok(start..self.at)
    }

    fn tensor(&mut self) -> Result<Unplaced<'a>, GgufError> {
        let name = self.name("tensor name", MAX_NAME_BYTES)?;
        let at = self.at as u64;
        let n_dims = self.u32("dimension count")?;
        if !(1..=4).contains(&n_dims) {
            return Err(GgufError::Invalid {
                what: format!("dimension count of tensor `{name}`"),
                at,
                expected: "1 to 4",
                got: n_dims.to_string(),
            });
        }
        let mut dims = Vec::with_capacity(4);
        for _ in 0..n_dims {
            dims.push(self.u64("dimension")?);
        }
        let id = self.u32("tensor type")?;
        let (layout, plain_id) = match id & INTERLEAVED {
            0 => (Layout::Rows, id),
            _ => (Layout::Interleaved, id & !INTERLEAVED),
        };
        let unknown = |source| GgufError::TensorType { name: name.into(), source };
        let format = Format::from_id(plain_id).map_err(|_| unknown(UnknownFormat::new(id)))?;
        if layout == Layout::Interleaved && !format.interleaves() {
            return Err(unknown(UnknownFormat::new(id)));
        }
        let at = self.at as u64;
        let offset = self.u64("tensor offset")?;
        Ok(Unplaced { name, dims, format, layout, offset, at })
    }
}

//! Writes GGUF files, version 3, little-endian: the header from memory, tensor data as a stream.

use std::collections::HashSet;
use std::io::{self, Write};

use halite_kernels::formats::{Format, Layout};

use super::parse::{
    INTERLEAVED, MAX_ALIGNMENT, MAX_ENTRIES, MAX_KEY_BYTES, MAX_NAME_BYTES, Value, ValueType,
};
use super::tensor_bytes;
use crate::error::{Error, Result};

/// An encoded metadata value: its type id and bytes. Made with `From`.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded(Vec<u8>);

impl Encoded {
    fn scalar(kind: ValueType, bytes: &[u8]) -> Encoded {
        Encoded([&(kind as u32).to_le_bytes()[..], bytes].concat())
    }

    fn array(kind: ValueType, len: usize, bytes: impl Iterator<Item = u8>) -> Encoded {
        let mut out = Encoded::scalar(ValueType::Array, &(kind as u32).to_le_bytes());
        out.0.extend((len as u64).to_le_bytes());
        out.0.extend(bytes);
        out
    }
}

impl Encoded {
    /// Copies a value from `file`, the bytes that it was parsed from.
    pub fn copy(value: &Value, file: &[u8]) -> Encoded {
        let bytes = file.get(value.bytes.clone()).unwrap_or(&[]);
        match value.array_len {
            Some(len) => Encoded::array(value.kind, len, bytes.iter().copied()),
            None if value.kind == ValueType::String => {
                let len = (bytes.len() as u64).to_le_bytes();
                Encoded::scalar(value.kind, &[&len[..], bytes].concat())
            }
            None => Encoded::scalar(value.kind, bytes),
        }
    }
}

macro_rules! encoded {
    ($($number:ty => $kind:ident),*) => {$(
        impl From<$number> for Encoded {
            fn from(v: $number) -> Encoded {
                Encoded::scalar(ValueType::$kind, &v.to_le_bytes())
            }
        }

        impl From<&[$number]> for Encoded {
            fn from(values: &[$number]) -> Encoded {
                Encoded::array(ValueType::$kind, values.len(), values.iter().flat_map(|v| v.to_le_bytes()))
            }
        }
    )*};
}

encoded!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, u64 => U64, i64 => I64, f64 => F64);

impl From<bool> for Encoded {
    fn from(v: bool) -> Encoded {
        Encoded::scalar(ValueType::Bool, &[v.into()])
    }
}

impl From<&[bool]> for Encoded {
    fn from(values: &[bool]) -> Encoded {
        Encoded::array(ValueType::Bool, values.len(), values.iter().map(|&v| v.into()))
    }
}

impl From<&str> for Encoded {
    fn from(v: &str) -> Encoded {
        Encoded::scalar(ValueType::String, &string(v))
    }
}

impl From<&[String]> for Encoded {
    fn from(values: &[String]) -> Encoded {
        Encoded::array(ValueType::String, values.len(), values.iter().flat_map(|v| string(v)))
    }
}

/// A text after its length.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Its dimensions, row length first, one to four.
    pub dims: Vec<u64>,
    /// How its elements are stored.
    pub format: Format,
    /// How the rows of each matrix lie.
    pub layout: Layout,
    /// Bytes of its data.
    pub bytes: u64,
    /// Offset of its data, from the start of all data.
    offset: u64,
}

/// A file to write: metadata and a directory of tensors. [`Writer::write`] requests their data.
///
/// [`super::parse()`] reads everything that a `Writer` accepts.
#[derive(Debug, Clone)]
pub struct Writer {
    alignment: u64,
    entries: Vec<u8>,
    tensors: Vec<NewTensor>,
    keys: HashSet<String>,
    names: HashSet<String>,
    end: u64,
}

impl Writer {
    /// Creates an empty file whose tensor data are aligned to `alignment` bytes, a power of two from 8;
    /// usually 32.
    ///
    /// # Errors
    /// [`Error::Argument`] for another alignment.
    pub fn new(alignment: u32) -> Result<Writer> {
        if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment.into()) {
            let expected = format!("a power of two from 8 to {MAX_ALIGNMENT}");
            return Err(Error::argument("GGUF alignment", expected, alignment));
        }
        let mut writer = Writer {
            alignment: alignment.into(),
            entries: Vec::new(),
            tensors: Vec::new(),
            keys: HashSet::new(),
            names: HashSet::new(),
            end: 0,
        };
        writer.entry("general.alignment", alignment)?;
        Ok(writer)
    }

    /// Adds a metadata entry.
    ///
    /// # Errors
    /// [`Error::Argument`] for an invalid or duplicate key, or too many entries.
    pub fn entry(&mut self, key: &str, value: impl Into<Encoded>) -> Result<()> {
        if self.keys.len() as u64 >= MAX_ENTRIES {
            return Err(Error::argument(
                "GGUF metadata",
                format!("at most {MAX_ENTRIES} entries"),
                "one more entry",
            ));
        }
        claim(&mut self.keys, "GGUF metadata key", key, MAX_KEY_BYTES)?;
        self.entries.extend(string(key));
        self.entries.extend(value.into().0);
        Ok(())
    }

    /// Adds a tensor of one to four dimensions, row length first.
    ///
    /// # Errors
    /// [`Error::Argument`] for an invalid or duplicate name, rows that are not whole blocks, or a size that
    /// does not fit in 63 bits.
    pub fn tensor(&mut self, name: &str, dims: &[u64], format: Format) -> Result<()> {
        self.tensor_in(Layout::Rows, name, dims, format)
    }

    /// As [`Writer::tensor`], with a row layout.
    ///
    /// # Errors
    /// As [`Writer::tensor`], and for a format that cannot be interleaved.
    pub fn tensor_in(&mut self, layout: Layout, name: &str, dims: &[u64], format: Format) -> Result<()> {
        if layout == Layout::Interleaved && !format.interleaves() {
            return Err(Error::argument(
                "interleaved GGUF tensor",
                "a format that interleaves",
                format.name(),
            ));
        }
        claim(&mut self.names, "GGUF tensor name", name, MAX_NAME_BYTES)?;
        let rows = dims.iter().skip(1).try_fold(1u64, |n, &dim| n.checked_mul(dim));
        let bytes = match (dims, rows) {
            ([cols, ..], Some(rows)) if dims.len() <= 4 && !dims.contains(&0) => {
                let elements = cols.checked_mul(rows).filter(|&n| i64::try_from(n).is_ok());
                elements.and(tensor_bytes(format, *cols, rows))
            }
            _ => None,
        };
        let end =
            bytes.and_then(|bytes| self.end.checked_add(bytes)?.checked_next_multiple_of(self.alignment));
        let (Some(bytes), Some(end)) = (bytes, end.filter(|&end| i64::try_from(end).is_ok())) else {
            let expected = format!(
                "1 to 4 dimensions, a row length that is a multiple of {} and less than 2^63 bytes",
                format.block_len()
            );
            let got = format!("`{name}` {dims:?} of {}", format.name());
            return Err(Error::argument("GGUF tensor", expected, got));
        };
        let offset = std::mem::replace(&mut self.end, end);
        self.tensors.push(NewTensor { name: name.into(), dims: dims.into(), format, layout, bytes, offset });
        Ok(())
    }

    /// The tensors, in the order of their data.
    pub fn tensors(&self) -> &[NewTensor] {
        &self.tensors
    }

    /// The file up to the data of its tensors.
    pub fn header(&self) -> Vec<u8> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.keys.len() as u64).to_le_bytes());
        header.extend(&self.entries);
        for tensor in &self.tensors {
            header.extend(string(&tensor.name));
            header.extend((tensor.dims.len() as u32).to_le_bytes());
            header.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            let layout = if tensor.layout == Layout::Interleaved { INTERLEAVED } else { 0 };
            header.extend((tensor.format.id() | layout).to_le_bytes());
            header.extend(tensor.offset.to_le_bytes());
        }
        header.resize(header.len().next_multiple_of(self.alignment as usize), 0);
        header
    }

    /// Bytes of the data of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.end
    }

    /// Writes the file. Calls `data` for each tensor in order, to write exactly its bytes.
    ///
    /// # Errors
    /// Errors of `out` and `data`, and an error of kind `InvalidData` if `data` wrote more or fewer bytes.
    pub fn write(
        &self,
        out: &mut dyn Write,
        data: &mut dyn FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        out.write_all(&self.header())?;
        for tensor in &self.tensors {
            let mut counted = Counted { out, written: 0 };
            data(tensor, &mut counted)?;
            let written = counted.written;
            if written != tensor.bytes {
                let (name, bytes) = (&tensor.name, tensor.bytes);
                let message = format!("data of tensor `{name}`: expected {bytes} bytes, got {written}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            self.pad(written, out)?;
        }
        out.flush()
    }

    /// Writes zeros after `len` bytes up to the next aligned offset.
    fn pad(&self, len: u64, out: &mut dyn Write) -> io::Result<()> {
        let zeros = len.wrapping_neg() % self.alignment;
        io::copy(&mut io::Read::take(io::repeat(0), zeros), out).map(|_| ())
    }
}

/// Checks a name, which must be unique.
fn claim(names: &mut HashSet<String>, what: &'static str, name: &str, most_bytes: u64) -> Result<()> {
    if name.is_empty() || name.len() as u64 > most_bytes || name.contains(char::is_control) {
        let expected = format!("1 to {most_bytes} bytes without control characters");
        return Err(Error::argument(what, expected, format!("{name:?}")));
    }
    if !names.insert(name.to_owned()) {
        return Err(Error::argument(what, "each once", format!("`{name}` twice")));
    }
    Ok(())
}

/// Counts what goes through.
struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

//! Packed files: models with interleaved rows, which kernels read in place.
//!
//! A packed file is a GGUF file with the same metadata and tensors. Every matrix of a format that has kernels
//! on interleaved rows ([`Format::interleaves`](halite_kernels::formats::Format::interleaves)) is stored as
//! [`Layout::Interleaved`]: the same bytes in another order, for all instruction sets. The file is mapped
//! like any other, and gives the same bits.

use std::io::{self, Write};

use halite_kernels::formats::Layout;

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::gguf::write::Writer;

/// Alignment of tensor data: a cache line.
const ALIGNMENT: u32 = 64;

/// Metadata about splits and alignment, which a packed file does not copy.
const OWN: &[&str] = &["general.alignment", "split.no", "split.count", "split.tensors.count"];

/// Writes `gguf`, split or not, as one packed file. Calls `progress` with the bytes of each written tensor.
///
/// # Errors
/// [`Error::Model`] for a file that is not a model; [`Error::FileChanged`] if the file shrank; errors of `out`, as [`Error::Io`] without a path.
pub fn pack(gguf: &Gguf, out: &mut dyn Write, progress: &mut dyn FnMut(u64)) -> Result<()> {
    gguf.architecture()?;
    let mut writer = Writer::new(ALIGNMENT)?;
    for (key, value) in gguf.encoded_metadata() {
        if !OWN.contains(&key) {
            writer.entry(key, value)?;
        }
    }
    for tensor in gguf.tensors() {
        let r = tensor.record;
        let layout =
            if r.format.interleaves() && r.dims.len() > 1 { Layout::Interleaved } else { Layout::Rows };
        writer.tensor_in(layout, &r.name, &r.dims, r.format)?;
    }
    let mut failure = None;
    let written = writer.write(out, &mut |new, out| {
        let tensor = gguf.tensor(&new.name).ok_or(io::ErrorKind::NotFound)?;
        let bytes = match new.layout {
            Layout::Interleaved => tensor.interleaved(),
            Layout::Rows => tensor.rows(),
        };
        progress(new.bytes);
        match bytes {
            Ok(bytes) => out.write_all(&bytes),
            Err(error) => {
                failure = Some(error);
                Err(io::ErrorKind::InvalidData.into())
            }
        }
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, written) => written.map_err(|source| Error::Io { path: Default::default(), source }),
    }
}

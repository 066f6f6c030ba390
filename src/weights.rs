//! From a model file to a backend's buffers, in the order of the program: imported where the device can read mapped pages,
//! copied where it cannot.

use std::borrow::Cow;
use std::ops::Range;

use crate::backend::{Backend, Buffer, Usage, upload};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::program::{Dim, Layout, Program, Tensor, TensorId, part_as_stored};

/// A program's weights on a backend.
#[derive(Debug)]
pub struct Weights {
    /// One for each of `Program::weights`.
    pub buffers: Vec<Buffer>,
    /// Bytes that the device reads from the mapped file.
    pub mapped_bytes: u64,
    /// Bytes that were copied to the device.
    pub copied_bytes: u64,
}

impl Weights {
    /// Loads every weight of `program`. `progress` is told the bytes done so far.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if copies do not fit the device, [`Error::FileChanged`] if the file shrank, what the backend
    /// says.
    pub fn load(
        gguf: &Gguf,
        program: &Program,
        backend: &dyn Backend,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Weights> {
        gguf.verify()?;
        let mut weights = Weights { buffers: Vec::new(), mapped_bytes: 0, copied_bytes: 0 };
        for &id in &program.weights {
            let weight = program.tensor(id);
            let name = weight.part.as_ref().map_or(&weight.name, |part| &part.of);
            let missing = || Error::Model(format!("tensor `{name}` is missing from the file"));
            let tensor = gguf.tensor(name).ok_or_else(missing)?;
            let range = bytes_in_file(program, id);
            let as_stored = tensor.record.layout == weight.layout && lies_together(&tensor, program, id);
            let region = tensor.region()?;
            let region = region.part(range.clone()).filter(|_| as_stored);
            let bytes = range.len() as u64;
            let imported = match &region {
                Some(region) => backend.import(region)?,
                None => None,
            };
            let buffer = match imported {
                Some(buffer) => {
                    weights.mapped_bytes += bytes;
                    buffer
                }
                None => {
                    let have_bytes = backend.caps().memory_bytes.saturating_sub(weights.copied_bytes);
                    if bytes > have_bytes {
                        let what = format!("weight `{}` on `{}`", weight.name, backend.caps().name);
                        return Err(Error::OutOfMemory { what, need_bytes: bytes, have_bytes });
                    }
                    let buffer = backend.alloc(bytes, Usage::Weight)?;
                    match region {
                        Some(region) => upload(backend, &buffer, 0, region.bytes())?,
                        None => upload(backend, &buffer, 0, &laid_out(&tensor, weight, range)?)?,
                    }
                    weights.copied_bytes += bytes;
                    buffer
                }
            };
            weights.buffers.push(buffer);
            progress(weights.mapped_bytes + weights.copied_bytes);
        }
        Ok(weights)
    }
}

/// Where a weight's bytes are in the file's tensor.
fn bytes_in_file(program: &Program, id: TensorId) -> Range<usize> {
    let weight = program.tensor(id);
    let blocks =
        weight.part.as_ref().map_or(0, |part| part.first_element as usize) / weight.format.block_len();
    let start = blocks * weight.format.block_bytes();
    start..start.saturating_add(program.fixed_bytes(id).unwrap_or(0) as usize)
}

/// Whether a weight's rows are a range of the file's bytes.
fn lies_together(tensor: &TensorInfo<'_>, program: &Program, id: TensorId) -> bool {
    let weight = program.tensor(id);
    let (Some(part), Dim::Fixed(rows)) = (&weight.part, weight.rows) else { return true };
    let first = (part.first_element / u64::from(weight.cols.max(1))) as u32;
    let all = tensor.record.dims.get(1).copied().unwrap_or(1) as u32;
    part_as_stored(tensor.record.layout, first..first.saturating_add(rows), all)
}

/// A weight's bytes in the order of its layout, which the file's is not.
fn laid_out(tensor: &TensorInfo<'_>, weight: &Tensor, range: Range<usize>) -> Result<Vec<u8>> {
    let region = tensor.region()?;
    let rows = match tensor.record.layout {
        Layout::Rows => Cow::Borrowed(region.bytes()),
        Layout::Interleaved => Cow::Owned(tensor.rows()?),
    };
    let outside = || Error::Model(format!("weight `{}` is not inside its tensor", weight.name));
    let rows = rows.get(range).ok_or_else(outside)?;
    match weight.layout {
        Layout::Rows => Ok(rows.to_vec()),
        Layout::Interleaved => {
            let mut out = Vec::with_capacity(rows.len());
            for matrix in rows.chunks_exact((rows.len() / weight.experts.max(1) as usize).max(1)) {
                let mut lanes = vec![0; matrix.len()];
                let wrong = |e| Error::Model(format!("weight `{}`: {e}", weight.name));
                weight.format.interleave(weight.cols as usize, matrix, &mut lanes).map_err(wrong)?;
                out.extend(lanes);
            }
            Ok(out)
        }
    }
}

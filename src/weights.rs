//! From a model file to a backend's buffers, in the order of the program: imported where the device can read mapped pages,
//! copied where it cannot.

use crate::backend::{Backend, Buffer, Usage, upload};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::program::{Layout, Program};

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
            let name = &program.tensor(id).name;
            let missing = || Error::Model(format!("tensor `{name}` is missing from the file"));
            let tensor = gguf.tensor(name).ok_or_else(missing)?;
            let region = tensor.region()?;
            let bytes = region.bytes().len() as u64;
            let as_stored = tensor.record.layout == program.tensor(id).layout;
            let imported = if as_stored { backend.import(&region)? } else { None };
            let buffer = match imported {
                Some(buffer) => {
                    weights.mapped_bytes += bytes;
                    buffer
                }
                None => {
                    let have_bytes = backend.caps().memory_bytes.saturating_sub(weights.copied_bytes);
                    if bytes > have_bytes {
                        let what = format!("weight `{name}` on `{}`", backend.caps().name);
                        return Err(Error::OutOfMemory { what, need_bytes: bytes, have_bytes });
                    }
                    let buffer = backend.alloc(bytes, Usage::Weight)?;
                    match program.tensor(id).layout {
                        _ if as_stored => upload(backend, &buffer, 0, region.bytes())?,
                        Layout::Rows => upload(backend, &buffer, 0, &tensor.rows()?)?,
                        Layout::Interleaved => upload(backend, &buffer, 0, &tensor.interleaved()?)?,
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

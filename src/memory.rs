//! Memory whose size comes from a file, an option or a model: where there is not enough, that is an error, not the end of the
//! process.

use crate::error::{Error, Result};

fn none_left<T>(len: u64, what: &str) -> Error {
    let need_bytes = len.saturating_mul(size_of::<T>() as u64);
    Error::OutOfMemory { what: what.into(), need_bytes, have_bytes: 0 }
}

/// Zeros from the operating system, which costs nothing until they are touched.
pub(crate) fn zeroed<T: bytemuck::Zeroable>(len: u64, what: &str) -> Result<Vec<T>> {
    let memory =
        usize::try_from(len).ok().and_then(|len| bytemuck::allocation::try_zeroed_slice_box(len).ok());
    memory.map(Vec::from).ok_or_else(|| none_left::<T>(len, what))
}

/// An empty vector with room for so many elements.
pub(crate) fn reserved<T>(len: u64, what: &str) -> Result<Vec<T>> {
    let mut memory = Vec::new();
    let done = usize::try_from(len).ok().and_then(|len| memory.try_reserve_exact(len).ok());
    done.map(|()| memory).ok_or_else(|| none_left::<T>(len, what))
}

//! Memory whose size comes from a file, an option or a model: where there is not enough, that is an error, not the end of the
//! process.

use crate::error::{Error, Result};

/// What is said where there is no memory for so many elements.
pub(crate) fn none_left<T>(len: u64, what: &str) -> Error {
    let need_bytes = len.saturating_mul(size_of::<T>() as u64);
    Error::OutOfMemory { what: what.into(), need_bytes, have_bytes: 0 }
}

/// Zeros from the operating system, which costs nothing until they are touched.
pub(crate) fn zeroed<T: bytemuck::Zeroable>(len: u64, what: &str) -> Result<Vec<T>> {
    let memory =
        usize::try_from(len).ok().and_then(|len| bytemuck::allocation::try_zeroed_slice_box(len).ok());
    memory.map(Vec::from).ok_or_else(|| none_left::<T>(len, what))
}

/// Room for elements of a vector up to a length.
pub(crate) fn grow<T>(memory: &mut Vec<T>, len: u64, what: &str) -> Result<()> {
    let more = usize::try_from(len).ok().map(|len| len.saturating_sub(memory.len()));
    let done = more.and_then(|more| memory.try_reserve_exact(more).ok());
    done.ok_or_else(|| none_left::<T>(len, what))
}

/// An empty vector with room for so many elements.
pub(crate) fn reserved<T>(len: u64, what: &str) -> Result<Vec<T>> {
    let mut memory = Vec::new();
    grow(&mut memory, len, what)?;
    Ok(memory)
}

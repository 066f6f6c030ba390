//! Fallible allocation, for memory whose size comes from a file, an option or a model: too little memory is
//! an error, not an abort.

use crate::error::{Error, Result};

/// Returns the memory of the process that is in use: its own pages and those of mapped files. 0 where the system
/// does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let read = |file, line: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix(line))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    read("/proc/self/status", "VmRSS:").map_or(0, |kib| kib.saturating_mul(1024))
}

/// Error message for a failed allocation.
pub(crate) fn none_left<T>(len: u64, what: &str) -> Error {
    let need_bytes = len.saturating_mul(size_of::<T>() as u64);
    Error::OutOfMemory { what: what.into(), need_bytes, have_bytes: 0 }
}

/// Allocates zeros from the operating system, which cost nothing until they are touched.
pub(crate) fn zeroed<T: bytemuck::Zeroable>(len: u64, what: &str) -> Result<Vec<T>> {
    let memory =
        usize::try_from(len).ok().and_then(|len| bytemuck::allocation::try_zeroed_slice_box(len).ok());
    memory.map(Vec::from).ok_or_else(|| none_left::<T>(len, what))
}

/// Reserves room in a vector for `len` elements in total.
pub(crate) fn grow<T>(memory: &mut Vec<T>, len: u64, what: &str) -> Result<()> {
    let more = usize::try_from(len).ok().map(|len| len.saturating_sub(memory.len()));
    let done = more.and_then(|more| memory.try_reserve_exact(more).ok());
    done.ok_or_else(|| none_left::<T>(len, what))
}

/// Creates an empty vector with room for `len` elements.
pub(crate) fn reserved<T>(len: u64, what: &str) -> Result<Vec<T>> {
    let mut memory = Vec::new();
    grow(&mut memory, len, what)?;
    Ok(memory)
}

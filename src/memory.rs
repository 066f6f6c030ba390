//! Fallible allocation, for memory whose size comes from a file, an option or a model: too little memory is
//! an error, not an abort.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use crate::error::{Error, Result};

/// Returns the memory of the process that is in use: its own pages and those of mapped files. 0 where the system
/// does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib.saturating_mul(1024))
}

/// Memory that a host backend uses until it drops it. It must not move or change its length.
pub type Words = Box<dyn DerefMut<Target = [u64]> + Send + Sync>;

/// Where a host backend takes its memory from.
pub trait Allocator: Send + Sync {
    /// Returns so many zeros, or `None` if there is no memory for them.
    fn zeroed(&self, words: usize) -> Option<Words>;
}

/// The allocator of the process.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Allocator for System {
    fn zeroed(&self, words: usize) -> Option<Words> {
        zeroed::<u64>(words as u64, "").ok().map(|words| Box::new(words) as Words)
    }
}

/// Elements in memory of an allocator.
pub(crate) struct Zeroed<T> {
    words: Words,
    len: usize,
    of: PhantomData<T>,
}

impl<T: bytemuck::Pod> Zeroed<T> {
    /// Allocates `len` zeros.
    pub fn new(from: &dyn Allocator, len: u64, what: &str) -> Result<Zeroed<T>> {
        let missing = || none_left::<T>(len, what);
        let bytes = len.checked_mul(size_of::<T>() as u64).ok_or_else(missing)?;
        let count = usize::try_from(bytes.div_ceil(8)).map_err(|_| missing())?;
        let words = from.zeroed(count).filter(|words| words.len() >= count).ok_or_else(missing)?;
        Ok(Zeroed { words, len: len as usize, of: PhantomData })
    }
}

impl<T: bytemuck::Pod> Deref for Zeroed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.words).get(..self.len).unwrap_or(&[])
    }
}

impl<T: bytemuck::Pod> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.words).get_mut(..self.len).unwrap_or(&mut [])
    }
}

impl<T> std::fmt::Debug for Zeroed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Zeroed").field("len", &self.len).finish_non_exhaustive()
    }
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

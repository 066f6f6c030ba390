//! The chip's memory. The host has no pointer into it: it copies bytes to and from addresses.
//!
//! Here a vector stands in for the device. A driver for hardware keeps this interface and calls its DMA engine.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use halite::{Error, Result};

use crate::{CAPACITY_BYTES, NAME, error};

/// Allocations start at multiples of this.
const ALIGNMENT: usize = 64;

/// All memory of a device.
#[derive(Debug, Default)]
pub struct Memory(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Up to the highest address that was ever taken.
    bytes: Vec<u8>,
    /// The length of each allocation, by address.
    taken: BTreeMap<usize, usize>,
}

/// A part of the memory, which is free again when this is dropped.
#[derive(Debug)]
pub struct Allocation {
    memory: Arc<Memory>,
    address: usize,
    bytes: u64,
}

impl Memory {
    /// Takes zeroed memory at the first place where it fits.
    pub fn alloc(self: &Arc<Memory>, bytes: u64) -> Result<Allocation> {
        let mut state = self.lock()?;
        let have_bytes = CAPACITY_BYTES - state.taken.values().sum::<usize>() as u64;
        let full =
            || Error::OutOfMemory { what: format!("a buffer on `{NAME}`"), need_bytes: bytes, have_bytes };
        if bytes > have_bytes {
            return Err(full());
        }
        let len = (bytes as usize).max(1).next_multiple_of(ALIGNMENT);
        let mut address = 0;
        for (&next, &next_len) in &state.taken {
            if next - address >= len {
                break;
            }
            address = next + next_len;
        }
        let end = address + len;
        if end as u64 > CAPACITY_BYTES {
            return Err(full());
        }
        if end > state.bytes.len() {
            let more = end - state.bytes.len();
            state.bytes.try_reserve(more).map_err(|_| full())?;
            state.bytes.resize(end, 0);
        }
        state.bytes[address..end].fill(0);
        state.taken.insert(address, len);
        Ok(Allocation { memory: self.clone(), address, bytes })
    }

    /// Copies from the host.
    pub fn write(&self, address: usize, bytes: &[u8]) -> Result<()> {
        self.run(|memory| {
            memory.get_mut(address..address + bytes.len())?.copy_from_slice(bytes);
            Some(())
        })
    }

    /// Copies to the host.
    pub fn read(&self, address: usize, bytes: &mut [u8]) -> Result<()> {
        self.run(|memory| {
            bytes.copy_from_slice(memory.get(address..address + bytes.len())?);
            Some(())
        })
    }

    /// Runs a command of the chip, which sees all memory. `None`: it left the memory.
    pub fn run(&self, command: impl FnOnce(&mut [u8]) -> Option<()>) -> Result<()> {
        command(&mut self.lock()?.bytes).ok_or_else(|| error("an address outside of the memory"))
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        self.0.lock().map_err(|_| error("a thread failed while it used the memory"))
    }
}

impl Allocation {
    /// Whether it is memory of this device: of two chips, each has its own.
    pub fn is_of(&self, memory: &Arc<Memory>) -> bool {
        Arc::ptr_eq(&self.memory, memory)
    }

    /// The addresses of some of its bytes.
    pub fn addresses(&self, range: Range<u64>) -> Result<Range<usize>> {
        if range.start > range.end || range.end > self.bytes {
            let expected = format!("inside 0..{}", self.bytes);
            return Err(Error::argument("range of a buffer", expected, format!("{range:?}")));
        }
        Ok(self.address + range.start as usize..self.address + range.end as usize)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Ok(mut state) = self.memory.lock() {
            state.taken.remove(&self.address);
        }
    }
}

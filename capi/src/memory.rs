//! Memory of the caller, for all that sessions on the CPU allocate.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use halite::Cpu;
use halite::backend::host::{Allocator, Words};

use crate::backend::{BackendObject, HaliteOpenBackend};
use crate::border::{Caller, Failure, HaliteResult, call, reserved};
use crate::handle;

/// Returns `bytes` bytes at a multiple of `alignment`, which is a power of two, or null. They need not be
/// zero.
pub type HaliteAllocate =
    Option<unsafe extern "C" fn(bytes: usize, alignment: usize, user: *mut c_void) -> *mut c_void>;

/// Takes back what HaliteAllocate returned, with the same size.
pub type HaliteFree = Option<unsafe extern "C" fn(memory: *mut c_void, bytes: usize, user: *mut c_void)>;

/// An allocator of the caller. Its functions may be called from any thread until the backend and all its
/// sessions are closed. They must not call this library.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteMemory {
    pub struct_bytes: u32,
    pub reserved: u32,
    pub allocate: HaliteAllocate,
    pub free: HaliteFree,
    pub user: *mut c_void,
}

sized! {
    HaliteMemory {
        struct_bytes: u32, reserved: u32, allocate: HaliteAllocate, free: HaliteFree, user: *mut c_void,
    }
}

/// Of a cache line, and enough for every kernel.
const ALIGNMENT: usize = 64;

#[derive(Clone, Copy)]
struct Hooks {
    allocate: unsafe extern "C" fn(usize, usize, *mut c_void) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void, usize, *mut c_void),
    user: *mut c_void,
}

// SAFETY: the caller promises that its functions may be called from any thread.
unsafe impl Send for Hooks {}
// SAFETY: as above.
unsafe impl Sync for Hooks {}

/// Memory that [`HaliteAllocate`] returned.
struct Block {
    first: NonNull<u64>,
    words: usize,
    hooks: Hooks,
}

// SAFETY: the memory is this value's alone, and its functions may be called from any thread.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Allocator for Hooks {
    fn zeroed(&self, words: usize) -> Option<Words> {
        let bytes = words.checked_mul(size_of::<u64>())?;
        if bytes == 0 {
            return Some(Box::new(Vec::new()));
        }
        // SAFETY: the caller passed a function of this type.
        let memory = NonNull::new(unsafe { (self.allocate)(bytes, ALIGNMENT, self.user) })?.cast::<u64>();
        let block = Block { first: memory, words, hooks: *self };
        if !memory.addr().get().is_multiple_of(ALIGNMENT) {
            return None;
        }
        // SAFETY: the caller promises `bytes` bytes, and their address is a multiple of the alignment.
        unsafe { memory.write_bytes(0, words) };
        Some(Box::new(block))
    }
}

impl Deref for Block {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        // SAFETY: the memory has so many words, which were set to zero, until it is dropped.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.words) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, and nothing else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.words) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: the memory is what the caller's function returned, with its size.
        unsafe {
            (self.hooks.free)(self.first.as_ptr().cast(), self.words * size_of::<u64>(), self.hooks.user)
        };
    }
}

/// Opens the backend "cpu" on so many threads, 0 for one per core, with an allocator for all memory that
/// grows with a model or a session: KV cache, inputs, outputs, scratch, and weights that are not mapped.
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_open_cpu(
    threads: u32,
    memory: *const HaliteMemory,
    backend: *mut *mut HaliteOpenBackend,
) -> HaliteResult {
    let make = |c: &Caller| {
        let given = c.sized("memory", memory)?;
        reserved(given.reserved)?;
        let (Some(allocate), Some(free)) = (given.allocate, given.free) else {
            return Err(Failure::argument("memory", "two functions", "null"));
        };
        let hooks = Hooks { allocate, free, user: given.user };
        let cpu = Cpu::with_threads(threads as usize)?.with_memory(Arc::new(hooks));
        Ok(BackendObject(Arc::new(cpu)))
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, backend, || make(c))) }
}

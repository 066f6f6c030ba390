//! What a page needs beside the interface in C: memory that it can write to, and a model in it that is not copied. These
//! functions exist in WebAssembly only, and `web/halite.js` calls them.

use std::ffi::c_char;

use halite::Model;
use halite::map::Source;

use crate::border::{Caller, HaliteResult, call};
use crate::handle;
use crate::model::{HaliteModel, ModelObject};

/// Returns zeros in a multiple of eight bytes, or null if there is no memory.
#[unsafe(no_mangle)]
pub extern "C" fn halite_wasm_alloc(bytes: usize) -> *mut u64 {
    let mut words = Vec::new();
    let count = bytes.div_ceil(8).max(1);
    if words.try_reserve_exact(count).is_err() {
        return std::ptr::null_mut();
    }
    words.resize(count, 0u64);
    Box::into_raw(words.into_boxed_slice()).cast()
}

/// What [`halite_wasm_alloc`] returned for so many bytes; nothing for null.
unsafe fn owned(start: *mut u64, bytes: usize) -> Box<[u64]> {
    if start.is_null() {
        return Box::default();
    }
    let words = std::ptr::slice_from_raw_parts_mut(start, bytes.div_ceil(8).max(1));
    // SAFETY: the caller got it from `halite_wasm_alloc`, and gives it up.
    unsafe { Box::from_raw(words) }
}

/// Frees what [`halite_wasm_alloc`] returned for so many bytes; null is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_wasm_free(start: *mut u64, bytes: usize) {
    // SAFETY: as there.
    drop(unsafe { owned(start, bytes) });
}

/// Opens a GGUF file in memory of [`halite_wasm_alloc`], which becomes the model's, even if that fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_wasm_model_open(
    name: *const c_char,
    start: *mut u64,
    bytes: usize,
    model: *mut *mut HaliteModel,
) -> HaliteResult {
    // SAFETY: as there.
    let words = unsafe { owned(start, bytes) };
    let make = |c: &Caller| {
        let source = Source::from_words(c.text("name", name)?, words.into_vec(), bytes);
        Ok(ModelObject::new(Model::from_source(source)?))
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, model, || make(c))) }
}

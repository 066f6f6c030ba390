//! A device to test on.
#![allow(dead_code, reason = "not every test that includes this needs all of it")]

use std::sync::Arc;

use halite::backend::Backend;
use halite_gpu::{Gpu, GpuOptions};

/// The device that `HALITE_GPU` names, or the first. `None`, and a word on stderr, if there is no device; with `HALITE_GPU`
/// set that is a failure.
pub fn open(options: &GpuOptions) -> Option<Gpu> {
    let named = std::env::var("HALITE_GPU");
    let adapter = named.clone().ok().filter(|name| !name.is_empty());
    match Gpu::new(&options.clone().adapter(adapter)) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            assert!(named.is_err(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A device without some paths.
pub fn gpu(without: &[&str]) -> Option<Arc<dyn Backend>> {
    let without = without.iter().map(|&path| path.to_owned()).collect();
    Some(Arc::new(open(&GpuOptions::default().without(without))?))
}

/// A device of which only so many bytes may be taken.
pub fn budgeted(memory_bytes: u64) -> Option<Arc<dyn Backend>> {
    Some(Arc::new(open(&GpuOptions::default().memory_bytes(memory_bytes))?))
}

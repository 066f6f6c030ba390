//! A device to test on.

use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::gpu::{Gpu, GpuOptions};

/// The device that `HALITE_GPU` names, or the first, without some paths. `None`, and a word on stderr, if there is no
/// device; with `HALITE_GPU` set that is a failure.
pub fn gpu(without: &[&str]) -> Option<Arc<dyn Backend>> {
    let named = std::env::var("HALITE_GPU");
    let adapter = named.clone().ok().filter(|name| !name.is_empty());
    let without = without.iter().map(|&path| path.to_owned()).collect();
    match Gpu::new(&GpuOptions { adapter, without, ..Default::default() }) {
        Ok(gpu) => Some(Arc::new(gpu)),
        Err(error) => {
            assert!(named.is_err(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

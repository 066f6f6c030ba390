//! The module `halite` of Python.
//!
//! Work runs on a thread of its own while the calling thread, without Python's lock, waits for it and for
//! signals (`work.rs`). Objects lock themselves without waiting, so a busy one is an error, never a deadlock.

mod backend;
#[cfg(feature = "sim")]
mod chip;
mod conform;
mod embed;
mod error;
mod generate;
mod model;
mod session;
mod work;

use pyo3::prelude::*;

/// Language models on CPUs, GPUs and custom accelerators.
#[pymodule(name = "halite")]
fn add_all(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    error::add_to(m)?;
    m.add_class::<model::Model>()?;
    m.add_class::<model::Tokenizer>()?;
    m.add_class::<backend::OpenBackend>()?;
    m.add_class::<backend::Device>()?;
    m.add_class::<session::Session>()?;
    m.add_class::<session::Sequence>()?;
    m.add_class::<generate::Generation>()?;
    m.add_class::<generate::TextStream>()?;
    m.add_class::<embed::Embedder>()?;
    m.add_class::<conform::Outcome>()?;
    m.add_function(wrap_pyfunction!(backend::devices, m)?)?;
    m.add_function(wrap_pyfunction!(conform::conform, m)?)?;
    #[cfg(feature = "sim")]
    m.add_function(wrap_pyfunction!(chip::estimate, m)?)?;
    m.add_function(wrap_pyfunction!(work::_panic, m)?)
}

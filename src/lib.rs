//! Halite: an embedded inference runtime for custom accelerators.
#![deny(unsafe_code)]

pub mod error;
pub mod gguf;
pub mod map;
pub mod program;
mod validate;

pub use error::{Error, Result};
pub use halite_kernels as kernels;

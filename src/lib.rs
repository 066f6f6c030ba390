//! Halite: an embedded inference runtime for custom accelerators.
#![deny(unsafe_code)]

pub mod backend;
#[cfg(feature = "chat")]
pub mod chat;
pub mod conformance;
#[cfg(feature = "constrain")]
pub mod constrain;
#[cfg(feature = "convert")]
pub mod convert;
pub mod cost;
pub mod embed;
pub mod error;
pub mod generate;
pub mod gguf;
mod loaded;
mod lora;
pub mod map;
mod memory;
pub mod model;
#[cfg(feature = "output")]
pub mod output;
pub mod pack;
pub mod passes;
pub mod program;
pub mod rng;
pub mod sampler;
pub mod session;
pub mod speculate;
pub mod synth;
pub mod tokenizer;
mod validate;
pub mod weights;

pub use error::{Error, Result};
pub use halite_kernels as kernels;
pub use model::Model;
pub use tokenizer::Tokenizer;

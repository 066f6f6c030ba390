//! Halite: an embedded inference runtime for custom accelerators.
//!
//! A [`Model`] is a GGUF file, mapped. It records one flat [`program`] of ops. A [`Backend`] prepares the
//! program once and runs it for each step: the [`Cpu`], a crate beside this one (`halite-gpu`, `halite-sim`),
//! or yours. A [`Session`] is a model on a backend, with its sequences and their KV cache; all its memory is
//! reserved when it is made.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//!
//! use halite::prelude::*;
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let model = Arc::new(Model::open("model.gguf")?);
//!     let tokenizer = Tokenizer::from_gguf(model.gguf())?.ok_or("the file has no vocabulary")?;
//!     let backend: Arc<dyn Backend> = Arc::new(Cpu::new()?);
//!     let mut session = Session::new(&model, &backend, &SessionOptions::default())?;
//!     session.generate(&tokenizer, "Once upon a time", &GenerateOptions::default(), |text| {
//!         print!("{text}");
//!         ControlFlow::Continue(())
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! Several sequences can share a step, and a step can mix prompts with single tokens. A sequence's logits do
//! not depend on its neighbours:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use halite::prelude::*;
//! # fn steps(model: &Arc<Model>, backend: &Arc<dyn Backend>) -> halite::Result<()> {
//! use halite::session::{OutputKind, Run};
//!
//! let options = SessionOptions::default().sequences(2).outputs(2);
//! let mut session = Session::new(model, backend, &options)?;
//! let (a, b) = (session.add_sequence(), session.add_sequence());
//! session.step(&[Run::new(a, &[1, 2, 3]), Run::new(b, &[1, 9])], OutputKind::ArgMax)?;
//! let next: &[u32] = session.arg_max();
//! # let _ = next;
//! # Ok(())
//! # }
//! ```
//!
//! To stop work from another thread, keep a [`Session::cancel_handle`]. For chats see `chat` (feature
//! `chat`), for embeddings [`embed`], for a new chip [`backend`], for its tests [`conformance`].
//!
//! Features: `chat` (chat templates), `constrain` (output constrained by a JSON schema, a regular expression
//! or a grammar), `convert` (safetensors to GGUF), `export` (images for microcontrollers), `output` (atomic file
//! writes), `quantize` (models in other formats), `save` (saved sequences), `formats` (CPU kernels of all weight
//! formats; `formats-k` and so on for some), `fast` (more of them, and more ways to match words). The defaults
//! are `chat`, `fast`, `formats` and `save`.
#![deny(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod bisect;
#[cfg(feature = "chat")]
pub mod chat;
pub mod clock;
pub mod conformance;
#[cfg(feature = "constrain")]
pub mod constrain;
#[cfg(feature = "convert")]
pub mod convert;
pub mod cost;
pub mod embed;
pub mod error;
#[cfg(feature = "export")]
pub mod export;
pub mod generate;
pub mod gguf;
mod loaded;
mod lora;
pub mod map;
pub mod measure;
mod memory;
pub mod model;
mod options;
#[cfg(feature = "output")]
pub mod output;
pub mod pack;
pub mod passes;
pub mod program;
#[cfg(feature = "quantize")]
pub mod quantize;
pub mod rank;
pub mod rng;
pub mod sampler;
pub mod session;
pub mod shard;
pub mod speculate;
pub mod stream;
pub mod synth;
pub mod tokenizer;
mod validate;
pub mod weights;

pub use backend::Backend;
pub use backend::cpu::Cpu;
pub use embed::{EmbedOptions, Embedder};
pub use error::{Error, Result};
pub use generate::GenerateOptions;
/// The half-precision number of blocks and caches, from the crate `half`.
pub use half::f16;
pub use halite_kernels as kernels;
pub use model::Model;
pub use sampler::SamplerOptions;
pub use session::{Session, SessionOptions};
pub use tokenizer::Tokenizer;

/// What most programs use.
pub mod prelude {
    pub use crate::{
        Backend, Cpu, EmbedOptions, Embedder, GenerateOptions, Model, SamplerOptions, Session,
        SessionOptions, Tokenizer,
    };
}

//! The C interface of Halite: `include/halite.h` is generated from this crate.
//!
//! Handles are numbers of a table (`handle.rs`), so a handle that was closed, or is of another kind, is an
//! error rather than undefined behaviour. Every function goes through `border::call`, where panics end.
//!
//! The Rust library `halite` is what Rust programs use; this crate is a Rust library only for its own tests.
#![allow(missing_docs, reason = "cbindgen copies each line into the header; fields need none")]
#![allow(clippy::missing_safety_doc, reason = "the head of the header says what every pointer must be")]

#[macro_use]
pub mod border;
pub mod backend;
pub mod chat;
pub mod embed;
pub mod generate;
pub mod grammar;
mod handle;
pub mod log;
pub mod memory;
pub mod model;
pub mod save;
pub mod session;
mod stop;
pub mod tokenizer;
#[cfg(target_family = "wasm")]
pub mod wasm;

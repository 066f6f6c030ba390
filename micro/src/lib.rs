//! Runs a language model on a microcontroller: one thread, no allocation, no operating system.
//!
//! `halite export` writes a model as an *image*: its program, its weights and its vocabulary, in the form in which
//! they are used. An image lies in flash, or wherever it can be read as bytes. [`Image::new`] checks it once; a
//! [`Session`] runs it in memory of the caller, whose size the image states. Logits are the same bits as on any
//! CPU; see `docs/numeric-contract.md` in the repository.
//!
//! ```no_run
//! use halite_micro::{Error, Image, Session, greedy};
//!
//! fn run(image: &[u8], memory: &mut [u32], prompt: &[u32]) -> Result<(), Error> {
//!     let mut session = Session::new(Image::new(image)?, memory)?;
//!     let mut token = greedy(session.prefill(prompt)?);
//!     while let Some(next) = token.filter(|&token| !session.image().is_end(token)) {
//!         let text = session.image().text(next); // bytes: a token may end within a character
//!         token = greedy(session.step(&[next])?);
//!     }
//!     Ok(())
//! }
//! ```
#![no_std]
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("images are little-endian, and are read where they lie");

mod check;
mod error;
pub mod image;
pub mod layout;
pub mod ops;
pub mod record;
mod run;
mod session;

pub use error::Error;
pub use image::Image;
pub use session::{Session, greedy};

//! Quantised weight formats and the CPU kernels that compute with them.
//!
//! The crate is `no_std` and never allocates, so a microcontroller can use it alone. The `std` feature adds
//! run-time CPU detection and the thread pool.
//!
//! All results obey one numeric contract: the same inputs give the same bits on every instruction set, for
//! any tiling, any number of threads and any batch. Each module states its part of the contract;
//! `docs/numeric-contract.md` in the repository states the whole.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod activation;
pub mod attention;
#[cfg(feature = "std")]
pub mod cores;
pub mod float;
pub mod formats;
pub mod isa;
pub mod kv;
pub mod math;
pub mod matmul;
pub mod panel;
#[cfg(feature = "std")]
pub mod pool;
pub mod recurrent;
pub mod roofline;
pub mod rows;

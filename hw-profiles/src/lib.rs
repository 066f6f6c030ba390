//! Chips as data for Halite: what a chip has ([`profile`]), and the number formats that it computes in
//! ([`numerics`]).
#![deny(unsafe_code)]

pub mod numerics;
pub mod profile;

pub use profile::{Profile, SHIPPED};

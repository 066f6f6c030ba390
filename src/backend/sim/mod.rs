//! Custom accelerators, simulated from their profiles.

pub mod matrix;

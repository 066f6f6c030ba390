//! Times that follow from a profile.

pub mod workload;

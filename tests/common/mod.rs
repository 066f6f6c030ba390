//! What several tests share.

pub mod exercise;
pub mod gguf;

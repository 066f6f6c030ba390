//! A small language model as bytes, for programs that run without a file.

/// Bytes at a multiple of what mapped weights need.
#[repr(align(64))]
struct Aligned<T>(T);

const LEN: usize = include_bytes!("../austen/halite-austen.gguf").len();
static AUSTEN_BYTES: Aligned<[u8; LEN]> = Aligned(*include_bytes!("../austen/halite-austen.gguf"));

/// The GGUF file of Halite Austen: 3.5 million parameters, trained on Jane Austen's novels.
pub static AUSTEN: &[u8] = &AUSTEN_BYTES.0;

//! What the tests of several crates share.
#![allow(missing_docs, clippy::new_without_default, reason = "only tests use it")]

pub mod bert;
pub mod exercise;
pub mod faulty;
pub mod gguf;
pub mod golden;
pub mod lora;
pub mod not_finite;

/// The root of the repository.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A small generator of pseudo-random numbers (Steele et al. 2014, SplitMix64).
pub struct SplitMix(pub u64);

impl SplitMix {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

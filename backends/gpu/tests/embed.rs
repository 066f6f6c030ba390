//! Vectors of an encoder on a GPU.

mod common;

use halite::embed::EmbedOptions;
use halite::kernels::formats::Format;
use halite_testing::bert::{embedder, largest_difference, texts, tokenizer};

#[test]
fn a_gpu_is_close() {
    let Some(gpu) = common::gpu(&[]) else { return };
    let mut gpu = embedder(gpu, Format::F32, EmbedOptions::default());
    let got = gpu.embed(&tokenizer(gpu.model()), &texts()).unwrap();
    assert!(largest_difference(&got) < 1e-4, "{}", largest_difference(&got));
}

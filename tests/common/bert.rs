//! The small encoder of `tests/data/bert`, and what its vectors should be.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::convert::convert;
use halite::embed::{EmbedOptions, Embedder};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::{Error, Model, Tokenizer};

pub fn folder() -> PathBuf {
    Path::new(crate::ROOT).join("tests/data/bert")
}

pub fn converted(folder: &Path, format: Format) -> Result<Arc<Model>, Error> {
    let mut bytes = Vec::new();
    convert(folder, format, &mut bytes, &mut |_| {})?;
    Ok(Arc::new(Model::from_source(Source::from_bytes("bert", &bytes))?))
}

pub fn tokenizer(model: &Model) -> Tokenizer {
    Tokenizer::from_gguf(model.gguf()).unwrap().unwrap()
}

pub fn embedder(backend: Arc<dyn Backend>, format: Format, options: EmbedOptions) -> Embedder {
    let model = converted(&folder(), format).unwrap();
    Embedder::new(&model, &backend, &options).unwrap()
}

pub fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(2).unwrap())
}

/// Texts, their ids and their vectors.
pub fn expected() -> Vec<(String, Vec<u32>, Vec<f64>)> {
    let all = std::fs::read(folder().join("expected.json")).unwrap();
    let all: Vec<serde_json::Value> = serde_json::from_slice(&all).unwrap();
    let row = |row: &serde_json::Value| {
        (
            row["text"].as_str().unwrap().into(),
            row["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect(),
            row["vector"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect(),
        )
    };
    all.iter().map(row).collect()
}

pub fn texts() -> Vec<String> {
    expected().into_iter().map(|(text, ..)| text).collect()
}

pub fn largest_difference(got: &[Vec<f32>]) -> f64 {
    let expected = expected();
    assert_eq!(got.len(), expected.len());
    let pairs = got.iter().zip(&expected).flat_map(|(got, (_, _, want))| {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want)
    });
    pairs.map(|(&got, want)| (f64::from(got) - want).abs()).fold(0.0, f64::max)
}

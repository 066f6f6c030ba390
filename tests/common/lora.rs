//! Small models of random weights, and adapters of them.

use std::sync::Arc;

use halite::Model;
use halite::backend::Backend;
use halite::gguf::Gguf;
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};

use crate::SplitMix;
use crate::gguf::File;

pub const TOKENS: [u32; 9] = [1, 5, 7, 6, 10, 8, 9, 5, 11];
/// `alpha` of every adapter here.
pub const ALPHA: f32 = 6.0;

pub fn open(file: &File) -> Model {
    Model::from_source(Source::from_bytes("model", &file.bytes())).unwrap()
}

pub fn gguf(file: &File) -> Gguf {
    Gguf::from_source(Source::from_bytes("adapter", &file.bytes())).unwrap()
}

pub fn logits(model: Model, backend: Arc<dyn Backend>) -> Vec<f32> {
    let (n, model) = (TOKENS.len() as u32, Arc::new(model));
    let program = ProgramOptions::default().kv_format(Format::F32);
    let options = SessionOptions::default().context(16).batch(n).outputs(n).program(program);
    let mut session = Session::new(&model, &backend, &options).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run::new(sequence, &TOKENS).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
    session.logits().to_vec()
}

pub fn random(n: u64, random: &mut SplitMix) -> Vec<f32> {
    (0..n).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect()
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

pub fn header(architecture: &str) -> File {
    File::new()
        .entry("general.architecture", architecture)
        .entry("general.type", "adapter")
        .entry("adapter.type", "lora")
        .entry("adapter.lora.alpha", ALPHA)
}

/// A model of random weights.
pub fn randomised(mut file: File) -> File {
    let mut numbers = SplitMix(3);
    for tensor in file.tensors.iter_mut().filter(|t| t.dims.len() == 2) {
        tensor.data = bytes(&random(tensor.dims.iter().product(), &mut numbers));
    }
    file
}

/// An adapter of this rank for every matrix of the layer.
pub fn adapter(of: &File, architecture: &str, rank: u64, seed: u64) -> File {
    let (mut file, mut numbers) = (header(architecture), SplitMix(seed));
    for tensor in of.tensors.iter().filter(|t| t.dims.len() == 2 && t.name.starts_with(b"blk.")) {
        let name = String::from_utf8(tensor.name.clone()).unwrap();
        let (a, b) = ([tensor.dims[0], rank], [rank, tensor.dims[1]]);
        file = file
            .tensor_of(format!("{name}.lora_a"), &a, 0, bytes(&random(a[0] * rank, &mut numbers)))
            .tensor_of(format!("{name}.lora_b"), &b, 0, bytes(&random(b[1] * rank, &mut numbers)));
    }
    assert!(file.tensors.len() > 6);
    file
}

//! Models that compute NaN.

use std::sync::Arc;

use halite::backend::Backend;
use halite::gguf::Gguf;
use halite::map::Source;
use halite::session::{OutputKind, Run, Session, SessionOptions};
use halite::{Error, Model};

/// The built-in model, with a number in place of the first of a tensor of F32.
pub fn model(tensor: &str, number: f32) -> Arc<Model> {
    let path = std::path::Path::new(crate::ROOT).join("models/austen/halite-austen.gguf");
    let mut bytes = std::fs::read(path).unwrap();
    let gguf = Gguf::from_source(Source::from_bytes("whole", &bytes)).unwrap();
    let info = gguf.tensor(tensor).unwrap();
    assert_eq!(info.record.format, halite::kernels::formats::Format::F32);
    let at = info.record.bytes.start as usize;
    let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
    assert!(f32::from_le_bytes(old).is_finite());
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    Arc::new(Model::from_source(Source::from_bytes("broken", &bytes)).unwrap())
}

pub fn is_not_finite<T: std::fmt::Debug>(result: Result<T, Error>, what: &str) {
    match result {
        Err(Error::NotFinite { what: "logits", .. }) => {}
        other => panic!("{what}: {other:?}"),
    }
}

/// Every head of a step names what is not finite.
pub fn every_head_names_it(backend: &Arc<dyn Backend>) {
    for (tensor, number) in [
        ("output_norm.weight", f32::NAN),
        ("blk.0.attn_norm.weight", f32::NAN),
        ("output_norm.weight", f32::INFINITY),
    ] {
        let broken = model(tensor, number);
        let mut session = Session::new(&broken, backend, &SessionOptions::default()).unwrap();
        let sequence = session.add_sequence();
        for head in [OutputKind::Logits, OutputKind::ArgMax, OutputKind::TopK] {
            let what = format!("{tensor} {number} {head:?} on {}", backend.caps().name);
            let run = Run::new(sequence, &[5, 6, 7]);
            is_not_finite(session.step(&[run], head), &what);
            assert_eq!(session.len(sequence).unwrap(), 0, "{what}");
        }
    }
}

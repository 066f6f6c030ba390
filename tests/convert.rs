//! Folders of safetensors as the library transformers writes them (`scripts/convert.py`): tiny models of random weights, converted,
//! against the logits of that library and the ids of the library tokenizers; and folders that are refused.
#![cfg(feature = "convert")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::convert::convert;
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::session::{Head, Run, Session, SessionOptions, Wanted};
use halite::tokenizer::{EncodeOptions, TokenKind};
use halite::{Error, Model, Tokenizer};
use serde_json::Value;

const FAMILIES: &[&str] = &[
    "cohere2",
    "gemma2",
    "gemma3",
    "granite",
    "llama",
    "llama-spm",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/convert").join(name)
}

fn converted(folder: &Path, format: Format) -> Result<Arc<Model>, Error> {
    let mut bytes = Vec::new();
    convert(folder, format, &mut bytes, &mut |_| {})?;
    Ok(Arc::new(Model::from_source(Source::from_bytes("converted", &bytes))?))
}

fn tokenizer(model: &Model) -> Tokenizer {
    Tokenizer::from_gguf(model.gguf()).unwrap().unwrap()
}

fn json_of(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Mean square error over mean square of the logits that are expected of the last positions.
fn error(folder: &Path, model: &Arc<Model>, backend: &Arc<dyn Backend>) -> f64 {
    let tokens = ids(&json_of(folder, "expected.json")["tokens"]);
    let want = std::fs::read(folder.join("logits.f32")).unwrap();
    let want: Vec<f32> = want.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let program = ProgramOptions { kv_format: Format::F32 };
    let count = tokens.len() as u32;
    let options = SessionOptions { context: 64, batch: count, outputs: count, program, taps: Vec::new() };
    let mut session = Session::new(model, backend, &options, &mut |_| {}).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run { sequence, tokens: &tokens, wanted: Wanted::All }], Head::Logits).unwrap();
    let got = session.logits();
    let got = &got[got.len() - want.len()..];
    let square = |x: f64| x * x;
    let error: f64 =
        got.iter().zip(&want).map(|(&got, &want)| square(f64::from(got) - f64::from(want))).sum();
    error / want.iter().map(|&want| square(want.into())).sum::<f64>()
}

#[test]
fn logits_are_those_of_transformers() {
    let backends: [Arc<dyn Backend>; 2] = [Arc::new(Cpu::new(1).unwrap()), Arc::new(Reference::new())];
    let mut wrong = Vec::new();
    for name in FAMILIES {
        let folder = folder(name);
        let model = converted(&folder, Format::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        for backend in &backends {
            let error = error(&folder, &model, backend);
            // The runtime's GELU by tanh goes through half precision; see docs/numeric-contract.md.
            let gelu = matches!(*name, "gemma2" | "gemma3" | "starcoder2");
            if !(error < if gelu { 1e-6 } else { 1e-11 }) {
                wrong.push(format!("{name}: {error:.3e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn ids_are_those_of_tokenizers() {
    for name in FAMILIES {
        let folder = folder(name);
        let tokenizer = tokenizer(&converted(&folder, Format::F16).unwrap());
        let options = EncodeOptions { add_special: true, parse_special: true };
        for row in json_of(&folder, "expected.json")["texts"].as_array().unwrap() {
            let text = row[0].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, options), ids(&row[1]), "{name}: {text:?}");
        }
        let kind = |text: &str| tokenizer.token(text.as_bytes()).and_then(|id| tokenizer.kind(id));
        assert_eq!(kind("<|end|>"), Some(TokenKind::Control));
        assert_eq!(kind("<tool>"), Some(TokenKind::UserDefined));
        assert_eq!(tokenizer.kind(tokenizer.len() as u32 - 1), Some(TokenKind::Unused));
        assert_eq!(tokenizer.text(tokenizer.eos().unwrap()), Some(&b"</s>"[..]));
        assert!(tokenizer.is_end(tokenizer.token(b"<|end|>").unwrap()));
    }
}

//! Rerankers: two small ones of random weights, against llama.cpp's scores and those of double precision
//! (`scripts/rank.py`).
#![cfg(feature = "convert")]

use std::path::PathBuf;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::embed::{EmbedOptions, Embedder};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::Pooling;
use halite::{Model, Tokenizer, rank};
use halite_testing::bert;
use serde_json::Value;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/rank")
}

fn open(name: &str) -> (Arc<Model>, Tokenizer) {
    let model = Model::open(folder().join(format!("{name}.gguf"))).unwrap();
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    (Arc::new(model), tokenizer)
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(2).unwrap())
}

struct Pair {
    query: String,
    document: String,
    tokens: Vec<u32>,
    /// llama.cpp's.
    score: f64,
    /// In double precision.
    exact: Option<f64>,
}

fn expected(name: &str) -> Vec<Pair> {
    let all: Value =
        serde_json::from_str(&std::fs::read_to_string(folder().join("expected.json")).unwrap()).unwrap();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let pair = |row: &Value| Pair {
        query: text(row, "query"),
        document: text(row, "document"),
        tokens: serde_json::from_value(row["tokens"].clone()).unwrap(),
        score: row["score"].as_f64().unwrap(),
        exact: row["exact"].as_f64(),
    };
    all[name].as_array().unwrap().iter().map(pair).collect()
}

#[test]
fn scores_are_those_of_another_runtime() {
    for name in ["encoder", "decoder"] {
        let (model, tokenizer) = open(name);
        assert_eq!(model.hparams().pooling_type, Some(Pooling::Rank));
        for backend in [cpu(), Arc::new(Reference::new()) as Arc<dyn Backend>] {
            let mut embedder = Embedder::new(&model, &backend, &EmbedOptions::default()).unwrap();
            for pair in expected(name) {
                let tokens = rank::tokens(model.gguf(), &tokenizer, &pair.query, &pair.document).unwrap();
                assert_eq!(tokens, pair.tokens, "{} {}", pair.query, pair.document);
                let score = embedder.rank(&tokenizer, &pair.query, &[&pair.document]).unwrap()[0];
                // llama.cpp computes the GELU of an encoder less precisely.
                let bounds =
                    [(pair.exact, 1e-5), (Some(pair.score), if pair.exact.is_some() { 5e-3 } else { 1e-5 })];
                for (want, bound) in bounds.into_iter().filter_map(|(want, bound)| Some((want?, bound))) {
                    assert!((f64::from(score) - want).abs() < bound, "{name}: {score} for {want}");
                }
            }
        }
    }
}

#[test]
fn a_score_does_not_depend_on_other_documents() {
    let (model, tokenizer) = open("encoder");
    let mut embedder = Embedder::new(&model, &cpu(), &EmbedOptions::default()).unwrap();
    let documents: Vec<String> = expected("encoder").into_iter().map(|pair| pair.document).collect();
    let all = embedder.rank(&tokenizer, "Who?", &documents).unwrap();
    for (document, score) in documents.iter().zip(&all) {
        assert_eq!(embedder.rank(&tokenizer, "Who?", &[document]).unwrap(), [*score]);
    }
    assert!(embedder.rank(&tokenizer, "Who?", &[""; 0]).unwrap().is_empty());
    assert_eq!(rank::best(&[1.0, 3.0, 2.0, 3.0]), [1, 3, 2, 0]);
    assert_eq!((rank::score(&[0.5]), rank::score(&[0.0, 0.0]), rank::score(&[1e30, 0.0])), (0.5, 0.5, 1.0));
}

#[test]
fn texts_cannot_forge_the_template() {
    let (model, tokenizer) = open("decoder");
    let tokens = |query, document| rank::tokens(model.gguf(), &tokenizer, query, document).unwrap();
    let decoded = tokenizer.decode(&tokens("{document}", "secret"), true);
    assert_eq!(decoded.matches("secret").count(), 1, "{decoded}");
    let control = tokenizer.token(b"<s>").unwrap();
    assert!(!tokens("a", "a <s> b").contains(&control));
    let (encoder, tokenizer) = open("encoder");
    let pair = rank::tokens(encoder.gguf(), &tokenizer, "<s>", "<s>").unwrap();
    assert_eq!(pair.iter().filter(|&&id| id == control).count(), 1);
}

#[test]
fn what_is_no_reranker_is_named() {
    let error = |model: &Arc<Model>, options: &EmbedOptions| {
        Embedder::new(model, &cpu(), options).unwrap_err().to_string()
    };
    let (reranker, _) = open("encoder");
    let told = error(&reranker, &EmbedOptions::default().pooling(Pooling::Mean));
    assert!(told.contains("Mean") && told.contains("classification head"), "{told}");
    let plain = bert::converted(&bert::folder(), Format::F32).unwrap();
    let told = error(&plain, &EmbedOptions::default().pooling(Pooling::Rank));
    assert!(told.contains("classification head"), "{told}");
    let mut embedder = Embedder::new(&plain, &cpu(), &EmbedOptions::default()).unwrap();
    let told = embedder.rank(&bert::tokenizer(&plain), "a", &["b"]).unwrap_err().to_string();
    assert!(told.contains("no reranker") && told.contains("bert.pooling_type"), "{told}");
}

/// The document is what gives way: what stands around it stays.
#[test]
fn long_documents_are_shortened() {
    for name in ["encoder", "decoder"] {
        let (model, tokenizer) = open(name);
        let mut plain = Embedder::new(&model, &cpu(), &EmbedOptions::default()).unwrap();
        let mut truncates = Embedder::new(&model, &cpu(), &EmbedOptions::default().truncate(true)).unwrap();
        let long = "the License, ".repeat(100);
        let most = plain.max_text_tokens() as usize;
        let fits = |&end: &usize| {
            rank::tokens(model.gguf(), &tokenizer, "Who?", &long[..end]).unwrap().len() <= most
        };
        // A longer start may have fewer tokens: more than one is the longest around it.
        let ends = (0..long.len()).filter(|end| fits(end) && !fits(&(end + 1)));
        let got = truncates.rank(&tokenizer, "Who?", &[&long[..], "a"]).unwrap();
        let mut same = ends.map(|end| plain.rank(&tokenizer, "Who?", &[&long[..end], "a"]).unwrap());
        assert!(same.any(|want| want == got), "{name}");
        let told = plain.rank(&tokenizer, "Who?", &[&long]).unwrap_err().to_string();
        assert!(told.contains("the model's limit"), "{told}");
        let told = truncates.rank(&tokenizer, &long, &["a"]).unwrap_err().to_string();
        assert!(told.starts_with("query: expected at most"), "{told}");
    }
}

/// Token types are those of a pair that the file's separator divides.
#[test]
fn a_separator_that_divides_nothing_is_named() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/convert/bert-rank-types");
    let mut bytes = Vec::new();
    halite::convert::convert(&folder, Format::F32, &mut bytes, &mut |_| {}).unwrap();
    let key = b"tokenizer.ggml.seperator_token_id";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let told = |separator: u32| {
        let mut bytes = bytes.clone();
        bytes[at..at + 4].copy_from_slice(&separator.to_le_bytes());
        let model = Arc::new(Model::from_source(Source::from_bytes("pair", &bytes)).unwrap());
        let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
        let tokens = rank::tokens(model.gguf(), &tokenizer, "a", "b").map(|tokens| tokens.len());
        let embedder = Embedder::new(&model, &cpu(), &EmbedOptions::default());
        (tokens.map_err(|e| e.to_string()), embedder.map(|_| ()).map_err(|e| e.to_string()))
    };
    assert!(matches!(told(3), (Ok(_), Ok(()))), "{:?}", told(3));
    let (tokens, embedder) = told(u32::MAX);
    assert!(tokens.unwrap_err().contains("seperator_token_id"));
    assert!(embedder.unwrap_err().contains("seperator_token_id`: expected below"));
}

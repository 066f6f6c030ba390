//! `tokenizer.model`, where a folder has no tokenizer.json: SentencePiece's BPE in protocol buffers, with the fields of
//! `sentencepiece_model.proto`. It becomes the tokenizer.json that says the same.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;
use serde_json::{Map, Value, json};

use super::folder::{Json, read_bytes};
use super::vocabulary::SPACE;
use crate::error::{Error, Result};
use crate::gguf::printable;

/// Maximum bytes of the file. The largest published ones have five million.
const MAX_BYTES: u64 = 1 << 24;

/// The file's name.
pub(super) const FILE: &str = "tokenizer.model";

#[derive(Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Message)]
struct Piece {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
}

#[derive(Message)]
struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// Values of `TrainerSpec.ModelType` and `SentencePiece.Type`.
const BPE: i32 = 2;
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A vocabulary of pieces.
pub(super) struct Pieces {
    /// As tokenizer.json would have it, without merges.
    pub(super) json: Json,
    /// A score for each piece.
    pub(super) scores: Vec<f32>,
    /// Ids that no text becomes.
    pub(super) unused: Vec<usize>,
}

/// Reads the vocabulary. Tokens that other files of the folder add have the ids behind it.
pub(super) fn read(folder: &Path) -> Result<Pieces> {
    let wrong = |message: String| Error::Model(format!("{}: {message}", folder.join(FILE).display()));
    let bytes = read_bytes(folder, FILE, MAX_BYTES)?;
    let model = Model::decode(&bytes[..]).map_err(|e| wrong(e.to_string()))?;
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    if trainer.model_type != Some(BPE) {
        return Err(wrong(format!("model_type: expected BPE (2), got {}", trainer.model_type.unwrap_or(1))));
    }
    for (key, is_so) in [
        ("byte_fallback: expected true", trainer.byte_fallback == Some(true)),
        ("escape_whitespaces: expected true", normalizer.escape_whitespaces != Some(false)),
        ("remove_extra_whitespaces: expected false", normalizer.remove_extra_whitespaces == Some(false)),
        (
            "precompiled_charsmap: expected none",
            normalizer.precompiled_charsmap.is_none_or(|map| map.is_empty()),
        ),
    ] {
        if !is_so {
            return Err(wrong(format!("{key}, got another value")));
        }
    }
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer = match normalizer.add_dummy_prefix {
        Some(false) => replace,
        _ => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}),
    };

    let (mut vocabulary, mut added, mut unused, mut unknown) = (Map::new(), Vec::new(), Vec::new(), None);
    for (id, piece) in model.pieces.iter().enumerate() {
        let text = &piece.text;
        if vocabulary.insert(text.clone(), id.into()).is_some() {
            return Err(wrong(format!(
                "piece {id}: expected a text of its own, got {}",
                printable(text.as_bytes())
            )));
        }
        let special = match piece.kind.unwrap_or(NORMAL) {
            NORMAL | BYTE => continue,
            UNKNOWN => {
                unknown = Some(text.clone());
                continue;
            }
            UNUSED => {
                unused.push(id);
                continue;
            }
            CONTROL => true,
            USER_DEFINED => false,
            other => return Err(wrong(format!("piece {id}: expected a type from 1 to 6, got {other}"))),
        };
        added.push(json!({"id": id, "content": text, "special": special}));
    }
    // Those of slow tokenizers: texts with ids, and newer files with properties.
    let listed = Json::open_if_there(folder, "added_tokens.json")?;
    for (text, id) in listed.value.as_object().into_iter().flatten() {
        let special = text.starts_with('<') && text.ends_with('>');
        added.push(json!({"id": id, "content": text, "special": special}));
    }
    let about = Json::open_if_there(folder, "tokenizer_config.json")?;
    let listed = about.value.get("added_tokens_decoder").and_then(Value::as_object);
    let mut known: HashSet<Option<u64>> = added.iter().map(|token| token["id"].as_u64()).collect();
    for (id, token) in listed.into_iter().flatten() {
        let id: u32 = id.parse().map_err(|_| about.wrong("added_tokens_decoder", "ids", id))?;
        let is_new = id as usize >= model.pieces.len() && known.insert(Some(id.into()));
        if let (true, Some(token)) = (is_new, token.as_object()) {
            let mut token = token.clone();
            token.insert("id".into(), id.into());
            added.push(token.into());
        }
    }
    let bos = usize::try_from(trainer.bos_id.unwrap_or(1)).ok().and_then(|id| model.pieces.get(id));
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single = match bos.filter(|_| about.get("add_bos_token").is_none_or(|adds| *adds != false)) {
        Some(bos) => json!([{"SpecialToken": {"id": bos.text, "type_id": 0}}, text]),
        None => json!([text]),
    };
    let value = json!({
        "model": {"type": "BPE", "byte_fallback": true, "unk_token": unknown, "vocab": vocabulary},
        "added_tokens": added,
        "normalizer": normalizer,
        "post_processor": {"type": "TemplateProcessing", "single": single},
    });
    let scores = model.pieces.iter().map(|piece| piece.score).collect();
    Ok(Pieces { json: Json::made(folder, FILE, value), scores, unused })
}

//! BERT (Devlin et al. 2019): its names, its metadata and its vocabulary of word pieces.

use std::path::Path;

use serde_json::Value;

use super::Plan;
use super::folder::Json;
use crate::error::{Error, Result};
use crate::gguf::write::Writer;

/// Names in the folder, and in GGUF files. Each stands for a weight, a bias or both.
const NAMES: &[(&str, &str)] = &[
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("encoder.layer.{}.attention.self.query", "blk.{}.attn_q"),
    ("encoder.layer.{}.attention.self.key", "blk.{}.attn_k"),
    ("encoder.layer.{}.attention.self.value", "blk.{}.attn_v"),
    ("encoder.layer.{}.attention.output.dense", "blk.{}.attn_output"),
    ("encoder.layer.{}.attention.output.LayerNorm", "blk.{}.attn_output_norm"),
    ("encoder.layer.{}.intermediate.dense", "blk.{}.ffn_up"),
    ("encoder.layer.{}.output.dense", "blk.{}.ffn_down"),
    ("encoder.layer.{}.output.LayerNorm", "blk.{}.layer_output_norm"),
];

/// What embeddings do not need: heads of the pre-training, and positions written out.
const UNUSED: &[&str] = &["pooler.*", "cls.*", "embeddings.position_ids"];

/// Special tokens of WordPiece: their key in the file, their key in the folder, and their usual text.
const SPECIAL: &[(&str, &str, &str)] = &[
    ("unknown", "unk_token", "[UNK]"),
    ("seperator", "sep_token", "[SEP]"),
    ("padding", "pad_token", "[PAD]"),
    ("cls", "cls_token", "[CLS]"),
    ("mask", "mask_token", "[MASK]"),
];

/// The metadata of BERT.
pub(super) fn plan(folder: &Path, config: &Json, w: &mut Writer) -> Result<Plan> {
    for (key, only) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
        if let Some(value) = config.value.get(key).filter(|value| **value != *only) {
            return Err(config.wrong(key, only, value));
        }
    }
    w.entry("general.architecture", "bert")?;
    let name = config.value.get("_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty());
    w.entry("general.name", name.unwrap_or("bert"))?;
    for (key, from) in [
        ("vocab_size", "vocab_size"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
    ] {
        w.entry(&format!("bert.{key}"), config.u32(from)?)?;
    }
    w.entry("bert.attention.layer_norm_epsilon", config.f64("layer_norm_eps")? as f32)?;
    w.entry("bert.attention.causal", false)?;
    if let Some(pooling) = pooling(folder)? {
        w.entry("bert.pooling_type", pooling)?;
    }
    wordpiece(folder, w)?;
    w.entry("tokenizer.ggml.token_type_count", config.u32("type_vocab_size")?)?;
    Ok(Plan { prefix: "bert.", names: vec![NAMES], unused: UNUSED.to_vec(), ..Plan::default() })
}

/// How sentence-transformers pools, in the values of the key `pooling_type`.
fn pooling(folder: &Path) -> Result<Option<u32>> {
    if !folder.join("1_Pooling/config.json").is_file() {
        return Ok(None);
    }
    let config = Json::open(folder, "1_Pooling/config.json")?;
    let fields = config.value.as_object().into_iter().flatten();
    let on: Vec<&str> = fields.filter(|(_, value)| **value == true).map(|(key, _)| key.as_str()).collect();
    let modes: Vec<&&str> = on.iter().filter(|key| key.starts_with("pooling_mode_")).collect();
    match modes[..] {
        [&"pooling_mode_mean_tokens"] => Ok(Some(1)),
        [&"pooling_mode_cls_token"] => Ok(Some(2)),
        [&"pooling_mode_lasttoken"] => Ok(Some(3)),
        _ => Err(config.wrong(
            "pooling_mode_*",
            "one of mean_tokens, cls_token, lasttoken",
            format!("{modes:?}"),
        )),
    }
}

/// A WordPiece vocabulary: what begins a word gets U+2581 in front, what continues one loses its `##`.
fn wordpiece(folder: &Path, w: &mut Writer) -> Result<()> {
    let path = folder.join("vocab.txt");
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let texts: Vec<&str> = text.strip_suffix('\n').unwrap_or(&text).split('\n').collect();
    let config = Json::open(folder, "tokenizer_config.json")?;
    let mut special = Vec::new();
    for (key, from, usual) in SPECIAL {
        let token = match config.value.get(from) {
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
            token => token.and_then(Value::as_str),
        };
        let token = token.unwrap_or(usual);
        let id = texts.iter().position(|text| *text == token).ok_or_else(|| {
            Error::Tokenizer(format!("{}: special token `{token}` is not among the tokens", path.display()))
        })?;
        special.push((*key, id));
    }
    let is_special = |id: usize| special.iter().any(|(_, special)| *special == id);
    let tokens = texts.iter().enumerate().map(|(id, text)| match text.strip_prefix("##") {
        _ if is_special(id) => (*text).to_owned(),
        Some(rest) if !rest.is_empty() => rest.to_owned(),
        _ => format!("\u{2581}{text}"),
    });
    let tokens: Vec<String> = tokens.collect();
    let kinds: Vec<i32> = (0..tokens.len()).map(|id| if is_special(id) { 3 } else { 1 }).collect();
    w.entry("tokenizer.ggml.model", "bert")?;
    w.entry("tokenizer.ggml.tokens", &tokens[..])?;
    w.entry("tokenizer.ggml.token_type", &kinds[..])?;
    for (key, id) in special {
        w.entry(&format!("tokenizer.ggml.{key}_token_id"), id as u32)?;
    }
    let flag = |key: &str| config.value.get(key).and_then(Value::as_bool);
    let lowercase = flag("do_lower_case").unwrap_or(true);
    w.entry("tokenizer.ggml.normalizer.lowercase", lowercase)?;
    w.entry("tokenizer.ggml.normalizer.strip_accents", flag("strip_accents").unwrap_or(lowercase))
}

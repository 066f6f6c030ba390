//! BERT (Devlin et al. 2019): tensor names, metadata and WordPiece vocabulary.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::Plan;
use super::folder::{Json, has, read_text};
use super::vocabulary::{CONTROL, NORMAL, USER_DEFINED};
use crate::embed::MAX_TEXT_TOKENS;
use crate::error::{Error, Result};
use crate::gguf::write::Writer;
use crate::tokenizer::{MAX_TOKENS, MAX_WORD_CHARS};

/// Tensor names in the folder and in GGUF files, without `.weight` and `.bias`.
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

/// Tensors that embeddings do not need: the pre-training heads, and the list of positions.
const UNUSED: &[&str] = &["pooler.*", "cls.*", "embeddings.position_ids"];

/// Special tokens of WordPiece: key in the GGUF file, key in the folder, default text.
const SPECIAL: &[(&str, &str, &str)] = &[
    ("unknown", "unk_token", "[UNK]"),
    ("seperator", "sep_token", "[SEP]"),
    ("padding", "pad_token", "[PAD]"),
    ("cls", "cls_token", "[CLS]"),
    ("mask", "mask_token", "[MASK]"),
];

/// Writes BERT's metadata, and returns the mapping of its tensors.
pub(super) fn plan(folder: &Path, config: &Json, w: &mut Writer) -> Result<Plan> {
    for (key, only) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
        if let Some(value) = config.value.get(key).filter(|value| **value != *only) {
            return Err(config.wrong(key, only, value));
        }
    }
    only(config, "is_decoder", &false.into())?;
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
    let left_out = sentence_transformers(folder, config, w)?;
    Ok(Plan { prefix: "bert.", names: vec![NAMES], unused: UNUSED.to_vec(), left_out, ..Plan::default() })
}

/// Rejects all values of a key but the supported one.
fn only(json: &Json, key: &str, only: &Value) -> Result<()> {
    match json.get(key).filter(|value| *value != only) {
        Some(value) => Err(json.wrong(key, &only.to_string(), value)),
        None => Ok(()),
    }
}

/// Writes the settings of sentence-transformers: the maximum tokens of a text, and the modules after the
/// model. Returns warnings about settings that GGUF cannot express.
fn sentence_transformers(folder: &Path, config: &Json, w: &mut Writer) -> Result<Vec<String>> {
    let about = Json::open_if_there(folder, "sentence_bert_config.json")?;
    let tokenizer = Json::open(folder, "tokenizer_config.json")?;
    // Without a limit of its own, sentence-transformers uses the tokenizer's.
    let (from, key) = match about.get("max_seq_length") {
        Some(_) => (&about, "max_seq_length"),
        None => (&tokenizer, "model_max_length"),
    };
    let positions = config.u32("max_position_embeddings")?;
    // A tokenizer without a limit states a huge number, such as 1e30.
    let max_tokens = from.optional_f64(key)?.filter(|max_tokens| *max_tokens < f64::from(positions));
    if let Some(max_tokens) = max_tokens {
        if max_tokens.fract() != 0.0 || max_tokens < 3.0 {
            return Err(from.missing(key, "a whole number of tokens, at least 3"));
        }
        w.entry(MAX_TEXT_TOKENS, max_tokens as u32)?;
    }
    if !lowercases(&tokenizer)? {
        only(&about, "do_lower_case", &false.into())?;
    }
    let modules = Json::open_if_there(folder, "modules.json")?;
    let known = ["Transformer", "Pooling", "Normalize"];
    let mut normalizes = modules.value.is_null();
    for module in modules.value.as_array().into_iter().flatten() {
        let kind = module.get("type").and_then(Value::as_str).unwrap_or_default();
        let kind = kind.rsplit('.').next().unwrap_or_default();
        if !known.contains(&kind) {
            return Err(modules.wrong("type", &format!("one of {}", known.join(", ")), kind));
        }
        normalizes |= kind == "Normalize";
    }
    let mut left_out = Vec::new();
    if !normalizes {
        left_out.push(
            "modules.json: vectors are not divided by their length: `halite embed` needs --no-normalize for that"
                .to_owned(),
        );
    }
    let prompts = Json::open_if_there(folder, "config_sentence_transformers.json")?;
    if prompts.get("default_prompt_name").is_some() {
        let what = "config_sentence_transformers.json: key `default_prompt_name` is left out: write the prompt before texts";
        left_out.push(what.to_owned());
    }
    Ok(left_out)
}

/// Returns the pooling of sentence-transformers, as a value of the key `pooling_type`.
fn pooling(folder: &Path) -> Result<Option<u32>> {
    if !has(folder, "1_Pooling/config.json") {
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

/// Writes a WordPiece vocabulary. GGUF marks pieces that begin a word with U+2581; `vocab.txt` marks the
/// other pieces with `##`.
fn wordpiece(folder: &Path, w: &mut Writer) -> Result<()> {
    let path = folder.join("vocab.txt");
    let text = read_text(folder, "vocab.txt")?;
    let texts = text.strip_suffix('\n').unwrap_or(&text).split('\n');
    let texts: Vec<&str> = texts.take(MAX_TOKENS + 1).collect();
    if texts.len() > MAX_TOKENS {
        return Err(Error::Tokenizer(format!("{}: expected at most {MAX_TOKENS} tokens", path.display())));
    }
    let config = Json::open(folder, "tokenizer_config.json")?;
    only(&config, "tokenize_chinese_chars", &true.into())?;
    only(&config, "do_basic_tokenize", &true.into())?;
    only(&config, "never_split", &Value::Array(Vec::new()))?;
    let fast = Json::open_if_there(folder, "tokenizer.json")?;
    let max_chars = match fast.object("model")? {
        Some(model) => {
            check(&fast, &model, &config, &texts)?;
            model.optional_u32("max_input_chars_per_word")?
        }
        None => config.optional_u32("max_input_chars_per_word")?,
    };
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
    let added = added(&fast, &texts)?;
    let kind = |id: usize| match added.get(&id) {
        _ if special.iter().any(|(_, special)| *special == id) => CONTROL,
        Some(kind) => *kind,
        None => NORMAL,
    };
    let kinds: Vec<i32> = (0..texts.len()).map(kind).collect();
    let tokens = texts.iter().enumerate().map(|(id, text)| match text.strip_prefix("##") {
        _ if kinds[id] != NORMAL => (*text).to_owned(),
        Some(rest) if !rest.is_empty() => rest.to_owned(),
        _ => format!("\u{2581}{text}"),
    });
    let tokens: Vec<String> = tokens.collect();
    w.entry("tokenizer.ggml.model", "bert")?;
    w.entry("tokenizer.ggml.tokens", &tokens[..])?;
    w.entry("tokenizer.ggml.token_type", &kinds[..])?;
    for (key, id) in special {
        w.entry(&format!("tokenizer.ggml.{key}_token_id"), id as u32)?;
    }
    if let Some(max_chars) = max_chars {
        w.entry(MAX_WORD_CHARS, max_chars)?;
    }
    let lowercase = lowercases(&config)?;
    w.entry("tokenizer.ggml.normalizer.lowercase", lowercase)?;
    w.entry("tokenizer.ggml.normalizer.strip_accents", config.bool("strip_accents")?.unwrap_or(lowercase))
}

fn lowercases(tokenizer: &Json) -> Result<bool> {
    Ok(tokenizer.bool("do_lower_case")?.unwrap_or(true))
}

/// Returns the ids and types of the tokens that tokenizer.json matches in raw text.
fn added(fast: &Json, texts: &[&str]) -> Result<HashMap<usize, i32>> {
    let mut all = HashMap::new();
    for token in fast.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let id = token.get("id").and_then(Value::as_u64).and_then(|id| usize::try_from(id).ok());
        let text = token.get("content").and_then(Value::as_str);
        let id = id.filter(|id| text.is_some() && texts.get(*id).copied() == text);
        let id = id.ok_or_else(|| fast.wrong("added_tokens", "texts and ids of vocab.txt", token))?;
        let flag = |key: &str| token.get(key).is_some_and(|flag| *flag == true);
        // `lstrip` and `rstrip` change nothing, because WordPiece drops white space.
        if let Some(key) = ["single_word", "normalized"].into_iter().find(|key| flag(key)) {
            return Err(fast.wrong("added_tokens", &format!("no {key}"), token));
        }
        all.insert(id, if flag("special") { CONTROL } else { USER_DEFINED });
    }
    Ok(all)
}

/// Rejects a tokenizer.json that contradicts vocab.txt or tokenizer_config.json.
fn check(fast: &Json, model: &Json, config: &Json, texts: &[&str]) -> Result<()> {
    only(model, "type", &"WordPiece".into())?;
    only(model, "continuing_subword_prefix", &"##".into())?;
    for (text, id) in model.get("vocab").and_then(Value::as_object).into_iter().flatten() {
        let there = id.as_u64().and_then(|id| texts.get(usize::try_from(id).ok()?));
        if there != Some(&text.as_str()) {
            return Err(model.wrong("vocab", "the tokens of vocab.txt", format!("`{text}` for {id}")));
        }
    }
    let lowercase = lowercases(config)?;
    let accents = config.bool("strip_accents")?.unwrap_or(lowercase);
    if let Some(normalizer) = fast.object("normalizer")? {
        only(&normalizer, "type", &"BertNormalizer".into())?;
        for (key, value) in [
            ("clean_text", true),
            ("handle_chinese_chars", true),
            ("lowercase", lowercase),
            ("strip_accents", accents),
        ] {
            only(&normalizer, key, &value.into())?;
        }
    }
    if let Some(pre) = fast.object("pre_tokenizer")? {
        only(&pre, "type", &"BertPreTokenizer".into())?;
    }
    Ok(())
}

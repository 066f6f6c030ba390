//! Converts WordPiece vocabularies: `vocab.txt` or tokenizer.json, and what tokenizer_config.json says of words.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::folder::{Json, has, read_text};
use super::options::only;
use super::vocabulary::{CONTROL, NORMAL, USER_DEFINED, is_of_bert};
use crate::error::{Error, Result};
use crate::gguf::write::Writer;
use crate::tokenizer::{MAX_TOKENS, MAX_WORD_CHARS};

/// Special tokens of WordPiece: key in the GGUF file, key in the folder, default text.
const SPECIAL: &[(&str, &str, &str)] = &[
    ("unknown", "unk_token", "[UNK]"),
    ("seperator", "sep_token", "[SEP]"),
    ("padding", "pad_token", "[PAD]"),
    ("cls", "cls_token", "[CLS]"),
    ("mask", "mask_token", "[MASK]"),
];

/// Writes a WordPiece vocabulary. GGUF marks pieces that begin a word with U+2581; `vocab.txt` marks the
/// other pieces with `##`.
///
/// Without `vocab.txt`, the tokens are those of tokenizer.json.
pub(super) fn write(folder: &Path, w: &mut Writer) -> Result<()> {
    let fast = Json::open_if_there(folder, "tokenizer.json")?;
    let model = fast.object("model")?;
    if model.is_none() && !fast.value.is_null() {
        return Err(fast.missing("model", "an object"));
    }
    let path = folder.join(if has(folder, "vocab.txt") { "vocab.txt" } else { "tokenizer.json" });
    let text;
    let texts: Vec<&str> = match &model {
        Some(model) if !has(folder, "vocab.txt") => in_order(model)?,
        _ => {
            text = read_text(folder, "vocab.txt")?;
            let texts = text.strip_suffix('\n').unwrap_or(&text).split('\n');
            texts.take(MAX_TOKENS + 1).collect()
        }
    };
    if texts.len() > MAX_TOKENS {
        return Err(Error::Tokenizer(format!("{}: expected at most {MAX_TOKENS} tokens", path.display())));
    }
    let config = Json::open(folder, "tokenizer_config.json")?;
    only(&config, "tokenize_chinese_chars", &true.into())?;
    only(&config, "do_basic_tokenize", &true.into())?;
    only(&config, "never_split", &Value::Array(Vec::new()))?;
    let max_chars = match &model {
        Some(model) => {
            check(&fast, model, &config, &texts)?;
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
        if let ("unknown", Some(model)) = (*key, &model)
            && model.get("unk_token").is_none_or(|unknown| unknown != token)
        {
            return Err(model.missing("unk_token", token));
        }
    }
    if model.is_some() {
        let text = |key: &str| {
            let id = special.iter().find(|(special, _)| *special == key).map(|(_, id)| *id);
            id.and_then(|id| texts.get(id).copied()).unwrap_or_default()
        };
        let (first, last) = (text("cls"), text("seperator"));
        if !is_of_bert(&fast, first, last)? {
            let expected = format!("{first} A {last}, and {first} A {last} B {last} for pairs");
            return Err(fast.missing("post_processor", &expected));
        }
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

/// The texts of tokenizer.json by their ids, which have no gaps.
fn in_order(model: &Json) -> Result<Vec<&str>> {
    let vocabulary = model.get("vocab").and_then(Value::as_object);
    let vocabulary = vocabulary.ok_or_else(|| model.missing("vocab", "an object"))?;
    let mut texts = vec![None; vocabulary.len()];
    for (text, id) in vocabulary {
        let slot = id.as_u64().and_then(|id| texts.get_mut(usize::try_from(id).ok()?));
        let slot = slot.filter(|slot| slot.is_none());
        *slot.ok_or_else(|| model.wrong("vocab", "ids of their own without gaps", id))? = Some(text.as_str());
    }
    Ok(texts.into_iter().flatten().collect())
}

pub(super) fn lowercases(tokenizer: &Json) -> Result<bool> {
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
    let step = |key: &str, kind: &str| {
        let step = fast.object(key)?.filter(|step| step.get("type").is_some_and(|it| it == kind));
        step.ok_or_else(|| fast.missing(key, kind))
    };
    let normalizer = step("normalizer", "BertNormalizer")?;
    for (key, value) in [
        ("clean_text", true),
        ("handle_chinese_chars", true),
        ("lowercase", lowercase),
        ("strip_accents", accents),
    ] {
        only(&normalizer, key, &value.into())?;
    }
    step("pre_tokenizer", "BertPreTokenizer").map(|_| ())
}

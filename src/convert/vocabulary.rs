//! Converts vocabularies of the library `tokenizers` to GGUF keys: tokenizer.json, or else `tokenizer.model`, and the special tokens of
//! tokenizer_config.json and generation_config.json. Supports byte-level BPE, SentencePiece BPE and SentencePiece unigram.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::folder::{Json, has, read_text};
use super::pieces::{self, Pieces};
use crate::error::{Error, Result};
use crate::gguf::printable;
use crate::gguf::write::Writer;
use crate::tokenizer::{MAX_TOKEN_BYTES, MAX_TOKENS, pretokenize};

/// Values of `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// SentencePiece's space.
pub(super) const SPACE: &str = "\u{2581}";

/// The pattern of case-insensitive English contractions, as files write it and as [`pretokenize`] writes it.
const ENDINGS: (&str, &str) =
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])");

/// The tokens of a vocabulary, one for each row of the embedding table.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
    ids: HashMap<String, u32>,
}

/// What a model does with texts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    Generate,
    /// Vectors of texts.
    Embed,
    /// Scores of pairs of texts.
    Rank,
}

/// Writes a folder's vocabulary and chat template. Returns warnings about settings that GGUF cannot express.
pub(super) fn write(folder: &Path, config: &Json, task: Task, w: &mut Writer) -> Result<Vec<String>> {
    let is_pieces = !has(folder, "tokenizer.json") && has(folder, pieces::FILE);
    let (json, pieces) = match is_pieces {
        true => {
            let Pieces { json, scores, unused } = pieces::read(folder)?;
            (json, Some((scores, unused)))
        }
        false if !has(folder, "tokenizer.json") => {
            let path = folder.display();
            return Err(Error::Model(format!(
                "{path}: expected tokenizer.json or {}, got neither",
                pieces::FILE
            )));
        }
        false => (Json::open(folder, "tokenizer.json")?, None),
    };
    let model = json.object("model")?.ok_or_else(|| json.missing("model", "an object"))?;
    let kind = model.str("type")?;
    let is_unigram = kind == "Unigram";
    // It leaves out merges at random.
    if let Some(dropout) = model.get("dropout").filter(|dropout| dropout.as_f64() != Some(0.0)) {
        return Err(model.wrong("dropout", "none", dropout));
    }
    if kind != "BPE" && !is_unigram {
        return Err(model.wrong("type", "BPE or Unigram", kind));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if let Some(affix) = model.get(key).filter(|affix| **affix != "") {
            return Err(model.wrong(key, "none", affix));
        }
    }
    if is_unigram {
        return unigram(folder, config, &json, &model, task, w);
    }
    let from_bytes = model.bool("byte_fallback")? == Some(true);
    let space_prefix = from_bytes.then(|| space_prefix(&json)).transpose()?;
    let mut tokens = tokens(&json, &model, config.u32("vocab_size")?, space_prefix)?;
    for &id in pieces.iter().flat_map(|(_, unused)| unused) {
        tokens.kinds[id] = UNUSED;
    }
    let is_gemma_4 = config.str("model_type")? == "gemma4_text";
    if is_gemma_4 && space_prefix != Some(false) {
        return Err(json.missing("normalizer", "spaces that become U+2581"));
    }
    let kind = match (is_gemma_4, from_bytes) {
        (true, _) => "gemma4",
        (false, true) => "llama",
        (false, false) => "gpt2",
    };
    w.entry("tokenizer.ggml.model", kind)?;
    w.entry("tokenizer.ggml.tokens", &tokens.texts[..])?;
    w.entry("tokenizer.ggml.token_type", &tokens.kinds[..])?;
    let merges = if is_pieces { Vec::new() } else { merges(&model)? };
    if let Some(space_prefix) = space_prefix.filter(|_| !is_gemma_4) {
        w.entry("tokenizer.ggml.pre", "default")?;
        w.entry("tokenizer.ggml.add_space_prefix", space_prefix)?;
        let scores = match pieces {
            // Tokens without a piece are matched before merging.
            Some((mut scores, _)) => {
                scores.resize(tokens.texts.len(), 0.0);
                scores
            }
            None => scores(&model, &tokens, &merges)?,
        };
        w.entry("tokenizer.ggml.scores", &scores[..])?;
    } else {
        w.entry("tokenizer.ggml.pre", if is_gemma_4 { kind } else { pre_tokenizer(&json, &model)? })?;
        let spaced = merges.iter().find(|(left, right)| left.contains(' ') || right.contains(' '));
        if let Some((left, right)) = spaced {
            return Err(model.wrong("merges", "parts without spaces", format!("`{left}` and `{right}`")));
        }
        let merges: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        w.entry("tokenizer.ggml.merges", &merges[..])?;
    }
    special(folder, config, &json, &tokens, task, w)?;
    let mut left_out = left_out_of_added(&json);
    // This is NFC: `pre_tokenizer` rejects all others. SentencePiece's normaliser is converted.
    if !from_bytes && json.get("normalizer").is_some() {
        left_out.push(
            "tokenizer.json: key `normalizer` is left out: texts are taken as they are, not in the normal form NFC"
                .to_owned(),
        );
    }
    Ok(left_out)
}

/// Returns warnings about properties of special tokens.
fn left_out_of_added(json: &Json) -> Vec<String> {
    let mut left_out = Vec::new();
    let special = |token: &&Value| token.get("special").is_some_and(|flag| *flag == true);
    let added = json.get("added_tokens").and_then(Value::as_array).map_or(&[][..], |added| &added[..]);
    for key in ["lstrip", "rstrip", "single_word"] {
        let has_it = |token: &Value| token.get(key).is_some_and(|flag| *flag == true);
        if let Some(token) = added.iter().filter(special).find(|token| has_it(token)) {
            let text = token.get("content").and_then(Value::as_str).unwrap_or_default();
            left_out.push(format!(
                "tokenizer.json: `{key}` of special tokens is left out, such as of {}",
                printable(text.as_bytes())
            ));
        }
    }
    left_out
}

/// Reads all tokens. `space_prefix` is present for SentencePiece: whether a text gets a space in front.
fn tokens(json: &Json, model: &Json, rows: u32, space_prefix: Option<bool>) -> Result<Tokens> {
    if rows as usize > MAX_TOKENS {
        return Err(model.wrong("vocab", &format!("at most {MAX_TOKENS} tokens"), rows));
    }
    // Rows without a token become `[PADn]`, the name that llama.cpp's converter gives them.
    let mut texts: Vec<Option<String>> = vec![None; rows as usize];
    let mut kinds = vec![UNUSED; rows as usize];
    let mut ids = HashMap::new();
    let unknown = unknown(model)?;
    for (text, id) in entries(model)? {
        let place = id.and_then(|id| usize::try_from(id).ok());
        let Some((place, slot)) = place.and_then(|place| Some((place, texts.get_mut(place)?))) else {
            let expected = format!("ids below {rows}, the rows of the embedding");
            return Err(model.wrong("vocab", &expected, format!("another of `{text}`")));
        };
        if let Some(other) = slot.replace(text.to_owned()) {
            return Err(model.wrong(
                "vocab",
                "one text for each id",
                format!("`{other}` and `{text}` for {place}"),
            ));
        }
        kinds[place] = match () {
            () if unknown == Some(text) => UNKNOWN,
            () if space_prefix.is_some() && is_byte(text) => BYTE,
            () => NORMAL,
        };
        ids.insert(text.to_owned(), place as u32);
    }
    let none = Vec::new();
    let added = match json.get("added_tokens") {
        Some(added) => added.as_array().ok_or_else(|| json.missing("added_tokens", "a list"))?,
        None => &none,
    };
    for token in added {
        let wrong = || json.wrong("added_tokens", "texts with ids", token);
        let text = token.get("content").and_then(Value::as_str).ok_or_else(wrong)?;
        let place = token
            .get("id")
            .and_then(Value::as_u64)
            .and_then(|id| usize::try_from(id).ok())
            .ok_or_else(wrong)?;
        let flag = |key: &str| token.get(key).is_some_and(|flag| *flag == true);
        // Skip tokens without a row in the embedding table: the model cannot read them.
        let Some(slot) = texts.get_mut(place) else { continue };
        if slot.as_ref().is_some_and(|other| other != text)
            || ids.insert(text.into(), place as u32).is_some_and(|id| id as usize != place)
        {
            return Err(json.wrong("added_tokens", "the texts and ids of the vocabulary", token));
        }
        *slot = Some(text.into());
        if kinds[place] == UNKNOWN {
            continue;
        }
        if !flag("special") {
            // A normalised token would get a space in front.
            let normalized = (space_prefix == Some(true)).then_some("normalized");
            let keys = ["single_word", "lstrip", "rstrip"].into_iter().chain(normalized);
            if let Some(key) = keys.into_iter().find(|key| flag(key)) {
                return Err(json.wrong(
                    "added_tokens",
                    &format!("no {key} of tokens that are not special"),
                    token,
                ));
            }
        }
        if flag("special") || (text.starts_with("<|") && text.ends_with("|>")) {
            kinds[place] = CONTROL;
        } else {
            kinds[place] = USER_DEFINED;
            if space_prefix.is_some() {
                // User-defined tokens are matched in raw text, where spaces are not U+2581.
                *slot = Some(text.replace(SPACE, " "));
            }
        }
    }
    let texts = texts.into_iter().enumerate().map(|(id, text)| text.unwrap_or_else(|| format!("[PAD{id}]")));
    Ok(Tokens { texts: texts.collect(), kinds, ids })
}

/// The texts and ids of a model: an object of ids, or a list of texts with their scores.
fn entries(model: &Json) -> Result<Vec<(&str, Option<u64>)>> {
    match model.get("vocab") {
        Some(Value::Object(ids)) => Ok(ids.iter().map(|(text, id)| (text.as_str(), id.as_u64())).collect()),
        Some(Value::Array(scored)) => {
            let mut entries = Vec::with_capacity(scored.len());
            for (id, entry) in scored.iter().enumerate() {
                let text = entry.get(0).and_then(Value::as_str);
                let text = text.ok_or_else(|| model.wrong("vocab", "texts with scores", entry))?;
                entries.push((text, Some(id as u64)));
            }
            Ok(entries)
        }
        _ => Err(model.missing("vocab", "an object or a list")),
    }
}

/// Returns the id of a text of a folder's tokenizer.json.
pub(super) fn id_of(folder: &Path, text: &str) -> Result<u32> {
    let json = Json::open(folder, "tokenizer.json")?;
    let model = json.object("model")?.ok_or_else(|| json.missing("model", "an object"))?;
    let entry = entries(&model)?.into_iter().find(|(other, _)| *other == text);
    let id = entry.and_then(|(_, id)| u32::try_from(id?).ok());
    id.ok_or_else(|| model.wrong("vocab", &format!("a token `{text}`"), "none"))
}

/// The text of the unknown token, which the model names by its text or by its place.
fn unknown(model: &Json) -> Result<Option<&str>> {
    let Some(id) = model.optional_u32("unk_id")? else {
        return Ok(model.get("unk_token").and_then(Value::as_str));
    };
    let text = model.value.pointer(&format!("/vocab/{id}/0")).and_then(Value::as_str);
    text.map(Some).ok_or_else(|| model.wrong("unk_id", "a place in the vocabulary", id))
}

/// Score of rows without a token.
const UNLIKELY: f32 = -10_000.0;

/// Writes SentencePiece's unigram vocabulary.
fn unigram(
    folder: &Path,
    config: &Json,
    json: &Json,
    model: &Json,
    task: Task,
    w: &mut Writer,
) -> Result<Vec<String>> {
    if model.bool("byte_fallback")? == Some(true) {
        return Err(model.wrong("byte_fallback", "false", true));
    }
    let Spaces { charsmap, prefix, trims_end } = Spaces::of(json)?;
    let tokens = tokens(json, model, config.u32("vocab_size")?, Some(prefix))?;
    if let Some(at) = tokens.kinds.iter().position(|&kind| kind == USER_DEFINED) {
        return Err(json.wrong("added_tokens", "special ones", format!("`{}`", tokens.texts[at])));
    }
    let mut scores = vec![UNLIKELY; tokens.texts.len()];
    for (place, entry) in model.get("vocab").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let score = entry.get(1).and_then(Value::as_f64).map(|score| score as f32);
        let score = score.filter(|score| score.is_finite());
        let score = score.ok_or_else(|| model.wrong("vocab", "texts with scores", entry))?;
        if let Some(slot) = scores.get_mut(place) {
            *slot = score;
        }
    }
    w.entry("tokenizer.ggml.model", "t5")?;
    w.entry("tokenizer.ggml.pre", "default")?;
    w.entry("tokenizer.ggml.tokens", &tokens.texts[..])?;
    w.entry("tokenizer.ggml.scores", &scores[..])?;
    w.entry("tokenizer.ggml.token_type", &tokens.kinds[..])?;
    w.entry("tokenizer.ggml.add_space_prefix", prefix)?;
    w.entry("tokenizer.ggml.remove_extra_whitespaces", true)?;
    w.entry("tokenizer.ggml.precompiled_charsmap", &charsmap[..])?;
    special(folder, config, json, &tokens, task, w)?;
    let mut left_out = left_out_of_added(json);
    if !trims_end {
        left_out.push(
            "tokenizer.json: spaces at the end of a text are dropped, as SentencePiece does, but not the folder".to_owned(),
        );
    }
    Ok(left_out)
}

/// What becomes of characters and spaces ahead of a unigram vocabulary.
struct Spaces {
    charsmap: Vec<u8>,
    prefix: bool,
    trims_end: bool,
}

impl Spaces {
    /// Reads the normaliser and the pre-tokenizer: SentencePiece's charsmap, then runs of spaces become one.
    fn of(json: &Json) -> Result<Spaces> {
        let steps = |key: &str, list: &str| match json.get(key) {
            Some(step) => match step.get(list).and_then(Value::as_array) {
                Some(steps) => steps.clone(),
                None => vec![step.clone()],
            },
            None => Vec::new(),
        };
        let kind = |step: &Value| step.get("type").and_then(Value::as_str).map(str::to_owned);
        let mut found = Spaces { charsmap: Vec::new(), prefix: true, trims_end: false };
        let (mut collapses, mut has_charsmap) = (false, false);
        for step in steps("normalizer", "normalizers") {
            let flag = |key: &str| step.get(key).is_some_and(|flag| *flag == true);
            match kind(&step).as_deref() {
                Some("Precompiled") if !has_charsmap => {
                    let text = step.get("precompiled_charsmap").and_then(Value::as_str);
                    let bytes = text.and_then(base64).ok_or_else(|| {
                        json.wrong("normalizer", "a charsmap in base64", kind(&step).unwrap_or_default())
                    })?;
                    (found.charsmap, has_charsmap) = (bytes, true);
                }
                Some("Replace") if step.pointer("/pattern/Regex").is_some_and(|regex| regex == " {2,}") => {
                    collapses = true;
                }
                Some("Strip") if flag("strip_right") => found.trims_end = true,
                _ => return Err(json.wrong("normalizer", "Precompiled, then Replace of spaces", step)),
            }
        }
        if !has_charsmap {
            // Without it, other white space than spaces would end words here, but not there.
            return Err(json.missing("normalizer", "one with Precompiled"));
        }
        let pre = steps("pre_tokenizer", "pretokenizers");
        let is = |step: &Value, name: &str| kind(step).is_some_and(|kind| kind == name);
        let wrong =
            || json.missing("pre_tokenizer", "Metaspace, with WhitespaceSplit or Replace of spaces ahead");
        let metaspace = match &pre[..] {
            [split, metaspace] if is(split, "WhitespaceSplit") => {
                (collapses, found.trims_end) = (true, true);
                metaspace
            }
            [metaspace] => metaspace,
            _ => return Err(wrong()),
        };
        if !collapses
            || !is(metaspace, "Metaspace")
            || metaspace.get("replacement").is_none_or(|by| by != SPACE)
        {
            return Err(wrong());
        }
        found.prefix = match metaspace.get("prepend_scheme").and_then(Value::as_str) {
            Some("always") => true,
            Some("never") => false,
            None => metaspace.get("add_prefix_space").is_none_or(|adds| *adds == true),
            Some(_) => return Err(wrong()),
        };
        Ok(found)
    }
}

/// Decodes base64 (RFC 4648); `None` if it is none.
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for digit in text.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

/// Whether a token is a byte token, `<0x00>` to `<0xFF>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|d| d.is_ascii_hexdigit()))
}

/// Reads the merges as pairs. Files have texts with a space between the parts, or lists of two texts.
fn merges<'m>(model: &'m Json) -> Result<Vec<(&'m str, &'m str)>> {
    let list =
        model.get("merges").and_then(Value::as_array).ok_or_else(|| model.missing("merges", "a list"))?;
    let checked =
        |merge: &'m Value| pair(merge).ok_or_else(|| model.wrong("merges", "pairs of texts", merge));
    list.iter().map(checked).collect()
}

fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(text) => text.split_once(' '),
        Value::Array(parts) => match &parts[..] {
            [left, right] => left.as_str().zip(right.as_str()),
            _ => None,
        },
        _ => None,
    }
}

/// Computes scores that give the order of `merges`.
///
/// SentencePiece BPE merges any two neighbours that form a token, the token with the highest score first. A
/// list of merges that was generated from scores contains every split of a token into two others, and the
/// splits of a token are consecutive. The position of a token in that list can then replace its score. Any
/// other list is an error, because no scores have the same effect.
fn scores(model: &Json, tokens: &Tokens, merges: &[(&str, &str)]) -> Result<Vec<f32>> {
    let is_added = |id: u32| matches!(tokens.kinds[id as usize], CONTROL | USER_DEFINED | UNKNOWN);
    let mut pairs: HashMap<(&str, &str), ()> = HashMap::with_capacity(merges.len());
    let mut scores = vec![f32::NEG_INFINITY; tokens.texts.len()];
    let (mut place, mut last) = (0u32, None);
    let mut joined = String::new();
    for &(left, right) in merges {
        pairs.insert((left, right), ());
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        let id = tokens.ids.get(&joined).copied();
        let id =
            id.ok_or_else(|| model.wrong("merges", "tokens of the vocabulary", format!("`{joined}`")))?;
        if last.replace(id) == Some(id) {
            continue;
        }
        place += 1;
        let score = &mut scores[id as usize];
        // Added tokens are matched before merging, so their scores do not matter.
        if *score != f32::NEG_INFINITY && !is_added(id) {
            let got = format!("`{joined}` in two places");
            return Err(model.wrong(
                "merges",
                "an order of scores, with all merges to one token in a row",
                got,
            ));
        }
        *score = score.max(-(place as f32));
    }
    let lowest = -(place as f32) - 1.0;
    for score in scores.iter_mut().filter(|score| **score == f32::NEG_INFINITY) {
        *score = lowest;
    }
    let normal = |text: &str| tokens.ids.get(text).is_some_and(|&id| !is_added(id));
    for (text, _) in tokens.ids.iter().filter(|(_, id)| !is_added(**id)) {
        if text.len() > MAX_TOKEN_BYTES {
            let expected = format!("tokens of at most {MAX_TOKEN_BYTES} bytes");
            return Err(model.wrong("vocab", &expected, text.len()));
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if normal(left) && normal(right) && !pairs.contains_key(&(left, right)) {
                let got = format!("none of `{left}` and `{right}`");
                return Err(model.wrong(
                    "merges",
                    "every merge that makes a token, as scores have them",
                    got,
                ));
            }
        }
    }
    Ok(scores)
}

/// Returns whether SentencePiece adds a space in front of a text. Any other normalisation is an error.
fn space_prefix(json: &Json) -> Result<bool> {
    let (normaliser, pre) = (json.get("normalizer"), json.get("pre_tokenizer"));
    let is = |value: &Value, kind: &str| value.get("type").is_some_and(|value| value == kind);
    let replaces = |value: &Value| {
        is(value, "Replace")
            && value.pointer("/pattern/String").is_some_and(|from| from == " ")
            && value.get("content").is_some_and(|to| to == SPACE)
    };
    let prepends =
        |value: &Value| is(value, "Prepend") && value.get("prepend").is_some_and(|text| text == SPACE);
    let steps = |value: &Value| value.get("normalizers").and_then(Value::as_array).cloned();
    // A split at spaces has no effect after the normaliser replaced them.
    let splits =
        |value: &Value| is(value, "Split") && value.pointer("/pattern/String").is_some_and(|at| at == " ");
    if let Some(normaliser) = normaliser {
        if pre.is_none_or(splits) {
            match steps(normaliser).as_deref() {
                None if replaces(normaliser) => return Ok(false),
                Some([one]) if replaces(one) => return Ok(false),
                Some([first, second]) if prepends(first) && replaces(second) => return Ok(true),
                _ => {}
            }
        }
        return Err(json.wrong("normalizer", "spaces that become U+2581", normaliser));
    }
    let whole = |value: &Value| {
        is(value, "Metaspace")
            && value.get("replacement").is_some_and(|by| by == SPACE)
            && value.get("split").is_some_and(|split| *split == false)
    };
    match pre.filter(|pre| whole(pre)).and_then(|pre| pre.get("prepend_scheme")).and_then(Value::as_str) {
        Some("never") => Ok(false),
        Some("first" | "always") => Ok(true),
        _ => Err(json.missing("pre_tokenizer", "Metaspace that does not split")),
    }
}

/// Returns the GGUF name of a byte-level pre-tokenizer.
fn pre_tokenizer(json: &Json, model: &Json) -> Result<&'static str> {
    if let Some(other) =
        json.get("normalizer").filter(|value| !value.get("type").is_some_and(|kind| kind == "NFC"))
    {
        return Err(json.wrong("normalizer", "none or NFC", other));
    }
    let pre = json
        .get("pre_tokenizer")
        .ok_or_else(|| json.missing("pre_tokenizer", "one that ends in ByteLevel"))?;
    let steps = match pre.get("pretokenizers").and_then(Value::as_array) {
        Some(steps) => &steps[..],
        None => std::slice::from_ref(pre),
    };
    let wrong = || json.wrong("pre_tokenizer", "one that is known", pre);
    let mut patterns = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        let is = |key: &str, value: &str| step.get(key).is_some_and(|got| got == value);
        let flag = |key: &str| step.get(key).is_some_and(|flag| *flag == true);
        let regex = step.pointer("/pattern/Regex").and_then(Value::as_str);
        patterns.extend(match (step.get("type").and_then(Value::as_str), regex) {
            (Some("Split"), Some(regex)) if is("behavior", "Isolated") && !flag("invert") => {
                Some(regex.replace(ENDINGS.0, ENDINGS.1))
            }
            (Some("Digits"), _) if flag("individual_digits") => Some(r"\p{N}".into()),
            (Some("ByteLevel"), _) if at + 1 == steps.len() && !flag("add_prefix_space") => {
                // Files from before this option existed split.
                let splits = step.get("use_regex").is_none_or(|splits| *splits == true);
                splits.then(|| pretokenize::GPT2.to_owned())
            }
            _ => return Err(wrong()),
        });
    }
    let ignore_merges = model.bool("ignore_merges")? == Some(true);
    pretokenize::name_of(&patterns, ignore_merges).ok_or_else(wrong)
}

/// Writes the ids of special tokens, whether encoding adds them, and the chat template.
fn special(
    folder: &Path,
    config: &Json,
    json: &Json,
    tokens: &Tokens,
    task: Task,
    w: &mut Writer,
) -> Result<()> {
    let about = Json::open_if_there(folder, "tokenizer_config.json")?;
    let generation = Json::open_if_there(folder, "generation_config.json")?;
    let id_of = |text: &str| {
        tokens.ids.get(text).copied().ok_or_else(|| {
            Error::Tokenizer(format!(
                "{}: special token {} is not among the tokens",
                folder.display(),
                printable(text.as_bytes())
            ))
        })
    };
    // A special token is named by its text, or else by its id.
    let by_text = |name: &str| -> Result<Option<u32>> {
        let token = about.get(name);
        let text = token.and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
        text.map(id_of).transpose()
    };
    let by_id = |name: &str| -> Result<Vec<u32>> {
        let Some((from, ids)) =
            [&generation, config].into_iter().find_map(|from| Some((from, from.get(name)?)))
        else {
            return Ok(Vec::new());
        };
        let ids = match ids {
            Value::Array(ids) => &ids[..],
            one => std::slice::from_ref(one),
        };
        let id = |id: &Value| {
            let id = id
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .filter(|&id| (id as usize) < tokens.texts.len());
            id.ok_or_else(|| from.missing(name, "ids of tokens"))
        };
        ids.iter().map(id).collect()
    };
    let template = template(json)?;
    let (first, last) = (template.first.map(id_of).transpose()?, template.last.map(id_of).transpose()?);
    let bos = match by_text("bos_token")? {
        Some(bos) => Some(bos),
        None => by_id("bos_token_id")?.first().copied().or(first),
    };
    let ends = by_id("eos_token_id")?;
    let mut eos = by_text("eos_token")?.or(ends.first().copied()).or(last);
    if task == Task::Embed {
        // What ends an answer in a chat does not end a text.
        eos = last.or(eos);
    }
    let unknown = json.object("model")?;
    let unknown = unknown.as_ref().map(self::unknown).transpose()?.flatten();
    let mut ids = vec![
        ("bos", bos),
        ("eos", eos),
        ("unknown", unknown.map(id_of).transpose()?),
        ("padding", by_text("pad_token")?),
    ];
    if task != Task::Generate {
        ids.push(("mask", by_text("mask_token")?));
    }
    // GGUF has two more keys for tokens that end a text.
    let mut others = ends.iter().copied().filter(|&id| Some(id) != eos);
    ids.extend(["eot", "eom"].map(|name| (name, others.next())));
    if others.next().is_some() {
        return Err(generation.missing("eos_token_id", "at most three tokens"));
    }
    for (name, id) in ids {
        if let Some(id) = id {
            w.entry(&format!("tokenizer.ggml.{name}_token_id"), id)?;
        }
    }
    for (key, asked, id, token) in [("add_bos_token", first, bos, "bos"), ("add_eos_token", last, eos, "eos")]
    {
        let adds = about.bool(key)?.unwrap_or(asked.is_some());
        if adds && (id.is_none() || asked.is_some_and(|asked| Some(asked) != id)) {
            let expected = format!("the {token} token of tokenizer_config.json at its end of a text");
            return Err(json.missing("post_processor", &expected));
        }
        w.entry(&format!("tokenizer.ggml.{key}"), adds)?;
    }
    if task != Task::Generate {
        match template.separator {
            Separator::None => w.entry("tokenizer.ggml.add_sep_token", false)?,
            Separator::Token(text) => {
                w.entry("tokenizer.ggml.seperator_token_id", id_of(text)?)?;
                w.entry("tokenizer.ggml.add_sep_token", true)?;
            }
            Separator::Unknown if task == Task::Rank => {
                let expected = "the end of a text, and a separator at most, between two texts";
                return Err(json.missing("post_processor", expected));
            }
            Separator::Unknown => {}
        }
    }
    match chat_template(folder, &about)? {
        Some(template) => w.entry("tokenizer.chat_template", &template[..]),
        None => Ok(()),
    }
}

/// What the post-processor adds to texts.
#[derive(Default)]
struct Template<'a> {
    /// The tokens before and after a text.
    first: Option<&'a str>,
    last: Option<&'a str>,
    /// What stands between two texts, behind the end of the first.
    separator: Separator<'a>,
}

#[derive(Default)]
enum Separator<'a> {
    #[default]
    Unknown,
    None,
    Token(&'a str),
}

/// Returns what the post-processor adds.
fn template(json: &Json) -> Result<Template<'_>> {
    let mut found = Template::default();
    let Some(post) = json.get("post_processor") else { return Ok(found) };
    let steps = match post.get("processors").and_then(Value::as_array) {
        Some(steps) => &steps[..],
        None => std::slice::from_ref(post),
    };
    for step in steps {
        let token = |key: &str| step.pointer(key).and_then(Value::as_str);
        let wrong = || json.wrong("post_processor", "a text with a token at each end at most", step);
        found = match step.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => continue,
            Some("TemplateProcessing") => pieces_of(step).ok_or_else(wrong)?,
            Some(kind @ ("RobertaProcessing" | "BertProcessing")) => {
                let (first, last) = (token("/cls/0").ok_or_else(wrong)?, token("/sep/0").ok_or_else(wrong)?);
                let separator =
                    if kind == "BertProcessing" { Separator::None } else { Separator::Token(last) };
                Template { first: Some(first), last: Some(last), separator }
            }
            _ => return Err(wrong()),
        };
    }
    Ok(found)
}

/// Whether the post-processor has one token before a text, and another behind each text, alone or in pairs.
pub(super) fn is_of_bert(json: &Json, first: &str, last: &str) -> Result<bool> {
    let found = template(json)?;
    let ends = (found.first, found.last) == (Some(first), Some(last));
    Ok(ends && matches!(found.separator, Separator::None))
}

/// The pieces of a template, if it has at most a token at each end of a text.
fn pieces_of(step: &Value) -> Option<Template<'_>> {
    let list = |key: &str| step.get(key).and_then(Value::as_array).map_or(&[][..], |pieces| &pieces[..]);
    fn token(piece: &Value) -> Option<&str> {
        piece.pointer("/SpecialToken/id").and_then(Value::as_str)
    }
    let is = |piece: &Value, id: &str| piece.pointer("/Sequence/id").is_some_and(|it| it == id);
    let (first, last) = match list("single") {
        [text] if is(text, "A") => (None, None),
        [first, text] if is(text, "A") => (token(first), None),
        [text, last] if is(text, "A") => (None, token(last)),
        [first, text, last] if is(text, "A") => (token(first), token(last)),
        _ => return None,
    };
    // A pair begins like a single text.
    let between = match (list("pair"), first, last) {
        ([begin, a, end, rest @ .., b, stop], Some(_), Some(_))
            if token(begin) == first
                && token(end) == last
                && token(stop) == last
                && is(a, "A")
                && is(b, "B") =>
        {
            Some(rest)
        }
        _ => None,
    };
    let separator = match between {
        Some([]) => Separator::None,
        Some([one]) => token(one).map_or(Separator::Unknown, Separator::Token),
        _ => Separator::Unknown,
    };
    Some(Template { first, last, separator })
}

/// Returns the chat template: from its own file, or from tokenizer_config.json, where it may be the default
/// of several.
fn chat_template(folder: &Path, about: &Json) -> Result<Option<String>> {
    if has(folder, "chat_template.jinja") {
        return Ok(Some(read_text(folder, "chat_template.jinja")?));
    }
    let text = |template: &Value| template.as_str().map(str::to_owned);
    match about.get("chat_template") {
        None => Ok(None),
        Some(Value::Array(templates)) => {
            let mut named =
                templates.iter().filter(|named| named.get("name").is_some_and(|name| name == "default"));
            let default = named.next().and_then(|named| text(named.get("template")?));
            default.map(Some).ok_or_else(|| about.wrong("chat_template", "one that is named default", "none"))
        }
        Some(template) => {
            text(template).map(Some).ok_or_else(|| about.missing("chat_template", "a text or a list"))
        }
    }
}

//! Converts vocabularies of the library `tokenizers` to GGUF keys: tokenizer.json, or else `tokenizer.model`, and the special tokens of
//! tokenizer_config.json and generation_config.json. Supports byte-level BPE and SentencePiece BPE.

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

/// Writes a folder's vocabulary and chat template. Returns warnings about settings that GGUF cannot express.
pub(super) fn write(folder: &Path, config: &Json, w: &mut Writer) -> Result<Vec<String>> {
    let is_pieces = !has(folder, "tokenizer.json") && has(folder, pieces::FILE);
    let (json, pieces) = match is_pieces {
        true => {
            let Pieces { json, scores, unused } = pieces::read(folder)?;
            (json, Some((scores, unused)))
        }
        false => (Json::open(folder, "tokenizer.json")?, None),
    };
    let model = json.object("model")?.ok_or_else(|| json.missing("model", "an object"))?;
    let kind = model.str("type")?;
    if kind != "BPE" {
        return Err(model.wrong("type", "BPE", kind));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if let Some(affix) = model.get(key).filter(|affix| **affix != "") {
            return Err(model.wrong(key, "none", affix));
        }
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
    special(folder, config, &json, &tokens, w)?;
    let mut left_out = Vec::new();
    // This is NFC: `pre_tokenizer` rejects all others. SentencePiece's normaliser is converted.
    if !from_bytes && json.get("normalizer").is_some() {
        left_out.push(
            "tokenizer.json: key `normalizer` is left out: texts are taken as they are, not in the normal form NFC"
                .to_owned(),
        );
    }
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
    Ok(left_out)
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
    let vocabulary = model.get("vocab").and_then(Value::as_object);
    let unknown = model.get("unk_token").and_then(Value::as_str);
    for (text, id) in vocabulary.ok_or_else(|| model.missing("vocab", "an object"))? {
        let place = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let Some((place, slot)) = place.and_then(|place| Some((place, texts.get_mut(place)?))) else {
            return Err(model.wrong("vocab", &format!("ids below {rows}, the rows of the embedding"), id));
        };
        if let Some(other) = slot.replace(text.clone()) {
            return Err(model.wrong(
                "vocab",
                "one text for each id",
                format!("`{other}` and `{text}` for {id}"),
            ));
        }
        kinds[place] = match () {
            () if unknown == Some(text.as_str()) => UNKNOWN,
            () if space_prefix.is_some() && is_byte(text) => BYTE,
            () => NORMAL,
        };
        ids.insert(text.clone(), place as u32);
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
fn special(folder: &Path, config: &Json, json: &Json, tokens: &Tokens, w: &mut Writer) -> Result<()> {
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
    let (first, last) = template(json)?;
    let (first, last) = (first.map(id_of).transpose()?, last.map(id_of).transpose()?);
    let bos = match by_text("bos_token")? {
        Some(bos) => Some(bos),
        None => by_id("bos_token_id")?.first().copied().or(first),
    };
    let ends = by_id("eos_token_id")?;
    let eos = by_text("eos_token")?.or(ends.first().copied()).or(last);
    let unknown = json.value.pointer("/model/unk_token").and_then(Value::as_str);
    let mut ids = vec![
        ("bos", bos),
        ("eos", eos),
        ("unknown", unknown.map(id_of).transpose()?),
        ("padding", by_text("pad_token")?),
    ];
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
    match chat_template(folder, &about)? {
        Some(template) => w.entry("tokenizer.chat_template", &template[..]),
        None => Ok(()),
    }
}

/// Returns the texts of the tokens that the post-processor adds before and after a text.
fn template<'a>(json: &'a Json) -> Result<(Option<&'a str>, Option<&'a str>)> {
    let Some(post) = json.get("post_processor") else { return Ok((None, None)) };
    let steps = match post.get("processors").and_then(Value::as_array) {
        Some(steps) => &steps[..],
        None => std::slice::from_ref(post),
    };
    let token = |piece: &'a Value| piece.pointer("/SpecialToken/id").and_then(Value::as_str);
    let is_text = |piece: &Value| piece.get("Sequence").is_some();
    let mut found = (None, None);
    for step in steps {
        let pieces = step.get("single").and_then(Value::as_array).map_or(&[][..], |pieces| &pieces[..]);
        found = match (step.get("type").and_then(Value::as_str), pieces) {
            (Some("ByteLevel"), _) => continue,
            (Some("TemplateProcessing"), [text]) if is_text(text) => (None, None),
            (Some("TemplateProcessing"), [first, text]) if is_text(text) => (token(first), None),
            (Some("TemplateProcessing"), [text, last]) if is_text(text) => (None, token(last)),
            (Some("TemplateProcessing"), [first, text, last]) if is_text(text) => (token(first), token(last)),
            _ => return Err(json.wrong("post_processor", "a text with a token at each end at most", step)),
        };
    }
    Ok(found)
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

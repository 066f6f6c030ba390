//! A vocabulary's tokens: texts in one allocation, and a table from text to id.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::TokenKind;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::memory::{none_left, reserved, zeroed};

/// U+2581, which stands for a space.
pub(super) const SPACE: &str = "\u{2581}";

/// Maximum tokens of a vocabulary.
pub(crate) const MAX_TOKENS: usize = 1 << 22;

/// Maximum bytes of a token's text, and of all texts. The longest published texts are some hundred spaces.
pub(crate) const MAX_TOKEN_BYTES: usize = 1 << 10;
const MAX_BYTES: usize = 1 << 26;

/// Tokens by id and by text.
pub(super) struct Vocabulary {
    /// All texts, one after the other.
    texts: Vec<u8>,
    /// Where each text ends.
    ends: Vec<usize>,
    scores: Vec<f32>,
    kinds: Vec<TokenKind>,
    /// Ids by text. The hasher is keyed, because the files are untrusted.
    ids: HashTable<u32>,
    hasher: RandomState,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocabulary({} tokens)", self.len())
    }
}

/// Name of a vocabulary's memory in errors.
const WHAT: &str = "the vocabulary";

impl Vocabulary {
    /// Reads and checks `tokenizer.ggml.tokens`, `.scores` and `.token_type`.
    pub(super) fn read(gguf: &Gguf) -> Result<Vocabulary> {
        let missing = || Error::Tokenizer("tokenizer.ggml.tokens is missing".into());
        let texts = gguf.optional_strings("tokenizer.ggml.tokens")?.ok_or_else(missing)?;
        let count = texts.len();
        if !(1..=MAX_TOKENS).contains(&count) {
            let message = format!("tokenizer.ggml.tokens: expected 1 to {MAX_TOKENS} tokens, got {count}");
            return Err(Error::Tokenizer(message));
        }
        // A padded embedding may have more rows than the vocabulary has tokens, never fewer.
        let rows = gguf.tensor("token_embd.weight").and_then(|t| t.record.dims.get(1).copied());
        if let Some(rows) = rows
            && rows < count as u64
        {
            let message =
                format!("tokenizer.ggml.tokens: expected at most {rows}, the embedding's rows, got {count}");
            return Err(Error::Tokenizer(message));
        }
        let same = |key: &str, len: usize| {
            if len == count {
                return Ok(());
            }
            Err(Error::Tokenizer(format!(
                "tokenizer.ggml.{key}: expected {count} values, one per token, got {len}"
            )))
        };
        let scores = match gguf.optional_f32s("tokenizer.ggml.scores")? {
            Some(scores) => scores,
            None => zeroed(count as u64, WHAT)?,
        };
        same("scores", scores.len())?;
        if scores.iter().any(|s| s.is_nan()) {
            return Err(Error::Tokenizer("tokenizer.ggml.scores: expected numbers, got NaN".into()));
        }
        let kinds = match gguf.optional_integers("tokenizer.ggml.token_type")? {
            None => vec![TokenKind::Normal; count],
            Some(kinds) => {
                kinds.enumerate().map(|(i, kind)| TokenKind::read(i, kind)).collect::<Result<_>>()?
            }
        };
        same("token_type", kinds.len())?;
        let mut vocabulary = Vocabulary {
            texts: reserved(
                texts.iter().map(|text| text.len() as u64).sum::<u64>().min(MAX_BYTES as u64),
                WHAT,
            )?,
            ends: reserved(count as u64, WHAT)?,
            scores,
            kinds,
            ids: HashTable::new(),
            hasher: RandomState::new(),
        };
        for (id, text) in texts.iter().enumerate() {
            let wrong = |what: &str, max: usize, got: usize| {
                Error::Tokenizer(format!(
                    "tokenizer.ggml.tokens{what}: expected at most {max} bytes, got {got}"
                ))
            };
            if text.len() > MAX_TOKEN_BYTES {
                return Err(wrong(&format!("[{id}]"), MAX_TOKEN_BYTES, text.len()));
            }
            if vocabulary.texts.len() + text.len() > MAX_BYTES {
                return Err(wrong("", MAX_BYTES, vocabulary.texts.len() + text.len()));
            }
            vocabulary.texts.extend_from_slice(text);
            vocabulary.ends.push(vocabulary.texts.len());
        }
        let ids = vocabulary.ids.try_reserve(count, |_| 0);
        ids.map_err(|_| none_left::<u32>(count as u64, WHAT))?;
        for id in 0..count as u32 {
            vocabulary.index(id);
        }
        Ok(vocabulary)
    }

    fn index(&mut self, id: u32) {
        let Vocabulary { texts, ends, ids, hasher, .. } = self;
        let text = |id: u32| text(texts, ends, id);
        let hash = hasher.hash_one(text(id));
        let entry = ids.entry(hash, |&other| text(other) == text(id), |&other| hasher.hash_one(text(other)));
        // If several tokens have the same text, the last one counts, as in llama.cpp.
        *entry.or_insert(id).get_mut() = id;
    }

    /// Returns the number of tokens.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// A token's text as the file has it; empty if there is no such token.
    pub(super) fn text(&self, id: u32) -> &[u8] {
        text(&self.texts, &self.ends, id)
    }

    /// The token of a text.
    pub(super) fn id(&self, text: &[u8]) -> Option<u32> {
        self.ids.find(self.hasher.hash_one(text), |&id| self.text(id) == text).copied()
    }

    /// Overrides the type of a token.
    pub(super) fn set_kind(&mut self, id: u32, kind: TokenKind) {
        if let Some(place) = self.kinds.get_mut(id as usize) {
            *place = kind;
        }
    }

    /// The type of a token.
    pub(super) fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// A token's score.
    pub(super) fn score(&self, id: u32) -> f32 {
        self.scores.get(id as usize).copied().unwrap_or(0.0)
    }

    /// All ids.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + use<> {
        0..self.len() as u32
    }
}

fn text<'a>(texts: &'a [u8], ends: &[usize], id: u32) -> &'a [u8] {
    let i = id as usize;
    let start = if i == 0 { 0 } else { ends.get(i - 1).copied().unwrap_or(0) };
    ends.get(i).and_then(|&end| texts.get(start..end)).unwrap_or(&[])
}

/// Appends a token's text, with U+2581 as a space.
pub(super) fn unescape(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        if let Some(after_space) = rest.strip_prefix(SPACE.as_bytes()) {
            out.push(b' ');
            rest = after_space;
        } else {
            out.push(first);
            rest = after;
        }
    }
}

//! Unigram vocabularies (Kudo 2018) of SentencePiece: a text is encoded as the tokens whose log-probabilities
//! have the greatest sum.

use super::TokenKind;
use super::trie::Trie;
use super::vocabulary::{SPACE, Vocabulary};
use crate::error::{Error, Result};

/// Log-probability of an unknown character below that of the rarest token.
const UNKNOWN_PENALTY: f64 = 10.0;

/// Maximum bytes of a text that a charsmap replaces, and of its replacement. Published charsmaps have at most
/// 33.
const MAX_REPLACED_BYTES: usize = 64;

#[derive(Debug)]
pub(super) struct Unigram {
    unknown: u32,
    pub(super) add_space_prefix: bool,
    /// Whether to trim spaces at the ends and collapse runs of spaces.
    pub(super) remove_extra_spaces: bool,
    replacements: Option<Replacements>,
    unknown_score: f64,
    /// The tokens that encode texts.
    tokens: Trie,
}

/// The best encoding of a text up to a byte: its score, its last token, and that token's bytes.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    len: u32,
    id: u32,
}

impl Unigram {
    pub(super) fn new(
        vocabulary: &Vocabulary,
        unknown: u32,
        add_space_prefix: bool,
        remove_extra_spaces: bool,
        charsmap: Option<&[u8]>,
    ) -> Result<Unigram> {
        let normal = vocabulary.iter().filter(|&id| vocabulary.kind(id) == Some(TokenKind::Normal));
        let lowest = normal.map(|id| f64::from(vocabulary.score(id))).fold(0.0, f64::min);
        let spells = |id: u32| {
            use TokenKind::{Normal, Unused, UserDefined};
            matches!(vocabulary.kind(id), Some(Normal | Unused | UserDefined))
                && vocabulary.id(vocabulary.text(id)) == Some(id)
        };
        Ok(Unigram {
            unknown,
            add_space_prefix,
            remove_extra_spaces,
            replacements: charsmap.map(Replacements::new).transpose()?,
            unknown_score: lowest - UNKNOWN_PENALTY,
            tokens: Trie::new(vocabulary, vocabulary.iter().filter(|&id| spells(id))),
        })
    }

    pub(super) fn encode(&self, text: &str, first: bool, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let text = self.normalise(text, first);
        // No bytes: no encoding ends here, except at the start.
        let mut best = vec![Best { score: 0.0, len: 0, id: 0 }; text.len() + 1];
        for start in 0..text.len() {
            let from = best[start];
            if from.len == 0 && start > 0 {
                continue;
            }
            // A token that starts later and ends at the same byte is shorter: on equal scores, the longer
            // last token stays.
            let mut improve = |len: usize, id: u32, score: f64| {
                let place = &mut best[start + len];
                if place.len == 0 || from.score + score > place.score {
                    *place = Best { score: from.score + score, len: len as u32, id };
                }
            };
            // A token may end inside a character.
            let character = text.get(start..).and_then(|text| text.chars().next()).map_or(0, char::len_utf8);
            let mut known = false;
            self.tokens.prefixes(vocabulary, &text.as_bytes()[start..], &mut |len, id| {
                known |= len == character;
                let defined = vocabulary.kind(id) == Some(TokenKind::UserDefined);
                improve(len, id, if defined { 0.0 } else { f64::from(vocabulary.score(id)) });
            });
            if !known && character > 0 {
                improve(character, self.unknown, self.unknown_score);
            }
        }
        let before = out.len();
        let mut end = text.len();
        while let Some(last) = best.get(end).filter(|last| last.len > 0) {
            // Consecutive unknown characters are one unknown token.
            if last.id != self.unknown || out.len() == before || out.last() != Some(&self.unknown) {
                out.push(last.id);
            }
            end -= last.len as usize;
        }
        out[before..].reverse();
    }

    /// Normalises a text: replaces characters, removes spaces and writes them as U+2581.
    fn normalise(&self, text: &str, first: bool) -> String {
        let mut replaced = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let (len, by) = match self.replacements.as_ref().and_then(|r| r.longest(rest)) {
                Some((len, by)) => (len, by),
                None => (c.len_utf8(), &rest[..c.len_utf8()]),
            };
            replaced.push_str(by);
            rest = &rest[len..];
        }
        let mut text = replaced.as_str();
        if self.remove_extra_spaces {
            text = text.trim_start_matches(' ');
        }
        let mut out = String::with_capacity(text.len() + SPACE.len());
        if self.add_space_prefix && first && !text.is_empty() {
            out.push_str(SPACE);
        }
        let mut before = None;
        for c in text.chars() {
            match c {
                ' ' if self.remove_extra_spaces && before == Some(' ') => {}
                ' ' => out.push_str(SPACE),
                c => out.push(c),
            }
            before = Some(c);
        }
        if self.remove_extra_spaces {
            out.truncate(out.trim_end_matches(SPACE).len());
        }
        out
    }
}

/// SentencePiece's `precompiled_charsmap`: the bytes of a double array (Aoe 1989, as laid out by
/// Darts-clone), then texts that end in NUL.
#[derive(Debug)]
struct Replacements {
    units: Vec<u32>,
    texts: String,
}

impl Replacements {
    fn new(bytes: &[u8]) -> Result<Replacements> {
        let wrong = |why: &str| Error::Tokenizer(format!("tokenizer.ggml.precompiled_charsmap: {why}"));
        let (size, rest) =
            bytes.split_first_chunk::<4>().ok_or_else(|| wrong("expected a size of 4 bytes"))?;
        let parts = rest.split_at_checked(u32::from_le_bytes(*size) as usize);
        let (units, texts) = parts.ok_or_else(|| wrong("the array does not end inside"))?;
        let (units, []) = units.as_chunks::<4>() else { return Err(wrong("expected units of 4 bytes")) };
        let texts = std::str::from_utf8(texts).map_err(|_| wrong("expected texts in UTF-8"))?;
        let units = units.iter().map(|&unit| u32::from_le_bytes(unit)).collect();
        let replacements = Replacements { units, texts: texts.into() };
        for (i, &unit) in replacements.units.iter().enumerate() {
            if unit >> 31 == 0 && has_value(unit) && replacements.value(i, unit).is_none() {
                let max = MAX_REPLACED_BYTES;
                return Err(wrong(&format!("unit {i} does not lead to a text of at most {max} bytes")));
            }
        }
        Ok(replacements)
    }

    /// Returns the longest prefix of `text` that has a replacement: its length, and the replacement.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let mut at = offset(*self.units.first()?);
        let mut longest = None;
        for (i, byte) in text.bytes().enumerate().take(MAX_REPLACED_BYTES) {
            let child = at ^ usize::from(byte);
            let Some(&unit) = self.units.get(child) else { break };
            // Values have the highest bit set, labels do not.
            if unit & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            if has_value(unit) && text.is_char_boundary(i + 1) {
                longest = self.value(child, unit).map(|by| (i + 1, by)).or(longest);
            }
            at = child ^ offset(unit);
        }
        longest
    }

    /// Returns the text of a unit, if it has one.
    fn value(&self, at: usize, unit: u32) -> Option<&str> {
        let leaf = self.units.get(at ^ offset(unit))?;
        let start = (leaf & !(1 << 31)) as usize;
        let text = self.texts.as_bytes().get(start..)?;
        let end = text.iter().take(MAX_REPLACED_BYTES + 1).position(|&byte| byte == 0)?;
        self.texts.get(start..start + end)
    }
}

fn has_value(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

/// Returns a unit's offset, which XORed with its index gives its children; large ones are in units of 256.
fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

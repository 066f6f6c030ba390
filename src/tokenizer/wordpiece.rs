//! WordPiece vocabularies (Schuster & Nakajima 2012; Devlin et al. 2018): words are cut greedily into the longest pieces that
//! the vocabulary has. A word begins with U+2581; pieces that continue one are without it.

use fancy_regex::Regex;
use unicode_normalization::UnicodeNormalization;

use super::vocabulary::{SPACE, Vocabulary};
use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) struct WordPiece {
    unknown: u32,
    lowercase: bool,
    strip_accents: bool,
    /// What is left out of a text: control characters, but none that is not assigned.
    dropped: Regex,
    /// Words, and characters that are words by themselves.
    words: Regex,
    /// Bytes of the longest token.
    longest: usize,
}

/// Other characters than letters and digits that are words by themselves: punctuation, ASCII symbols, CJK ideographs.
const ALONE: &str = concat!(
    r"\p{P}$+<=>^`|~\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}",
    r"\x{2A700}-\x{2B81F}\x{2B920}-\x{2CEAF}\x{2F800}-\x{2FA1F}"
);

impl WordPiece {
    pub(super) fn new(
        vocabulary: &Vocabulary,
        unknown: u32,
        lowercase: bool,
        strip_accents: bool,
    ) -> Result<WordPiece> {
        let regex = |pattern: &str| {
            Regex::new(pattern).map_err(|e| Error::Tokenizer(format!("pattern of words `{pattern}`: {e}")))
        };
        let accents = if strip_accents { r"|\p{Mn}" } else { "" };
        Ok(WordPiece {
            unknown,
            lowercase,
            strip_accents,
            dropped: regex(&format!(r"[\p{{Cc}}\p{{Cf}}\p{{Co}}\x{{FFFD}}--\s]{accents}"))?,
            words: regex(&format!(r"[{ALONE}]|[^\s{ALONE}]+"))?,
            longest: vocabulary.iter().map(|id| vocabulary.text(id).len()).max().unwrap_or(0),
        })
    }

    pub(super) fn encode(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let mut text: String = if self.strip_accents { text.nfd().collect() } else { text.into() };
        text = self.dropped.replace_all(&text, "").into_owned();
        if self.lowercase {
            // Each by itself: whether a sigma ends a word plays no part.
            text = text.chars().flat_map(char::to_lowercase).collect();
        }
        for word in self.words.find_iter(&text).map_while(|found| found.ok()) {
            self.encode_word(&[SPACE, word.as_str()].concat(), vocabulary, out);
        }
    }

    /// The longest piece, then the longest that continues it; one unknown token if at some place there is none.
    fn encode_word(&self, word: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let (before, mut rest) = (out.len(), word.as_bytes());
        while !rest.is_empty() {
            let lengths = (1..=rest.len().min(self.longest)).rev();
            let mut pieces = lengths.map(|len| (len, vocabulary.id(&rest[..len])));
            let Some((len, Some(id))) = pieces.find(|(_, id)| id.is_some()) else {
                out.truncate(before);
                out.push(self.unknown);
                return;
            };
            out.push(id);
            rest = &rest[len..];
        }
    }
}

//! WordPiece vocabularies (Schuster & Nakajima 2012; Devlin et al. 2018): words are cut greedily into the longest pieces that
//! the vocabulary has. A word begins with U+2581; pieces that continue one are without it.

use regex_automata::meta::Regex;
use unicode_normalization::UnicodeNormalization;

use super::trie::Trie;
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
    /// Most characters of a word; a longer one is unknown.
    max_chars: usize,
    pieces: Trie,
}

/// Most characters of a word unless a file says otherwise, as in the published tokenizers.
pub(super) const MAX_CHARS: u32 = 100;

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
        max_chars: u32,
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
            max_chars: max_chars as usize,
            // Of tokens with one text the last, as everywhere.
            pieces: Trie::new(
                vocabulary,
                vocabulary.iter().filter(|&id| vocabulary.id(vocabulary.text(id)) == Some(id)),
            ),
        })
    }

    pub(super) fn encode(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let mut text: String = if self.strip_accents { text.nfd().collect() } else { text.into() };
        let (mut kept, mut end) = (String::with_capacity(text.len()), 0);
        for found in self.dropped.find_iter(&text) {
            kept.push_str(&text[end..found.start()]);
            end = found.end();
        }
        kept.push_str(&text[end..]);
        text = kept;
        if self.lowercase {
            // Each by itself: whether a sigma ends a word plays no part.
            text = text.chars().flat_map(char::to_lowercase).collect();
        }
        for found in self.words.find_iter(&text) {
            self.encode_word(&[SPACE, &text[found.range()]].concat(), vocabulary, out);
        }
    }

    /// The longest piece, then the longest that continues it; one unknown token if at some place there is
    /// none, or if the word is too long.
    fn encode_word(&self, word: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let (before, mut rest) = (out.len(), word.as_bytes());
        let too_long = word.chars().skip(1).nth(self.max_chars).is_some();
        while !rest.is_empty() {
            let longest = self.pieces.longest(vocabulary, rest).filter(|_| !too_long);
            let Some((len, id)) = longest else {
                out.truncate(before);
                out.push(self.unknown);
                return;
            };
            out.push(id);
            rest = &rest[len..];
        }
    }
}

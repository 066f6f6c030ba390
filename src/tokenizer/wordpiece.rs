//! WordPiece vocabularies (Schuster & Nakajima 2012; Devlin et al. 2018): words are split greedily into the
//! longest pieces in the vocabulary. The first piece of a word begins with U+2581, the others do not.

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
    /// Characters to remove from a text: control characters, except unassigned ones.
    dropped: Regex,
    /// Words, and single characters that are words.
    words: Regex,
    /// Maximum characters of a word; a longer one is unknown.
    max_chars: usize,
    pieces: Trie,
}

/// Default maximum characters of a word, as in the published tokenizers.
pub(super) const MAX_CHARS: u32 = 100;

/// Characters that are words by themselves: punctuation, ASCII symbols, CJK ideographs.
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
            // If several tokens have the same text, the last one counts.
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
            // Character by character: a sigma at the end of a word gets no special form.
            text = text.chars().flat_map(char::to_lowercase).collect();
        }
        for found in self.words.find_iter(&text) {
            self.encode_word(&[SPACE, &text[found.range()]].concat(), vocabulary, out);
        }
    }

    /// Encodes a word as the longest piece, then the longest that continues it, and so on; as one unknown
    /// token if there is no such piece, or if the word is too long.
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

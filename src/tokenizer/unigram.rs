//! Unigram vocabularies (Kudo 2018), as SentencePiece makes them: of all ways to spell a text in tokens the one whose
//! log-probabilities have the greatest sum.

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};

use super::TokenKind;
use super::vocabulary::{SPACE, Vocabulary};
use crate::error::{Error, Result};

/// How much less probable than the rarest token an unknown character is, in log-probability.
const UNKNOWN_PENALTY: f64 = 10.0;

#[derive(Debug)]
pub(super) struct Unigram {
    unknown: u32,
    pub(super) add_space_prefix: bool,
    /// Whether spaces at the ends are taken away, and runs of them are one.
    pub(super) remove_extra_spaces: bool,
    replacements: Option<Replacements>,
    unknown_score: f64,
    /// Finds all tokens in a text.
    finder: AhoCorasick,
    /// The token and its score for each pattern of the finder.
    tokens: Vec<(u32, f64)>,
}

/// The best spelling of a text up to some byte: its score, and its last token with where that starts.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    start: usize,
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
        let mut tokens = Vec::new();
        let mut lowest = 0f64;
        for id in vocabulary.iter() {
            let score = match vocabulary.kind(id) {
                Some(TokenKind::Normal) => f64::from(vocabulary.score(id)),
                Some(TokenKind::Unused) => f64::from(vocabulary.score(id)),
                Some(TokenKind::UserDefined) => 0.0,
                _ => continue,
            };
            if vocabulary.kind(id) == Some(TokenKind::Normal) {
                lowest = lowest.min(score);
            }
            if !vocabulary.text(id).is_empty() && vocabulary.id(vocabulary.text(id)) == Some(id) {
                tokens.push((id, score));
            }
        }
        let texts = tokens.iter().map(|&(id, _)| vocabulary.text(id));
        // The kind whose size stays in proportion to the texts, however long they are.
        let kind = Some(AhoCorasickKind::ContiguousNFA);
        let finder = AhoCorasick::builder().match_kind(MatchKind::Standard).kind(kind).build(texts);
        Ok(Unigram {
            unknown,
            add_space_prefix,
            remove_extra_spaces,
            replacements: charsmap.map(Replacements::new).transpose()?,
            unknown_score: lowest - UNKNOWN_PENALTY,
            finder: finder.map_err(|e| Error::Tokenizer(format!("tokenizer.ggml.tokens: {e}")))?,
            tokens,
        })
    }

    pub(super) fn encode(&self, text: &str, first: bool, out: &mut Vec<u32>) {
        let text = self.normalise(text, first);
        let mut best: Vec<Option<Best>> = vec![None; text.len() + 1];
        if let Some(start) = best.first_mut() {
            *start = Some(Best { score: 0.0, start: 0, id: self.unknown });
        }
        // Tokens in order of where they end, longer ones first: of equal sums the one with the longer last token stays.
        let mut found = self.finder.find_overlapping_iter(&text).peekable();
        for (start, c) in text.char_indices() {
            let end = start + c.len_utf8();
            let mut known = false;
            while let Some(m) = found.next_if(|m| m.end() <= end) {
                let (id, score) = self.tokens[m.pattern().as_usize()];
                known |= m.range() == (start..end);
                improve(&mut best, m.start(), m.end(), id, score);
            }
            if !known {
                improve(&mut best, start, end, self.unknown, self.unknown_score);
            }
        }
        let before = out.len();
        let mut end = text.len();
        while let Some(Some(last)) = best.get(end).filter(|_| end > 0) {
            // Unknown characters in a row are one unknown token.
            if last.id != self.unknown || out.len() == before || out.last() != Some(&self.unknown) {
                out.push(last.id);
            }
            end = last.start;
        }
        out[before..].reverse();
    }

    /// Characters replaced, spaces removed and written as U+2581.
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

fn improve(best: &mut [Option<Best>], start: usize, end: usize, id: u32, score: f64) {
    let Some(score) = best.get(start).copied().flatten().map(|b| b.score + score) else { return };
    if let Some(place) = best.get_mut(end)
        && place.is_none_or(|b| score > b.score)
    {
        *place = Some(Best { score, start, id });
    }
}

/// SentencePiece's `precompiled_charsmap`: the bytes of a double array (Aoe 1989, as laid out by Darts-clone), then texts that
/// end in NUL.
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
                return Err(wrong(&format!("unit {i} leads to no text")));
            }
        }
        Ok(replacements)
    }

    /// The longest beginning of `text` that is to be replaced: its length, and by what.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let mut at = offset(*self.units.first()?);
        let mut longest = None;
        for (i, byte) in text.bytes().enumerate() {
            let child = at ^ usize::from(byte);
            let Some(&unit) = self.units.get(child) else { break };
            // A value has the highest bit set, which no label has.
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

    /// The text of a unit that has one.
    fn value(&self, at: usize, unit: u32) -> Option<&str> {
        let leaf = self.units.get(at ^ offset(unit))?;
        let text = self.texts.get((leaf & !(1 << 31)) as usize..)?;
        text.split_once('\0').map(|(text, _)| text)
    }
}

fn has_value(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

/// What a unit's place is XORed with to find its children; large ones are stored in units of 256.
fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

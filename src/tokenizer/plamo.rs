//! The tokenizer of PLaMo 2 and 3 (Preferred Networks 2024): a text is encoded as the tokens whose scores have the greatest sum. Scores
//! are integers, and characters that the vocabulary lacks are bytes.

use super::TokenKind;
use super::spm::byte_token;
use super::trie::Trie;
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};

/// Scores count in parts of this.
const PARTS: f64 = 1e4;
/// The cost of a character that is bytes.
const UNKNOWN_COST: i64 = 10_000_000;
/// Tokens of at least this cost encode nothing.
const NEVER: i64 = 2 * UNKNOWN_COST;

#[derive(Debug)]
pub(super) struct Plamo {
    bytes: Box<[u32; 256]>,
    /// The tokens that encode texts.
    tokens: Trie,
}

/// The cheapest encoding of a text from a byte on: its cost, its first token, none for a character that is bytes, and that token's bytes.
#[derive(Clone, Copy)]
struct Best {
    cost: i64,
    id: Option<u32>,
    len: u32,
}

impl Plamo {
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Plamo> {
        let mut bytes = Box::new([0; 256]);
        for (byte, id) in (0..=255).zip(bytes.iter_mut()) {
            let missing = || Error::Tokenizer(format!("the vocabulary lacks the byte token <0x{byte:02X}>"));
            *id = byte_token(vocabulary, byte).ok_or_else(missing)?;
        }
        let spells = |id: u32| {
            use TokenKind::{Normal, Unused, UserDefined};
            let kind = matches!(vocabulary.kind(id), Some(Normal | Unused | UserDefined));
            kind && cost(vocabulary, id).is_some_and(|cost| cost < NEVER)
        };
        let tokens = Trie::new(vocabulary, vocabulary.iter().filter(|&id| spells(id)));
        Ok(Plamo { bytes, tokens })
    }

    pub(super) fn encode(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut best = vec![Best { cost: 0, id: None, len: 0 }; text.len() + 1];
        for (start, character) in text.char_indices().rev() {
            let mut cheapest: Option<Best> = None;
            // The shortest comes first: of equal ones, the longest stays.
            self.tokens.prefixes(vocabulary, &text.as_bytes()[start..], &mut |len, id| {
                let Some(own) = cost(vocabulary, id) else { return };
                let cost = own + best[start + len].cost;
                if text.is_char_boundary(start + len) && cheapest.is_none_or(|best| cost <= best.cost) {
                    cheapest = Some(Best { cost, id: Some(id), len: len as u32 });
                }
            });
            let len = character.len_utf8();
            let unknown = Best { cost: UNKNOWN_COST + best[start + len].cost, id: None, len: len as u32 };
            best[start] = cheapest.filter(|known| known.cost <= unknown.cost).unwrap_or(unknown);
        }
        let mut rest = 0;
        while rest < text.len() {
            let Best { id, len, .. } = best[rest];
            let end = rest + len as usize;
            match id {
                Some(id) => out.push(id),
                None => out.extend(text.as_bytes()[rest..end].iter().map(|&byte| self.bytes[byte as usize])),
            }
            rest = end;
        }
    }
}

/// What a token costs: less its score, in parts.
fn cost(vocabulary: &Vocabulary, id: u32) -> Option<i64> {
    let score = vocabulary.score(id);
    // As in 32 bits, so that no sum of costs overflows.
    score.is_finite().then(|| -i64::from((f64::from(score) * PARTS).round() as i32))
}

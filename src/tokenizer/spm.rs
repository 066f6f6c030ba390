//! SentencePiece BPE: neighbours are merged in order of decreasing score (Kudo & Richardson 2018). Text that
//! the vocabulary lacks is encoded as byte tokens.

use std::collections::BinaryHeap;

use super::TokenKind;
use super::vocabulary::{SPACE, Vocabulary, unescape};
use crate::error::{Error, Result};
use crate::gguf::printable;

#[derive(Debug)]
pub(super) struct Spm {
    pub(super) add_space_prefix: bool,
    /// The token of each byte.
    bytes: Box<[Option<u32>; 256]>,
    unknown: Option<u32>,
}

/// A candidate merge; the greatest is applied first.
#[derive(PartialEq)]
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Eq for Merge {}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // The higher score, then the leftmost.
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A piece of the text; `prev` and `next` link the remaining pieces.
struct Symbol {
    start: usize,
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

impl Spm {
    pub(super) fn new(vocabulary: &Vocabulary, unknown: Option<u32>, add_space_prefix: bool) -> Result<Spm> {
        for id in vocabulary.iter().filter(|&id| vocabulary.kind(id) == Some(TokenKind::Byte)) {
            if byte_of(vocabulary.text(id)).is_none() {
                let text = printable(vocabulary.text(id));
                return Err(Error::Tokenizer(format!("byte token: expected <0x00> to <0xFF>, got {text}")));
            }
        }
        let bytes =
            std::array::from_fn(|b| byte_token(vocabulary, b as u8).or_else(|| vocabulary.id(&[b as u8])));
        Ok(Spm { add_space_prefix, bytes: Box::new(bytes), unknown })
    }

    pub(super) fn encode(&self, text: &str, first: bool, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + 3);
        if self.add_space_prefix && first {
            escaped.push_str(SPACE);
        }
        escaped.push_str(&text.replace(' ', SPACE));
        let mut symbols: Vec<Symbol> = Vec::new();
        for (start, c) in escaped.char_indices() {
            let i = symbols.len();
            symbols.push(Symbol { start, len: c.len_utf8(), prev: i.checked_sub(1), next: Some(i + 1) });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let candidate = |symbols: &[Symbol], left: usize, right: usize| {
            let len = symbols[left].len + symbols[right].len;
            let start = symbols[left].start;
            let id = vocabulary.id(&escaped.as_bytes()[start..start + len])?;
            Some(Merge { score: vocabulary.score(id), left, right, len })
        };
        let mut queue = BinaryHeap::new();
        for left in 1..symbols.len() {
            queue.extend(candidate(&symbols, left - 1, left));
        }
        while let Some(merge) = queue.pop() {
            let (left, right) = (merge.left, merge.right);
            // One of the two may have been merged with another neighbour meanwhile.
            if symbols[left].len == 0
                || symbols[right].len == 0
                || symbols[left].len + symbols[right].len != merge.len
            {
                continue;
            }
            symbols[left].len = merge.len;
            symbols[right].len = 0;
            let next = symbols[right].next;
            symbols[left].next = next;
            if let Some(next) = next {
                symbols[next].prev = Some(left);
                queue.extend(candidate(&symbols, left, next));
            }
            if let Some(prev) = symbols[left].prev {
                queue.extend(candidate(&symbols, prev, left));
            }
        }
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let bytes = &escaped.as_bytes()[symbol.start..symbol.start + symbol.len];
            match vocabulary.id(bytes) {
                Some(id) => out.push(id),
                None => out.extend(bytes.iter().filter_map(|&b| self.bytes[b as usize].or(self.unknown))),
            }
        }
    }

    pub(super) fn decode(&self, id: u32, text: &[u8], out: &mut Vec<u8>) {
        if let Some(b) = byte_of(text)
            && self.bytes[b as usize] == Some(id)
        {
            return out.push(b);
        }
        unescape(text, out);
    }
}

/// The token of a byte, like `<0x0A>`.
pub(super) fn byte_token(vocabulary: &Vocabulary, byte: u8) -> Option<u32> {
    vocabulary.id(format!("<0x{byte:02X}>").as_bytes())
}

/// The byte of a token like `<0x0A>`; exactly two upper- or lower-case hexadecimal digits.
pub(super) fn byte_of(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let [high, low] = digits else { return None };
    let digit = |d: &u8| (*d as char).to_digit(16);
    Some((digit(high)? * 16 + digit(low)?) as u8)
}

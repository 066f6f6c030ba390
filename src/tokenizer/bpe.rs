//! Byte-pair encoding (Sennrich et al. 2016): neighbours are merged in order of rank. At first they are a word's bytes,
//! written as printable characters (Radford et al. 2019), or, in Gemma 4, its characters.

use std::collections::{BinaryHeap, HashMap};

use super::pretokenize::Pretokenizer;
use super::spm::{byte_of, byte_token};
use super::vocabulary::{SPACE, Vocabulary, unescape};
use crate::error::{Error, Result};
use crate::gguf::{Strings, printable};

/// A pair of tokens, its rank and the merged token.
type Merges = HashMap<(u32, u32), (u32, u32)>;

#[derive(Debug)]
pub(super) struct Bpe {
    pre: Pretokenizer,
    merges: Merges,
    spelling: Spelling,
}

/// How a vocabulary spells words.
#[derive(Debug)]
enum Spelling {
    Bytes {
        /// The character that stands for each byte.
        chars: Box<[char; 256]>,
        /// The token of each byte's character.
        bytes: Box<[Option<u32>; 256]>,
        byte_of: HashMap<char, u8>,
    },
    /// As they are, but with U+2581 for spaces.
    Text {
        /// The token of each byte of characters that have none.
        bytes: Box<[Option<u32>; 256]>,
    },
}

impl Bpe {
    pub(super) fn new(pre: Pretokenizer, list: Strings<'_>, vocabulary: &Vocabulary) -> Result<Bpe> {
        let mut merges = HashMap::new();
        let mut joined = Vec::new();
        for (rank, merge) in list.iter().enumerate() {
            let bad = |why: &str| {
                Error::Tokenizer(format!("tokenizer.ggml.merges[{rank}] = {}: {why}", printable(merge)))
            };
            // The first part may begin with a space, but never is one.
            let space = merge.iter().skip(1).position(|&b| b == b' ').map(|i| i + 1);
            let parts = space.map(|i| (&merge[..i], &merge[i + 1..])).filter(|(_, right)| !right.is_empty());
            let (left, right) = parts.ok_or_else(|| bad("expected two parts"))?;
            joined.clear();
            joined.extend_from_slice(left);
            joined.extend_from_slice(right);
            let id = |text: &[u8]| vocabulary.id(text).ok_or_else(|| bad("a part is not in the vocabulary"));
            merges.entry((id(left)?, id(right)?)).or_insert((rank as u32, id(&joined)?));
        }
        let spelling = if pre.as_text {
            Spelling::Text { bytes: Box::new(std::array::from_fn(|b| byte_token(vocabulary, b as u8))) }
        } else {
            let chars = Box::new(byte_chars());
            let token = |b: usize| vocabulary.id(chars[b].encode_utf8(&mut [0; 4]).as_bytes());
            let bytes = Box::new(std::array::from_fn(token));
            let byte_of = chars.iter().enumerate().map(|(b, &c)| (c, b as u8)).collect();
            Spelling::Bytes { chars, bytes, byte_of }
        };
        Ok(Bpe { pre, merges, spelling })
    }

    /// Whether the vocabulary spells words as they are.
    pub(super) fn is_text(&self) -> bool {
        matches!(self.spelling, Spelling::Text { .. })
    }

    pub(super) fn encode(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        match &self.spelling {
            Spelling::Bytes { chars, bytes, .. } => self.pre.split(text, &mut |word| {
                if self.pre.ignore_merges {
                    let written: String = word.bytes().map(|b| chars[b as usize]).collect();
                    if let Some(id) = vocabulary.id(written.as_bytes()) {
                        return out.push(id);
                    }
                }
                // Skip bytes that the vocabulary lacks, as in llama.cpp.
                self.merge(word.bytes().filter_map(|b| bytes[b as usize]), out);
            }),
            Spelling::Text { bytes } => self.pre.split(&text.replace(' ', SPACE), &mut |word| {
                // No merge makes the tokens of several line ends.
                if word.starts_with('\n')
                    && let Some(id) = vocabulary.id(word.as_bytes())
                {
                    return out.push(id);
                }
                let mut known = Vec::new();
                for c in word.chars() {
                    let mut buffer = [0; 4];
                    let c = c.encode_utf8(&mut buffer).as_bytes();
                    match vocabulary.id(c) {
                        Some(id) => known.push(id),
                        None => {
                            // No merge crosses a character that the vocabulary lacks.
                            self.merge(known.drain(..), out);
                            out.extend(c.iter().filter_map(|&b| bytes[b as usize]));
                        }
                    }
                }
                self.merge(known.drain(..), out);
            }),
        }
    }

    fn merge(&self, ids: impl Iterator<Item = u32>, out: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = Vec::new();
        for id in ids {
            let i = symbols.len();
            symbols.push(Symbol { id: Some(id), prev: i.checked_sub(1), next: Some(i + 1) });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let candidate = |symbols: &[Symbol], left: usize, right: usize| {
            let pair = (symbols[left].id?, symbols[right].id?);
            let &(rank, id) = self.merges.get(&pair)?;
            // The heap's maximum is the lowest rank, then the leftmost pair.
            Some((std::cmp::Reverse((rank, left)), right, pair, id))
        };
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            queue.extend(candidate(&symbols, right - 1, right));
        }
        while let Some((std::cmp::Reverse((_, left)), right, pair, id)) = queue.pop() {
            // One of the two may have been merged with another neighbour meanwhile.
            if (symbols[left].id, symbols[right].id) != (Some(pair.0), Some(pair.1))
                || symbols[left].next != Some(right)
            {
                continue;
            }
            symbols[left].id = Some(id);
            symbols[right].id = None;
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
        out.extend(symbols.iter().filter_map(|s| s.id));
    }

    pub(super) fn decode(&self, id: u32, text: &[u8], out: &mut Vec<u8>) {
        match &self.spelling {
            Spelling::Bytes { byte_of, .. } => {
                for chunk in text.utf8_chunks() {
                    for c in chunk.valid().chars() {
                        match byte_of.get(&c) {
                            Some(&b) => out.push(b),
                            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                        }
                    }
                    out.extend_from_slice(chunk.invalid());
                }
            }
            Spelling::Text { bytes } => match byte_of(text) {
                Some(b) if bytes[b as usize] == Some(id) => out.push(b),
                _ => unescape(text, out),
            },
        }
    }
}

struct Symbol {
    /// `None` after it was merged into the previous one.
    id: Option<u32>,
    prev: Option<usize>,
    next: Option<usize>,
}

/// GPT-2's printable stand-ins: printable Latin-1 characters are themselves, the others follow from U+0100
/// on.
fn byte_chars() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|b| {
        let itself = matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if itself {
            b as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
}

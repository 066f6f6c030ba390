//! Literal tokens, which are matched in raw text before the vocabulary's algorithm encodes the rest.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;

use super::TokenKind;
use super::trie::Trie;
use super::vocabulary::Vocabulary;

#[derive(Debug)]
pub(super) struct Literals {
    /// User-defined tokens; empty if the algorithm handles them.
    defined: Trie,
    /// Control tokens and unknown ones.
    control: Trie,
    /// Whether any literal begins with a byte: most positions of a text need no search.
    begins: Box<[bool; 256]>,
}

/// A literal in a text. The greatest is chosen first: the longest, then the one with the lowest id, then the
/// leftmost.
type Found = (usize, Reverse<u32>, Reverse<usize>);

impl Literals {
    pub(super) fn new(vocabulary: &Vocabulary, with_defined: bool) -> Literals {
        let trie = |includes: &dyn Fn(TokenKind) -> bool| {
            // A text can be split only between characters.
            let is_text = |id: u32| std::str::from_utf8(vocabulary.text(id)).is_ok();
            let ids =
                vocabulary.iter().filter(|&id| vocabulary.kind(id).is_some_and(includes) && is_text(id));
            Trie::new(vocabulary, ids)
        };
        let defined = trie(&|kind| kind == TokenKind::UserDefined && with_defined);
        let control = trie(&|kind| matches!(kind, TokenKind::Control | TokenKind::Unknown));
        let mut begins = Box::new([false; 256]);
        defined.first_bytes().chain(control.first_bytes()).for_each(|byte| begins[usize::from(byte)] = true);
        Literals { defined, control, begins }
    }

    /// Finds user-defined tokens in the text, and control tokens if `special` is set. Longer ones win; the
    /// result does not overlap and is in order.
    pub(super) fn find(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        special: bool,
    ) -> Vec<(Range<usize>, u32)> {
        let text = text.as_bytes();
        let mut chosen = Vec::new();
        // Candidates that overlap each other, and the end of the last one.
        let mut overlapping = BinaryHeap::new();
        let mut end = 0;
        for start in 0..text.len() {
            if start >= end && !overlapping.is_empty() {
                self.choose(vocabulary, text, special, &mut overlapping, &mut chosen);
            }
            if !self.begins[usize::from(text[start])] {
                continue;
            }
            if let Some(found) = self.longest(vocabulary, text, start..text.len(), special) {
                end = end.max(start + found.0);
                overlapping.push(found);
            }
        }
        self.choose(vocabulary, text, special, &mut overlapping, &mut chosen);
        chosen
    }

    /// Chooses the greatest literal, then the greatest that does not overlap it, and so on. There is one
    /// candidate per start position. If it overlaps a chosen literal, the longest one at the same start that
    /// does not overlap replaces it. Each time less than half the length remains, so a position is searched
    /// only a few times.
    fn choose(
        &self,
        vocabulary: &Vocabulary,
        text: &[u8],
        special: bool,
        overlapping: &mut BinaryHeap<Found>,
        chosen: &mut Vec<(Range<usize>, u32)>,
    ) {
        let mut taken: BTreeMap<usize, (usize, u32)> = BTreeMap::new();
        while let Some((len, Reverse(id), Reverse(start))) = overlapping.pop() {
            if taken.range(..=start).next_back().is_some_and(|(_, &(end, _))| end > start) {
                continue;
            }
            match taken.range(start..start + len).next() {
                Some((&limit, _)) => {
                    overlapping.extend(self.longest(vocabulary, text, start..limit, special))
                }
                None => {
                    taken.insert(start, (start + len, id));
                }
            }
        }
        chosen.extend(taken.into_iter().map(|(start, (end, id))| (start..end, id)));
    }

    /// Finds the longest literal at the start of a range and inside the range.
    fn longest(
        &self,
        vocabulary: &Vocabulary,
        text: &[u8],
        range: Range<usize>,
        special: bool,
    ) -> Option<Found> {
        let mut longest = None;
        for trie in [Some(&self.defined), special.then_some(&self.control)].into_iter().flatten() {
            let found = trie.longest(vocabulary, &text[range.clone()]);
            longest = longest.max(found.map(|(len, id)| (len, Reverse(id), Reverse(range.start))));
        }
        longest
    }

    /// Whether a text begins with a control token.
    pub(super) fn is_control(&self, vocabulary: &Vocabulary, text: &str) -> bool {
        self.control.longest(vocabulary, text.as_bytes()).is_some()
    }
}

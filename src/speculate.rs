//! Speculative decoding: drafted tokens that one step verifies (Leviathan et al. 2023).
//!
//! A step over several drafted tokens reads the weights once. Each output is the same as in a step of its own
//! (see `docs/numeric-contract.md`), and the same sampler chooses a token from each, in order, until a choice
//! differs from the draft. So a drafter never changes the text, on backends whose bits do not depend on the
//! batch. It only changes the number of steps.

use crate::error::{Error, Result};
use crate::session::{OutputKind, Run, SequenceId, Session};

/// Proposes continuations of a text.
pub trait Drafter {
    /// Appends at most `max_tokens` tokens to `out`, possibly none. `tokens` is the text so far, the prompt
    /// included.
    ///
    /// # Errors
    /// The drafter's own errors. They end the generation.
    fn draft(&mut self, tokens: &[u32], max_tokens: usize, out: &mut Vec<u32>) -> Result<()>;
}

/// Prompt lookup (Saxena 2023): proposes the tokens that followed the last occurrence of the current n-gram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptLookup {
    /// Maximum tokens of a draft.
    pub max_tokens: usize,
    /// Longest n-gram to look up. Shorter ones are tried next, down to `min_ngram` tokens.
    pub max_ngram: usize,
    /// Shortest n-gram to look up.
    pub min_ngram: usize,
}

impl PromptLookup {
    /// Proposes at most `max_tokens` tokens after an n-gram of three or two tokens.
    pub fn new(max_tokens: usize) -> PromptLookup {
        PromptLookup { max_tokens, max_ngram: 3, min_ngram: 2 }
    }
}

impl Drafter for PromptLookup {
    fn draft(&mut self, tokens: &[u32], max_tokens: usize, out: &mut Vec<u32>) -> Result<()> {
        let max_tokens = max_tokens.min(self.max_tokens);
        for n in (self.min_ngram.max(1)..=self.max_ngram).rev() {
            let Some(before) = tokens.len().checked_sub(n) else { continue };
            let last = &tokens[before..];
            // Take the latest occurrence: texts repeat recent parts most.
            let found = (0..before).rev().find(|&at| &tokens[at..at + n] == last);
            if let Some(at) = found {
                let follows = &tokens[at + n..];
                out.extend_from_slice(&follows[..max_tokens.min(follows.len())]);
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A draft that is there already.
pub(crate) struct Drafted<'a>(pub &'a [u32]);

impl Drafter for Drafted<'_> {
    fn draft(&mut self, _tokens: &[u32], max_tokens: usize, out: &mut Vec<u32>) -> Result<()> {
        out.extend_from_slice(&self.0[..max_tokens.min(self.0.len())]);
        Ok(())
    }
}

/// How many tokens to draft, by how many were right: more while all are, none for a while when none was.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    next: u32,
    misses: u32,
    /// Steps without a draft.
    rest: u32,
}

impl Pace {
    const FIRST: u32 = 2;
    const LONGEST_REST: u32 = 64;

    pub fn new() -> Pace {
        Pace { next: Pace::FIRST, misses: 0, rest: 0 }
    }

    /// Tokens that the next step may draft.
    pub fn most(&self) -> u32 {
        if self.rest > 0 { 0 } else { self.next }
    }

    /// Notes a step without a draft.
    pub fn passed(&mut self) {
        self.rest = self.rest.saturating_sub(1);
    }

    /// Notes how much of a draft was right.
    pub fn verified(&mut self, drafted: u32, right: u32) {
        if right == 0 {
            self.misses = (self.misses + 1).min(16);
            self.rest = (1 << self.misses).min(Pace::LONGEST_REST);
            self.next = Pace::FIRST;
        } else {
            self.misses = 0;
            self.next = if right == drafted { drafted.saturating_mul(2) } else { right };
        }
    }
}

/// A smaller model with the same vocabulary, decoded greedily.
#[derive(Debug)]
pub struct DraftModel {
    session: Session,
    sequence: SequenceId,
    max_tokens: usize,
}

impl DraftModel {
    /// Proposes at most `max_tokens` tokens for the model of `target`.
    ///
    /// If the draft model has sliding windows, set [`SessionOptions::rewind`] to at least `max_tokens`.
    /// Otherwise a rejected draft may make it run the whole text again.
    ///
    /// [`SessionOptions::rewind`]: crate::session::SessionOptions::rewind
    ///
    /// # Errors
    /// [`Error::Argument`] if the two vocabularies differ.
    pub fn new(mut session: Session, target: &Session, max_tokens: usize) -> Result<DraftModel> {
        let (ours, theirs) = (session.model(), target.model());
        let size = |s: &Session| s.model().hparams().vocab_size;
        if size(&session) != size(target) {
            let expected = format!("{} tokens, as the model has", size(target));
            return Err(Error::argument("draft model's vocabulary", expected, size(&session)));
        }
        let key = "tokenizer.ggml.tokens";
        let (ours, theirs) = (ours.gguf().optional_strings(key)?, theirs.gguf().optional_strings(key)?);
        let same = match (&ours, &theirs) {
            (Some(ours), Some(theirs)) => ours.iter().eq(theirs.iter()),
            (ours, theirs) => ours.is_none() && theirs.is_none(),
        };
        if !same {
            return Err(Error::argument("draft model's vocabulary", "the model's", "another"));
        }
        let sequence = session.add_sequence();
        session.stop_with(target);
        Ok(DraftModel { session, sequence, max_tokens })
    }
}

impl Drafter for DraftModel {
    fn draft(&mut self, tokens: &[u32], max_tokens: usize, out: &mut Vec<u32>) -> Result<()> {
        let DraftModel { session, sequence, .. } = self;
        // The first drafted token runs the text's last position; each further token runs its own.
        let left = (session.positions() as usize + 1).saturating_sub(tokens.len());
        let max_tokens = max_tokens.min(self.max_tokens).min(left);
        let Some((_, all_but_last)) = tokens.split_last() else { return Ok(()) };
        if max_tokens == 0 {
            return Ok(());
        }
        let kept = session.reuse(*sequence, all_but_last)?;
        session.prefill(*sequence, &tokens[kept..], OutputKind::ArgMax)?;
        for i in 0..max_tokens {
            let Some(&token) = session.arg_max().first() else { break };
            out.push(token);
            if i + 1 < max_tokens {
                session.step(&[Run::new(*sequence, &[token])], OutputKind::ArgMax)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_grow_while_they_are_right_and_rest_when_they_are_not() {
        let mut pace = Pace::new();
        let mut most = Vec::new();
        for (drafted, right) in [(2, 2), (4, 4), (8, 5), (5, 0)] {
            most.push(pace.most());
            pace.verified(drafted, right);
        }
        assert_eq!(most, [2, 4, 8, 5]);
        let rest = |pace: &mut Pace| {
            let mut steps = 0;
            while pace.most() == 0 {
                pace.passed();
                steps += 1;
            }
            steps
        };
        assert_eq!(rest(&mut pace), 2);
        let rests = [0; 8].map(|_| {
            pace.verified(pace.most(), 0);
            rest(&mut pace)
        });
        assert_eq!(rests, [4, 8, 16, 32, 64, 64, 64, 64]);
        pace.verified(2, 1);
        pace.verified(1, 0);
        assert_eq!(rest(&mut pace), 2);
    }

    #[test]
    fn lookup_takes_the_longest_and_latest() {
        let draft = |tokens: &[u32], most| {
            let mut out = Vec::new();
            PromptLookup::new(8).draft(tokens, most, &mut out).unwrap();
            out
        };
        assert_eq!(draft(&[1, 2, 3, 4, 5, 1, 2], 8), [3, 4, 5, 1, 2]);
        assert_eq!(draft(&[1, 2, 3, 4, 5, 1, 2], 2), [3, 4]);
        // The later of two, the longer match before the later one.
        assert_eq!(draft(&[1, 2, 7, 1, 2, 8, 1, 2], 1), [8]);
        assert_eq!(draft(&[9, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2], 1), [7]);
        // One token is not enough, and nothing is nothing.
        assert!(draft(&[1, 2, 3, 1], 4).is_empty());
        assert!(draft(&[], 4).is_empty());
        assert_eq!(draft(&[1, 1, 1], 4), [1]);
    }
}

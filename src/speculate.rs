//! Guesses of what comes next, which the model then checks many at a time (Leviathan et al. 2023).
//!
//! A step over several drafted tokens reads the weights once. Each of its outputs is the one that the token would have had in a step
//! of its own (see `docs/numeric-contract.md`), and a token is chosen from each, by the same sampler in the same state, as long as
//! what was chosen is what was drafted. The text is therefore the same with a drafter as without, on backends whose bits do not
//! depend on the batch; a drafter only decides how many steps it takes.

use crate::error::{Error, Result};
use crate::session::{Head, Run, SequenceId, Session, Wanted};

/// Guesses the continuation of a text.
pub trait Drafter {
    /// Appends at most `most` tokens to `out`, none if it has no guess. `tokens` is the text so far, the prompt included.
    ///
    /// # Errors
    /// What the drafter's own work fails with. It ends the generation.
    fn draft(&mut self, tokens: &[u32], most: usize, out: &mut Vec<u32>) -> Result<()>;
}

/// Prompt lookup (Saxena 2023): what followed the last time that the text's last tokens occurred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// Most tokens of a draft.
    pub most: usize,
    /// Tokens that must have occurred before; fewer are tried, down to `least`.
    pub longest: usize,
    /// Fewest tokens that must have occurred.
    pub least: usize,
}

impl Lookup {
    /// Drafts of at most so many tokens after three or two tokens that occurred before.
    pub fn new(most: usize) -> Lookup {
        Lookup { most, longest: 3, least: 2 }
    }
}

impl Drafter for Lookup {
    fn draft(&mut self, tokens: &[u32], most: usize, out: &mut Vec<u32>) -> Result<()> {
        let most = most.min(self.most);
        for n in (self.least.max(1)..=self.longest).rev() {
            let Some(before) = tokens.len().checked_sub(n) else { continue };
            let last = &tokens[before..];
            // The latest occurrence: texts repeat what they said lately.
            let found = (0..before).rev().find(|&at| &tokens[at..at + n] == last);
            if let Some(at) = found {
                let follows = &tokens[at + n..];
                out.extend_from_slice(&follows[..most.min(follows.len())]);
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A smaller model with the same vocabulary, always by its most likely token.
#[derive(Debug)]
pub struct DraftModel {
    session: Session,
    sequence: SequenceId,
    most: usize,
}

impl DraftModel {
    /// Drafts of at most `most` tokens for the model of `target`.
    ///
    /// A session whose model has windows should be able to go back `most` positions ([`SessionOptions::rewind`]): otherwise it may
    /// have to run a text again after a wrong draft.
    ///
    /// [`SessionOptions::rewind`]: crate::session::SessionOptions::rewind
    ///
    /// # Errors
    /// [`Error::Argument`] if the two vocabularies differ.
    pub fn new(mut session: Session, target: &Session, most: usize) -> Result<DraftModel> {
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
        Ok(DraftModel { session, sequence, most })
    }
}

impl Drafter for DraftModel {
    fn draft(&mut self, tokens: &[u32], most: usize, out: &mut Vec<u32>) -> Result<()> {
        let DraftModel { session, sequence, .. } = self;
        // The first token drafted costs the text's last position, each further one its own.
        let room = (session.positions() as usize + 1).saturating_sub(tokens.len());
        let most = most.min(self.most).min(room);
        let Some((_, all_but_last)) = tokens.split_last() else { return Ok(()) };
        if most == 0 {
            return Ok(());
        }
        let kept = session.reuse(*sequence, all_but_last)?;
        session.prefill(*sequence, &tokens[kept..], Head::ArgMax)?;
        for i in 0..most {
            let Some(&token) = session.arg_max().first() else { break };
            out.push(token);
            if i + 1 < most {
                let run = Run { sequence: *sequence, tokens: &[token], wanted: Wanted::Last };
                session.step(&[run], Head::ArgMax)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_takes_the_longest_and_latest() {
        let draft = |tokens: &[u32], most| {
            let mut out = Vec::new();
            Lookup::new(8).draft(tokens, most, &mut out).unwrap();
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

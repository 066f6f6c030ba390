//! Text in, text out: the loop over a session, a tokenizer and a sampler.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::model::outputs;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::{Head, Run, SequenceId, Session, Wanted};
use crate::tokenizer::{Detokenizer, EncodeOptions, Tokenizer};

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Texts that end the generation; they are not part of the result.
    pub stop: Vec<String>,
    /// How the prompt is encoded.
    pub encode: EncodeOptions,
    /// Goes on after tokens that end a text.
    pub ignore_end: bool,
    /// Writes control tokens out in the text.
    pub special: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_tokens: 128,
            sampler: SamplerOptions::default(),
            stop: Vec::new(),
            encode: EncodeOptions { add_special: true, parse_special: false },
            ignore_end: false,
            special: false,
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended the text.
    End,
    /// The number of tokens was reached.
    Length,
    /// A stop text appeared.
    Stop,
    /// The context is full.
    ContextFull,
    /// The callback asked for it.
    Callback,
    /// The session was cancelled.
    Cancelled,
}

/// What was generated, and how long it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The text after the prompt.
    pub text: String,
    /// The prompt's tokens.
    pub prompt_tokens: Vec<u32>,
    /// How many of them the sequence began with already.
    pub reused_tokens: u32,
    /// The generated tokens, without the one that ended the text.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// From the first prompt token to the first logits.
    pub prefill: Duration,
    /// From the call to the first token.
    pub first_token: Duration,
    /// Steps after the prefill, one token each.
    pub decode_steps: u32,
    /// Time of those steps, sampling included.
    pub decode: Duration,
    /// Time of the prefill and of those steps on the device, by its clock.
    pub device: (Duration, Duration),
}

impl Session {
    /// Feeds tokens to a sequence in steps of at most [`Session::batch`] tokens; the last one's outputs are computed.
    ///
    /// # Errors
    /// As [`Session::step`]. Steps before the one that failed stay done.
    pub fn prefill(&mut self, sequence: SequenceId, tokens: &[u32], head: Head) -> Result<()> {
        let batch = self.batch() as usize;
        let chunks = tokens.len().div_ceil(batch);
        for (i, tokens) in tokens.chunks(batch).enumerate() {
            let wanted = if i + 1 == chunks { Wanted::Last } else { Wanted::Nothing };
            self.step(&[Run { sequence, tokens, wanted }], head)?;
        }
        Ok(())
    }

    /// Continues a prompt in a sequence of its own; see [`Session::generate_in`].
    ///
    /// # Errors
    /// As [`Session::generate_in`].
    pub fn generate(
        &mut self,
        tokenizer: &Tokenizer,
        prompt: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let sequence = self.add_sequence();
        let prompt = tokenizer.encode(prompt, options.encode);
        let result = self.generate_in(sequence, tokenizer, &prompt, options, on_text);
        self.remove(sequence)?;
        result
    }

    /// Makes a sequence consist of a prompt, and continues it. What the sequence begins with in common with the prompt is kept, so
    /// that only the rest is computed. `on_text` gets the text as it appears, whole characters at a time, and may end the
    /// generation.
    ///
    /// # Errors
    /// As [`Session::step`]; [`Error::Argument`] for an empty prompt or options out of range. A cancelled or full session is
    /// not an error: it ends the generation, and what was generated is returned.
    pub fn generate_in(
        &mut self,
        sequence: SequenceId,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let start = Instant::now();
        let Some((_, all_but_last)) = prompt.split_last() else {
            return Err(Error::argument("prompt", "text of at least one token", "none"));
        };
        // The last token is always run, for its outputs.
        let reused =
            self.tokens(sequence)?.iter().zip(all_but_last).take_while(|(have, want)| have == want).count();
        self.truncate(sequence, reused as u32)?;
        let vocab = self.model().hparams().vocab_size as usize;
        let mut sampler = Sampler::new(options.sampler.clone(), vocab)?;
        prompt.iter().for_each(|&t| sampler.accept(t));
        let head = match options.sampler.needed() {
            Some(1) => Head::ArgMax,
            Some(k) if k <= outputs::TOP_K as usize => Head::TopK,
            _ => Head::Logits,
        };
        let mut out = Output::new(options, tokenizer);
        let mut generation = Generation {
            text: String::new(),
            prompt_tokens: prompt.to_vec(),
            reused_tokens: reused as u32,
            tokens: Vec::with_capacity(options.max_tokens.min(self.positions()) as usize),
            finish: Finish::Length,
            prefill: Duration::ZERO,
            first_token: Duration::ZERO,
            decode_steps: 0,
            decode: Duration::ZERO,
            device: (Duration::ZERO, Duration::ZERO),
        };
        let before = self.device_time();
        let mut result = self.prefill(sequence, &prompt[reused..], head);
        generation.prefill = start.elapsed();
        generation.device.0 = self.device_time() - before;
        let mut decode_start = Instant::now();
        while generation.tokens.len() < options.max_tokens as usize {
            match result {
                Ok(()) => {}
                Err(Error::Cancelled) => {
                    generation.finish = Finish::Cancelled;
                    break;
                }
                Err(Error::ContextFull { .. }) if !generation.tokens.is_empty() => {
                    generation.finish = Finish::ContextFull;
                    break;
                }
                Err(error) => return Err(error),
            }
            let token = match head {
                Head::ArgMax => self.arg_max().first().copied().unwrap_or(0),
                Head::TopK => {
                    let (ids, logits) = self.top_k();
                    sampler.sample_of(ids, logits)?
                }
                Head::Logits => sampler.sample(self.logits())?,
            };
            if generation.tokens.is_empty() {
                generation.first_token = start.elapsed();
                decode_start = Instant::now();
            }
            if tokenizer.is_end(token) && !options.ignore_end {
                generation.finish = Finish::End;
                break;
            }
            sampler.accept(token);
            generation.tokens.push(token);
            if let Some(finish) = out.push(token, on_text) {
                generation.finish = finish;
                break;
            }
            if generation.tokens.len() == options.max_tokens as usize {
                break;
            }
            result = self.step(&[Run { sequence, tokens: &[token], wanted: Wanted::Last }], head);
            generation.decode_steps += u32::from(result.is_ok());
        }
        generation.decode = decode_start.elapsed();
        generation.device.1 = self.device_time() - before - generation.device.0;
        if !matches!(generation.finish, Finish::Stop | Finish::Callback) {
            out.finish(on_text);
        }
        generation.text = out.text;
        Ok(generation)
    }
}

/// Text on its way out: complete characters that cannot be the start of a stop text.
struct Output<'a> {
    tokenizer: &'a Tokenizer,
    detokenizer: Detokenizer,
    stop: &'a [String],
    special: bool,
    text: String,
    /// How much of the text was given out.
    given: usize,
}

impl<'a> Output<'a> {
    fn new(options: &'a GenerateOptions, tokenizer: &'a Tokenizer) -> Self {
        Output {
            tokenizer,
            detokenizer: Detokenizer::default(),
            stop: &options.stop,
            special: options.special,
            text: String::with_capacity(4096),
            given: 0,
        }
    }

    fn push(&mut self, token: u32, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) -> Option<Finish> {
        self.detokenizer.push(self.tokenizer, token, self.special, &mut self.text);
        let fresh = &self.text[self.given..];
        let stop = self.stop.iter().filter(|s| !s.is_empty()).filter_map(|s| fresh.find(s.as_str())).min();
        if let Some(at) = stop {
            self.text.truncate(self.given + at);
            let _ = self.give(0, on_text);
            return Some(Finish::Stop);
        }
        let held = self.stop.iter().map(|stop| held_back(fresh, stop)).max().unwrap_or(0);
        self.give(held, on_text).is_break().then_some(Finish::Callback)
    }

    fn give(&mut self, held: usize, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) -> ControlFlow<()> {
        let end = self.text.len() - held;
        let ready = &self.text[self.given..end];
        self.given = end;
        if ready.is_empty() { ControlFlow::Continue(()) } else { on_text(ready) }
    }

    fn finish(&mut self, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) {
        self.detokenizer.finish(&mut self.text);
        let _ = self.give(0, on_text);
    }
}

/// Bytes at the end of `text` that may be the start of `stop`.
fn held_back(text: &str, stop: &str) -> usize {
    let most = stop.len().saturating_sub(1).min(text.len());
    (1..=most).rev().find(|&n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::held_back;

    #[test]
    fn the_start_of_a_stop_text_is_held_back() {
        assert_eq!(held_back("abc##", "###"), 2);
        assert_eq!(held_back("abc", "###"), 0);
        assert_eq!(held_back("#", "###"), 1);
        assert_eq!(held_back("", "###"), 0);
        // A whole stop text is found, not held.
        assert_eq!(held_back("\n\n", "\n\n"), 1);
    }
}

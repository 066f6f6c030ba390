//! A sequence of tokens and its memory.

use halite_kernels::float::DefaultFloats;
use halite_kernels::kv::CHUNK;
use halite_kernels::rows;

use crate::run::{CPU, Run, Step};
use crate::{Error, Image};

/// A sequence on an image: its KV cache and the memory of steps.
#[derive(Debug)]
pub struct Session<'a> {
    image: Image<'a>,
    memory: &'a mut [u32],
    position: u32,
    /// The most positions that there were since the sequence was empty: what the pages hold.
    written: u32,
    /// Whether tokens see those after them, so that a step is a text of its own.
    is_encoder: bool,
}

impl<'a> Session<'a> {
    /// Starts an empty sequence in memory of [`Image::memory_words`] or more.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(image: Image<'a>, memory: &'a mut [u32]) -> Result<Session<'a>, Error> {
        let (words, got) = (image.memory_words(), memory.len());
        let memory = memory.get_mut(..words);
        let memory = memory.ok_or(Error::Memory { expected: image.header.memory_words, got })?;
        // No result depends on what was there before.
        memory.fill(0);
        let mut is_encoder = false;
        for n in 0..image.header.states.len {
            is_encoder |= image.state(n)?.after > 0;
        }
        Ok(Session { image, memory, position: 0, written: 0, is_encoder })
    }

    /// The image.
    pub fn image(&self) -> &Image<'a> {
        &self.image
    }

    /// The length of the sequence.
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Appends tokens and computes the logits that follow the last one: `[vocabulary]`, for the caller to change. They
    /// may be not finite, as weights may be. An encoder computes a hidden state for each token instead,
    /// `[tokens][embedding]`: each step is a text of its own.
    ///
    /// After an error the sequence is as before.
    ///
    /// # Errors
    /// [`Error::Tokens`], [`Error::Token`], [`Error::Context`]; [`Error::Corrupt`] if a router chooses an expert that is
    /// not there, which no image from `halite export` does.
    pub fn step(&mut self, tokens: &[u32]) -> Result<&mut [f32], Error> {
        let outputs = tokens.len().min(self.image.header.outputs as usize);
        self.run(tokens, outputs)
    }

    /// Appends any number of tokens, in as many steps as they take, and computes the logits that follow the last one. An
    /// encoder takes one step.
    ///
    /// # Errors
    /// As [`Session::step`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&mut [f32], Error> {
        if self.is_encoder {
            return self.step(tokens);
        }
        self.check(tokens)?;
        let most = self.image.header.tokens as usize;
        let last = tokens.len().saturating_sub(1) / most * most;
        let (before, last) = tokens.split_at(last);
        for tokens in before.chunks(most) {
            self.run(tokens, 0)?;
        }
        self.step(last)
    }

    /// Runs a step whose last `outputs` tokens have outputs.
    fn run(&mut self, tokens: &[u32], outputs: usize) -> Result<&mut [f32], Error> {
        let header = self.image.header;
        if tokens.is_empty() || tokens.len() > header.tokens as usize {
            return Err(Error::Tokens { at_most: header.tokens, got: tokens.len() });
        }
        self.check(tokens)?;
        let _floats = DefaultFloats::set();
        let step = Step { tokens, position: self.start(), outputs };
        let mut run = Run { image: &self.image, memory: &mut *self.memory, step };
        run.run()?;
        let place = run.place(header.result)?;
        self.position = self.start() + tokens.len() as u32;
        self.written = self.written.max(self.position);
        let result = self.memory.get_mut(place).unwrap_or_default();
        Ok(bytemuck::cast_slice_mut(result))
    }

    /// The position of the next token.
    fn start(&self) -> u32 {
        if self.is_encoder { 0 } else { self.position }
    }

    /// Cuts the sequence at a position: what follows is as if it had never been there. It can always be cut at 0.
    ///
    /// # Errors
    /// [`Error::Rewind`] for a position after its end, or one where tokens would see what a window's pages no longer
    /// hold.
    pub fn rewind(&mut self, position: u32) -> Result<(), Error> {
        let mut first = if self.is_encoder { self.position } else { 0 };
        let last_chunk = self.written.saturating_sub(1) / CHUNK as u32;
        for n in 0..self.image.header.states.len {
            let state = self.image.state(n)?;
            // Pages before this one hold later positions.
            let oldest = (last_chunk + 1).saturating_sub(state.pages);
            if oldest > 0 {
                first = first.max(oldest * CHUNK as u32 + state.window.unwrap_or(1) - 1);
            }
        }
        if position > self.position || (position < first && position > 0) {
            return Err(Error::Rewind { expected: (first.min(self.position), self.position), got: position });
        }
        self.position = position;
        if position == 0 {
            self.written = 0;
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let (below, at_most) = (self.image.header.vocabulary, self.image.header.context);
        if let Some(at) = tokens.iter().position(|&token| token >= below) {
            return Err(Error::Token { at, got: tokens[at], below });
        }
        let got = self.start().saturating_add(tokens.len().try_into().unwrap_or(u32::MAX));
        if got > at_most { Err(Error::Context { at_most, got }) } else { Ok(()) }
    }
}

/// The most likely token; `None` if the largest logit is not finite, or one is not a number.
pub fn greedy(logits: &[f32]) -> Option<u32> {
    CPU.run(rows::ArgMax { x: logits }).map(|at| at as u32)
}

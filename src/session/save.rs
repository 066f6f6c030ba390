//! Saves and restores a sequence with its KV cache, so that its tokens need not run again.
//!
//! All integers are little-endian:
//!
//! | Bytes | What |
//! |---|---|
//! | 8 | `HALITEKV` |
//! | 4 | version: 4 |
//! | 8 | model: XXH3 of its files' headers (metadata and tensor tables) and sizes, of some bytes of every tensor, of the adapters' scales, and of the names of the tensors that the program uses |
//! | 4, then that many | the layout of the cache, as text |
//! | 4, then 4 each | tokens: their number, and their ids |
//! | 4 | positions of which the pages hold the results: all, or fewer if a recurrent state was lost |
//! | rest | for each KV group: 4, the index of the first kept page; then the pages from there on in order, each of all states of the group: [`State::page_bytes`](crate::program::State::page_bytes) |
//! | 8 | XXH3 of everything before |
//!
//! The two hashes detect accidents: a damaged file, another model, the same model after more training. They
//! have no key, so anyone can make a file that passes, with any tokens and any cache. Restore sequences only
//! from sources that you trust to decide what the model says.

use std::hash::Hasher as _;
use std::io::{self, Read, Write};

use twox_hash::xxhash3_64::Hasher;

use super::{SequenceId, Session};
use crate::backend::{NO_PAGE, upload};
use crate::error::{Error, Result};
use crate::program::PAGE_POSITIONS;

const MAGIC: &[u8; 8] = b"HALITEKV";
const VERSION: u32 = 4;

/// Samples of each tensor, and bytes of each sample, that identify weights without reading all of them.
const SAMPLES: usize = 4;
const SAMPLE_BYTES: usize = 64;

/// Maximum bytes of a layout to read for an error message.
const MAX_LAYOUT_BYTES: u32 = 1 << 20;

impl Session {
    /// Writes a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence, [`Error::Io`], or errors of the backend.
    pub fn save(&self, id: SequenceId, out: &mut dyn Write) -> Result<()> {
        let sequence = self.get(id)?;
        let mut out = Hashing { inner: out, hasher: Hasher::new() };
        let layout = self.layout();
        out.put(MAGIC)?;
        out.put(&VERSION.to_le_bytes())?;
        out.put(&self.model_hash()?.to_le_bytes())?;
        out.put(&(layout.len() as u32).to_le_bytes())?;
        out.put(layout.as_bytes())?;
        out.put(&sequence.len().to_le_bytes())?;
        for token in &sequence.tokens {
            out.put(&token.to_le_bytes())?;
        }
        out.put(&sequence.done.to_le_bytes())?;
        let mut page = Vec::new();
        for (group, table) in sequence.tables.iter().enumerate() {
            let first = self.pools[group].first_kept(sequence.done, self.options.rewind).min(table.len());
            let first = first.max(table.iter().rposition(|&n| n == NO_PAGE).map_or(0, |hole| hole + 1));
            out.put(&(first as u32).to_le_bytes())?;
            for &n in &table[first..] {
                for (state, buffer) in self.states_of(group) {
                    page.resize(state.page_bytes() as usize, 0);
                    self.loaded.backend.read(buffer, u64::from(n) * state.page_bytes(), &mut page)?;
                    out.put(&page)?;
                }
            }
        }
        let sum = out.hasher.finish();
        out.put(&sum.to_le_bytes())
    }

    /// Restores a sequence that [`Session::save`] wrote. On an error, the session stays unchanged.
    ///
    /// # Errors
    /// [`Error::Saved`] if the data is damaged, not a saved sequence, of another model, or of another cache
    /// layout; [`Error::ContextFull`] if it does not fit, [`Error::Io`], or errors of the backend.
    pub fn restore(&mut self, from: &mut dyn Read) -> Result<SequenceId> {
        let mut from = Hashing { inner: from, hasher: Hasher::new() };
        let tokens = self.read_header(&mut from)?;
        let id = self.add_sequence();
        let result = self.read_pages(id, tokens, &mut from);
        if result.is_err() {
            self.remove(id)?;
        }
        result.map(|()| id)
    }

    /// Checks everything before the pages, and returns the tokens.
    fn read_header(&self, from: &mut Hashing<&mut dyn Read>) -> Result<Vec<u32>> {
        check("magic", *MAGIC, from.array()?, |magic| magic.escape_ascii().to_string())?;
        check("version", VERSION, from.u32()?, |version| version.to_string())?;
        let hash = |hash: &u64| format!("the one with hash {hash:016x}");
        check("model", self.model_hash()?, u64::from_le_bytes(from.array()?), hash)?;
        let layout_len = from.u32()?;
        let mut layout = vec![0; layout_len.min(MAX_LAYOUT_BYTES) as usize];
        from.get(&mut layout)?;
        let text = |layout: &Vec<u8>| String::from_utf8_lossy(layout).into_owned();
        check("cache layout", self.layout().into_bytes(), layout, text)?;
        let count = from.u32()?;
        if count > self.positions {
            return Err(Error::ContextFull { need: count.into(), have: self.positions.into() });
        }
        let vocab = self.loaded.model.hparams().vocab_size;
        let token = |_| {
            let token = from.u32()?;
            if token < vocab {
                return Ok(token);
            }
            Err(saved("token", format!("below {vocab}"), token.to_string()))
        };
        (0..count).map(token).collect()
    }

    fn read_pages(
        &mut self,
        id: SequenceId,
        tokens: Vec<u32>,
        from: &mut Hashing<&mut dyn Read>,
    ) -> Result<()> {
        let len = from.u32()?;
        if len > tokens.len() as u32 {
            return Err(saved("computed positions", format!("at most {}", tokens.len()), len.to_string()));
        }
        let pages = len.div_ceil(PAGE_POSITIONS);
        self.sequences[id.0 as usize].tokens.extend(&tokens[..len as usize]);
        let mut page = Vec::new();
        for group in 0..self.pools.len() {
            let first = from.u32()?;
            let needed = self.pools[group].first_kept(len, 0) as u32;
            if first > needed.min(pages) {
                return Err(saved("first page", format!("at most {}", needed.min(pages)), first.to_string()));
            }
            // This session's windows may keep less than those of the session that saved.
            let kept = first.max(self.pools[group].first_kept(len, self.options.rewind) as u32);
            let table = &mut self.sequences[id.0 as usize].tables[group];
            table.resize(kept.min(pages) as usize, NO_PAGE);
            self.make_room_in(group, id, len)?;
            for i in first..pages {
                let n = self.sequences[id.0 as usize].tables[group][i as usize];
                for (state, buffer) in self.states_of(group) {
                    page.resize(state.page_bytes() as usize, 0);
                    from.get(&mut page)?;
                    if n != NO_PAGE {
                        upload(&*self.loaded.backend, buffer, u64::from(n) * state.page_bytes(), &page)?;
                    }
                }
            }
        }
        let sequence = &mut self.sequences[id.0 as usize];
        sequence.tokens.extend(&tokens[len as usize..]);
        sequence.done = len;
        let sum = from.hasher.finish();
        let show = |sum: &u64| format!("{sum:016x}");
        check("checksum", sum, u64::from_le_bytes(from.array()?), show)
    }

    fn model_hash(&self) -> Result<u64> {
        let mut hasher = Hasher::new();
        for (source, header) in self.loaded.model.gguf().parts() {
            let bytes = source.bytes();
            hasher.write(bytes.get(..header.data_start).unwrap_or(bytes));
            hasher.write(&source.len().to_le_bytes());
        }
        for tensor in self.loaded.model.gguf().tensors() {
            let region = tensor.region()?;
            let (mut bytes, len) = ([0; SAMPLE_BYTES], region.len() as usize);
            let apart = len.saturating_sub(SAMPLE_BYTES) / (SAMPLES - 1);
            for start in (0..SAMPLES).map(|sample| apart * sample) {
                let bytes = &mut bytes[..SAMPLE_BYTES.min(len - start)];
                region.read_at(start as u64, bytes)?;
                hasher.write(bytes);
            }
        }
        for scale in self.loaded.model.adapter_scales() {
            hasher.write(&scale.to_le_bytes());
        }
        // Some models use other tensors in longer contexts, which changes the cache's content.
        let mut names: Vec<&str> = self
            .loaded
            .program
            .weights
            .iter()
            .map(|&id| self.loaded.program.tensor(id).name.as_str())
            .collect();
        names.sort_unstable();
        for name in names {
            hasher.write(name.as_bytes());
            hasher.write(&[0]);
        }
        Ok(hasher.finish())
    }

    /// Describes everything that the bytes of a page depend on.
    fn layout(&self) -> String {
        let state = |s: &crate::program::State| {
            format!("{:?} {}x({}+{}) {:?}", s.kind, s.kv_heads, s.key_dim, s.value_dim, s.format)
        };
        let states: Vec<String> = self.loaded.program.states.iter().map(state).collect();
        format!("{PAGE_POSITIONS} positions of {}", states.join(", "))
    }
}

/// A stream that hashes its bytes.
struct Hashing<T> {
    inner: T,
    hasher: Hasher,
}

impl Hashing<&mut dyn Write> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.write(bytes);
        self.inner.write_all(bytes).map_err(io_error)
    }
}

impl Hashing<&mut dyn Read> {
    fn get(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.inner.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                saved("length", format!("{} more bytes", bytes.len()), "fewer".into())
            }
            _ => io_error(e),
        })?;
        self.hasher.write(bytes);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.get(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
}

fn io_error(source: io::Error) -> Error {
    Error::Io { path: "saved sequence".into(), source }
}

fn saved(what: &'static str, expected: String, got: String) -> Error {
    Error::Saved { what, expected, got }
}

fn check<T: PartialEq>(what: &'static str, expected: T, got: T, show: impl Fn(&T) -> String) -> Result<()> {
    if expected == got { Ok(()) } else { Err(saved(what, show(&expected), show(&got))) }
}

//! A model as it lies in flash.
//!
//! An image is one block of little-endian bytes, at a multiple of four bytes: a [`Header`], then, in any order,
//! ops, tensors, states, weights, tables and texts. The header states the places of ops, records and texts, these those of
//! the rest. `halite::export` writes it.

use halite_kernels::formats::Format;
use halite_kernels::kv::PageShape;

use crate::Error;
use crate::check;
use crate::ops::Op;
use crate::record::{Field, Rows, Span, records};

/// The first word of an image: `HMIC`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"HMIC");
/// The version of the format.
pub const VERSION: u32 = 2;

records! {
    /// The start of an image.
    Header {
        /// [`MAGIC`].
        magic: u32,
        /// [`VERSION`].
        version: u32,
        /// Bytes of the image.
        image_bytes: u32,
        /// [`checksum`] of the bytes after this word.
        checksum: u32,
        /// Words of memory that a session needs.
        memory_words: u32,
        /// Memory of kernels, in words. Tensors lie before it, states after it.
        work: Span,
        /// Positions of the sequence.
        context: u32,
        /// Most tokens of a step.
        tokens: u32,
        /// Most tokens of a step that have outputs: its last ones.
        outputs: u32,
        /// Tokens that the model knows.
        vocabulary: u32,
        /// The tensor that is the result of a step.
        result: u32,
        /// Words of the ops, in order of execution.
        ops: Span,
        /// Records [`Tensor`].
        tensors: Span,
        /// Records [`State`].
        states: Span,
        /// For each token, a word: where its text ends, in bytes from the start of the first text.
        texts: Span,
        /// Bytes of all texts.
        text_bytes: Span,
        /// The token that begins a text.
        bos: Option<u32>,
        /// Words: tokens that end a generation, in ascending order.
        ends: Span,
    }

    /// A tensor: `experts` matrices of `rows` rows of `cols` elements.
    Tensor {
        /// Whether it lies in memory; else in the image.
        in_memory: bool,
        /// Where, in words.
        first: u32,
        /// Number of matrices, one after the other.
        experts: u32,
        /// Rows of a matrix.
        rows: Rows,
        /// Elements of a row; whole blocks.
        cols: u32,
        /// Format of the elements: `F32` or `I32` in memory.
        format: Format,
    }

    /// A layer's KV cache.
    State {
        /// Heads with keys and values of their own.
        kv_heads: u32,
        /// Elements of a key.
        key_dim: u32,
        /// Elements of a value.
        value_dim: u32,
        /// Format of the elements.
        format: Format,
        /// How many positions up to its own, which counts, a token sees; absent: all.
        window: Option<u32>,
        /// How many positions after its own a token sees, as far as the step has them.
        after: u32,
        /// Where its pages lie in memory, in words.
        first: u32,
        /// Its number of pages.
        pages: u32,
        /// The first of the words that name the page of each 64 positions of the context: their number modulo
        /// `pages`.
        table: u32,
    }
}

impl State {
    /// The shape of its pages.
    pub fn shape(&self) -> PageShape {
        PageShape {
            kv_heads: self.kv_heads as usize,
            key_dim: self.key_dim as usize,
            value_dim: self.value_dim as usize,
            latent: false,
        }
    }

    /// Words of all its pages; `None` if they are too many to count.
    pub fn words(&self) -> Option<u64> {
        let elements =
            (u64::from(self.key_dim) + u64::from(self.value_dim)).checked_mul(self.kv_heads.into())?;
        let elements = elements.checked_mul(halite_kernels::kv::CHUNK as u64)?;
        let bytes =
            (elements / self.format.block_len() as u64).checked_mul(self.format.block_bytes() as u64)?;
        (bytes / 4).checked_mul(self.pages.into())
    }
}

/// CRC-32 (IEEE 802.3), four bits at a time.
pub fn checksum(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 16] = {
        let mut table = [0; 16];
        let mut i = 0;
        while i < 16 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 4 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    let nibble = |crc: u32, bits: u32| TABLE[((crc ^ bits) & 15) as usize] ^ crc >> 4;
    !bytes.iter().fold(!0, |crc, &byte| nibble(nibble(crc, byte.into()), u32::from(byte) >> 4))
}

/// A model's program, weights and vocabulary, checked.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    pub(crate) words: &'a [u32],
    pub(crate) header: Header,
}

impl<'a> Image<'a> {
    /// Checks an image: every length, place and shape in it. Reads no weights. Whatever the bytes are, a step on a checked
    /// image does not panic; one whose numbers are hostile may take long.
    ///
    /// # Errors
    /// [`Error::Misaligned`], [`Error::NotAnImage`], [`Error::Version`], [`Error::Truncated`],
    /// [`Error::Corrupt`].
    pub fn new(bytes: &'a [u8]) -> Result<Image<'a>, Error> {
        if bytes.as_ptr().align_offset(align_of::<u32>()) != 0 {
            return Err(Error::Misaligned);
        }
        let whole = bytes.len() / 4 * 4;
        let words: &[u32] = bytemuck::try_cast_slice(&bytes[..whole]).map_err(|_| Error::Misaligned)?;
        match words {
            [MAGIC, VERSION, ..] => {}
            [MAGIC, got, ..] => return Err(Error::Version { expected: VERSION, got: *got }),
            _ => return Err(Error::NotAnImage),
        }
        let header = Header::read(&mut &*words)
            .ok_or(Error::Truncated { expected: 4 * Header::WORDS as u32, got: bytes.len() })?;
        let expected = header.image_bytes;
        let inside = words.get(..expected as usize / 4).filter(|_| expected.is_multiple_of(4));
        let words = inside.ok_or(Error::Truncated { expected, got: bytes.len() })?;
        let image = Image { words, header };
        check::image(&image)?;
        Ok(image)
    }

    /// Compares the bytes, weights included, with the checksum that was written with them. Reads all of them.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub fn verify(&self) -> Result<(), Error> {
        let bytes: &[u8] = bytemuck::cast_slice(self.words);
        let got = checksum(bytes.get(CHECKED_FROM..).unwrap_or(&[]));
        match self.header.checksum {
            expected if expected == got => Ok(()),
            expected => Err(Error::Checksum { expected, got }),
        }
    }

    /// The facts at its start.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Words of 32 bits that a session needs.
    pub fn memory_words(&self) -> usize {
        self.header.memory_words as usize
    }

    /// The bytes of a token's text; none for control tokens, and for ids beyond the vocabulary. A character may take
    /// several tokens.
    pub fn text(&self, token: u32) -> &'a [u8] {
        let ends = self.span(self.header.texts, 1).unwrap_or(&[]);
        let Some(&end) = ends.get(token as usize) else { return &[] };
        let start = token.checked_sub(1).map_or(0, |before| ends[before as usize]);
        let bytes: &[u8] = bytemuck::cast_slice(self.words);
        let first = self.header.text_bytes.first as usize;
        bytes.get(first + start as usize..first + end as usize).unwrap_or(&[])
    }

    /// Whether a token ends a generation.
    pub fn is_end(&self, token: u32) -> bool {
        self.span(self.header.ends, 1).is_some_and(|ends| ends.contains(&token))
    }

    /// The token that begins a text, if the vocabulary has one that texts are to begin with.
    pub fn bos(&self) -> Option<u32> {
        self.header.bos
    }

    /// Words of records of `each` words.
    pub(crate) fn span(&self, span: Span, each: usize) -> Option<&'a [u32]> {
        let first = span.first as usize;
        self.words.get(first..first.checked_add((span.len as usize).checked_mul(each)?)?)
    }

    fn record<T: Field>(&self, records: Span, n: u32) -> Option<T> {
        if n >= records.len {
            return None;
        }
        let first = (records.first as usize).checked_add((n as usize).checked_mul(T::WORDS)?)?;
        T::read(&mut self.words.get(first..)?)
    }

    pub(crate) fn tensor(&self, n: u32) -> Result<Tensor, Error> {
        self.record(self.header.tensors, n)
            .ok_or(Error::Corrupt { what: "a tensor is missing or unknown", at: n })
    }

    pub(crate) fn state(&self, n: u32) -> Result<State, Error> {
        self.record(self.header.states, n)
            .ok_or(Error::Corrupt { what: "a state is missing or unknown", at: n })
    }

    /// The ops in order.
    pub(crate) fn ops(&self) -> impl Iterator<Item = Result<Op, Error>> + use<'a> {
        let mut words = self.span(self.header.ops, 1).unwrap_or(&[]);
        let mut at = 0;
        core::iter::from_fn(move || {
            if words.is_empty() {
                return None;
            }
            let op = Op::read(&mut words).ok_or(Error::Corrupt { what: "an op is cut off or unknown", at });
            if op.is_err() {
                words = &[];
            }
            at += 1;
            Some(op)
        })
    }
}

/// The byte after the checksum.
pub const CHECKED_FROM: usize = 16;

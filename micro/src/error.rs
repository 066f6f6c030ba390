//! What can be wrong.

use core::fmt;

/// The error of every function of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The image does not start at a multiple of four bytes.
    Misaligned,
    /// The bytes are not an image.
    NotAnImage,
    /// The image is of another version of the format.
    Version {
        /// What this crate reads.
        expected: u32,
        /// What the image states.
        got: u32,
    },
    /// The image is longer than the bytes.
    Truncated {
        /// Bytes that the image states.
        expected: u32,
        /// Bytes that are there.
        got: usize,
    },
    /// The image contradicts itself.
    Corrupt {
        /// What does not fit.
        what: &'static str,
        /// Number of the op, tensor, state or word.
        at: u32,
    },
    /// The bytes of the image are not those that were written.
    Checksum {
        /// What the image states.
        expected: u32,
        /// What its bytes give.
        got: u32,
    },
    /// The memory is too small; both in 32-bit words.
    Memory {
        /// What the image needs.
        expected: u32,
        /// What was given.
        got: usize,
    },
    /// A token is not in the vocabulary.
    Token {
        /// Its place among the tokens of the step.
        at: usize,
        /// Its id.
        got: u32,
        /// The number of tokens in the vocabulary.
        below: u32,
    },
    /// A step has no tokens, or more than the image was exported for.
    Tokens {
        /// Most tokens of a step.
        at_most: u32,
        /// Those of this one.
        got: usize,
    },
    /// The sequence would be longer than the image was exported for.
    Context {
        /// Positions of the image.
        at_most: u32,
        /// Positions after this step.
        got: u32,
    },
    /// The sequence cannot be cut there: it is not that long, or what a window showed there is gone.
    Rewind {
        /// The first position but 0 that it can be cut at, and its length.
        expected: (u32, u32),
        /// Where it was to be cut.
        got: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Misaligned => f.write_str("the image must start at a multiple of four bytes"),
            Error::NotAnImage => f.write_str("the bytes are not an image of a model"),
            Error::Version { expected, got } => {
                write!(f, "the image's format: expected version {expected}, got {got}")
            }
            Error::Truncated { expected, got } => {
                write!(f, "the image is cut off: expected {expected} bytes, got {got}")
            }
            Error::Corrupt { what, at } => write!(f, "the image contradicts itself: {what} (number {at})"),
            Error::Checksum { expected, got } => {
                write!(f, "the image was damaged: expected the checksum {expected:08x}, got {got:08x}")
            }
            Error::Memory { expected, got } => {
                write!(f, "memory: expected {expected} words of 32 bits, got {got}")
            }
            Error::Token { at, got, below } => {
                write!(f, "token {at} of the step: expected an id below {below}, got {got}")
            }
            Error::Tokens { at_most, got } => {
                write!(f, "tokens of a step: expected 1 to {at_most}, got {got}")
            }
            Error::Context { at_most, got } => {
                write!(f, "the sequence is full: expected at most {at_most} positions, got {got}")
            }
            Error::Rewind { expected: (first, len), got } => {
                write!(f, "the sequence can be cut at 0, or at {first} to {len}, got {got}")
            }
        }
    }
}

impl core::error::Error for Error {}

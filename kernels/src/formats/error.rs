//! What can be wrong with a format id, or with the lengths of a call.

use core::error::Error;
use core::fmt;

use super::Format;

/// A tensor type id that is no live format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnknownFormat {
    /// The id as found.
    pub id: u32,
    /// What is known of it.
    pub why: Why,
}

/// Why an id is no live format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// GGML had it once and removed it.
    Removed {
        /// The name that it had.
        name: &'static str,
        /// What to do about such a file.
        note: &'static str,
    },
    /// A fork of GGML uses it.
    Fork {
        /// The fork.
        fork: &'static str,
        /// The fork's name for the format, or for the family that it belongs to.
        name: &'static str,
    },
    /// Nothing is known of it.
    Unknown,
}

const NEVER_RELEASED: &str = "it was withdrawn in 2023: convert the original model again";
const REPACKED_Q4_0: &str = "it was Q4_0 repacked for one CPU: quantise the original model to Q4_0";
const REPACKED_IQ4_NL: &str = "it was IQ4_NL repacked for one CPU: quantise the original model to IQ4_NL";
const IN_BITNET: &str = "it was IQ4_NL repacked for one CPU: quantise the original model to IQ4_NL; in BitNet's own files it is I2_S: convert the folder of the original model";
const IK_LLAMA: &str = "ik_llama.cpp";

const REMOVED: &[(u32, &str, &str)] = &[
    (4, "Q4_2", NEVER_RELEASED),
    (5, "Q4_3", NEVER_RELEASED),
    (31, "Q4_0_4_4", REPACKED_Q4_0),
    (32, "Q4_0_4_8", REPACKED_Q4_0),
    (33, "Q4_0_8_8", REPACKED_Q4_0),
    (36, "IQ4_NL_4_4", IN_BITNET),
    (37, "IQ4_NL_4_8", REPACKED_IQ4_NL),
    (38, "IQ4_NL_8_8", REPACKED_IQ4_NL),
];

/// First id, last id, fork, name. The fork also uses two ids of GGML's own, 36 (I2_S) and 41 (Q1_0_G128).
const FORKS: &[(u32, u32, &str, &str)] = &[
    (133, 133, IK_LLAMA, "Q6_0"),
    (134, 134, IK_LLAMA, "IQ1_BN"),
    (135, 135, IK_LLAMA, "IQ2_BN"),
    (137, 137, IK_LLAMA, "IQ2_K"),
    (138, 138, IK_LLAMA, "IQ3_K"),
    (139, 139, IK_LLAMA, "IQ4_K"),
    (140, 140, IK_LLAMA, "IQ5_K"),
    (141, 141, IK_LLAMA, "IQ6_K"),
    (144, 144, IK_LLAMA, "IQ4_KS"),
    (145, 145, IK_LLAMA, "IQ2_KS"),
    (146, 146, IK_LLAMA, "IQ4_KSS"),
    (152, 152, IK_LLAMA, "IQ5_KS"),
    (153, 153, IK_LLAMA, "IQ2_KT"),
    (154, 154, IK_LLAMA, "IQ3_KT"),
    (155, 155, IK_LLAMA, "IQ4_KT"),
    (156, 156, IK_LLAMA, "IQ3_KS"),
    (157, 157, IK_LLAMA, "IQ2_KL"),
    (158, 158, IK_LLAMA, "IQ1_KT"),
    (202, 399, IK_LLAMA, "row-interleaved"),
];

impl UnknownFormat {
    /// What is known of an id that no format has.
    pub fn new(id: u32) -> UnknownFormat {
        let removed =
            REMOVED.iter().find(|row| row.0 == id).map(|&(_, name, note)| Why::Removed { name, note });
        let fork = || FORKS.iter().find(|row| (row.0..=row.1).contains(&id));
        let why = removed.or_else(|| fork().map(|&(_, _, fork, name)| Why::Fork { fork, name }));
        UnknownFormat { id, why: why.unwrap_or(Why::Unknown) }
    }
}

impl fmt::Display for UnknownFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.id;
        match self.why {
            Why::Removed { name, note } => {
                write!(f, "tensor type {id} is {name}, which GGML removed; {note}")
            }
            Why::Fork { fork, name } => write!(f, "tensor type {id} is a format of the fork {fork} ({name})"),
            Why::Unknown => write!(f, "tensor type {id} is not known"),
        }
    }
}

impl Error for UnknownFormat {}

/// Bytes and values of a call that are not the same whole number of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LengthMismatch {
    /// The format of the blocks.
    pub format: Format,
    /// Bytes given.
    pub bytes: usize,
    /// Values given.
    pub values: usize,
}

impl fmt::Display for LengthMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LengthMismatch { format, bytes, values } = self;
        let (name, block_bytes, block_len) = (format.name(), format.block_bytes(), format.block_len());
        write!(
            f,
            "{name}: {bytes} bytes and {values} values are not the same whole number of blocks \
             (of {block_bytes} bytes and {block_len} values)"
        )
    }
}

impl Error for LengthMismatch {}

/// A call that a format cannot serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum FormatError {
    /// The lengths do not match.
    Length(LengthMismatch),
    /// The format has no quantiser.
    NoQuantiser(Format),
    /// Without the importance of columns, the format's blocks are of no use.
    NoImportance(Format),
    /// The importance of columns has another length than a row.
    Columns {
        /// Values of a row.
        expected: usize,
        /// Columns given.
        got: usize,
    },
    /// The format is plain: it has no codes to unpack.
    NotQuantised(Format),
}

impl From<LengthMismatch> for FormatError {
    fn from(mismatch: LengthMismatch) -> Self {
        FormatError::Length(mismatch)
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatError::Length(mismatch) => mismatch.fmt(f),
            FormatError::NoQuantiser(format) => {
                write!(f, "{}: values cannot be quantised to it", format.name())
            }
            FormatError::NoImportance(format) => {
                write!(f, "{}: it needs the importance of columns", format.name())
            }
            FormatError::Columns { expected, got } => {
                write!(f, "importance of columns: expected {expected}, got {got}")
            }
            FormatError::NotQuantised(format) => write!(f, "{}: it has no codes to unpack", format.name()),
        }
    }
}

impl Error for FormatError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            FormatError::Length(mismatch) => Some(mismatch),
            _ => None,
        }
    }
}

//! The one error type at the library's boundary.

use std::path::PathBuf;

/// A `Result` with Halite's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, as a value: Halite never panics, aborts or prints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is not written, because of what it would replace.
    #[error("{}: not written: {why}", path.display())]
    Output {
        /// The file concerned.
        path: PathBuf,
        /// What is there.
        why: String,
    },
    /// The bytes are not a well-formed GGUF file.
    #[error("{}: {source}", path.display())]
    Gguf {
        /// The file concerned.
        path: PathBuf,
        /// What is malformed, and where.
        source: crate::gguf::GgufError,
    },
    /// A mapped file changed or shrank while it was in use, so its bytes can no longer be trusted.
    #[error("{}: the file changed while it was mapped ({detail}); load it again", path.display())]
    FileChanged {
        /// The file concerned.
        path: PathBuf,
        /// What differs from the moment of loading.
        detail: String,
    },
    /// The metadata or tensors do not describe a model that Halite can build.
    #[error("model: {0}")]
    Model(String),
    /// The model's architecture has no program here.
    #[error("model: architecture {0} is not supported (supported: {1})")]
    Architecture(String, String),
    /// The vocabulary in the file cannot be used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template is malformed, refuses the messages, or takes too much.
    #[error("chat template: {0}")]
    Template(String),
    /// What the output should be held to is malformed, cannot be satisfied, or takes too much.
    #[error("constraint: {0}")]
    Constraint(String),
    /// A program is inconsistent: a shape, a name or an order of definitions.
    #[error("program: {0}")]
    Program(String),
    /// A backend cannot run a program; every op that it lacks is listed.
    #[error("backend `{backend}` cannot run this program:\n  {}", gaps.join("\n  "))]
    Unsupported {
        /// The backend's name.
        backend: String,
        /// One line for each op that it cannot run, with the reason.
        gaps: Vec<String>,
    },
    /// A chip's profile is malformed, or its numbers cannot be.
    #[error("profile {profile}:\n  {}", faults.join("\n  "))]
    Profile {
        /// The file or the name.
        profile: String,
        /// One line for each fault: the key, its value and unit, and what was expected.
        faults: Vec<String>,
    },
    /// A call's arguments do not fit together.
    #[error("{what}: expected {expected}, got {got}")]
    Argument {
        /// Which argument of which call.
        what: &'static str,
        /// What would have been right.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A saved sequence is not this session's, or damaged.
    #[error("saved sequence: {what}: expected {expected}, got {got}")]
    Saved {
        /// What does not fit.
        what: &'static str,
        /// What the session has.
        expected: String,
        /// What was read.
        got: String,
    },
    /// A memory ceiling would be passed.
    #[error("out of memory: {what} needs {need_bytes} bytes, {}", available(*have_bytes))]
    OutOfMemory {
        /// What asked for memory.
        what: String,
        /// Bytes asked for.
        need_bytes: u64,
        /// Bytes that were left; 0 if nobody knows.
        have_bytes: u64,
    },
    /// The sequence does not fit in the context.
    #[error("context full: {need} positions needed, the session has {have}")]
    ContextFull {
        /// Positions needed.
        need: u64,
        /// Positions available.
        have: u64,
    },
    /// No memory is left for the windows of one more sequence.
    #[error(
        "windows full: layers that look back {window} positions have memory for {sequences} sequences at once \
         (SessionOptions::sequences)"
    )]
    WindowsFull {
        /// Positions that the layers look back.
        window: u32,
        /// Sequences that the session was made for.
        sequences: u32,
    },
    /// A model computed something that is not a number: a weight, an adapter or the backend is at fault.
    #[error("{what}: expected finite numbers, got {got}; a weight, an adapter or the backend is at fault")]
    NotFinite {
        /// What the numbers are, such as logits.
        what: &'static str,
        /// The first that is wrong, or what else is.
        got: String,
    },
    /// The work was cancelled from outside.
    #[error("cancelled")]
    Cancelled,
    /// A backend failed while running.
    #[error("backend `{backend}`: {message}")]
    Backend {
        /// The backend's name.
        backend: String,
        /// What failed.
        message: String,
    },
}

fn available(bytes: u64) -> String {
    if bytes == 0 { "which the system does not give".into() } else { format!("{bytes} are available") }
}

impl Error {
    /// An [`Error::Argument`], for checks at the boundary.
    pub fn argument(
        what: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Error::Argument { what, expected: expected.to_string(), got: got.to_string() }
    }
}

/// A text from outside, with control characters but newlines escaped: a terminal would obey them.
pub fn escaped(text: &str) -> String {
    escaped_to(text, usize::MAX)
}

/// The start of such a text.
#[cfg(any(feature = "chat", feature = "constrain"))]
pub(crate) fn printable(text: &str) -> String {
    escaped_to(text, 1000)
}

/// Not much more than `most` bytes of it.
fn escaped_to(text: &str, most: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() > most {
            return out + "…";
        }
        if c.is_control() && c != '\n' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

//! The error type of the library.

use std::path::PathBuf;

/// A `Result` with Halite's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error. Halite never panics, aborts or prints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A file was not written, because it would replace another one.
    #[error("{}: not written: {why}", path.display())]
    Output {
        /// The file concerned.
        path: PathBuf,
        /// What it would replace.
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
        /// What changed since loading.
        detail: String,
    },
    /// The metadata or tensors do not describe a model that Halite can build.
    #[error("model: {0}")]
    Model(String),
    /// The model's architecture is not supported.
    #[error("model: architecture {name} is not supported{found} (supported: {supported})")]
    Architecture {
        /// Its name in the file.
        name: String,
        /// What the file has that no supported one has, and which is nearest; begins with a semicolon if not empty.
        found: String,
        /// The supported ones.
        supported: String,
    },
    /// The vocabulary in the file cannot be used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template is malformed, rejects the messages, or exceeds a resource limit.
    #[error("chat template: {0}")]
    Template(String),
    /// A constraint is malformed, cannot be satisfied, or exceeds a resource limit.
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
        /// One line per op that the backend cannot run, with the reason.
        gaps: Vec<String>,
    },
    /// A chip's profile is malformed, or its numbers are impossible.
    #[error("profile {profile}:\n  {}", faults.join("\n  "))]
    Profile {
        /// The profile's file or name.
        profile: String,
        /// One line per fault: the key, its value and unit, and the expected value.
        faults: Vec<String>,
    },
    /// An argument of a call is wrong.
    #[error("{what}: expected {expected}, got {got}")]
    Argument {
        /// The argument.
        what: &'static str,
        /// The expected value.
        expected: String,
        /// The passed value.
        got: String,
    },
    /// A saved sequence is damaged, or does not fit this session.
    #[error("saved sequence: {what}: expected {expected}, got {got}")]
    Saved {
        /// What does not fit.
        what: &'static str,
        /// What the session has.
        expected: String,
        /// What was read.
        got: String,
    },
    /// A memory limit is exceeded.
    #[error("out of memory: {what} needs {need_bytes} bytes, {}", available(*have_bytes))]
    OutOfMemory {
        /// The use of the memory.
        what: String,
        /// Requested bytes.
        need_bytes: u64,
        /// Available bytes; 0 if unknown.
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
    /// Sliding-window layers have no memory for one more sequence.
    #[error(
        "too many sequences: sliding-window layers ({window} positions) have memory for {sequences} at once; raise \
        SessionOptions::sequences"
    )]
    WindowsFull {
        /// The layers' window in positions.
        window: u32,
        /// Sequences for which the session reserved memory.
        sequences: u32,
    },
    /// More sequences than recurrent layers have memory for.
    #[error(
        "too many sequences: recurrent layers have memory for {sequences} at once; raise SessionOptions::sequences"
    )]
    StatesFull {
        /// Sequences for which the session reserved memory.
        sequences: u32,
    },
    /// A model computed NaN or infinity: a weight, an adapter or the backend is at fault.
    #[error("{what}: expected finite numbers, got {got}; a weight, an adapter or the backend is at fault")]
    NotFinite {
        /// The kind of numbers, such as logits.
        what: &'static str,
        /// The first wrong number, or another description.
        got: String,
    },
    /// The work was cancelled.
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
    if bytes == 0 { "which the system cannot provide".into() } else { format!("{bytes} are available") }
}

impl Error {
    /// Creates an [`Error::Argument`].
    pub fn argument(
        what: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Error::Argument { what, expected: expected.to_string(), got: got.to_string() }
    }
}

/// Escapes the control characters of untrusted text, except newlines: a terminal would obey them.
pub fn escaped(text: &str) -> String {
    escaped_to(text, usize::MAX)
}

/// Escapes the start of a text for messages.
#[cfg(any(feature = "chat", feature = "constrain"))]
pub(crate) fn printable(text: &str) -> String {
    escaped_to(text, 1000)
}

/// Escapes a text, and cuts the result after about `max_bytes` bytes.
fn escaped_to(text: &str, max_bytes: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() > max_bytes {
            return out + "…";
        }
        if c.is_control() && c != '\n' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

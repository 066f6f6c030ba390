//! How text is cut into words before byte-level BPE. Every kind of `tokenizer.ggml.pre` is a row of a table.

use fancy_regex::Regex;

use crate::error::{Error, Result};
use crate::gguf::printable;

/// A kind of pre-tokenizer.
struct Kind {
    names: &'static [&'static str],
    /// Applied in turn, each to the pieces that the one before left.
    patterns: &'static [&'static str],
    /// A word that is a token as a whole is not built from merges.
    ignore_merges: bool,
    /// Whether texts begin with the begin-of-text token unless the file says otherwise.
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// The published patterns (OpenAI's GPT-2, Meta's Llama 3, Qwen 2, and llama.cpp's default), by the names that files use.
const KINDS: &[Kind] = &[
    Kind {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
    Kind { names: &["gpt-2", "phi-2"], patterns: &[GPT2], ignore_merges: false, add_bos: false },
    Kind {
        names: &["llama3", "llama-v3", "llama-bpe"],
        patterns: &[concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: true,
        add_bos: true,
    },
    Kind {
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: false,
        add_bos: false,
    },
];

/// Cuts text into words.
#[derive(Debug)]
pub(super) struct Pretokenizer {
    patterns: Vec<Regex>,
    pub(super) ignore_merges: bool,
    pub(super) add_bos: bool,
}

impl Pretokenizer {
    /// The kind that files call `name`. An unknown kind is refused: guessing gives other tokens.
    pub(super) fn new(name: &str) -> Result<Pretokenizer> {
        let Some(kind) = KINDS.iter().find(|kind| kind.names.contains(&name)) else {
            let known: Vec<&str> = KINDS.iter().flat_map(|kind| kind.names).copied().collect();
            let name = printable(name.as_bytes());
            let message = format!("pre-tokenizer {name} is not supported yet ({})", known.join(", "));
            return Err(Error::Tokenizer(message));
        };
        let patterns = kind.patterns.iter().map(|pattern| {
            Regex::new(pattern).map_err(|e| Error::Tokenizer(format!("pre-tokenizer `{name}`: {e}")))
        });
        Ok(Pretokenizer {
            patterns: patterns.collect::<Result<_>>()?,
            ignore_merges: kind.ignore_merges,
            add_bos: kind.add_bos,
        })
    }

    /// Calls `f` with every word, in order; together they are the text.
    pub(super) fn split<'t>(&self, text: &'t str, f: &mut dyn FnMut(&'t str)) {
        split(&self.patterns, text, f);
    }
}

fn split<'t>(patterns: &[Regex], text: &'t str, f: &mut dyn FnMut(&'t str)) {
    let Some((pattern, rest)) = patterns.split_first() else {
        if !text.is_empty() {
            f(text);
        }
        return;
    };
    let mut end = 0;
    // A pattern that gives up (its backtracking is limited) leaves the rest of the text as one piece.
    for found in pattern.find_iter(text).map_while(|found| found.ok()) {
        split(rest, &text[end..found.start()], f);
        split(rest, found.as_str(), f);
        end = found.end();
    }
    split(rest, &text[end..], f);
}

//! Tokenizers from GGUF metadata: SentencePiece BPE (`llama`) and unigram (`t5`), byte-level BPE (`gpt2`), BPE of
//! characters (`gemma4`) and WordPiece (`bert`).

mod bpe;
mod literals;
mod plamo;
pub(crate) mod pretokenize;
mod spm;
mod trie;
mod unigram;
mod vocabulary;
mod wordpiece;

use std::cell::RefCell;

use crate::error::{Error, Result};
use crate::gguf::{Gguf, printable};
use literals::Literals;
use vocabulary::Vocabulary;
#[cfg(feature = "convert")]
pub(crate) use vocabulary::{MAX_TOKEN_BYTES, MAX_TOKENS};

/// The type of a token: the values of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenKind {
    fn read(token: usize, kind: i128) -> Result<TokenKind> {
        Ok(match kind {
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            other => {
                let message = format!("tokenizer.ggml.token_type[{token}]: expected 1 to 6, got {other}");
                return Err(Error::Tokenizer(message));
            }
        })
    }
}

#[derive(Debug)]
enum Algorithm {
    Spm(spm::Spm),
    Bpe(bpe::Bpe),
    WordPiece(wordpiece::WordPiece),
    Unigram(unigram::Unigram),
    Plamo(plamo::Plamo),
}

/// A tokenizer algorithm with its special tokens, and whether they are added by default.
struct Kind {
    algorithm: Algorithm,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
}

/// A vocabulary and its algorithm.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    algorithm: Algorithm,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    /// What stands between two texts, beside the end of the first.
    separator: Option<u32>,
    add_separator: bool,
    ends: Vec<u32>,
    warnings: Vec<String>,
    /// Tokens that are matched in raw text before the algorithm runs.
    literals: Literals,
}

/// Options of encoding text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EncodeOptions {
    /// Adds the begin- and end-of-text tokens that the vocabulary defines.
    pub add_special: bool,
    /// Parses control tokens in the text, except in text from [`Tokenizer::quote`]. Leave it off for
    /// untrusted text.
    pub parse_special: bool,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        EncodeOptions { add_special: true, parse_special: false }
    }
}

crate::setters!(const EncodeOptions { add_special: bool, parse_special: bool });

/// Inserted into quoted text to break up control tokens; encodes to nothing. It is a noncharacter, which
/// Unicode reserves for internal use (Unicode 16, section 23.7).
const APART: char = '\u{fdd0}';

/// Key of the maximum characters of a WordPiece word; a longer word is unknown. It is Halite's own key,
/// because GGUF has none.
pub(crate) const MAX_WORD_CHARS: &str = "halite.tokenizer.max_input_chars_per_word";

/// Texts of tokens that end a generation even if the metadata do not say so.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<eos>",
    "</s>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Texts that are control tokens even if a file calls them normal, as some published files do. Encoded in
/// pieces, they would not begin or end a turn. `</s>` is not among them, because some vocabularies have it as
/// an HTML tag.
const CONTROL_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|turn>",
    "<turn|>",
    "<|tool_response>",
    "<end_of_utterance>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "[EOT]",
    "[e~[",
];

impl Tokenizer {
    /// Reads the tokenizer of a file; `None` if the file has no vocabulary (`tokenizer.ggml.model` is `none`
    /// or absent).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an unsupported tokenizer or an inconsistent vocabulary, [`Error::Gguf`] for
    /// metadata of a wrong type.
    pub fn from_gguf(gguf: &Gguf) -> Result<Option<Tokenizer>> {
        let Some(model) = gguf.optional_str("tokenizer.ggml.model")? else { return Ok(None) };
        if matches!(model, "none" | "no_vocab") {
            return Ok(None);
        }
        let mut vocabulary = Vocabulary::read(gguf)?;
        let count = vocabulary.len();
        let warnings = RefCell::new(Vec::new());
        let warn = |warning: String| warnings.borrow_mut().push(warning);
        for text in CONTROL_TEXTS {
            if let Some(id) = vocabulary.id(text.as_bytes())
                && matches!(vocabulary.kind(id), Some(TokenKind::Normal | TokenKind::Unused))
            {
                vocabulary.set_kind(id, TokenKind::Control);
                warn(format!("token {id}, `{text}`: the file says normal token, used as a control token"));
            }
        }
        let special = |name: &str, default: Option<u32>| -> Result<Option<u32>> {
            match gguf.optional_u32(&format!("tokenizer.ggml.{name}_token_id"))? {
                Some(id) if id as usize >= count => {
                    let instead = default.map_or("none".into(), |id| id.to_string());
                    warn(format!(
                        "{name}_token_id: expected below {count}, got {id}: {instead} is used instead"
                    ));
                    Ok(default)
                }
                id => Ok(id.or(default)),
            }
        };
        let or = |id: u32| (count > id as usize).then_some(id);
        let flag = |name: &str, default: bool| -> Result<bool> {
            Ok(gguf.optional_bool(&format!("tokenizer.ggml.{name}"))?.unwrap_or(default))
        };
        let required = |name: &str, default: u32| -> Result<u32> {
            let missing = || Error::Tokenizer(format!("{name}_token_id is missing"));
            special(name, or(default))?.ok_or_else(missing)
        };
        let Kind { algorithm, bos, eos, add_bos, add_eos } = match model {
            "llama" => {
                let add_space_prefix = flag("add_space_prefix", true)?;
                let spm = spm::Spm::new(&vocabulary, special("unknown", or(0))?, add_space_prefix)?;
                let (bos, eos) = (special("bos", or(1))?, special("eos", or(2))?);
                Kind { algorithm: Algorithm::Spm(spm), bos, eos, add_bos: true, add_eos: false }
            }
            "gpt2" | "gemma4" => {
                let pre = match model {
                    "gemma4" => Some("gemma4"),
                    _ => gguf.optional_str("tokenizer.ggml.pre")?,
                };
                if pre.is_none() {
                    warn(
                        "tokenizer.ggml.pre is missing: `default` is used, which may differ from training"
                            .into(),
                    );
                }
                let pre = pretokenize::Pretokenizer::new(pre.unwrap_or("default"))?;
                let add_bos = pre.add_bos;
                let merges = gguf
                    .optional_strings("tokenizer.ggml.merges")?
                    .ok_or_else(|| Error::Tokenizer("tokenizer.ggml.merges is missing".into()))?;
                let algorithm = Algorithm::Bpe(bpe::Bpe::new(pre, merges, &vocabulary)?);
                Kind {
                    algorithm,
                    bos: special("bos", None)?,
                    eos: special("eos", None)?,
                    add_bos,
                    add_eos: false,
                }
            }
            "bert" => {
                let lowercase = flag("normalizer.lowercase", true)?;
                let strip_accents = flag("normalizer.strip_accents", lowercase)?;
                let unknown = required("unknown", 100)?;
                let max_chars = gguf.optional_u32(MAX_WORD_CHARS)?.unwrap_or(wordpiece::MAX_CHARS);
                let algorithm =
                    wordpiece::WordPiece::new(&vocabulary, unknown, lowercase, strip_accents, max_chars)?;
                // A text lies between a CLS token and a separator, whose key the format misspells.
                let (bos, eos) = (special("cls", or(101))?, special("seperator", or(102))?);
                let algorithm = Algorithm::WordPiece(algorithm);
                Kind { algorithm, bos: special("bos", bos)?, eos, add_bos: true, add_eos: true }
            }
            "t5" => {
                let charsmap = gguf.optional_bytes("tokenizer.ggml.precompiled_charsmap")?;
                let unigram = unigram::Unigram::new(
                    &vocabulary,
                    required("unknown", 2)?,
                    flag("add_space_prefix", true)?,
                    flag("remove_extra_whitespaces", true)?,
                    charsmap.filter(|bytes| !bytes.is_empty()),
                )?;
                let (bos, eos) = (special("bos", None)?, special("eos", or(1))?);
                Kind { algorithm: Algorithm::Unigram(unigram), bos, eos, add_bos: false, add_eos: true }
            }
            "plamo2" => {
                let algorithm = Algorithm::Plamo(plamo::Plamo::new(&vocabulary)?);
                let (bos, eos) = (special("bos", or(1))?, special("eos", or(2))?);
                Kind { algorithm, bos, eos, add_bos: false, add_eos: false }
            }
            other => {
                let other = printable(other.as_bytes());
                let message = format!(
                    "tokenizer model {other} is not supported (llama, gpt2, gemma4, bert, t5, plamo2, none)"
                );
                return Err(Error::Tokenizer(message));
            }
        };
        let mut ends: Vec<u32> = eos.into_iter().collect();
        ends.extend(special("eot", None)?);
        ends.extend(special("eom", None)?);
        for text in END_TEXTS {
            if let Some(id) = vocabulary.id(text.as_bytes())
                && matches!(vocabulary.kind(id), Some(TokenKind::Control | TokenKind::UserDefined))
            {
                ends.push(id);
            }
        }
        // In a harmony vocabulary, which has its own end markers, `<|end|>` only closes a message.
        let has = |text: &str| vocabulary.id(text.as_bytes()).is_some();
        if has("<|return|>") && has("<|call|>") || has("<|calls|>") && has("<|flush|>") {
            ends.retain(|&id| vocabulary.text(id) != b"<|end|>");
        }
        // In Gemma 4's and PLaMo's, `</s>` is an HTML tag.
        if has("<|tool_response>") || has("<|plamo:eos|>") {
            ends.retain(|&id| vocabulary.text(id) != b"</s>");
        }
        ends.sort_unstable();
        ends.dedup();
        // Early files of Gemma 4 say that they add no token, but the model was trained with it.
        let adds_always = matches!(&algorithm, Algorithm::Bpe(bpe) if bpe.is_text());
        Ok(Some(Tokenizer {
            add_bos: flag("add_bos_token", add_bos)? || adds_always,
            add_eos: flag("add_eos_token", add_eos)?,
            separator: if matches!(algorithm, Algorithm::WordPiece(_)) {
                eos
            } else {
                special("seperator", eos)?
            },
            add_separator: flag("add_sep_token", false)?,
            // Unigram vocabularies score user-defined tokens with the rest.
            literals: Literals::new(&vocabulary, !matches!(algorithm, Algorithm::Unigram(_))),
            vocabulary,
            algorithm,
            bos,
            eos,
            ends,
            warnings: warnings.into_inner(),
        }))
    }

    /// Warnings about the vocabulary, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the number of tokens in the vocabulary.
    pub fn len(&self) -> usize {
        self.vocabulary.len()
    }

    /// Whether the vocabulary is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.vocabulary.len() == 0
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether encoding with `add_special` begins with the begin-of-text token.
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// Whether a token ends a generation.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Returns the type of a token.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.vocabulary.kind(id)
    }

    /// Returns a token's text in the vocabulary.
    pub fn text(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.kind(id).map(|_| self.vocabulary.text(id))
    }

    /// Returns the token whose text in the vocabulary is `text`.
    pub fn token(&self, text: &[u8]) -> Option<u32> {
        self.vocabulary.id(text)
    }

    /// Encodes a text.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        let mut out = Vec::new();
        if options.add_special && self.add_bos {
            out.extend(self.bos);
        }
        self.encode_between(text, options.parse_special, true, &mut out);
        if options.add_special && self.add_eos {
            out.extend(self.eos);
        }
        out
    }

    /// Encodes a pair of texts, as encoders are trained on them (Devlin et al. 2019): each ends with the end-of-text token, and the
    /// second may begin with one (Liu et al. 2019), as the vocabulary defines it.
    pub fn encode_pair(&self, first: &str, second: &str) -> Vec<u32> {
        let options = EncodeOptions::default();
        let mut out = self.encode(first, options);
        if self.add_separator {
            out.extend(self.separator);
        }
        self.encode_between(second, options.parse_special, true, &mut out);
        if self.add_eos {
            out.extend(self.eos);
        }
        out
    }

    /// Quotes untrusted text, so that its control tokens encode as plain text. A control token of a single
    /// character cannot be quoted.
    pub fn quote(&self, text: &str) -> String {
        let mut quoted = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            quoted.push(c);
            if self.literals.is_control(&self.vocabulary, &text[at..]) {
                quoted.push(APART);
            }
        }
        quoted
    }

    /// Splits a text into literals and the parts between them.
    fn encode_between(&self, text: &str, parse_special: bool, mut first: bool, out: &mut Vec<u32>) {
        let mut start = 0;
        for (range, id) in self.literals.find(&self.vocabulary, text, parse_special) {
            self.encode_part(&text[start..range.start], parse_special, first, out);
            out.push(id);
            (start, first) = (range.end, true);
        }
        self.encode_part(&text[start..], parse_special, first, out);
    }

    fn encode_part(&self, text: &str, may_be_quoted: bool, first: bool, out: &mut Vec<u32>) {
        match may_be_quoted && text.contains(APART) {
            true => self.encode_between(&text.replace(APART, ""), false, first, out),
            false => self.encode_plain(text, first, out),
        }
    }

    fn encode_plain(&self, text: &str, first: bool, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.algorithm {
            Algorithm::Spm(spm) => spm.encode(text, first, &self.vocabulary, out),
            Algorithm::Bpe(bpe) => bpe.encode(text, &self.vocabulary, out),
            Algorithm::WordPiece(wordpiece) => wordpiece.encode(text, &self.vocabulary, out),
            Algorithm::Unigram(unigram) => unigram.encode(text, first, &self.vocabulary, out),
            Algorithm::Plamo(plamo) => plamo.encode(text, &self.vocabulary, out),
        }
    }

    /// Checks that the vocabulary has tokens of these ids.
    ///
    /// # Errors
    /// [`Error::Argument`] with the first id beyond the vocabulary.
    pub fn check(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.len()) {
            None => Ok(()),
            Some(id) => Err(Error::argument(
                "token id",
                format!("below {}, the number of tokens in the vocabulary", self.len()),
                id,
            )),
        }
    }

    /// Appends the bytes of a token. Control tokens have no bytes unless `special` is set. Ids beyond the
    /// vocabulary never have bytes: a model whose embedding has more rows than the vocabulary may generate
    /// them. [`Tokenizer::check`] finds such ids.
    pub fn decode_token(&self, id: u32, special: bool, out: &mut Vec<u8>) {
        let (Some(kind), text) = (self.kind(id), self.vocabulary.text(id)) else { return };
        match (kind, &self.algorithm) {
            (TokenKind::Control | TokenKind::Unknown, _) => {
                if special {
                    out.extend_from_slice(text);
                }
            }
            (TokenKind::UserDefined, _) => out.extend_from_slice(text),
            (_, Algorithm::Spm(spm)) => spm.decode(id, text, out),
            (_, Algorithm::Bpe(bpe)) => bpe.decode(id, text, out),
            (_, Algorithm::WordPiece(_) | Algorithm::Unigram(_)) => vocabulary::unescape(text, out),
            (TokenKind::Byte, Algorithm::Plamo(_)) => out.extend(spm::byte_of(text)),
            (_, Algorithm::Plamo(_)) => out.extend_from_slice(text),
        }
    }

    /// Decodes tokens to text, as [`Tokenizer::decode_token`] does. Bytes that are not UTF-8 become
    /// replacement characters.
    pub fn decode(&self, ids: &[u32], special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            self.decode_token(id, special, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether encoding adds a space in front of a text, which decoding leaves there.
    pub fn adds_space_prefix(&self) -> bool {
        match &self.algorithm {
            Algorithm::Spm(spm) => spm.add_space_prefix,
            Algorithm::Bpe(_) | Algorithm::Plamo(_) => false,
            Algorithm::WordPiece(_) => true,
            Algorithm::Unigram(unigram) => unigram.add_space_prefix,
        }
    }
}

/// Decodes a stream of tokens in whole characters.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// Bytes of an incomplete character.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Adds a token and appends the text that is now complete to `out`. Control tokens have none unless
    /// `special` is set.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, special: bool, out: &mut String) {
        tokenizer.decode_token(id, special, &mut self.pending);
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            let invalid = chunk.invalid();
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            // The next token may complete a truncated character.
            let at_end = done + invalid.len() == self.pending.len();
            let waits = at_end && is_incomplete(invalid);
            if !invalid.is_empty() && !waits {
                out.push(char::REPLACEMENT_CHARACTER);
                done += invalid.len();
            }
        }
        self.pending.drain(..done);
    }

    /// Ends the stream: appends a replacement character if the last character is incomplete.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Whether bytes that are not UTF-8 are the start of a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

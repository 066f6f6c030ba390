//! Output held to a JSON schema, a regular expression or a grammar, by llguidance: before each token, it says which tokens may come.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use crate::error::{Error, Result};
use crate::generate::{Allowed, Constraint};
use crate::tokenizer::{TokenKind, Tokenizer};

/// What the output must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// JSON of this schema, without spaces between its parts unless the schema's `x-guidance` says otherwise: where they are allowed,
    /// small models write them for ever.
    JsonSchema(String),
    /// A text that this regular expression matches as a whole, in the syntax of the crate `regex`.
    Regex(String),
    /// A text of this grammar, in llguidance's variant of Lark's syntax.
    Grammar(String),
}

/// A rule on its way through a text.
pub struct Guide {
    matcher: Matcher,
    mask: SimpleVob,
    /// A token of no text that stands for all that end one.
    end: u32,
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").finish_non_exhaustive()
    }
}

impl Guide {
    /// A rule for the texts of a tokenizer, whatever its kind: only the tokens' bytes matter.
    ///
    /// # Errors
    /// [`Error::Constraint`] for a rule that is malformed, that nothing satisfies, or that takes too much.
    pub fn new(tokenizer: &Tokenizer, rule: &Rule) -> Result<Guide> {
        let failed = |e: &dyn std::fmt::Display| Error::Constraint(e.to_string());
        let grammar = match rule {
            Rule::JsonSchema(text) => {
                let mut schema: serde_json::Value = serde_json::from_str(text).map_err(|e| failed(&e))?;
                if let Some(schema) = schema.as_object_mut() {
                    let compact = || serde_json::json!({ "whitespace_flexible": false });
                    schema.entry("x-guidance").or_insert_with(compact);
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Rule::Regex(text) => TopLevelGrammar::from_regex(text),
            Rule::Grammar(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let end = tokenizer.len() as u32;
        let mut words: Vec<Vec<u8>> = (0..end).map(|id| word(tokenizer, id)).collect();
        words.push(Vec::new());
        let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| failed(&e))?;
        factory.quiet();
        let matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(Error::Constraint(error)),
            None => Ok(Guide { matcher, mask: SimpleVob::new(), end }),
        }
    }
}

/// The bytes of a token; none for tokens without text, and for those that start with the byte that no text has, which is a mark
/// of llguidance.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    if matches!(tokenizer.kind(id), Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte))
        && !tokenizer.is_end(id)
    {
        tokenizer.decode_token(id, false, &mut bytes);
    }
    if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        bytes.clear();
    }
    bytes
}

impl Constraint for Guide {
    fn allowed(&mut self) -> Result<Allowed<'_>> {
        if self.matcher.is_stopped() {
            let reason = self.matcher.stop_reason();
            let error = || self.matcher.get_error().unwrap_or_else(|| reason.to_string());
            return if reason.is_ok() {
                Ok(Allowed { tokens: &[], end: true })
            } else {
                Err(Error::Constraint(error()))
            };
        }
        self.mask = self.matcher.compute_mask().map_err(|e| Error::Constraint(e.to_string()))?;
        let end = self.mask.is_allowed(self.end);
        self.mask.disallow_token(self.end);
        Ok(Allowed { tokens: self.mask.as_slice(), end })
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(|e| Error::Constraint(e.to_string()))
    }
}

//! Constrained decoding by a JSON schema, a regular expression or a grammar, with llguidance.
//!
//! Rules come from requests. Their size is limited, and they run on a separate thread with a large stack and
//! a deadline for each answer: llguidance recurses as deep as a rule nests, and cannot be stopped while it
//! builds one.

mod gbnf;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{CancellationHandle, Matcher, ParserFactory};

use crate::error::{Error, Result, printable};
use crate::generate::{Allowed, Constraint};
use crate::tokenizer::{TokenKind, Tokenizer};

/// Maximum bytes of a rule.
const MAX_BYTES: usize = 256 << 10;

/// Maximum definitions of a grammar and references in a schema, each of which may need the next.
const MAX_DEFINITIONS: usize = 2000;

/// Maximum values of a schema, including names.
const MAX_VALUES: usize = 10_000;

/// Maximum open brackets of a grammar or an expression.
const MAX_NESTING: usize = 200;

/// Maximum symbols of a compiled grammar, and maximum states of its lexer, at about 2 kB each.
const MAX_SYMBOLS: usize = 200_000;
const MAX_STATES: usize = 50_000;

/// Maximum time to build a rule, and to process a token.
const MAX_TIME: Duration = Duration::from_secs(2);

/// The stack of a rule's thread. The longest allowed chain of references takes less than half of it without
/// optimization.
const STACK: usize = 256 << 20;

/// A rule for the output.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// JSON of this schema, without white space unless the schema's `x-guidance` allows it: small models may
    /// otherwise write white space forever.
    JsonSchema(String),
    /// A text that this regular expression matches as a whole, in the syntax of the crate `regex`.
    Regex(String),
    /// A text of this grammar, in llguidance's variant of Lark's syntax.
    Grammar(String),
    /// A text of this grammar in GBNF, llama.cpp's syntax, without its rules for single tokens. It is matched
    /// character by character, which is slower than a grammar with regular expressions.
    Gbnf(String),
    /// A text of a grammar in Lark's syntax, in which `@name` stands for JSON of the schema of that name. Keywords that are
    /// not supported in a schema are ignored.
    Structured {
        /// The grammar.
        grammar: String,
        /// Names and schemas.
        schemas: Vec<(String, String)>,
    },
}

/// How JSON of a rule is written.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    /// Without white space.
    Compact,
    /// As Python's `json.dumps` writes it, which models have learnt for calls. Keywords that are not supported are ignored.
    Spaced,
}

impl Rule {
    /// A grammar in either syntax: [`Rule::Gbnf`] if its first rule is written with `::=`, else
    /// [`Rule::Grammar`].
    pub fn grammar(text: &str) -> Rule {
        if gbnf::is_gbnf(text) { Rule::Gbnf(text.into()) } else { Rule::Grammar(text.into()) }
    }

    /// Returns the grammar for llguidance.
    fn read(&self) -> Result<TopLevelGrammar, String> {
        let (text, schemas) = match self {
            Rule::JsonSchema(text) | Rule::Regex(text) | Rule::Grammar(text) | Rule::Gbnf(text) => {
                (text, &[][..])
            }
            Rule::Structured { grammar, schemas } => (grammar, &schemas[..]),
        };
        let bytes = schemas.iter().fold(text.len(), |sum, (name, schema)| sum + name.len() + schema.len());
        at_most("bytes", MAX_BYTES, bytes)?;
        match self {
            Rule::JsonSchema(_) => {
                Ok(TopLevelGrammar::from_json_schema(read_schema(text, Style::Compact, &mut (0, 0))?))
            }
            Rule::Regex(_) => {
                at_most("open brackets", MAX_NESTING, nesting(text))?;
                Ok(TopLevelGrammar::from_regex(text))
            }
            Rule::Grammar(_) | Rule::Structured { .. } => {
                at_most("open brackets", MAX_NESTING, nesting(text))?;
                // Each definition has a colon, and so has each of a JSON schema inside it.
                at_most("colons", MAX_DEFINITIONS, text.matches(':').count())?;
                let mut grammar = TopLevelGrammar::from_lark(text.clone());
                let mut counted = (0, 0);
                for (name, schema) in schemas {
                    let schema = read_schema(schema, Style::Spaced, &mut counted)?;
                    let schema = GrammarWithLexer::from_json_schema(schema);
                    grammar.grammars.push(GrammarWithLexer { name: Some(name.clone()), ..schema });
                }
                Ok(grammar)
            }
            Rule::Gbnf(_) => {
                let lark =
                    gbnf::to_lark(text, MAX_NESTING, MAX_DEFINITIONS).map_err(|e| format!("GBNF: {e}"))?;
                Ok(TopLevelGrammar::from_lark(lark))
            }
        }
    }
}

fn at_most(what: &str, max: usize, got: usize) -> Result<(), String> {
    if got > max { Err(format!("expected at most {max} {what}, got {got}")) } else { Ok(()) }
}

/// Returns the maximum depth of open brackets, including those in strings.
fn nesting(text: &str) -> usize {
    let (mut open, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(open);
    }
    deepest
}

/// Reads a schema. `counted` has the values and references of those before it.
fn read_schema(text: &str, style: Style, counted: &mut (usize, usize)) -> Result<serde_json::Value, String> {
    let mut schema: serde_json::Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let (values, references) = count(&schema);
    *counted = (counted.0 + values, counted.1 + references);
    at_most("values", MAX_VALUES, counted.0)?;
    at_most("references", MAX_DEFINITIONS, counted.1)?;
    if let Some(schema) = schema.as_object_mut() {
        let how = || match style {
            Style::Compact => serde_json::json!({ "whitespace_flexible": false }),
            Style::Spaced => serde_json::json!({
                "whitespace_flexible": false, "key_separator": ": ", "item_separator": ", ", "lenient": true,
            }),
        };
        schema.entry("x-guidance").or_insert_with(how);
    }
    Ok(schema)
}

/// Counts the values and references of a schema. The parser has limited its depth.
fn count(value: &serde_json::Value) -> (usize, usize) {
    let sum = |(a, b), (c, d)| (a + c, b + d);
    match value {
        serde_json::Value::Array(items) => items.iter().map(count).fold((1, 0), sum),
        serde_json::Value::Object(items) => {
            let references = usize::from(items.contains_key("$ref"));
            items.values().map(count).fold((1, references), sum)
        }
        _ => (1, 0),
    }
}

/// The bytes of a tokenizer's tokens, for any number of rules.
#[derive(Clone)]
pub struct Vocabulary {
    tokens: TokEnv,
    /// A token that no tokenizer has: the end of the text.
    end: u32,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("tokens", &self.end).finish()
    }
}

impl Vocabulary {
    /// Reads a tokenizer of any kind: only the tokens' bytes matter.
    ///
    /// # Errors
    /// [`Error::Constraint`] if there is no thread to read it on.
    pub fn new(tokenizer: &Tokenizer) -> Result<Vocabulary> {
        Vocabulary::with_control(tokenizer, &[])
    }

    /// As [`Vocabulary::new`]. Control tokens of the texts `control` count as these texts, so that a rule can ask for them; other
    /// control tokens are never allowed.
    ///
    /// # Errors
    /// As [`Vocabulary::new`].
    pub fn with_control(tokenizer: &Tokenizer, control: &[&str]) -> Result<Vocabulary> {
        let end = tokenizer.len() as u32;
        let mut words: Vec<Vec<u8>> = (0..end).map(|id| word(tokenizer, id)).collect();
        for text in control {
            let id = tokenizer.token(text.as_bytes()).filter(|&id| !tokenizer.is_end(id));
            if let Some(word) = id.and_then(|id| words.get_mut(id as usize)) {
                *word = text.as_bytes().to_vec();
            }
        }
        words.push(Vec::new());
        let read = move || -> TokEnv {
            Arc::new(ApproximateTokEnv::new(TokTrie::from(&TokRxInfo::new(end + 1, end), &words)))
        };
        let failed = |detail: String| Error::Constraint(format!("the vocabulary cannot be read: {detail}"));
        // It recurses as deep as tokens are long.
        let thread = std::thread::Builder::new().name("vocabulary".into()).stack_size(STACK).spawn(read);
        let tokens = thread.map_err(|e| failed(e.to_string()))?.join();
        Ok(Vocabulary { tokens: tokens.map_err(|_| failed("its thread ended".into()))?, end })
    }
}

/// A rule that constrains a text.
pub struct Guide {
    tokens: SyncSender<u32>,
    answers: Receiver<Answer>,
    cancel: Option<CancellationHandle>,
    /// The error that ended it.
    failed: Option<String>,
    /// The tokens that are allowed next, and whether the text may end; `None` while the thread computes them.
    next: Option<(SimpleVob, bool)>,
}

enum Reply {
    Built(Option<CancellationHandle>),
    Accepted,
    /// Follows each of the others.
    Next(SimpleVob, bool),
}

type Answer = Result<Reply, String>;

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").finish_non_exhaustive()
    }
}

impl Guide {
    /// Compiles a rule for a tokenizer.
    ///
    /// # Errors
    /// [`Error::Constraint`] for a rule that is malformed, cannot be satisfied, or exceeds a limit.
    pub fn new(tokenizer: &Tokenizer, rule: &Rule) -> Result<Guide> {
        let grammar = rule.read().map_err(|message| Error::Constraint(printable(&message)))?;
        Guide::start(&Vocabulary::new(tokenizer)?, grammar)
    }

    /// Compiles a rule for a vocabulary that was read before.
    ///
    /// # Errors
    /// As [`Guide::new`].
    pub fn of(vocabulary: &Vocabulary, rule: &Rule) -> Result<Guide> {
        Guide::start(vocabulary, rule.read().map_err(|message| Error::Constraint(printable(&message)))?)
    }

    fn start(vocabulary: &Vocabulary, grammar: TopLevelGrammar) -> Result<Guide> {
        let (tokens, chosen) = sync_channel(1);
        let (send, answers) = sync_channel(1);
        let vocabulary = vocabulary.clone();
        std::thread::Builder::new()
            .name("constraint".into())
            .stack_size(STACK)
            .spawn(move || {
                if let Err(message) = work(&vocabulary, grammar, &chosen, &send) {
                    let _ = send.send(Err(message));
                }
            })
            .map_err(|e| Error::Constraint(format!("no thread to build it on: {e}")))?;
        let mut guide = Guide { tokens, answers, cancel: None, failed: None, next: None };
        match guide.answer()? {
            Reply::Built(cancel) => guide.cancel = cancel,
            _ => return Err(guide.fail("the rule was not built".into())),
        }
        Ok(guide)
    }

    fn fail(&mut self, message: String) -> Error {
        self.failed = Some(message.clone());
        Error::Constraint(message)
    }

    /// Returns the next answer. After an error, every answer is that error.
    fn answer(&mut self) -> Result<Reply> {
        if let Some(failed) = &self.failed {
            return Err(Error::Constraint(failed.clone()));
        }
        Err(match self.answers.recv_timeout(MAX_TIME) {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(message)) => self.fail(printable(&message)),
            Err(RecvTimeoutError::Timeout) => self.fail(format!("takes longer than {MAX_TIME:?}")),
            Err(RecvTimeoutError::Disconnected) => self.fail("the rule's thread ended".into()),
        })
    }

    /// Waits for the tokens that are allowed next.
    fn wait(&mut self) -> Result<()> {
        if self.next.is_none() {
            match self.answer()? {
                Reply::Next(tokens, end) => self.next = Some((tokens, end)),
                _ => return Err(self.fail("the rule's thread answered something else".into())),
            }
        }
        Ok(())
    }
}

impl Drop for Guide {
    /// The thread ends by itself, at the next token or check for cancellation.
    fn drop(&mut self) {
        if let Some(cancel) = &self.cancel {
            cancel.cancel();
        }
    }
}

/// Runs a rule's thread. It computes what is allowed next while the model runs.
fn work(
    vocabulary: &Vocabulary,
    grammar: TopLevelGrammar,
    tokens: &Receiver<u32>,
    answers: &SyncSender<Answer>,
) -> Result<(), String> {
    let answer = |reply| answers.send(Ok(reply)).map_err(|e| e.to_string());
    let mut factory = ParserFactory::new_simple(&vocabulary.tokens).map_err(|e| e.to_string())?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.max_grammar_size = MAX_SYMBOLS;
    limits.max_lexer_states = MAX_STATES;
    // Each character is a word of its own in GBNF.
    limits.step_max_items = 1_000_000;
    limits.verbose_errors = false;
    let mut matcher = Matcher::new(factory.create_parser(grammar)).into_cancellable();
    if let Some(error) = matcher.get_error() {
        return Err(plain(&error));
    }
    answer(Reply::Built(matcher.cancellation_handle()))?;
    answer(next(&mut matcher, vocabulary.end)?)?;
    for token in tokens {
        matcher.consume_token(token).map_err(|e| plain(&e.to_string()))?;
        answer(Reply::Accepted)?;
        answer(next(&mut matcher, vocabulary.end)?)?;
    }
    Ok(())
}

/// The tokens that are allowed next.
fn next(matcher: &mut Matcher, end: u32) -> Result<Reply, String> {
    if !matcher.is_stopped() {
        let mut tokens = matcher.compute_mask().map_err(|e| plain(&e.to_string()))?;
        let ends = tokens.is_allowed(end);
        tokens.disallow_token(end);
        return Ok(Reply::Next(tokens, ends));
    }
    let reason = matcher.stop_reason();
    if reason.is_ok() {
        return Ok(Reply::Next(SimpleVob::new(), true));
    }
    let error = matcher.get_error().unwrap_or_else(|| format!("nothing can follow ({reason})"));
    Err(plain(&error))
}

/// Removes the location in llguidance from an error.
fn plain(error: &str) -> String {
    error.split("\n<").next().unwrap_or_default().trim().to_string()
}

/// Returns the bytes of a token; none for tokens without text, and for tokens that start with llguidance's
/// marker byte, which no text has.
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
        self.wait()?;
        let (tokens, end) =
            self.next.as_ref().map_or((&[] as &[u32], false), |(t, end)| (t.as_slice(), *end));
        Ok(Allowed { tokens, end })
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        // What is allowed next comes before the answer to the token.
        self.wait()?;
        self.next = None;
        if self.tokens.send(token).is_err() {
            return Err(self.fail("the rule's thread ended".into()));
        }
        match self.answer()? {
            Reply::Accepted => Ok(()),
            _ => Err(self.fail("the rule's thread answered something else".into())),
        }
    }
}

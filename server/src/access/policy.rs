//! Rules on prompts and answers, as the configuration has them.

use std::sync::Arc;

use regex_automata::meta::{self, Regex};
use regex_automata::util::syntax;
use serde::{Deserialize, Serialize};

use super::filter::{OutputFilter, Rule};
use super::{AccessError, Denied};

/// Maximum rules of a list.
const MAX_RULES: usize = 256;
/// Maximum bytes of a pattern.
const MAX_PATTERN_BYTES: usize = 4096;
/// Maximum depth of groups in a pattern.
const MAX_NESTING: u32 = 50;
/// Maximum bytes that a compiled pattern takes.
const MAX_COMPILED_BYTES: usize = 1 << 20;
/// Maximum bytes of a match: so much of a stream is held back.
const MAX_WINDOW_BYTES: usize = 4096;

/// What happens to a text that a rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The request is refused, or its answer ends before the match.
    Deny,
    /// The match is replaced.
    Redact,
}

/// A rule on texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Its name, which errors have.
    pub name: String,
    /// A regular expression in the syntax of the crate `regex`.
    pub pattern: String,
    /// What happens to a match.
    pub action: Action,
    /// The text instead of a match that is redacted [default: `[redacted]`].
    #[serde(default = "replacement")]
    pub replacement: String,
    /// Bytes of the longest match, for patterns that do not bound it.
    pub window_bytes: Option<usize>,
}

fn replacement() -> String {
    "[redacted]".into()
}

/// A form of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResponseForm {
    /// Plain text.
    Text,
    /// JSON.
    JsonObject,
    /// JSON of a schema.
    JsonSchema,
    /// Calls of tools.
    ToolCalls,
}

/// Rules for all clients.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// Tokens of an answer.
    pub max_output_tokens: Option<u32>,
    /// Forms of answers that requests may ask for [default: all].
    pub responses: Option<Vec<ResponseForm>>,
    /// Rules on prompts.
    #[serde(default)]
    pub input: Vec<RuleConfig>,
    /// Rules on answers.
    #[serde(default)]
    pub output: Vec<RuleConfig>,
}

/// Rules on prompts and answers, compiled.
#[derive(Debug, Clone)]
pub struct Policy {
    max_output_tokens: Option<u32>,
    responses: Option<Vec<ResponseForm>>,
    input: Arc<[Rule]>,
    output: Arc<[Rule]>,
}

impl Policy {
    /// Compiles the rules.
    ///
    /// # Errors
    /// [`AccessError::Rule`] for a pattern that is malformed or too large, matches nothing, or does not bound its matches.
    pub fn new(config: &PolicyConfig) -> Result<Policy, AccessError> {
        Ok(Policy {
            max_output_tokens: config.max_output_tokens,
            responses: config.responses.clone(),
            input: compile(&config.input)?,
            output: compile(&config.output)?,
        })
    }

    /// The tokens that an answer may have: the fewest of what is asked for, this policy's limit and a client's.
    pub fn output_tokens(&self, asked: u32, client: Option<u32>) -> u32 {
        [self.max_output_tokens, client].into_iter().flatten().fold(asked, u32::min)
    }

    /// Whether requests may ask for answers of a form.
    pub fn allows(&self, form: ResponseForm) -> bool {
        self.responses.as_ref().is_none_or(|forms| forms.contains(&form))
    }

    /// Whether there are rules on answers.
    pub fn has_output_rules(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether there are rules on prompts.
    pub fn has_input_rules(&self) -> bool {
        !self.input.is_empty()
    }

    /// Applies the rules on prompts to a text.
    ///
    /// # Errors
    /// [`Denied::Rule`].
    pub fn input(&self, text: &str) -> Result<String, Denied> {
        let mut filter = OutputFilter::new(self.input.clone());
        let first = filter.push(text);
        let rest = filter.finish();
        match first.denied.or(rest.denied) {
            Some(denied) => Err(denied),
            None => Ok(first.text + &rest.text),
        }
    }

    /// The rules on answers, for the pieces of one answer.
    pub fn output(&self) -> OutputFilter {
        OutputFilter::new(self.output.clone())
    }
}

fn compile(configs: &[RuleConfig]) -> Result<Arc<[Rule]>, AccessError> {
    if let Some(config) = configs.get(MAX_RULES) {
        let what = format!("expected at most {MAX_RULES} rules, got {}", configs.len());
        return Err(AccessError::Rule { name: config.name.clone(), what });
    }
    configs.iter().map(rule).collect()
}

fn rule(config: &RuleConfig) -> Result<Rule, AccessError> {
    let wrong = |what: String| AccessError::Rule { name: config.name.clone(), what };
    if config.pattern.len() > MAX_PATTERN_BYTES {
        let got = config.pattern.len();
        return Err(wrong(format!("expected a pattern of at most {MAX_PATTERN_BYTES} bytes, got {got}")));
    }
    let syntax = syntax::Config::new().nest_limit(MAX_NESTING);
    let hir = syntax::parse_with(&config.pattern, &syntax).map_err(|e| wrong(e.to_string()))?;
    match hir.properties().minimum_len() {
        Some(0) => return Err(wrong("expected a pattern that does not match the empty text".into())),
        None => return Err(wrong("expected a pattern that can match a text".into())),
        Some(_) => {}
    }
    let (longest, given) = (hir.properties().maximum_len(), config.window_bytes);
    let window_bytes = match (longest, given) {
        (Some(longest), Some(given)) => longest.min(given),
        (Some(bytes), None) | (None, Some(bytes)) => bytes,
        (None, None) => {
            let what = "the pattern does not bound the bytes of a match; write {1,64} instead of +, or give window_bytes";
            return Err(wrong(what.into()));
        }
    };
    if !(1..=MAX_WINDOW_BYTES).contains(&window_bytes) {
        return Err(wrong(format!(
            "expected matches of 1 to {MAX_WINDOW_BYTES} bytes, got {window_bytes}; give window_bytes"
        )));
    }
    let limits = meta::Config::new().nfa_size_limit(Some(MAX_COMPILED_BYTES));
    let regex = Regex::builder().configure(limits).build_from_hir(&hir);
    Ok(Rule {
        name: config.name.clone(),
        regex: regex.map_err(|e| wrong(e.to_string()))?,
        window_bytes,
        is_cut: longest.is_none_or(|longest| longest > window_bytes),
        action: config.action,
        replacement: config.replacement.clone(),
    })
}

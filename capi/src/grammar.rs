//! Grammars that generations are held to.

use std::ffi::c_char;
use std::sync::Arc;

use halite::Tokenizer;
use halite::generate::Constraint;

use crate::border::{Caller, Fallible, HaliteResult, call};
use crate::handle::{self, Object};
use crate::tokenizer::HaliteTokenizer;

/// A rule that a generation's text follows. Any number of generations may use it, also at once.
pub struct HaliteGrammar;

/// The language of a rule.
pub type HaliteGrammarKind = u32;
/// A JSON schema; the text is JSON without white space.
pub const HALITE_GRAMMAR_JSON_SCHEMA: HaliteGrammarKind = 0;
/// A regular expression, which matches the whole text.
pub const HALITE_GRAMMAR_REGEX: HaliteGrammarKind = 1;
/// A grammar in GBNF.
pub const HALITE_GRAMMAR_GBNF: HaliteGrammarKind = 2;
/// A grammar in llguidance's variant of Lark.
pub const HALITE_GRAMMAR_LARK: HaliteGrammarKind = 3;

pub(crate) struct GrammarObject {
    #[cfg(feature = "constrain")]
    rule: halite::constrain::Rule,
    /// Compiled to check the rule; the first generation takes it.
    #[cfg(feature = "constrain")]
    first: std::sync::Mutex<Option<halite::constrain::Guide>>,
    tokenizer: Arc<Tokenizer>,
}

impl Object for GrammarObject {
    type Handle = HaliteGrammar;
    const KIND: &'static str = "grammar";
}

#[cfg(feature = "constrain")]
fn make(kind: HaliteGrammarKind, text: &str, tokenizer: Arc<Tokenizer>) -> Fallible<GrammarObject> {
    use halite::constrain::{Guide, Rule};
    let rule = match kind {
        HALITE_GRAMMAR_JSON_SCHEMA => Rule::JsonSchema(text.into()),
        HALITE_GRAMMAR_REGEX => Rule::Regex(text.into()),
        HALITE_GRAMMAR_GBNF => Rule::Gbnf(text.into()),
        HALITE_GRAMMAR_LARK => Rule::Grammar(text.into()),
        other => return Err(crate::border::Failure::argument("kind", "0 to 3", other)),
    };
    let first = std::sync::Mutex::new(Some(Guide::new(&tokenizer, &rule)?));
    Ok(GrammarObject { rule, first, tokenizer })
}

#[cfg(not(feature = "constrain"))]
fn make(_: HaliteGrammarKind, _: &str, _: Arc<Tokenizer>) -> Fallible<GrammarObject> {
    Err(crate::border::Failure::not_built("constrain"))
}

/// The constraint of a grammar for a new generation, if there is a grammar.
pub(crate) fn constraint(
    grammar: *const HaliteGrammar,
    tokenizer: &Arc<Tokenizer>,
) -> Fallible<Option<Box<dyn Constraint + Send>>> {
    let Some(object) = handle::get_optional::<GrammarObject>(grammar)? else { return Ok(None) };
    if !Arc::ptr_eq(&object.tokenizer, tokenizer) {
        let expected = "a grammar of the generation's tokenizer";
        return Err(crate::border::Failure::argument("grammar", expected, "that of another"));
    }
    #[cfg(feature = "constrain")]
    {
        let first = handle::brief(GrammarObject::KIND, &object.first)?.take();
        let guide = match first {
            Some(guide) => guide,
            None => halite::constrain::Guide::new(tokenizer, &object.rule)?,
        };
        Ok(Some(Box::new(guide)))
    }
    #[cfg(not(feature = "constrain"))]
    Ok(None)
}

/// Compiles a grammar for a tokenizer. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_grammar_open(
    tokenizer: *const HaliteTokenizer,
    kind: HaliteGrammarKind,
    text: *const c_char,
    grammar: *mut *mut HaliteGrammar,
) -> HaliteResult {
    let make = |c: &Caller| make(kind, c.text("text", text)?, handle::get(tokenizer)?);
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, grammar, || make(c))) }
}

/// Closes a grammar. Generations that use it keep it. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_grammar_close(grammar: *mut HaliteGrammar) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<GrammarObject>(grammar)) }
}

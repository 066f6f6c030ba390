//! Any grammar, in Lark's syntax or in GBNF, and any expression ends in a guide that can be followed, or an error, soon and in
//! bounded memory.
#![no_main]

mod guide;

use halite::constrain::Rule;

libfuzzer_sys::fuzz_target!(|text: &str| {
    guide::follow(&match text.strip_prefix("/") {
        Some(regex) => Rule::Regex(regex.into()),
        None => Rule::grammar(text),
    });
});

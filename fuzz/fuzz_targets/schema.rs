//! Any JSON schema ends in a guide that can be followed, or an error, soon and in bounded memory.
#![no_main]

mod guide;

use halite::constrain::Rule;

libfuzzer_sys::fuzz_target!(|text: &str| guide::follow(&Rule::JsonSchema(text.into())));

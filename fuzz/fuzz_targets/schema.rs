//! Any JSON schema ends in a guide that can be followed, or an error, soon and in bounded memory.
#![no_main]

use std::sync::LazyLock;

use halite::constrain::{Guide, Rule};
use halite::generate::Constraint;
use halite::gguf::Gguf;
use halite::map::Source;
use halite::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let gguf = Gguf::from_source(Source::from_bytes("llama", include_bytes!("../seeds/llama.gguf"))).unwrap();
    Tokenizer::from_gguf(&gguf).unwrap().unwrap()
});

fuzz_target!(|text: &str| {
    let rule = Rule::JsonSchema(text.into());
    let Ok(mut guide) = Guide::new(&TOKENIZER, &rule) else { return };
    for _ in 0..8 {
        let Ok(allowed) = guide.allowed() else { return };
        let Some(token) = (0..TOKENIZER.len() as u32).rev().find(|&token| allowed.token(token)) else { return };
        if guide.accept(token).is_err() {
            return;
        }
    }
});

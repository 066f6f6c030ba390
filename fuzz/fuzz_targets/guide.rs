//! What the targets of rules share.

use std::sync::LazyLock;

use halite::constrain::{Guide, Rule};
use halite::generate::Constraint;
use halite::gguf::Gguf;
use halite::map::Source;
use halite::tokenizer::Tokenizer;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let gguf = Gguf::from_source(Source::from_bytes("llama", include_bytes!("../seeds/llama.gguf"))).unwrap();
    Tokenizer::from_gguf(&gguf).unwrap().unwrap()
});

/// Follows a rule for a few tokens, if it is one.
pub fn follow(rule: &Rule) {
    let Ok(mut guide) = Guide::new(&TOKENIZER, rule) else { return };
    for _ in 0..8 {
        let Ok(allowed) = guide.allowed() else { return };
        let Some(token) = (0..TOKENIZER.len() as u32).rev().find(|&token| allowed.token(token)) else { return };
        if guide.accept(token).is_err() {
            return;
        }
    }
}

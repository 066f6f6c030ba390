//! Renders chat templates for `tests/scripts/templates.py`: each line of stdin is a JSON object with a `template`, its `messages` and
//! `add_generation_prompt`; each line of stdout the text or the error.

use std::io::BufRead;

use halite::chat::{Message, Template};
use halite::{Model, Tokenizer};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf"))?;
    let tokenizer = Tokenizer::from_gguf(model.gguf())?.ok_or("the model has no vocabulary")?;
    let text = |id: Option<u32>| {
        String::from_utf8_lossy(id.and_then(|id| tokenizer.text(id)).unwrap_or_default()).into_owned()
    };
    println!("{}", json!({ "bos_token": text(tokenizer.bos()), "eos_token": text(tokenizer.eos()) }));
    for line in std::io::stdin().lock().lines() {
        let case: Value = serde_json::from_str(&line?)?;
        let text = |value: &Value| value.as_str().map(String::from).ok_or("expected a text");
        let messages = case["messages"].as_array().ok_or("expected messages")?.iter();
        let messages = messages.map(|m| Ok(Message::new(&text(&m["role"])?, &text(&m["content"])?)));
        let messages = messages.collect::<Result<Vec<_>, &str>>()?;
        let prompt = case["add_generation_prompt"] == true;
        let template = Template::new(&text(&case["template"])?, &tokenizer);
        println!(
            "{}",
            match template.and_then(|template| template.render(&messages, prompt)) {
                Ok(text) => json!({ "text": text }),
                Err(error) => json!({ "error": error.to_string() }),
            }
        );
    }
    Ok(())
}

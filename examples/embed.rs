//! The smallest useful program: open a model, continue a prompt, print the text as it comes.
//!
//! `cargo run --release --example embed -- FILE.gguf "Once upon a time"`

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;

use halite::prelude::*;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1);
    let file = args.next().unwrap_or_else(|| "models/austen/halite-austen.gguf".into());
    let prompt = args.next().unwrap_or_else(|| "Once upon a time".into());
    let prompt = prompt.to_string_lossy();

    let model = Arc::new(Model::open(file)?);
    let tokenizer = Tokenizer::from_gguf(model.gguf())?.ok_or("the file has no vocabulary")?;
    let backend: Arc<dyn Backend> = Arc::new(Cpu::new()?);
    let mut session = Session::new(&model, &backend, &SessionOptions::default())?;

    print!("{prompt}");
    session.generate(&tokenizer, &prompt, &GenerateOptions::default(), |text| {
        print!("{text}");
        match std::io::stdout().flush() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    println!();
    Ok(())
}

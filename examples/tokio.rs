//! A model inside an asynchronous program: one thread owns the session, requests wait in a bounded queue, and each client
//! gets its text through a bounded channel. A slow reader slows its own request down; who goes away stops it at once,
//! even in the middle of a prompt.
//!
//! `cargo run --release --example tokio -- FILE.gguf`

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use halite::backend::Cancel;
use halite::prelude::*;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, Receiver, Sender};

type Text = Result<String, halite::Error>;

struct Request {
    prompt: String,
    options: GenerateOptions,
    /// Closed when the client goes away.
    text: Sender<Text>,
}

/// A session on a thread of its own. Clones share it; the thread ends with the last one.
#[derive(Clone)]
struct Engine {
    requests: Sender<Request>,
}

impl Engine {
    /// `waiting` requests at most wait for the one that runs.
    fn start(session: Session, tokenizer: Tokenizer, waiting: usize) -> std::io::Result<Engine> {
        let (requests, queue) = mpsc::channel(waiting);
        let runtime = Handle::current();
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || serve(session, &tokenizer, queue, &runtime))?;
        Ok(Engine { requests })
    }

    /// Returns the text as it comes. Waits while the queue is full; `None` if the engine has ended.
    async fn complete(&self, prompt: &str, options: GenerateOptions) -> Option<Receiver<Text>> {
        // A few pieces: a client that reads no further stops the generation here.
        let (text, pieces) = mpsc::channel(4);
        self.requests.send(Request { prompt: prompt.into(), options, text }).await.ok()?;
        Some(pieces)
    }
}

fn serve(mut session: Session, tokenizer: &Tokenizer, mut queue: Receiver<Request>, runtime: &Handle) {
    let cancel: Cancel = session.cancel_handle();
    while let Some(Request { prompt, options, text }) = queue.blocking_recv() {
        let (closed, stop) = (text.clone(), cancel.clone());
        let watch = runtime.spawn(async move {
            closed.closed().await;
            stop.interrupt();
        });
        let result = session.generate(tokenizer, &prompt, &options, |piece| {
            match text.blocking_send(Ok(piece.into())) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        // Once the watcher has ended, it cannot interrupt the next request.
        watch.abort();
        let _ = runtime.block_on(watch);
        cancel.resume();
        match result {
            // Nobody is left to be told.
            Ok(_) | Err(halite::Error::Cancelled) => {}
            Err(error) => drop(text.blocking_send(Err(error))),
        }
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args_os().nth(1).unwrap_or_else(|| "models/austen/halite-austen.gguf".into());
    let model = Arc::new(Model::open(file)?);
    let tokenizer = Tokenizer::from_gguf(model.gguf())?.ok_or("the file has no vocabulary")?;
    let backend: Arc<dyn Backend> = Arc::new(Cpu::new()?);
    let session = Session::new(&model, &backend, &SessionOptions::default())?;
    let engine = Engine::start(session, tokenizer, 8)?;

    let options = |tokens| GenerateOptions::default().max_tokens(tokens);
    // One goes away after two pieces of a text that would be long.
    let impatient = tokio::spawn({
        let engine = engine.clone();
        async move {
            let mut text = engine.complete("It is a truth", options(100_000)).await?;
            text.recv().await?.ok()?;
            text.recv().await?.ok()
        }
    });
    // One reads slowly.
    let slow = tokio::spawn({
        let engine = engine.clone();
        async move {
            let mut text = engine.complete("She looked", options(24)).await?;
            let mut pieces = 0;
            while let Some(piece) = text.recv().await {
                pieces += usize::from(piece.is_ok());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Some(pieces)
        }
    });
    let mut text = engine.complete("Once upon a time", options(24)).await.ok_or("the engine has ended")?;
    print!("Once upon a time");
    while let Some(piece) = text.recv().await {
        print!("{}", piece?);
    }
    println!();
    let pieces = slow.await?.ok_or("the engine has ended")?;
    println!("The slow reader got {pieces} pieces.");
    impatient.await?.ok_or("the impatient one got no text")?;
    println!("The impatient one has gone.");
    Ok(())
}

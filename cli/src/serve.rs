//! `halite serve`.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use halite::Model;
use halite::embed::EmbedOptions;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::session::SessionOptions;
use halite_server::{Encoder, Engine, EngineOptions, Server};
use tokio::net::TcpListener;

use super::device::DeviceArgs;
use super::{Failure, kv_format, open_model, read_text, say};

#[derive(Args)]
pub struct ServeArgs {
    /// Address to listen on.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// GGUF file, and the name by which clients ask for it [default name: the file's]; may be repeated [default: the built-in model].
    #[arg(short, long, value_name = "[NAME=]FILE")]
    model: Vec<OsString>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Maximum tokens of a request, with its answer [default: the model's context, at most 4096].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Positions of each model's KV cache, which its requests share [default: 4 times --ctx].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cache: Option<u32>,
    /// Requests of a model that run at once; others wait.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Requests of a model that may wait; others get the status 429 [default: 16 for each slot].
    #[arg(long, value_name = "N")]
    queue: Option<usize>,
    /// Jinja chat template [default: the model's].
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Format of the KV cache.
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = kv_format())]
    kv: Format,
    /// Tokens of a step. A step that also generates text has a quarter of them for prompts.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
}

/// The name of a model, and its file.
fn named(model: &OsStr) -> (String, &OsStr) {
    let text = model.to_str().and_then(|text| text.split_once('='));
    let is_name = |name: &str| !name.is_empty() && !name.contains('/') && !Path::new(model).exists();
    if let Some((name, file)) = text.filter(|(name, _)| is_name(name)) {
        return (name.to_owned(), OsStr::new(file));
    }
    let stem = Path::new(model).file_stem().unwrap_or(model);
    (stem.to_string_lossy().into_owned(), model)
}

impl ServeArgs {
    /// Adds the model of a file: an encoder or one that generates text.
    fn add(&self, server: Server, name: &str, file: Option<&OsStr>) -> Result<Server, Failure> {
        let model = open_model(file.map(Path::new))?;
        if !Encoder::is_for(&model)? {
            return Ok(server.model(name, self.engine(&model)?));
        }
        let options = EmbedOptions::default().batch(self.batch);
        let queue = self.queue.unwrap_or(16 * self.slots as usize);
        Ok(server.encoder(name, Encoder::new(&model, &self.device.open()?, &options, queue)?))
    }

    fn engine(&self, model: &Arc<Model>) -> Result<Engine, Failure> {
        let session = SessionOptions::default().context(self.ctx);
        let cache = self.cache.unwrap_or_else(|| session.positions(model).saturating_mul(4));
        let session = session
            .cache_positions(cache)
            .batch(self.batch.max(self.slots))
            .program(ProgramOptions::default().kv_format(self.kv));
        let mut options = EngineOptions::new(session, self.slots);
        options.queue = self.queue.unwrap_or(options.queue);
        options.template = self.template.as_deref().map(read_text).transpose()?;
        Ok(Engine::new(model, &self.device.open()?, &options)?)
    }
}

pub fn serve(args: &ServeArgs) -> Result<(), Failure> {
    let mut server = Server::default();
    let mut names: Vec<String> = Vec::new();
    let models: Vec<(String, Option<&OsStr>)> = match args.model.is_empty() {
        true => vec![("halite-austen".into(), None)],
        false => args.model.iter().map(|model| named(model)).map(|(name, file)| (name, Some(file))).collect(),
    };
    for (name, file) in models {
        if names.contains(&name) {
            return Err(format!("--model: two models have the name {name}").into());
        }
        server = args.add(server, &name, file)?;
        names.push(name);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(args.listen).await;
        let listener = listener.map_err(|e| format!("--listen {}: {e}", args.listen))?;
        say(&format!("serving {} at http://{}/v1", names.join(", "), listener.local_addr()?));
        Ok::<_, Failure>(server.run(listener, stopped()).await?)
    })
}

/// Waits for a signal that ends the program.
async fn stopped() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = interrupt => {}
            _ = terminate.recv() => {}
        }
        return;
    }
    // Without a handler, the signal ends the program anyway.
    let _ = interrupt.await;
}

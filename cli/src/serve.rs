//! `halite serve`.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use halite::backend::driver::{self, Options};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::{Backend, Error, Model};
use halite_server::{Config, ConfigError, Machine, ModelConfig, ReplicaConfig, Server, TlsConfig};
use tokio::net::TcpListener;
use tracing_subscriber::filter::LevelFilter;

use super::device::{DeviceArgs, drivers};
use super::{Failure, kv_format, say};

#[derive(Args, Clone)]
pub struct ServeArgs {
    /// Configuration: models, replicas, routes, limits. It is read again on SIGHUP.
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["model", "ctx", "cache", "queue", "template", "tls_certificate"])]
    config: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// The server's certificate, as PEM; connections are then encrypted. It is read again on SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key, as PEM.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
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
    /// Tokens of a step, at most. A step that also generates text has as many for prompts as take about a tenth of a second.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
    /// Megabytes for all that is loaded. Idle models are unloaded for others.
    #[arg(long, value_name = "MB")]
    memory: Option<u64>,
    /// How to write the log, on stderr.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log: LogFormat,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum LogFormat {
    /// What happens to devices, for people.
    Text,
    /// The same and a line for each request, as JSON.
    Json,
    Off,
}

impl LogFormat {
    /// Begins to write the log.
    fn start(self) {
        let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
        match self {
            LogFormat::Text => log.with_max_level(LevelFilter::WARN).init(),
            LogFormat::Json => log.json().flatten_event(true).with_max_level(LevelFilter::INFO).init(),
            LogFormat::Off => {}
        }
    }
}

/// The configuration, the backends and the model of this command.
struct Here(ServeArgs);

impl Machine for Here {
    fn config(&self) -> Result<Config, ConfigError> {
        match &self.0.config {
            Some(file) => Config::read(file),
            None => Ok(self.0.as_config()),
        }
    }

    fn device(&self, replica: &ReplicaConfig) -> Result<Arc<dyn Backend>, Error> {
        if self.0.config.is_none() {
            let device = &self.0.device;
            let failed =
                |e: Failure| Error::Backend { backend: device.name().into(), message: e.to_string() };
            return device.open().map_err(failed);
        }
        driver::open(drivers(), &replica.backend, &options(replica))
    }

    fn check_device(&self, replica: &ReplicaConfig) -> Result<(), Error> {
        driver::check(drivers(), &replica.backend, &options(replica))
    }

    fn builtin(&self) -> Result<Model, Error> {
        Model::from_source(Source::from_static("the built-in model", halite_models::AUSTEN))
    }
}

/// The options of a replica's backend.
fn options(replica: &ReplicaConfig) -> Options {
    let mut options = Options::default();
    replica.options.iter().for_each(|(name, value)| options.set(name, value));
    options
}

/// The name of a model, and its file.
fn named(model: &OsStr) -> (Option<String>, PathBuf) {
    let text = model.to_str().and_then(|text| text.split_once('='));
    let is_name = |name: &str| !name.is_empty() && !name.contains('/') && !Path::new(model).exists();
    match text.filter(|(name, _)| is_name(name)) {
        Some((name, file)) => (Some(name.to_owned()), file.into()),
        None => (None, model.into()),
    }
}

impl ServeArgs {
    /// The configuration that the arguments describe.
    fn as_config(&self) -> Config {
        let mut base = ModelConfig::default();
        (base.context, base.cache, base.slots, base.queue) =
            (self.ctx, self.cache, Some(self.slots), self.queue);
        (base.template, base.kv, base.batch) =
            (self.template.clone(), Some(self.kv.name().into()), Some(self.batch));
        base.replicas = vec![ReplicaConfig::new(self.device.name(), Default::default())];
        let of = |model: &OsString| {
            let (name, file) = named(model);
            let mut config = base.clone();
            (config.name, config.file) = (name, Some(file));
            config
        };
        let mut config = Config::default();
        config.models = self.model.iter().map(of).collect();
        if config.models.is_empty() {
            config.models.push(base);
        }
        config.memory_mb = self.memory;
        config.listen = self.listen;
        let certificate = self.tls_certificate.as_ref().zip(self.tls_key.as_ref());
        config.tls = certificate.map(|(certificate, key)| TlsConfig::new(certificate, key));
        config
    }
}

pub fn serve(args: &ServeArgs) -> Result<(), Failure> {
    args.log.start();
    let here = Arc::new(Here(args.clone()));
    let listen = args.listen.or(here.config()?.listen).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080)));
    let server = Server::new(here)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let result = runtime.block_on(async {
        server.load().await.map_err(|(model, why)| format!("{model}: {why}"))?;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|e| format!("--listen {listen}: {e}"))?;
        let (names, scheme) = (server.names().join(", "), server.scheme());
        say(&format!("serving {names} at {scheme}://{}/v1", listener.local_addr()?));
        tokio::spawn(reloads(server.clone()));
        server.run(listener, stopped()).await;
        Ok(())
    });
    // Devices that hang do not keep the program.
    runtime.shutdown_background();
    result
}

/// Reads the configuration again at each SIGHUP.
#[cfg(unix)]
async fn reloads(server: Server) {
    let Ok(mut hangup) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()) else {
        return;
    };
    while hangup.recv().await.is_some() {
        let server = server.clone();
        let reload = move || match server.reload() {
            Ok(()) => say(&format!("read again; serving {}", server.names().join(", "))),
            Err(error) => say(&format!("{error}; the server stays as it is")),
        };
        // Opening models takes long.
        let _ = tokio::task::spawn_blocking(reload).await;
    }
}

#[cfg(not(unix))]
async fn reloads(_: Server) {}

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

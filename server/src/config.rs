//! The configuration of a server: models, devices and limits, as one TOML file describes them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::access::{AccessError, ClientConfig, JwtConfig, PolicyConfig, read_clients, toml_error};
use crate::integrity::{IntegrityError, Trust};
use crate::ledger::{Durability, LedgerError, Prices};
use crate::model::Policy;

/// Maximum bytes of a configuration.
const MAX_BYTES: u64 = 1 << 20;

/// A server's configuration. Paths are relative to its file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Config {
    /// The address to listen on.
    pub listen: Option<SocketAddr>,
    /// Megabytes (10^6 bytes) for all that is loaded: weights, KV caches, working memory. Models that are idle are unloaded for
    /// others.
    pub memory_mb: Option<u64>,
    /// Certificates. Without them, connections are not encrypted.
    pub tls: Option<TlsConfig>,
    /// What connections are held to.
    pub connections: ConnectionsConfig,
    /// Seconds that requests have to end when the server stops.
    pub drain_s: Option<f64>,
    /// Seconds between health probes of replicas that are idle.
    pub probe_s: Option<f64>,
    /// A file of clients, beside those of this file.
    pub clients: Option<PathBuf>,
    /// Clients and what they may do. Without any, everybody may do all but what needs the scope `admin`.
    #[serde(rename = "client")]
    pub own_clients: Vec<ClientConfig>,
    /// How tokens of clients are checked.
    pub jwt: Option<JwtConfig>,
    /// Rules on texts, for all clients.
    pub policy: Option<PolicyConfig>,
    /// Who may sign models, and whether they must be signed.
    pub trust: Option<Trust>,
    /// Where receipts and audit events go.
    pub ledger: Option<LedgerConfig>,
    /// Where the tokens of requests with an idempotency key go.
    pub journal: Option<PathBuf>,
    /// Where traces of requests go.
    pub telemetry: Option<TelemetryConfig>,
    /// The models.
    #[serde(rename = "model")]
    pub models: Vec<ModelConfig>,
    /// Names that stand for models.
    #[serde(rename = "route")]
    pub routes: Vec<RouteConfig>,
}

/// Certificates, as PEM.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TlsConfig {
    /// The server's certificate, and those between it and the authority's.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificates of authorities. With them, clients may show a certificate by one of these.
    pub client_ca: Option<PathBuf>,
    /// Whether clients must show a certificate [default: required].
    pub client_certificate: Option<ClientCertificate>,
}

impl TlsConfig {
    /// A certificate and its key.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> TlsConfig {
        let (client_ca, client_certificate) = (None, None);
        TlsConfig { certificate: certificate.into(), key: key.into(), client_ca, client_certificate }
    }
}

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ClientCertificate {
    /// Connections without one are refused.
    #[default]
    Required,
    /// Clients without one have keys or tokens.
    Optional,
}

/// What connections are held to.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct ConnectionsConfig {
    /// Connections at once; others wait [default: 1024].
    pub max: Option<u32>,
    /// Seconds until the headers of a request are there, from the connection's start or the answer before [default: 30].
    pub header_timeout_s: Option<f64>,
    /// Seconds until the body of a request is there, from the end of its headers [default: 60].
    pub body_timeout_s: Option<f64>,
    /// Megabytes (10^6 bytes) of bodies that are on their way or being read, of all requests [default: 256].
    pub bodies_mb: Option<u64>,
    /// Seconds after which a client that takes no byte of its answer is gone [default: 60].
    pub write_timeout_s: Option<f64>,
}

/// A ledger.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LedgerConfig {
    /// The file.
    pub file: PathBuf,
    /// When an entry counts as written.
    #[serde(default)]
    pub durability: Durability,
}

/// Traces of requests.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct TelemetryConfig {
    /// The address of a collector that takes OTLP over HTTP: `http://127.0.0.1:4318` [default: the environment's].
    pub otlp: Option<String>,
    /// The share of requests that are exported, of those whose client does not say [default: 1].
    pub sample: Option<f64>,
    /// The name of this server in traces [default: the environment's, or `halite`].
    pub service_name: Option<String>,
}

/// A model and its replicas.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The name by which clients ask for it; without one, the file's.
    pub name: Option<String>,
    /// The GGUF file; without one, the built-in model.
    pub file: Option<PathBuf>,
    /// Maximum tokens of a request, with its answer.
    pub context: Option<u32>,
    /// Positions of the KV cache of a replica, which its requests share.
    pub cache: Option<u32>,
    /// Requests that run at once on a replica.
    pub slots: Option<u32>,
    /// Requests that may wait for a replica.
    pub queue: Option<usize>,
    /// Tokens of a step.
    pub batch: Option<u32>,
    /// Tokens of a text that a step may guess.
    pub lookup: Option<u32>,
    /// Seconds that a step may take in which prompts run beside text.
    pub step_s: Option<f64>,
    /// Format of the KV cache.
    pub kv: Option<String>,
    /// A file with a Jinja chat template.
    pub template: Option<PathBuf>,
    /// How requests are shared among replicas.
    pub policy: Policy,
    /// Seconds after which a step is taken to hang.
    pub step_timeout_s: Option<f64>,
    /// The SHA-256 that the file must have.
    pub sha256: Option<String>,
    /// The file's manifest [default: `FILE.manifest.json`, if it is there].
    pub manifest: Option<PathBuf>,
    /// What requests cost.
    pub prices: Option<Prices>,
    /// Load it when the server starts, not at the first request.
    pub preload: Option<bool>,
    /// The devices on which it runs; without any, the CPU.
    #[serde(rename = "replica")]
    pub replicas: Vec<ReplicaConfig>,
    /// LoRA adapters. Clients ask for `MODEL:ADAPTER`.
    #[serde(rename = "adapter")]
    pub adapters: Vec<AdapterConfig>,
}

/// A device on which a model runs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ReplicaConfig {
    /// The backend, as in `--backend`: `cpu`, `gpu:1`, `sim:maia-100`.
    pub backend: String,
    /// Options of the backend.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Its share of requests under the policy `weight`.
    #[serde(default = "one")]
    pub weight: f64,
}

impl ReplicaConfig {
    /// A backend with options.
    pub fn new(backend: impl Into<String>, options: BTreeMap<String, String>) -> ReplicaConfig {
        ReplicaConfig { backend: backend.into(), options, weight: 1.0 }
    }
}

fn one() -> f64 {
    1.0
}

/// A LoRA adapter of a model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// Its name.
    pub name: String,
    /// The GGUF file.
    pub file: PathBuf,
    /// Multiplies its effect.
    #[serde(default = "one_f32")]
    pub scale: f32,
}

fn one_f32() -> f32 {
    1.0
}

/// A name that stands for one or more models.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RouteConfig {
    /// The name by which clients ask.
    pub name: String,
    /// The models, of which each request gets one by chance, in proportion to the weights.
    pub to: Vec<TargetConfig>,
}

/// A model that a route leads to.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TargetConfig {
    /// The model's name.
    pub model: String,
    /// Its share of requests.
    #[serde(default = "one")]
    pub weight: f64,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] halite::Error),
    /// The file is not a configuration.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// Clients are wrong.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A replica's device or an option of it has no such name.
    #[error("replica {number} of model `{model}`: {error}")]
    Replica {
        /// Its place among the model's replicas, from 1.
        number: usize,
        /// The model's name.
        model: String,
        /// What is wrong.
        error: Box<halite::Error>,
    },
    /// A model is not the one that it should be.
    #[error(transparent)]
    Integrity(#[from] IntegrityError),
    /// The ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A value is wrong.
    #[error("{what}: expected {expected}, got {got}")]
    Value {
        /// The key, with the model or route that has it.
        what: String,
        /// The expected value.
        expected: String,
        /// The value.
        got: String,
    },
}

impl ConfigError {
    pub(crate) fn value(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> ConfigError {
        ConfigError::Value { what: what.into(), expected: expected.into(), got: got.to_string() }
    }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`] with the line that is wrong.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let wrong = |message: String| ConfigError::Parse { path: path.to_owned(), message };
        let bytes = halite::map::read(path, MAX_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
        let mut config: Config = toml::from_str(&text).map_err(|e| wrong(toml_error(&text, &e)))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let models = &mut config.models;
        let files = models.iter_mut().flat_map(|model| {
            let adapters = model.adapters.iter_mut().map(|adapter| &mut adapter.file);
            model.file.iter_mut().chain(&mut model.template).chain(&mut model.manifest).chain(adapters)
        });
        let jwks = config.jwt.iter_mut().map(|jwt| &mut jwt.jwks);
        let keys = config.trust.iter_mut().flat_map(|trust| &mut trust.keys);
        let ledger = config.ledger.iter_mut().map(|ledger| &mut ledger.file);
        let tls = config.tls.iter_mut();
        let tls =
            tls.flat_map(|tls| [&mut tls.certificate, &mut tls.key].into_iter().chain(&mut tls.client_ca));
        files
            .chain(&mut config.clients)
            .chain(&mut config.journal)
            .chain(jwks)
            .chain(keys)
            .chain(ledger)
            .chain(tls)
            .for_each(|file| *file = folder.join(&*file));
        Ok(config)
    }

    /// All clients.
    pub(crate) fn clients(&self) -> Result<Vec<ClientConfig>, ConfigError> {
        let mut clients = self.own_clients.clone();
        if let Some(file) = &self.clients {
            clients.extend(read_clients(file)?);
        }
        Ok(clients)
    }

    /// The keys whose values are others than at the start, and which a reload does not change.
    pub(crate) fn needing_restart(&self, started: &Config) -> Vec<&'static str> {
        let keys = [
            ("listen", self.listen != started.listen),
            ("memory_mb", self.memory_mb != started.memory_mb),
            ("connections", self.connections != started.connections),
            ("drain_s", self.drain_s != started.drain_s),
            ("probe_s", self.probe_s != started.probe_s),
            ("policy", self.policy != started.policy),
            ("ledger", self.ledger != started.ledger),
            ("journal", self.journal != started.journal),
            ("telemetry", self.telemetry != started.telemetry),
        ];
        keys.into_iter().filter_map(|(key, is_other)| is_other.then_some(key)).collect()
    }

    /// The currency of the prices, and so of budgets.
    pub(crate) fn currency(&self) -> &str {
        self.models.iter().find_map(|model| model.prices.as_ref()).map_or("", |prices| &prices.currency)
    }
}

/// A positive number of seconds.
pub(crate) fn seconds(
    what: &str,
    value: Option<f64>,
    default: f64,
) -> Result<std::time::Duration, ConfigError> {
    let value = value.unwrap_or(default);
    let seconds = std::time::Duration::try_from_secs_f64(value).ok().filter(|seconds| !seconds.is_zero());
    seconds.ok_or_else(|| ConfigError::value(what, "a positive number of seconds", value))
}

/// Weights whose sum is positive.
pub(crate) fn check_weights(
    what: &str,
    weights: impl Iterator<Item = f64> + Clone,
) -> Result<(), ConfigError> {
    let is_one = weights.clone().all(|weight| weight.is_finite() && weight >= 0.0);
    if is_one && weights.clone().sum::<f64>() > 0.0 {
        return Ok(());
    }
    let got: Vec<String> = weights.map(|weight| weight.to_string()).collect();
    Err(ConfigError::value(what, "weights from 0, of which one is more", got.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::{Config, ConfigError};

    fn read(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("halite.toml");
        std::fs::write(&path, text).unwrap();
        let mut config = Config::read(&path)?;
        for model in &mut config.models {
            model.file = model.file.take().map(|file| file.strip_prefix(folder.path()).unwrap().to_owned());
        }
        Ok(config)
    }

    #[test]
    fn models_replicas_and_routes_are_read() {
        let config = read(
            r#"
            listen = "127.0.0.1:0"
            memory_mb = 500
            [[model]]
            name = "a"
            file = "a.gguf"
            policy = "weight"
            [[model.replica]]
            backend = "cpu"
            options = { threads = "1" }
            [[model.replica]]
            backend = "sim:maia-100"
            weight = 0.25
            [[model.adapter]]
            name = "legal"
            file = "legal.gguf"
            [[route]]
            name = "chat"
            to = [{ model = "a", weight = 9 }, { model = "a:legal" }]
            "#,
        )
        .unwrap();
        let model = &config.models[0];
        assert_eq!(model.file.as_deref().unwrap().to_str(), Some("a.gguf"));
        assert_eq!((model.replicas.len(), model.replicas[1].weight), (2, 0.25));
        assert_eq!(model.adapters[0].scale, 1.0);
        assert_eq!(config.routes[0].to[1].weight, 1.0);
    }

    #[test]
    fn keys_that_need_a_restart_are_named() {
        let started = read("listen = '127.0.0.1:1'\nmemory_mb = 1\n[[model]]\nname = 'a'").unwrap();
        let changed = |text| read(text).unwrap().needing_restart(&started);
        assert!(changed("listen = '127.0.0.1:1'\nmemory_mb = 1\n[[model]]\nname = 'b'").is_empty());
        assert_eq!(changed("listen = '127.0.0.1:2'\nmemory_mb = 1\ndrain_s = 1"), ["listen", "drain_s"]);
        assert_eq!(
            changed("memory_mb = 1\n[[policy.input]]\nname = 'a'\npattern = 'a'\naction = 'deny'"),
            ["listen", "policy"]
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, want) in [
            ("[[model]]\nfiel = 'a'", "line 2: unknown field `fiel`"),
            ("memory_mb = -1", "line 1: "),
            ("[[model]]\npolicy = 'best'", "order"),
            ("[[route]]\nname = 'a'", "missing field `to`"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    /// Errors go to logs. A key that somebody put at the wrong place does not.
    #[test]
    fn errors_do_not_tell_keys() {
        for text in [
            "[[client]]\nname = 'ada'\nkey = 'hal_5ec2e7'",
            "[[client]]\nname = 'ada'\nkey_sha256 = 'hal_5ec2e7'",
            "[[client]]\nname = 'ada'\nhal_5ec2e7 = 1",
            "hal_5ec2e7\n[[client]]",
            "[[client]]\nname = 'ada'\nkey_sha256 = ['hal_5ec2e7']",
        ] {
            let error =
                read(text).and_then(|config| Ok(crate::access::Access::new(config.clients()?, None)?));
            let error = error.unwrap_err().to_string();
            assert!(!error.contains("5ec2e7"), "{error}");
        }
    }
}

//! The models of a server by their names, and what changes when its configuration is read again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use halite::embed::EmbedOptions;
use halite::gguf::Gguf;
use halite::kernels::kv;
use halite::model::ProgramOptions;
use halite::{Backend, Error, Model, SessionOptions};

use crate::Host;
use crate::access::ClientConfig;
use crate::basics::chance;
use crate::config::{Config, ConfigError, ModelConfig, ReplicaConfig, check_weights, seconds};
use crate::embedder::Encoder;
use crate::integrity::{Trust, verify_model};
use crate::model::{Hosted, ModelOptions};
use crate::replica::Device;

/// What a server needs of the program around it.
pub trait Machine: Send + Sync {
    /// Reads the configuration.
    ///
    /// # Errors
    /// What is wrong with it.
    fn config(&self) -> Result<Config, ConfigError>;

    /// Opens a device.
    ///
    /// # Errors
    /// Errors of its driver.
    fn device(&self, replica: &ReplicaConfig) -> Result<Arc<dyn Backend>, Error>;

    /// Checks the names of a device and of its options, as far as that goes without opening it. A device that is not there now may come
    /// later: it is no error.
    ///
    /// # Errors
    /// What is wrong with the names.
    fn check_device(&self, _replica: &ReplicaConfig) -> Result<(), Error> {
        Ok(())
    }

    /// Opens the model that the program carries.
    ///
    /// # Errors
    /// [`Error::Model`] if it carries none.
    fn builtin(&self) -> Result<Model, Error>;
}

/// The name of the model that programs carry.
const BUILTIN: &str = "halite-austen";
const SLOTS: u32 = 16;
const BATCH: u32 = 512;

/// Models and routes by name.
#[derive(Debug, Default, Clone)]
pub(crate) struct Registry {
    models: BTreeMap<String, Entry>,
    encoders: BTreeMap<String, (Arc<Encoder>, Option<Made>)>,
    routes: BTreeMap<String, Vec<(f64, String)>>,
}

#[derive(Debug, Clone)]
struct Entry {
    hosted: Arc<Hosted>,
    /// What it was made of; `None` for a model without a configuration.
    made_of: Option<Made>,
    preload: bool,
}

/// A model is made again if this changes.
#[derive(Debug, Clone, PartialEq)]
struct Made {
    config: ModelConfig,
    adapter: Option<usize>,
    /// Length and time of each file.
    files: Vec<(u64, Option<std::time::SystemTime>)>,
}

impl Registry {
    /// With one more model, instead of one of the same name.
    pub fn insert(&mut self, hosted: Hosted) {
        let entry = Entry { hosted: Arc::new(hosted), made_of: None, preload: true };
        self.encoders.remove(entry.hosted.name());
        self.models.insert(entry.hosted.name().to_owned(), entry);
    }

    /// With one more encoder, instead of a model of the same name.
    pub fn insert_encoder(&mut self, encoder: Encoder) {
        self.models.remove(encoder.name());
        self.encoders.insert(encoder.name().to_owned(), (Arc::new(encoder), None));
    }

    /// The encoder of a name. Without a name, the only one there is.
    pub fn encoder(&self, name: Option<&str>) -> Option<&Arc<Encoder>> {
        match name {
            None => only(self.encoders()),
            Some(name) => self.encoders.get(name).map(|(encoder, _)| encoder),
        }
    }

    /// The encoders, by name.
    pub fn encoders(&self) -> impl Iterator<Item = &Arc<Encoder>> {
        self.encoders.values().map(|(encoder, _)| encoder)
    }

    /// The model of a name, which may be a route's; then one that the client may use. Without a name, the only model there is.
    pub fn find(&self, name: Option<&str>, may_use: &dyn Fn(&str) -> bool) -> Option<&Arc<Hosted>> {
        let Some(name) = name else { return only(self.models()) };
        let found = self.models.get(name).or_else(|| self.models.get(self.route(name, may_use)?));
        found.map(|entry| &entry.hosted)
    }

    /// Chooses a model of a route: of those that the client may use, or of all if it may use none.
    fn route(&self, name: &str, may_use: &dyn Fn(&str) -> bool) -> Option<&str> {
        let all = self.routes.get(name)?;
        let mut targets: Vec<_> =
            all.iter().filter(|(weight, model)| *weight > 0.0 && may_use(model)).collect();
        if targets.is_empty() {
            targets = all.iter().collect();
        }
        let total: f64 = targets.iter().map(|(weight, _)| weight).sum();
        let mut left = chance() * total;
        let chosen = targets.iter().find(|(weight, _)| {
            left -= weight;
            left <= 0.0
        });
        chosen.or(targets.last()).map(|(_, model)| model.as_str())
    }

    /// The models, by name.
    pub fn models(&self) -> impl Iterator<Item = &Arc<Hosted>> {
        self.models.values().map(|entry| &entry.hosted)
    }

    /// All names: models, encoders, routes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.models.keys().chain(self.encoders.keys()).chain(self.routes.keys()).map(String::as_str)
    }

    /// Models to load when the server starts.
    pub fn preloaded(&self) -> impl Iterator<Item = &Arc<Hosted>> {
        self.models.values().filter(|entry| entry.preload).map(|entry| &entry.hosted)
    }

    /// The models of a configuration. Those of `old` that have not changed stay as they are.
    pub fn of(
        config: &Config,
        machine: &Arc<dyn Machine>,
        host: &Arc<Host>,
        old: &Registry,
    ) -> Result<Registry, ConfigError> {
        let mut registry = Registry::default();
        let all = config;
        let mut currencies =
            config.models.iter().filter_map(|model| model.prices.as_ref()).map(|p| &p.currency);
        if let Some(first) = currencies.next()
            && let Some(other) = currencies.find(|other| *other != first)
        {
            return Err(ConfigError::value("currencies of prices", format!("{first} for all models"), other));
        }
        let builtin = [ModelConfig::default()];
        let models = if config.models.is_empty() { &builtin } else { &config.models[..] };
        for config in models {
            let name = name_of(config);
            // A spare is opened when it is needed, which is too late to find that its name is wrong.
            for (index, replica) in config.replicas.iter().enumerate() {
                let wrong = |error| {
                    let (number, model) = (index + 1, name.clone());
                    ConfigError::Replica { number, model, error: Box::new(error) }
                };
                machine.check_device(replica).map_err(wrong)?;
            }
            registry.add(&name, config, None, all, machine, host, old)?;
            for (index, adapter) in config.adapters.iter().enumerate() {
                let name = format!("{name}:{}", adapter.name);
                registry.add(&name, config, Some(index), all, machine, host, old)?;
            }
        }
        for route in &config.routes {
            let what = format!("route `{}`", route.name);
            if registry.names().any(|name| name == route.name) {
                return Err(ConfigError::value(what, "a name of its own", "that of a model or route"));
            }
            if let Some(unknown) = route.to.iter().find(|to| !registry.models.contains_key(&to.model)) {
                return Err(ConfigError::value(what, "models of this configuration", &unknown.model));
            }
            check_weights(&what, route.to.iter().map(|to| to.weight))?;
            let targets = route.to.iter().map(|to| (to.weight, to.model.clone())).collect();
            registry.routes.insert(route.name.clone(), targets);
        }
        Ok(registry)
    }

    /// Checks that what clients may use is there: models and adapters by their names.
    ///
    /// # Errors
    /// [`ConfigError::Value`] names the client.
    pub fn check_clients(&self, clients: &[ClientConfig]) -> Result<(), ConfigError> {
        let (models, adapters): (BTreeSet<&str>, BTreeSet<Option<&str>>) =
            self.models.keys().chain(self.encoders.keys()).map(|name| split(name)).unzip();
        let adapters = adapters.into_iter().flatten().collect();
        for client in clients {
            for (key, listed, known) in
                [("models", &client.models, &models), ("adapters", &client.adapters, &adapters)]
            {
                if let Some(unknown) =
                    listed.iter().find(|name| *name != "*" && !known.contains(name.as_str()))
                {
                    let known: Vec<&str> = known.iter().copied().collect();
                    let expected = match self.routes.contains_key(unknown) {
                        true => "the models that the route leads to".into(),
                        false => format!("`*` or some of: {}", known.join(", ")),
                    };
                    let what = format!("{key} of client `{}`", client.name);
                    return Err(ConfigError::value(what, expected, format!("`{unknown}`")));
                }
            }
        }
        Ok(())
    }

    /// The models that a route leads to, in the order of the configuration.
    pub fn targets(&self, route: &str) -> Option<impl Iterator<Item = &Arc<Hosted>>> {
        let targets = self.routes.get(route)?.iter();
        Some(targets.filter_map(|(_, model)| self.models.get(model)).map(|entry| &entry.hosted))
    }

    /// The names of routes.
    pub fn routes(&self) -> impl Iterator<Item = &str> {
        self.routes.keys().map(String::as_str)
    }

    #[allow(clippy::too_many_arguments, reason = "what a model is made of")]
    fn add(
        &mut self,
        name: &str,
        config: &ModelConfig,
        adapter: Option<usize>,
        all: &Config,
        machine: &Arc<dyn Machine>,
        host: &Arc<Host>,
        old: &Registry,
    ) -> Result<(), ConfigError> {
        if self.names().any(|known| known == name) {
            return Err(ConfigError::value(
                format!("model `{name}`"),
                "a name of its own",
                "another model's",
            ));
        }
        let adapters = config.adapters.iter().map(|adapter| &adapter.file);
        let files = config.file.iter().chain(&config.template).chain(adapters);
        let made_of =
            Some(Made { config: config.clone(), adapter, files: files.map(|file| state_of(file)).collect() });
        let old_encoder = old.encoders.get(name).filter(|(_, old)| *old == made_of);
        if let Some((encoder, _)) = old_encoder {
            self.encoders.insert(name.to_owned(), (encoder.clone(), made_of));
            return Ok(());
        }
        let same = old.models.get(name).filter(|entry| entry.made_of == made_of);
        let hosted = match same {
            Some(entry) => entry.hosted.clone(),
            None => {
                let model = opened(name, config, adapter, machine)?;
                let sha256 = match adapter.and_then(|index| config.adapters.get(index)) {
                    None => checked(name, &model, config, all)?,
                    // The model itself was checked under its own name.
                    Some(adapter) => {
                        if is_checked(config, all) {
                            verify_model(&Gguf::open(&adapter.file)?, None, &trust(all), &mut |_| {})?;
                        }
                        let base = self.models.get(&name_of(config));
                        base.and_then(|base| base.hosted.sha256().map(str::to_owned))
                    }
                };
                if Encoder::is_for(&model)? {
                    let encoder = Arc::new(encoder(name, &model, config, machine, host)?);
                    self.encoders.insert(name.to_owned(), (encoder, made_of));
                    return Ok(());
                }
                Arc::new(hosted(name, &model, sha256, config, machine, host)?)
            }
        };
        let preload = config.preload.unwrap_or(adapter.is_none());
        self.models.insert(name.to_owned(), Entry { hosted, made_of, preload });
        Ok(())
    }
}

/// The name of a model.
fn name_of(config: &ModelConfig) -> String {
    let stem =
        || config.file.as_deref().and_then(Path::file_stem).map(|stem| stem.to_string_lossy().into_owned());
    config.name.clone().or_else(stem).unwrap_or_else(|| BUILTIN.into())
}

/// Changes if a file does.
fn state_of(file: &Path) -> (u64, Option<std::time::SystemTime>) {
    std::fs::metadata(file).map_or((0, None), |data| (data.len(), data.modified().ok()))
}

/// The name of a model without its adapter, and the adapter's.
pub(crate) fn split(name: &str) -> (&str, Option<&str>) {
    name.split_once(':').map_or((name, None), |(model, adapter)| (model, Some(adapter)))
}

/// The only one of several.
fn only<T>(mut all: impl Iterator<Item = T>) -> Option<T> {
    all.next().filter(|_| all.next().is_none())
}

/// Opens a model, with an adapter.
fn opened(
    name: &str,
    config: &ModelConfig,
    adapter: Option<usize>,
    machine: &Arc<dyn Machine>,
) -> Result<Arc<Model>, ConfigError> {
    let mut model = match &config.file {
        Some(file) => Model::open(file)?,
        None => machine.builtin()?,
    };
    if let Some(adapter) = adapter.and_then(|index| config.adapters.get(index)) {
        model.apply_lora(Gguf::open(&adapter.file)?, adapter.scale)?;
    }
    model.warnings().iter().for_each(|warning| tracing::warn!(model = name, "{warning}"));
    Ok(Arc::new(model))
}

/// Whether somebody wants to know that a model's files are the right ones, or what their SHA-256 is.
fn is_checked(config: &ModelConfig, all: &Config) -> bool {
    config.sha256.is_some() || config.manifest.is_some() || all.trust.is_some() || all.ledger.is_some()
}

fn trust(all: &Config) -> Trust {
    all.trust.clone().unwrap_or_default()
}

/// Checks that a model is the one that it should be, and returns the SHA-256 of its file, if somebody wants to know it.
fn checked(
    name: &str,
    model: &Model,
    config: &ModelConfig,
    all: &Config,
) -> Result<Option<String>, ConfigError> {
    // The built-in model is a part of the program.
    if !is_checked(config, all) || config.file.is_none() {
        return Ok(None);
    }
    let verified = verify_model(model.gguf(), config.manifest.as_deref(), &trust(all), &mut |_| {})?;
    if let Some(want) = config.sha256.as_ref().filter(|want| !want.eq_ignore_ascii_case(&verified.sha256)) {
        return Err(ConfigError::value(format!("SHA-256 of model `{name}`"), want, verified.sha256));
    }
    Ok(Some(verified.sha256))
}

/// The devices of a model: the CPU, unless it names others.
fn devices(config: &ModelConfig, machine: &Arc<dyn Machine>) -> Vec<Device> {
    let cpu = [ReplicaConfig::new("cpu", BTreeMap::new())];
    let replicas = if config.replicas.is_empty() { &cpu } else { &config.replicas[..] };
    let device = |replica: &ReplicaConfig| {
        let (machine, config) = (machine.clone(), replica.clone());
        let open = Arc::new(move || machine.device(&config));
        Device { name: replica.backend.clone(), open, weight: replica.weight }
    };
    replicas.iter().map(device).collect()
}

/// Loads an encoder on its devices.
fn encoder(
    name: &str,
    model: &Arc<Model>,
    config: &ModelConfig,
    machine: &Arc<dyn Machine>,
    host: &Arc<Host>,
) -> Result<Encoder, ConfigError> {
    let options = EmbedOptions::default().batch(config.batch.unwrap_or(BATCH));
    let queue = config.queue.unwrap_or(16 * SLOTS as usize);
    let encoder =
        Encoder::within(name, model, devices(config, machine), &options, queue, Some(&host.memory))?;
    Ok(encoder.with(config.prices.clone()))
}

fn hosted(
    name: &str,
    model: &Arc<Model>,
    sha256: Option<String>,
    config: &ModelConfig,
    machine: &Arc<dyn Machine>,
    host: &Arc<Host>,
) -> Result<Hosted, ConfigError> {
    let key = |key: &str| format!("{key} of model `{name}`");
    let mut session = SessionOptions::default().context(config.context);
    let cache = config.cache.unwrap_or_else(|| session.positions(model).saturating_mul(4));
    let slots = config.slots.unwrap_or(SLOTS);
    if !(1..=64).contains(&slots) {
        return Err(ConfigError::value(key("slots"), "1 to 64", slots));
    }
    session = session.cache_positions(cache).batch(config.batch.unwrap_or(BATCH).max(slots));
    if let Some(format) = &config.kv {
        let found = kv::formats().find(|known| known.name().eq_ignore_ascii_case(format));
        let known: Vec<String> = kv::formats().map(|known| known.name().to_lowercase()).collect();
        let found = found.ok_or_else(|| ConfigError::value(key("kv"), known.join(", "), format))?;
        session = session.program(ProgramOptions::default().kv_format(found));
    }
    let mut options = ModelOptions::new(session, slots);
    options.queue = config.queue.unwrap_or(options.queue);
    options.lookup = config.lookup.unwrap_or(options.lookup);
    options.step_time = seconds(&key("step_s"), config.step_s, options.step_time.as_secs_f64())?;
    options.policy = config.policy;
    options.prices = config.prices.clone();
    options.sha256 = sha256;
    options.step_timeout = seconds(&key("step_timeout_s"), config.step_timeout_s, 60.0)?;
    if let Some(file) = &config.template {
        let bytes = halite::map::read(file, 1 << 20)?;
        let text = String::from_utf8(bytes).map_err(|e| ConfigError::value(key("template"), "text", e))?;
        options.template = Some(text);
    }
    let devices = devices(config, machine);
    check_weights(&key("weight"), devices.iter().map(|device| device.weight))?;
    Ok(Hosted::new(name, model, devices, &options, host)?)
}

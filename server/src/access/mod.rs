//! Who may do what: clients and their keys, limits, and rules on texts.
//!
//! [`Access::check`] turns the header `Authorization`, or a certificate, into a [`Caller`]. The caller says what it may do, and [`Caller::admit`] counts a
//! request against the client's limits. [`Policy`] holds rules on prompts and answers. Nothing here knows HTTP: a [`Denied`] has a status
//! and a code for whoever answers.

mod config;
mod filter;
mod jwt;
mod key;
mod limits;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use jiff::civil::Date;

use crate::basics::now_ms;
use crate::ledger::{Ledger, LedgerError};

pub(crate) use config::toml_error;
pub use config::{ClientConfig, JwtConfig, Scope, read_clients};
pub use filter::{Filtered, OutputFilter};
pub use key::{Certificate, Key};
pub use limits::Admission;
pub use policy::{Action, Policy, PolicyConfig, ResponseForm, RuleConfig};

use jwt::Tokens;
use limits::Counts;

/// Maximum bytes of the header `Authorization`.
const MAX_HEADER_BYTES: usize = 1 << 14;
/// The name of everybody, where no clients are configured.
const ANONYMOUS: &str = "anonymous";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] halite::Error),
    /// A file is malformed.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A client is wrong.
    #[error("client {name:?}: {what}")]
    Client {
        /// The client's name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A rule on texts is wrong.
    #[error("rule {name:?}: {what}")]
    Rule {
        /// The rule's name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The system has no random bytes.
    #[error("random bytes of the system: {0}")]
    Random(getrandom::Error),
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// No key was sent.
    #[error("expected the header `Authorization: Bearer KEY`, got none")]
    NoKey,
    /// The key is nobody's.
    #[error("the key is not known")]
    UnknownKey,
    /// The certificate is nobody's, and no key was sent.
    #[error("expected a key, or the certificate of a client; the certificate with SHA-256 {0} is nobody's")]
    UnknownCertificate(String),
    /// The key and the certificate are those of two clients.
    #[error("the key is not of the client that the certificate is of")]
    OtherClient,
    /// The token is wrong, expired, or from another issuer.
    #[error("the token is not valid: {0}")]
    Token(String),
    /// The client lacks a scope.
    #[error("client {client:?} lacks the scope `{0}`: make a client with `scopes = [\"{0}\"]` in the configuration", scope.name())]
    Scope {
        /// The client.
        client: String,
        /// What it lacks.
        scope: Scope,
    },
    /// The client may not use a model or an adapter.
    #[error("client {client:?} may not use the {what} {name:?}")]
    NotAllowed {
        /// The client.
        client: String,
        /// `model` or `adapter`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The client sent as many requests as it may in a minute.
    #[error("at most {limit} requests per minute; try again in {retry_after_s} s")]
    RequestsPerMinute {
        /// The limit.
        limit: u32,
        /// Seconds until there is room.
        retry_after_s: u64,
    },
    /// The client has as many requests running as it may.
    #[error("at most {limit} requests at once; try again later")]
    Concurrent {
        /// The limit.
        limit: u32,
    },
    /// The client used its tokens of the day.
    #[error("at most {limit} tokens per day (UTC), {used} are used; try again from {next} 00:00 UTC")]
    TokensPerDay {
        /// The limit.
        limit: u64,
        /// What was used today.
        used: u64,
        /// Tomorrow.
        next: Date,
        /// Seconds until then.
        retry_after_s: u64,
    },
    /// The client used its budget of the month.
    #[error("the budget of {limit} per month (UTC) is used; try again from {next} 00:00 UTC")]
    Budget {
        /// The limit.
        limit: crate::ledger::Amount,
        /// The first day of the next month.
        next: Date,
        /// Seconds until then.
        retry_after_s: u64,
    },
    /// A rule denies the text.
    #[error("the rule {rule:?} denies this text")]
    Rule {
        /// The rule's name.
        rule: String,
    },
}

impl Denied {
    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Denied::NoKey
            | Denied::UnknownKey
            | Denied::UnknownCertificate(_)
            | Denied::OtherClient
            | Denied::Token(_) => 401,
            Denied::Scope { .. } | Denied::NotAllowed { .. } => 403,
            Denied::Rule { .. } => 400,
            _ => 429,
        }
    }

    /// When to try again, for the header `Retry-After`.
    pub fn retry_after_s(&self) -> Option<u64> {
        match *self {
            Denied::RequestsPerMinute { retry_after_s, .. }
            | Denied::TokensPerDay { retry_after_s, .. }
            | Denied::Budget { retry_after_s, .. } => Some(retry_after_s),
            Denied::Concurrent { .. } => Some(1),
            _ => None,
        }
    }
}

/// A client, with what it used.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    counts: Arc<Counts>,
}

impl Client {
    /// What it may do.
    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.config.name
    }
}

/// A client that sends a request, with the scopes that its key or token has.
#[derive(Debug, Clone)]
pub struct Caller {
    client: Arc<Client>,
    scopes: BTreeSet<Scope>,
}

impl Caller {
    /// With all scopes of its client.
    fn new(client: &Arc<Client>) -> Caller {
        Caller { client: client.clone(), scopes: client.config.scopes.clone() }
    }

    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Checks a scope.
    ///
    /// # Errors
    /// [`Denied::Scope`].
    pub fn require(&self, scope: Scope) -> Result<(), Denied> {
        match self.scopes.contains(&scope) {
            true => Ok(()),
            false => Err(Denied::Scope { client: self.client.name().to_owned(), scope }),
        }
    }

    /// Whether the client may see and use a model.
    pub fn may_use_model(&self, name: &str) -> bool {
        names(&self.client.config.models, name)
    }

    /// Checks that the client may use a model.
    ///
    /// # Errors
    /// [`Denied::NotAllowed`].
    pub fn require_model(&self, name: &str) -> Result<(), Denied> {
        self.require_named("model", &self.client.config.models, name)
    }

    /// Checks that the client may use an adapter.
    ///
    /// # Errors
    /// [`Denied::NotAllowed`].
    pub fn require_adapter(&self, name: &str) -> Result<(), Denied> {
        self.require_named("adapter", &self.client.config.adapters, name)
    }

    fn require_named(&self, what: &'static str, allowed: &[String], name: &str) -> Result<(), Denied> {
        match names(allowed, name) {
            true => Ok(()),
            false => {
                Err(Denied::NotAllowed { client: self.client.name().to_owned(), what, name: name.to_owned() })
            }
        }
    }

    /// Counts a request against the client's limits. It runs for as long as the admission lives.
    ///
    /// # Errors
    /// [`Denied`] says which limit it is beyond.
    pub fn admit(&self) -> Result<Admission, Denied> {
        limits::admit(&self.client, now_ms())
    }
}

/// Whether a list has a name, or `*` for all.
fn names(list: &[String], name: &str) -> bool {
    list.iter().any(|listed| listed == "*" || listed == name)
}

/// Clients by name, and how their tokens are checked.
#[derive(Debug)]
struct State {
    clients: BTreeMap<String, Arc<Client>>,
    tokens: Option<Tokens>,
}

impl State {
    /// Reads and checks a configuration. Clients that `old` has too keep their counts.
    fn new(
        configs: Vec<ClientConfig>,
        jwt: Option<&JwtConfig>,
        old: Option<&State>,
    ) -> Result<State, AccessError> {
        let mut clients = BTreeMap::new();
        let configs = match (configs.is_empty(), jwt) {
            (true, None) => vec![ClientConfig::anonymous()],
            _ => configs,
        };
        let mut hashes = BTreeSet::new();
        for config in configs {
            config.check()?;
            let wrong = |what: String| AccessError::Client { name: config.name.clone(), what };
            let mut listed = config.key_sha256.iter().chain(&config.certificate_sha256);
            if let Some(hash) = listed.find(|hash| !hashes.insert(hash.to_ascii_lowercase())) {
                return Err(wrong(format!("the SHA-256 {hash} is listed twice")));
            }
            if clients.contains_key(&config.name) {
                return Err(wrong("two clients have this name".into()));
            }
            let counts = old.and_then(|old| old.clients.get(&config.name)).map(|old| old.counts.clone());
            let client = Client { counts: counts.unwrap_or_default(), config };
            clients.insert(client.name().to_owned(), Arc::new(client));
        }
        let tokens = jwt.map(Tokens::new).transpose()?;
        let default = jwt.and_then(|jwt| jwt.default_client.as_ref());
        if let Some(name) = default.filter(|name| !clients.contains_key(*name)) {
            let what = "expected a client of this name, for `default_client`; there is none".into();
            return Err(AccessError::Client { name: name.clone(), what });
        }
        Ok(State { clients, tokens })
    }

    /// The client of everybody, if that is the only one.
    fn anonymous(&self) -> Option<&Arc<Client>> {
        let client = self.clients.get(ANONYMOUS)?;
        let ClientConfig { key_sha256, certificate_sha256, .. } = &client.config;
        let is_only = self.clients.len() == 1 && self.tokens.is_none();
        (is_only && key_sha256.is_empty() && certificate_sha256.is_empty()).then_some(client)
    }

    /// The client that lists a hash.
    fn with_hash(&self, hash: &str, list: impl Fn(&ClientConfig) -> &[String]) -> Option<&Arc<Client>> {
        // All are compared, so that the time says nothing of which one is like the one that was sent.
        let mut found = None;
        for client in self.clients.values() {
            for listed in list(&client.config) {
                if key::is_same(hash, listed) {
                    found = Some(client);
                }
            }
        }
        found
    }

    /// The caller with a key or a token.
    fn caller(&self, header: &str) -> Result<Caller, Denied> {
        if header.len() > MAX_HEADER_BYTES {
            return Err(Denied::UnknownKey);
        }
        let (scheme, secret) = header.trim().split_once(' ').ok_or(Denied::NoKey)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Denied::NoKey);
        }
        let secret = secret.trim();
        if let (Some(tokens), false) = (&self.tokens, secret.starts_with(key::PREFIX)) {
            let token = tokens.check(secret)?;
            let client =
                self.clients.get(&token.client).or_else(|| self.clients.get(tokens.default_client()?));
            let client =
                client.ok_or_else(|| Denied::Token(format!("there is no client {:?}", token.client)))?;
            let mut caller = Caller::new(client);
            caller.scopes.retain(|scope| token.scopes.as_ref().is_none_or(|scopes| scopes.contains(scope)));
            return Ok(caller);
        }
        let client = self.with_hash(&key::sha256(secret), |config| &config.key_sha256);
        client.map(Caller::new).ok_or(Denied::UnknownKey)
    }
}

/// Clients and what they may do, which may change while the server runs.
#[derive(Debug)]
pub struct Access {
    state: RwLock<Arc<State>>,
}

impl Access {
    /// Clients, and how their tokens are checked. Without both, everybody is the client `anonymous`, with all scopes but `admin`.
    ///
    /// # Errors
    /// [`AccessError`] says which client, or what of the keys of `jwt`, is wrong.
    pub fn new(clients: Vec<ClientConfig>, jwt: Option<&JwtConfig>) -> Result<Access, AccessError> {
        Ok(Access { state: RwLock::new(Arc::new(State::new(clients, jwt, None)?)) })
    }

    /// Replaces the configuration. Clients that remain keep what they used, and admissions stay counted.
    ///
    /// # Errors
    /// As [`Access::new`]; then nothing changes.
    pub fn reload(&self, clients: Vec<ClientConfig>, jwt: Option<&JwtConfig>) -> Result<(), AccessError> {
        let state = State::new(clients, jwt, Some(&self.state()))?;
        *self.state.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::new(state);
        Ok(())
    }

    fn state(&self) -> Arc<State> {
        // The value is whole even where a thread panicked.
        self.state.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Whether everybody is one client, without a key.
    pub fn is_open(&self) -> bool {
        self.state().anonymous().is_some()
    }

    /// Counts what a ledger says of this day and this month: at the start, and after [`Access::reload`]. Costs count that are in the
    /// currency of the prices.
    ///
    /// # Errors
    /// As [`Ledger::usage`].
    pub fn recover(&self, ledger: &Ledger, currency: &str) -> Result<(), LedgerError> {
        limits::recover(&self.state().clients, ledger, currency, now_ms())
    }

    /// The caller, by the value of the header `Authorization`, a key or a token, and by the certificate of its connection. One of them is
    /// enough; a key beside a client's certificate must be that client's.
    ///
    /// # Errors
    /// [`Denied`] with the status 401.
    pub fn check(
        &self,
        authorization: Option<&str>,
        certificate: Option<&Certificate>,
    ) -> Result<Caller, Denied> {
        let state = self.state();
        if let Some(client) = state.anonymous() {
            return Ok(Caller::new(client));
        }
        let shown =
            certificate.and_then(|shown| state.with_hash(&shown.0, |config| &config.certificate_sha256));
        let caller = match (authorization, shown, certificate) {
            (Some(header), ..) => state.caller(header)?,
            (None, Some(client), _) => Caller::new(client),
            (None, None, Some(unknown)) => return Err(Denied::UnknownCertificate(unknown.0.clone())),
            (None, None, None) => return Err(Denied::NoKey),
        };
        match shown.is_none_or(|client| client.name() == caller.client.name()) {
            true => Ok(caller),
            false => Err(Denied::OtherClient),
        }
    }
}

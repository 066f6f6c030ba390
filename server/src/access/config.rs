//! Clients as the configuration has them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ANONYMOUS, AccessError, key};
use crate::ledger::Amount;

/// Maximum bytes of a file of clients.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What a client may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scope {
    /// Generate texts.
    Generate,
    /// Compute embeddings.
    Embed,
    /// Read what it used itself.
    Usage,
    /// Change the server, and read what all clients used.
    Admin,
}

impl Scope {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Generate => "generate",
            Scope::Embed => "embed",
            Scope::Usage => "usage",
            Scope::Admin => "admin",
        }
    }

    /// A scope by name.
    pub(super) fn named(name: &str) -> Option<Scope> {
        [Scope::Generate, Scope::Embed, Scope::Usage, Scope::Admin].into_iter().find(|s| s.name() == name)
    }
}

/// A client. A limit that is absent does not hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// Its name, which receipts have.
    pub name: String,
    /// The SHA-256 of each of its keys, in hexadecimal digits.
    #[serde(default)]
    pub key_sha256: Vec<String>,
    /// The SHA-256 of each of its certificates (of the DER), in hexadecimal digits.
    #[serde(default)]
    pub certificate_sha256: Vec<String>,
    /// Names of the models that it may use; `*` for all [default: all].
    #[serde(default = "all")]
    pub models: Vec<String>,
    /// Names of the adapters that it may use; `*` for all [default: none].
    #[serde(default)]
    pub adapters: Vec<String>,
    /// What it may do [default: generate, embed, usage].
    #[serde(default = "scopes")]
    pub scopes: BTreeSet<Scope>,
    /// Requests per minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers per day in UTC.
    pub tokens_per_day: Option<u64>,
    /// Requests at once.
    pub max_concurrent: Option<u32>,
    /// Tokens of an answer.
    pub max_output_tokens: Option<u32>,
    /// Requests of a higher priority run first.
    #[serde(default)]
    pub priority: u8,
    /// The cost per month in UTC, in the currency of the prices.
    pub budget: Option<Amount>,
}

fn all() -> Vec<String> {
    vec!["*".into()]
}

fn scopes() -> BTreeSet<Scope> {
    [Scope::Generate, Scope::Embed, Scope::Usage].into()
}

impl ClientConfig {
    /// Everybody, without limits.
    pub(super) fn anonymous() -> ClientConfig {
        ClientConfig {
            name: ANONYMOUS.into(),
            models: all(),
            adapters: all(),
            scopes: scopes(),
            ..ClientConfig::default()
        }
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`AccessError::Client`] says which field is wrong.
    pub fn check(&self) -> Result<(), AccessError> {
        let wrong = |what: String| AccessError::Client { name: self.name.clone(), what };
        if self.name.is_empty() || self.name.len() > 64 || self.name.chars().any(char::is_control) {
            return Err(wrong("expected a name of 1 to 64 bytes without control characters".into()));
        }
        for (field, hashes) in
            [("key_sha256", &self.key_sha256), ("certificate_sha256", &self.certificate_sha256)]
        {
            if let Some(hash) = hashes.iter().find(|hash| !key::is_sha256(hash)) {
                // It may be the key itself.
                let got = match hash.starts_with(key::PREFIX) {
                    true => "a key; `halite keys new` tells both".into(),
                    false => format!("{} characters", hash.chars().count()),
                };
                return Err(wrong(format!("{field}: expected 64 hexadecimal digits, got {got}")));
            }
        }
        for (field, limit) in [
            ("requests_per_minute", self.requests_per_minute),
            ("max_concurrent", self.max_concurrent),
            ("max_output_tokens", self.max_output_tokens),
        ] {
            if limit == Some(0) {
                return Err(wrong(format!("{field}: expected at least 1, got 0")));
            }
        }
        Ok(())
    }
}

/// How tokens (JWT) are checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtConfig {
    /// A file with the issuer's public keys (JWKS).
    pub jwks: PathBuf,
    /// The issuer (`iss`) that tokens must have.
    pub issuer: String,
    /// Audiences (`aud`), one of which tokens must have.
    pub audience: Vec<String>,
    /// The claim with the client's name [default: sub].
    #[serde(default = "sub")]
    pub client_claim: String,
    /// The claim with scopes: a text with spaces, or a list. A token without it has all scopes of its client [default: scope].
    #[serde(default = "scope")]
    pub scope_claim: String,
    /// The client of tokens whose claim names none.
    pub default_client: Option<String>,
    /// Seconds by which clocks may differ [default: 30].
    #[serde(default = "leeway_s")]
    pub leeway_s: u64,
}

fn sub() -> String {
    "sub".into()
}

fn scope() -> String {
    "scope".into()
}

fn leeway_s() -> u64 {
    30
}

/// A file of clients.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Clients {
    #[serde(default)]
    client: Vec<ClientConfig>,
}

/// Reads a file of clients: TOML with a `[[client]]` for each.
///
/// # Errors
/// [`AccessError::File`], [`AccessError::Malformed`].
pub fn read_clients(path: &Path) -> Result<Vec<ClientConfig>, AccessError> {
    let wrong = |what: String| AccessError::Malformed { path: path.to_owned(), what };
    let bytes = halite::map::read(path, MAX_FILE_BYTES)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| wrong(e.to_string()))?;
    let clients: Clients = toml::from_str(text).map_err(|e| wrong(toml_error(text, &e)))?;
    // A file without clients would let everybody in.
    match clients.client.is_empty() {
        true => Err(wrong("expected at least one [[client]]".into())),
        false => Ok(clients.client),
    }
}

/// What is wrong with a text of TOML, and in which line. The line itself may have a secret, and so may a value: neither is told.
pub(crate) fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start);
    let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
    let mut message = String::new();
    let mut rest = error.message();
    while let Some((before, after)) = rest.split_once(key::PREFIX) {
        message = message + before + key::PREFIX + "…";
        rest = after.trim_start_matches(|c: char| c.is_ascii_alphanumeric());
    }
    format!("line {line}: {message}{rest}").replace('\n', "; ")
}

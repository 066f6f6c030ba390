//! Tokens that another server signs (JWT), checked with its public keys from a file.

use std::collections::BTreeSet;

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde_json::{Map, Value};

use super::{AccessError, Denied, JwtConfig, Scope};

/// Maximum bytes of a file of keys.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A public key, for the one algorithm that it is for.
#[derive(Debug)]
struct PublicKey {
    id: Option<String>,
    key: DecodingKey,
    validation: Validation,
}

/// What checks tokens.
#[derive(Debug)]
pub(super) struct Tokens {
    config: JwtConfig,
    keys: Vec<PublicKey>,
}

/// What a token says.
pub(super) struct Token {
    pub client: String,
    /// `None` without such a claim.
    pub scopes: Option<BTreeSet<Scope>>,
}

impl Tokens {
    pub fn new(config: &JwtConfig) -> Result<Tokens, AccessError> {
        let wrong = |what: String| AccessError::Malformed { path: config.jwks.clone(), what };
        if config.audience.is_empty() || config.issuer.is_empty() {
            return Err(wrong("expected an `issuer` and an `audience` for its tokens".into()));
        }
        let bytes = halite::map::read(&config.jwks, MAX_FILE_BYTES)?;
        let set: JwkSet = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        let keys: Vec<PublicKey> = set
            .keys
            .iter()
            // A set may have keys for other uses.
            .filter_map(|jwk| Some((jwk, algorithm(jwk)?)))
            .map(|(jwk, algorithm)| {
                let id = jwk.common.key_id.clone();
                let key = DecodingKey::from_jwk(jwk).map_err(|e| wrong(format!("key {id:?}: {e}")))?;
                let mut validation = Validation::new(algorithm);
                validation.set_issuer(&[&config.issuer]);
                validation.set_audience(&config.audience);
                validation.set_required_spec_claims(&["exp", "iss", "aud"]);
                validation.validate_nbf = true;
                validation.leeway = config.leeway_s;
                Ok(PublicKey { id, key, validation })
            })
            .collect::<Result<_, AccessError>>()?;
        match keys.is_empty() {
            true => Err(wrong("expected a public key for RS256, ES256 or EdDSA, got none".into())),
            false => Ok(Tokens { config: config.clone(), keys }),
        }
    }

    /// The client of tokens that name none.
    pub fn default_client(&self) -> Option<&String> {
        self.config.default_client.as_ref()
    }

    pub fn check(&self, token: &str) -> Result<Token, Denied> {
        let wrong = |e: jsonwebtoken::errors::Error| Denied::Token(e.to_string());
        let header = decode_header(token).map_err(wrong)?;
        let is_named = |key: &&PublicKey| header.kid.is_none() || header.kid == key.id;
        let mut error = Denied::Token("no key of the issuer is the one that the token names".into());
        for key in self.keys.iter().filter(is_named) {
            match decode::<Map<String, Value>>(token, &key.key, &key.validation) {
                Ok(data) => return self.read(&data.claims),
                Err(e) => error = wrong(e),
            }
        }
        Err(error)
    }

    fn read(&self, claims: &Map<String, Value>) -> Result<Token, Denied> {
        let JwtConfig { client_claim, scope_claim, .. } = &self.config;
        let Some(Value::String(client)) = claims.get(client_claim) else {
            return Err(Denied::Token(format!("expected a text as its claim {client_claim:?}")));
        };
        // Scopes of other services are no error.
        let named = |names: &mut dyn Iterator<Item = &str>| names.filter_map(Scope::named).collect();
        let scopes = match claims.get(scope_claim) {
            None => None,
            Some(Value::String(text)) => Some(named(&mut text.split(' '))),
            Some(Value::Array(list)) => Some(named(&mut list.iter().filter_map(Value::as_str))),
            Some(_) => {
                return Err(Denied::Token(format!("expected a text or a list as its claim {scope_claim:?}")));
            }
        };
        Ok(Token { client: client.clone(), scopes })
    }
}

/// The algorithm that a key is for: one per kind, so that a token cannot choose.
fn algorithm(jwk: &Jwk) -> Option<Algorithm> {
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        _ => return None,
    };
    let named = jwk.common.key_algorithm.map(|named| named.to_string());
    named.is_none_or(|named| named == format!("{algorithm:?}")).then_some(algorithm)
}

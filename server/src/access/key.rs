//! Keys: `hal_` and 256 random bits. Only their SHA-256 is kept.

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::AccessError;
use crate::basics::hex;

/// How a key begins, so that tools that look for secrets find it.
pub(super) const PREFIX: &str = "hal_";

/// A new key.
pub struct Key {
    /// What the client sends. It is shown once, and not kept.
    pub secret: String,
    /// What the configuration has.
    pub sha256: String,
}

impl Key {
    /// Makes a key from random bytes of the system.
    ///
    /// # Errors
    /// [`AccessError::Random`].
    pub fn new() -> Result<Key, AccessError> {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(AccessError::Random)?;
        let secret = format!("{PREFIX}{}", hex(&random));
        Ok(Key { sha256: sha256(&secret), secret })
    }
}

/// The certificate of a connection's client, after TLS has verified it: the SHA-256 of its DER, in hexadecimal digits.
#[derive(Debug, Clone)]
pub struct Certificate(pub(super) String);

impl Certificate {
    /// The certificate with a DER.
    pub fn of(der: &[u8]) -> Certificate {
        Certificate(sha256(der))
    }
}

/// The SHA-256 of a key, in hexadecimal digits. Keys are random, so a hash that is fast to compute is enough.
pub(super) fn sha256(secret: impl AsRef<[u8]>) -> String {
    format!("{:x}", Sha256::digest(secret))
}

/// Whether a text can be such a hash.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Compares two hashes in the same time, whatever they are.
pub(super) fn is_same(a: &str, b: &str) -> bool {
    a.to_ascii_lowercase().as_bytes().ct_eq(b.to_ascii_lowercase().as_bytes()).into()
}

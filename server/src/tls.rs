//! TLS: the server's certificate, and the certificates of clients.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ServerConfig, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, SupportedProtocolVersion, version};

use crate::config::{ClientCertificate, ConfigError, TlsConfig};

/// Maximum bytes of a file of certificates, or of a key.
const MAX_FILE_BYTES: u64 = 1 << 20;
const VERSIONS: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];

/// Reads the files.
pub(crate) fn read(config: &TlsConfig) -> Result<Arc<ServerConfig>, ConfigError> {
    let TlsConfig { certificate, key, client_ca, client_certificate } = config;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&VERSIONS)
        .map_err(|e| wrong(certificate, e))?;
    let builder = match client_ca {
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(file)? {
                roots.add(authority).map_err(|e| wrong(file, e))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            let verifier = match client_certificate.unwrap_or_default() {
                ClientCertificate::Required => verifier,
                ClientCertificate::Optional => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|e| wrong(file, e))?)
        }
        None if client_certificate.is_some() => {
            let expected = "`client_ca`, which verifies them";
            return Err(ConfigError::value("tls.client_certificate", expected, "none"));
        }
        None => builder.with_no_client_auth(),
    };
    let bytes = halite::map::read(key, MAX_FILE_BYTES)?;
    let secret = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|e| wrong(key, format!("expected a private key as PEM: {e}")))?;
    let chain = certificates(certificate)?;
    let mut tls = builder
        .with_single_cert(chain, secret)
        .map_err(|e| wrong(certificate, format!("with the key {}: {e}", key.display())))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(tls))
}

fn wrong(path: &Path, message: impl ToString) -> ConfigError {
    ConfigError::Parse { path: path.to_owned(), message: message.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let bytes = halite::map::read(path, MAX_FILE_BYTES)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let all = all.map_err(|e| wrong(path, format!("expected certificates as PEM: {e}")))?;
    match all.is_empty() {
        true => Err(wrong(path, "expected certificates as PEM, got none")),
        false => Ok(all),
    }
}

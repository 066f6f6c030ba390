//! Who asks, and what for.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use sha2::{Digest, Sha256};

use super::App;
use super::error::{Failure, Fallible};
use crate::access::{Admission, Caller, Certificate, Scope};
use crate::basics::hex;
use crate::model::Bill;
use crate::registry::split;
use crate::trace::Trace;

/// Who sent a request.
pub(super) struct Who {
    pub caller: Caller,
    trace: Arc<Trace>,
    /// Requests of different tenants share no KV pages.
    pub tenant: u64,
    /// When the request arrived.
    pub arrived: Instant,
    /// The header `Idempotency-Key`.
    idempotency_key: Option<Vec<u8>>,
}

impl FromRequestParts<App> for Who {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Fallible<Who> {
        let authorization = parts.headers.get(header::AUTHORIZATION);
        // A header that is no text is no key.
        let text = authorization.map(|value| value.to_str().unwrap_or_default().to_owned());
        // As Anthropic's clients send keys.
        let key = || Some(format!("Bearer {}", parts.headers.get("x-api-key")?.to_str().unwrap_or_default()));
        let certificate = parts.extensions.get::<Certificate>();
        let caller = app.shared.access.check(text.or_else(key).as_deref(), certificate)?;
        let mut hasher = DefaultHasher::new();
        caller.client().name().hash(&mut hasher);
        // Each request has one.
        let trace = parts.extensions.get::<Arc<Trace>>().cloned();
        let trace = trace.ok_or_else(|| Failure::internal("the request has no name"))?;
        trace.client(caller.client().name());
        let idempotency_key = parts.headers.get("idempotency-key").map(|value| value.as_bytes().to_vec());
        Ok(Who { caller, trace, tenant: hasher.finish(), arrived: Instant::now(), idempotency_key })
    }
}

impl Who {
    /// Checks that the client may use a model.
    pub fn may_use(&self, name: &str) -> Fallible<()> {
        let (model, adapter) = split(name);
        self.caller.require_model(model)?;
        adapter.map_or(Ok(()), |adapter| Ok(self.caller.require_adapter(adapter)?))
    }

    /// Checks that the client may do this with a model, and counts the request.
    pub fn admit(&self, scope: Scope, name: &str) -> Fallible<Arc<Admission>> {
        self.caller.require(scope)?;
        self.may_use(name)?;
        self.trace.model(name);
        Ok(Arc::new(self.caller.admit()?))
    }

    /// The journal's key of one of the texts of a request, if it has an idempotency key.
    pub fn journal_key(&self, text: usize) -> Option<String> {
        let key = self.idempotency_key.as_ref()?;
        let mut hasher = Sha256::new();
        for part in [self.caller.client().name().as_bytes(), key, &text.to_le_bytes()] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Some(hex(&hasher.finalize()))
    }

    /// The bill of a text.
    pub fn bill(&self, endpoint: &'static str, admission: &Arc<Admission>, has_prompt: bool) -> Bill {
        let (trace, admission) = (self.trace.clone(), admission.clone());
        let idempotency_sha256 = self.idempotency_key.as_ref().map(|key| hex(&Sha256::digest(key)));
        Bill { trace, idempotency_sha256, endpoint, admission, has_prompt }
    }
}

//! Errors in OpenAI's form.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use halite::Error;
use serde::Serialize;
use serde_json::{Value, json};

use crate::access::Denied;
use crate::engine::Refused;
use crate::ledger::LedgerError;
use crate::model::Failed;

/// Whose fault an error is: `type` in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(strum::VariantArray))]
pub(super) enum Kind {
    #[serde(rename = "invalid_request_error")]
    InvalidRequest,
    #[serde(rename = "authentication_error")]
    Authentication,
    #[serde(rename = "permission_error")]
    Permission,
    #[serde(rename = "rate_limit_error")]
    RateLimit,
    #[serde(rename = "server_error")]
    Server,
}

/// What a program can do about an error: `code` in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(strum::VariantArray))]
pub(super) enum Code {
    ModelNotFound,
    ContextLengthExceeded,
    DeadlineExceeded,
    RateLimitExceeded,
    InsufficientQuota,
    InvalidApiKey,
    PermissionDenied,
    ContentPolicyViolation,
}

/// An answer that is an error.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: StatusCode,
    kind: Kind,
    pub message: String,
    /// The field of the request that is wrong.
    param: Option<String>,
    code: Option<Code>,
    retry_after_s: Option<u64>,
}

/// The result of reading or answering a request.
pub(super) type Fallible<T> = Result<T, Failure>;

impl Failure {
    fn new(status: StatusCode, kind: Kind, message: impl Into<String>) -> Failure {
        Failure { status, kind, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A request that is wrong.
    pub fn request(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, message)
    }

    /// A field of a request that is wrong.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Failure {
        Failure { param: Some(name.into()), ..Failure::request(format!("{name}: {message}")) }
    }

    /// An address or a model that does not exist.
    pub fn not_found(message: impl Into<String>, code: Option<Code>) -> Failure {
        Failure { code, ..Failure::new(StatusCode::NOT_FOUND, Kind::InvalidRequest, message) }
    }

    /// The same with another status.
    pub fn status(self, status: StatusCode) -> Failure {
        Failure { status, ..self }
    }

    /// A fault of the server.
    pub fn internal(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, Kind::Server, message)
    }

    /// Something that may work later.
    pub fn unavailable(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, Kind::Server, message)
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl Failure {
    /// An answer with a body.
    pub fn response(self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            let seconds = HeaderValue::from(self.retry_after_s.unwrap_or(1));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = self.body();
        self.response(body)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let message = error.to_string();
        match error {
            Error::ContextFull { .. } => {
                Failure { code: Some(Code::ContextLengthExceeded), ..Failure::request(message) }
            }
            Error::Argument { .. } | Error::Constraint(_) | Error::Template(_) => Failure::request(message),
            // Paths are this machine's.
            Error::Io { .. } | Error::Gguf { .. } | Error::FileChanged { .. } | Error::Backend { .. } => {
                Failure::internal("the device failed, or the model's file")
            }
            _ => Failure::internal(message),
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Failure {
        let message = refused.to_string();
        match refused {
            Refused::Full(_) => Failure {
                code: Some(Code::RateLimitExceeded),
                ..Failure::new(StatusCode::TOO_MANY_REQUESTS, Kind::RateLimit, message)
            },
            // What the device says may have paths of this machine.
            Refused::Down(_) => Failure::unavailable("no device can run the model now; try again later"),
            Refused::Memory { .. } | Refused::Ledger => Failure::unavailable(message),
        }
    }
}

impl From<Denied> for Failure {
    fn from(denied: Denied) -> Failure {
        let status = StatusCode::from_u16(denied.status()).unwrap_or(StatusCode::FORBIDDEN);
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => Kind::RateLimit,
            StatusCode::UNAUTHORIZED => Kind::Authentication,
            StatusCode::FORBIDDEN => Kind::Permission,
            _ => Kind::InvalidRequest,
        };
        let (code, retry_after_s) = (Some(Code::from(&denied)), denied.retry_after_s());
        Failure { code, retry_after_s, ..Failure::new(status, kind, denied.to_string()) }
    }
}

impl From<&Denied> for Code {
    fn from(denied: &Denied) -> Code {
        match denied {
            Denied::NoKey
            | Denied::UnknownKey
            | Denied::UnknownCertificate(_)
            | Denied::OtherClient
            | Denied::Token(_) => Code::InvalidApiKey,
            Denied::Scope { .. } | Denied::NotAllowed { .. } => Code::PermissionDenied,
            Denied::Rule { .. } => Code::ContentPolicyViolation,
            Denied::Budget { .. } => Code::InsufficientQuota,
            _ => Code::RateLimitExceeded,
        }
    }
}

impl From<LedgerError> for Failure {
    /// It may have paths of this machine.
    fn from(error: LedgerError) -> Failure {
        tracing::error!(%error, "the ledger cannot be read");
        Failure::internal("the ledger cannot be read")
    }
}

impl From<Failed> for Failure {
    fn from(failed: Failed) -> Failure {
        match failed {
            Failed::Error(error) => error.into(),
            Failed::Refused(refused) => refused.into(),
            Failed::Late => Failure {
                code: Some(Code::DeadlineExceeded),
                ..Failure::request(failed.to_string()).status(StatusCode::REQUEST_TIMEOUT)
            },
            Failed::Conflict(conflict) => Failure::request(conflict.to_string()).status(StatusCode::CONFLICT),
        }
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;

    #[test]
    fn the_description_lists_every_kind_and_code() {
        let description: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        let error = &description["components"]["schemas"]["Error"]["properties"]["error"]["properties"];
        assert_eq!(error["type"]["enum"], json!(Kind::VARIANTS));
        let codes = Code::VARIANTS.iter().map(|&code| Some(code)).chain([None]);
        assert_eq!(error["code"]["enum"], json!(codes.collect::<Vec<_>>()));
    }
}

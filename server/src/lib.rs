//! Models of this process over HTTP, with OpenAI's interface.
//!
//! An [`Engine`] runs the requests of one model on one backend, on a thread of its own. [`Server`] gives engines names and answers
//! HTTP requests: `api` reads them and writes the answers.
#![deny(unsafe_code)]

pub mod access;
mod api;
mod engine;
pub mod integrity;
pub mod ledger;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use axum::Router;
use tokio::net::TcpListener;

pub use engine::{Engine, EngineOptions, Refused, Ticket, Update};

/// Engines by the names under which clients know them.
#[derive(Debug, Default, Clone)]
pub struct Server {
    engines: BTreeMap<String, Arc<Engine>>,
}

impl Server {
    /// Adds an engine, instead of one of the same name.
    #[must_use]
    pub fn model(mut self, name: &str, engine: Engine) -> Server {
        self.engines.insert(name.to_owned(), Arc::new(engine));
        self
    }

    /// The HTTP service.
    pub fn router(self) -> Router {
        api::router(self.engines)
    }

    /// Answers requests on a socket until `stop`, and then until the answers that began are complete.
    ///
    /// # Errors
    /// Errors of the socket.
    pub async fn run(
        self,
        listener: TcpListener,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        axum::serve(listener, self.router()).with_graceful_shutdown(stop).await
    }
}

//! Models of this process over HTTP, with OpenAI's interface.
//!
//! An [`Engine`] runs the requests of one model on one backend, on a thread of its own, and an [`Encoder`] those of one that embeds
//! texts. [`Server`] gives them names and answers HTTP requests: `api` reads them and writes the answers.
#![deny(unsafe_code)]

mod api;
mod embedder;
mod engine;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use axum::Router;
use tokio::net::TcpListener;

pub use embedder::{Encoder, Vectors};
pub use engine::{Engine, EngineOptions, Refused, Ticket, Update};

/// Engines and encoders by the names under which clients know them.
#[derive(Debug, Default, Clone)]
pub struct Server {
    engines: BTreeMap<String, Arc<Engine>>,
    encoders: BTreeMap<String, Arc<Encoder>>,
}

impl Server {
    /// Adds an engine, instead of a model of the same name.
    #[must_use]
    pub fn model(mut self, name: &str, engine: Engine) -> Server {
        self.encoders.remove(name);
        self.engines.insert(name.to_owned(), Arc::new(engine));
        self
    }

    /// Adds an encoder, instead of a model of the same name.
    #[must_use]
    pub fn encoder(mut self, name: &str, encoder: Encoder) -> Server {
        self.engines.remove(name);
        self.encoders.insert(name.to_owned(), Arc::new(encoder));
        self
    }

    /// The HTTP service.
    pub fn router(self) -> Router {
        api::router(self.engines, self.encoders)
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

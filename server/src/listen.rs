//! The server's border on the socket: how many connections there are, and how long they may be silent or slow.

use std::future::Future;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutWriter;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tower_service::Service;

use crate::access::Certificate;
use crate::config::{Config, ConfigError, seconds};
use crate::tls;

/// How long the handshake of TLS may take.
const MOST_HANDSHAKE: Duration = Duration::from_secs(10);
/// After so long without a byte, the system asks the other side whether it is still there, and again after the interval.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// The pause after an error of the system, such as too many open files, which others may close meanwhile.
const PAUSE: Duration = Duration::from_secs(1);

/// What connections are held to.
pub(crate) struct Border {
    max: usize,
    free: Arc<Semaphore>,
    header: Duration,
    /// How long the body of a request may take.
    pub body: Duration,
    /// Bytes of bodies for which there is still room.
    pub bodies: Arc<Semaphore>,
    /// Bytes of bodies for which there is room at all.
    pub most_bodies: usize,
    write: Duration,
    tls: RwLock<Option<Arc<ServerConfig>>>,
}

impl Border {
    pub fn new(config: &Config) -> Result<Border, ConfigError> {
        let limits = &config.connections;
        let max = limits.max.unwrap_or(1024);
        if max == 0 {
            return Err(ConfigError::value("connections.max", "at least 1", max));
        }
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let bodies = usize::try_from(limits.bodies_mb.unwrap_or(256).saturating_mul(1_000_000));
        let most_bodies = bodies.unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Ok(Border {
            bodies: Arc::new(Semaphore::new(most_bodies)),
            most_bodies,
            max,
            free: Arc::new(Semaphore::new(max)),
            header: seconds("connections.header_timeout_s", limits.header_timeout_s, 30.0)?,
            body: seconds("connections.body_timeout_s", limits.body_timeout_s, 60.0)?,
            write: seconds("connections.write_timeout_s", limits.write_timeout_s, 60.0)?,
            tls: RwLock::new(config.tls.as_ref().map(tls::read).transpose()?),
        })
    }

    /// Open connections.
    pub fn open(&self) -> usize {
        self.max - self.free.available_permits().min(self.max)
    }

    /// How connections are encrypted, if they are.
    pub fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the certificates of a new configuration, for [`Border::renew`].
    pub fn read_tls(&self, config: &Config) -> Result<Option<Arc<ServerConfig>>, ConfigError> {
        match (self.tls(), &config.tls) {
            (None, None) => Ok(None),
            (Some(_), Some(tls)) => Ok(Some(tls::read(tls)?)),
            // Clients would find another protocol at the same address.
            (had, _) => {
                let name = |has| if has { "a section" } else { "none" };
                let expected =
                    format!("{}, as at the start; a change of this needs a restart", name(had.is_some()));
                Err(ConfigError::value("tls", expected, name(had.is_none())))
            }
        }
    }

    /// New connections get other certificates.
    pub fn renew(&self, tls: Option<Arc<ServerConfig>>) {
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
    }
}

/// Takes connections until `stop`, and then waits until the answers that began are complete.
pub(crate) async fn serve(
    listener: TcpListener,
    border: &Arc<Border>,
    router: Router,
    stop: impl Future<Output = ()>,
) {
    let connections = GracefulShutdown::new();
    let mut stop = pin!(stop);
    let mut was_full = false;
    loop {
        // Others wait in the system's queue.
        let next = async {
            let is_full = border.free.available_permits() == 0;
            if is_full && !was_full {
                tracing::warn!(max = border.max, "as many connections as may be; others wait");
            }
            was_full = is_full;
            // The semaphore is never closed.
            let permit = border.free.clone().acquire_owned().await;
            (accept(&listener).await, permit)
        };
        let (stream, permit) = tokio::select! {
            biased;
            () = &mut stop => break,
            next = next => next,
        };
        let (border, router, watcher) = (border.clone(), router.clone(), connections.watcher());
        tokio::spawn(async move {
            converse(stream, &border, router, watcher).await;
            drop(permit);
        });
    }
    drop(listener);
    connections.shutdown().await;
}

/// The next connection. Errors of the socket are no reason to end: they are those of one connection, or pass.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused | ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset => {}
                _ => {
                    tracing::error!(%error, "a connection cannot be taken; trying again");
                    sleep(PAUSE).await;
                }
            },
        }
    }
}

/// Answers the requests of a connection.
async fn converse(stream: TcpStream, border: &Border, router: Router, watcher: Watcher) {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL);
    // A connection that is closed already has no options.
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(border.write));
    let stream = Box::pin(stream);
    let Some(tls) = border.tls() else {
        return answer(stream, None, border, router, watcher).await;
    };
    let handshake = TlsAcceptor::from(tls).accept(stream);
    match timeout(MOST_HANDSHAKE.min(border.header), handshake).await {
        Ok(Ok(stream)) => {
            let certificates = stream.get_ref().1.peer_certificates();
            let certificate = certificates.and_then(<[_]>::first).map(|der| Certificate::of(der));
            answer(stream, certificate, border, router, watcher).await;
        }
        Ok(Err(error)) => tracing::info!(%error, "the handshake of TLS failed"),
        Err(_) => tracing::info!("the handshake of TLS took too long"),
    }
}

async fn answer<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    stream: S,
    certificate: Option<Certificate>,
    border: &Border,
    router: Router,
    watcher: Watcher,
) {
    let service = service_fn(|mut request: Request<Incoming>| {
        if let Some(certificate) = &certificate {
            request.extensions_mut().insert(certificate.clone());
        }
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(border.header)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection ended early");
    }
}

//! Connections: clients that are slow, silent or too many, certificates of the server, and those of clients.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{Test, folder, server};
use halite_server::Server;
use halite_server::ledger::Ledger;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};

const LIVE: &str = "GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n";
const MODELS: [&str; 2] =
    ["[[model]]\nname = 'a'\nfile = 'a.gguf'\n", "[[model]]\nname = 'b'\nfile = 'a.gguf'\n"];

/// A server on a socket.
struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    end: JoinHandle<()>,
}

impl Running {
    fn new(server: &Server, listener: TcpListener) -> Running {
        let (stop, stopped) = oneshot::channel();
        let address = listener.local_addr().unwrap();
        let stopped = async {
            let _ = stopped.await;
        };
        let end = tokio::spawn(server.clone().run(listener, stopped));
        Running { address, stop, end }
    }

    async fn start(server: &Server) -> Running {
        Running::new(server, TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// What comes until the connection ends.
async fn rest(stream: &mut impl Stream) -> String {
    let mut bytes = Vec::new();
    // Whether the end is one of TLS does not matter here.
    let _ = stream.read_to_end(&mut bytes).await;
    String::from_utf8(bytes).unwrap()
}

/// What comes until a text.
async fn until(stream: &mut impl Stream, text: &str) -> String {
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains(text) {
        bytes.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(bytes).unwrap()
}

fn post(body: &Value) -> String {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn long(n: u32) -> Value {
    json!({ "model": "a", "prompt": "She", "max_tokens": 2000, "n": n, "ignore_eos": true, "stream": true })
}

/// The body of an answer after which the connection ends.
fn body(answer: &str) -> Value {
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

#[tokio::test]
async fn silence_ends_a_connection() {
    let (_test, server, _) = server("connections = { header_timeout_s = 0.5 }", &[]);
    let running = Running::start(&server).await;
    for (sent, answers) in [("", 0), (&LIVE[..20], 0), (LIVE, 1)] {
        let mut stream = running.connect().await;
        stream.write_all(sent.as_bytes()).await.unwrap();
        assert_eq!(rest(&mut stream).await.matches("HTTP/1.1 200").count(), answers, "{sent}");
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_is_an_error() {
    let (_test, server, _) = server(&format!("connections = {{ body_timeout_s = 0.2 }}\n{}", MODELS[0]), &[]);
    let running = Running::start(&server).await;
    let mut stream = running.connect().await;
    let request = post(&long(1));
    stream.write_all(&request.as_bytes()[..request.len() - 1]).await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let error = &body(&answer)["error"];
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error["message"].as_str().unwrap().contains("within 0.2 s"), "{error}");
}

#[tokio::test]
async fn bodies_have_room_together() {
    let (_test, server, _) = server(&format!("connections = {{ bodies_mb = 1 }}\n{}", MODELS[0]), &[]);
    let running = Running::start(&server).await;
    // White space before the JSON.
    let padded = |bytes: usize| {
        let text = json!({ "model": "a", "prompt": "She", "max_tokens": 1 }).to_string();
        let body = " ".repeat(bytes - text.len()) + &text;
        format!(
            "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {bytes}\r\n\r\n{body}"
        )
    };
    let mut slow = running.connect().await;
    let most = padded(900_000);
    slow.write_all(&most.as_bytes()[..most.len() - 1]).await.unwrap();
    let metrics = async || {
        let mut stream = running.connect().await;
        let ask = "GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(ask.as_bytes()).await.unwrap();
        rest(&mut stream).await
    };
    // Until that has arrived, there is room.
    while !metrics().await.contains("\nhalite_bodies_bytes 899999\n") {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(!metrics().await.contains("\nhalite_connections 0\n"));
    let status = async |text: &[u8]| {
        let mut stream = running.connect().await;
        // The server may answer before it has read all.
        let _ = stream.write_all(text).await;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.unwrap();
        String::from_utf8(status.to_vec()).unwrap()
    };
    assert_eq!(status(padded(200_000).as_bytes()).await, "HTTP/1.1 503");
    slow.write_all(&most.as_bytes()[most.len() - 1..]).await.unwrap();
    let answer = rest(&mut slow).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(status(padded(200_000).as_bytes()).await, "HTTP/1.1 200");
    assert_eq!(status(padded(1_100_000).as_bytes()).await, "HTTP/1.1 503");
}

#[tokio::test]
async fn a_body_that_is_too_long_is_an_error() {
    let (_test, server, _) = server(MODELS[0], &[]);
    let running = Running::start(&server).await;
    let mut stream = running.connect().await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    // The server answers before it has read all.
    let _ = stream.write_all(&vec![b' '; (16 << 20) + 1]).await;
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
}

#[tokio::test]
async fn a_client_that_never_reads_is_dropped() {
    let config = "connections = { write_timeout_s = 0.05 }\nledger = { file = 'ledger.db' }\n";
    let (test, server, _) = server(&format!("{config}{}", MODELS[0]), &[]);
    // Little is on its way.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let running = Running::new(&server, socket.listen(8).unwrap());
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(running.address).await.unwrap();
    stream.write_all(post(&long(16)).as_bytes()).await.unwrap();
    let ledger = Ledger::open_read_only(&test.path("ledger.db")).unwrap();
    let receipts = loop {
        let receipts = ledger.receipts(0, 100).unwrap();
        if receipts.len() == 16 {
            break receipts;
        }
        sleep(Duration::from_millis(20)).await;
    };
    assert!(receipts.iter().all(|receipt| receipt.content.outcome == "cancelled"));
    drop(stream);
}

#[tokio::test]
async fn more_connections_than_may_be_wait() {
    let (_test, server, _) = server("connections = { max = 1 }", &[]);
    let running = Running::start(&server).await;
    let mut first = running.connect().await;
    first.write_all(LIVE.as_bytes()).await.unwrap();
    until(&mut first, "ok").await;
    let mut second = running.connect().await;
    second.write_all(LIVE.as_bytes()).await.unwrap();
    timeout(Duration::from_millis(200), second.read_u8()).await.unwrap_err();
    first.write_all(LIVE.as_bytes()).await.unwrap();
    until(&mut first, "ok").await;
    drop(first);
    until(&mut second, "ok").await;
}

#[tokio::test]
async fn answers_are_completed_before_the_end() {
    let (_test, server, _) = server(&format!("drain_s = 600\n{}", MODELS[0]), &[]);
    let running = Running::start(&server).await;
    let (mut idle, mut stream) = (running.connect().await, running.connect().await);
    idle.write_all(LIVE.as_bytes()).await.unwrap();
    until(&mut idle, "ok").await;
    let mut body = long(1);
    body["max_tokens"] = json!(200);
    stream.write_all(post(&body).as_bytes()).await.unwrap();
    until(&mut stream, "data: {").await;
    running.stop.send(()).unwrap();
    let _ = rest(&mut idle).await;
    TcpStream::connect(running.address).await.unwrap_err();
    assert!(rest(&mut stream).await.contains("[DONE]"));
    running.end.await.unwrap();
}

/// An authority for certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    der: CertificateDer<'static>,
}

/// A certificate and its key.
struct Certified {
    pem: String,
    der: CertificateDer<'static>,
    key: KeyPair,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Authority { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    fn certify(&self, name: &str) -> Certified {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Certified { pem: certificate.pem(), der: certificate.der().clone(), key }
    }
}

impl Certified {
    fn sha256(&self) -> String {
        format!("{:x}", Sha256::digest(&self.der))
    }

    /// Writes it where configurations expect the server's.
    fn write(&self, test: &Test) {
        std::fs::write(test.path("cert.pem"), &self.pem).unwrap();
        std::fs::write(test.path("key.pem"), self.key.serialize_pem()).unwrap();
    }
}

/// A connection to a server whose certificate is by an authority.
async fn tls(
    running: &Running,
    authority: &Authority,
    version: &'static SupportedProtocolVersion,
    certificate: Option<&Certified>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let config: ClientConfig = match certificate {
        Some(Certified { der, key, .. }) => {
            let key = PrivatePkcs8KeyDer::from(key.serialize_der());
            config.with_client_auth_cert(vec![der.clone()], key.into()).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, running.connect().await).await
}

/// A folder with a configuration, which begins with the server's certificate.
fn secure(config: &str, clients: &[&str], authority: &Authority) -> (Arc<Test>, Vec<String>) {
    let config = format!("tls.certificate = 'cert.pem'\ntls.key = 'key.pem'\n{config}");
    let (test, keys) = folder(&config, clients);
    authority.certify("localhost").write(&test);
    std::fs::write(test.path("ca.pem"), &authority.pem).unwrap();
    (test, keys)
}

#[tokio::test]
async fn certificates_are_renewed_without_a_restart() {
    let authority = Authority::new();
    let (test, _) = secure("", &[], &authority);
    let server = Server::new(test.clone()).unwrap();
    assert_eq!(server.scheme(), "https");
    let running = Running::start(&server).await;
    let shown = async |version| {
        let mut stream = tls(&running, &authority, version, None).await.unwrap();
        stream.write_all(LIVE.as_bytes()).await.unwrap();
        assert!(until(&mut stream, "ok").await.starts_with("HTTP/1.1 200"));
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let old = shown(&version::TLS13).await;
    assert_eq!(old, shown(&version::TLS12).await);

    // A connection that is there already goes on.
    let mut before = tls(&running, &authority, &version::TLS13, None).await.unwrap();
    let new = authority.certify("localhost");
    new.write(&test);
    server.reload().unwrap();
    assert_eq!(shown(&version::TLS13).await, new.der);
    before.write_all(LIVE.as_bytes()).await.unwrap();
    until(&mut before, "ok").await;

    // What is wrong changes nothing.
    let (config, key) = (test.path("halite.toml"), test.path("key.pem"));
    let text = std::fs::read_to_string(&config).unwrap();
    let other = KeyPair::generate().unwrap().serialize_pem();
    let pair = std::fs::read_to_string(&key).unwrap();
    for (config_text, key_text, want) in [
        (&text, &other, "cert.pem"),
        (&text, &new.pem, "key.pem"),
        (&"tls.key = 'key.pem'".into(), &pair, "certificate"),
        (&text.replace("cert.pem", "key.pem"), &pair, "got none"),
        (&text.replace("cert.pem", "none.pem"), &pair, "none.pem"),
        (&format!("{text}tls.client_certificate = 'optional'"), &pair, "client_ca"),
        (&String::new(), &pair, "as at the start"),
    ] {
        std::fs::write(&config, config_text).unwrap();
        std::fs::write(&key, key_text).unwrap();
        let error = server.reload().unwrap_err().to_string();
        assert!(error.contains(want), "{config_text}: {error}");
        assert_eq!(shown(&version::TLS13).await, new.der);
    }
}

#[tokio::test]
async fn a_handshake_that_does_not_come_ends_a_connection() {
    let (test, _) = secure("connections.header_timeout_s = 0.2", &[], &Authority::new());
    let running = Running::start(&Server::new(test).unwrap()).await;
    for sent in ["", LIVE] {
        let mut stream = running.connect().await;
        stream.write_all(sent.as_bytes()).await.unwrap();
        assert!(!rest(&mut stream).await.contains("HTTP"));
    }
}

#[tokio::test]
async fn a_certificate_is_a_client() {
    let authority = Authority::new();
    let [ada, bob, nobody] = ["ada", "bob", "nobody"].map(|name| authority.certify(name));
    let stranger = Authority::new().certify("ada");
    let (ada_sha256, bob_sha256) = (ada.sha256(), bob.sha256().to_uppercase());
    let config = format!(
        r#"
        tls.client_ca = "ca.pem"
        [[client]]
        name = "ada"
        key_sha256 = ["KEY(ada)"]
        certificate_sha256 = ["{ada_sha256}"]
        models = ["a"]
        [[client]]
        name = "bob"
        key_sha256 = ["KEY(bob)"]
        certificate_sha256 = ["{bob_sha256}"]
        models = ["b"]
        {}{}"#,
        MODELS[0], MODELS[1]
    );
    let (test, keys) = secure(&config, &["ada", "bob"], &authority);
    let server = Server::new(test.clone()).unwrap();
    let running = Running::start(&server).await;
    // The status, and the models that the client may use or the code of the error; nothing where there is no connection.
    let ask = async |certificate, key: Option<&String>| {
        let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let request = format!("GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{key}\r\n");
        let mut stream = tls(&running, &authority, &version::TLS13, certificate).await.ok()?;
        stream.write_all(request.as_bytes()).await.ok()?;
        let answer = rest(&mut stream).await;
        let status = answer.split(' ').nth(1)?.to_owned();
        let body = body(&answer);
        let what = if status == "200" { &body["data"][0]["id"] } else { &body["error"]["code"] };
        Some((status, what.as_str().unwrap().to_owned()))
    };
    let is = |status: &str, what: &str| Some((status.to_owned(), what.to_owned()));
    let wrong = is("401", "invalid_api_key");
    for required in [true, false] {
        if !required {
            let text = std::fs::read_to_string(test.path("halite.toml")).unwrap();
            let text = format!("tls.client_certificate = 'optional'\n{text}");
            std::fs::write(test.path("halite.toml"), text).unwrap();
            server.reload().unwrap();
        }
        assert_eq!(ask(Some(&ada), None).await, is("200", "a"));
        assert_eq!(ask(Some(&bob), None).await, is("200", "b"));
        assert_eq!(ask(Some(&ada), Some(&keys[0])).await, is("200", "a"));
        assert_eq!(ask(Some(&ada), Some(&keys[1])).await, wrong);
        assert_eq!(ask(Some(&ada), Some(&"none".into())).await, wrong);
        assert_eq!(ask(Some(&nobody), None).await, wrong);
        assert_eq!(ask(Some(&nobody), Some(&keys[1])).await, is("200", "b"));
        assert_eq!(ask(Some(&stranger), Some(&keys[0])).await, None);
        let (with_key, without) = if required { (None, None) } else { (is("200", "b"), wrong.clone()) };
        assert_eq!(ask(None, Some(&keys[1])).await, with_key);
        assert_eq!(ask(None, None).await, without);
    }
}

//! Chaos: devices that fail, hang and compute nonsense at random, clients that vanish, read slowly, send nonsense or say nothing, and a
//! server that is killed. What is answered is right, what fails says so, and the ledger has every receipt that was told.
//!
//! It takes seconds; `HALITE_CHAOS_S` is how many.
#![cfg(target_os = "linux")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use halite::map::Source;
use halite::{Backend, Error, Model};
use halite_server::ledger::Ledger;
use halite_server::{Config, ConfigError, Machine, ReplicaConfig, Server};
use halite_testing::SplitMix;
use halite_testing::faulty::{Fault, Faulty};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Different requests.
const PROMPTS: usize = 12;
const FOLDER: &str = "HALITE_CHAOS_FOLDER";
const CONFIG: &str = "
    drain_s = 2
    probe_s = 0.5
    [ledger]
    file = 'ledger.db'
    durability = 'normal'
    [[model]]
    name = 'a'
    context = 256
    cache = 1024
    slots = 4
    queue = 8
    step_timeout_s = 0.5
    policy = 'load'
    [[model.replica]]
    backend = '0'
    [[model.replica]]
    backend = '1'
    [[model.replica]]
    backend = '2'
";

/// Devices that fail by name. One that hung for ever is left to itself; opening the device again gives a new one.
struct Devices {
    folder: PathBuf,
    open: Mutex<BTreeMap<String, Arc<Faulty>>>,
}

impl Machine for Devices {
    fn config(&self) -> Result<Config, ConfigError> {
        Config::read(&self.folder.join("halite.toml"))
    }

    fn device(&self, replica: &ReplicaConfig) -> Result<Arc<dyn Backend>, Error> {
        let device = Arc::new(Faulty::with_threads(1));
        if let Some(old) = self.open.lock().unwrap().insert(replica.backend.clone(), device.clone()) {
            old.release();
        }
        Ok(device)
    }

    fn builtin(&self) -> Result<Model, Error> {
        Model::from_source(Source::from_static("built-in", halite_models::AUSTEN))
    }
}

/// The server, as a process of its own: its address is the name of a file. Without the folder, this test has nothing to do.
#[test]
fn serve() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let devices = Arc::new(Devices { folder: folder.clone(), open: Mutex::default() });
    let server = Server::new(devices.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        std::fs::write(folder.join("address.new"), address.to_string()).unwrap();
        std::fs::rename(folder.join("address.new"), folder.join("address")).unwrap();
        std::thread::spawn(move || sabotage(&devices));
        server.run(listener, std::future::pending()).await;
    });
}

fn sabotage(devices: &Devices) {
    let mut random = SplitMix(std::process::id().into());
    loop {
        std::thread::sleep(Duration::from_millis(20 + random.below(200) as u64));
        let open: Vec<Arc<Faulty>> = devices.open.lock().unwrap().values().cloned().collect();
        if open.is_empty() {
            continue;
        }
        let fault = [Fault::Fail, Fault::Lose, Fault::Hang, Fault::Poison][random.below(4)];
        open[random.below(open.len())].after(random.below(30) as u32, fault);
    }
}

/// A server that runs, and may be killed.
struct Running {
    child: Child,
    address: SocketAddr,
}

impl Running {
    fn start(folder: &Path) -> Running {
        let file = folder.join("address");
        let _ = std::fs::remove_file(&file);
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["serve", "--exact", "--nocapture"])
            .env(FOLDER, folder)
            .stdout(Stdio::null())
            .stderr(std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut running = Running { child, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let began = Instant::now();
        while running.address.port() == 0 {
            assert!(began.elapsed() < Duration::from_secs(60), "the server does not start");
            std::thread::sleep(Duration::from_millis(10));
            let address = std::fs::read_to_string(&file).ok().and_then(|text| text.parse().ok());
            running.address = address.unwrap_or(running.address);
        }
        running
    }

    /// Open files, and kilobytes of memory.
    fn sizes(&self) -> (usize, u64) {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let files = std::fs::read_dir(process.join("fd")).map_or(0, |files| files.count());
        let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kb = rss.and_then(|rss| rss.trim().trim_end_matches(" kB").parse().ok());
        (files, kb.unwrap_or(0))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What clients share.
struct Clients {
    address: Mutex<SocketAddr>,
    is_over: AtomicBool,
    /// The right text of each prompt.
    texts: Mutex<BTreeMap<usize, String>>,
    told: Mutex<Vec<Value>>,
    right: AtomicUsize,
    failed: AtomicUsize,
    cut: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

fn body(n: usize, stream: bool) -> String {
    json!({
        "prompt": format!("{n} ladies said that"), "max_tokens": 12 + n % 20, "seed": n, "ignore_eos": true,
        "temperature": 0.4 * (n % 3) as f64, "stream": stream, "stream_options": { "include_usage": true },
    })
    .to_string()
}

fn post(path: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Sends bytes, and reads the answer to its end. `None` if the connection broke.
async fn send(address: SocketAddr, request: &[u8]) -> Option<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        stream.write_all(request).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let body = answer.split_once("\r\n\r\n")?.1.to_owned();
        Some((status, body))
    };
    tokio::time::timeout(Duration::from_secs(60), exchange).await.ok()?
}

impl Clients {
    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    fn check(&self, n: usize, text: &str) {
        let mut texts = self.texts.lock().unwrap();
        let want = texts.entry(n).or_insert_with(|| text.to_owned());
        if want == text {
            self.right.fetch_add(1, Relaxed);
        } else {
            let message = format!("prompt {n}: {text:?} instead of {want:?}");
            drop(texts);
            self.wrong(message);
        }
    }

    /// One request of a client that behaves.
    async fn ask(&self, n: usize, stream: bool) {
        let address = *self.address.lock().unwrap();
        let Some((status, answer)) = send(address, &post("/v1/completions", &body(n, stream))).await else {
            self.cut.fetch_add(1, Relaxed);
            // Until it runs again.
            tokio::time::sleep(Duration::from_millis(50)).await;
            return;
        };
        match status {
            200 if stream => self.streamed(n, &answer),
            200 => match serde_json::from_str::<Value>(&answer) {
                Ok(answer) => {
                    self.check(n, answer["choices"][0]["text"].as_str().unwrap_or_default());
                    self.told
                        .lock()
                        .unwrap()
                        .extend(answer["halite"]["receipts"].as_array().cloned().unwrap_or_default());
                }
                // Killed meanwhile.
                Err(_) => _ = self.cut.fetch_add(1, Relaxed),
            },
            429 | 503 => {
                self.failed.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            status => self.wrong(format!("prompt {n}: status {status}: {answer}")),
        }
    }

    fn streamed(&self, n: usize, answer: &str) {
        let mut text = String::new();
        let mut is_whole = false;
        for data in answer.lines().filter_map(|line| line.strip_prefix("data: ")) {
            is_whole |= data == "[DONE]";
            let Ok(event) = serde_json::from_str::<Value>(data) else { continue };
            if event["error"].is_object() {
                self.failed.fetch_add(1, Relaxed);
                return;
            }
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
        }
        if is_whole {
            self.check(n, &text);
        } else {
            self.cut.fetch_add(1, Relaxed);
        }
    }

    /// One request of a client that does not.
    async fn misbehave(&self, random: &mut SplitMix) {
        let address = *self.address.lock().unwrap();
        let n = random.below(PROMPTS);
        let Ok(mut stream) = TcpStream::connect(address).await else { return };
        let wait = Duration::from_millis(random.below(300) as u64);
        match random.below(6) {
            // Leaves in the middle.
            0 => {
                let _ = stream.write_all(&post("/v1/completions", &body(n, true))).await;
                let mut piece = [0; 64];
                let _ = tokio::time::timeout(wait, stream.read(&mut piece)).await;
            }
            // Reads slowly.
            1 => {
                let _ = stream.write_all(&post("/v1/completions", &body(n, true))).await;
                let mut byte = [0; 16];
                for _ in 0..20 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    if !matches!(stream.read(&mut byte).await, Ok(1..)) {
                        break;
                    }
                }
            }
            // Says nothing, or half of something.
            2 => tokio::time::sleep(wait).await,
            3 => {
                let request = post("/v1/completions", &body(n, false));
                let _ = stream.write_all(&request[..random.below(request.len())]).await;
                tokio::time::sleep(wait).await;
            }
            // Is no HTTP, or no JSON.
            4 => {
                let bytes: Vec<u8> = (0..500).map(|_| random.below(256) as u8).collect();
                let _ = stream.write_all(&bytes).await;
                let _ = send(address, &post("/v1/completions", &String::from_utf8_lossy(&bytes))).await;
            }
            // Is far too long.
            _ => {
                let long = json!({ "prompt": "and ".repeat(2_500_000) }).to_string();
                match send(address, &post("/v1/completions", &long)).await {
                    Some((400 | 413 | 429 | 503, _)) | None => {}
                    Some((status, answer)) => self.wrong(format!("a long prompt: status {status}: {answer}")),
                }
            }
        }
    }
}

#[test]
fn chaos() {
    let seconds = std::env::var("HALITE_CHAOS_S").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("halite.toml"), CONFIG).unwrap();
    let mut server = Running::start(folder.path());
    let clients = Arc::new(Clients {
        address: Mutex::new(server.address),
        is_over: AtomicBool::new(false),
        texts: Mutex::default(),
        told: Mutex::default(),
        right: AtomicUsize::new(0),
        failed: AtomicUsize::new(0),
        cut: AtomicUsize::new(0),
        wrong: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let tasks: Vec<_> = (0..9)
        .map(|client| {
            let clients = clients.clone();
            runtime.spawn(async move {
                let mut random = SplitMix(client);
                while !clients.is_over.load(Relaxed) {
                    match client {
                        0..6 => clients.ask(random.below(PROMPTS), client % 2 == 0).await,
                        _ => clients.misbehave(&mut random).await,
                    }
                }
            })
        })
        .collect();
    // Killed now and then, and started again.
    let kills = 4.max(seconds / 60);
    let between = Duration::from_millis(seconds * 1000 / (kills + 1));
    let mut sizes = Vec::new();
    for _ in 0..kills {
        std::thread::sleep(between);
        sizes.push(server.sizes());
        drop(server);
        server = Running::start(folder.path());
        *clients.address.lock().unwrap() = server.address;
    }
    std::thread::sleep(between);
    clients.is_over.store(true, Relaxed);
    runtime.block_on(async {
        for task in tasks {
            task.await.unwrap();
        }
    });
    // What is left of clients that are gone ends soon.
    std::thread::sleep(Duration::from_secs(2));
    let (files, kb) = server.sizes();
    drop(server);

    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(!log.contains("panicked"), "{log}");
    let wrong = clients.wrong.lock().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let [right, failed, cut] =
        [&clients.right, &clients.failed, &clients.cut].map(|count| count.load(Relaxed));
    println!(
        "{right} right, {failed} refused, {cut} cut off by a kill; {files} files, {kb} kB at the end; before kills {sizes:?}"
    );
    assert!(right > 20, "{right} right, {failed} refused, {cut} cut off");
    assert!(files < 60, "{files} files are open");

    // Every receipt that was told is in the ledger, once, with the same content.
    let ledger = Ledger::open_read_only(&folder.path().join("ledger.db")).unwrap();
    ledger.verify(None).unwrap();
    let mut stored = BTreeMap::new();
    let mut from = 0;
    loop {
        let receipts = ledger.receipts(from, 1000).unwrap();
        let Some(last) = receipts.last() else { break };
        from = last.seq + 1;
        for receipt in receipts {
            let value = serde_json::to_value(&receipt.content).unwrap();
            assert!(stored.insert(receipt.content.request.clone(), value).is_none(), "{receipt:?} twice");
        }
    }
    let told = clients.told.lock().unwrap();
    let mut seen = BTreeSet::new();
    for receipt in told.iter() {
        let request = receipt["request"].as_str().unwrap();
        assert!(seen.insert(request.to_owned()), "{request} was told twice");
        assert_eq!(stored.get(request), Some(receipt));
    }
    assert!(!told.is_empty());
}

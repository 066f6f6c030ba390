//! Saved sequences: any bytes, and a whole one with some bytes changed, whose checksum is right again.
#![no_main]

use std::hash::Hasher;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};

use halite::Model;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::session::{OutputKind, Session, SessionOptions};

static STATE: LazyLock<Mutex<(Session, Vec<u8>)>> = LazyLock::new(|| {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds/llama.gguf");
    let model = Arc::new(Model::open(file).unwrap());
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_isa(1, "scalar").unwrap());
    let options = SessionOptions::default().context(200).batch(8);
    let mut session = Session::new(&model, &backend, &options).unwrap();
    let id = session.add_sequence();
    // Over a page's end.
    let tokens: Vec<u32> = (0..70).map(|i| i % model.hparams().vocab_size).collect();
    session.prefill(id, &tokens, OutputKind::Logits).unwrap();
    let mut bytes = Vec::new();
    session.save(id, &mut bytes).unwrap();
    session.remove(id).unwrap();
    Mutex::new((session, bytes))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (session, whole) = &mut *STATE.lock().unwrap();
    let mut try_it = |mut bytes: &[u8]| {
        let len = bytes.len();
        if let Ok(id) = session.restore(&mut bytes) {
            // What is taken is what would be written.
            let mut again = Vec::new();
            session.save(id, &mut again).unwrap();
            assert!(again.len() <= len);
            session.remove(id).unwrap();
        }
    };
    try_it(data);
    let mut bytes = whole.clone();
    for patch in data.as_chunks::<4>().0 {
        let at = usize::from(u16::from_le_bytes([patch[0], patch[1]])) % bytes.len();
        bytes[at] = patch[2];
        if patch[3] == 0 {
            bytes.truncate(at.max(8));
        }
    }
    let end = bytes.len() - 8;
    let mut hasher = twox_hash::xxhash3_64::Hasher::new();
    hasher.write(&bytes[..end]);
    bytes[end..].copy_from_slice(&hasher.finish().to_le_bytes());
    try_it(&bytes);
});

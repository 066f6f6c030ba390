//! Within a limit on memory, weights are streamed from their file and the KV cache is kept in one. The logits
//! are the same bits.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use halite::kernels::formats::Format;
use halite::prelude::*;
use halite::session::{OutputKind, Run, footprint};
use halite::synth::{Formats, Shape, Synth, shape};

/// Writes a model.
fn model(folder: &Path, shape: &Shape, format: Format) -> std::path::PathBuf {
    let path = folder.join(format!("{}.gguf", shape.name));
    let file = std::fs::File::create(&path).unwrap();
    let synth = Synth::new(shape, Formats::of(format), 1).unwrap();
    synth.write(&mut std::io::BufWriter::new(file)).unwrap();
    path
}

/// The memory of this process in use, in bytes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(1024 * line.split_whitespace().next()?.parse::<u64>().ok()?)
}

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bits of all logits of two sequences: a prompt in two steps, then single tokens.
fn logits(session: &mut Session) -> Vec<u32> {
    let (a, b) = (session.add_sequence(), session.add_sequence());
    let prompt: Vec<u32> = (0..150).map(|i| 3 + i * 7 % 400).collect();
    let mut bits = Vec::new();
    let mut step = |session: &mut Session, runs: &[Run<'_>]| {
        session.step(runs, OutputKind::Logits).unwrap();
        bits.extend(session.logits().iter().map(|x| x.to_bits()));
    };
    step(session, &[Run::new(a, &prompt[..20])]);
    step(session, &[Run::new(a, &prompt[20..45]), Run::new(b, &prompt[60..65])]);
    for i in 0..4 {
        step(session, &[Run::new(a, &prompt[i..=i]), Run::new(b, &prompt[i + 9..i + 10])]);
    }
    for part in prompt.chunks(30) {
        step(session, &[Run::new(b, part)]);
    }
    bits
}

/// Tests take turns: a limit is that of the whole process.
static TURN: Mutex<()> = Mutex::new(());

fn options() -> SessionOptions {
    SessionOptions::default().context(512).batch(32).outputs(2).sequences(2)
}

/// Compares a model in memory with the same one within limits, of parts of its weights.
fn same_within_limits(shape: &Shape, format: Format, parts: &[u64]) {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), shape, format);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let mapped = Arc::new(Model::open(&path).unwrap());
    let expected = logits(&mut Session::new(&mapped, &backend, &options()).unwrap());
    let needed = footprint(&mapped, &*backend, &options()).unwrap();
    let unmapped = Arc::new(Model::open_unmapped(&path).unwrap());
    for &part in parts {
        for model in [&mapped, &unmapped] {
            let Some(in_use) = resident_bytes() else { return };
            let weights = needed.weight_bytes / part;
            let limit = in_use + needed.working_bytes() + (7 << 20) + weights;
            let mut session = Session::new(model, &backend, &options().memory(limit)).unwrap();
            let streamed = session.weights().streamed_bytes;
            assert!(
                streamed > (needed.weight_bytes - weights) / 2,
                "1/{part}: {streamed} bytes are streamed"
            );
            assert!(
                session.weights().copied_bytes < weights + (4 << 20),
                "1/{part}: {:?}",
                session.weights()
            );
            assert!(logits(&mut session) == expected, "1/{part}: other bits");
        }
    }
}

fn tiny() -> Shape {
    shape("tiny").unwrap().clone().block_count(8)
}

#[test]
fn floats_have_the_same_bits() {
    let _turn = turn();
    same_within_limits(&tiny(), Format::F32, &[2, 8]);
}

#[test]
fn quantised_weights_have_the_same_bits() {
    let _turn = turn();
    same_within_limits(&tiny().block_count(24).feed_forward_length(1024), Format::Q8_0, &[2, 6]);
    same_within_limits(&tiny().block_count(40).feed_forward_length(1024), Format::Q4_K, &[4]);
}

#[test]
fn experts_have_the_same_bits() {
    let _turn = turn();
    let moe = shape("tiny-moe").unwrap().clone().block_count(6).expert_count(8).feed_forward_length(512);
    same_within_limits(&moe, Format::Q8_0, &[2, 6]);
}

/// A cache in a file has the same content, and the file has no name.
#[test]
fn a_spilled_cache_has_the_same_bits() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), &tiny(), Format::F32);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let model = Arc::new(Model::open_unmapped(&path).unwrap());
    let options = options().context(32 * 1024);
    let needed = footprint(&model, &*backend, &options).unwrap();
    let Some(in_use) = resident_bytes() else { return };
    let limit = in_use + needed.working_bytes() - needed.kv_bytes / 2 + (8 << 20);
    let refused = Session::new(&model, &backend, &options.clone().memory(limit)).unwrap_err().to_string();
    assert!(refused.contains("the KV cache"), "{refused}");
    let expected = logits(&mut Session::new(&model, &backend, &options).unwrap());
    let spill = folder.path().join("spill");
    std::fs::create_dir(&spill).unwrap();
    let mut session = Session::new(&model, &backend, &options.memory(limit).spill(spill.clone())).unwrap();
    assert!(logits(&mut session) == expected);
    assert_eq!(std::fs::read_dir(&spill).unwrap().count(), 0);
}

/// What cannot fit is an error that says what is needed.
#[test]
fn a_limit_that_is_too_low_is_an_error() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), &tiny(), Format::F32);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(1).unwrap());
    let model = Arc::new(Model::open_unmapped(&path).unwrap());
    let error = Session::new(&model, &backend, &options().memory(1 << 20)).unwrap_err().to_string();
    assert!(error.contains("out of memory") && error.contains("1048576"), "{error}");
}

/// A file that shrinks while it is streamed is an error.
#[test]
fn a_file_that_shrinks_is_an_error() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), &tiny(), Format::F32);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let model = Arc::new(Model::open_unmapped(&path).unwrap());
    let needed = footprint(&model, &*backend, &options()).unwrap();
    let Some(in_use) = resident_bytes() else { return };
    let limit = in_use + needed.working_bytes() + (7 << 20) + needed.weight_bytes / 4;
    let mut session = Session::new(&model, &backend, &options().memory(limit)).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run::new(sequence, &[1, 2, 3])], OutputKind::Logits).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    let error = session.step(&[Run::new(sequence, &[4])], OutputKind::Logits).unwrap_err();
    assert!(matches!(error, halite::Error::FileChanged { .. }), "{error}");
    // The stream is usable after a failed step: the next one fails alike, and does not hang.
    assert!(session.step(&[Run::new(sequence, &[4])], OutputKind::Logits).is_err());
}

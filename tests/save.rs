//! Sequences saved and restored, and what is refused.
#![cfg(feature = "save")]

use std::path::Path;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::session::{OutputKind, Run, SequenceId, Session, SessionOptions};
use halite::{Error, Model};

fn session(model: &Arc<Model>, backend: Arc<dyn Backend>, context: u32, kv_format: Format) -> Session {
    let program = ProgramOptions::default().kv_format(kv_format);
    let options = SessionOptions::default().context(context).batch(128).program(program);
    Session::new(model, &backend, &options).unwrap()
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(1).unwrap())
}

fn golden() -> Arc<Model> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/llama-Q4_0.gguf");
    Arc::new(Model::open(file).unwrap())
}

/// The smallest model, with weights that differ from zero.
fn tiny(name: &str) -> Arc<Model> {
    trained(name, 7)
}

/// The same with weights that depend on a seed.
fn trained(name: &str, seed: u64) -> Arc<Model> {
    let mut file = halite_testing::gguf::llama().set("general.name", name);
    let mut random = halite_testing::SplitMix(seed);
    for tensor in &mut file.tensors {
        for value in tensor.data.as_chunks_mut::<4>().0 {
            *value = (random.below(200) as f32 / 100.0 - 1.0).to_le_bytes();
        }
    }
    Arc::new(Model::from_source(Source::from_bytes("tiny", &file.bytes())).unwrap())
}

fn saved(session: &Session, id: SequenceId) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save(id, &mut bytes).unwrap();
    bytes
}

fn continued(session: &mut Session, sequence: SequenceId) -> Vec<u32> {
    session.step(&[Run::new(sequence, &[3, 5])], OutputKind::Logits).unwrap();
    session.logits().iter().map(|x| x.to_bits()).collect()
}

/// Logits after a restored sequence have the bits that they have after the sequence itself, on any backend that is exact.
#[test]
fn a_restored_sequence_goes_on() {
    let model = golden();
    for kv in [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0] {
        let mut old = session(&model, cpu(), 256, kv);
        let id = old.add_sequence();
        let tokens: Vec<u32> = (0..100).map(|i| i % 50).collect();
        old.prefill(id, &tokens, OutputKind::Logits).unwrap();
        let bytes = saved(&old, id);
        let want = continued(&mut old, id);
        for backend in [cpu(), Arc::new(Reference::new())] {
            let mut new = session(&model, backend, 128, kv);
            // Pages that another sequence holds are not the ones that are written to.
            let other = new.add_sequence();
            new.prefill(other, &[9], OutputKind::Logits).unwrap();
            // Two others follow each other in one stream.
            let stream = [&bytes[..], b"rest"].concat();
            let mut from = &stream[..];
            if kv == Format::F16 {
                let mut full = session(&model, cpu(), 64, kv);
                assert!(matches!(full.restore(&mut &bytes[..]), Err(Error::ContextFull { .. })));
            }
            new.remove(other).unwrap();
            let id = new.restore(&mut from).unwrap();
            assert_eq!(from, b"rest");
            assert_eq!(new.tokens(id).unwrap(), tokens);
            assert_eq!(continued(&mut new, id), want, "{kv:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let refused = |from: &[u8], session: &mut Session| match session.restore(&mut { from }) {
        Err(Error::Saved { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    let (a, b) = (tiny("a"), tiny("b"));
    let mut old = session(&a, cpu(), 64, Format::F16);
    let id = old.add_sequence();
    old.prefill(id, &[1, 2, 3], OutputKind::Logits).unwrap();
    let bytes = saved(&old, id);
    assert_eq!(refused(&bytes, &mut session(&b, cpu(), 64, Format::F16)), "model");
    // The same header, and other weights.
    assert_eq!(refused(&bytes, &mut session(&trained("a", 8), cpu(), 64, Format::F16)), "model");
    assert_eq!(refused(&bytes, &mut session(&a, cpu(), 64, Format::F32)), "cache layout");
    let mut new = session(&a, cpu(), 64, Format::F16);
    assert_eq!(refused(b"GGUF and so on, long enough", &mut new), "magic");
    let changed = |at: usize, to: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = to;
        bytes
    };
    assert_eq!(refused(&changed(8, 9), &mut new), "version");
    assert_eq!(refused(&changed(12, !bytes[12]), &mut new), "model");
    let layout_bytes = u32::from_le_bytes(bytes[20..24].try_into().unwrap()) as usize;
    assert_eq!(refused(&changed(24 + layout_bytes + 4, 200), &mut new), "token");
    let last = bytes.len() - 1;
    assert_eq!(refused(&changed(last, !bytes[last]), &mut new), "checksum");
    assert_eq!(refused(&bytes[..last], &mut new), "length");
    // Its one page is still free.
    assert!(new.restore(&mut &bytes[..]).is_ok());
}

/// Every beginning and every flipped bit of a file is refused, and leaves the session as it was.
#[test]
fn damage_is_refused() {
    let model = tiny("a");
    let mut session = session(&model, cpu(), 64, Format::F16);
    let id = session.add_sequence();
    session.prefill(id, &[1, 2, 3], OutputKind::Logits).unwrap();
    let bytes = saved(&session, id);
    assert!(bytes.len() < 4096, "{}", bytes.len());
    session.remove(id).unwrap();
    for len in 0..bytes.len() {
        assert!(session.restore(&mut &bytes[..len]).is_err(), "{len}");
    }
    for bit in 0..8 * bytes.len() {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(session.restore(&mut &bytes[..]).is_err(), "{bit}");
    }
    let id = session.restore(&mut &bytes[..]).unwrap();
    assert_eq!(saved(&session, id), bytes);
}

#[test]
fn an_empty_sequence() {
    let model = tiny("a");
    let mut session = session(&model, cpu(), 64, Format::F16);
    let id = session.add_sequence();
    let bytes = saved(&session, id);
    let id = session.restore(&mut &bytes[..]).unwrap();
    assert_eq!(session.len(id).unwrap(), 0);
}

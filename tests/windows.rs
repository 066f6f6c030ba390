//! Layers with a window keep only what it shows, and nobody can tell.

use std::sync::Arc;

use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::backend::{Backend, Bindings, Cancel, Limits, NO_PAGE, Span, Step, Usage};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::program::{Builder, Dim, Index, State, WeightInfo};
use halite::session::{OutputKind, OutputTokens, Run, SequenceId, Session, SessionOptions, footprint};
use halite::{Error, Model};

/// What the windowed layer of the model looks back.
const WINDOW: u32 = 16;
/// Bytes of a page of one layer: keys and values of four elements in half precision.
const PAGE_BYTES: u64 = 64 * 8 * 2;

fn model() -> Arc<Model> {
    Arc::new(
        Model::from_source(Source::from_bytes("windowed", &halite_testing::gguf::windowed().bytes()))
            .unwrap(),
    )
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(2).unwrap())
}

/// Room for long sequences, of which a window needs little.
fn options(sequences: u32, rewind: u32) -> SessionOptions {
    SessionOptions::default().context(1024).batch(40).outputs(40).sequences(sequences).rewind(rewind)
}

/// Options under which windows drop nothing.
fn whole() -> SessionOptions {
    options(1, u32::MAX)
}

fn session(options: &SessionOptions) -> Session {
    session_on(&cpu(), options)
}

fn session_on(backend: &Arc<dyn Backend>, options: &SessionOptions) -> Session {
    Session::new(&model(), backend, options).unwrap()
}

fn tokens(len: usize) -> Vec<u32> {
    let mut random = halite_testing::SplitMix(3);
    (0..len).map(|_| random.below(12) as u32).collect()
}

/// Logits of every token, fed in steps of these lengths by turns.
fn fed(session: &mut Session, sequence: SequenceId, mut tokens: &[u32], steps: &[usize]) -> Vec<u32> {
    let mut out = Vec::new();
    for &step in steps.iter().cycle() {
        let (now, rest) = tokens.split_at(step.min(tokens.len()));
        if now.is_empty() {
            return out;
        }
        session.step(&[Run::new(sequence, now).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
        out.extend(session.logits().iter().map(|x| x.to_bits()));
        tokens = rest;
    }
    out
}

/// Logits of tokens of which nothing is dropped.
fn whole_logits(tokens: &[u32]) -> Vec<u32> {
    let mut session = session(&whole());
    let sequence = session.add_sequence();
    fed(&mut session, sequence, tokens, &[40])
}

fn kv_bytes(options: &SessionOptions) -> u64 {
    footprint(&model(), &*cpu(), options).unwrap().kv_bytes
}

#[test]
fn dropping_changes_no_bit() {
    let tokens = tokens(700);
    let want = whole_logits(&tokens);
    for steps in [&[40][..], &[1], &[7, 1, 33, 2]] {
        for rewind in [0, 64] {
            let mut session = session(&options(1, rewind));
            let sequence = session.add_sequence();
            assert_eq!(fed(&mut session, sequence, &tokens, steps), want, "{steps:?}");
        }
    }
    let mut reference = session_on(&(Arc::new(Reference::new()) as Arc<dyn Backend>), &options(1, 0));
    let sequence = reference.add_sequence();
    assert_eq!(fed(&mut reference, sequence, &tokens[..300], &[40, 1]), want[..300 * 12]);
}

#[test]
fn memory_is_that_of_the_windows() {
    // The whole context of the other layer; one page of window, two that it may only begin and end in, one of a step.
    assert_eq!(kv_bytes(&options(1, 0)), (16 + 4) * PAGE_BYTES);
    assert_eq!(kv_bytes(&options(1, 64)), (16 + 5) * PAGE_BYTES);
    assert_eq!(kv_bytes(&options(3, 0)), (16 + 10) * PAGE_BYTES);
    assert_eq!(kv_bytes(&options(100, 0)), 2 * 16 * PAGE_BYTES);
    assert_eq!(kv_bytes(&whole()), 2 * 16 * PAGE_BYTES);
    let longer = options(1, 0).context(2048);
    assert_eq!(kv_bytes(&longer), (32 + 4) * PAGE_BYTES);
}

/// As many sequences as there are windows for go on beside each other, in whatever steps; one more may not.
#[test]
fn sequences_have_windows_of_their_own() {
    let tokens = tokens(300);
    let want = whole_logits(&tokens);
    let mut session = session(&options(3, 0));
    let all = [(); 3].map(|()| session.add_sequence());
    let mut random = halite_testing::SplitMix(5);
    let mut done = [0; 3];
    while done != [tokens.len(); 3] {
        let lens = [0, 1, 2].map(|i| random.below(14).min(tokens.len() - done[i]));
        let run = |i: usize| Run::new(all[i], &tokens[done[i]..done[i] + lens[i]]).outputs(OutputTokens::All);
        let runs: Vec<Run<'_>> = (0..3).filter(|&i| lens[i] > 0).map(run).collect();
        if runs.is_empty() {
            continue;
        }
        session.step(&runs, OutputKind::Logits).unwrap();
        let mut got = session.logits().chunks_exact(12);
        for i in 0..3 {
            for (token, got) in (done[i]..done[i] + lens[i]).zip(got.by_ref()) {
                let got: Vec<u32> = got.iter().map(|x| x.to_bits()).collect();
                assert_eq!(got, want[12 * token..12 * (token + 1)], "{token}");
            }
            done[i] += lens[i];
        }
    }
    // There are more pages for the other layer than for windows, which ten short sequences fill.
    all.iter().for_each(|&id| session.remove(id).unwrap());
    let short = [(); 10].map(|()| session.add_sequence());
    short.iter().for_each(|&id| _ = fed(&mut session, id, &tokens[..30], &[30]));
    let more = session.add_sequence();
    let error = session.prefill(more, &tokens[..30], OutputKind::ArgMax).err();
    assert!(matches!(error, Some(Error::WindowsFull { window: WINDOW, sequences: 3 })), "{error:?}");
    // Who ends gives back its own.
    session.remove(short[4]).unwrap();
    assert_eq!(fed(&mut session, more, &tokens[..30], &[30]), want[..12 * 30]);
}

#[test]
fn forks_share_windows() {
    let tokens = tokens(400);
    let want = whole_logits(&tokens);
    let mut session = session(&options(2, 0));
    let first = session.add_sequence();
    fed(&mut session, first, &tokens[..210], &[40]);
    for round in 0..3 {
        let fork = session.fork(first).unwrap();
        // The first one goes elsewhere, on the page that both have and on, then back.
        fed(&mut session, first, &[1; 30], &[30]);
        assert_eq!(fed(&mut session, fork, &tokens[210..], &[1, 9]), want[210 * 12..], "{round}");
        session.truncate(first, 210).unwrap();
        session.remove(fork).unwrap();
    }
    assert_eq!(fed(&mut session, first, &tokens[210..], &[40]), want[210 * 12..]);
}

#[test]
fn what_was_dropped_does_not_come_back() {
    let tokens = tokens(400);
    let want = whole_logits(&tokens);
    let mut session = session(&options(1, 32));
    let sequence = session.add_sequence();
    fed(&mut session, sequence, &tokens[..360], &[1]);
    // So far at any place, and not much further.
    session.truncate(sequence, 360 - 32).unwrap();
    assert_eq!(fed(&mut session, sequence, &tokens[328..360], &[1]), want[328 * 12..360 * 12]);
    let error = session.truncate(sequence, 200).unwrap_err();
    assert!(matches!(error, Error::Argument { what: "truncated length", .. }), "{error}");
    assert_eq!(session.tokens(sequence).unwrap(), &tokens[..360]);
    assert_eq!(fed(&mut session, sequence, &tokens[360..370], &[1]), want[360 * 12..370 * 12]);
    // A step is taken back however long it was.
    fed(&mut session, sequence, &[2; 40], &[40]);
    assert_eq!(session.reuse(sequence, &tokens[..380]).unwrap(), 370);
    assert_eq!(fed(&mut session, sequence, &tokens[370..], &[1]), want[370 * 12..]);
    // A text that is another from an early place on is computed again.
    assert_eq!(session.reuse(sequence, &tokens[..399]).unwrap(), 399);
    assert_eq!(session.reuse(sequence, &tokens[..100]).unwrap(), 0);
    assert_eq!(session.len(sequence).unwrap(), 0);
    assert_eq!(fed(&mut session, sequence, &tokens, &[40]), want);
    session.truncate(sequence, 0).unwrap();
    assert_eq!(fed(&mut session, sequence, &tokens, &[13]), want);
    // Where nothing is dropped, everything comes back.
    let mut session = self::session(&whole());
    let sequence = session.add_sequence();
    fed(&mut session, sequence, &tokens, &[40]);
    session.truncate(sequence, 5).unwrap();
    assert_eq!(fed(&mut session, sequence, &tokens[5..], &[40]), want[5 * 12..]);
}

/// Sequences that branch off each other at places that their windows have left run again on another backend, in memory for as
/// many positions as they had.
#[test]
fn branches_move() {
    let tokens = tokens(800);
    let options = options(4, 0).context(896);
    let mut old = session(&options);
    let first = old.add_sequence();
    fed(&mut old, first, &tokens[..640], &[40]);
    let second = old.fork(first).unwrap();
    fed(&mut old, second, &[3; 60], &[20]);
    let third = old.fork(second).unwrap();
    fed(&mut old, third, &[4; 5], &[1]);
    fed(&mut old, first, &tokens[640..700], &[20]);
    let all = [first, second, third];
    let mut new = old.moved_to(&cpu()).unwrap();
    for id in all {
        assert_eq!(new.tokens(id).unwrap(), old.tokens(id).unwrap());
        assert_eq!(fed(&mut new, id, &[5, 6], &[1]), fed(&mut old, id, &[5, 6], &[1]));
    }
}

/// A step that would read what was dropped does not run.
#[test]
fn holes_are_refused() {
    let mut b = Builder::new("holes", &|_| None);
    let (q, k, v) =
        (b.input("q", Dim::Tokens, 4), b.input("k", Dim::Tokens, 4), b.input("v", Dim::Tokens, 4));
    for window in [None, Some(70)] {
        let kv = b.state(State::new(format!("{window:?}"), 1, 4, 4, Format::F32).window(window));
        b.kv_write(k, v, kv);
        let y = b.attend(q, kv, 1, 1.0, None, None);
        b.output(y);
    }
    let program = Arc::new(b.finish().unwrap());
    for backend in [cpu(), Arc::new(Reference::new())] {
        let mut plan = backend.prepare(&program, Limits { tokens: 1, outputs: 1 }).unwrap();
        let state = |s: &State| backend.alloc(3 * s.page_bytes(), Usage::State).unwrap();
        let states: Vec<_> = program.states.iter().map(state).collect();
        let io: Vec<_> = program.io.iter().map(|_| backend.alloc(16, Usage::Io).unwrap()).collect();
        let bindings = Bindings { weights: &[], states: &states, io: &io };
        let cancel = Cancel::default();
        let mut run = |start, tables: [[u32; 3]; 2]| {
            let tables = tables.map(|table| table.to_vec());
            let spans = [Span { tables: &tables, start, len: 1 }];
            let step = Step { spans: &spans, tokens: &[0], outputs: &[], cancel: &cancel };
            plan.submit(&step, 0..1, &bindings).map(|_| ())
        };
        let refused = |result| matches!(result, Err(Error::Argument { what: "page table", .. }));
        // Position 133 is the first of which the window does not reach the first page.
        assert!(run(133, [[0, 1, 2], [NO_PAGE, 1, 2]]).is_ok());
        assert!(refused(run(132, [[0, 1, 2], [NO_PAGE, 1, 2]])));
        assert!(refused(run(133, [[0, 1, 2], [NO_PAGE, NO_PAGE, 2]])));
        assert!(refused(run(133, [[0, 1, 2], [NO_PAGE, 1, NO_PAGE]])));
        assert!(refused(run(133, [[NO_PAGE, 1, 2], [0, 1, 2]])));
        // Pages that no buffer has.
        assert!(refused(run(133, [[0, 1, 1000], [NO_PAGE, 1, 2]])));
        assert!(refused(run(133, [[0, 1, 2], [NO_PAGE, 1000, 2]])));
    }
}

#[test]
fn parts_are_counted_from_the_start_of_a_text() {
    let table = |_: &str| Some(WeightInfo::new(vec![4, 3], Format::F32));
    let mut b = Builder::new("parts", &table);
    let table = b.weight("table", 3, 4);
    let y = b.embed(table, Index::Part { separator: 1 }, 1.0);
    b.output(y);
    let program = Arc::new(b.finish().unwrap());
    for backend in [cpu(), Arc::new(Reference::new())] {
        let mut plan = backend.prepare(&program, Limits { tokens: 9, outputs: 1 }).unwrap();
        let rows: Vec<u8> = (0..12).flat_map(|i| ((i / 4) as f32).to_le_bytes()).collect();
        let weights = [backend.alloc(48, Usage::Weight).unwrap()];
        backend.fill(&weights[0], 0..48, &mut |bytes| bytes.copy_from_slice(&rows)).unwrap();
        let io = [backend.alloc(9 * 16, Usage::Io).unwrap()];
        let bindings = Bindings { weights: &weights, states: &[], io: &io };
        let cancel = Cancel::default();
        let mut run = |starts: [u32; 2]| {
            let spans = [(starts[0], 6), (starts[1], 3)].map(|(start, len)| Span { tables: &[], start, len });
            let step =
                Step { spans: &spans, tokens: &[2, 1, 0, 1, 1, 0, 1, 0, 0], outputs: &[], cancel: &cancel };
            plan.submit(&step, 0..1, &bindings).map(|_| ())
        };
        run([0, 0]).unwrap();
        let mut out = [0; 9 * 16];
        backend.read(&io[0], 0, &mut out).unwrap();
        let got: Vec<f32> =
            out.chunks_exact(16).map(|row| f32::from_le_bytes(row[..4].try_into().unwrap())).collect();
        assert_eq!(got, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 0.0, 1.0, 1.0]);
        for starts in [[1, 0], [0, 6], [0, 1]] {
            assert!(matches!(run(starts), Err(Error::Argument { .. })), "{starts:?}");
        }
    }
}

#[cfg(feature = "save")]
mod saved {
    use super::*;

    fn saved(session: &Session, id: SequenceId) -> Vec<u8> {
        let mut bytes = Vec::new();
        session.save(id, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_kept_is_saved() {
        let tokens = tokens(500);
        let want = whole_logits(&tokens);
        let (small, large) = (options(1, 0), options(1, 100));
        for (from, to) in
            [(&small, &small), (&large, &large), (&large, &small), (&small, &large), (&whole(), &small)]
        {
            let mut old = session(from);
            let id = old.add_sequence();
            fed(&mut old, id, &tokens[..450], &[40]);
            let bytes = saved(&old, id);
            let mut new = session(to);
            let id = new.restore(&mut &bytes[..]).unwrap();
            assert_eq!(fed(&mut new, id, &tokens[450..], &[1]), want[450 * 12..]);
            // Positions 435 on are seen.
            let pages = 8 + if from.rewind == 0 { 2 } else { (8 - (435 - from.rewind.min(435)) / 64).into() };
            let rest = bytes.len() as u64 - pages * PAGE_BYTES;
            assert!((4 * 450..4 * 450 + 200).contains(&rest), "{rest}");
            // As far back as both sessions go.
            let back = from.rewind.min(to.rewind);
            let mut new = session(to);
            let id = new.restore(&mut &bytes[..]).unwrap();
            new.truncate(id, 450 - back).unwrap();
            let start = 450 - back as usize;
            assert_eq!(fed(&mut new, id, &tokens[start..], &[1]), want[start * 12..]);
        }
    }

    /// A file that lacks what is seen is refused, and so is every other damage.
    #[test]
    fn damage_is_refused() {
        let tokens = tokens(100);
        let mut session = session(&options(1, 0));
        let id = session.add_sequence();
        fed(&mut session, id, &tokens, &[40]);
        let bytes = saved(&session, id);
        session.remove(id).unwrap();
        let layout = u32::from_le_bytes(bytes[20..24].try_into().unwrap()) as usize;
        let first = 24 + layout + 4 + 4 * tokens.len() + 4;
        assert_eq!(bytes[first..first + 4], 1u32.to_le_bytes());
        for number in [2u32, 3, u32::MAX] {
            let mut bytes = bytes.clone();
            bytes[first..first + 4].copy_from_slice(&number.to_le_bytes());
            let error = session.restore(&mut &bytes[..]).unwrap_err();
            assert!(matches!(error, Error::Saved { what: "first page", .. }), "{error}");
        }
        for bit in (0..8 * bytes.len()).step_by(13) {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(session.restore(&mut &bytes[..]).is_err(), "{bit}");
        }
        let id = session.restore(&mut &bytes[..]).unwrap();
        assert_eq!(saved(&session, id), bytes);
    }
}

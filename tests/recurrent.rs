//! Layers with a recurrent state keep few states, and nobody can tell.

use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::session::{OutputKind, OutputTokens, Run, SequenceId, Session, SessionOptions, footprint};
use halite::{Error, Model};
use halite_testing::faulty::{Fault, Faulty};
use halite_testing::golden;

const VOCAB: usize = 160;

/// A short convolution, and the delta rule beside attention, with decays of heads and of rows, and one
/// value a head.
fn models() -> [Arc<Model>; 5] {
    ["lfm2", "qwen35", "kimi-linear", "mamba", "granitehybrid"]
        .map(|name| Arc::new(Model::open(golden::committed().join(format!("families/{name}.gguf"))).unwrap()))
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(2).unwrap())
}

fn options(sequences: u32, rewind: u32) -> SessionOptions {
    let options = SessionOptions::default().context(256).cache_positions(1024).batch(200).outputs(200);
    options.sequences(sequences).rewind(rewind)
}

fn session(model: &Arc<Model>, options: &SessionOptions) -> Session {
    Session::new(model, &cpu(), options).unwrap()
}

fn tokens(len: usize) -> Vec<u32> {
    let mut random = halite_testing::SplitMix(7);
    (0..len).map(|_| random.below(VOCAB) as u32).collect()
}

fn bits(session: &Session) -> Vec<u32> {
    session.logits().iter().map(|x| x.to_bits()).collect()
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
        out.extend(bits(session));
        tokens = rest;
    }
    out
}

/// Logits of tokens in one step, or in few.
fn whole(model: &Arc<Model>, tokens: &[u32]) -> Vec<u32> {
    let mut session = session(model, &options(1, 64));
    let sequence = session.add_sequence();
    fed(&mut session, sequence, tokens, &[tokens.len().min(200)])
}

#[test]
fn how_a_text_is_cut_never_shows() {
    let tokens = tokens(200);
    for model in models() {
        let want = whole(&model, &tokens);
        for steps in [&[1][..], &[2], &[63], &[64], &[65], &[128], &[199], &[3, 150, 1]] {
            for rewind in [0, 64] {
                let mut session = session(&model, &options(1, rewind));
                let sequence = session.add_sequence();
                assert!(fed(&mut session, sequence, &tokens, steps) == want, "{steps:?}, rewind {rewind}");
            }
        }
        let mut reference =
            Session::new(&model, &(Arc::new(Reference::new()) as Arc<dyn Backend>), &options(1, 0)).unwrap();
        let sequence = reference.add_sequence();
        assert!(fed(&mut reference, sequence, &tokens[..140], &[40, 1]) == want[..140 * VOCAB]);
    }
}

/// A sequence has a few states, however long it is and however long its steps are.
#[test]
fn memory_does_not_grow_with_the_context() {
    for model in models() {
        let kv_bytes = |options: SessionOptions| footprint(&model, &*cpu(), &options).unwrap().kv_bytes;
        let states =
            |options: SessionOptions| kv_bytes(options.clone().rewind(64)) - kv_bytes(options.rewind(0));
        // A state more.
        let one = states(options(1, 0).context(256));
        assert!(one > 0);
        assert_eq!(states(options(1, 0).context(1024).cache_positions(4096).batch(512)), one);
        assert_eq!(states(options(4, 0).cache_positions(4096)), 4 * one);
    }
}

#[test]
fn sequences_have_states_of_their_own() {
    let whole_text = tokens(200);
    let tokens = &whole_text[..130];
    for model in models() {
        let want = whole(&model, &whole_text);
        let mut session = session(&model, &options(3, 0));
        let all = [(); 3].map(|()| session.add_sequence());
        let mut random = halite_testing::SplitMix(5);
        let mut done = [0; 3];
        while done != [tokens.len(); 3] {
            let lens = [0, 1, 2].map(|i| random.below(30).min(tokens.len() - done[i]));
            let run =
                |i: usize| Run::new(all[i], &tokens[done[i]..done[i] + lens[i]]).outputs(OutputTokens::All);
            let runs: Vec<Run<'_>> = (0..3).filter(|&i| lens[i] > 0).map(run).collect();
            if runs.is_empty() {
                continue;
            }
            session.step(&runs, OutputKind::Logits).unwrap();
            let mut got = session.logits().chunks_exact(VOCAB);
            for i in 0..3 {
                for (token, got) in (done[i]..done[i] + lens[i]).zip(got.by_ref()) {
                    let got: Vec<u32> = got.iter().map(|x| x.to_bits()).collect();
                    assert!(got == want[VOCAB * token..VOCAB * (token + 1)], "token {token}");
                }
                done[i] += lens[i];
            }
        }
        let mut error = None;
        for _ in 0..12 {
            let more = session.add_sequence();
            error = error.or(session.prefill(more, &tokens[..30], OutputKind::ArgMax).err());
        }
        assert!(matches!(error, Some(Error::StatesFull { sequences: 3 })), "{error:?}");
        // Nor do those suffer that were there before.
        let rest = fed(&mut session, all[0], &whole_text[130..140], &[1]);
        assert!(rest == want[VOCAB * 130..VOCAB * 140]);
    }
}

#[test]
fn forks_go_their_own_ways() {
    let tokens = tokens(160);
    for model in models() {
        for at in [10, 64, 100, 128] {
            let want = whole(&model, &tokens);
            let mut session = session(&model, &options(2, 64));
            let first = session.add_sequence();
            fed(&mut session, first, &tokens[..at], &[at]);
            let second = session.fork(first).unwrap();
            // The first one goes on with other tokens.
            fed(&mut session, first, &[1, 2, 3, 4, 5, 6, 7], &[2]);
            assert!(fed(&mut session, second, &tokens[at..], &[9]) == want[VOCAB * at..], "{at}");
        }
    }
}

/// Any length can be gone back to, also one whose state is not kept, and also several times.
#[test]
fn what_was_undone_is_computed_again() {
    let tokens = tokens(200);
    for model in models() {
        let want = whole(&model, &tokens);
        for rewind in [0, 64] {
            let mut session = session(&model, &options(2, rewind));
            let sequence = session.add_sequence();
            fed(&mut session, sequence, &tokens[..150], &[70, 1]);
            fed(&mut session, sequence, &[1, 2, 3], &[3]);
            for to in [150, 149, 128, 127, 65, 64, 63, 1, 0] {
                let mut other = session.fork(sequence).unwrap();
                session.truncate(other, to).unwrap();
                assert_eq!(session.len(other).unwrap(), to);
                // What is not computed yet can be copied, and shortened again.
                if to == 127 {
                    let copy = session.fork(other).unwrap();
                    session.remove(other).unwrap();
                    other = copy;
                    session.truncate(other, to - 1).unwrap();
                    fed(&mut session, other, &tokens[126..127], &[1]);
                }
                let to = to as usize;
                assert!(fed(&mut session, other, &tokens[to..], &[40]) == want[VOCAB * to..], "{to}");
                session.remove(other).unwrap();
            }
            // A common prefix is reused as far as a state is kept.
            let mut changed = tokens.clone();
            changed[140] = (changed[140] + 1) % VOCAB as u32;
            let kept = session.reuse(sequence, &changed).unwrap();
            assert_eq!(kept, if rewind > 0 { 128 } else { 0 });
            assert!(fed(&mut session, sequence, &tokens[kept..], &[40]) == want[VOCAB * kept..]);
        }
    }
}

/// Steps like those that verify a draft, of which any number of tokens is wrong.
#[test]
fn drafts_are_taken_back() {
    let tokens = tokens(200);
    for model in models() {
        let want = whole(&model, &tokens);
        let mut session = session(&model, &options(1, 0));
        let sequence = session.add_sequence();
        let mut random = halite_testing::SplitMix(11);
        fed(&mut session, sequence, &tokens[..50], &[50]);
        let mut done = 50;
        while done < 190 {
            let (right, wrong) = (random.below(4), random.below(5));
            let mut draft = tokens[done..done + right].to_vec();
            draft.extend([(tokens[done + right] + 1) % VOCAB as u32].repeat(wrong + 1));
            session
                .step(&[Run::new(sequence, &draft).outputs(OutputTokens::All)], OutputKind::Logits)
                .unwrap();
            assert!(bits(&session)[..VOCAB * right] == want[VOCAB * done..VOCAB * (done + right)], "{done}");
            done += right;
            session.truncate(sequence, done as u32).unwrap();
            assert_eq!(session.tokens(sequence).unwrap(), &tokens[..done]);
        }
        assert!(fed(&mut session, sequence, &tokens[done..], &[1]) == want[VOCAB * done..]);
    }
}

#[test]
fn a_saved_state_goes_on() {
    let tokens = tokens(180);
    for model in models() {
        let want = whole(&model, &tokens);
        for (len, truncated) in [(50, 50), (64, 64), (130, 130), (150, 137)] {
            let mut session = session(&model, &options(2, 64));
            let sequence = session.add_sequence();
            fed(&mut session, sequence, &tokens[..len], &[len]);
            session.truncate(sequence, truncated as u32).unwrap();
            let mut saved = Vec::new();
            session.save(sequence, &mut saved).unwrap();
            let restored = session.restore(&mut &saved[..]).unwrap();
            assert_eq!(session.tokens(restored).unwrap(), &tokens[..truncated]);
            assert!(
                fed(&mut session, restored, &tokens[truncated..], &[7]) == want[VOCAB * truncated..],
                "{len}"
            );
            let cut = &saved[..saved.len() - 9];
            assert!(matches!(session.restore(&mut &cut[..]), Err(Error::Saved { .. })));
        }
    }
}

/// A step that fails may have changed a state already; the sequence is as before it.
#[test]
fn a_failed_step_leaves_no_trace() {
    let tokens = tokens(230);
    for model in models() {
        let want = whole(&model, &tokens);
        let faults = [(70, Fault::Fail), (70, Fault::Poison), (64, Fault::Poison), (30, Fault::Poison)];
        // Also steps over pages that are not kept.
        for ((at, fault), more) in faults.into_iter().flat_map(|fault| [(fault, 20), (fault, 230 - fault.0)])
        {
            let faulty = Arc::new(Faulty::with_threads(1));
            let backend = faulty.clone() as Arc<dyn Backend>;
            let mut session = Session::new(&model, &backend, &options(1, 0)).unwrap();
            let sequence = session.add_sequence();
            fed(&mut session, sequence, &tokens[..at], &[at]);
            faulty.after(0, fault);
            let run = [Run::new(sequence, &tokens[at..at + more])];
            assert!(session.step(&run, OutputKind::Logits).is_err());
            assert_eq!(session.tokens(sequence).unwrap(), &tokens[..at]);
            let mut rest = fed(&mut session, sequence, &tokens[at..at + 3], &[1]);
            session.truncate(sequence, at as u32 + 3).unwrap();
            rest.extend(fed(&mut session, sequence, &tokens[at + 3..], &[1, 20]));
            assert!(rest == want[VOCAB * at..], "{at} {fault:?} {more}");
        }
    }
}

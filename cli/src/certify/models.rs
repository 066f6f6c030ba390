//! Whole models on a backend and on the CPU.

use std::sync::Arc;

use halite::backend::cpu::Cpu;
use halite::backend::{Backend, Contract};
use halite::kernels::formats::{Format, Kind};
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions, footprint};
use halite::{Error, Model};

use super::data::{MemoryRow, ModelRow};
use crate::Failure;

/// Tokens of the prompt, which takes more than a page of the cache.
const PROMPT: u32 = 70;
/// Generated tokens.
const GENERATE: usize = 24;
/// Bounds of the logits' normalised mean squared error on a backend that is not exact: with quantised weights, rounded
/// codes of activations move, as docs/numeric-contract.md explains.
const QUANTISED_BOUND: f64 = 2e-2;
const PLAIN_BOUND: f64 = 1e-6;
const NATIVE_BOUND: f64 = 0.3;

/// Runs a model on a backend and on the CPU.
pub fn check(model: &Arc<Model>, backend: &Arc<dyn Backend>) -> ModelRow {
    let mut row = ModelRow {
        name: model.name(),
        outcome: "pass".into(),
        reason: None,
        tokens: None,
        same_tokens: None,
        nmse: None,
        bound: None,
    };
    match compare(model, backend, &mut row) {
        Ok(None) => {}
        Ok(Some(why)) => (row.outcome, row.reason) = ("fail".into(), Some(why)),
        Err(e) => {
            let gap = e.downcast_ref().is_some_and(|e| matches!(e, Error::Unsupported { .. }));
            row.outcome = if gap { "gap" } else { "fail" }.into();
            row.reason = Some(e.to_string());
        }
    }
    row
}

/// Returns why the backend's results are wrong, if they are.
fn compare(
    model: &Arc<Model>,
    backend: &Arc<dyn Backend>,
    row: &mut ModelRow,
) -> Result<Option<String>, Failure> {
    let vocab = model.hparams().vocab_size;
    let prompt: Vec<u32> = (0..PROMPT).map(|n| n.wrapping_mul(2_654_435_761) % vocab).collect();
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::new()?);
    let (tokens, want) = greedy(model, &cpu, &prompt)?;
    let (found, _) = greedy(model, backend, &prompt)?;
    // The same tokens on both, so that one different token does not change all that follow.
    let got = forced(model, backend, &prompt, &tokens)?;
    let same = tokens.iter().zip(&found).take_while(|(a, b)| a == b).count();
    let (mut error, mut power) = (0.0, 0.0);
    let mut bits = true;
    for (&w, &g) in want.iter().zip(&got) {
        bits &= w.to_bits() == g.to_bits();
        error += (f64::from(w) - f64::from(g)).powi(2);
        power += f64::from(w).powi(2);
    }
    let nmse = error / power;
    let program = model.program(Default::default(), 256)?;
    let quantised = program.weights.iter().any(|&id| is_quantised(program.tensor(id).format));
    let bound = match backend.caps().contract {
        Contract::Exact => None,
        Contract::Native => Some(NATIVE_BOUND),
        _ => Some(if quantised { QUANTISED_BOUND } else { PLAIN_BOUND }),
    };
    row.tokens = Some((prompt.len(), tokens.len()));
    row.same_tokens = Some(same);
    row.nmse = nmse.is_finite().then_some(nmse);
    row.bound = bound;
    Ok(match bound {
        None if !bits => {
            Some(format!("logits: expected the bits of the reference, got an error of {nmse:.1e}"))
        }
        Some(bound) if nmse.is_nan() || nmse > bound => {
            Some(format!("logits: expected an error of at most {bound:.0e}, got {nmse:.1e}"))
        }
        _ => None,
    })
}

fn is_quantised(format: Format) -> bool {
    matches!(format.kind(), Kind::Quantised { .. })
}

fn session(model: &Arc<Model>, backend: &Arc<dyn Backend>) -> Result<Session, Failure> {
    let options = SessionOptions::default().context(PROMPT + GENERATE as u32 + 1).batch(48).outputs(48);
    Ok(Session::new(model, backend, &options)?)
}

/// Generates the most likely tokens; returns them with the logits of all tokens that ran.
fn greedy(
    model: &Arc<Model>,
    backend: &Arc<dyn Backend>,
    prompt: &[u32],
) -> Result<(Vec<u32>, Vec<f32>), Failure> {
    let mut session = session(model, backend)?;
    let sequence = session.add_sequence();
    let vocab = model.hparams().vocab_size as usize;
    let (mut logits, mut tokens) = (Vec::new(), Vec::new());
    for part in prompt.chunks(48) {
        session.step(&[Run::new(sequence, part).outputs(OutputTokens::All)], OutputKind::Logits)?;
        logits.extend(session.logits());
    }
    while tokens.len() < GENERATE {
        let last = &logits[logits.len() - vocab..];
        let best = last
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |best, (i, &x)| if x > best.1 { (i, x) } else { best });
        tokens.push(best.0 as u32);
        session.step(&[Run::new(sequence, &[best.0 as u32])], OutputKind::Logits)?;
        logits.extend(session.logits());
    }
    Ok((tokens, logits))
}

/// Runs given tokens in the same steps, and returns the logits of all.
fn forced(
    model: &Arc<Model>,
    backend: &Arc<dyn Backend>,
    prompt: &[u32],
    tokens: &[u32],
) -> Result<Vec<f32>, Failure> {
    let mut session = session(model, backend)?;
    let sequence = session.add_sequence();
    let mut logits = Vec::new();
    for part in prompt.chunks(48).chain(tokens.chunks(1)) {
        session.step(&[Run::new(sequence, part).outputs(OutputTokens::All)], OutputKind::Logits)?;
        logits.extend(session.logits());
    }
    Ok(logits)
}

/// Compares the memory that a backend reports with the growth of this process.
pub fn memory(model: &Arc<Model>, backend: &Arc<dyn Backend>) -> MemoryRow {
    let options = SessionOptions::default().context(1024).batch(512);
    let run = || -> Result<MemoryRow, Failure> {
        let reported = footprint(model, &**backend, &options)?.scratch_bytes;
        let before = resident_bytes();
        let mut session = Session::new(model, backend, &options)?;
        let sequence = session.add_sequence();
        session.prefill(sequence, &vec![1; 512], OutputKind::ArgMax)?;
        let grown = before.zip(resident_bytes()).map(|(before, after)| after.saturating_sub(before));
        Ok(MemoryRow { reported_bytes: Some(reported), grown_bytes: grown })
    };
    run().unwrap_or_default()
}

/// Returns the resident bytes of this process, where the system says them.
fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find(|line| line.starts_with("Anonymous:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

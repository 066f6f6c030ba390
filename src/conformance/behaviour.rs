//! What single cases do not show: the same bits in every run, no influence of what ran before or beside, cancellation,
//! memory limits, and errors where they belong.

use std::hint::black_box;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::recording::{Opened, Output, Recording, SpanData, StepData};
use super::{Case, Failure};
use crate::backend::reference::Reference;
use crate::backend::{Backend, Buffer, Cancel, Contract, Timing, Usage, upload};
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::memory::resident_bytes;
use crate::program::{Builder, Dim, Index, Op, PAGE_POSITIONS};
use halite_kernels::formats::Format;
use halite_kernels::rows::Unary;

/// What was checked, and what was found.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Finding {
    /// The behaviour, such as `same bits run to run`.
    pub behaviour: &'static str,
    /// What it was checked with: a case, or a call.
    pub with: String,
    /// Whether the backend behaves so.
    pub verdict: Verdict,
    /// Numbers or the error, for people. May be empty.
    pub detail: String,
}

/// Whether a backend behaves as checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// It does.
    Held,
    /// It does not, and its contract allows that.
    Allowed,
    /// It does not.
    Broken,
}

impl Verdict {
    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Held => "held",
            Verdict::Allowed => "allowed",
            Verdict::Broken => "broken",
        }
    }
}

type Ran = std::result::Result<Vec<Output>, Failure>;

/// Checks how a backend behaves with these cases, each of which it should pass. Each is run `repetitions` times where
/// that may show something. Calls `done` with each finding.
pub fn check_all(backend: &dyn Backend, cases: &[Case], repetitions: usize, done: &mut dyn FnMut(Finding)) {
    memory(backend, done);
    plans(backend, done);
    let recorded = cases.iter().filter(|case| case.gap(backend).is_none());
    let recorded = recorded.filter_map(|case| Some((&case.name[..], case.record(0).ok()?)));
    let recorded: Vec<(&str, Recording)> = recorded.collect();
    for (n, (name, recording)) in recorded.iter().enumerate() {
        let Ok(want) = recording.run(backend) else { continue };
        let mut add = |behaviour, verdict, detail: String| {
            done(Finding { behaviour, with: (*name).into(), verdict, detail });
        };
        let (verdict, detail) = same(run_to_run(backend, recording, &want, repetitions));
        add("same bits run to run", verdict, detail);
        let (verdict, detail) = same(after_nan(backend, recording, &want));
        add("no stale memory", verdict, detail);
        let (_, other) = &recorded[(n + 1) % recorded.len()];
        let (verdict, detail) = same(beside(backend, recording, other, &want));
        add("same bits between steps of another plan", verdict, detail);
        let (verdict, detail) = same(on_threads(backend, recording, &want));
        add("same bits on two threads", verdict, detail);
        if let Some(single) = one_by_one(recording) {
            let (verdict, detail) = match rows_of(&single, backend, &want) {
                Err(detail) if backend.caps().contract == Contract::Exact => (Verdict::Broken, detail),
                Err(detail) => (Verdict::Allowed, detail),
                Ok(()) => (Verdict::Held, String::new()),
            };
            add("same bits alone and in a batch", verdict, detail);
        }
        if recording.program.states.iter().any(|state| state.format == Format::F32) {
            let (verdict, detail) = same(pages(backend, recording));
            add("pages have the layout that others read", verdict, detail);
        }
        let (verdict, detail) = same(cancelled(backend, recording, &want));
        add("a cancelled step runs nothing", verdict, detail);
        let (verdict, detail) = same(refused(backend, recording, &want));
        add("impossible calls are errors", verdict, detail);
    }
    latency(backend, &recorded, done);
}

fn same(result: std::result::Result<(), String>) -> (Verdict, String) {
    match result {
        Ok(()) => (Verdict::Held, String::new()),
        Err(detail) => (Verdict::Broken, detail),
    }
}

/// Whether outputs have the same bits.
fn equal(got: Ran, want: &[Output], when: &str) -> std::result::Result<(), String> {
    let got = got.map_err(|why| format!("{when}: {why}"))?;
    let (comparison, equal) = super::compare::compare(&got, want, Contract::Exact, 0.0);
    if equal { Ok(()) } else { Err(format!("{when}: {comparison}")) }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn run_to_run(
    backend: &dyn Backend,
    recording: &Recording,
    want: &[Output],
    repetitions: usize,
) -> std::result::Result<(), String> {
    let mut opened = recording.open(backend).map_err(text)?;
    for n in 0..repetitions {
        opened.restore().map_err(text)?;
        equal(opened.run(), want, &format!("run {}", n + 2))?;
    }
    Ok(())
}

/// Steps with NaN leave NaN in everything that a plan keeps.
fn after_nan(
    backend: &dyn Backend,
    recording: &Recording,
    want: &[Output],
) -> std::result::Result<(), String> {
    let mut opened = recording.open(backend).map_err(text)?;
    for (n, step) in recording.steps.iter().enumerate() {
        let nan =
            |input: &Option<Vec<u32>>| input.as_ref().map(|words| vec![f32::NAN.to_bits(); words.len()]);
        let inputs: Vec<_> = step.inputs.iter().map(nan).collect();
        opened.step(n, &inputs, &Cancel::default()).map_err(text)?;
    }
    opened.restore().map_err(text)?;
    equal(opened.run(), want, "after steps with NaN")
}

/// Steps of two plans in turns.
fn beside(
    backend: &dyn Backend,
    recording: &Recording,
    other: &Recording,
    want: &[Output],
) -> std::result::Result<(), String> {
    let mut opened = recording.open(backend).map_err(text)?;
    let mut second = other.open(backend).map_err(text)?;
    let mut got = Vec::new();
    for (n, step) in recording.steps.iter().enumerate() {
        opened.step(n, &step.inputs, &Cancel::default()).map_err(text)?;
        let m = n % other.steps.len().max(1);
        if let Some(step) = other.steps.get(m) {
            second.step(m, &step.inputs, &Cancel::default()).map_err(text)?;
        }
        opened.read(n, &mut got).map_err(text)?;
    }
    equal(Ok(got), want, "between steps of another plan")
}

/// Two plans at the same time, on threads of their own.
fn on_threads(
    backend: &dyn Backend,
    recording: &Recording,
    want: &[Output],
) -> std::result::Result<(), String> {
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let results = &results;
            scope.spawn(move || {
                let result = equal(recording.run(backend), want, &format!("thread {thread}"));
                if let Ok(mut results) = results.lock() {
                    results.push(result);
                }
            });
        }
    });
    let results = results.into_inner().map_err(|_| "a thread failed".to_owned())?;
    if results.len() < 2 {
        return Err("a thread failed".into());
    }
    results.into_iter().collect()
}

/// The same tokens, one in each step; `None` for a recording that cannot be cut so.
fn one_by_one(recording: &Recording) -> Option<Recording> {
    let program = &recording.program;
    let [step] = recording.steps.as_slice() else { return None };
    let [span] = step.spans.as_slice() else { return None };
    let by_token = program.io.iter().all(|&id| program.tensor(id).rows == Dim::Tokens);
    if !by_token || span.len < 2 || program.states.iter().any(|s| !s.is_causal()) {
        return None;
    }
    let steps = (0..span.len).map(|n| {
        let inputs = step.inputs.iter().map(|input| {
            let words = input.as_ref()?;
            let cols = words.len() / span.len as usize;
            Some(words.chunks_exact(cols).nth(n as usize)?.to_vec())
        });
        StepData::new(
            vec![SpanData::new(span.start + n, 1, span.tables.clone())],
            vec![step.tokens[n as usize]],
            vec![0],
            inputs.collect(),
        )
    });
    let mut single = recording.clone();
    single.steps = steps.collect();
    Some(single)
}

/// Whether steps of single tokens give the rows of one step.
fn rows_of(single: &Recording, backend: &dyn Backend, want: &[Output]) -> std::result::Result<(), String> {
    let got = single.run(backend).map_err(text)?;
    let mut rows = Vec::new();
    for n in 0..single.steps.len() {
        for output in want {
            let row = output.words.chunks_exact(output.cols.max(1)).nth(n).unwrap_or(&[]);
            rows.push(Output { step: n, words: row.to_vec(), ..output.clone() });
        }
    }
    equal(Ok(got), &rows, "one token a step")
}

/// Pages are saved, and read by other backends. In F32 their bytes are known.
fn pages(backend: &dyn Backend, recording: &Recording) -> std::result::Result<(), String> {
    let after = |backend: &dyn Backend| -> std::result::Result<Vec<Vec<u8>>, String> {
        let mut opened = recording.open(backend).map_err(text)?;
        opened.run().map_err(text)?;
        opened.states().map_err(text)
    };
    let (got, want) = (after(backend)?, after(&Reference::new())?);
    for (state, (got, want)) in recording.program.states.iter().zip(got.iter().zip(&want)) {
        // Rotated keys may differ in their last bits.
        let close = |a: [u8; 4], b: [u8; 4]| {
            let (x, y) = (f32::from_le_bytes(a), f32::from_le_bytes(b));
            a == b || (x - y).abs() <= 1e-4 * y.abs().max(1.0)
        };
        let mut pairs = got.as_chunks::<4>().0.iter().zip(want.as_chunks::<4>().0);
        if state.format == Format::F32
            && let Some(at) = pairs.position(|(&a, &b)| !close(a, b))
        {
            return Err(format!("`{}`: element {at} of its pages differs", state.name));
        }
    }
    Ok(())
}

fn cancelled(
    backend: &dyn Backend,
    recording: &Recording,
    want: &[Output],
) -> std::result::Result<(), String> {
    let mut opened = recording.open(backend).map_err(text)?;
    let cancel = Cancel::default();
    cancel.cancel();
    if let Some(step) = recording.steps.first() {
        match opened.step(0, &step.inputs, &cancel) {
            Err(Error::Cancelled) => {}
            Err(e) => return Err(format!("expected the error `cancelled`, got: {e}")),
            Ok(()) => return Err("expected the error `cancelled`, got a step that ran".into()),
        }
    }
    opened.restore().map_err(text)?;
    equal(opened.run(), want, "after a cancelled step")
}

/// Calls that no backend can carry out, after which the plan still runs.
fn refused(backend: &dyn Backend, recording: &Recording, want: &[Output]) -> std::result::Result<(), String> {
    let mut opened = recording.open(backend).map_err(text)?;
    for (what, result) in opened.impossible() {
        if result.is_ok() {
            return Err(format!("{what} was accepted"));
        }
    }
    equal(opened.run(), want, "after impossible calls")
}

impl Opened<'_> {
    /// Makes calls that must fail.
    fn impossible(&mut self) -> Vec<(&'static str, Result<()>)> {
        let Some(step) = self.recording.steps.first().cloned() else { return Vec::new() };
        let mut results = Vec::new();
        let segments = self.program.segments.len();
        let mut try_step = |opened: &mut Self, what, step: &StepData, range, slots| {
            results.push((what, opened.submit_unchecked(step, range, slots)));
        };
        let all = 0..segments;
        let mut many = step.clone();
        many.tokens = vec![0; self.recording.limits().tokens as usize + 1];
        try_step(self, "a step of too many tokens", &many, all.clone(), true);
        let mut none = step.clone();
        (none.tokens, none.spans, none.outputs) = (Vec::new(), Vec::new(), Vec::new());
        try_step(self, "a step without tokens", &none, all.clone(), true);
        let mut beyond = step.clone();
        beyond.outputs = vec![step.tokens.len() as u32];
        try_step(self, "an output of a token that is not there", &beyond, all.clone(), true);
        let mut short = step.clone();
        short.spans.truncate(1);
        if let Some(span) = short.spans.first_mut() {
            span.len += PAGE_POSITIONS;
        }
        try_step(self, "spans of more tokens than the step has", &short, all.clone(), true);
        let table = self.program.ops().find_map(|(_, op)| match op {
            Op::Embed { table, index: Index::Token, .. } => Some(self.program.tensor(*table).rows),
            _ => None,
        });
        if let Some(Dim::Fixed(rows)) = table {
            let mut unknown = step.clone();
            unknown.tokens[0] = rows;
            try_step(self, "a token that the table does not have", &unknown, all.clone(), true);
        }
        try_step(self, "segments that are not there", &step, segments..segments + 1, true);
        try_step(self, "buffers of another backend", &step, all, false);
        results.push(("a ticket that was never given", self.wait_for(u64::MAX)));
        results
    }
}

/// Bytes of a large buffer, which are no whole number of anything.
const LARGE_BYTES: usize = (9 << 20) + 5;
/// Buffers that are made one after the other, and the bytes of each.
const TURNS: u64 = 24;
const MOST_AT_A_TIME: u64 = 16 << 20;
/// How often, and how long each time, a check waits until memory is free.
const WAITS: u32 = 100;
const WAIT: Duration = Duration::from_millis(50);
/// The largest memory of a device of which half is allocated.
const MOST_COUNTED: u64 = 4 << 30;

/// A recording of `y = 2 x + x` for one token, in two segments. The first one doubles.
fn doubled() -> Option<Recording> {
    let no_weights = |_: &str| None;
    let mut b = Builder::new("2 x + x", &no_weights);
    b.segment("double");
    let x = b.input("x", Dim::Tokens, COLS as u32);
    let twice = b.unary("twice", x, Unary::Scale(2.0));
    b.segment("add");
    let y = b.add("y", twice, x);
    b.output(y);
    let program = Arc::new(b.finish().ok()?);
    let tables = vec![vec![0]; program.windows.len()];
    let step = StepData::new(vec![SpanData::new(0, 1, tables)], vec![0], vec![0], Vec::new());
    Some(Recording::new(program, Vec::new(), Vec::new(), vec![step], 0.0))
}

/// Elements of a row of [`doubled`].
const COLS: usize = 48;

/// Sets the input of [`doubled`], and runs some of its segments.
fn run_doubled(opened: &mut Opened<'_>, x: f32, segments: Range<usize>) -> Result<Timing> {
    upload(opened.backend, &opened.io[0], 0, bytemuck::cast_slice(&[x; COLS]))?;
    opened.run_segments(0, segments)
}

/// Checks every element of an output of [`doubled`], which is the last buffer.
fn expect(backend: &dyn Backend, io: &[Buffer], want: f32) -> std::result::Result<(), String> {
    let mut got = [0f32; COLS];
    let y = io.last().ok_or("the program has no output")?;
    backend.read(y, 0, bytemuck::cast_slice_mut(&mut got)).map_err(text)?;
    match got.iter().find(|&&got| got != want) {
        Some(got) => Err(format!("expected {want}, got {got}")),
        None => Ok(()),
    }
}

/// Plans and their segments, apart from what ops compute.
fn plans(backend: &dyn Backend, done: &mut dyn FnMut(Finding)) {
    let Some(recording) = doubled().filter(|it| super::gap(backend, &it.program).is_none()) else { return };
    let mut add = |behaviour, result: std::result::Result<(), String>| {
        let (verdict, detail) = same(result);
        done(Finding { behaviour, with: recording.program.name.clone(), verdict, detail });
    };
    let open = || recording.open(backend).map_err(text);
    let in_parts = || -> std::result::Result<(), String> {
        let mut plan = open()?;
        run_doubled(&mut plan, 3.0, 0..1).map_err(text)?;
        run_doubled(&mut plan, 10.0, 1..2).map_err(text)?;
        expect(backend, &plan.io, 16.0)
    };
    add("segments run one by one, and keep what they pass on", in_parts());
    let in_turns = || -> std::result::Result<(), String> {
        let (mut a, mut b) = (open()?, open()?);
        run_doubled(&mut a, 3.0, 0..1).and_then(|_| run_doubled(&mut b, 5.0, 0..1)).map_err(text)?;
        a.run_segments(0, 1..2).and_then(|_| b.run_segments(0, 1..2)).map_err(text)?;
        expect(backend, &a.io, 9.0).and_then(|()| expect(backend, &b.io, 15.0))
    };
    add("segments of two plans in turn", in_turns());
    let rebound = || -> std::result::Result<(), String> {
        let mut plan = open()?;
        run_doubled(&mut plan, 3.0, 0..2).map_err(text)?;
        let first = plan.rebind().map_err(text)?;
        run_doubled(&mut plan, 5.0, 0..2).map_err(text)?;
        expect(backend, &plan.io, 15.0)?;
        expect(backend, &first, 9.0)
    };
    add("each step uses the buffers that it is given", rebound());
    let quotients = || [1.0f32, -1.0].map(|x| (black_box(x) / black_box(3.0)).to_bits());
    let before = quotients();
    let timed = open().and_then(|mut plan| run_doubled(&mut plan, 3.0, 0..2).map_err(text));
    let after = quotients();
    add(
        "the thread's rounding is left alone",
        match before == after {
            true => Ok(()),
            false => Err(format!("1 / 3 and -1 / 3 were {before:x?}, and are {after:x?} after a step")),
        },
    );
    add(
        "a step takes time",
        match timed {
            Ok(timing) if timing.elapsed > Duration::ZERO => Ok(()),
            Ok(_) => Err("the time is zero".into()),
            Err(e) => Err(e),
        },
    );
}

/// Loses the device, if the backend can, and checks that later calls are errors. It is the last thing to do with a
/// backend.
pub fn check_lost(backend: &dyn Backend, done: &mut dyn FnMut(Finding)) {
    let Some(recording) = doubled().filter(|it| super::gap(backend, &it.program).is_none()) else { return };
    let Ok(mut plan) = recording.open(backend) else { return };
    if run_doubled(&mut plan, 3.0, 0..2).is_err() || !backend.lose() {
        return;
    }
    let another = || recording.open(backend).map_err(text)?.run_segments(0, 0..2).map_err(text);
    let calls = [
        ("a step", plan.run_segments(0, 0..2).map_err(text)),
        ("a second step", plan.run_segments(0, 0..2).map_err(text)),
        ("a new plan with its buffers and a step", another()),
    ];
    for (with, result) in calls {
        let result = result.err().map(drop).ok_or_else(|| "was accepted".to_owned());
        let (verdict, detail) = same(result);
        done(Finding {
            behaviour: "after the device is lost, calls are errors",
            with: with.into(),
            verdict,
            detail,
        });
    }
}

/// Allocation, limits and borders of buffers.
fn memory(backend: &dyn Backend, done: &mut dyn FnMut(Finding)) {
    let mut add = |behaviour, with: &str, result: std::result::Result<(), String>| {
        let (verdict, detail) = same(result);
        done(Finding { behaviour, with: with.into(), verdict, detail });
    };
    let too_much = |bytes: u64| match backend.alloc(bytes, Usage::Weight) {
        Err(Error::OutOfMemory { .. }) => {
            // A small one still fits.
            backend.alloc(4096, Usage::Io).map(|_| ()).map_err(|e| format!("afterwards, 4096 bytes: {e}"))
        }
        Err(e) => Err(format!("expected the error `out of memory`, got: {e}")),
        Ok(_) => Err("was accepted".into()),
    };
    let limit = backend.caps().memory_bytes;
    if limit < 1 << 60 {
        add("memory limits are errors", "one byte more than the memory", too_much(limit + 1));
    }
    add("memory limits are errors", "2^62 bytes", too_much(1 << 62));
    let zeroed = || -> Result<std::result::Result<(), String>> {
        for _ in 0..2 {
            let buffer = backend.alloc(10_000, Usage::State)?;
            let mut bytes = vec![1; 10_000];
            backend.read(&buffer, 0, &mut bytes)?;
            if let Some(at) = bytes.iter().position(|&b| b != 0) {
                return Ok(Err(format!("byte {at} is {:#x}", bytes[at])));
            }
            // The next buffer may get this memory.
            upload(backend, &buffer, 0, &vec![0xa5; 10_000])?;
        }
        Ok(Ok(()))
    };
    add("new memory is zero", "10000 bytes", zeroed().map_err(text).and_then(|r| r));
    let pieces = || -> Result<std::result::Result<(), String>> {
        let buffer = backend.alloc(300, Usage::Io)?;
        let mut want = vec![0u8; 300];
        for (n, (at, len)) in [(0, 300), (3, 5), (1, 1), (127, 130), (299, 1), (8, 0)].into_iter().enumerate()
        {
            let piece: Vec<u8> = (0..len).map(|i| (17 * n + i + 1) as u8).collect();
            want[at..at + len].copy_from_slice(&piece);
            upload(backend, &buffer, at as u64, &piece)?;
        }
        let mut got = vec![0; 300];
        backend.read(&buffer, 0, &mut got)?;
        let mut part = vec![0; 13];
        backend.read(&buffer, 5, &mut part)?;
        let at = got.iter().zip(&want).position(|(a, b)| a != b);
        Ok(match at {
            Some(at) => Err(format!("byte {at}: expected {}, got {}", want[at], got[at])),
            None if part != want[5..18] => Err("bytes 5 to 17 differ when read alone".into()),
            None => Ok(()),
        })
    };
    add(
        "buffers take pieces at any place",
        "pieces of 0 to 300 bytes",
        pieces().map_err(text).and_then(|r| r),
    );
    // Devices copy large pieces in parts.
    let large = || -> Result<std::result::Result<(), String>> {
        let want: Vec<u8> = (0..LARGE_BYTES).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
        let buffer = backend.alloc(want.len() as u64, Usage::Io)?;
        upload(backend, &buffer, 0, &want)?;
        let mut got = vec![0; want.len()];
        backend.read(&buffer, 0, &mut got)?;
        let at = got.iter().zip(&want).position(|(a, b)| a != b);
        Ok(at.map_or(Ok(()), |at| Err(format!("byte {at}: expected {}, got {}", want[at], got[at]))))
    };
    add("buffers take pieces at any place", "9 MiB and 5 bytes", large().map_err(text).and_then(|r| r));
    // More in total than the device has, a part at a time.
    let again = || -> Result<std::result::Result<(), String>> {
        let before = resident_bytes();
        for n in 0..TURNS {
            let part = (limit / 4).min(MOST_AT_A_TIME);
            let buffer = match backend.alloc(part, Usage::State) {
                Ok(buffer) => buffer,
                Err(e) => return Ok(Err(format!("{part} bytes, {n} times before: {e}"))),
            };
            upload(backend, &buffer, 0, &vec![1; part as usize])?;
        }
        let most = TURNS * MOST_AT_A_TIME / 4;
        let mut grown = 0;
        // Drivers give memory back when they are through with it, which takes some a moment.
        for _ in 0..WAITS {
            let small = backend.alloc(16, Usage::Io)?;
            upload(backend, &small, 0, &[1; 16])?;
            backend.read(&small, 0, &mut [0; 16])?;
            grown = resident_bytes().saturating_sub(before);
            if grown <= most {
                return Ok(Ok(()));
            }
            std::thread::sleep(WAIT);
        }
        Ok(Err(format!("the process has {grown} bytes more in use")))
    };
    let with = format!("{TURNS} buffers, one at a time");
    add("memory is free again", &with, again().map_err(text).and_then(|r| r));
    if limit <= MOST_COUNTED {
        let counted = || -> std::result::Result<(), String> {
            (0..5).try_for_each(|n| {
                backend.alloc(limit / 2, Usage::State).map(drop).map_err(|e| format!("{n} times before: {e}"))
            })
        };
        add("memory is free again", "half of the memory, 5 times", counted());
    }
    let outside = |what: &str, result: Result<()>| match result {
        Err(_) => Ok(()),
        Ok(()) => Err(format!("{what} was accepted")),
    };
    match backend.alloc(64, Usage::Io) {
        Err(e) => add("accesses outside of buffers are errors", "64 bytes", Err(e.to_string())),
        Ok(buffer) => {
            let name = "accesses outside of buffers are errors";
            add(name, "write", outside("bytes 60 to 68", upload(backend, &buffer, 60, &[0; 8])));
            add(name, "read", outside("bytes 60 to 68", backend.read(&buffer, 60, &mut [0; 8])));
            let far = backend.read(&buffer, u64::MAX - 2, &mut [0; 8]);
            add(name, "read at the end of all addresses", outside("it", far));
            let foreign = Buffer::new(64, ());
            add(name, "another backend's buffer", outside("it", backend.read(&foreign, 0, &mut [0; 8])));
        }
    }
}

/// Cancels the longest step from another thread.
fn latency(backend: &dyn Backend, recorded: &[(&str, Recording)], done: &mut dyn FnMut(Finding)) {
    let mut longest: Option<(&str, &Recording, Duration)> = None;
    for (name, recording) in recorded {
        let Ok(mut opened) = recording.open(backend) else { continue };
        let start = Instant::now();
        let Some(step) = recording.steps.first() else { continue };
        if opened.step(0, &step.inputs, &Cancel::default()).is_ok() {
            let time = start.elapsed();
            if longest.is_none_or(|(.., most)| time > most) {
                longest = Some((name, recording, time));
            }
        }
    }
    let Some((name, recording, whole)) = longest else { return };
    let measure = || -> std::result::Result<String, String> {
        let mut opened = recording.open(backend).map_err(text)?;
        let cancel = Cancel::default();
        let wait = whole / 4;
        let (ended, asked) = std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                std::thread::sleep(wait);
                cancel.cancel();
                Instant::now()
            });
            let result = opened.step(0, &recording.steps[0].inputs, &cancel);
            ((result, Instant::now()), asked.join())
        });
        let asked = asked.map_err(|_| "a thread failed".to_owned())?;
        let (result, end) = ended;
        let after = end.saturating_duration_since(asked);
        match result {
            Err(Error::Cancelled) | Ok(()) => {
                Ok(format!("ended {after:.1?} after the request; the whole step takes {whole:.1?}"))
            }
            Err(e) => Err(e.to_string()),
        }
    };
    let (verdict, detail) = match measure() {
        Ok(detail) => (Verdict::Held, detail),
        Err(detail) => (Verdict::Broken, detail),
    };
    done(Finding {
        behaviour: "a step can be cancelled from another thread",
        with: name.into(),
        verdict,
        detail,
    });
}

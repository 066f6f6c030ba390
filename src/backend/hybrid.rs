//! Two devices as one: ops that the first does not run yet run on the second. For bring-up, so that whole models run
//! while a chip's ops are written one by one.
//!
//! A program is cut into parts: consecutive ops of a segment that run on the same device. Each part is a program of its
//! own. Results that the other device reads are copied through the host after the part. [`Hybrid::placement`] tells
//! what runs where, and how many bytes are copied.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::energy::Energy;
use super::{
    Backend, Bindings, Buffer, Caps, Clock, Contract, Gap, Limits, OpSig, Plan, Step, Support, Ticket,
    Timing, Usage, check_step, prepare, upload,
};
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::map::Region;
use crate::memory::zeroed;
use crate::passes::{self, Fragment};
use crate::program::{Access, Op, PAGE_POSITIONS, Program, Slot, StateId, TensorId};

/// Most bytes copied at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// A device, and another one that fills its gaps.
pub struct Hybrid {
    sides: Arc<Sides>,
    caps: Caps,
}

/// Both devices: the one that is brought up, and the one that fills its gaps.
struct Sides([Arc<dyn Backend>; 2]);

/// The index of the device that is brought up.
const MINE: usize = 0;
/// The index of the device that fills its gaps.
const OTHER: usize = 1;

/// Where an op runs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Placement {
    /// Index of the op's segment.
    pub segment: usize,
    /// The op's name.
    pub op: &'static str,
    /// The name of the tensor or the cache that it writes.
    pub result: String,
    /// Name of the device that runs it.
    pub device: String,
    /// Why the first device does not run it.
    pub gap: Option<Gap>,
    /// Bytes of its results that are copied to the other device, for each token.
    pub copied_bytes_per_token: u64,
}

impl Hybrid {
    /// Joins a device with another one that runs what the first declares as gaps, such as the reference or the CPU.
    pub fn new(mine: Arc<dyn Backend>, other: Arc<dyn Backend>) -> Hybrid {
        let (a, b) = (mine.caps(), other.caps());
        let weakest = |contract| a.contract == contract || b.contract == contract;
        let contract = if weakest(Contract::Native) {
            Contract::Native
        } else if weakest(Contract::Close) {
            Contract::Close
        } else {
            Contract::Exact
        };
        let caps =
            Caps::new(format!("{}+{}", a.name, b.name), format!("{}; gaps run on {}", a.device, b.device))
                .memory_bytes(a.memory_bytes)
                .rows(a.rows)
                .fusions(a.fusions)
                .contract(contract);
        Hybrid { sides: Arc::new(Sides([mine, other])), caps }
    }

    /// Tells where each op of a program runs. The program is one for this backend, as in
    /// [`Session::program`](crate::Session::program).
    pub fn placement(&self, program: &Program) -> Vec<Placement> {
        let readers = Readers::of(&self.sides, program);
        let placed = program.ops().map(|(segment, op)| {
            let gap = self.sides.gap(program, op);
            let side = if gap.is_some() { OTHER } else { MINE };
            let (mut results, mut bytes) = (Vec::new(), 0);
            op.outputs(&mut |id| {
                let t = program.tensor(id);
                results.push(t.name.clone());
                if readers.tensor(id, 1 - side) {
                    bytes += 4 * u64::from(t.cols);
                }
            });
            for state in written(op) {
                let Some(s) = program.states.get(state.0 as usize) else { continue };
                results.push(s.name.clone());
                if readers.state(state, 1 - side) {
                    // Whole pages are copied, at least one for each span; this is the share of a position.
                    bytes += s.page_bytes() / u64::from(PAGE_POSITIONS);
                }
            }
            let device = self.sides.0[side].caps().name.clone();
            let result = results.join(", ");
            Placement { segment, op: op.name(), result, device, gap, copied_bytes_per_token: bytes }
        });
        placed.collect()
    }

    fn pair<'a>(&self, buffer: &'a Buffer) -> Result<&'a Pair> {
        self.sides.pair(buffer)
    }
}

/// The caches that an op writes.
fn written(op: &Op) -> Vec<StateId> {
    let mut states = Vec::new();
    let Ok(_) = op.try_map(
        |_, _| Ok::<_, std::convert::Infallible>(()),
        |&id, access| {
            if access == Access::Write {
                states.push(id);
            }
            Ok(())
        },
    );
    states
}

/// Which devices read or write each tensor and each cache.
struct Readers {
    tensors: Vec<[bool; 2]>,
    states: Vec<[bool; 2]>,
}

impl Readers {
    fn of(sides: &Sides, program: &Program) -> Readers {
        let mut readers = Readers {
            tensors: vec![[false; 2]; program.tensors.len()],
            states: vec![[false; 2]; program.states.len()],
        };
        for (_, op) in program.ops() {
            let side = sides.side(program, op);
            let mark = |list: &mut Vec<[bool; 2]>, at: u32| {
                if let Some(users) = list.get_mut(at as usize) {
                    users[side] = true;
                }
            };
            let (tensors, states) = (&mut readers.tensors, &mut readers.states);
            let Ok(_) = op.try_map(
                |id, _| {
                    mark(tensors, id.0);
                    Ok::<_, std::convert::Infallible>(())
                },
                |id, _| {
                    mark(states, id.0);
                    Ok(())
                },
            );
        }
        readers
    }

    fn tensor(&self, id: TensorId, side: usize) -> bool {
        self.tensors.get(id.0 as usize).is_some_and(|users| users[side])
    }

    fn state(&self, id: StateId, side: usize) -> bool {
        self.states.get(id.0 as usize).is_some_and(|users| users[side])
    }
}

impl Sides {
    fn gap(&self, program: &Program, op: &Op) -> Option<Gap> {
        match self.0[MINE].supports(&OpSig { program, op }) {
            Support::Native => None,
            Support::Unsupported(gap) => Some(gap),
        }
    }

    fn side(&self, program: &Program, op: &Op) -> usize {
        if self.gap(program, op).is_some() { OTHER } else { MINE }
    }

    fn pair<'a>(&self, buffer: &'a Buffer) -> Result<&'a Pair> {
        buffer.memory().ok_or_else(|| Error::Backend {
            backend: self.0[MINE].caps().name.clone(),
            message: "a buffer of another backend was passed".into(),
        })
    }

    /// Copies a range of a pair from a device to the other one.
    fn copy(&self, pair: &Pair, from: usize, range: Range<u64>) -> Result<()> {
        let source = pair.on(self, from)?;
        let target = pair.on(self, 1 - from)?;
        let mut bytes: Vec<u8> =
            zeroed(PIECE_BYTES.min(range.end - range.start), "copies between two devices")?;
        let mut at = range.start;
        while at < range.end {
            let piece = &mut bytes[..PIECE_BYTES.min(range.end - at) as usize];
            self.0[from].read(&source, at, piece)?;
            upload(&*self.0[1 - from], &target, at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

/// A buffer, on each device that uses it.
struct Pair {
    bytes: u64,
    usage: Usage,
    pages: Option<Region>,
    on: Mutex<On>,
}

#[derive(Default)]
struct On {
    buffers: [Option<Buffer>; 2],
    /// The device that wrote last, if they differ.
    latest: Option<usize>,
}

impl Pair {
    fn new(bytes: u64, usage: Usage, pages: Option<Region>) -> Pair {
        Pair { bytes, usage, pages, on: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, On> {
        self.on.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Returns the buffer on a device. At the first use, it takes the content of the other device or of the mapped pages.
    fn on(&self, sides: &Sides, side: usize) -> Result<Buffer> {
        let mut on = self.lock();
        if let Some(buffer) = &on.buffers[side] {
            return Ok(buffer.clone());
        }
        let backend = &sides.0[side];
        let imported = match &self.pages {
            Some(pages) => backend.import(pages)?,
            None => None,
        };
        let buffer = match (imported, &self.pages, &on.buffers[1 - side]) {
            (Some(imported), ..) => imported,
            (None, Some(pages), _) => {
                let buffer = backend.alloc(self.bytes, self.usage)?;
                upload(&**backend, &buffer, 0, &pages.load()?)?;
                buffer
            }
            (None, None, Some(other)) => {
                let buffer = backend.alloc(self.bytes, self.usage)?;
                let mut at = 0;
                let mut bytes: Vec<u8> = zeroed(PIECE_BYTES.min(self.bytes), "copies between two devices")?;
                while at < self.bytes {
                    let piece = &mut bytes[..PIECE_BYTES.min(self.bytes - at) as usize];
                    sides.0[1 - side].read(other, at, piece)?;
                    upload(&**backend, &buffer, at, piece)?;
                    at += piece.len() as u64;
                }
                buffer
            }
            (None, None, None) => backend.alloc(self.bytes, self.usage)?,
        };
        on.buffers[side] = Some(buffer.clone());
        Ok(buffer)
    }
}

impl Backend for Hybrid {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        match self.sides.0[MINE].supports(sig) {
            Support::Native => Support::Native,
            Support::Unsupported(_) => self.sides.0[OTHER].supports(sig),
        }
    }

    fn explain(&self, sig: &OpSig<'_>, tokens: u32) -> String {
        let backend = &self.sides.0[self.sides.side(sig.program, sig.op)];
        format!("{}: {}", backend.caps().name, backend.explain(sig, tokens))
    }

    fn report(&self) -> Vec<String> {
        self.sides.0.iter().flat_map(|backend| backend.report()).collect()
    }

    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer> {
        let pair = Pair::new(bytes, usage, None);
        // The device that is brought up has room for everything, so that a buffer that is too large is an error here.
        pair.on(&self.sides, MINE)?;
        Ok(Buffer::new(bytes, pair))
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        let bytes = region.len();
        Ok(Some(Buffer::new(bytes, Pair::new(bytes, Usage::Weight, Some(region.clone())))))
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let pair = self.pair(dst)?;
        let mine = pair.on(&self.sides, MINE)?;
        let other = pair.lock().buffers[OTHER].clone();
        let (mut at, mut copied) = (range.start, Ok(()));
        self.sides.0[MINE].fill(&mine, range, &mut |piece| {
            write(piece);
            if let (Some(other), Ok(())) = (&other, &copied) {
                copied = upload(&*self.sides.0[OTHER], other, at, piece);
            }
            at += piece.len() as u64;
        })?;
        pair.lock().latest = None;
        copied
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let pair = self.pair(src)?;
        let side = pair.lock().latest.unwrap_or(MINE);
        self.sides.0[side].read(&pair.on(&self.sides, side)?, offset, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let readers = Readers::of(&self.sides, program);
        let crosses = |id: TensorId| readers.tensor(id, MINE) && readers.tensor(id, OTHER);
        // The part in which each tensor is used, if there is only one.
        let parts = parts(&self.sides, program);
        let mut only: Vec<Option<usize>> = vec![None; program.tensors.len()];
        let mut shared = vec![false; program.tensors.len()];
        for (n, part) in parts.iter().enumerate() {
            for op in part.ops {
                op.tensors(|id, _| {
                    let at = id.0 as usize;
                    shared[at] |= only[at].is_some_and(|known| known != n);
                    only[at] = Some(n);
                });
            }
        }
        let outer = |id: TensorId| program.tensor(id).slot == Slot::Scratch && shared[id.0 as usize];
        let between = (0..program.tensors.len() as u32).map(TensorId).map(|id| {
            let t = program.tensor(id);
            let bytes = 4 * passes::rows(t.rows, limits.tokens, limits.outputs) * u64::from(t.cols);
            outer(id).then(|| Buffer::new(bytes, Pair::new(bytes, Usage::Io, None)))
        });
        let between: Vec<Option<Buffer>> = between.collect();
        let mut prepared: Vec<Vec<Part>> = program.segments.iter().map(|_| Vec::new()).collect();
        for Cut { segment, side, ops } in parts {
            let name = program.segments.get(segment).map_or("", |s| &s.name);
            let Fragment { program: own, tensors, states } =
                passes::fragment(program, name, ops, |id| !shared[id.0 as usize]);
            let (mut results, mut pages) = (Vec::new(), Vec::new());
            for op in ops {
                op.outputs(&mut |id| {
                    if program.tensor(id).slot != Slot::Scratch || outer(id) {
                        results.push((id, crosses(id)));
                    }
                });
                for id in written(op) {
                    pages.push((id, readers.state(id, 1 - side)));
                }
            }
            let own = Arc::new(own);
            let plan = prepare(&*self.sides.0[side], &own, limits)?;
            prepared[segment].push(Part { side, program: own, tensors, states, plan, results, pages });
        }
        Ok(Box::new(HybridPlan {
            sides: self.sides.clone(),
            program: program.clone(),
            limits,
            segments: prepared,
            between,
            submitted: 0,
            timing: Timing::new(Duration::ZERO, Clock::Host),
        }))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        // An upper bound: each device as if it ran everything.
        let of = |side: usize| self.sides.0[side].scratch_bytes(program, limits);
        of(MINE).saturating_add(of(OTHER))
    }
}

/// Consecutive ops of a segment that run on the same device.
struct Cut<'a> {
    segment: usize,
    side: usize,
    ops: &'a [Op],
}

fn parts<'a>(sides: &Sides, program: &'a Program) -> Vec<Cut<'a>> {
    let mut parts = Vec::new();
    for (segment, s) in program.segments.iter().enumerate() {
        let on: Vec<usize> = s.ops.iter().map(|op| sides.side(program, op)).collect();
        let mut rest = &s.ops[..];
        for same in on.chunk_by(|a, b| a == b) {
            let (ops, later) = rest.split_at(same.len());
            parts.push(Cut { segment, side: same[0], ops });
            rest = later;
        }
    }
    parts
}

/// A part of a program, prepared on its device.
struct Part {
    side: usize,
    program: Arc<Program>,
    /// For each tensor and state of the part, that of the whole program.
    tensors: Vec<TensorId>,
    states: Vec<StateId>,
    plan: Box<dyn Plan>,
    /// What others read of its results, and whether the other device does.
    results: Vec<(TensorId, bool)>,
    /// The caches that it writes, and whether the other device uses them.
    pages: Vec<(StateId, bool)>,
}

struct HybridPlan {
    sides: Arc<Sides>,
    program: Arc<Program>,
    limits: Limits,
    /// The parts of each segment.
    segments: Vec<Vec<Part>>,
    /// Scratch tensors that are used in more than one part.
    between: Vec<Option<Buffer>>,
    submitted: u64,
    timing: Timing,
}

/// Returns the buffer of a tensor that lives outside of a part.
fn buffer_of<'a>(
    program: &Program,
    between: &'a [Option<Buffer>],
    bindings: &Bindings<'a>,
    id: TensorId,
) -> Result<&'a Buffer> {
    let t = program.tensor(id);
    let found = match t.slot {
        Slot::Weight(n) => bindings.weights.get(n as usize),
        Slot::Io(n) => bindings.io.get(n as usize),
        Slot::Scratch => between.get(id.0 as usize).and_then(Option::as_ref),
    };
    found.ok_or_else(|| Error::argument("bindings", format!("a buffer for `{}`", t.name), "none"))
}

impl Plan for HybridPlan {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        let start = Instant::now();
        check_step(step, &self.program, self.limits, bindings.states)?;
        let from_start = segments.start == 0;
        let all = self.segments.len();
        let HybridPlan { sides, program, between, .. } = self;
        let parts = self.segments.get_mut(segments.clone());
        let parts = parts.ok_or_else(|| {
            Error::argument("segments", format!("within 0..{all}"), format!("{segments:?}"))
        })?;
        let state = |id: StateId| {
            let missing = || Error::argument("bindings", format!("a buffer for state {}", id.0), "none");
            bindings.states.get(id.0 as usize).ok_or_else(missing)
        };
        // Of the sides that tell it.
        let mut energy = None;
        for part in parts.iter_mut().flatten() {
            let Part { side, program: own, tensors, states, plan, results, pages } = part;
            let side = *side;
            let outer = |&id: &TensorId| {
                let whole = tensors.get(id.0 as usize).copied().unwrap_or(TensorId(u32::MAX));
                let buffer = buffer_of(program, between, bindings, whole)?;
                sides.pair(buffer)?.on(sides, side)
            };
            let weights = own.weights.iter().map(outer).collect::<Result<Vec<_>>>()?;
            let io = own.io.iter().map(outer).collect::<Result<Vec<_>>>()?;
            let caches = states.iter().map(|&id| sides.pair(state(id)?)?.on(sides, side));
            let caches = caches.collect::<Result<Vec<_>>>()?;
            let ticket = plan.submit(
                step,
                0..own.segments.len(),
                &Bindings { weights: &weights, states: &caches, io: &io },
            )?;
            energy = Energy::sum(energy, plan.wait(ticket)?.energy);
            for &(id, crosses) in &*results {
                let pair = sides.pair(buffer_of(program, between, bindings, id)?)?;
                let t = program.tensor(id);
                let rows = passes::rows(t.rows, step.tokens.len() as u32, step.outputs.len() as u32);
                if crosses {
                    sides.copy(pair, side, 0..4 * rows * u64::from(t.cols))?;
                }
                pair.lock().latest = Some(side);
            }
            for &(id, crosses) in &*pages {
                let pair = sides.pair(state(id)?)?;
                pair.lock().latest = Some(side);
                let Some(s) = program.states.get(id.0 as usize).filter(|_| crosses) else { continue };
                for span in step.spans.iter().filter(|span| span.len > 0) {
                    let table = span.tables.get(program.kv_group(s)).map_or(&[][..], Vec::as_slice);
                    let touched = span.start / PAGE_POSITIONS..=(span.start + span.len - 1) / PAGE_POSITIONS;
                    for page in touched.filter_map(|n| table.get(n as usize)) {
                        let at = u64::from(*page) * s.page_bytes();
                        sides.copy(pair, side, at..at + s.page_bytes())?;
                    }
                }
            }
        }
        let timing = Timing::new(start.elapsed(), Clock::Host).energy(energy);
        self.timing = if from_start { timing } else { self.timing.then(timing) };
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Timing> {
        if ticket.0 != self.submitted {
            return Err(Error::argument("ticket", self.submitted, ticket.0));
        }
        Ok(self.timing)
    }
}

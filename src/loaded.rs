//! A program on a backend, with its weights and all its memory. Sessions and embedders run their steps on it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::backend::{Backend, Bindings, Buffer, Limits, Plan, Step, Timing, Usage, prepare};
use crate::error::{Error, Result};
use crate::memory::resident_bytes;
use crate::model::Model;
use crate::passes;
use crate::program::{Program, Slot, TensorId};
use crate::weights::{Budget, StreamPlan, Weights};

/// What a session needs besides what it counts: stacks of threads, what the sampler and the tokenizer keep,
/// pages that the system maps around those in use.
const SPARE_BYTES: u64 = 6 << 20;

/// A KV cache that is spilled keeps this part of the memory: one in so many.
const KV_SHARE: u64 = 4;

/// The memory of a session.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ceiling<'a> {
    /// Bytes of the whole process.
    pub memory_bytes: Option<u64>,
    /// Folder for the part of the KV cache that does not fit.
    pub spill: Option<&'a Path>,
}

/// The memory that a program needs on a backend, known from the model's header alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Footprint {
    /// Weights, mapped or copied.
    pub weight_bytes: u64,
    /// The KV cache.
    pub kv_bytes: u64,
    /// Activations and other working memory.
    pub scratch_bytes: u64,
    /// Input and output buffers.
    pub io_bytes: u64,
    /// Weights that stay in the file, within a limit on memory: a step reads those that it needs.
    pub streamed_bytes: u64,
    /// Memory for what is read of them ahead.
    pub stream_bytes: u64,
    /// The part of the KV cache that is kept in a file.
    pub spilled_bytes: u64,
}

impl Ceiling<'_> {
    /// Divides the memory: returns the budget of weights, and the bytes of the KV cache that stay in memory.
    fn divide(&self, backend: &dyn Backend, needed: &Footprint, in_use: u64) -> Result<(Budget, u64)> {
        let Some(limit) = self.memory_bytes else {
            let left = backend.caps().memory_bytes.saturating_sub(needed.working_bytes());
            return Ok((Budget::Copies(left), needed.kv_bytes));
        };
        let besides_kv = in_use
            .saturating_add(SPARE_BYTES)
            .saturating_add(needed.working_bytes())
            .saturating_sub(needed.kv_bytes);
        let free = limit.saturating_sub(besides_kv);
        let kv_bytes = match self.spill {
            Some(_) => needed.kv_bytes.min(free / KV_SHARE),
            None => needed.kv_bytes,
        };
        if free <= kv_bytes {
            let what = "the KV cache, working memory and the process, without weights,".into();
            let need_bytes = besides_kv.saturating_add(kv_bytes);
            return Err(Error::OutOfMemory { what, need_bytes, have_bytes: limit });
        }
        Ok((Budget::All(free - kv_bytes), kv_bytes))
    }
}

impl Footprint {
    /// Returns the memory of a program whose states have `pages(window)` pages.
    pub(crate) fn of(
        program: &Program,
        backend: &dyn Backend,
        limits: Limits,
        pages: impl Fn(Option<u32>) -> u64,
    ) -> Footprint {
        Footprint {
            weight_bytes: program.weight_bytes(),
            kv_bytes: program.kv_bytes(pages),
            scratch_bytes: backend.scratch_bytes(program, limits),
            io_bytes: program.io.iter().map(|&id| io_bytes(program, id, limits)).sum(),
            streamed_bytes: 0,
            stream_bytes: 0,
            spilled_bytes: 0,
        }
    }

    /// Adds what a limit on memory changes, if the process has as much in use as now.
    pub(crate) fn within(
        mut self,
        program: &Program,
        backend: &dyn Backend,
        ceiling: Ceiling<'_>,
    ) -> Result<Footprint> {
        if let (Budget::All(bytes), kept_bytes) = ceiling.divide(backend, &self, resident_bytes())? {
            let plan = StreamPlan::of(program, backend, bytes).unwrap_or_default();
            self.spilled_bytes = self.kv_bytes - kept_bytes;
            (self.streamed_bytes, self.stream_bytes) = (plan.weight_bytes, plan.memory_bytes());
        }
        Ok(self)
    }

    /// Everything but the weights.
    pub fn working_bytes(&self) -> u64 {
        self.kv_bytes.saturating_add(self.scratch_bytes).saturating_add(self.io_bytes)
    }
}

fn io_bytes(program: &Program, id: TensorId, limits: Limits) -> u64 {
    let t = program.tensor(id);
    4 * passes::rows(t.rows, limits.tokens, limits.outputs) * u64::from(t.cols)
}

/// A program on a backend.
pub(crate) struct Loaded {
    pub model: Arc<Model>,
    pub backend: Arc<dyn Backend>,
    /// The fused program.
    pub program: Arc<Program>,
    pub limits: Limits,
    pub weights: Weights,
    /// One per state.
    pub states: Vec<Buffer>,
    io: Vec<Buffer>,
    plan: Box<dyn Plan>,
}

impl Loaded {
    /// Prepares a program, loads its weights and reserves all memory; a state gets `pages(window)` pages.
    /// Calls `progress` with the weight bytes loaded so far.
    pub fn new(
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        program: &Program,
        limits: Limits,
        pages: impl Fn(Option<u32>) -> u64,
        ceiling: Ceiling<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Loaded> {
        let in_use = resident_bytes();
        let program = Arc::new(passes::for_backend(program, backend.caps()));
        let plan = prepare(&**backend, &program, limits)?;
        let needed = Footprint::of(&program, &**backend, limits, &pages);
        let (budget, kept_bytes) = ceiling.divide(&**backend, &needed, in_use)?;
        let weights = Weights::load(model.gguf(), &program, &**backend, budget, progress)?;
        let mut states = Vec::new();
        for state in &program.states {
            let bytes = pages(state.window).saturating_mul(state.page_bytes());
            states.push(match ceiling.spill {
                Some(folder) if kept_bytes < needed.kv_bytes => {
                    // Each state keeps the same share.
                    let kept =
                        u128::from(bytes) * u128::from(kept_bytes) / u128::from(needed.kv_bytes.max(1));
                    let refused = || Error::Backend {
                        backend: backend.caps().name.clone(),
                        message: "cannot keep the KV cache in a file".into(),
                    };
                    backend.alloc_spilled(bytes, kept as u64, folder)?.ok_or_else(refused)?
                }
                _ => backend.alloc(bytes, Usage::State)?,
            });
        }
        let io = program.io.iter().map(|&id| backend.alloc(io_bytes(&program, id, limits), Usage::Io));
        let io = io.collect::<Result<_>>()?;
        let (model, backend) = (model.clone(), backend.clone());
        Ok(Loaded { model, backend, program, limits, weights, states, io, plan })
    }

    /// Runs segments of a step, and returns the time.
    pub fn run(&mut self, step: &Step<'_>, segments: &[Range<usize>]) -> Result<Timing> {
        let bindings = Bindings { weights: &self.weights.buffers, states: &self.states, io: &self.io };
        let mut ticket = None;
        for run in segments.iter().flat_map(|segments| self.weights.runs(segments.clone())) {
            self.weights.load_segment(self.model.gguf(), &self.program, &*self.backend, run.start)?;
            ticket = Some(self.plan.submit(step, run, &bindings)?);
        }
        let ticket = ticket.ok_or_else(|| Error::Program("there is nothing to run".into()))?;
        let timing = self.plan.wait(ticket)?;
        // Results computed from a changed file are not valid.
        self.model.gguf().verify()?;
        Ok(timing)
    }

    /// Reads the start of an output.
    pub fn read<T: bytemuck::Pod>(&self, output: Option<TensorId>, out: &mut [T]) -> Result<()> {
        let slot = output.map(|id| self.program.tensor(id).slot);
        let buffer = if let Some(Slot::Io(n)) = slot { self.io.get(n as usize) } else { None };
        let missing = || Error::Program("the program does not have this output".into());
        self.backend.read(buffer.ok_or_else(missing)?, 0, bytemuck::cast_slice_mut(out))
    }
}

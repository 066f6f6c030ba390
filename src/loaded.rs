//! A program on a backend, with its weights and all its memory. Sessions and embedders run their steps on it.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::{Backend, Bindings, Buffer, Limits, Plan, Step, Timing, Usage, prepare};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::passes;
use crate::program::{Program, Slot, TensorId};
use crate::weights::Weights;

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
        }
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
        progress: &mut dyn FnMut(u64),
    ) -> Result<Loaded> {
        let program = Arc::new(passes::for_backend(program, backend.caps()));
        let plan = prepare(&**backend, &program, limits)?;
        let working = Footprint::of(&program, &**backend, limits, &pages).working_bytes();
        let budget = backend.caps().memory_bytes.saturating_sub(working);
        let weights = Weights::load(model.gguf(), &program, &**backend, budget, progress)?;
        let states =
            program.states.iter().map(|s| backend.alloc(pages(s.window) * s.page_bytes(), Usage::State));
        let states = states.collect::<Result<_>>()?;
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

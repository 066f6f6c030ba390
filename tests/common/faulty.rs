//! A CPU whose faults tests choose.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use halite::backend::cpu::Cpu;
use halite::backend::{
    Backend, Bindings, Buffer, Caps, Limits, OpSig, Plan, Step, Support, Ticket, Timing, Usage,
};
use halite::map::Region;
use halite::program::Program;
use halite::{Error, Result};

/// What a device does in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Fails; later steps work again.
    Fail,
    /// Fails, and so does every later step, and every allocation.
    Lose,
    /// Does not return until [`Faulty::release`].
    Hang,
    /// Computes numbers that are not finite.
    Poison,
}

#[derive(Default)]
struct State {
    /// Steps to run before each fault.
    faults: VecDeque<(u32, Fault)>,
    is_lost: bool,
    is_poisoned: bool,
    releases: u64,
    steps: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    released: Condvar,
}

/// The backend.
pub struct Faulty {
    inner: Cpu,
    shared: Arc<Shared>,
}

fn lost() -> Error {
    Error::Backend { backend: "faulty".into(), message: "the device is gone".into() }
}

impl Faulty {
    /// Without faults, on this number of threads.
    pub fn with_threads(threads: usize) -> Faulty {
        Faulty { inner: Cpu::with_threads(threads).unwrap(), shared: Arc::default() }
    }

    /// After so many further steps, or so many after the fault before, one has this fault.
    pub fn after(&self, steps: u32, fault: Fault) {
        self.shared.state.lock().unwrap().faults.push_back((steps, fault));
    }

    /// Lets a step that hangs go on, and repairs a lost device.
    pub fn release(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.is_lost = false;
        state.releases += 1;
        self.shared.released.notify_all();
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.shared.state.lock().unwrap().steps
    }
}

impl Shared {
    fn step(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        state.steps += 1;
        state.is_poisoned = false;
        if state.is_lost {
            return Err(lost());
        }
        let fault = match state.faults.front_mut() {
            Some((0, fault)) => *fault,
            Some((steps, _)) => {
                *steps -= 1;
                return Ok(());
            }
            None => return Ok(()),
        };
        state.faults.pop_front();
        match fault {
            Fault::Fail => return Err(lost()),
            Fault::Lose => {
                state.is_lost = true;
                return Err(lost());
            }
            Fault::Poison => state.is_poisoned = true,
            Fault::Hang => {
                let before = state.releases;
                drop(self.released.wait_while(state, |state| state.releases == before).unwrap());
            }
        }
        Ok(())
    }
}

struct FaultyPlan {
    inner: Box<dyn Plan>,
    shared: Arc<Shared>,
}

impl Plan for FaultyPlan {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        if segments.start == 0 {
            self.shared.step()?;
        }
        self.inner.submit(step, segments, bindings)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Timing> {
        self.inner.wait(ticket)
    }
}

impl Backend for Faulty {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        self.inner.supports(sig)
    }

    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer> {
        if self.shared.state.lock().unwrap().is_lost {
            return Err(lost());
        }
        self.inner.alloc(bytes, usage)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        self.inner.import(region)
    }

    fn alloc_spilled(&self, bytes: u64, kept_bytes: u64, folder: &Path) -> Result<Option<Buffer>> {
        self.inner.alloc_spilled(bytes, kept_bytes, folder)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.inner.fill(dst, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.inner.read(src, offset, dst)?;
        if self.shared.state.lock().unwrap().is_poisoned {
            // NaN, and no token.
            dst.fill(0xff);
        }
        Ok(())
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let inner = self.inner.prepare(program, limits)?;
        Ok(Box::new(FaultyPlan { inner, shared: self.shared.clone() }))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        self.inner.scratch_bytes(program, limits)
    }
}

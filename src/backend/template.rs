//! A complete backend without ops: the file to copy for a new chip.
//!
//! It compiles, every call works, and conformance lists each op as a named gap. To bring up a chip, put your
//! own buffer type behind [`Buffer`], return `Native` from [`Backend::supports`] for one op after the other,
//! and queue the chip's commands in [`Plan::submit`].

use std::ops::Range;
use std::sync::Arc;

use super::driver::{Driver, Listed};
use super::{
    Backend, Bindings, Buffer, Caps, Clock, Contract, Fusions, Gap, Limits, OpSig, Plan, Rows, Step, Support,
    Ticket, Timing, Usage,
};
use crate::error::{Error, Result};
use crate::map::Region;
use crate::program::{Op, Program};

/// The backend's name.
const NAME: &str = "template";

/// The driver, for the table of drivers that `halite_cli::main` takes.
pub const DRIVER: Driver = Driver::new(NAME, |_, _| Ok(Arc::new(Template::new())))
    .list(|| Ok(vec![Listed::of(Template::new().caps())]));

/// The device: open handles and fixed properties.
#[derive(Debug)]
pub struct Template {
    caps: Caps,
}

/// Device memory. A real chip stores an address here, and frees it on drop.
#[derive(Debug)]
struct Memory {
    bytes: std::sync::Mutex<Vec<u8>>,
}

impl Template {
    /// Opens the device.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Template {
        // Request the fusions that the chip has instructions for. The contract is `Exact` only if results are bit-identical to
        // the reference.
        let caps = Caps::new(NAME, "a template to copy; it runs no ops")
            .memory_bytes(1 << 30)
            .rows(Rows::Plain)
            .fusions(Fusions::default())
            .contract(Contract::Close);
        Template { caps }
    }

    fn memory<'a>(&self, buffer: &'a Buffer) -> Result<&'a Memory> {
        buffer.memory().ok_or_else(|| error("a buffer of another backend was passed"))
    }
}

fn error(message: &str) -> Error {
    Error::Backend { backend: NAME.into(), message: message.into() }
}

impl Backend for Template {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        // Match on `sig.op` and on formats and shapes in `sig.program`, and return `Support::Native` for what
        // works. Return `Gap::Never` for what the hardware cannot do at all.
        Support::Unsupported(Gap::NotYet(format!("{} is not implemented", sig.op.name())))
    }

    fn alloc(&self, bytes: u64, _usage: Usage) -> Result<Buffer> {
        if bytes > self.caps.memory_bytes {
            let (what, have_bytes) = ("a buffer on `template`".into(), self.caps.memory_bytes);
            return Err(Error::OutOfMemory { what, need_bytes: bytes, have_bytes });
        }
        Ok(Buffer::new(bytes, Memory { bytes: vec![0; bytes as usize].into() }))
    }

    fn import(&self, _region: &Region) -> Result<Option<Buffer>> {
        // A chip that reads host memory returns a handle to the region's pages; others get a copy through
        // `fill`.
        Ok(None)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let mut bytes =
            self.memory(dst)?.bytes.lock().map_err(|_| error("a thread failed while it wrote"))?;
        let outside =
            || Error::argument("fill range", format!("inside 0..{}", dst.bytes()), format!("{range:?}"));
        write(bytes.get_mut(range.start as usize..range.end as usize).ok_or_else(outside)?);
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let bytes = self.memory(src)?.bytes.lock().map_err(|_| error("a thread failed while it wrote"))?;
        let end = offset.saturating_add(dst.len() as u64);
        let outside = || {
            Error::argument("read range", format!("inside 0..{}", src.bytes()), format!("{offset}..{end}"))
        };
        dst.copy_from_slice(bytes.get(offset as usize..end as usize).ok_or_else(outside)?);
        Ok(())
    }

    fn prepare(&self, program: &Arc<Program>, _limits: Limits) -> Result<Box<dyn Plan>> {
        // Compile everything here: `submit` runs for every token.
        Ok(Box::new(TemplatePlan { program: program.clone(), submitted: 0 }))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        // `liveness` lets tensors share memory if their lifetimes do not overlap.
        crate::passes::liveness(program).bytes(limits.tokens, limits.outputs)
    }
}

/// A program ready to run.
struct TemplatePlan {
    program: Arc<Program>,
    submitted: u64,
}

impl TemplatePlan {
    /// Queues an op's commands. `prepare` rejects every op that `supports` declares as a gap.
    fn queue(&mut self, op: &Op) -> Result<()> {
        Err(error(&format!("{} is not implemented", op.name())))
    }
}

impl Plan for TemplatePlan {
    fn submit(
        &mut self,
        step: &Step<'_>,
        segments: Range<usize>,
        _bindings: &Bindings<'_>,
    ) -> Result<Ticket> {
        let program = self.program.clone();
        let ops = program.segments.get(segments).unwrap_or(&[]).iter().flat_map(|segment| &segment.ops);
        for op in ops {
            if step.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.queue(op)?;
        }
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, _ticket: Ticket) -> Result<Timing> {
        Ok(Timing::new(std::time::Duration::ZERO, Clock::Device))
    }
}

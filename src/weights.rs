//! Loads weights from a model file to a backend's buffers: imported if the device can read mapped pages,
//! otherwise copied, and streamed if copies do not fit.
//!
//! Streamed segments (layers) share a ring of [`RING`] sets of buffers, in turn. A segment's weights are
//! copied to its set right before the segment is submitted, while the device still runs the previous one. The
//! set's last user was submitted earlier, and devices execute submissions in order.
//!
//! Within a limit on the memory of a whole session, mapped pages count too. Weights that fit are then read into
//! memory, and a backend that can reads the others through a [`Stream`], some rows at a time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::backend::host::CHUNK_ROWS;
use crate::backend::{Backend, Buffer, Usage, upload};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::map::Region;
use crate::program::{Dim, Layout, Op, Program, Slot, Tensor, TensorId, part_as_stored};
use crate::stream::{self, Stream};

/// Number of sets of buffers that streamed segments share.
pub const RING: usize = 2;

/// A program's weights on a backend.
#[derive(Debug)]
pub struct Weights {
    /// One per tensor in `Program::weights`. Weights of streamed segments share buffers.
    pub buffers: Vec<Buffer>,
    /// Bytes that the device reads from the mapped file.
    pub mapped_bytes: u64,
    /// Bytes that stay on the device.
    pub copied_bytes: u64,
    /// Bytes copied to the device in every step, or read from the file by a step that uses all of them.
    pub streamed_bytes: u64,
    /// How a backend reads streamed weights by itself.
    pub stream: Option<Arc<Stream>>,
    /// For each segment, the slots of its streamed weights.
    streamed: Vec<Vec<usize>>,
}

/// Memory that weights may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// Bytes of copies on the device; mapped pages are free.
    Copies(u64),
    /// Bytes of everything: weights are not mapped.
    All(u64),
}

/// Which weights are streamed.
struct Placement {
    /// For each segment, the slots of its streamed weights.
    streamed: Vec<Vec<usize>>,
    /// The bytes of each buffer of a set.
    ring_bytes: Vec<u64>,
}

impl Weights {
    /// Loads the weights of `program` within a budget. Calls `progress` with the bytes loaded so far.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if what is needed at a time does not fit, [`Error::FileChanged`] if the file
    /// shrank, errors of the backend.
    pub fn load(
        gguf: &Gguf,
        program: &Program,
        backend: &dyn Backend,
        budget: Budget,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Weights> {
        gguf.verify()?;
        let bytes = |slot: usize| program.fixed_bytes(program.weights[slot]).unwrap_or(0);
        let (streamed, budget_bytes) = match budget {
            Budget::Copies(bytes) => (Streamed::default(), bytes),
            Budget::All(bytes) => {
                let streamed = match StreamPlan::of(program, backend, bytes) {
                    Some(plan) => Streamed::open(gguf, program, backend, &plan)?,
                    None => Streamed::default(),
                };
                let left = bytes.saturating_sub(streamed.memory_bytes());
                (streamed, left)
            }
        };
        let mut imported: Vec<Option<Buffer>> = Vec::new();
        for (slot, &id) in program.weights.iter().enumerate() {
            let region = stored(&find(gguf, program, id)?, program, id)?;
            imported.push(match (region, budget, streamed.buffers.get(&slot)) {
                (_, _, Some(buffer)) => Some(buffer.clone()),
                (Some(region), Budget::Copies(_), None) => backend.import(&region)?,
                // The program's own bytes take no more memory.
                (Some(region), Budget::All(_), None) if region.source().file().is_none() => {
                    backend.import(&region)?
                }
                _ => None,
            });
        }
        let copied: Vec<bool> = imported.iter().map(Option::is_none).collect();
        let placement = place(program, &copied, budget_bytes, &backend.caps().name)?;
        let alloc = |bytes| backend.alloc(bytes, Usage::Weight);
        let mut ring = Vec::new();
        for _ in 0..RING {
            ring.push(placement.ring_bytes.iter().map(|&n| alloc(n)).collect::<Result<Vec<_>>>()?);
        }
        let mut buffers: Vec<Option<Buffer>> = imported;
        let mut weights = Weights {
            buffers: Vec::new(),
            mapped_bytes: buffers.iter().flatten().map(Buffer::bytes).sum::<u64>() - streamed.bytes(),
            copied_bytes: 0,
            streamed_bytes: streamed.bytes(),
            stream: streamed.stream,
            streamed: placement.streamed,
        };
        for (turn, slots) in weights.streamed.iter().filter(|slots| !slots.is_empty()).enumerate() {
            for (buffer, &slot) in ring[turn % RING].iter().zip(slots) {
                buffers[slot] = Some(buffer.clone());
                weights.streamed_bytes += bytes(slot);
            }
        }
        for (slot, buffer) in buffers.into_iter().enumerate() {
            let buffer = match buffer {
                Some(buffer) => buffer,
                None => {
                    let buffer = alloc(bytes(slot))?;
                    copy(gguf, program, backend, slot, &buffer)?;
                    weights.copied_bytes += bytes(slot);
                    buffer
                }
            };
            weights.buffers.push(buffer);
            progress(weights.mapped_bytes + weights.copied_bytes);
        }
        Ok(weights)
    }

    /// Splits segments into runs. Only the first segment of a run has streamed weights, to load before the
    /// run.
    pub fn runs(&self, segments: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let streams = |s: usize| self.streamed.get(s).is_some_and(|slots| !slots.is_empty());
        let mut next = segments.start;
        std::iter::from_fn(move || {
            let start = next;
            if start >= segments.end {
                return None;
            }
            next = (start + 1..segments.end).find(|&s| streams(s)).unwrap_or(segments.end);
            Some(start..next)
        })
    }

    /// Copies a segment's streamed weights to the device.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_segment(
        &self,
        gguf: &Gguf,
        program: &Program,
        backend: &dyn Backend,
        segment: usize,
    ) -> Result<()> {
        for &slot in self.streamed.get(segment).into_iter().flatten() {
            copy(gguf, program, backend, slot, &self.buffers[slot])?;
        }
        Ok(())
    }
}

/// Minimum memory of a stream, as a share of the weights' budget: what is read ahead, and experts that stay.
const STREAM_SHARE: u64 = 8;
/// The largest chunk: a drive reads larger ones no faster.
const CHUNK_BYTES: u64 = 1 << 20;
const MIN_CHUNK_BYTES: u64 = 64 << 10;
/// The most to read ahead: more memory would not make a step faster.
const MOST_AHEAD_BYTES: u64 = 32 << 20;

/// Weights that a backend streams by itself.
#[derive(Default)]
struct Streamed {
    buffers: HashMap<usize, Buffer>,
    stream: Option<Arc<Stream>>,
}

/// Which weights a backend streams by itself, and the memory for what is read ahead.
#[derive(Debug, Default)]
pub(crate) struct StreamPlan {
    /// Slots of weights.
    chosen: Vec<usize>,
    /// Bytes of these weights.
    pub weight_bytes: u64,
    slots: u64,
    chunk_bytes: u64,
}

impl StreamPlan {
    /// Chooses the weights to stream so that everything fits `budget_bytes`. Tables of which steps read single
    /// rows are first, experts second: steps read few of them. `None` if all weights fit, or nothing helps.
    pub fn of(program: &Program, backend: &dyn Backend, budget_bytes: u64) -> Option<StreamPlan> {
        let bytes = |slot: usize| program.fixed_bytes(program.weights[slot]).unwrap_or(0);
        let all: u64 = (0..program.weights.len()).map(bytes).fold(0, u64::saturating_add);
        if all <= budget_bytes || !backend.caps().streams {
            return None;
        }
        let uses = uses(program);
        let mut order: Vec<usize> = (0..uses.len()).filter(|&slot| uses[slot] < Use::Whole).collect();
        // The last layers are streamed first: while the first ones run, they are read.
        order.sort_by_key(|&slot| (uses[slot], std::cmp::Reverse(slot)));
        let tables = order.iter().filter(|&&slot| uses[slot] == Use::Rows).count();
        let row_bytes = |slot: usize| {
            let weight = program.tensor(program.weights[slot]);
            weight.format.row_bytes(weight.cols as usize).unwrap_or(0) as u64
        };
        let experts = |slot: &usize| uses[*slot] == Use::Experts;
        // As few as possible, and all experts together, so that what is left keeps those in use.
        for count in tables..=order.len() {
            let chosen = &order[..count];
            if order.get(count).is_some_and(experts) {
                continue;
            }
            let resident = all - chosen.iter().map(|&slot| bytes(slot)).sum::<u64>();
            let products = chosen.iter().filter(|&&slot| uses[slot] > Use::Rows);
            let widest = products.map(|&slot| row_bytes(slot) * CHUNK_ROWS as u64).max().unwrap_or(0);
            let left = budget_bytes.saturating_sub(resident);
            if left == 0 || (widest > 0 && left < budget_bytes / STREAM_SHARE && count < order.len()) {
                continue;
            }
            let chunk = (left / 8).clamp(MIN_CHUNK_BYTES, CHUNK_BYTES).max(widest);
            let most = if chosen.iter().any(experts) { u64::MAX } else { MOST_AHEAD_BYTES / chunk };
            let slots = (left / stream::memory_bytes(1, chunk)).min(most.max(stream::MIN_SLOTS));
            if widest > 0 && slots < stream::MIN_SLOTS {
                continue;
            }
            let (chosen, weight_bytes) = (chosen.to_vec(), all - resident);
            return Some(StreamPlan { chosen, weight_bytes, slots, chunk_bytes: chunk });
        }
        None
    }

    /// Memory for what is read ahead, and for experts that stay.
    pub fn memory_bytes(&self) -> u64 {
        stream::memory_bytes(self.slots, self.chunk_bytes)
    }
}

impl Streamed {
    fn open(gguf: &Gguf, program: &Program, backend: &dyn Backend, plan: &StreamPlan) -> Result<Streamed> {
        let stream = Stream::new(plan.slots, plan.chunk_bytes)?;
        let mut buffers = HashMap::new();
        for &slot in &plan.chosen {
            let id = program.weights[slot];
            let Some(region) = stored(&find(gguf, program, id)?, program, id)? else { continue };
            // Bytes of the program's own are in memory anyway.
            let region = region.through(&stream);
            if region.stream().is_some()
                && let Some(buffer) = backend.import(&region)?
            {
                buffers.insert(slot, buffer);
            }
        }
        let stream = (!buffers.is_empty()).then_some(stream);
        Ok(Streamed { buffers, stream })
    }

    fn bytes(&self) -> u64 {
        self.buffers.values().map(Buffer::bytes).sum()
    }

    fn memory_bytes(&self) -> u64 {
        self.stream.as_ref().map_or(0, |stream| stream.memory_bytes())
    }
}

/// How ops use a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    /// Single rows, by index.
    Rows,
    /// Some of its matrices, chosen in the step.
    Experts,
    /// All rows, in order.
    Product,
    /// As a whole.
    Whole,
}

/// Returns how each weight is used.
fn uses(program: &Program) -> Vec<Use> {
    let mut uses = vec![None; program.weights.len()];
    for (_, op) in program.ops() {
        let of = |id: TensorId| match op {
            Op::Embed { table, .. } if *table == id => Use::Rows,
            Op::Experts { gate, up, down, .. } if [*gate, *up, *down].contains(&id) => Use::Experts,
            Op::MatMul { parts, .. } if parts.iter().any(|part| part.weight == id) => Use::Product,
            _ => Use::Whole,
        };
        op.inputs(&mut |id| {
            if let Slot::Weight(slot) = program.tensor(id).slot
                && let Some(used) = uses.get_mut(slot as usize)
            {
                *used = (*used).max(Some(of(id)));
            }
        });
    }
    uses.into_iter().map(|used| used.unwrap_or(Use::Whole)).collect()
}

/// Finds the file's tensor that contains a weight.
fn find<'a>(gguf: &'a Gguf, program: &Program, id: TensorId) -> Result<TensorInfo<'a>> {
    let weight = program.tensor(id);
    let name = weight.part.as_ref().map_or(&weight.name, |part| &part.of);
    gguf.tensor(name).ok_or_else(|| Error::Model(format!("tensor `{name}` is missing from the file")))
}

/// Returns a weight's bytes in the file, if they have the program's layout.
fn stored(tensor: &TensorInfo<'_>, program: &Program, id: TensorId) -> Result<Option<Region>> {
    let as_stored = tensor.record.layout == program.tensor(id).layout && lies_together(tensor, program, id);
    Ok(tensor.region()?.part(bytes_in_file(program, id)).filter(|_| as_stored))
}

/// Returns a weight's bytes with plain rows.
#[cfg(feature = "export")]
pub(crate) fn rows(gguf: &Gguf, program: &Program, id: TensorId) -> Result<Vec<u8>> {
    let plain = Tensor { layout: Layout::Rows, ..program.tensor(id).clone() };
    laid_out(&find(gguf, program, id)?, &plain, bytes_in_file(program, id))
}

/// Copies a weight to a buffer, in the program's layout.
fn copy(gguf: &Gguf, program: &Program, backend: &dyn Backend, slot: usize, to: &Buffer) -> Result<()> {
    let id = program.weights[slot];
    let tensor = find(gguf, program, id)?;
    match stored(&tensor, program, id)? {
        Some(region) => match region.mapped() {
            Some(bytes) => upload(backend, to, 0, bytes),
            None => {
                let (mut at, mut read) = (0, Ok(()));
                backend.fill(to, 0..region.len(), &mut |piece| {
                    if read.is_ok() {
                        read = region.read_at(at, piece);
                    }
                    at += piece.len() as u64;
                })?;
                read
            }
        },
        None => {
            let bytes = laid_out(&tensor, program.tensor(id), bytes_in_file(program, id))?;
            upload(backend, to, 0, &bytes)
        }
    }
}

/// Chooses the segments to stream: the last ones, as few as the budget allows. Weights that several segments
/// use stay on the device.
fn place(program: &Program, copied: &[bool], budget_bytes: u64, backend: &str) -> Result<Placement> {
    let bytes = |slot: usize| program.fixed_bytes(program.weights[slot]).unwrap_or(0);
    let mut users = vec![Vec::new(); program.weights.len()];
    for (segment, op) in program.ops() {
        op.inputs(&mut |id| {
            if let Slot::Weight(slot) = program.tensor(id).slot
                && let Some(users) = users.get_mut(slot as usize)
                && users.last() != Some(&segment)
            {
                users.push(segment);
            }
        });
    }
    let mut own = vec![Vec::new(); program.segments.len()];
    let mut shared = 0u64;
    for (slot, users) in users.iter().enumerate().filter(|&(slot, _)| copied[slot]) {
        match users[..] {
            [segment] => own[segment].push(slot),
            _ => shared = shared.saturating_add(bytes(slot)),
        }
    }
    let of = |slots: &Vec<usize>| slots.iter().map(|&slot| bytes(slot)).sum::<u64>();
    let mut need = 0;
    // Segments before `first` stay on the device.
    for first in (0..=own.len()).rev() {
        let (stay, stream) = own.split_at(first);
        let places = stream.iter().map(Vec::len).max().unwrap_or(0);
        let largest =
            |place: usize| stream.iter().filter_map(|slots| slots.get(place)).map(|&s| bytes(s)).max();
        let ring_bytes: Vec<u64> = (0..places).map(|place| largest(place).unwrap_or(0)).collect();
        need = shared
            .saturating_add(stay.iter().map(of).sum())
            .saturating_add(RING as u64 * ring_bytes.iter().sum::<u64>());
        if need <= budget_bytes {
            let streamed =
                own.iter().enumerate().map(|(i, slots)| if i < first { Vec::new() } else { slots.clone() });
            return Ok(Placement { streamed: streamed.collect(), ring_bytes });
        }
    }
    let what = format!("weights on `{backend}`, even streamed,");
    Err(Error::OutOfMemory { what, need_bytes: need, have_bytes: budget_bytes })
}

/// Returns the range of a weight's bytes in the file's tensor.
fn bytes_in_file(program: &Program, id: TensorId) -> Range<usize> {
    let weight = program.tensor(id);
    let blocks =
        weight.part.as_ref().map_or(0, |part| part.first_element as usize) / weight.format.block_len();
    let start = blocks * weight.format.block_bytes();
    start..start.saturating_add(program.fixed_bytes(id).unwrap_or(0) as usize)
}

/// Whether a weight is a contiguous range of the file's bytes.
fn lies_together(tensor: &TensorInfo<'_>, program: &Program, id: TensorId) -> bool {
    let weight = program.tensor(id);
    let (Some(part), Dim::Fixed(rows)) = (&weight.part, weight.rows) else { return true };
    if matrix_elements(tensor, weight).is_some() {
        return false;
    }
    let first = (part.first_element / u64::from(weight.cols.max(1))) as u32;
    let all = tensor.record.dims.get(1).copied().unwrap_or(1) as u32;
    part_as_stored(tensor.record.layout, first..first.saturating_add(rows), all)
}

/// The elements of one of the tensor's matrices, if the weight has some rows of each.
fn matrix_elements(tensor: &TensorInfo<'_>, weight: &Tensor) -> Option<usize> {
    let [cols, rows, experts] = [0, 1, 2].map(|i| tensor.record.dims.get(i).copied().unwrap_or(1));
    let is_part = matches!(weight.rows, Dim::Fixed(part) if u64::from(part) < rows);
    (experts > 1 && experts == u64::from(weight.experts) && is_part).then_some((cols * rows) as usize)
}

/// A weight's bytes, rearranged to the layout of the program.
fn laid_out(tensor: &TensorInfo<'_>, weight: &Tensor, range: Range<usize>) -> Result<Vec<u8>> {
    let region = tensor.region()?;
    let rows = match tensor.record.layout {
        Layout::Rows => region.load()?,
        Layout::Interleaved => Cow::Owned(tensor.rows()?),
    };
    let outside = || Error::Model(format!("weight `{}` is not inside its tensor", weight.name));
    let own = match matrix_elements(tensor, weight) {
        None => Cow::Borrowed(rows.get(range).ok_or_else(outside)?),
        Some(elements) => {
            let matrix = elements / weight.format.block_len() * weight.format.block_bytes();
            let each = range.len() / weight.experts.max(1) as usize;
            let mut own = Vec::with_capacity(range.len());
            for first in (0..weight.experts as usize).map(|expert| expert * matrix + range.start) {
                own.extend(rows.get(first..first + each).ok_or_else(outside)?);
            }
            Cow::Owned(own)
        }
    };
    let rows = &own[..];
    match weight.layout {
        Layout::Rows => Ok(own.into_owned()),
        Layout::Interleaved => {
            let mut out = Vec::with_capacity(rows.len());
            for matrix in rows.chunks_exact((rows.len() / weight.experts.max(1) as usize).max(1)) {
                let mut lanes = vec![0; matrix.len()];
                let wrong = |e| Error::Model(format!("weight `{}`: {e}", weight.name));
                weight.format.interleave(weight.cols as usize, matrix, &mut lanes).map_err(wrong)?;
                out.extend(lanes);
            }
            Ok(out)
        }
    }
}

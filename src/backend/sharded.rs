//! Several devices as one: they share each layer, and the results have the bits of one device.
//!
//! [`shard`] divides a program; this backend runs each share on its device and copies what they exchange through the
//! host. Weights and KV heads are divided, so each device holds its part of them. For systems of simulated chips, and
//! for models that are too large for one device.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::energy::Energy;
use super::{
    Backend, Bindings, Buffer, Caps, Clock, Limits, OpSig, Plan, Step, Support, Ticket, Timing, Usage,
    check_step, prepare, upload,
};
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::map::Region;
use crate::memory::zeroed;
use crate::passes;
use crate::program::{PAGE_POSITIONS, Program, State, TensorId};
use crate::shard::{self, Division, Exchange, ExchangeKind, Share, WeightPart};

/// What connects simulated devices: it tells the time of an exchange.
pub trait Link: Send + Sync {
    /// Returns the seconds in which all `devices` devices exchange a tensor of `bytes` bytes, counted whole.
    fn exchange_s(&self, kind: ExchangeKind, bytes: u64, devices: u32) -> f64;
}

/// Devices that share each layer.
pub struct Sharded {
    devices: Arc<Devices>,
    caps: Caps,
}

struct Devices {
    all: Vec<Arc<dyn Backend>>,
    link: Option<Arc<dyn Link>>,
    name: String,
    /// What every device does alike, of the last program.
    repeated: Mutex<Vec<String>>,
}

impl Sharded {
    /// Joins devices of the same kind. With a simulated clock, `link` adds the time of exchanges; without one, they
    /// take none.
    ///
    /// # Errors
    /// [`Error::Argument`] for no devices.
    pub fn new(devices: Vec<Arc<dyn Backend>>, link: Option<Arc<dyn Link>>) -> Result<Sharded> {
        let Some(first) = devices.first() else {
            return Err(Error::argument("devices", "at least one", "none"));
        };
        let count = devices.len();
        let one = first.caps();
        let memory = devices.iter().fold(0u64, |sum, d| sum.saturating_add(d.caps().memory_bytes));
        let caps = Caps::new(format!("{} x{count}", one.name), format!("{count} of: {}", one.device))
            .memory_bytes(memory)
            .rows(one.rows)
            .contract(one.contract);
        let name = caps.name.clone();
        Ok(Sharded {
            devices: Arc::new(Devices { all: devices, link, name, repeated: Mutex::default() }),
            caps,
        })
    }
}

impl Devices {
    fn count(&self) -> u32 {
        self.all.len() as u32
    }

    fn divided<'a>(&self, buffer: &'a Buffer) -> Result<&'a Divided> {
        let wrong = || Error::Backend {
            backend: self.name.clone(),
            message: "a buffer of another backend was passed".into(),
        };
        buffer.memory().ok_or_else(wrong)
    }
}

/// A buffer of all devices.
struct Divided {
    bytes: u64,
    usage: Usage,
    /// Of imported weights.
    pages: Option<Region>,
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    /// The bytes that were written before it was known how devices divide them, and of weights without pages.
    written: Option<Vec<u8>>,
    /// Parts of a weight on devices: by device and range of bytes.
    parts: HashMap<(usize, u64, u64), Buffer>,
    /// Of states and of inputs and outputs, the buffer of each device.
    each: Vec<Buffer>,
    /// How the pages of a state are divided, once a program has used it.
    pages: Option<Pages>,
}

impl Divided {
    fn buffer(bytes: u64, usage: Usage, pages: Option<Region>) -> Buffer {
        Buffer::new(bytes, Divided { bytes, usage, pages, content: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a part of a weight on a device.
    fn part(&self, devices: &Devices, device: usize, range: Range<u64>) -> Result<Buffer> {
        let mut content = self.lock();
        let key = (device, range.start, range.end);
        if let Some(buffer) = content.parts.get(&key) {
            return Ok(buffer.clone());
        }
        let outside = || Error::argument("weight", format!("at least {} bytes", range.end), self.bytes);
        let places = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let places = places.map(|(start, end)| start..end).ok_or_else(outside)?;
        let backend = &devices.all[device];
        let pages = match &self.pages {
            Some(pages) => Some(pages.part(places.clone()).ok_or_else(outside)?),
            None => None,
        };
        let imported = match &pages {
            Some(pages) => backend.import(pages)?,
            None => None,
        };
        let buffer = match (imported, &pages, &content.written) {
            (Some(imported), ..) => imported,
            (None, pages, written) => {
                let buffer = backend.alloc(range.end - range.start, Usage::Weight)?;
                if let Some(pages) = pages {
                    upload(&**backend, &buffer, 0, &pages.load()?)?;
                } else if let Some(written) = written {
                    upload(&**backend, &buffer, 0, written.get(places).ok_or_else(outside)?)?;
                }
                buffer
            }
        };
        content.parts.insert(key, buffer.clone());
        Ok(buffer)
    }

    /// Returns the buffers of a state on all devices. At the first use, it takes the program's division.
    fn state(&self, devices: &Devices, pages: &Pages) -> Result<Vec<Buffer>> {
        let mut content = self.lock();
        if let Some(known) = &content.pages {
            if known != pages {
                return Err(Error::argument("state", "a cache of this program", "one of another shape"));
            }
            return Ok(content.each.clone());
        }
        let bytes = self.bytes / u64::from(pages.parts);
        let each = devices.all.iter().map(|d| d.alloc(bytes, Usage::State)).collect::<Result<Vec<_>>>()?;
        if let Some(written) = content.written.take() {
            pages.pieces(0..self.bytes, &mut |piece| {
                let Some(bytes) = written.get(piece.whole.start as usize..piece.whole.end as usize) else {
                    return Ok(());
                };
                piece.write(devices, &each, pages.parts, bytes)
            })?;
        }
        content.each = each.clone();
        content.pages = Some(pages.clone());
        Ok(each)
    }
}

/// The layout of a state's pages, whole and divided: runs of bytes that each have the same share of every KV head.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pages {
    /// Bytes of the runs of a whole page: codes of keys and of values, then their scales.
    runs: Vec<u64>,
    /// The number of parts.
    parts: u32,
}

/// Consecutive bytes of a whole state that one part of it has.
struct Piece {
    /// The bytes of the whole.
    whole: Range<u64>,
    /// The part, and the first byte in it.
    part: u32,
    at: u64,
}

impl Pages {
    fn of(state: &State, parts: u32) -> Pages {
        let scale_bytes = if state.format.block_len() > 1 { 2 } else { 0 };
        let blocks = |dim: u32| {
            let elements = u64::from(state.kv_heads) * u64::from(dim) * u64::from(PAGE_POSITIONS);
            elements / state.format.block_len() as u64
        };
        let code_bytes = state.format.block_bytes() as u64 - scale_bytes;
        let dims = [state.key_dim, state.value_dim];
        let codes = dims.map(|dim| blocks(dim) * code_bytes);
        let scales = dims.map(|dim| blocks(dim) * scale_bytes);
        Pages { runs: codes.into_iter().chain(scales).filter(|&bytes| bytes > 0).collect(), parts }
    }

    /// Calls `f` with the pieces of a range of the whole, in order.
    fn pieces(&self, range: Range<u64>, f: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        let page_bytes: u64 = self.runs.iter().sum();
        let parts = u64::from(self.parts);
        let mut at = range.start;
        while at < range.end {
            let (page, within) = (at / page_bytes, at % page_bytes);
            let mut start = 0;
            let run = self.runs.iter().find(|&&bytes| {
                let found = within < start + bytes;
                start += if found { 0 } else { bytes };
                found
            });
            let Some(run) = run else { return Ok(()) };
            let each = run / parts;
            let (part, offset) = ((within - start) / each, (within - start) % each);
            let end = range.end.min(at + each - offset);
            let first = page * (page_bytes / parts) + start / parts + offset;
            f(Piece { whole: at..end, part: part as u32, at: first })?;
            at = end;
        }
        Ok(())
    }
}

impl Piece {
    /// The devices that have the part.
    fn devices(&self, count: u32, parts: u32) -> Range<usize> {
        let each = count / parts;
        (self.part * each) as usize..((self.part + 1) * each) as usize
    }

    fn write(&self, devices: &Devices, each: &[Buffer], parts: u32, bytes: &[u8]) -> Result<()> {
        for device in self.devices(devices.count(), parts) {
            upload(&*devices.all[device], &each[device], self.at, bytes)?;
        }
        Ok(())
    }
}

impl Backend for Sharded {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        self.devices.all[0].supports(sig)
    }

    fn explain(&self, sig: &OpSig<'_>, tokens: u32) -> String {
        self.devices.all[0].explain(sig, tokens)
    }

    fn report(&self) -> Vec<String> {
        let of = |(n, device): (usize, &Arc<dyn Backend>)| {
            device.report().into_iter().map(move |line| format!("device {n}: {line}"))
        };
        let repeated = self.devices.repeated.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match repeated.is_empty() {
            true => "not divided: nothing".to_owned(),
            false => {
                format!("not divided, each of {} does it: {}", self.devices.count(), repeated.join("; "))
            }
        };
        std::iter::once(line).chain(self.devices.all.iter().enumerate().flat_map(of)).collect()
    }

    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer> {
        if bytes > self.caps.memory_bytes {
            return Err(Error::OutOfMemory {
                what: format!("a buffer on {}", self.devices.name),
                need_bytes: bytes,
                have_bytes: self.caps.memory_bytes,
            });
        }
        let buffer = Divided::buffer(bytes, usage, None);
        if usage == Usage::Io {
            let each = self.devices.all.iter().map(|device| device.alloc(bytes, usage));
            self.devices.divided(&buffer)?.lock().each = each.collect::<Result<_>>()?;
        }
        Ok(buffer)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        Ok(Some(Divided::buffer(region.len(), Usage::Weight, Some(region.clone()))))
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let divided = self.devices.divided(dst)?;
        let count = range.end.saturating_sub(range.start);
        if range.end > divided.bytes || divided.pages.is_some() {
            let expected = format!("a range within {} bytes that were allocated", divided.bytes);
            return Err(Error::argument("range", expected, format!("{range:?}")));
        }
        let mut bytes: Vec<u8> = zeroed(count, "bytes for several devices")?;
        write(&mut bytes);
        let mut content = divided.lock();
        if divided.usage == Usage::Io {
            for (device, buffer) in self.devices.all.iter().zip(&content.each) {
                upload(&**device, buffer, range.start, &bytes)?;
            }
            return Ok(());
        }
        if let Some(pages) = &content.pages {
            return pages.pieces(range.clone(), &mut |piece| {
                let from =
                    (piece.whole.start - range.start) as usize..(piece.whole.end - range.start) as usize;
                piece.write(&self.devices, &content.each, pages.parts, &bytes[from])
            });
        }
        content.parts.clear();
        let mut written = match content.written.take() {
            Some(written) => written,
            None => zeroed(divided.bytes, "bytes for several devices")?,
        };
        written[range.start as usize..range.end as usize].copy_from_slice(&bytes);
        content.written = Some(written);
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let divided = self.devices.divided(src)?;
        let end = offset.saturating_add(dst.len() as u64);
        if end > divided.bytes {
            let found = format!("{offset}..{end}");
            return Err(Error::argument("range", format!("within {} bytes", divided.bytes), found));
        }
        let content = divided.lock();
        let places = offset as usize..end as usize;
        if let Some(pages) = &content.pages {
            return pages.pieces(offset..end, &mut |piece| {
                let device = piece.devices(self.devices.count(), pages.parts).start;
                let to = (piece.whole.start - offset) as usize..(piece.whole.end - offset) as usize;
                self.devices.all[device].read(&content.each[device], piece.at, &mut dst[to])
            });
        }
        if let (Some(device), Some(buffer)) = (self.devices.all.first(), content.each.first()) {
            return device.read(buffer, offset, dst);
        }
        if let Some(pages) = &divided.pages {
            return pages.read_at(offset, dst);
        }
        match content.written.as_ref().and_then(|written| written.get(places)) {
            Some(written) => dst.copy_from_slice(written),
            None => dst.fill(0),
        }
        Ok(())
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let division = Division::over(self.devices.count());
        let mut shares = Vec::new();
        for (n, device) in self.devices.all.iter().enumerate() {
            let share = shard::share(program, division, n as u32)?;
            let own = Arc::new(passes::fuse(&share.program, device.caps().fusions));
            let plan = prepare(&**device, &own, limits)?;
            // Exchanged tensors live in buffers of the plan; the caller's are bound.
            let between = own.io.iter().map(|id| {
                let t = own.tensor(*id);
                let bytes = 4 * passes::rows(t.rows, limits.tokens, limits.outputs) * u64::from(t.cols);
                let is_bound = share.io.contains(id);
                (!is_bound).then(|| device.alloc(bytes, Usage::Io)).transpose()
            });
            let between = between.collect::<Result<Vec<_>>>()?;
            shares.push(Held { share, plan, between, elapsed: Duration::ZERO });
        }
        if let Some(first) = shares.first() {
            let mut repeated = self.devices.repeated.lock().unwrap_or_else(PoisonError::into_inner);
            repeated.clone_from(&first.share.repeated);
        }
        let most = shares.first().map_or(0, |held| held.most_bytes(limits));
        let staging =
            [zeroed(most, "exchanges between devices")?, zeroed(most, "exchanges between devices")?];
        let pages = shares.first().map_or(&[][..], |held| &held.share.state_parts);
        let pages = program.states.iter().zip(pages).map(|(state, &parts)| Pages::of(state, parts)).collect();
        Ok(Box::new(ShardedPlan {
            devices: self.devices.clone(),
            program: program.clone(),
            limits,
            shares,
            pages,
            staging,
            submitted: 0,
            timing: Timing::new(Duration::ZERO, Clock::Host),
        }))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        // An upper bound: each device as if it ran everything.
        let of = |device: &Arc<dyn Backend>| device.scratch_bytes(program, limits);
        self.devices.all.iter().map(of).fold(0, u64::saturating_add)
    }
}

/// A device's share, prepared.
struct Held {
    share: Share,
    plan: Box<dyn Plan>,
    /// For each input or output slot of the share, its buffer if the caller does not bind it.
    between: Vec<Option<Buffer>>,
    /// Of the step so far.
    elapsed: Duration,
}

impl Held {
    /// The most bytes that an exchange moves.
    fn most_bytes(&self, limits: Limits) -> u64 {
        let program = &self.share.program;
        let whole = self.share.exchanges.iter().flat_map(|exchange| [exchange.from, exchange.to]).map(|id| {
            let t = program.tensor(id);
            4 * passes::rows(t.rows, limits.tokens, limits.outputs) * u64::from(t.cols)
        });
        whole.max().unwrap_or(0)
    }
}

struct ShardedPlan {
    devices: Arc<Devices>,
    program: Arc<Program>,
    limits: Limits,
    shares: Vec<Held>,
    /// How each state is divided.
    pages: Vec<Pages>,
    /// Memory for a whole tensor and for a part of it.
    staging: [Vec<u8>; 2],
    submitted: u64,
    timing: Timing,
}

/// The buffers of a share for a submission.
struct Bound {
    weights: Vec<Buffer>,
    states: Vec<Buffer>,
    io: Vec<Buffer>,
}

impl ShardedPlan {
    fn bind(&self, device: usize, bindings: &Bindings<'_>) -> Result<Bound> {
        let held = &self.shares[device];
        let missing = |what: &'static str, n: usize| {
            move || Error::argument("bindings", format!("a buffer for {what} {n}"), "none")
        };
        let weights = held.share.weights.iter().map(|WeightPart { weight, bytes }| {
            let buffer = bindings.weights.get(*weight).ok_or_else(missing("weight", *weight))?;
            let bytes = bytes.clone().ok_or_else(|| Error::Backend {
                backend: self.devices.name.clone(),
                message: "a part of a weight that is not consecutive".into(),
            })?;
            self.devices.divided(buffer)?.part(&self.devices, device, bytes)
        });
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let states = self.pages.iter().enumerate().map(|(n, pages)| {
            let buffer = bindings.states.get(n).ok_or_else(missing("state", n))?;
            let each = self.devices.divided(buffer)?.state(&self.devices, pages)?;
            each.get(device).cloned().ok_or_else(missing("state", n))
        });
        let states = states.collect::<Result<Vec<_>>>()?;
        let io = held.share.program.io.iter().zip(&held.between).map(|(id, own)| {
            if let Some(own) = own {
                return Ok(own.clone());
            }
            let n = held.share.io.iter().position(|bound| bound == id).unwrap_or(usize::MAX);
            let buffer = bindings.io.get(n).ok_or_else(missing("tensor", n))?;
            let content = self.devices.divided(buffer)?.lock();
            content.each.get(device).cloned().ok_or_else(missing("tensor", n))
        });
        Ok(Bound { weights, states, io: io.collect::<Result<Vec<_>>>()? })
    }

    /// Makes an exchange, and returns its seconds on a simulated link.
    fn exchange(&mut self, exchange: Exchange, step: &Step<'_>, bound: &[Bound]) -> Result<f64> {
        let Exchange { kind, from, to, parts, .. } = exchange;
        let share = &self.shares[0].share;
        let (count, devices) = (self.devices.count(), &self.devices.all);
        let t = share.program.tensor(to);
        let rows = passes::rows(t.rows, step.tokens.len() as u32, step.outputs.len() as u32) as usize;
        let bytes_of = |id: TensorId| 4 * share.program.tensor(id).cols as usize;
        let place = |id: TensorId| share.program.io.iter().position(|slot| *slot == id).unwrap_or(usize::MAX);
        let (source, target) = (place(from), place(to));
        let (part_row, row) = (bytes_of(from), bytes_of(to));
        let [whole, part] = &mut self.staging;
        match kind {
            ExchangeKind::Gather => {
                let whole = &mut whole[..rows * row];
                for p in 0..parts {
                    let device = (p * (count / parts)) as usize;
                    let part = &mut part[..rows * part_row];
                    devices[device].read(&bound[device].io[source], 0, part)?;
                    let at = p as usize * part_row;
                    for (to, from) in whole.chunks_mut(row).zip(part.chunks(part_row)) {
                        to[at..at + part_row].copy_from_slice(from);
                    }
                }
                for (device, bound) in devices.iter().zip(bound) {
                    upload(&**device, &bound.io[target], 0, whole)?;
                }
            }
            ExchangeKind::Take => {
                // Here the whole is the source.
                for (n, (device, bound)) in devices.iter().zip(bound).enumerate() {
                    let whole = &mut whole[..rows * part_row];
                    device.read(&bound.io[source], 0, whole)?;
                    let at = n / (count / parts) as usize * row;
                    let part = &mut part[..rows * row];
                    for (to, from) in part.chunks_mut(row).zip(whole.chunks(part_row)) {
                        to.copy_from_slice(&from[at..at + row]);
                    }
                    upload(&**device, &bound.io[target], 0, part)?;
                }
            }
            ExchangeKind::Sum => {
                return Err(Error::Backend {
                    backend: self.devices.name.clone(),
                    message: "sums over devices are timed, not computed".into(),
                });
            }
        }
        let link = self.devices.link.as_ref();
        Ok(link.map_or(0.0, |link| link.exchange_s(kind, (rows * row) as u64, count)))
    }
}

impl Plan for ShardedPlan {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        let start = Instant::now();
        check_step(step, &self.program, self.limits, bindings.states)?;
        let all = self.program.segments.len();
        if segments.start > segments.end || segments.end > all {
            return Err(Error::argument("segments", format!("within 0..{all}"), format!("{segments:?}")));
        }
        let from_start = segments.start == 0;
        let share = &self.shares[0].share;
        let own = share.segments.get(segments).unwrap_or_default();
        let own = own.first().map_or(0, |s| s.start)..own.last().map_or(0, |s| s.end);
        let exchanges: Vec<Exchange> =
            share.exchanges.iter().filter(|exchange| own.contains(&exchange.before)).copied().collect();
        let bound = (0..self.shares.len()).map(|n| self.bind(n, bindings)).collect::<Result<Vec<_>>>()?;
        let (mut simulated_s, mut energy) = (0.0, None);
        let mut clock = Clock::Host;
        let mut at = own.start;
        let mut exchanges = exchanges.into_iter().peekable();
        while at < own.end {
            while let Some(exchange) = exchanges.next_if(|exchange| exchange.before == at) {
                simulated_s += self.exchange(exchange, step, &bound)?;
            }
            let end = exchanges.peek().map_or(own.end, |exchange| exchange.before);
            // All devices start before the first is waited for.
            let mut tickets = Vec::new();
            for (held, bound) in self.shares.iter_mut().zip(&bound) {
                let Bound { weights, states, io } = bound;
                tickets.push(held.plan.submit(step, at..end, &Bindings { weights, states, io })?);
            }
            let mut longest = Duration::ZERO;
            for (held, ticket) in self.shares.iter_mut().zip(tickets) {
                let timing = held.plan.wait(ticket)?;
                let before = if at == 0 { Duration::ZERO } else { held.elapsed };
                longest = longest.max(timing.elapsed.saturating_sub(before));
                held.elapsed = timing.elapsed;
                clock = timing.clock;
                // A plan's energy is that of its step so far; that of the last run counts.
                if end == own.end {
                    energy = Energy::sum(energy, timing.energy);
                }
            }
            simulated_s += longest.as_secs_f64();
            at = end;
        }
        let elapsed = match clock {
            Clock::Simulated => Duration::from_secs_f64(simulated_s),
            _ => start.elapsed(),
        };
        let clock = if clock == Clock::Simulated { clock } else { Clock::Host };
        let before = if from_start { Duration::ZERO } else { self.timing.elapsed };
        self.timing = Timing::new(before + elapsed, clock).energy(energy);
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

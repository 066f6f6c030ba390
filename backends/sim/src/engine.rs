//! The event engine: simulates the time of lowered ops.
//!
//! Each queue of each tile executes its commands in order, as waits allow. A DMA queue has several requests
//! in flight, so that the setup of one overlaps the transfer of another. All transfers share the bandwidth of
//! device memory equally; each is at most as fast as its engine. A signal takes the profile's time to arrive.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::chip::Chip;
use super::places::{Tier, Traffic};
use super::tile::{Action, Command, Lowered, Piece, Queue, Step, TileProgram, Work};

/// Energy by what takes it, in joules.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Joules {
    /// Operations of matrix and vector units.
    pub compute: f64,
    /// Bytes into and out of scratchpads.
    pub scratchpad: f64,
    /// Bytes of device memory.
    pub device: f64,
    /// Bytes over links to other chips.
    pub links: f64,
    /// Power of idle hardware over the time.
    pub idle: f64,
}

impl Joules {
    /// Each with its name.
    pub fn named(&self) -> [(&'static str, f64); 5] {
        [
            ("compute", self.compute),
            ("scratchpad", self.scratchpad),
            ("memory", self.device),
            ("links", self.links),
            ("idle", self.idle),
        ]
    }

    /// All together.
    pub fn total(&self) -> f64 {
        self.named().iter().map(|(_, joules)| joules).sum()
    }
}

impl std::ops::Add for Joules {
    type Output = Joules;

    fn add(self, other: Joules) -> Joules {
        Joules {
            compute: self.compute + other.compute,
            scratchpad: self.scratchpad + other.scratchpad,
            device: self.device + other.device,
            links: self.links + other.links,
            idle: self.idle + other.idle,
        }
    }
}

impl std::ops::Mul<Joules> for f64 {
    type Output = Joules;

    fn mul(self, joules: Joules) -> Joules {
        Joules {
            compute: self * joules.compute,
            scratchpad: self * joules.scratchpad,
            device: self * joules.device,
            links: self * joules.links,
            idle: self * joules.idle,
        }
    }
}

/// The time of an op. Busy times are those of the busiest tile of each phase.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct OpTime {
    /// Seconds from start to end.
    pub seconds: f64,
    /// Seconds of these for the launch and for barriers.
    pub launch_s: f64,
    /// Seconds that queues were busy, by [`Queue`].
    pub busy_s: [f64; 4],
    /// Seconds of the busiest tile's engines for their bytes, without waits for memory.
    pub engine_s: f64,
    /// Seconds of device memory for the bytes, at its full rate.
    pub device_s: f64,
    /// Bytes read from device memory.
    pub read_bytes: f64,
    /// Bytes written to device memory.
    pub written_bytes: f64,
    /// Bytes into and out of scratchpads.
    pub scratch_bytes: f64,
    /// Bytes of the tensors that chips exchange.
    pub exchanged_bytes: f64,
    /// Operations of products; a multiply-add is two.
    pub matrix_ops: f64,
    /// Energy of operations and moved bytes, without idle power; absent if the profile lacks the numbers.
    pub joules: Option<Joules>,
}

/// The bound of an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bound {
    /// The matrix unit.
    Matrix,
    /// The vector unit.
    Vector,
    /// The bandwidth of device memory.
    Memory,
    /// A tile's DMA engines.
    Dma,
    /// Launches and barriers.
    Launch,
    /// Links to other chips.
    Links,
    /// None of these: waits between queues.
    Latency,
}

impl Bound {
    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Matrix => "matrix",
            Bound::Vector => "vector",
            Bound::Memory => "memory",
            Bound::Dma => "dma",
            Bound::Launch => "launch",
            Bound::Links => "links",
            Bound::Latency => "latency",
        }
    }
}

impl OpTime {
    /// No time, and no energy.
    pub fn none() -> OpTime {
        OpTime { joules: Some(Joules::default()), ..OpTime::default() }
    }

    /// Time in which the chip waits for its host.
    pub(crate) fn of_host(seconds: f64) -> OpTime {
        OpTime { seconds, launch_s: seconds, ..OpTime::none() }
    }

    /// Returns the share of the time that each resource was busy, the busiest first.
    pub fn shares(&self) -> [(Bound, f64); 5] {
        let mut shares = [
            (Bound::Matrix, self.busy_s[Queue::Matrix as usize]),
            (Bound::Vector, self.busy_s[Queue::Vector as usize]),
            (Bound::Memory, self.device_s),
            (Bound::Dma, self.engine_s),
            (Bound::Launch, self.launch_s),
        ];
        for share in &mut shares {
            share.1 = if self.seconds > 0.0 { share.1 / self.seconds } else { 0.0 };
        }
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares
    }

    /// Returns the bound: the busiest resource, if it is busy at least half of the time.
    pub fn bound(&self) -> Bound {
        if self.exchanged_bytes > 0.0 {
            return Bound::Links;
        }
        let [(bound, share), ..] = self.shares();
        if share >= 0.5 { bound } else { Bound::Latency }
    }

    /// One after the other.
    pub fn then(self, next: OpTime) -> OpTime {
        OpTime {
            seconds: self.seconds + next.seconds,
            launch_s: self.launch_s + next.launch_s,
            busy_s: std::array::from_fn(|i| self.busy_s[i] + next.busy_s[i]),
            engine_s: self.engine_s + next.engine_s,
            device_s: self.device_s + next.device_s,
            read_bytes: self.read_bytes + next.read_bytes,
            written_bytes: self.written_bytes + next.written_bytes,
            scratch_bytes: self.scratch_bytes + next.scratch_bytes,
            exchanged_bytes: self.exchanged_bytes + next.exchanged_bytes,
            matrix_ops: self.matrix_ops + next.matrix_ops,
            joules: self.joules.zip(next.joules).map(|(a, b)| a + b),
        }
    }
}

/// An interval in which a queue was busy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Busy {
    /// The tile.
    pub tile: u32,
    /// The queue.
    pub queue: Queue,
    /// The work.
    pub what: &'static str,
    /// Start, in seconds from the start of the op.
    pub start_s: f64,
    /// End, in seconds from the start of the op.
    pub end_s: f64,
}

/// Simulates the time of an op; `trace` receives the busy intervals of each queue.
pub fn time(chip: &Chip, lowered: &Lowered, mut trace: Option<&mut Vec<Busy>>) -> OpTime {
    let mut total = OpTime::none();
    let mut compute_pj = Some(0.0);
    let mut traffic = Traffic::default();
    total.launch_s = chip.launch_s() + chip.barrier_s() * lowered.phases.len() as f64;
    total.seconds = chip.launch_s();
    for programs in &lowered.phases {
        let mut phase = Phase::new(chip, programs, total.seconds, trace.as_deref_mut());
        phase.run();
        total.seconds += phase.end_s + chip.barrier_s();
        let busiest = |queue: usize| phase.tiles.iter().map(|t| t.busy_s[queue]).fold(0.0, f64::max);
        let busy: [f64; 4] = std::array::from_fn(busiest);
        for (total, busy) in total.busy_s.iter_mut().zip(busy) {
            *total += busy;
        }
        total.engine_s += phase.tiles.iter().flat_map(|t| t.engine_s).fold(0.0, f64::max);
        for program in programs {
            count(chip, program, &mut total, &mut traffic, &mut compute_pj);
        }
    }
    total.device_s = chip.memory_s(&traffic);
    total.joules = compute_pj.zip(chip.places().pj(&traffic)).map(|(compute, device)| {
        let each = chip.scratchpad().pj_per_byte.as_ref().map_or(0.0, |pj| pj.value);
        let scratchpad = each * total.scratch_bytes;
        1e-12 * Joules { compute, scratchpad, device, ..Joules::default() }
    });
    total
}

/// Adds a program's bytes and operations, and the picojoules of these.
fn count(
    chip: &Chip,
    program: &TileProgram,
    total: &mut OpTime,
    traffic: &mut Traffic,
    compute_pj: &mut Option<f64>,
) {
    let mut held = vec![0u64; program.slots.len()];
    for command in &program.commands {
        match &command.action {
            Action::Load { from, to, at, sharers } => {
                let bytes = chip.memory_bytes(from) / f64::from(chip.multicast(*sharers));
                traffic.read = traffic.read.with(from.data, bytes);
                total.read_bytes += bytes;
                total.scratch_bytes += from.bytes() as f64;
                held[*to as usize] = u64::from(*at) + from.bytes();
            }
            Action::Store { to, .. } => {
                traffic.written = traffic.written.with(to.data, chip.memory_bytes(to));
                total.written_bytes += chip.memory_bytes(to);
                total.scratch_bytes += to.bytes() as f64;
            }
            Action::Compute { work, reads, writes, .. } => {
                for &(slot, bytes) in writes {
                    held[slot as usize] = bytes.into();
                    total.scratch_bytes += f64::from(bytes);
                }
                let read: u64 = reads.iter().map(|&slot| held[slot as usize]).sum();
                total.scratch_bytes += read as f64;
                if let Work::Matrix { m, n, k, sums_bytes, .. } = work {
                    total.scratch_bytes += *sums_bytes as f64;
                    total.matrix_ops += 2.0 * f64::from(*m) * f64::from(*n) * f64::from(*k);
                }
                *compute_pj = compute_pj.zip(chip.compute_pj(*work)).map(|(a, b)| a + b);
            }
        }
    }
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A unit can take its next command.
    Free { tile: u32, queue: Queue },
    /// A command's results are available.
    Signals { tile: u32, command: u32 },
    /// A request of a DMA queue is set up.
    Ready { tile: u32, queue: Queue },
    /// A transfer has ended.
    Moved { tile: u32, queue: Queue },
}

/// Positive floats are ordered as their bits.
type When = u64;

struct TileState<'a> {
    program: &'a TileProgram,
    semaphores: Vec<u32>,
    /// Commands still to come, by queue.
    queues: [VecDeque<u32>; 4],
    /// Whether the unit or engine is busy.
    busy: [bool; 4],
    /// Requests in flight: the end of each setup, and the command.
    requests: [VecDeque<(f64, u32)>; 4],
    busy_s: [f64; 4],
    /// Seconds of the engines for their bytes, without waits for memory.
    engine_s: [f64; 4],
}

/// A transfer in flight.
#[derive(Debug, Clone, Copy)]
struct Flow {
    tile: u32,
    queue: Queue,
    /// The time at which its engine is done.
    engine_end_s: f64,
    /// Memories that still deliver.
    left: u32,
}

/// A memory outside of the tiles, at an equal share for each transfer.
struct Server {
    bytes_per_s: f64,
    /// Bytes served per transfer since the start, and until when.
    served: f64,
    served_at_s: f64,
    /// The count of served bytes at which each transfer ends.
    flows: BinaryHeap<Reverse<(When, u32)>>,
}

impl Server {
    /// Advances the count of served bytes to a time.
    fn serve(&mut self, now_s: f64) {
        if !self.flows.is_empty() {
            let rate = self.bytes_per_s / self.flows.len() as f64;
            self.served += (now_s - self.served_at_s) * rate;
        }
        self.served_at_s = now_s;
    }

    /// Returns when the next transfer ends.
    fn next_s(&self) -> Option<f64> {
        let Reverse((count, _)) = self.flows.peek()?;
        let left = f64::from_bits(*count) - self.served;
        Some(self.served_at_s + left.max(0.0) * self.flows.len() as f64 / self.bytes_per_s)
    }
}

struct Phase<'a, 't> {
    chip: &'a Chip,
    tiles: Vec<TileState<'a>>,
    now_s: f64,
    end_s: f64,
    events: BinaryHeap<Reverse<(When, u32, Event)>>,
    sequence: u32,
    /// As [`super::places::Places::tiers`].
    servers: Vec<Server>,
    flow: Vec<Flow>,
    queue_entries: usize,
    /// Of the chip: bytes per second of an engine, seconds of a signal.
    engine_bytes_per_s: f64,
    semaphore_s: f64,
    start_s: f64,
    trace: Option<&'t mut Vec<Busy>>,
}

fn when(time: f64) -> When {
    time.max(0.0).to_bits()
}

impl<'a, 't> Phase<'a, 't> {
    fn new(
        chip: &'a Chip,
        programs: &'a [TileProgram],
        start_s: f64,
        trace: Option<&'t mut Vec<Busy>>,
    ) -> Phase<'a, 't> {
        let state = |program: &'a TileProgram| {
            let mut queues: [VecDeque<u32>; 4] = Default::default();
            for (i, command) in program.commands.iter().enumerate() {
                queues[command.queue as usize].push_back(i as u32);
            }
            TileState {
                program,
                semaphores: vec![0; program.semaphores as usize],
                queues,
                busy: [false; 4],
                requests: Default::default(),
                busy_s: [0.0; 4],
                engine_s: [0.0; 4],
            }
        };
        let server = |tier: &Tier| Server {
            bytes_per_s: tier.bytes_per_s,
            served: 0.0,
            served_at_s: 0.0,
            flows: BinaryHeap::new(),
        };
        Phase {
            chip,
            tiles: programs.iter().map(state).collect(),
            now_s: 0.0,
            end_s: 0.0,
            events: BinaryHeap::new(),
            sequence: 0,
            servers: chip.places().tiers.iter().map(server).collect(),
            flow: Vec::new(),
            queue_entries: chip.queue_entries(),
            engine_bytes_per_s: chip.engine_bytes_per_s(),
            semaphore_s: chip.semaphore_s(),
            start_s,
            trace,
        }
    }

    fn run(&mut self) {
        for tile in 0..self.tiles.len() as u32 {
            self.advance(tile);
        }
        loop {
            let event = self.events.peek().map(|Reverse((time, ..))| f64::from_bits(*time));
            let each = self.servers.iter().enumerate().filter_map(|(i, server)| Some((server.next_s()?, i)));
            let served = each.min_by(|a, b| a.0.total_cmp(&b.0));
            match (event, served) {
                (None, None) => break,
                (Some(time), served) if served.is_none_or(|(served, _)| time <= served) => {
                    self.now_s = time;
                    if let Some(Reverse((_, _, event))) = self.events.pop() {
                        self.happen(event);
                    }
                }
                (_, Some((served, server))) => {
                    self.now_s = served;
                    self.servers[server].serve(served);
                    if let Some(Reverse((_, id))) = self.servers[server].flows.pop() {
                        let flow = &mut self.flow[id as usize];
                        flow.left -= 1;
                        if flow.left == 0 {
                            let Flow { tile, queue, engine_end_s, .. } = *flow;
                            self.at(engine_end_s.max(served), Event::Moved { tile, queue });
                        }
                    }
                }
                (Some(_), None) => {}
            }
        }
        self.end_s = self.now_s;
    }

    fn at(&mut self, time: f64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((when(time), self.sequence, event)));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Free { tile, queue } => {
                self.tiles[tile as usize].busy[queue as usize] = false;
                self.advance_queue(tile, queue);
            }
            Event::Signals { tile, command } => {
                let state = &mut self.tiles[tile as usize];
                for &semaphore in &state.program.commands[command as usize].signals {
                    state.semaphores[semaphore as usize] += 1;
                }
                self.advance(tile);
            }
            Event::Ready { tile, queue } => self.transfer(tile, queue),
            Event::Moved { tile, queue } => {
                let state = &mut self.tiles[tile as usize];
                state.busy[queue as usize] = false;
                if let Some((start, command)) = state.requests[queue as usize].pop_front() {
                    state.busy_s[queue as usize] += self.now_s - start;
                    self.note(tile, queue, command, start, self.now_s);
                    self.signal(tile, command, self.now_s);
                }
                self.transfer(tile, queue);
                self.advance_queue(tile, queue);
            }
        }
    }

    fn note(&mut self, tile: u32, queue: Queue, command: u32, start: f64, end: f64) {
        let start_s = self.start_s + start;
        let command = &self.tiles[tile as usize].program.commands[command as usize];
        if let Some(trace) = &mut self.trace {
            trace.push(Busy { tile, queue, what: label(command), start_s, end_s: self.start_s + end });
        }
    }

    fn signal(&mut self, tile: u32, command: u32, time: f64) {
        if !self.tiles[tile as usize].program.commands[command as usize].signals.is_empty() {
            self.at(time + self.semaphore_s, Event::Signals { tile, command });
        }
    }

    fn advance(&mut self, tile: u32) {
        for queue in Queue::ALL {
            self.advance_queue(tile, queue);
        }
    }

    fn advance_queue(&mut self, tile: u32, queue: Queue) {
        let q = queue as usize;
        loop {
            let state = &mut self.tiles[tile as usize];
            let program: &'a TileProgram = state.program;
            let Some(&number) = state.queues[q].front() else { return };
            let command = &program.commands[number as usize];
            let reached = |&(semaphore, count): &(u32, u32)| state.semaphores[semaphore as usize] >= count;
            if !command.waits.iter().all(reached) {
                return;
            }
            match &command.action {
                Action::Compute { work, .. } => {
                    if state.busy[q] {
                        return;
                    }
                    state.queues[q].pop_front();
                    let (busy_s, drain_s) = self.chip.compute_s(*work);
                    state.busy[q] = true;
                    state.busy_s[q] += busy_s;
                    let end = self.now_s + busy_s;
                    self.note(tile, queue, number, self.now_s, end);
                    self.at(end, Event::Free { tile, queue });
                    self.signal(tile, number, end + drain_s);
                    return;
                }
                Action::Load { from: piece, .. } | Action::Store { to: piece, .. } => {
                    if state.requests[q].len() >= self.queue_entries {
                        return;
                    }
                    state.queues[q].pop_front();
                    let ready = self.now_s + self.chip.setup_s(piece);
                    state.requests[q].push_back((ready, number));
                    self.at(ready, Event::Ready { tile, queue });
                }
            }
        }
    }

    /// Starts the first request that is set up, if the engine is free.
    fn transfer(&mut self, tile: u32, queue: Queue) {
        let q = queue as usize;
        let state = &mut self.tiles[tile as usize];
        let program: &'a TileProgram = state.program;
        if state.busy[q] {
            return;
        }
        let Some((time, number)) = state.requests[q].front_mut() else { return };
        if *time > self.now_s {
            return;
        }
        *time = self.now_s;
        let command = &program.commands[*number as usize];
        state.busy[q] = true;
        let (piece, readers): (&Piece, Option<u32>) = match &command.action {
            Action::Load { from, sharers, .. } => (from, Some(self.chip.multicast(*sharers))),
            Action::Store { to, .. } => (to, None),
            Action::Compute { .. } => return,
        };
        let engine_s = self.chip.transfer_bytes(piece) / self.engine_bytes_per_s;
        state.engine_s[q] += engine_s;
        let engine_end_s = self.now_s + engine_s;
        let id = self.flow.len() as u32;
        let bytes = self.chip.memory_bytes(piece);
        let mut left = 0;
        for (server, tier) in self.servers.iter_mut().zip(&self.chip.places().tiers) {
            let share = tier.share(piece.data);
            if share > 0.0 {
                // Bytes that the memory could read in the time of a byte here.
                let cost = readers.map_or(tier.write_cost, |readers| 1.0 / f64::from(readers));
                server.serve(self.now_s);
                server.flows.push(Reverse((when(server.served + share * bytes * cost), id)));
                left += 1;
            }
        }
        self.flow.push(Flow { tile, queue, engine_end_s, left });
    }
}

fn label(command: &Command) -> &'static str {
    match &command.action {
        Action::Load { .. } => "load",
        Action::Store { .. } => "store",
        Action::Compute { work, step, .. } => match (step, work) {
            (Step::Part, Work::Matrix { .. }) => "scores",
            (Step::Part, Work::Vector(_)) => "softmax or unpack",
            (Step::Units { .. }, _) => "rows",
            (Step::Convert { .. }, _) => "convert",
            (Step::Unpack { .. }, _) => "unpack",
            (Step::Product { .. }, _) => "product",
            (Step::Finish { .. }, _) => "finish",
            (Step::Pages { .. }, _) => "weigh values",
            (Step::Merge { .. }, _) => "merge",
        },
    }
}

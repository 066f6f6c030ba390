//! A prepared program: pipelines, bind groups and buffers, recorded into one submission per step.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::clock::DeviceClock;
use super::lower::{Count, Dispatch, Lowered, Of};
use super::{Device, Pipeline, failed, memory};
use halite::backend::{Bindings, Clock, Limits, Plan, Span, Step, Ticket, Timing, check_step};
use halite::clock::Instant;
use halite::error::{Error, Result};
use halite::passes;
use halite::program::{Dim, Index, Op, PAGE_POSITIONS, Program};
use halite_shaders::{Grid, Resource};

/// A program on a device.
pub(super) struct GpuPlan {
    device: Arc<Device>,
    program: Arc<Program>,
    limits: Limits,
    lowered: Lowered,
    /// One per dispatch, segment by segment.
    pipelines: Vec<Vec<Pipeline>>,
    places: Vec<wgpu::Buffer>,
    extras: Vec<wgpu::Buffer>,
    grids: HashMap<Grid, wgpu::Buffer>,
    step: wgpu::Buffer,
    step_words: Vec<u32>,
    bound: Option<Bound>,
    submitted: u64,
    clock: Option<DeviceClock>,
    started: Instant,
    timing: Timing,
}

/// Bind groups for the buffers of the last submission.
struct Bound {
    buffers: Vec<wgpu::Buffer>,
    step: wgpu::Buffer,
    groups: Vec<Vec<wgpu::BindGroup>>,
}

/// The sizes of a step.
pub(super) struct Counts<'a> {
    pub tokens: u32,
    pub outputs: u32,
    /// Number of tiles, for each of `Lowered::tile_sizes`.
    pub tiles: &'a [(u32, u32)],
    /// Number of splits of attention over long caches.
    pub splits: u32,
}

impl Counts<'_> {
    /// Whether a dispatch has work in this step.
    pub fn runs(&self, dispatch: &Dispatch) -> bool {
        dispatch.when.1.contains(&self.of(dispatch.when.0))
    }

    fn of(&self, of: Of) -> u32 {
        match of {
            Of::Rows(dim) => passes::rows(dim, self.tokens, self.outputs) as u32,
            Of::Tiles(size) => self.tiles.iter().find(|t| t.0 == size).map_or(0, |t| t.1),
            Of::Splits => self.splits,
        }
    }

    fn count(&self, count: Count) -> u32 {
        (u64::from(self.of(count.of)) * u64::from(count.times)).div_ceil(count.per.into()) as u32 + count.plus
    }
}

impl GpuPlan {
    pub fn new(
        device: &Arc<Device>,
        program: &Arc<Program>,
        limits: Limits,
        lowered: Lowered,
    ) -> Result<GpuPlan> {
        let compile =
            |dispatches: &Vec<Dispatch>| dispatches.iter().map(|d| device.pipeline(&d.shader)).collect();
        let pipelines = lowered.segments.iter().map(compile).collect::<Result<_>>()?;
        let place = |&(dim, cols): &(Dim, u32)| {
            let bytes = 4 * passes::rows(dim, limits.tokens, limits.outputs) * u64::from(cols);
            device.buffer(bytes, "scratch memory on `gpu`")
        };
        let places = lowered.layout.places.iter().map(place).collect::<Result<_>>()?;
        let extra = |&bytes: &u64| device.buffer(bytes, "memory between shaders on `gpu`");
        let extras = lowered.extra_bytes.iter().map(extra).collect::<Result<_>>()?;
        let mut grids = HashMap::new();
        for dispatch in lowered.segments.iter().flatten() {
            for (resource, _) in &dispatch.shader.bindings {
                if let Resource::Grid(grid) = resource
                    && !grids.contains_key(grid)
                {
                    let words = grid.words();
                    let buffer = device.buffer(4 * words.len() as u64, "a grid on `gpu`")?;
                    device.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
                    grids.insert(*grid, buffer);
                }
            }
        }
        let step =
            device.buffer(4 * u64::from(lowered.step.pages(lowered.tile_sizes.len())), "a step on `gpu`")?;
        Ok(GpuPlan {
            device: device.clone(),
            program: program.clone(),
            limits,
            lowered,
            pipelines,
            places,
            extras,
            grids,
            step,
            step_words: Vec::new(),
            bound: None,
            submitted: 0,
            clock: DeviceClock::new(device),
            started: Instant::now(),
            timing: Timing::new(Duration::ZERO, Clock::Host),
        })
    }

    /// Writes the step's description for the shaders; returns its tiles.
    fn write_step(&mut self, step: &Step<'_>, splits: u32) -> Result<Vec<(u32, u32)>> {
        let layout = self.lowered.step;
        let words = &mut self.step_words;
        words.clear();
        words.resize(layout.pages(self.lowered.tile_sizes.len()) as usize, 0);
        words[0] = step.tokens.len() as u32;
        words[1] = step.outputs.len() as u32;
        words[2] = splits;
        words[layout.ids as usize..][..step.tokens.len()].copy_from_slice(step.tokens);
        words[layout.outputs as usize..][..step.outputs.len()].copy_from_slice(step.outputs);
        let mut token = 0;
        for span in step.spans {
            let needed = (span.start + span.len).div_ceil(PAGE_POSITIONS) as usize;
            for (group, table) in span.tables.iter().enumerate() {
                let at = words.len() as u32;
                words.extend_from_slice(table.get(..needed).unwrap_or(&[]));
                let first = (layout.tables + group as u32 * layout.tokens + token) as usize;
                words[first..][..span.len as usize].fill(at);
            }
            for i in 0..span.len {
                words[(layout.positions + token) as usize] = span.start + i;
                token += 1;
            }
        }
        let mut tiles = Vec::new();
        for (list, &size) in self.lowered.tile_sizes.iter().enumerate() {
            let at = (layout.tiles + layout.tile_words * list as u32) as usize;
            let (mut first, mut n) = (0, 0);
            for span in step.spans {
                for start in (0..span.len).step_by(size as usize) {
                    words[at + 3 * n] = first + start;
                    words[at + 3 * n + 1] = size.min(span.len - start);
                    words[at + 3 * n + 2] = span.start + span.len;
                    n += 1;
                }
                first += span.len;
            }
            tiles.push((size, n as u32));
        }
        let bytes = 4 * words.len() as u64;
        if bytes > self.step.size() {
            self.step = self.device.buffer(bytes.next_power_of_two(), "a step on `gpu`")?;
        }
        self.device.queue.write_buffer(&self.step, 0, bytemuck::cast_slice(&self.step_words));
        Ok(tiles)
    }

    /// Creates bind groups, unless the last submission used the same buffers.
    fn bind(&mut self, bindings: &Bindings<'_>) -> Result<()> {
        let all = || bindings.weights.iter().chain(bindings.states).chain(bindings.io);
        if let Some(bound) = &self.bound
            && bound.step == self.step
            && all().count() == bound.buffers.len()
            && all().zip(&bound.buffers).all(|(new, old)| memory(new).is_ok_and(|new| new == old))
        {
            return Ok(());
        }
        let buffers = all().map(|b| memory(b).cloned()).collect::<Result<Vec<_>>>()?;
        let expected = [self.program.weights.len(), self.program.states.len(), self.program.io.len()];
        let got = [bindings.weights.len(), bindings.states.len(), bindings.io.len()];
        if expected != got {
            return Err(Error::argument("bindings", format!("{expected:?}"), format!("{got:?}")));
        }
        let (states, io) = (expected[0], expected[0] + expected[1]);
        let mut groups = Vec::new();
        for (dispatches, pipelines) in self.lowered.segments.iter().zip(&self.pipelines) {
            let mut segment = Vec::new();
            for (dispatch, pipeline) in dispatches.iter().zip(pipelines) {
                let mut entries = Vec::new();
                for (i, (resource, _)) in dispatch.shader.bindings.iter().enumerate() {
                    let (buffer, range) = match resource {
                        Resource::Weight(n, range) => (buffers.get(*n as usize), Some(range)),
                        Resource::State(n) => (buffers.get(states + *n as usize), None),
                        Resource::Io(n) => (buffers.get(io + *n as usize), None),
                        Resource::Place(n) => (self.places.get(*n), None),
                        Resource::Extra(extra) => (self.extras.get(*extra as usize), None),
                        Resource::Grid(grid) => (self.grids.get(grid), None),
                        Resource::Step => (Some(&self.step), None),
                    };
                    let buffer = buffer.ok_or_else(|| failed(format!("{resource:?} is not there")))?;
                    let (offset, size) = match range {
                        // The last word of a weight may extend beyond it, but not into another buffer.
                        Some(range) => (range.start, range.end.next_multiple_of(4) - range.start),
                        None => (0, buffer.size()),
                    };
                    if offset + size > buffer.size() {
                        let expected = format!("at least {} bytes", offset + size);
                        return Err(Error::argument("buffer", expected, buffer.size()));
                    }
                    let size = std::num::NonZeroU64::new(size);
                    let binding = wgpu::BufferBinding { buffer, offset, size };
                    entries.push(wgpu::BindGroupEntry {
                        binding: i as u32,
                        resource: wgpu::BindingResource::Buffer(binding),
                    });
                }
                segment.push(self.device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: Some(dispatch.shader.name),
                    layout: &pipeline.layout,
                    entries: &entries,
                }));
            }
            groups.push(segment);
        }
        self.device.check()?;
        self.bound = Some(Bound { buffers, step: self.step.clone(), groups });
        Ok(())
    }

    /// Rejects token ids and positions beyond a table.
    fn check_indices(&self, step: &Step<'_>, segments: &Range<usize>) -> Result<()> {
        for op in self.program.segments.get(segments.clone()).unwrap_or(&[]).iter().flat_map(|s| &s.ops) {
            let Op::Embed { table, index, .. } = op else { continue };
            let Dim::Fixed(rows) = self.program.tensor(*table).rows else { continue };
            let (what, largest) = match index {
                Index::Token => ("token id", step.tokens.iter().copied().max()),
                Index::Position => {
                    let last = |span: &Span<'_>| (span.start + span.len).checked_sub(1);
                    ("position", step.spans.iter().filter_map(last).max())
                }
                Index::Part { separator } => ("part", step.parts(*separator, rows as usize)?.max()),
                _ => continue,
            };
            if let Some(bad) = largest.filter(|&i| i >= rows) {
                return Err(Error::argument(what, format!("below {rows}"), bad));
            }
        }
        Ok(())
    }
}

impl Plan for GpuPlan {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        check_step(step, &self.program, self.limits, bindings.states)?;
        let all = self.lowered.segments.len();
        if segments.start > segments.end || segments.end > all {
            return Err(Error::argument("segments", format!("within 0..{all}"), format!("{segments:?}")));
        }
        self.check_indices(step, &segments)?;
        let first = segments.start == 0;
        if first {
            self.started = Instant::now();
        }
        let (tokens, outputs) = (step.tokens.len() as u32, step.outputs.len() as u32);
        let longest = step.spans.iter().map(|span| span.start + span.len).max().unwrap_or(0);
        let splits = self.lowered.splits(tokens, longest);
        let tiles = self.write_step(step, splits)?;
        self.bind(bindings)?;
        let counts = Counts { tokens, outputs, tiles: &tiles, splits };
        let mut encoder =
            self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: self.clock.as_ref().map(|clock| clock.writes(first)),
            });
            let max_groups = self.device.device.limits().max_compute_workgroups_per_dimension;
            let Some(bound) = &self.bound else { return Err(failed("nothing is bound")) };
            for segment in segments {
                let Some(dispatches) = self.lowered.segments.get(segment) else { continue };
                for (i, dispatch) in dispatches.iter().enumerate() {
                    if step.cancel.is_cancelled() {
                        return Err(Error::Cancelled);
                    }
                    if !counts.runs(dispatch) {
                        continue;
                    }
                    let [mut x, mut y, z] = dispatch.groups.map(|n| counts.count(n));
                    if x > max_groups && y == 1 {
                        y = x.div_ceil(max_groups);
                        x = x.div_ceil(y);
                    }
                    pass.set_pipeline(&self.pipelines[segment][i].pipeline);
                    pass.set_bind_group(0, &bound.groups[segment][i], &[]);
                    pass.dispatch_workgroups(x, y, z);
                }
            }
        }
        if let Some(clock) = &self.clock {
            clock.resolve(&mut encoder, first);
        }
        self.device.queue.submit([encoder.finish()]);
        self.device.check()?;
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Timing> {
        if ticket.0 > self.submitted {
            return Err(Error::argument("ticket", format!("at most {}", self.submitted), ticket.0));
        }
        if ticket.0 == self.submitted {
            let by_device = match &self.clock {
                Some(clock) => clock.elapsed(&self.device)?,
                None => self.device.wait().map(|()| None)?,
            };
            self.timing = match by_device {
                Some(elapsed) => Timing::new(elapsed, Clock::Device),
                None => Timing::new(self.started.elapsed(), Clock::Host),
            };
        }
        Ok(self.timing)
    }
}

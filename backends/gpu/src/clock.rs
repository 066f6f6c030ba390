//! The device's clock: timestamps around the compute passes of a step.

use std::time::Duration;

use super::Device;
use halite::error::Result;

/// Bytes of a timestamp.
const TIMESTAMP: u64 = 8;

/// Two timestamps: the start of a step's first pass, and the end of its last one so far.
#[derive(Debug)]
pub(super) struct DeviceClock {
    queries: wgpu::QuerySet,
    /// The first timestamp, and from `QUERY_RESOLVE_BUFFER_ALIGNMENT` on the second.
    resolved: wgpu::Buffer,
    /// Both, readable by the host.
    read: wgpu::Buffer,
    period_ns: f64,
}

impl DeviceClock {
    /// `None` if the device has no timestamps.
    pub fn new(device: &Device) -> Option<DeviceClock> {
        let (queue, device) = (&device.queue, &device.device);
        if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return None;
        }
        let buffer = |size, usage| {
            let label = Some("timestamps");
            device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
        };
        let resolve = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        Some(DeviceClock {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            }),
            resolved: buffer(wgpu::QUERY_RESOLVE_BUFFER_ALIGNMENT + TIMESTAMP, resolve),
            read: buffer(2 * TIMESTAMP, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ),
            period_ns: f64::from(queue.get_timestamp_period()),
        })
    }

    /// Returns the timestamps that a pass writes: its end, and its start if it is a step's first pass.
    pub fn writes(&self, first: bool) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: first.then_some(0),
            end_of_pass_write_index: Some(1),
        }
    }

    /// Makes the timestamps of the previous passes readable.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder, first: bool) {
        for i in if first { 0..2 } else { 1..2 } {
            let at = u64::from(i) * wgpu::QUERY_RESOLVE_BUFFER_ALIGNMENT;
            encoder.resolve_query_set(&self.queries, i..i + 1, &self.resolved, at);
            encoder.copy_buffer_to_buffer(
                &self.resolved,
                at,
                &self.read,
                u64::from(i) * TIMESTAMP,
                TIMESTAMP,
            );
        }
    }

    /// Waits for the device, and returns the time of the step, unless its timestamps are implausible.
    pub fn elapsed(&self, device: &Device) -> Result<Option<Duration>> {
        let mut stamps = [0u64; 2];
        device.mapped(&self.read, bytemuck::cast_slice_mut(&mut stamps))?;
        let ticks = stamps[1].checked_sub(stamps[0]).filter(|_| stamps[0] > 0);
        Ok(ticks.map(|ticks| Duration::from_nanos((ticks as f64 * self.period_ns) as u64)))
    }
}

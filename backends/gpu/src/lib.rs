//! The GPU backend: compute shaders on Vulkan, Metal, DX12 or WebGPU, by wgpu.
//!
//! `halite-shaders` assembles WGSL; `lower` turns a program into dispatches; `plan.rs` runs all dispatches of
//! a step in one submission; `adapter.rs` finds devices; `clock.rs` reads the device's clock. Weights are
//! interleaved in formats that support it ([`halite::backend::Rows`]), so that neighbouring invocations read
//! neighbouring words.
#![deny(unsafe_code)]

mod adapter;
mod cache;
mod clock;
mod lower;
mod plan;
mod wait;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use adapter::{Adapter, adapters};

use cache::Cache;
use halite::backend::driver::{Argument, Driver, DriverOption, Listed, Value};
use halite::backend::{
    Backend, Buffer, Caps, Contract, Fusions, Gap, Limits, OpSig, Plan, Rows, Support, Usage,
};
use halite::error::{Error, Result};
use halite::map::Region;
use halite::program::Program;
use lower::{Bounds, Lowered};

/// The name of the backend.
const NAME: &str = "gpu";

/// Maximum bytes of one write to the device.
const PIECE_BYTES: usize = 8 << 20;

/// Maximum bytes in flight to the device.
const STAGED_BYTES: u64 = 128 << 20;

fn failed(message: impl Into<String>) -> Error {
    Error::Backend { backend: NAME.into(), message: message.into() }
}

/// The driver: `gpu`, `gpu:1` or `gpu:NAME`. The environment variable `HALITE_GPU_WITHOUT` sets
/// [`GpuOptions::without`], separated by commas.
pub const DRIVER: Driver = Driver::new(NAME, |argument, options| {
    let without = std::env::var_os("HALITE_GPU_WITHOUT").unwrap_or_default();
    let expected = "integer, subgroups or f16";
    let without = without
        .into_string()
        .map_err(|name| Error::argument("HALITE_GPU_WITHOUT", expected, name.display()))?;
    let options = GpuOptions::default()
        .adapter((!argument.is_empty()).then(|| argument.to_owned()))
        .memory_bytes(options.number("device-memory")?.map(|mib| mib.saturating_mul(1 << 20)))
        .without(without.split(',').filter(|s| !s.is_empty()).map(str::to_owned).collect::<Vec<_>>())
        .cooperative(options.is_set("cooperative"))
        .shader_cache(options.path("shader-cache").map(Path::to_owned));
    Ok(Arc::new(Gpu::new(&options)?))
})
.argument(Some(Argument::optional("NAME")))
.help("or gpu:N, gpu:NAME for one of `halite devices`")
.options(&[
    DriverOption::new(
        "device-memory",
        Value::Number("MIB"),
        "Limit on device memory in MiB; weights beyond it are streamed",
    ),
    DriverOption::new(
        "cooperative",
        Value::Flag,
        "Use the GPU's matrix units for prefill, in half precision (experimental in wgpu)",
    ),
    DriverOption::new("shader-cache", Value::Path("FOLDER"), "Cache compiled GPU shaders in this folder"),
])
.list(|| {
    let listed = |(n, adapter): (usize, &Adapter)| {
        let facts = adapter.facts().into_iter().map(|(fact, value)| (fact.to_owned(), value));
        Listed::new(format!("{NAME}:{n}"), adapter.to_string())
            .contract(Contract::Close)
            .facts(facts.collect::<Vec<_>>())
    };
    Ok(adapters().iter().enumerate().map(listed).collect())
});

/// Options of opening a device.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct GpuOptions {
    /// An index in [`adapters`], or a part of a name; by default the fastest kind.
    pub adapter: Option<String>,
    /// Limit on the bytes of buffers; by default that of the device.
    pub memory_bytes: Option<u64>,
    /// Features not to use, for tests: `subgroups`, `integer`, `f16`.
    pub without: Vec<String>,
    /// Use the device's matrix units (cooperative matrices) for prefill, with activations and weights rounded
    /// to half precision. It is experimental in wgpu: bugs in wgpu or drivers may be undefined behaviour.
    pub cooperative: bool,
    /// Folder for a cache of compiled shaders, so that the next start need not compile them; by default no
    /// cache.
    pub shader_cache: Option<PathBuf>,
}

halite::setters!(GpuOptions {
    adapter: impl Into<Option<String>>,
    memory_bytes: impl Into<Option<u64>>,
    without: Vec<String>,
    cooperative: bool,
    shader_cache: impl Into<Option<PathBuf>>,
});

/// A GPU.
#[derive(Debug)]
pub struct Gpu {
    caps: Caps,
    bounds: Bounds,
    device: Arc<Device>,
}

/// An open device, and its shared state.
#[derive(Debug)]
struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    /// The first error that the device reported outside of a call that returns it.
    error: Arc<Mutex<Option<String>>>,
    /// Bytes in flight to the device since the last wait.
    staged: AtomicU64,
    /// Staging buffer for reads.
    read_back: Mutex<Option<wgpu::Buffer>>,
    /// Compiled shaders, by their text.
    pipelines: Mutex<HashMap<String, Pipeline>>,
    /// Their cache on disk, if enabled.
    cache: Option<Cache>,
}

/// A compiled shader.
#[derive(Debug, Clone)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// Device memory.
#[derive(Debug)]
struct Memory(wgpu::Buffer);

impl Gpu {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Backend`] with the APIs that were tried if there is no device, or the reason why it cannot be
    /// opened.
    pub fn new(options: &GpuOptions) -> Result<Gpu> {
        let adapter = adapter::choose(options.adapter.as_deref())?;
        let mut paths = adapter.paths();
        if !options.cooperative {
            paths.cooperative = None;
        } else if paths.cooperative.is_none() {
            return Err(failed(format!("{adapter} has no f16 matrix units of 8 by 8 or 16 by 16")));
        }
        for without in &options.without {
            match without.as_str() {
                "subgroups" => paths.subgroups = false,
                "integer" => paths.integer = false,
                "f16" => paths.f16 = false,
                other => {
                    return Err(Error::argument("path", "subgroups, integer or f16", format!("`{other}`")));
                }
            }
        }
        if paths.cooperative.is_some() && !(paths.subgroups && paths.f16) {
            return Err(failed("matrix units need subgroups and f16"));
        }
        let (device, queue) = adapter.open(paths)?;
        let limits = device.limits();
        let error: Arc<Mutex<Option<String>>> = Arc::default();
        let note = |error: &Arc<Mutex<Option<String>>>| {
            let error = error.clone();
            move |message: String| {
                if let Ok(mut error) = error.lock() {
                    error.get_or_insert(message);
                }
            }
        };
        let uncaptured = note(&error);
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| uncaptured(e.to_string())));
        let lost = note(&error);
        device.set_device_lost_callback(move |reason, message| {
            lost(format!("the device was lost ({reason:?}): {message}"));
        });
        let caps = Caps::new(NAME, adapter.to_string())
            .memory_bytes(options.memory_bytes.unwrap_or(u64::MAX))
            .rows(Rows::Interleaved)
            .fusions(Fusions::ALL)
            .contract(Contract::Close);
        let bounds = Bounds {
            paths,
            binding_bytes: limits.max_storage_buffer_binding_size & !255,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            workgroup: limits.max_compute_invocations_per_workgroup,
            tuning: adapter.tuning(),
        };
        let (staged, read_back, pipelines) = Default::default();
        let folder = options.shader_cache.as_deref();
        let cache = folder.map(|folder| Cache::open(&device, adapter.info(), folder)).transpose()?;
        let device = Arc::new(Device { device, queue, error, staged, read_back, pipelines, cache });
        Ok(Gpu { caps, bounds, device })
    }

    fn lower(&self, program: &Program, limits: Limits) -> Lowered {
        lower::lower(program, limits, &self.bounds)
    }
}

impl Device {
    /// Returns the error that the device has reported since the last call.
    fn check(&self) -> Result<()> {
        let error = self.error.lock().map_err(|_| failed("a thread failed while it held the device"))?.take();
        error.map_or(Ok(()), |message| Err(failed(message)))
    }

    /// Creates a zeroed buffer.
    fn buffer(&self, bytes: u64, what: &str) -> Result<wgpu::Buffer> {
        let limit = self.device.limits().max_buffer_size;
        let out_of_memory =
            |have_bytes| Error::OutOfMemory { what: what.into(), need_bytes: bytes, have_bytes };
        let size = bytes.next_multiple_of(4).max(4);
        if size > limit {
            return Err(out_of_memory(limit));
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage,
            mapped_at_creation: false,
        });
        if wait::block_on(scope.pop()).is_some() {
            return Err(out_of_memory(0));
        }
        self.check()?;
        Ok(buffer)
    }

    /// Waits until all submitted work is done.
    fn wait(&self) -> Result<()> {
        let waited = self.wait_for(|done| self.queue.on_submitted_work_done(move || done(())));
        self.staged.store(0, Ordering::Relaxed);
        self.check()?;
        waited
    }

    /// Waits until the device is done with all submitted work, and has called what `start` is given.
    fn wait_for<T: Send + 'static>(&self, start: impl FnOnce(wait::Done<T>)) -> Result<T> {
        wait::callback(&self.device, start).map_err(failed)
    }

    /// Reads whole words of a buffer, from an offset that is a multiple of 4.
    fn read(&self, src: &wgpu::Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let poisoned = |_| failed("a thread failed while it read device memory");
        let mut kept = self.read_back.lock().map_err(poisoned)?;
        let mut offset = offset;
        for piece in dst.chunks_mut(PIECE_BYTES) {
            let bytes = piece.len() as u64;
            let staging = match kept.take().filter(|buffer| buffer.size() >= bytes) {
                Some(buffer) => buffer,
                None => self.device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("read back"),
                    size: bytes.next_power_of_two(),
                    usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                }),
            };
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(src, offset, &staging, 0, bytes);
            self.queue.submit([encoder.finish()]);
            self.mapped(&staging, piece)?;
            *kept = Some(staging);
            offset += bytes;
        }
        Ok(())
    }

    /// Waits for the device, and reads the start of a mappable buffer.
    fn mapped(&self, buffer: &wgpu::Buffer, dst: &mut [u8]) -> Result<()> {
        let range = 0..dst.len() as u64;
        let mapped = self.wait_for(|done| buffer.map_async(wgpu::MapMode::Read, range.clone(), done));
        self.staged.store(0, Ordering::Relaxed);
        self.check()?;
        mapped?.map_err(|e| failed(format!("cannot read device memory: {e}")))?;
        let view =
            buffer.get_mapped_range(range).map_err(|e| failed(format!("cannot read device memory: {e}")))?;
        dst.copy_from_slice(&view);
        drop(view);
        buffer.unmap();
        Ok(())
    }

    /// Compiles a shader, or returns the compiled one.
    fn pipeline(&self, shader: &halite_shaders::Shader) -> Result<Pipeline> {
        let source = shader.source();
        let poisoned = |_| failed("a thread failed while it compiled a shader");
        if let Some(pipeline) = self.pipelines.lock().map_err(poisoned)?.get(&source) {
            return Ok(pipeline.clone());
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let label = Some(shader.name);
        let checked = wgpu::ShaderRuntimeChecks::checked();
        let checks =
            wgpu::ShaderRuntimeChecks { force_loop_bounding: false, int_div_checks: false, ..checked };
        let text = wgpu::ShaderSource::Wgsl(source.as_str().into());
        // SAFETY: accesses to buffers stay checked. The loops of `halite-shaders` end, whatever the buffers
        // contain: each counts to a bound that it does not change. Divisors are constants above zero, or the
        // number of splits, which is at least one. Loop counters of wgpu would prevent a driver's compiler
        // from unrolling loops.
        #[allow(unsafe_code)]
        let module = unsafe {
            let descriptor = wgpu::ShaderModuleDescriptor { label, source: text };
            self.device.create_shader_module_trusted(descriptor, checks)
        };
        let entries: Vec<_> = shader
            .bindings
            .iter()
            .enumerate()
            .map(|(i, (_, written))| wgpu::BindGroupLayoutEntry {
                binding: i as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: !written },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let descriptor = wgpu::BindGroupLayoutDescriptor { label, entries: &entries };
        let layout = self.device.create_bind_group_layout(&descriptor);
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            // Shaders write workgroup memory before they read it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: self.cache.as_ref().map(Cache::of_pipelines),
        });
        if let Some(e) = wait::block_on(scope.pop()) {
            return Err(failed(format!("shader `{}`: {e}", shader.name)));
        }
        self.check()?;
        let pipeline = Pipeline { pipeline, layout };
        self.pipelines.lock().map_err(poisoned)?.insert(source, pipeline.clone());
        Ok(pipeline)
    }
}

/// Returns a buffer's device memory.
fn memory(buffer: &Buffer) -> Result<&wgpu::Buffer> {
    let memory: Option<&Memory> = buffer.memory();
    memory.map(|m| &m.0).ok_or_else(|| failed("a buffer of another backend was passed"))
}

impl Backend for Gpu {
    fn lose(&self) -> bool {
        self.device.device.destroy();
        // The next poll calls the callback of a lost device.
        let _ = self.device.device.poll(wgpu::PollType::Poll);
        true
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        match lower::missing(sig.program, sig.op, &self.bounds) {
            None => Support::Native,
            Some(why) => Support::Unsupported(Gap::NotYet(why)),
        }
    }

    fn explain(&self, sig: &OpSig<'_>, tokens: u32) -> String {
        let limits = Limits { tokens, outputs: tokens };
        let mut program = sig.program.clone();
        program.segments.truncate(1);
        if let Some(segment) = program.segments.first_mut() {
            segment.ops = vec![sig.op.clone()];
        }
        let lowered = self.lower(&program, limits);
        let step = plan::Counts { tokens, outputs: tokens, tiles: &[], splits: 1 };
        let runs = lowered.segments.iter().flatten().filter(|d| step.runs(d));
        runs.map(|d| d.shader.name).collect::<Vec<_>>().join(", ")
    }

    fn alloc(&self, bytes: u64, _: Usage) -> Result<Buffer> {
        let what = format!("a buffer on `{NAME}`");
        if bytes > self.caps.memory_bytes {
            let have_bytes = self.caps.memory_bytes;
            return Err(Error::OutOfMemory { what, need_bytes: bytes, have_bytes });
        }
        Ok(Buffer::new(bytes, Memory(self.device.buffer(bytes, &what)?)))
    }

    fn import(&self, _: &Region) -> Result<Option<Buffer>> {
        Ok(None)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let buffer = memory(dst)?;
        if range.start > range.end || range.end > dst.bytes() {
            return Err(Error::argument(
                "fill range",
                format!("inside 0..{}", dst.bytes()),
                format!("{range:?}"),
            ));
        }
        let mut staged = Vec::new();
        let mut at = range.start;
        while at < range.end {
            // Writes are of whole words: read the words at the ends first.
            let start = at & !3;
            let end = range.end.min(start + PIECE_BYTES as u64);
            let whole = (end.next_multiple_of(4) - start) as usize;
            staged.clear();
            staged.resize(whole, 0);
            let shared_end = !end.is_multiple_of(4) && end < dst.bytes();
            if at != start || shared_end {
                self.device.read(buffer, start, &mut staged)?;
            }
            write(&mut staged[(at - start) as usize..(end - start) as usize]);
            self.device.queue.write_buffer(buffer, start, &staged);
            // Staging memory is free again when the submission is done.
            self.device.queue.submit([]);
            if self.device.staged.fetch_add(whole as u64, Ordering::Relaxed) > STAGED_BYTES {
                self.device.wait()?;
            }
            at = end;
        }
        self.device.check()
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let buffer = memory(src)?;
        let end = offset.saturating_add(dst.len() as u64);
        if end > src.bytes() {
            return Err(Error::argument(
                "read range",
                format!("inside 0..{}", src.bytes()),
                format!("{offset}..{end}"),
            ));
        }
        if dst.is_empty() {
            return Ok(());
        }
        let start = offset & !3;
        if start == offset && dst.len().is_multiple_of(4) {
            return self.device.read(buffer, offset, dst);
        }
        let mut words = vec![0; (end.next_multiple_of(4) - start) as usize];
        self.device.read(buffer, start, &mut words)?;
        dst.copy_from_slice(&words[(offset - start) as usize..][..dst.len()]);
        Ok(())
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let plan = plan::GpuPlan::new(&self.device, program, limits, self.lower(program, limits))?;
        if let Some(cache) = &self.device.cache {
            cache.keep()?;
        }
        Ok(Box::new(plan))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        let lowered = self.lower(program, limits);
        lowered.layout.bytes(limits.tokens, limits.outputs) + lowered.extra_bytes.iter().sum::<u64>()
    }
}

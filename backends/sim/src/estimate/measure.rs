//! Measures this machine's memory and kernels, through the backend `cpu`, on programs of single ops.
//!
//! All probes run in turns until the time is up, and each returns its median. Other work on the machine then
//! disturbs all of them equally, or none for long.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use halite_kernels::formats::Format;
use halite_kernels::rows::Gate;

use halite::backend::cpu::Cpu;
use halite::backend::{Backend, Bindings, Buffer, Cancel, Limits, Plan, Span, Step, Usage, upload};
use halite::conformance::random_weight;
use halite::cost::{self, Cost, Extent};
use halite::map::{Region, Source};
use halite::passes;
use halite::program::{
    Builder, Dim, NormKind, PAGE_POSITIONS, Program, RopePairs, Rotation, State, TensorId, WeightInfo,
};
use halite::rng::SplitMix64;
use halite::{Error, Result};

/// Measured rates with one number of threads, in SI units.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "as in `HostRates`")]
pub struct Rates {
    pub threads: usize,
    pub isa: &'static str,
    pub op_s: f64,
    pub integer_ops_per_s: f64,
    pub float_ops_per_s: f64,
    pub row_bytes_per_s: f64,
    pub attend_bytes_per_s: f64,
    pub attend_ops_per_s: f64,
    /// Bytes read and copied per second, by level.
    pub levels: Vec<(f64, f64)>,
    /// By weight format: bytes of weights per second for one token, operations per second for many.
    pub products: Vec<(Format, f64, f64)>,
}

/// A memory level of this machine.
#[derive(Debug, Clone)]
pub struct Level {
    /// `l1`, `l2`, … and `memory`.
    pub name: String,
    /// Bytes of one instance.
    pub bytes: u64,
    /// Whether each core has one.
    pub per_core: bool,
    /// Latency of a dependent read, measured on one thread.
    pub latency_s: f64,
}

/// The caches of the first core, from inside to outside, and the memory.
///
/// # Errors
/// `Error::Argument` where the operating system does not say.
pub fn levels() -> Result<Vec<Level>> {
    const CACHES: &str = "/sys/devices/system/cpu/cpu0/cache";
    let fail = |what: &str| Error::argument("caches", format!("their sizes in {CACHES} (Linux)"), what);
    let mut levels = Vec::new();
    for index in 0.. {
        let read = |file: &str| std::fs::read_to_string(format!("{CACHES}/index{index}/{file}")).ok();
        let (Some(kind), Some(level), Some(size)) = (read("type"), read("level"), read("size")) else {
            break;
        };
        if kind.trim() == "Instruction" {
            continue;
        }
        let kib: Option<u64> = size.trim().strip_suffix('K').and_then(|k| k.parse().ok());
        let bytes = kib.ok_or_else(|| fail(size.trim()))?.saturating_mul(1024);
        let shared = read("shared_cpu_list").unwrap_or_default();
        let per_core = !shared.trim().contains([',', '-']);
        levels.push(Level { name: format!("l{}", level.trim()), bytes, per_core, latency_s: 0.0 });
    }
    let Some(last) = levels.last() else { return Err(fail("none")) };
    let bytes = last.bytes.saturating_mul(8).max(1 << 28);
    levels.push(Level { name: "memory".into(), bytes, per_core: false, latency_s: 0.0 });
    let mut nearer = 0.0f64;
    for level in &mut levels {
        // No level is faster than a nearer one.
        nearer = nearer.max(latency_s(if level.name == "memory" { level.bytes } else { level.bytes / 2 }));
        level.latency_s = nearer;
    }
    Ok(levels)
}

/// Bytes between the reads of a chain.
const LINE_BYTES: usize = 64;
const CHAIN_READS: usize = 1 << 20;

/// Measures the latency of a dependent read in a buffer of `bytes` bytes.
fn latency_s(bytes: u64) -> f64 {
    let lines = (bytes as usize / LINE_BYTES).max(2);
    let stride = LINE_BYTES / 4;
    let mut next: Vec<u32> = vec![0; lines * stride];
    // One cycle through all lines in random order (Sattolo 1986).
    let mut order: Vec<u32> = (0..lines as u32).collect();
    let mut rng = SplitMix64::new(1);
    for i in (1..lines).rev() {
        order.swap(i, (rng.next() % i as u64) as usize);
    }
    for (i, &line) in order.iter().enumerate() {
        next[line as usize * stride] = order[(i + 1) % lines];
    }
    let mut best = f64::INFINITY;
    let mut place = 0;
    for _ in 0..3 {
        let start = Instant::now();
        for _ in 0..CHAIN_READS {
            place = next[place as usize * stride];
        }
        best = best.min(start.elapsed().as_secs_f64() / CHAIN_READS as f64);
    }
    std::hint::black_box(place);
    best
}

/// A program of kernels, and a step of it.
struct Probe {
    program: Arc<Program>,
    weights: Vec<Buffer>,
    states: Vec<Buffer>,
    io: Vec<Buffer>,
    extent: Extent,
    segments: usize,
    /// One plan per backend.
    plans: Vec<Box<dyn Plan>>,
    /// Seconds by backend.
    seconds: Vec<Vec<f64>>,
}

const WHAT: &str = "probe";

impl Probe {
    fn new(
        cpus: &[Cpu],
        weights: &[(String, Format, [u64; 2])],
        extent: Extent,
        record: impl FnOnce(&mut Builder<'_>),
    ) -> Result<Probe> {
        let find = |name: &str| {
            let (_, format, dims) = weights.iter().find(|(n, ..)| n == name)?;
            Some(WeightInfo::new(dims.to_vec(), *format))
        };
        let mut builder = Builder::new(WHAT, &find);
        record(&mut builder);
        let program = builder.finish()?;
        let first = cpus.first().ok_or_else(|| Error::argument("threads", "at least one number", "none"))?;
        let program = Arc::new(passes::for_backend(&program, first.caps()));
        let limits = Limits { tokens: extent.tokens, outputs: 1 };
        let mut rng = SplitMix64::new(1);
        let filled = |bytes: &[u8], usage| -> Result<Buffer> {
            let buffer = first.alloc(bytes.len() as u64, usage)?;
            upload(first, &buffer, 0, bytes)?;
            Ok(buffer)
        };
        let contents = program.weights.iter().map(|&id| random_weight(&program, id, &mut rng));
        let weights = map_weights(first, &contents.collect::<Vec<_>>())?;
        let pages = u64::from(extent.start + extent.tokens).div_ceil(PAGE_POSITIONS.into());
        // Half-precision numbers near 1.
        let states = program.states.iter().map(|s| {
            let halves =
                (0..pages * s.page_bytes() / 2).flat_map(|i| (0x3c00 | (i % 512) as u16).to_le_bytes());
            filled(&halves.collect::<Vec<u8>>(), Usage::State)
        });
        let states = states.collect::<Result<_>>()?;
        let io = program.io.iter().map(|&id| {
            let t = program.tensor(id);
            let values = passes::rows(t.rows, extent.tokens, 1) * u64::from(t.cols);
            let bytes = (0..values).flat_map(|i| ((i % 1000) as f32 / 500.0 - 1.0).to_le_bytes());
            filled(&bytes.collect::<Vec<u8>>(), Usage::Io)
        });
        let io = io.collect::<Result<_>>()?;
        let plans = cpus.iter().map(|cpu| cpu.prepare(&program, limits)).collect::<Result<_>>()?;
        let segments = program.segments.len();
        Ok(Probe {
            program,
            weights,
            states,
            io,
            extent,
            segments,
            plans,
            seconds: vec![Vec::new(); cpus.len()],
        })
    }

    /// Runs the step once on a backend.
    fn run(&mut self, cpu: usize) -> Result<()> {
        let Extent { start, tokens, .. } = self.extent;
        let pages: Vec<u32> = (0..(start + tokens).div_ceil(PAGE_POSITIONS)).collect();
        let ids = vec![0; tokens as usize];
        let tables = vec![pages; self.program.windows.len()];
        let spans = [Span { tables: &tables, start, len: tokens }];
        let step = Step { spans: &spans, tokens: &ids, outputs: &[], cancel: &Cancel::default() };
        let bindings = Bindings { weights: &self.weights, states: &self.states, io: &self.io };
        let begin = Instant::now();
        let ticket = self.plans[cpu].submit(&step, 0..self.segments, &bindings)?;
        self.plans[cpu].wait(ticket)?;
        self.seconds[cpu].push(begin.elapsed().as_secs_f64());
        Ok(())
    }

    fn cost(&self) -> Cost {
        cost::step(&self.program, &[self.extent])
    }

    /// The median time, without the barriers of its ops.
    fn work_s(&self, cpu: usize, op_s: f64) -> f64 {
        let ops = self.program.ops().count() as f64;
        let median = median(&self.seconds[cpu]);
        (median - ops * op_s).max(median / 10.0)
    }
}

/// Weights in a mapped file, as a model's: the mapping affects the speed of reads.
fn map_weights(cpu: &Cpu, contents: &[Vec<u8>]) -> Result<Vec<Buffer>> {
    static FILES: AtomicU32 = AtomicU32::new(0);
    let name = format!("halite-calibrate-{}-{}", std::process::id(), FILES.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let io = |source| Error::Io { path: path.clone(), source };
    let align = |len: usize| len.next_multiple_of(ALIGNMENT);
    let written = File::create_new(&path).and_then(|file| {
        let mut file = BufWriter::new(file);
        for bytes in contents {
            file.write_all(bytes)?;
            file.write_all(&[0; ALIGNMENT][..align(bytes.len()) - bytes.len()])?;
        }
        file.flush()
    });
    let source = written.map_err(io).and_then(|()| Source::open(&path));
    // The map stays valid. If a mapped file cannot be removed, the system cleans it up later.
    let _ = std::fs::remove_file(&path);
    let source = source?;
    let mut start = 0;
    let mut import = |bytes: &Vec<u8>| {
        let region = Region::new(&source, start..start + bytes.len());
        start += align(bytes.len());
        let buffer = region.map(|region| cpu.import(&region)).transpose()?.flatten();
        buffer.ok_or_else(|| io(std::io::Error::other("the file is shorter than what was written")))
    };
    contents.iter().map(&mut import).collect()
}

/// As in model files.
const ALIGNMENT: usize = 64;

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Sizes of the measured kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Columns of rows, and of the input of the measured gated feed-forward block.
    pub columns: u32,
    /// Its hidden columns.
    pub hidden: u32,
    /// Tokens of a prompt.
    pub tokens: u32,
    /// Positions that one token attends to.
    pub positions: u32,
    /// Bytes of weights that one token reads: more than all caches.
    pub weight_bytes: u64,
}

impl Default for Sizes {
    /// The sizes of models of some billion parameters.
    fn default() -> Sizes {
        Sizes { columns: 3072, hidden: 8192, tokens: 512, positions: 8192, weight_bytes: 192 << 20 }
    }
}

/// Ops of the barrier probe, each of some nearly empty tasks.
const BARRIERS: u32 = 64;
/// Query heads, KV heads and their elements in the attention probes.
const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 96;
const ONE: Extent = Extent { start: 0, tokens: 1, outputs: 0 };
/// Minimum runs of each probe.
const RUNS: usize = 3;

fn feed_forward(cpus: &[Cpu], sizes: &Sizes, format: Format, layers: u64, extent: Extent) -> Result<Probe> {
    let Sizes { columns, hidden, .. } = *sizes;
    let (wide, narrow) = ([columns.into(), hidden.into()], [hidden.into(), columns.into()]);
    let shapes = [("gate", wide), ("up", wide), ("down", narrow)];
    let weights = (0..layers).flat_map(|l| shapes.map(|(name, dims)| (format!("{name}{l}"), format, dims)));
    Probe::new(cpus, &weights.collect::<Vec<_>>(), extent, |b| {
        let x = b.input("x", Dim::Tokens, columns);
        let linear = |b: &mut Builder<'_>, name: String, x: TensorId, rows, columns| {
            let weight = b.weight(&name, rows, columns);
            b.linear("y", x, weight, None)
        };
        for l in 0..layers {
            let gate = linear(b, format!("gate{l}"), x, hidden, columns);
            let up = linear(b, format!("up{l}"), x, hidden, columns);
            let gated = b.glu(gate, up, Gate::Silu);
            let y = linear(b, format!("down{l}"), gated, columns, hidden);
            b.output(y);
        }
    })
}

fn barriers(cpus: &[Cpu]) -> Result<Probe> {
    Probe::new(cpus, &[("w".into(), Format::F32, [32, 256])], ONE, |b| {
        let x = b.input("x", Dim::Tokens, 32);
        let weight = b.weight("w", 256, 32);
        for _ in 0..BARRIERS {
            b.linear("y", x, weight, None);
        }
    })
}

fn rows(cpus: &[Cpu], columns: u32, extent: Extent) -> Result<Probe> {
    Probe::new(cpus, &[("norm".into(), Format::F32, [columns.into(), 1])], extent, |b| {
        let x = b.input("x", Dim::Tokens, columns);
        let weight = b.weight("norm", 1, columns);
        let frequencies: Arc<[f32]> = (0..HEAD_DIM / 2).map(|i| 1.0 / (1 + i) as f32).collect();
        let norm = b.norm("norm", x, NormKind::Rms, Some(weight), None, 1e-5, columns);
        let (factors, magnitude, pairs) = (None, 1.0, RopePairs::Adjacent);
        let rotation = Rotation { head_dim: HEAD_DIM, frequencies, factors, magnitude, pairs };
        let rope = b.rope("rope", norm, &rotation);
        let sum = b.add("sum", rope, x);
        b.output(sum);
    })
}

fn attention(cpus: &[Cpu], extent: Extent) -> Result<Probe> {
    Probe::new(cpus, &[], extent, |b| {
        let q = b.input("q", Dim::Tokens, HEADS * HEAD_DIM);
        let state = b.state(State::new("kv", KV_HEADS, HEAD_DIM, HEAD_DIM, Format::F16));
        let out = b.attend(q, state, HEADS, 0.1, None, None);
        b.output(out);
    })
}

/// Measures with each number of threads, for about `time`, and at least three times.
///
/// # Errors
/// `Error::OutOfMemory`; errors of the backend for a format.
pub fn measure(
    threads: &[usize],
    formats: &[Format],
    levels: &[Level],
    sizes: &Sizes,
    time: Duration,
) -> Result<Vec<Rates>> {
    let cpus = threads.iter().map(|&n| Cpu::with_threads(n)).collect::<Result<Vec<_>>>()?;
    let mut all = Vec::new();
    for cpu in &cpus {
        // Use half a cache, so that nothing else evicts the buffer.
        let bytes = |level: &Level| match (level.name.as_str(), level.per_core) {
            ("memory", _) => level.bytes,
            (_, true) => level.bytes / 2 * cpu.threads() as u64,
            (_, false) => level.bytes / 2,
        };
        let rates = cpu.rates(1 << 16)?;
        // Data of a farther level passes through the nearer ones, so these are at least as fast.
        let (mut read, mut copy) = (0.0f64, 0.0f64);
        let level = |l| {
            read = read.max(cpu.read_bytes_per_s(bytes(l))?);
            copy = copy.max(cpu.copy_bytes_per_s(bytes(l))?);
            Ok((read, copy))
        };
        let mut by_level = levels.iter().rev().map(level).collect::<Result<Vec<_>>>()?;
        by_level.reverse();
        all.push(Rates {
            threads: cpu.threads(),
            isa: cpu.isa(),
            integer_ops_per_s: rates.integer_ops_per_s,
            float_ops_per_s: rates.float_ops_per_s,
            levels: by_level,
            ..Rates::default()
        });
    }
    let many = Extent { tokens: sizes.tokens, ..ONE };
    let mut probes = vec![barriers(&cpus)?, rows(&cpus, sizes.columns, many)?];
    probes.push(attention(&cpus, Extent { start: sizes.positions.saturating_sub(1), ..ONE })?);
    probes.push(attention(&cpus, many)?);
    let fixed = probes.len();
    for &format in formats {
        let row_bytes = format.row_bytes(sizes.columns as usize).unwrap_or(0) as u64;
        let layers = sizes.weight_bytes.div_ceil((3 * row_bytes * u64::from(sizes.hidden)).max(1));
        probes.push(feed_forward(&cpus, sizes, format, layers, ONE)?);
        probes.push(feed_forward(&cpus, sizes, format, 1, many)?);
    }
    let start = Instant::now();
    let mut runs = 0;
    // One extra run warms up.
    while runs <= RUNS || start.elapsed() < time {
        for probe in &mut probes {
            (0..cpus.len()).try_for_each(|cpu| probe.run(cpu))?;
            if runs == 0 {
                probe.seconds.iter_mut().for_each(Vec::clear);
            }
        }
        runs += 1;
    }
    for (cpu, rates) in all.iter_mut().enumerate() {
        let op_s = median(&probes[0].seconds[cpu]) / f64::from(BARRIERS);
        let rate = |probe: usize, work: u64, op_s: f64| work as f64 / probes[probe].work_s(cpu, op_s);
        rates.op_s = op_s;
        rates.row_bytes_per_s = rate(1, probes[1].cost().activation_bytes, 0.0);
        rates.attend_bytes_per_s = rate(2, probes[2].cost().kv_bytes, op_s);
        rates.attend_ops_per_s = rate(3, probes[3].cost().ops(), op_s);
        let product = |(i, &format): (usize, &Format)| {
            let (one, many) = (fixed + 2 * i, fixed + 2 * i + 1);
            (
                format,
                rate(one, probes[one].cost().weight_bytes, op_s),
                rate(many, probes[many].cost().ops(), op_s),
            )
        };
        rates.products = formats.iter().enumerate().map(product).collect();
    }
    Ok(all)
}

/// The clock that the operating system reports of the first core, if it does.
fn clock_hz() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    line.split(':').nth(1)?.trim().parse::<f64>().ok().map(|mhz| mhz * 1e6)
}

/// A clock to count operations by if none is reported: rates do not depend on it.
const SOME_CLOCK_HZ: f64 = 3e9;

/// Writes a profile of this machine; the rates with the most threads are the chip's.
///
/// # Errors
/// `Error::Argument` if there are no rates.
pub fn to_profile(name: &str, levels: &[Level], all: &[Rates]) -> Result<String> {
    let widest = all.iter().max_by_key(|r| r.threads);
    let widest = widest.ok_or_else(|| Error::argument("rates", "at least one number of threads", "none"))?;
    let threads = widest.threads as f64;
    let text = |value: &str| serde_json::Value::from(value);
    let clock = clock_hz();
    let (clock_hz, basis, source) = match clock {
        Some(clock) => (clock, "derived", "what the operating system reports"),
        None => (SOME_CLOCK_HZ, "guess", "not reported; no rate depends on it"),
    };
    let mut out = format!(
        "#:schema ./schema.json\n# Written by `halite calibrate`.\n\nname = {}\nvendor = \"this machine\"\nsummary = {}\n\
         driver = \"cpu\"\nbasis = \"measured\"\nsource = \"calibrate\"\n\n[sources]\ncalibrate = \"halite calibrate\"\n\n",
        text(name),
        text(&format!("{} on {} threads, measured.", widest.isa, widest.threads)),
    );
    out += &format!(
        "[chip]\nclock_hz = {{ value = {}, basis = {}, source = {} }}\nclusters = 1\ntiles_per_cluster = {}\n\n",
        digits(clock_hz),
        text(basis),
        text(source),
        widest.threads
    );
    out += "[vector]\nunits_per_tile = 1\n";
    for (dtype, rate) in [("fp32", widest.float_ops_per_s), ("int8", widest.integer_ops_per_s)] {
        out += &format!("\n[[vector.rate]]\ndtype = {}\n", text(dtype));
        out += &format!("ops_per_cycle = {}\n", digits(rate / threads / clock_hz));
    }
    for (level, (read, copy)) in levels.iter().zip(&widest.levels) {
        let (scope, share) = if level.per_core { ("tile", threads) } else { ("chip", 1.0) };
        let managed = if level.name == "memory" { "software" } else { "hardware" };
        out += &format!(
            "\n[[memory]]\nname = {}\nscope = {}\nmanaged = {}\n",
            text(&level.name),
            text(scope),
            text(managed)
        );
        let bytes = if level.name == "memory" { memory_bytes(level) } else { level.bytes };
        out += &format!(
            "capacity_bytes = {{ value = {bytes}, basis = \"derived\", source = {} }}\n",
            text(SAID)
        );
        out += &format!("read_bytes_per_s = {}\n", digits(read / share));
        out += &format!("write_bytes_per_s = {} # copied: as many were read\n", digits(copy / share));
        out += &format!("latency_ns = {}\n", digits(level.latency_s * 1e9));
    }
    out += &format!("\n[launch]\nkernel_ns = {}\n", digits(widest.op_s * 1e9));
    for rates in all {
        out += &format!("\n[[calibration.host]]\nthreads = {}\nisa = {}\n", rates.threads, text(rates.isa));
        for (key, value) in [
            ("op_ns", rates.op_s * 1e9),
            ("integer_ops_per_s", rates.integer_ops_per_s),
            ("float_ops_per_s", rates.float_ops_per_s),
            ("row_bytes_per_s", rates.row_bytes_per_s),
            ("attend_bytes_per_s", rates.attend_bytes_per_s),
            ("attend_ops_per_s", rates.attend_ops_per_s),
        ] {
            out += &format!("{key} = {}\n", digits(value));
        }
        for (level, (read, copy)) in levels.iter().zip(&rates.levels) {
            out += &format!("\n[[calibration.host.level]]\nname = {}\n", text(&level.name));
            out += &format!("read_bytes_per_s = {}\ncopy_bytes_per_s = {}\n", digits(*read), digits(*copy));
        }
        for (format, one, many) in &rates.products {
            out += &format!("\n[[calibration.host.product]]\nformat = {}\n", text(format.name()));
            out += &format!("weight_bytes_per_s = {}\nproduct_ops_per_s = {}\n", digits(*one), digits(*many));
        }
    }
    Ok(out)
}

const SAID: &str = "reported by the operating system";

/// Returns the machine's memory, or the size of the measured buffer.
fn memory_bytes(level: &Level) -> u64 {
    Cpu::with_threads(1).map_or(level.bytes, |cpu| cpu.caps().memory_bytes.clamp(level.bytes, 1 << 46))
}

/// Four digits.
pub(super) fn digits(value: f64) -> String {
    let rounded: f64 = format!("{value:.3e}").parse().unwrap_or(value);
    format!("{rounded:?}")
}

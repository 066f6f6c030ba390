//! Times of devices that are not simulated: every format on every chip has one, the ones that can be worked out by hand are right, and
//! more of a chip never takes longer.

use halite::kernels::formats::Format;
use halite::passes;
use halite::program::{Builder, Dim, Program, WeightInfo};
use halite::synth::{Formats, Synth, shape};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Driver, Profile, SHIPPED};
use halite_sim::estimate::device::Device;
use halite_sim::estimate::fit::{fit, with_calibration};
use halite_sim::estimate::host::{COMPUTE_FRACTION, MEMORY_FRACTION};
use halite_sim::estimate::kernel::{self, Kernel, Source, Stored, assume, distinct_experts};
use halite_sim::estimate::points::{Point, held_out};
use halite_sim::estimate::system::{Layout, stages};
use halite_sim::estimate::workload::{Choices, Quick, Workload, estimate};

const FORMATS: [Format; 9] = [
    Format::F32,
    Format::BF16,
    Format::F16,
    Format::Q8_0,
    Format::Q6_K,
    Format::Q4_0,
    Format::MXFP4,
    Format::NVFP4,
    Format::IQ2_XXS,
];

fn model(name: &str, format: Format) -> Program {
    let model = Synth::new(shape(name).unwrap(), Formats::of(format), 0).unwrap().model().unwrap();
    passes::fuse(&model.program(Default::default(), 4096).unwrap(), halite_sim::FUSIONS)
}

fn profiles() -> impl Iterator<Item = Profile> {
    SHIPPED.iter().map(|(name, _)| Profile::open(name).unwrap())
}

fn devices() -> impl Iterator<Item = Profile> {
    profiles().filter(|profile| profile.driver != Driver::Sim)
}

/// All formats have a time on all chips, for dense models and mixtures of experts, a sequence and 64; only what does not fit a
/// simulated scratchpad has none. What was not measured is told.
/// Seconds of a workload by the closed form.
fn closed_s(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
) -> halite::Result<f64> {
    let stages = stages(program, Layout::default())?;
    Ok(Quick::new(choices, &stages, workload)?.times(profile)?.seconds)
}

#[test]
fn every_format_has_a_time_on_every_chip() {
    let mut answers = 0;
    for format in FORMATS {
        for name in ["tiny", "tiny-moe"] {
            let program = model(name, format);
            for (profile, batch) in profiles().flat_map(|p| [(p.clone(), 1), (p, 64)]) {
                let workload = Workload::default().batch(batch).prompt(256).generate(64).chunk(128);
                let what = format!("{name}, {format:?}, {}, batch {batch}", profile.name);
                if profile.driver == Driver::Sim {
                    match closed_s(&profile, Choices::default(), &program, &workload) {
                        Ok(seconds) => assert!(seconds > 0.0 && seconds.is_finite(), "{what}: {seconds}"),
                        Err(error) => assert!(error.to_string().contains("scratchpad"), "{what}: {error}"),
                    }
                    continue;
                }
                let e = estimate(&profile, Choices::default(), &program, &workload).unwrap();
                answers += 1;
                assert!(e.step_s > 0.0 && e.first_token_s > e.step_s && e.seconds.is_finite(), "{what}");
                assert!(e.error.is_some() == e.unmeasured.is_empty(), "{what}: {:?}", e.unmeasured);
                let is_calibrated = profile.calibration.is_some();
                assert!(is_calibrated || e.error.is_none(), "{what}");
                // Those of GPUs that were not measured are extrapolated from others.
                assert_eq!(e.step_interval_s.is_some(), profile.driver == Driver::Gpu, "{what}");
                if let Some([low, high]) = e.step_interval_s {
                    assert!(low < e.step_s && e.step_s < high, "{what}: {low} {high}");
                    assert!(is_calibrated || high / low > 1.3, "{what}: {low} {high}");
                }
            }
        }
    }
    assert_eq!(answers, FORMATS.len() * 2 * 2 * 5, "devices were left out");
}

/// A GPU of round numbers: one tile, 1e12 operations/s, 1e10 bytes/s, and kernels that start at once.
const PLAIN: &str = r#"
name = "plain"
vendor = "nobody"
summary = "Round numbers."
driver = "gpu"
basis = "derived"
source = "chosen"
[chip]
clock_hz = 1e9
clusters = 1
tiles_per_cluster = 1
[matrix]
units_per_tile = 1
rows = 25
columns = 20
dataflow = "output_stationary"
pipelined = true
[[matrix.rate]]
activations = "fp16"
weights = "fp16"
accumulator = "fp32"
depth_per_cycle = 1
[[matrix.rate]]
activations = "int8"
weights = "int8"
accumulator = "int32"
depth_per_cycle = 2
[vector]
units_per_tile = 1
rate = [{ dtype = "fp32", ops_per_cycle = 100 }]
[[memory]]
name = "scratchpad"
scope = "tile"
managed = "software"
capacity_bytes = 1e6
read_bytes_per_s = 1e12
latency_ns = 1
[[memory]]
name = "cache"
scope = "chip"
managed = "hardware"
capacity_bytes = 1e6
read_bytes_per_s = 1e11
latency_ns = 2
[[memory]]
name = "dram"
scope = "chip"
managed = "software"
capacity_bytes = 1e11
read_bytes_per_s = 1e10
latency_ns = 3
[launch]
kernel_ns = 0
"#;

fn product(format: Format) -> Program {
    let lookup = move |_: &str| Some(WeightInfo::new(vec![4096, 4096], format));
    let mut b = Builder::new("product", &lookup);
    let x = b.input("x", Dim::Tokens, 4096);
    let w = b.weight("w", 4096, 4096);
    let y = b.linear("y", x, w, None);
    b.output(y);
    b.finish().unwrap()
}

fn seconds(profile: &Profile, products: Option<Dtype>, program: &Program, spans: &[(u32, u32)]) -> f64 {
    Device::new(profile, products).unwrap().time(program, spans).unwrap().total().seconds
}

fn near(got: f64, want: f64, tolerance: f64) {
    assert!((got / want - 1.0).abs() < tolerance, "{got}, expected {want}");
}

/// 1024 tokens: waves of 128 x 128 results at a fraction of the peak, and 0.367 us each; the bytes at a fraction of the bandwidth; combined
/// with an exponent.
#[test]
fn products_of_a_gpu_are_its_roofline() {
    let plain = Profile::parse("plain", PLAIN).unwrap();
    let side = 4096.0f64;
    let roofline = |[compute, memory, wave_s, p]: [f64; 4], ops_per_s: f64, bits: f64, activation: f64| {
        let compute_s = 256.0 * (2.0 * 128.0 * 128.0 * side / (compute * ops_per_s) + wave_s);
        let bytes = side * side * bits / 8.0 + 1024.0 * side * (activation + 2.0);
        let memory_s = bytes / (memory * 1e10);
        (compute_s.powf(p) + memory_s.powf(p)).powf(1.0 / p)
    };
    let combined =
        |ops_per_s, bits, activation| roofline([0.828, 0.952, 0.367e-6, 1.65], ops_per_s, bits, activation);
    let narrow = roofline([0.621, 0.934, 0.41e-6, 1.58], 2e12, 8.5, 1.0);
    let took = |format, products| seconds(&plain, products, &product(format), &[(0, 1024)]);
    near(took(Format::F16, None), combined(1e12, 16.0, 2.0), 1e-9);
    // The chip has no bf16: products are in fp16.
    near(took(Format::BF16, None), combined(1e12, 16.0, 2.0), 1e-9);
    near(took(Format::Q8_0, Some(Dtype::Int8)), narrow, 1e-9);
    // Unpacked weights keep their bytes and take the rate of fp16; 8 blocks of 128 rows unpack each weight anew, at 4 operations.
    let unpack_s = 8.0 * side * side * 4.0 / 1e11;
    near(took(Format::Q4_0, None), combined(1e12, 4.5, 2.0).max(unpack_s), 1e-9);
    near(took(Format::NVFP4, None), combined(1e12, 4.5, 2.0).max(unpack_s), 1e-9);
    // Other ops and attention do not take the format of products.
    let h100 = Profile::open("nvidia-h100").unwrap();
    let device = Device::new(&h100, Some(Dtype::Fp8E4m3)).unwrap();
    let (_, assumed) = device.error(&model("tiny", Format::Q8_0), &[&[(0, 64)], &[(64, 1)]]).unwrap();
    assert_eq!(
        assumed,
        ["weights of Q8_0: products as measured in fp8_e4m3 x fp8_e4m3, with their own bytes"]
    );
    let error = Device::new(&plain, Some(Dtype::Fp8E4m3)).unwrap_err().to_string();
    assert!(error.contains("fp16") && error.contains("fp8_e4m3"), "{error}");
}

/// Tokens choose among experts with repetition: 8 experts of 2 each are hit 2, 3.5, 8 (1 - 0.75^n).
#[test]
fn few_tokens_hit_few_experts() {
    for (tokens, hit) in [(1.0, 2.0), (2.0, 3.5), (3.0, 4.625)] {
        near(distinct_experts(8.0, 2.0, tokens), hit, 1e-12);
    }
    near(distinct_experts(8.0, 2.0, 1000.0), 8.0, 1e-9);
    near(distinct_experts(4.0, 4.0, 1.0), 4.0, 1e-12);
    // On a device, the bytes are those of the expected experts.
    let plain = Profile::parse("plain", PLAIN).unwrap();
    let program = model("moe-8x2", Format::F16);
    let device = Device::new(&plain, None).unwrap();
    for (tokens, hit) in [(1, 2.0), (2, 3.5), (64, 8.0)] {
        let report = device.time(&program, &vec![(100, 1); tokens]).unwrap();
        let experts = report.ops.iter().find(|op| op.name.starts_with("Experts")).unwrap();
        near(experts.time.read_bytes / experts.count as f64, hit * 3.0 * 1024.0 * 2816.0 * 2.0, 0.02);
    }
}

/// A CPU without measurements: stated fractions of its bandwidth and of its dot products, and the weights of a batch once.
#[test]
fn products_of_a_cpu_are_its_roofline() {
    let profile = Profile::open("generic-x86-avx512").unwrap();
    let took = |format, spans: &[_]| seconds(&profile, None, &product(format), spans);
    let one = |bits: f64| 4096.0 * 4096.0 * bits / 8.0 / (MEMORY_FRACTION * 77e9) + 2e-6;
    near(took(Format::Q4_0, &[(0, 1)]), one(4.5), 1e-9);
    near(took(Format::F32, &[(0, 1)]), one(32.0), 1e-9);
    near(took(Format::Q4_0, &[(7, 1); 4]), one(4.5), 1e-9);
    let many = |per_cycle: f64| {
        2.0 * 512.0 * 4096.0 * 4096.0 / (COMPUTE_FRACTION * per_cycle * 2.0 * 8.0 * 3e9) + 2e-6
    };
    near(took(Format::Q4_0, &[(0, 512)]), many(128.0), 1e-9);
    near(took(Format::F16, &[(0, 512)]), many(32.0), 1e-9);
    near(took(Format::Q4_0, &[(0, 1); 512]), many(128.0), 1e-9);
}

/// More bandwidth, clock, units or tiles never take longer.
#[test]
fn more_of_a_chip_never_takes_longer() {
    let programs = [
        model("llama-1.1b", Format::BF16),
        model("llama-1.1b", Format::Q4_0),
        model("moe-8x2", Format::Q8_0),
    ];
    let steps = [vec![(1000, 1)], vec![(500, 1); 64], vec![(512, 512)]];
    let keys = [
        "clock_hz",
        "read_bytes_per_s",
        "units_per_tile",
        "depth_per_cycle",
        "ops_per_cycle",
        "clusters",
        "tiles_per_cluster",
    ];
    let mut faster = 0;
    for profile in devices() {
        for (path, quantity) in &profile.quantities {
            if !path.rsplit('.').next().is_some_and(|key| keys.contains(&key)) {
                continue;
            }
            let more = profile.with(path, quantity.value * 2.0).unwrap();
            for (program, spans) in programs.iter().flat_map(|p| steps.iter().map(move |s| (p, s))) {
                let (before, after) =
                    (seconds(&profile, None, program, spans), seconds(&more, None, program, spans));
                assert!(after <= before * (1.0 + 1e-12), "{}, {path}: {before} to {after}", profile.name);
                faster += usize::from(after < 0.99 * before);
            }
        }
    }
    assert!(faster > 100, "hardly any number has an effect: {faster}");
}

/// With the same constants, fewer stored bits and fewer tokens never take longer.
#[test]
fn fewer_bits_and_tokens_never_take_longer() {
    for profile in devices().filter(|p| p.driver == Driver::Gpu) {
        let (formats, _) = kernel::products(&profile)[1];
        let mut sources = Vec::new();
        for kernel in [
            Kernel::MatMul { m: 1, n: 4096, k: 4096 },
            Kernel::MatMul { m: 300, n: 11008, k: 4096 },
            Kernel::Experts { experts: 8, rows: 128, columns: 4096, hidden: 14336 },
        ] {
            let mut last = (Source::Assumed, 0.0);
            for bits in [2.0, 3.0, 4.25, 4.5, 6.5, 8.5, 16.0] {
                let stored = Stored { weight_bits: bits, ..Stored::of(formats) };
                let e = assume(&profile, formats, stored, kernel).unwrap();
                assert!(
                    e.source != last.0 || e.seconds >= last.1,
                    "{}: {kernel:?} in {bits} bits",
                    profile.name
                );
                last = (e.source, e.seconds);
                sources.push(e.source);
            }
        }
        assert!(sources.len() == 21);
        let prefill = |tokens: u64| {
            let (kv_len, seen) = (tokens, tokens * (tokens + 1) / 2);
            let kernel =
                Kernel::Prefill { batch: 1, heads: 32, kv_heads: 8, head_dim: 128, tokens, kv_len, seen };
            assume(&profile, formats, Stored::of(formats), kernel).unwrap().seconds
        };
        let times = [1, 100, 128, 500, 512, 2048, 8192].map(prefill);
        assert!(times.is_sorted() && times[6] > 10.0 * times[4], "{}: {times:?}", profile.name);
        let experts = [1, 2, 4, 8].map(|experts| {
            let kernel = Kernel::Experts { experts, rows: 8, columns: 4096, hidden: 14336 };
            assume(&profile, formats, Stored::of(formats), kernel).unwrap().seconds
        });
        assert!(experts.is_sorted(), "{}: {experts:?}", profile.name);
    }
}

/// Made-up times of the formulas are fitted again, and the interval of a fit covers what it says of held-out points.
#[test]
fn prefill_attention_and_experts_are_fitted() {
    let h100 = Profile::open("nvidia-h100").unwrap();
    let formats = kernel::Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };
    let mut points = Vec::new();
    let mut add = |kernel| {
        let seconds = assume(&h100, formats, Stored::of(formats), kernel).unwrap().seconds;
        // Errors of -10 to 10 %, evenly.
        let noise = 0.9 + 0.2 * ((points.len() * 37) % 101) as f64 / 100.0;
        points.push(Point { kernel, formats, seconds: seconds * noise });
    };
    for (kv_heads, group) in (1..=12).flat_map(|heads| [1, 2, 4].map(|group| (heads, group))) {
        for (batch, tokens) in [1, 4, 16].into_iter().flat_map(|b| [64, 256, 1024, 4096].map(|t| (b, t))) {
            let (heads, head_dim, kv_len, seen) = (kv_heads * group, 128, tokens, tokens * (tokens + 1) / 2);
            add(Kernel::Prefill { batch, heads, kv_heads, head_dim, tokens, kv_len, seen });
        }
    }
    for (columns, hidden) in (1..=6).flat_map(|c| (1..=7).map(move |h| (512 * c, 768 * h))) {
        for tokens in [1, 8, 64, 512, 4096] {
            let experts = (2 * tokens).min(8);
            add(Kernel::Experts { experts, rows: 2 * tokens, columns, hidden });
        }
    }
    let fits = fit(&h100, &points).unwrap();
    assert_eq!(fits.iter().map(|fit| fit.op.name()).collect::<Vec<_>>(), ["prefill", "experts"]);
    for fit in &fits {
        let (count, mean, _) = fit.errors(None);
        assert!(count > 20 && mean < 0.08, "{}: {mean}", fit.op.name());
        assert!(fit.residuals.iter().all(|r| held_out(r.point.kernel)));
        for interval in &fit.intervals {
            let [low, high] = interval.ratios;
            assert!(low > 0.85 && low < 1.0 && high > 1.0 && high < 1.15, "{interval:?}");
            assert!(interval.coverage.is_some_and(|c| (0.6..=0.95).contains(&c)), "{interval:?}");
        }
        assert!(!fit.intervals.is_empty());
    }
    // A profile with the fit gives the times of the fit, and their interval.
    let text = SHIPPED.iter().find(|(name, _)| *name == "nvidia-h100").unwrap().1;
    let fitted = Profile::parse("fitted", &with_calibration(text, &fits, None, "made-up times")).unwrap();
    for residual in fits.iter().flat_map(|fit| &fit.residuals) {
        let e = kernel::estimate(&fitted, formats, residual.point.kernel).unwrap();
        near(e.seconds, (1.0 + residual.error) * residual.point.seconds, 0.02);
        assert!(e.interval.is_some_and(|[low, high]| low < high));
    }
}

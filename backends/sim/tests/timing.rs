//! The time of simulated chips: cases that can be worked out by hand, and the closed form beside the events.

use halite::kernels::formats::Format;
use halite::passes;
use halite::program::{Builder, Dim, Program, WeightInfo};
use halite::synth::{Formats, Synth, shape};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Basis, Profile};
use halite_sim::estimate::kernel::{self, Kernel};
use halite_sim::estimate::system::{Layout, stages};
use halite_sim::estimate::workload::{Choices, Quick, Workload, estimate};
use halite_sim::{Bound, Chip, Numerics, Queue, step};

/// A chip to calculate with: one tile; memory and its engine move a byte a nanosecond; nothing else takes time but the units.
const PLAIN: &str = r#"
name = "plain"
vendor = "nobody"
summary = "Round numbers."
driver = "sim"
basis = "derived"
source = "chosen"
[chip]
clock_hz = 1e9
clusters = 1
tiles_per_cluster = 1
[matrix]
units_per_tile = 1
rows = 16
columns = 16
dataflow = "output_stationary"
pipelined = true
fill_cycles = 1
[[matrix.rate]]
activations = "fp32"
weights = "fp32"
accumulator = "fp32"
depth_per_cycle = 1
[vector]
units_per_tile = 1
rate = [{ dtype = "fp32", ops_per_cycle = 2 }]
[[memory]]
name = "scratchpad"
scope = "tile"
managed = "software"
capacity_bytes = 1e6
read_bytes_per_s = 2e9
latency_ns = 1
[[memory]]
name = "dram"
scope = "chip"
managed = "software"
capacity_bytes = 1e9
read_bytes_per_s = 2e9
latency_ns = 1
[[dma]]
name = "copy"
scope = "tile"
engines = 2
bytes_per_s = 1e9
setup_ns = 1
max_dimensions = 2
queue_entries = 8
[launch]
kernel_ns = 1
"#;

fn plain(changes: &[(&str, f64)]) -> Chip {
    let profile = Profile::parse("plain", PLAIN).unwrap();
    let profile = changes.iter().fold(profile, |p, (path, value)| p.with(path, *value).unwrap());
    Chip::new(profile, Numerics::Exact, None).unwrap()
}

/// `[tokens, k]` times a weight of `n` rows.
fn product(n: u32, k: u32) -> Program {
    let lookup = move |_: &str| Some(WeightInfo::new(vec![k.into(), n.into()], Format::F32));
    let mut b = Builder::new("product", &lookup);
    let x = b.input("x", Dim::Tokens, k);
    let w = b.weight("w", n, k);
    let y = b.linear("y", x, w, None);
    b.output(y);
    b.finish().unwrap()
}

fn near(got: f64, want: f64, part: f64) {
    assert!((got / want - 1.0).abs() < part, "{got:e} instead of {want:e}");
}

/// Memory alone: a matrix unit without end leaves the time of the bytes.
#[test]
fn a_pure_stream_takes_its_bytes() {
    let (n, k) = (2048, 1024);
    let chip = plain(&[("matrix.rate.0.depth_per_cycle", 1e6)]);
    let time = step::time(&chip, &product(n, k), &[(0, 1)], true).unwrap().total();
    let bytes = 4.0 * f64::from(n * k + k);
    near(time.read_bytes, bytes, 1e-9);
    near(time.busy_s[Queue::Load as usize], 1e-9 * bytes, 1e-9);
    near(time.seconds, 1e-9 * bytes, 0.02);
    assert_eq!(time.shares()[0].0, Bound::Dma);
}

/// The matrix unit alone: sixteen rows by sixteen columns, one of `k` a cycle.
#[test]
fn a_pure_product_takes_its_cycles() {
    let (tokens, n, k) = (64, 512, 512);
    let fast = [("dma.copy.bytes_per_s", 1e15), ("memory.dram.read_bytes_per_s", 1e15)];
    let chip = plain(&[&fast[..], &[("memory.scratchpad.read_bytes_per_s", 1e15)]].concat());
    let time = step::time(&chip, &product(n, k), &[(0, tokens)], true).unwrap().total();
    let cycles = f64::from(tokens / 16 * (n / 16) * k);
    near(time.busy_s[Queue::Matrix as usize], 1e-9 * cycles, 1e-9);
    near(time.seconds, 1e-9 * cycles, 0.01);
    assert_eq!(time.bound(), Bound::Matrix);
    assert_eq!(time.matrix_ops, 2.0 * f64::from(tokens * n * k));
}

/// Both take the same time, and overlap: together they take hardly more than one.
#[test]
fn loads_and_products_overlap() {
    let (n, k) = (4096, 512);
    // A column of 4 k bytes takes 4 k ns to load; sixteen of them take k / depth ns to multiply.
    let chip = plain(&[("matrix.rate.0.depth_per_cycle", 1.0 / 64.0)]);
    let time = step::time(&chip, &product(n, k), &[(0, 1)], true).unwrap().total();
    let (load, matrix) = (time.busy_s[Queue::Load as usize], time.busy_s[Queue::Matrix as usize]);
    near(load, matrix, 0.01);
    near(time.seconds, load, 0.1);
}

/// One queue stalls: with one request at a time each load pays its setup.
#[test]
fn a_stalled_queue_pays_every_setup() {
    let (n, k) = (64, 8192);
    let setup_ns = 50_000.0;
    let changes = [("dma.copy.setup_ns", setup_ns), ("dma.copy.queue_entries", 1.0)];
    let chip = plain(&[&changes[..], &[("matrix.rate.0.depth_per_cycle", 1e6)]].concat());
    let time = step::time(&chip, &product(n, k), &[(0, 1)], true).unwrap().total();
    let bytes_s = 1e-9 * 4.0 * f64::from(n * k + k);
    let setups = (time.seconds - bytes_s) / (1e-9 * setup_ns);
    // One for activations, one for each block of weights, and one for the last result.
    assert!((setups - setups.round()).abs() < 0.05 && setups > 3.0, "{setups}");
    let patient = plain(&[("dma.copy.setup_ns", setup_ns), ("matrix.rate.0.depth_per_cycle", 1e6)]);
    let ahead = step::time(&patient, &product(n, k), &[(0, 1)], true).unwrap().total();
    assert!(ahead.seconds < time.seconds - 1e-9 * setup_ns);
}

fn model(name: &str, format: Format) -> Program {
    let formats = Formats::of(format);
    let model = Synth::new(shape(name).unwrap(), formats, 0).unwrap().model().unwrap();
    passes::fuse(&model.program(Default::default(), 4096).unwrap(), halite_sim::FUSIONS)
}

fn chip(name: &str) -> Chip {
    Chip::new(Profile::open(name).unwrap(), Numerics::Exact, None).unwrap()
}

/// The closed form is near the events, over chips, models, formats and steps.
#[test]
fn the_closed_form_is_near_the_events() {
    let mut worst = (0.0, String::new());
    for chip_name in ["maia-100", "maia-200", "tpu-v1", "coral-edge-tpu", "teaching-16x16"] {
        for (model_name, format) in [
            ("llama-1.1b", Format::Q4_0),
            ("llama-1.1b", Format::Q8_0),
            ("llama-1.1b", Format::BF16),
            ("moe-8x2", Format::MXFP4),
            ("llama-2-7b", Format::Q4_K),
        ] {
            let (chip, program) = (chip(chip_name), model(model_name, format));
            for spans in [vec![(0, 1)], vec![(1000, 1)], vec![(300, 1); 8], vec![(0, 64)], vec![(128, 128)]] {
                let events = step::time(&chip, &program, &spans, true).unwrap();
                let closed = step::closed(&chip, &program, &spans, true).unwrap();
                let error = closed / events.total().seconds - 1.0;
                if error.abs() > worst.0 {
                    worst = (
                        error.abs(),
                        format!("{chip_name}, {model_name} {format:?}, {spans:?}: {error:+.3}"),
                    );
                }
            }
        }
    }
    eprintln!("worst: {}", worst.1);
    assert!(worst.0 < 0.15, "{}", worst.1);
}

/// The same on chips with scratchpads so small that products are cut.
#[test]
fn the_closed_form_is_near_the_events_of_cut_products() {
    let mut worst = (0.0, String::new());
    for (chip_name, memory, bytes) in [
        ("maia-100", "tsram", 65_536.0),
        ("maia-100", "tsram", 262_144.0),
        ("tpu-v1", "unified_buffer", 131_072.0),
        ("teaching-16x16", "scratchpad", 49_152.0),
    ] {
        let profile = Profile::open(chip_name).unwrap();
        let profile = profile.with(&format!("memory.{memory}.capacity_bytes"), bytes).unwrap();
        let chip = Chip::new(profile, Numerics::Exact, None).unwrap();
        for (model_name, format) in [
            ("llama-1.1b", Format::Q4_0),
            ("llama-1.1b", Format::F16),
            ("moe-8x2", Format::MXFP4),
            ("llama-2-7b", Format::Q4_K),
        ] {
            let program = model(model_name, format);
            for spans in [vec![(0, 1)], vec![(300, 1); 8], vec![(0, 64)], vec![(128, 128)]] {
                let events = step::time(&chip, &program, &spans, true).unwrap().total().seconds;
                let error = step::closed(&chip, &program, &spans, true).unwrap() / events - 1.0;
                let what =
                    format!("{chip_name}, {bytes} bytes, {model_name} {format:?}, {spans:?}: {error:+.3}");

                if error.abs() > worst.0 {
                    worst = (error.abs(), what);
                }
            }
        }
    }
    eprintln!("worst: {}", worst.1);
    assert!(worst.0 < 0.15, "{}", worst.1);
}

/// A model of 7 billion weights runs on tiles of 32 KiB, if a page of its cache fits.
#[test]
fn small_tiles_run_large_models() {
    let profile = Profile::open("maia-100").unwrap().with("memory.tsram.capacity_bytes", 32_768.0).unwrap();
    let chip = Chip::new(profile, Numerics::Exact, None).unwrap();
    for format in [Format::Q4_0, Format::F16, Format::Q4_K] {
        let synth = Synth::new(shape("llama-2-7b").unwrap(), Formats::of(format), 0).unwrap();
        let options = halite::model::ProgramOptions::default().kv_format(Format::Q8_0);
        let program = synth.model().unwrap().program(options, 4096).unwrap();
        let program = passes::fuse(&program, halite_sim::FUSIONS);
        let events = step::time(&chip, &program, &[(100, 1)], true).unwrap().total().seconds;
        let closed = step::closed(&chip, &program, &[(100, 1)], true).unwrap();
        eprintln!("{format:?}: {events:e} s, closed form {closed:e} s");
        near(closed, events, 0.15);
    }
}

/// Sums that the matrix unit cannot keep pass through the scratchpad, which takes time.
#[test]
fn few_accumulators_take_time() {
    let profile = Profile::open("maia-100").unwrap().with("memory.tsram.capacity_bytes", 262_144.0).unwrap();
    let program = model("llama-1.1b", Format::F16);
    let times = |accumulator_bytes: f64| {
        let profile = profile.with("matrix.accumulator_bytes", accumulator_bytes).unwrap();
        let chip = Chip::new(profile, Numerics::Exact, None).unwrap();
        let events = step::time(&chip, &program, &[(0, 256)], true).unwrap().total();
        (step::closed(&chip, &program, &[(0, 256)], true).unwrap(), events.scratch_bytes)
    };
    let (most, some, none) = (times(1e6), times(16_384.0), times(4.0));
    assert!(most.0 <= some.0 && some.0 < none.0, "{most:?}, {some:?}, {none:?}");
    assert!(most.1 < none.1, "{most:?}, {none:?}");
}

/// Less of anything never makes a chip faster by more than the choice of tiles can.
#[test]
fn slower_chips_are_slower() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = Profile::open("maia-100").unwrap();
    let seconds = |profile: Profile| {
        let chip = Chip::new(profile, Numerics::Exact, None).unwrap();
        step::time(&chip, &program, &[(500, 1)], true).unwrap().total().seconds
    };
    let before = seconds(profile.clone());
    for (path, factor) in [
        ("memory.hbm.read_bytes_per_s", 0.5),
        ("dma.tile_dma.bytes_per_s", 0.1),
        ("chip.clock_hz", 0.5),
        ("vector.rate.0.ops_per_cycle", 0.25),
        ("sync.barrier_ns", 4.0),
        ("launch.graph_kernel_ns", 4.0),
        ("dma.tile_dma.setup_ns", 10.0),
        ("memory.hbm.latency_ns", 4.0),
    ] {
        let value = profile.quantities.iter().find(|(p, _)| p == path).unwrap().1.value;
        let after = seconds(profile.with(path, value * factor).unwrap());
        assert!(after > 1.02 * before, "{path}: {after} after {before}");
    }
}

/// How a chip's totals are cut into tiles hardly matters for steps that have work for all.
#[test]
fn few_large_tiles_are_as_fast_as_many_small_ones() {
    let profile = Profile::open("maia-100").unwrap();
    let value = |path: &str| profile.quantities.iter().find(|(p, _)| p == path).unwrap().1.value;
    let cut = |tiles: f64| {
        let each = [
            "matrix.units_per_tile",
            "vector.units_per_tile",
            "memory.tsram.capacity_bytes",
            "memory.tsram.read_bytes_per_s",
            "memory.csram.capacity_bytes",
            "memory.csram.read_bytes_per_s",
            "dma.tile_dma.bytes_per_s",
            "dma.cluster_dma.bytes_per_s",
        ];
        let larger = each.map(|path| (path, value(path) * 64.0 / tiles));
        // A tile has a port, and a large one as many as the tiles that it replaces.
        let ports = ("noc.link_bytes_per_cycle", value("noc.link_bytes_per_cycle") * (64.0 / tiles).max(1.0));
        let changes = larger.into_iter().chain([("chip.clusters", tiles / 4.0), ports]);
        let profile = changes.fold(profile.clone(), |p, (path, value)| p.with(path, value).unwrap());
        Chip::new(profile, Numerics::Exact, None).unwrap()
    };
    let chips = [8.0, 32.0, 128.0].map(cut);
    for (name, format) in
        [("llama-1.1b", Format::Q8_0), ("llama-2-7b", Format::Q4_0), ("llama-3-8b", Format::BF16)]
    {
        let program = model(name, format);
        for (sequences, positions) in [(8, 100), (8, 1000), (16, 4000), (64, 500)] {
            let spans = vec![(positions, 1); sequences];
            let time = |chip| step::time(chip, &program, &spans, true).unwrap().total().seconds;
            let seconds = chips.each_ref().map(time);
            let (least, most) = seconds.iter().fold((f64::MAX, 0.0f64), |(a, b), &s| (a.min(s), b.max(s)));
            assert!(most <= 1.25 * least, "{name}, {sequences} at {positions}: {seconds:?}");
        }
    }
}

/// Numbers that are said to have no effect have none, and there are not more of them than there should be.
#[test]
fn numbers_without_effect_change_nothing() {
    let program = model("llama-1.1b", Format::Q4_0);
    let took = |profile: Profile| {
        let chip = Choices::default().chip(profile).unwrap();
        [vec![(1000, 1)], vec![(100, 1); 16], vec![(0, 128)]].map(|spans| {
            let total = step::time(&chip, &program, &spans, true).unwrap().total();
            (total.seconds, total.joules)
        })
    };
    for name in ["maia-100", "maia-200", "tpu-v1", "teaching-16x16", "tenstorrent-p150"] {
        let chip = chip(name);
        let before = took(chip.profile().clone());
        for (path, why) in chip.without_effect() {
            let (_, quantity) = chip.profile().quantities.iter().find(|(p, _)| p == path).unwrap();
            for factor in [0.5, 2.0] {
                let changed = chip.profile().with(path, quantity.value * factor).unwrap();
                assert_eq!(took(changed), before, "{name}: {path} times {factor}, of which is said: {why}");
            }
        }
    }
    let maia = chip("maia-100");
    let said = maia.without_effect();
    let has = |path: &str| said.iter().any(|(p, _)| *p == path);
    assert!(has("memory.csram.banks") && has("dma.cluster_dma.setup_ns") && has("interconnect.host.links"));
    assert!(
        !has("memory.hbm.read_bytes_per_s")
            && !has("memory.csram.read_bytes_per_s")
            && !has("dma.tile_dma.setup_ns")
            && !has("launch.graph_kernel_ns")
    );
}

#[test]
fn too_many_tiles_are_refused() {
    let profile = Profile::open("maia-100").unwrap().with("chip.clusters", 65_536.0).unwrap();
    let error = Chip::new(profile, Numerics::Exact, None).unwrap_err().to_string();
    assert!(error.contains("at most 16384") && error.contains("262144 in `maia-100`"), "{error}");
}

/// A workload is its steps; what it rests on is told.
#[test]
fn workloads_add_up() {
    let profile = Profile::open("maia-100").unwrap();
    let program = model("llama-1.1b", Format::Q8_0);
    let workload = Workload::default().batch(4).prompt(1000).generate(100).chunk(512);
    let e = estimate(&profile, Choices::default(), &program, &workload).unwrap();
    near(e.first_token_s, 8.0 * e.prefill.total().seconds, 1e-9);
    near(e.seconds, e.first_token_s + 99.0 * e.step_s, 1e-9);
    near(e.tokens_per_s, 4.0 / e.step_s, 1e-9);
    assert!(
        e.fits() && e.need_bytes == program.weight_bytes() + 4 * program.kv_bytes(|_| 1100u64.div_ceil(64))
    );
    let rests: f64 = e.rests_on().values().sum();
    near(rests, 1.0, 1e-9);
    assert!(e.rests_on()[&Basis::Guess] > 0.1 && e.joules_per_token.unwrap().total() > 0.0);
    let stages = stages(&program, Layout::default()).unwrap();
    let quick = Quick::new(Choices::default(), &stages, &workload).unwrap();
    near(quick.times(&profile).unwrap().seconds, e.seconds, 0.15);
    // Twice the bandwidth cannot take less than half the time.
    assert!(e.sensitivities.iter().all(|s| s.exponent.abs() <= 1.5), "{:?}", e.sensitivities);
    // Activations in fewer bits move fewer bytes, and weights as many as before.
    let choices = Choices::default().activations(Dtype::Bf16);
    let narrow = estimate(&profile, choices, &program, &workload).unwrap();
    let written = |e: &halite_sim::estimate::workload::Estimate| e.prefill.total().written_bytes;
    assert!(narrow.seconds < e.seconds && written(&narrow) < 0.6 * written(&e));
    // The same chip with a price and too little memory.
    let text = halite_profiles::profile::SHIPPED.iter().find(|(name, _)| *name == "maia-100").unwrap().1;
    let text = format!("{text}\n[price]\nusd_per_hour = 3.6\n").replace("64_000_000_000", "1_000_000_000");
    let small =
        estimate(&Profile::parse("small", &text).unwrap(), Choices::default(), &program, &workload).unwrap();
    assert!(!small.fits());
    near(small.usd_per_million_tokens.unwrap(), 1e6 * 0.001 * small.seconds / 400.0, 1e-9);
}

/// Writes to device memory take their own rate, by both kinds of times.
#[test]
fn slower_writes_take_longer() {
    let text = halite_profiles::profile::SHIPPED.iter().find(|(name, _)| *name == "maia-100").unwrap().1;
    let program = passes::fuse(&model("llama-1.1b", Format::BF16), halite_sim::FUSIONS);
    let times = |write: &str| {
        let text = text.replace("name = \"hbm\"", &format!("name = \"hbm\"\n{write}"));
        let chip = Choices::default().chip(Profile::parse("changed", &text).unwrap()).unwrap();
        let events = step::time(&chip, &program, &[(0, 512)], true).unwrap().total().seconds;
        near(step::closed(&chip, &program, &[(0, 512)], true).unwrap(), events, 0.2);
        events
    };
    let (usual, same, slow) =
        (times(""), times("write_bytes_per_s = 1.8e12"), times("write_bytes_per_s = 2e11"));
    near(same, usual, 1e-9);
    assert!(slow > 1.1 * usual, "{slow} {usual}");
}

/// Products of which the profile has measurements take what was measured; of others the estimate says that they were simulated.
#[test]
fn a_calibration_goes_before_the_simulation() {
    let profile = Profile::open("tenstorrent-p150").unwrap();
    let mut without = profile.clone();
    without.calibration = None;
    let seconds = |profile: &Profile, format| {
        let lookup = move |_: &str| Some(WeightInfo::new(vec![4096, 4096], format));
        let mut b = Builder::new("product", &lookup);
        let x = b.input("x", Dim::Tokens, 4096);
        let w = b.weight("w", 4096, 4096);
        let y = b.linear("y", x, w, None);
        b.output(y);
        let chip = Choices::default().activations(Dtype::Bf16).chip(profile.clone()).unwrap();
        let program = b.finish().unwrap();
        let events = step::time(&chip, &program, &[(0, 2048)], true).unwrap().total().seconds;
        near(step::closed(&chip, &program, &[(0, 2048)], true).unwrap(), events, 0.2);
        events
    };
    let formats = kernel::Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };
    let measured = kernel::estimate(&profile, formats, Kernel::MatMul { m: 2048, n: 4096, k: 4096 }).unwrap();
    near(seconds(&profile, Format::BF16), measured.seconds, 1e-9);
    assert!((seconds(&without, Format::BF16) / measured.seconds - 1.0).abs() > 0.01);
    // Unpacking was not measured.
    near(seconds(&profile, Format::Q8_0), seconds(&without, Format::Q8_0), 1e-9);

    let workload = Workload::default().batch(4);
    let said =
        |format| estimate(&profile, Choices::default(), &model("llama-1.1b", format), &workload).unwrap();
    let (measured, simulated) = (said(Format::BF16), said(Format::Q8_0));
    assert!(measured.error.is_some_and(|e| e > 0.01 && e < 0.1) && measured.unmeasured.is_empty());
    assert!(
        simulated.error.is_none()
            && simulated.unmeasured == ["weights of Q8_0: products simulated, not measured"]
    );
}

/// Devices that are not simulated are the sum of their measured kernels, and nothing that was not measured is made up.
#[test]
fn measured_devices_say_what_was_measured() {
    let profile = Profile::open("nvidia-h100").unwrap();
    let workload = Workload::default().batch(8).prompt(1024).generate(64).chunk(512);
    let e = estimate(&profile, Choices::default(), &model("llama-2-7b", Format::BF16), &workload).unwrap();
    // Weights alone take 13.2 GB / 3.35 TB/s, and nothing is ten times slower than its bytes.
    assert!((3.9e-3..39e-3).contains(&e.step_s) && e.error.unwrap() < 0.1, "{}", e.step_s);
    let [low, high] = e.step_interval_s.unwrap();
    assert!(
        (0.85..1.0).contains(&(low / e.step_s)) && (1.0..1.2).contains(&(high / e.step_s)),
        "{low} {high}"
    );
    // Routers are F32.
    let experts = estimate(&profile, Choices::default(), &model("moe-8x2", Format::BF16), &workload).unwrap();
    assert_eq!(
        experts.unmeasured,
        ["weights of F32: products as measured in bf16 x bf16, with their own bytes"]
    );
    // What was not measured is as in bf16 but for its bytes, and is told.
    let four = estimate(&profile, Choices::default(), &model("llama-2-7b", Format::Q4_0), &workload).unwrap();
    assert!(four.error.is_none() && e.error.is_some() && e.unmeasured.is_empty());
    assert!(
        four.unmeasured.len() == 1
            && four.unmeasured[0].starts_with("weights of Q4_0: products as measured in bf16")
    );
    assert!(four.first_token_s <= e.first_token_s);
    // A generating step reads all weights; most of its time goes with their bytes.
    let faster = e.step_s / four.step_s;
    assert!((1.5..16.0 / 4.5).contains(&faster), "{faster}");
}

/// A memory of clusters holds activations, then weights, then the cache, and the events and the closed form agree on what that gives.
#[test]
fn data_lie_in_the_nearest_memories_with_room() {
    let program = passes::fuse(&model("llama-1.1b", Format::Q4_0), halite_sim::FUSIONS);
    let weights = program.weight_bytes() as f64;
    let workload = Workload::default().batch(4).prompt(256).generate(32);
    let clusters = 16.0;
    let of = |capacity_bytes: f64| {
        let profile = Profile::open("maia-100").unwrap();
        let profile = profile.with("memory.csram.capacity_bytes", capacity_bytes / clusters).unwrap();
        let estimated = estimate(&profile, Choices::default(), &program, &workload).unwrap();
        let chip = workload.chip(Choices::default(), &profile, &program).unwrap();
        for spans in [vec![(256, 1); 4], vec![(0, 256)]] {
            let events = step::time(&chip, &program, &spans, true).unwrap().total().seconds;
            near(step::closed(&chip, &program, &spans, true).unwrap(), events, 0.15);
        }
        let device_s = |op: &halite_sim::OpReport| op.time.device_s;
        let attention =
            estimated.decode.ops.iter().filter(|op| op.name == "Attend").map(device_s).sum::<f64>();
        let all: f64 = estimated.decode.ops.iter().map(device_s).sum();
        (all - attention, attention, estimated.decode.total().joules.unwrap().device, estimated.have_bytes)
    };
    let (none, half, weights_only, all) =
        (of(1024.0), of(weights / 2.0), of(1.2 * weights), of(3.0 * weights));
    // About half of the weights, beside the activations, come from the memory of the clusters while HBM delivers the others.
    near(half.0 / none.0, 0.5, 0.12);
    assert!(weights_only.0 < 0.2 * none.0 && weights_only.1 <= none.1, "{weights_only:?} {none:?}");
    assert!(all.1 < 0.2 * none.1, "{all:?} {none:?}");
    // The near memory takes a tenth of the energy of a byte of HBM.
    near(all.2 / none.2, 3.0 / 30.0, 0.01);
    assert_eq!(none.3, 64_000_000_000 + 1024);
}

/// A shipped profile with lines added behind others.
fn changed(name: &str, lines: &[(&str, &str)]) -> Profile {
    let (_, text) = halite_profiles::profile::SHIPPED.iter().find(|(shipped, _)| *shipped == name).unwrap();
    let text = lines.iter().fold(text.to_string(), |text, (after, line)| {
        assert!(text.contains(after), "{after}");
        text.replacen(after, &format!("{after}\n{line}"), 1)
    });
    Profile::parse("changed", &text).unwrap()
}

fn estimated(profile: &Profile, choices: Choices) -> halite_sim::estimate::workload::Estimate {
    let program = passes::fuse(&model("llama-1.1b", Format::Q4_0), halite_sim::FUSIONS);
    estimate(profile, choices, &program, &Workload::default().batch(4)).unwrap()
}

/// Engines between two memories bound what passes them, and their setup comes before the first byte.
#[test]
fn engines_that_serve_a_memory_bound_it() {
    let serves = [("name = \"cluster_dma\"", "serves = \"hbm\"")];
    let usual = estimated(&changed("maia-100", &[]), Choices::default());
    let served = changed("maia-100", &serves);
    let wide = estimated(&served, Choices::default());
    assert!(
        wide.step_s > usual.step_s && wide.step_s < 1.5 * usual.step_s,
        "{} {}",
        wide.step_s,
        usual.step_s
    );
    // 16 x 2 engines of 5 GB/s, a ninth of HBM.
    let narrow = estimated(&served.with("dma.cluster_dma.bytes_per_s", 5e9).unwrap(), Choices::default());
    let device_s = |e: &halite_sim::estimate::workload::Estimate| e.decode.total().device_s;
    near(device_s(&narrow) / device_s(&wide), 1.44e12 / 160e9, 0.01);
    let chip = Choices::default().chip(served).unwrap();
    assert!(!chip.without_effect().iter().any(|(path, _)| *path == "dma.cluster_dma.bytes_per_s"));

    let (_, text) = halite_profiles::profile::SHIPPED.iter().find(|(name, _)| *name == "maia-100").unwrap();
    let wrong = text.replace("name = \"cluster_dma\"", "name = \"cluster_dma\"\nserves = \"tsram\"");
    let error = Profile::parse("wrong", &wrong).unwrap_err().to_string();
    assert!(error.contains("dma.cluster_dma.serves = \"tsram\"") && error.contains("csram, hbm"), "{error}");
}

/// Engines or matrix units that take stored weights leave the vector unit nothing to unpack.
#[test]
fn engines_that_unpack_free_the_vector_unit() {
    let vector_s = |profile: &Profile| {
        let program = model("llama-1.1b", Format::Q4_0);
        let chip = Choices::default().chip(profile.clone()).unwrap();
        let report = step::time(&chip, &program, &[(100, 1)], true).unwrap();
        let down = report.ops.iter().find(|op| op.name.starts_with("MatMul ffn_down")).unwrap();
        (down.time.busy_s[Queue::Vector as usize], down.time.seconds)
    };
    let usual = vector_s(&changed("maia-100", &[]));
    let unpacking = vector_s(&changed("maia-100", &[("name = \"tile_dma\"", "unpacks = true")]));
    // The activations are still converted.
    assert!(unpacking.0 < 0.1 * usual.0 && unpacking.1 <= usual.1, "{unpacking:?} {usual:?}");
}

#[test]
fn the_host_takes_its_time_for_each_step() {
    let usual = estimated(&changed("maia-100", &[]), Choices::default());
    let host = changed(
        "maia-100",
        &[("[launch]", "step_ns = { value = 1e6, basis = \"guess\", source = \"a test\" }")],
    );
    let slow = estimated(&host, Choices::default());
    near(slow.step_s - usual.step_s, 1e-3, 1e-6);
    near(slow.first_token_s - usual.first_token_s, 4e-3, 1e-6);
    near(slow.decode.total().seconds, slow.step_s, 1e-9);
    assert!(slow.sensitivities.iter().any(|s| s.path == "launch.step_ns"));
}

#[test]
fn a_tile_takes_what_its_port_lets_through() {
    let seconds = |bytes_per_cycle: f64| {
        let profile = changed("maia-100", &[]).with("noc.link_bytes_per_cycle", bytes_per_cycle).unwrap();
        estimated(&profile, Choices::default()).step_s
    };
    assert!(seconds(4.0) > 2.0 * seconds(32.0));
}

/// Sparse weights take fewer bytes and cycles where the chip has a rate for them.
#[test]
fn sparse_weights_are_read_and_multiplied_by_half() {
    let rate = "dense_ops_per_s = { value = 0.8e15, basis = \"datasheet\", source = \"hotchips\" }";
    let profile = changed("maia-100", &[(rate, "sparse_ops_per_s = 1.5e15")]);
    let of = |sparse: bool| {
        let program = model("llama-1.1b", Format::BF16);
        let choices = Choices::default().sparse(sparse);
        let workload = Workload::default().prompt(2048).chunk(2048).generate(1);
        let e = estimate(&profile, choices, &program, &workload).unwrap();
        let ops = |report: &halite_sim::Report| {
            let products = report.ops.iter().filter(|op| op.name.starts_with("MatMul ffn"));
            products.map(|op| op.time.busy_s[Queue::Matrix as usize]).sum::<f64>()
        };
        (e.need_bytes as f64, ops(&e.prefill), e.step_s)
    };
    let (dense, sparse) = (of(false), of(true));
    // 9 bits of 16; the table of tokens is not sparse.
    assert!(sparse.0 / dense.0 > 9.0 / 16.0 && sparse.0 / dense.0 < 0.65, "{sparse:?} {dense:?}");
    near(dense.1 / sparse.1, 1.5e15 / (2.0 * 256.0 * 16.0 * 64.0 * 1.43e9), 0.02);
    assert!(sparse.2 < 0.75 * dense.2);
    let program = model("llama-1.1b", Format::BF16);
    let choices = Choices::default().sparse(true);
    for (name, want) in [("maia-200", "sparse_ops_per_s"), ("nvidia-h100", "another chip")] {
        let profile = Profile::open(name).unwrap();
        let error = estimate(&profile, choices, &program, &Workload::default()).unwrap_err().to_string();
        assert!(error.contains(want), "{name}: {error}");
    }
}

/// A KV cache in a format of the chip takes the bytes of that format, in memory and on the way.
#[test]
fn the_cache_may_lie_in_a_format_of_the_chip() {
    let of = |cache| {
        let e = estimated(&changed("maia-100", &[]), Choices::default().cache(cache));
        let attend = e.decode.ops.iter().find(|op| op.name == "Attend").unwrap();
        (e.need_bytes, attend.time.read_bytes, e.step_s)
    };
    let (f16, fp8) = (of(None), of(Some(Dtype::Fp8E4m3)));
    assert!(fp8.0 < f16.0 && fp8.2 < f16.2);
    near(fp8.1 / f16.1, 0.5, 0.05);

    // A GPU was measured with such a cache.
    let h100 = Profile::open("nvidia-h100").unwrap();
    let cache = |dtype| estimated(&h100, Choices::default().cache(dtype));
    let (f16, fp8) = (cache(None), cache(Some(Dtype::Fp8E4m3)));
    assert!(fp8.need_bytes < f16.need_bytes);
    let read = |e: &halite_sim::estimate::workload::Estimate| {
        e.decode.ops.iter().find(|op| op.name == "Attend").unwrap().time.read_bytes
    };
    near(read(&fp8) / read(&f16), 0.5, 0.05);
    assert!(
        !fp8.unmeasured.iter().any(|line| line.starts_with("KV cache of fp8_e4m3: attention")),
        "{:?}",
        fp8.unmeasured
    );
    let cpu = estimate(
        &Profile::open("generic-x86-avx512").unwrap(),
        Choices::default().cache(Some(Dtype::Fp8E4m3)),
        &model("llama-1.1b", Format::Q4_0),
        &Workload::default(),
    );
    assert!(cpu.unwrap_err().to_string().contains("KV cache: expected another chip"));
}

/// Work that takes more power than the chip may take lasts longer, and the estimate says so.
#[test]
fn power_beyond_the_design_takes_time() {
    let usual = estimated(&changed("maia-100", &[]), Choices::default());
    assert!(!usual.unmeasured.iter().any(|line| line.starts_with("power")));
    let profile = changed("maia-100", &[]).with("power.tdp_w", 105.0).unwrap();
    let profile = profile.with("power.provisioned_w", 104.0).unwrap();
    let limited = estimated(&profile, Choices::default());
    let joules = usual.decode.total().joules.unwrap().total();
    // 5 W are left for work.
    near(limited.step_s, joules / 5.0, 1e-6);
    assert!(limited.unmeasured.iter().any(|line| line.starts_with("power: a decode step")));
}

/// An op whose first weights come while the op before it runs takes less, but a step no less than the memories and units need.
#[test]
fn weights_may_be_loaded_ahead() {
    for name in ["maia-100", "teaching-16x16", "sambanova-sn40l"] {
        let text = halite_profiles::profile::SHIPPED.iter().find(|(shipped, _)| *shipped == name).unwrap().1;
        let of = |ahead: bool| {
            let text = text.replace("loads_ahead = true", "");
            let line = format!("[launch]\nloads_ahead = {ahead}");
            let profile = Profile::parse(name, &text.replace("[launch]", &line)).unwrap();
            let program = passes::fuse(&model("llama-1.1b", Format::BF16), halite_sim::FUSIONS);
            let chip = Workload::default().batch(16).chip(Choices::default(), &profile, &program).unwrap();
            [vec![(200, 1)], vec![(200, 1); 16], vec![(0, 128)]].map(|spans| {
                let total = step::time(&chip, &program, &spans, true).unwrap().total();
                near(step::closed(&chip, &program, &spans, true).unwrap(), total.seconds, 0.2);
                total
            })
        };
        for (plain, ahead) in of(false).into_iter().zip(of(true)) {
            let saved = 1.0 - ahead.seconds / plain.seconds;
            assert!(saved > 0.0 && saved < 0.5, "{name}: {saved}");
            let busiest = ahead.busy_s[1].max(ahead.busy_s[2]).max(ahead.device_s);
            assert!(ahead.seconds > busiest, "{name}: {ahead:?}");
            assert_eq!((ahead.read_bytes, ahead.joules), (plain.read_bytes, plain.joules));
        }
    }
}

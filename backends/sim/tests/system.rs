//! Systems of chips: times of exchanges, and programs divided over chips.

use std::sync::Arc;

use halite::Model;
use halite::backend::Backend;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::program::Program;
use halite::session::{OutputKind, Session, SessionOptions};
use halite::shard::Sums;
use halite::synth::{Formats, Synth, shape};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{Driver, Profile, SHIPPED};
use halite_sim::Bound;
use halite_sim::estimate::collective::{Collective, Fabric};
use halite_sim::estimate::figures::Metric;
use halite_sim::estimate::system::{Layout, layouts, stages};
use halite_sim::estimate::workload::{Choices, Estimate, Quick, Workload, candidates, estimate};
use halite_sim::{Fault, SimOptions, system};
use halite_testing::golden;

fn model(name: &str, format: Format) -> Program {
    let model = Synth::new(shape(name).unwrap(), Formats::of(format), 0).unwrap().model().unwrap();
    model.program(ProgramOptions::default(), 4096).unwrap()
}

fn profile(name: &str) -> Profile {
    Profile::open(name).unwrap()
}

const COLLECTIVES: [Collective; 4] =
    [Collective::AllReduce, Collective::AllGather, Collective::ReduceScatter, Collective::AllToAll];

/// Times in microseconds from the tables of NCCL in aiconfigurator-core 0.12.0: chips, bytes, time.
const NCCL: [(&str, Collective, u32, f64, f64); 12] = [
    ("nvidia-a100", Collective::AllGather, 4, 8192.0, 11.8),
    ("nvidia-a100", Collective::AllGather, 8, 65536.0, 21.2),
    ("nvidia-a100", Collective::AllGather, 4, 134217728.0, 578.5),
    ("nvidia-a100", Collective::ReduceScatter, 8, 33554432.0, 210.0),
    ("nvidia-a100", Collective::AllToAll, 4, 67108864.0, 312.0),
    ("nvidia-a100", Collective::AllReduce, 4, 67108864.0, 544.3),
    ("nvidia-h100", Collective::AllGather, 8, 4096.0, 10.6),
    ("nvidia-h100", Collective::AllGather, 4, 134217728.0, 350.3),
    ("nvidia-h100", Collective::ReduceScatter, 4, 524288.0, 10.1),
    ("nvidia-h100", Collective::AllToAll, 8, 33554432.0, 124.9),
    ("nvidia-h100", Collective::AllReduce, 4, 16777216.0, 99.0),
    ("nvidia-h100", Collective::AllReduce, 2, 536870912.0, 1686.4),
];

#[test]
fn exchanges_take_what_was_measured() {
    for (chip, collective, chips, bytes, us) in NCCL {
        let fabric = Fabric::new(&profile(chip)).unwrap();
        let error = 1e6 * fabric.seconds(collective, bytes, chips) / us - 1.0;
        assert!(
            error.abs() < 0.25,
            "{chip} {} of {bytes} bytes, {chips} chips: {error:+.2}",
            collective.name()
        );
    }
}

/// The bytes that a chip of a ring sends, counted round by round.
fn sent_in_rounds(collective: Collective, bytes: f64, chips: u32) -> f64 {
    let part = bytes / f64::from(chips);
    let rounds = (1..chips).map(|_| part).sum::<f64>();
    if collective == Collective::AllReduce { 2.0 * rounds } else { rounds }
}

#[test]
fn large_exchanges_are_bound_by_the_links() {
    let text = include_str!("../../../hw-profiles/maia-100.toml");
    let ring = text.replace("topology = \"switch\"", "topology = \"ring\"");
    let only = |text: &str| {
        // The level of racks only, which joins any number of chips.
        let from = text.find("[[interconnect]]\nname = \"host\"").unwrap();
        let to = text.find("[[interconnect]]\nname = \"rack\"").unwrap();
        Profile::parse("ring", &[&text[..from], &text[to..]].concat()).unwrap()
    };
    for chips in [2, 3, 8, 64] {
        let (ring, switch) = (Fabric::new(&only(&ring)).unwrap(), Fabric::new(&only(text)).unwrap());
        let bytes = 1e12;
        for collective in [Collective::AllReduce, Collective::AllGather, Collective::ReduceScatter] {
            let rate = 0.7 * 3.0 * 50e9;
            let least = sent_in_rounds(collective, bytes, chips) / rate;
            let seconds = ring.seconds(collective, bytes, chips);
            assert!((seconds / least - 1.0).abs() < 1e-3, "{} {chips}: {seconds} {least}", collective.name());
            assert!((switch.seconds(collective, bytes, chips) / least - 1.0).abs() < 1e-3);
        }
        // A small message needs fewer steps where any two chips are joined.
        assert!(
            switch.seconds(Collective::AllReduce, 64.0, chips)
                <= ring.seconds(Collective::AllReduce, 64.0, chips)
        );
    }
}

#[test]
fn exchanges_never_gain_from_slower_links_or_more_bytes() {
    for (name, text) in SHIPPED {
        let profile = Profile::parse(name, text).unwrap();
        let Ok(fabric) = Fabric::new(&profile) else { continue };
        for collective in COLLECTIVES {
            for chips in [2, 4, 6, 8, 32] {
                let mut before = 0.0;
                for bytes in (0..30).map(|n| f64::from(1 << n)) {
                    let seconds = fabric.seconds(collective, bytes, chips);
                    assert!(seconds >= before, "{name} {} {chips} chips, {bytes} bytes", collective.name());
                    before = seconds;
                }
            }
        }
        for (path, quantity) in &profile.quantities {
            let slower = match path.rsplit('.').next() {
                Some("link_bytes_per_s") => 0.5,
                Some("latency_ns" | "hop_ns")
                    if path.starts_with("interconnect") || path.contains("collective") =>
                {
                    2.0
                }
                _ => continue,
            };
            let slow = Fabric::new(&profile.with(path, quantity.value * slower).unwrap()).unwrap();
            for collective in COLLECTIVES {
                let time = |fabric: &Fabric| fabric.seconds(collective, 1e6, 8);
                assert!(time(&slow) >= time(&fabric), "{name} {path} {}", collective.name());
            }
            assert!(slow.send_s(1e6, 8) >= fabric.send_s(1e6, 8), "{name} {path}");
        }
    }
}

#[test]
fn stages_have_every_layer_once() {
    let program = model("llama-2-7b", Format::Q4_0);
    let ops = |program: &Program| program.ops().filter(|(_, op)| op.name() == "Attend").count();
    for pipeline in [1, 2, 3, 8, 32] {
        let all = stages(&program, Layout::default().pipeline(pipeline)).unwrap();
        assert_eq!(all.len(), pipeline as usize);
        assert_eq!(all.iter().map(|stage| ops(&stage.program)).sum::<usize>(), 32);
        let bytes: u64 = all.iter().map(|stage| stage.weight_bytes(Choices::default())).sum();
        assert_eq!(bytes, program.weight_bytes());
        let most = all.iter().map(|stage| stage.weight_bytes(Choices::default())).max().unwrap();
        assert!(most <= program.weight_bytes() / u64::from(pipeline) + program.weight_bytes() / 20);
        assert!(all.iter().rev().skip(1).all(|stage| stage.sent_cols == 4096));
    }
    let error = stages(&program, Layout::default().pipeline(64)).unwrap_err().to_string();
    assert!(error.contains("at most 34") && error.contains("64"), "{error}");
    let error = stages(&program, Layout::default().tensor(0)).unwrap_err().to_string();
    assert!(error.contains("tp"), "{error}");
}

#[test]
fn every_way_to_divide_has_all_chips() {
    let program = model("mixtral-8x7b", Format::Q4_0);
    let any = Layout::default().tensor(0).expert(0).pipeline(0).data(0);
    let all = layouts(&program, 8, any);
    assert_eq!(all.len(), 20);
    assert!(all.iter().all(|layout| layout.chips() == 8));
    assert!(layouts(&program, 8, any.tensor(4)).iter().all(|layout| layout.tensor == 4));
    assert!(layouts(&program, 8, any.tensor(3)).is_empty());
}

#[test]
fn more_chips_take_their_part_of_the_time() {
    let workload = Workload::default().batch(16).prompt(256).generate(32);
    let program = model("llama-2-7b", Format::BF16);
    for name in ["maia-100", "nvidia-h100"] {
        let profile = profile(name);
        let with = |layout: Layout| {
            estimate(&profile, Choices::default().layout(layout), &program, &workload).unwrap()
        };
        let one = with(Layout::default());
        assert_eq!(one.exchange_fraction, 0.0);
        for tensor in [2, 4] {
            let e = with(Layout::default().tensor(tensor));
            let share = f64::from(tensor);
            // Exchanges and what is not divided cost something.
            assert!(
                e.step_s < one.step_s && e.step_s > one.step_s / share,
                "{name}: {} {}",
                e.step_s,
                one.step_s
            );
            assert!(e.exchange_fraction > 0.0 && e.exchange_fraction < 0.5);
            assert!(e.need_bytes < one.need_bytes / u64::from(tensor) + (300 << 20));
            // Gathering parts of every result takes more exchanges than adding sums.
            let gathered = with(Layout::default().tensor(tensor).sums(Sums::InOrder));
            assert!(gathered.exchange_fraction > e.exchange_fraction);
        }
        let pipeline = with(Layout::default().pipeline(4));
        assert!(pipeline.first_token_s < 0.5 * one.first_token_s);
        let replicas = with(Layout::default().data(2));
        assert!(replicas.step_s < one.step_s && replicas.tokens_per_s > one.tokens_per_s);
        // The closed form agrees.
        for layout in
            [Layout::default().tensor(4), Layout::default().pipeline(4), Layout::default().tensor(2).data(2)]
        {
            let divided = stages(&program, layout).unwrap();
            let quick = Quick::new(Choices::default().layout(layout), &divided, &workload).unwrap();
            let closed = quick.times(&profile).unwrap().seconds;
            let seconds = with(layout).seconds;
            assert!((closed / seconds - 1.0).abs() < 0.15, "{name} {layout:?}: {closed} {seconds}");
        }
    }
}

/// Two halves of a batch, of which one computes while the other exchanges.
#[test]
fn exchanges_overlap_with_the_other_half() {
    let program = model("llama-2-70b", Format::BF16);
    let profile = profile("nvidia-h100");
    let with = |layout: Layout, batch: u32| {
        let workload = Workload::default().batch(batch).prompt(512).generate(32);
        let e = estimate(&profile, Choices::default().layout(layout), &program, &workload).unwrap();
        let stages = stages(&program, layout).unwrap();
        let quick = Quick::new(Choices::default().layout(layout), &stages, &workload).unwrap();
        assert!((quick.times(&profile).unwrap().seconds / e.seconds - 1.0).abs() < 0.15);
        e
    };
    let layout = Layout::default().tensor(8);
    let (halves, half) = (with(layout.overlap(true), 512), with(layout, 256));
    assert_eq!((halves.parts, half.parts), ((2, 256), (1, 256)));
    // Twice the computation or twice the exchanges of a half, whichever is longer, and not both.
    let exchanged = half.exchange_fraction * half.step_s;
    let longer = exchanged.max(half.step_s - exchanged);
    assert!((halves.step_s / (2.0 * longer).max(half.step_s) - 1.0).abs() < 1e-9);
    assert!(halves.step_s < 2.0 * half.step_s && halves.first_token_s < with(layout, 512).first_token_s);
    // Both halves read the weights, so a small batch is slower for it.
    assert!(with(layout.overlap(true), 8).step_s > with(layout, 8).step_s);
    // One sequence has no halves.
    assert_eq!(with(layout.overlap(true), 1).step_s, with(layout, 1).step_s);
}

/// Chips that hold different positions share the time and the memory of attention, and exchange for it.
#[test]
fn positions_are_divided_over_chips() {
    let program = model("llama-3-8b", Format::BF16);
    let workload = Workload::default().batch(4).prompt(60_000).generate(64);
    for name in ["maia-100", "nvidia-h100"] {
        let profile = profile(name);
        let with = |layout: Layout| {
            let e = estimate(&profile, Choices::default().layout(layout), &program, &workload).unwrap();
            let divided = stages(&program, layout).unwrap();
            let quick = Quick::new(Choices::default().layout(layout), &divided, &workload).unwrap();
            let closed = quick.times(&profile).unwrap().seconds;
            assert!((closed / e.seconds - 1.0).abs() < 0.2, "{name} {layout:?}: {closed} {}", e.seconds);
            e
        };
        let attention = |e: &halite_sim::estimate::workload::Estimate| {
            let ops = e.decode.ops.iter().filter(|op| op.name == "Attend");
            ops.map(|op| op.time.seconds).sum::<f64>()
        };
        let weights = program.weight_bytes();
        let one = with(Layout::default());
        let mut last = one.clone();
        for context in [2, 4] {
            let e = with(Layout::default().context(context));
            let share = f64::from(context);
            let part = attention(&e) / attention(&one);
            assert!(part > 0.9 / share && part < 1.3 / share, "{name}: {part} of {context} chips");
            assert!(e.first_token_s < last.first_token_s && e.step_s < last.step_s);
            assert!(e.step_s > one.step_s / share && e.exchange_fraction > 0.0);
            // The cache is divided, the weights are not.
            let cache = one.need_bytes - weights;
            assert!(e.need_bytes - weights < cache / u64::from(context) + cache / 100);
            assert!(e.repeated[0].contains("weights"));
            last = e;
        }
        // With the layers divided too, the same chips of each group exchange.
        let both = with(Layout::default().tensor(2).context(2));
        assert!(both.layout.chips() == 4 && both.step_s < one.step_s);
    }
    let error = stages(&program, Layout::default().context(0)).unwrap_err().to_string();
    assert!(error.contains("cp"), "{error}");
    let recurrent = model("qwen3.5-0.8b", Format::BF16);
    let error = stages(&recurrent, Layout::default().context(2)).unwrap_err().to_string();
    assert!(error.contains("recurrent"), "{error}");
}

#[test]
fn energy_is_told_by_what_takes_it() {
    let program = model("llama-2-7b", Format::BF16);
    let profile = profile("maia-100");
    let workload = Workload::default().batch(4).prompt(256).generate(32);
    let with = |layout: Layout| {
        let e = estimate(&profile, Choices::default().layout(layout), &program, &workload).unwrap();
        (e.joules_per_token.unwrap(), e.seconds)
    };
    let (one, one_s) = with(Layout::default());
    let (four, four_s) = with(Layout::default().tensor(4));
    let watts = profile.power.as_ref().unwrap().idle_w.as_ref().unwrap().value;
    let tokens = 4.0 * 32.0;
    for (joules, seconds, chips) in [(one, one_s, 1.0), (four, four_s, 4.0)] {
        assert!((joules.idle / (chips * watts * seconds / tokens) - 1.0).abs() < 1e-9);
        assert!(joules.compute > 0.0 && joules.scratchpad > 0.0 && joules.device > 0.0);
        let sum: f64 = joules.named().iter().map(|(_, joules)| joules).sum();
        assert_eq!(joules.total(), sum);
    }
    // The same weights are read, by four chips together. Two sums a layer go over links, in a ring three quarters twice.
    assert!((four.device / one.device - 1.0).abs() < 0.2, "{four:?} {one:?}");
    assert!(one.links == 0.0 && four.links > 0.0);
    let pj = 1e-12 * profile.interconnect[0].pj_per_byte.as_ref().unwrap().value;
    // Of each token, prompt or generated: 32 layers, two sums of 4096 values of 4 bytes; all four chips.
    let each = 4.0 * 1.5 * 32.0 * 2.0 * 4096.0 * 4.0 * pj;
    let expected = each * (4.0 * 256.0 + 4.0 * 31.0) / tokens;
    assert!((four.links / expected - 1.0).abs() < 0.02, "{} {expected}", four.links);
}

#[test]
fn experts_on_other_chips_take_no_time_here() {
    let program = model("mixtral-8x7b", Format::Q4_0);
    let workload = Workload::default().batch(4).prompt(256).generate(16);
    let profile = profile("maia-100");
    let with =
        |layout: Layout| estimate(&profile, Choices::default().layout(layout), &program, &workload).unwrap();
    let (one, groups) = (with(Layout::default()), with(Layout::default().tensor(8).expert(8)));
    let time = |e: &halite_sim::estimate::workload::Estimate| {
        let experts = e.prefill.ops.iter().filter(|op| op.name.starts_with("Experts"));
        experts.map(|op| op.time.matrix_ops).sum::<f64>()
    };
    // Of 8 experts, each chip has one: an eighth of the products.
    let share = time(&groups) / time(&one);
    assert!((share - 0.125).abs() < 0.01, "{share}");
}

#[test]
fn the_best_layout_fits_and_is_the_quickest() {
    let program = model("llama-2-70b", Format::BF16);
    let any = Choices::default().layout(Layout::default().tensor(0).expert(0).pipeline(0).data(0));
    let workload = Workload::default().batch(16).generate(64);
    let profile = profile("nvidia-h100");
    let by = Metric::named("seconds").unwrap();
    let all = candidates(&profile, any, &program, &workload, 8, by).unwrap();
    assert!(all[0].fits() && all[0].layout.data < 8);
    let fitting: Vec<_> = all.iter().filter(|c| c.fits()).map(|c| c.seconds).collect();
    assert!(fitting.is_sorted() && fitting.len() < all.len());
    let fixed = Choices::default().layout(Layout::default().tensor(3).expert(0).pipeline(0).data(0));
    let error = candidates(&profile, fixed, &program, &workload, 8, by).unwrap_err().to_string();
    assert!(error.contains("8 chips"), "{error}");
    // A chip without links.
    let alone = Profile::open("teaching-16x16").unwrap();
    let error = candidates(
        &alone,
        any.layout(Layout::default().tensor(8).expert(1).pipeline(1).data(1)),
        &program,
        &workload,
        8,
        by,
    );
    assert!(error.unwrap_err().to_string().contains("interconnect"));
}

#[test]
fn simulated_chips_that_share_layers_have_the_bits_of_one() {
    let committed = ["llama-Q4_K_M", "llama-Q4_0"]
        .map(|file| format!("{}/../../tests/data/golden/{file}.gguf", env!("CARGO_MANIFEST_DIR")).into());
    for path in committed.into_iter().chain(golden::families()) {
        let path: std::path::PathBuf = path;
        let model = Arc::new(Model::open(&path).unwrap());
        let run = |count: u32| {
            let chips = system(&profile("maia-100"), &SimOptions::default(), count).unwrap();
            let backend: Arc<dyn Backend> = Arc::new(chips);
            let mut session =
                Session::new(&model, &backend, &SessionOptions::default().context(128)).unwrap();
            let sequence = session.add_sequence();
            session.prefill(sequence, &[3, 5, 7, 9, 11], OutputKind::Logits).unwrap();
            let timing = session.last_timing().unwrap();
            (session.logits().iter().map(|x| x.to_bits()).collect::<Vec<u32>>(), timing)
        };
        let (want, one) = run(1);
        assert_eq!(one.clock, halite::backend::Clock::Simulated);
        for count in [2, 4] {
            let (got, timing) = run(count);
            assert_eq!(got, want, "{} on {count} chips", path.display());
            // Small models lose: exchanges take longer than the products that they save.
            assert!(timing.clock == one.clock && timing.elapsed > one.elapsed / count);
        }
    }
}

#[test]
fn only_simulated_or_measured_chips_are_estimated_together() {
    let cpu = SHIPPED
        .iter()
        .map(|(name, text)| Profile::parse(name, text).unwrap())
        .find(|p| p.driver == Driver::Cpu);
    let cpu = cpu.unwrap();
    let program = model("llama-1.1b", Format::Q4_0);
    let choices = Choices::default().layout(Layout::default().tensor(2));
    let error = estimate(&cpu, choices, &program, &Workload::default()).unwrap_err().to_string();
    assert!(error.contains("interconnect") && error.contains(&cpu.name), "{error}");
}

/// Weights in the chip's own format take their bits, and no time to unpack.
#[test]
fn weights_can_lie_in_the_chips_format() {
    let (program, profile) = (model("llama-2-7b", Format::Q8_0), profile("maia-100"));
    let workload = Workload::default().batch(4).prompt(64).generate(8);
    let with = |stored: Option<Dtype>| {
        estimate(&profile, Choices::default().stored(stored), &program, &workload).unwrap()
    };
    let (file, mx9, mx6) = (with(None), with(Some(Dtype::Mx9)), with(Some(Dtype::Mx6)));
    let read = |e: &Estimate| {
        e.decode
            .ops
            .iter()
            .filter(|op| op.name == "MatMul ffn_down")
            .map(|op| op.time.read_bytes)
            .sum::<f64>()
    };
    let vector =
        |e: &Estimate| e.shares.iter().find(|(bound, _)| *bound == Bound::Vector).unwrap().1 * e.step_s;
    // 8.5, 9 and 6 bits a weight; activations are small.
    for (e, bits) in [(&mx9, 9.0), (&mx6, 6.0)] {
        let share = read(e) / read(&file) / (bits / 8.5);
        assert!((share - 1.0).abs() < 0.05, "{bits}: {share}");
        let memory = e.need_bytes as f64 / file.need_bytes as f64 / (bits / 8.5);
        assert!((memory - 1.0).abs() < 0.1, "{bits}: {memory}");
        assert!(vector(e) < 0.5 * vector(&file), "{} {}", vector(e), vector(&file));
    }
    assert!(mx6.step_s < mx9.step_s);
    // The quick form agrees.
    let choices = Choices::default().stored(Some(Dtype::Mx6));
    let divided = stages(&program, Layout::default()).unwrap();
    let quick = Quick::new(choices, &divided, &workload).unwrap().times(&profile).unwrap();
    assert!((quick.seconds / mx6.seconds - 1.0).abs() < 0.15, "{} {}", quick.seconds, mx6.seconds);
    // A format that the unit lacks is unpacked.
    let fp8 = with(Some(Dtype::Fp8E4m3));
    assert!(vector(&fp8) > 2.0 * vector(&mx9));
    let h100 = Profile::open("nvidia-h100").unwrap();
    let error = estimate(&h100, choices, &program, &workload).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("another chip") && error.contains("nvidia-h100"), "{error}");
}

/// Each chip of a system flips bits of its own.
#[test]
fn faults_of_chips_differ() {
    let path = format!("{}/../../tests/data/golden/llama-Q4_0.gguf", env!("CARGO_MANIFEST_DIR"));
    let model = Arc::new(Model::open(path).unwrap());
    let inject = Fault::list("bitflip:rate=1e-5,where=dram,seed=1").unwrap();
    let chips = system(&profile("maia-100"), &SimOptions::default().inject(inject), 2).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(chips);
    let mut session = Session::new(&model, &backend, &SessionOptions::default().context(128)).unwrap();
    let sequence = session.add_sequence();
    // Some logits may not be finite then.
    _ = session.prefill(sequence, &[3, 5, 7, 9, 11], OutputKind::Logits);
    let said = backend.report();
    let [_, first, second] = said.as_slice() else { panic!("{said:?}") };
    assert!(said[0].starts_with("not divided"), "{said:?}");
    let (first, second) =
        (first.strip_prefix("device 0: ").unwrap(), second.strip_prefix("device 1: ").unwrap());
    assert!(first != second && first.contains("bits flipped"), "{said:?}");
}

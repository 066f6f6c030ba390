//! Serving under load: times against the closed form and queueing theory, and what must hold for every request.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::batch::{self, Batch, Event, RequestId};
use halite::generate::GenerateOptions;
use halite::kernels::formats::Format;
use halite::program::{PAGE_POSITIONS, Program};
use halite::rng::SplitMix64;
use halite::session::{Session, SessionOptions};
use halite::synth::{Formats, Synth, shape};
use halite::{Model, Tokenizer};
use halite_profiles::profile::{Profile, SHIPPED};
use halite_sim::estimate::collective::Fabric;
use halite_sim::estimate::load::requests::{Draw, Length, Lengths, Prefix, Request, Source, read};
use halite_sim::estimate::load::steps::Step;
use halite_sim::estimate::load::summary::{Slo, Summary, knee};
use halite_sim::estimate::load::{Draft, Outcome, Served, Server, Serving};
use halite_sim::estimate::system::{Layout, stages};
use halite_sim::estimate::workload::{Choices, Quick, Workload};

const CONTEXT: u32 = 4096;

fn model(name: &str, format: Format) -> Program {
    let model = Synth::new(shape(name).unwrap(), Formats::of(format), 0).unwrap().model().unwrap();
    model.program(Default::default(), CONTEXT).unwrap()
}

/// maia-100 with so many bytes beside the weights, a price and idle power.
fn maia(program: &Program, bytes: u64) -> Profile {
    let text = SHIPPED.iter().find(|(name, _)| *name == "maia-100").unwrap().1;
    // The least that 16 clusters can have.
    let capacity = (program.weight_bytes() + bytes - 16 * 64).to_string();
    let text = text.replace("15_000_000", "64").replace("64_000_000_000", &capacity)
        + "\n[price]\nusd_per_hour = 3.6\n";
    Profile::parse("maia", &text).unwrap()
}

fn server<'a>(profile: &'a Profile, program: &Program, serving: Serving) -> Server<'a> {
    Server::new(profile, Choices::default(), program, CONTEXT, serving).unwrap()
}

fn fixed(prompt: u32, generate: u32) -> Lengths {
    Lengths { prompt: Length::Fixed(prompt), generate: Length::Fixed(generate) }
}

fn chat() -> Lengths {
    "lognormal:200,900/lognormal:30,200".parse().unwrap()
}

/// What must hold of any load.
fn check(requests: &[Request], outcome: &Outcome) {
    assert_eq!(requests.len(), outcome.served.len());
    for (request, served) in requests.iter().zip(&outcome.served) {
        assert_eq!(*request, served.request);
        let Served { began_s, first_s, end_s, reused, .. } = *served;
        // Not a number if it never happened.
        assert!(request.arrival_s <= began_s && began_s < first_s && first_s <= end_s, "{served:?}");
        assert_eq!(request.generate == 1, first_s == end_s);
        assert!(reused <= request.prefix.map_or(0, |prefix| prefix.tokens) && reused < request.prompt);
    }
    let totals = &outcome.totals;
    let generated: u64 = requests.iter().map(|request| u64::from(request.generate)).sum();
    assert_eq!(totals.generated, generated);
    assert_eq!(totals.gaps.total(), generated - requests.len() as u64);
    assert!(outcome.kv_peak_bytes <= outcome.kv_bytes && outcome.kv_peak_bytes > 0);
    assert!(totals.busy_s <= outcome.seconds() * f64::from(outcome.chips) * (1.0 + 1e-9));
}

#[test]
fn interpolated_steps_are_near_the_closed_form() {
    let llama = model("llama-1.1b", Format::BF16);
    // Mean and largest error, as docs/timing-model.md states them.
    for (name, mean_error, worst) in [("maia-100", 0.01, 0.10), ("nvidia-h100", 0.01, 0.10)] {
        let profile = Profile::open(name).unwrap();
        let mut server = server(&profile, &llama, Serving::default());
        let mut random = SplitMix64::new(7);
        let (mut sum, mut most) = (0.0, 0.0f64);
        for case in 0..150 {
            let mut below = |limit: u32| (random.next() % u64::from(limit)) as u32;
            let texts = if case % 5 == 0 { 0 } else { 1 + below(64) };
            // The GPU's closed form pads texts to the longest one.
            let context = below(3000);
            let spread = if name == "maia-100" { 500 } else { 1 };
            let mut spans: Vec<_> = (0..texts).map(|_| (context + below(spread), 1)).collect();
            if case % 5 < 3 {
                spans.push((below(3500), 2 + below(500 - texts)));
            }
            let direct = server.steps().direct_s(&spans).unwrap();
            let error = (server.steps().seconds(&Step::of(&spans)).unwrap() / direct - 1.0).abs();
            (sum, most) = (sum + error, most.max(error));
        }
        println!("{name}: mean {:.4}, worst {most:.4}", sum / 150.0);
        assert!(sum / 150.0 < mean_error && most < worst, "{name}: {} {most}", sum / 150.0);
    }
}

fn on<'a>(profile: &'a Profile, program: &Program, layout: Layout, serving: Serving) -> Server<'a> {
    Server::new(profile, Choices::default().layout(layout), program, CONTEXT, serving).unwrap()
}

/// Steps on several chips take the time of the closed form: with divided layers, with divided positions, and with halves of which one
/// computes while the other exchanges.
#[test]
fn steps_of_several_chips_are_the_closed_forms() {
    let program = model("llama-3-8b", Format::BF16);
    let mut quicker = [0, 0];
    for (name, chips) in [("maia-100", 4), ("nvidia-h100", 4), ("nvidia-h100", 8)] {
        let mut profile = Profile::open(name).unwrap();
        if name == "maia-100" {
            // Under load the cache takes all that is left, so that less of it is near.
            profile = profile.with("memory.csram.capacity_bytes", 64.0).unwrap();
        }
        let plain = Layout::default();
        for layout in [plain.tensor(chips), plain.context(2), plain.tensor(chips / 2).context(2)] {
            for batch in [1, 2, 16, 512] {
                // The middle of a text, and the chunk of a prompt, are knots.
                let workload = Workload::default().batch(batch).prompt(1024).generate(1024).chunk(1024);
                let times = |layout: Layout| {
                    let divided = stages(&program, layout).unwrap();
                    let quick = Quick::new(Choices::default().layout(layout), &divided, &workload);
                    quick.unwrap().times(&profile).unwrap()
                };
                let seconds = |layout: Layout, spans: &[(u32, u32)]| {
                    let mut server =
                        on(&profile, &program, layout, Serving::default().chunk(1024).sequences(512));
                    server.steps().seconds(&Step::of(spans)).unwrap()
                };
                let texts = vec![(1536, 1); batch as usize];
                let expected = times(layout).step_s;
                let got = seconds(layout, &texts);
                assert!((got / expected - 1.0).abs() < 1e-5, "{name} {layout:?} {batch}: {got}, {expected}");
                let prompt = times(layout).first_token_s / f64::from(batch);
                let got = seconds(layout, &[(0, 1024)]);
                assert!((got / prompt - 1.0).abs() < 1e-5, "{name} {layout:?}: {got}, {prompt}");
                // The estimate overlaps always, the server where that is quicker.
                let halves = times(layout.overlap(true)).step_s;
                let got = seconds(layout.overlap(true), &texts);
                let least = expected.min(halves);
                assert!((got / least - 1.0).abs() < 1e-5, "{name} {layout:?} {batch}: {got}, {least}");
                quicker[usize::from(halves < expected)] += 1;
            }
        }
    }
    assert!(quicker.iter().all(|count| *count > 2), "{quicker:?}");
}

/// Overlap never makes a step longer, and saves no more than half of it. One token has no halves.
#[test]
fn overlap_never_takes_longer() {
    let program = model("llama-3-8b", Format::BF16);
    let mut random = SplitMix64::new(3);
    let mut below = |limit: u32| (random.next() % u64::from(limit)) as u32;
    let layout = Layout::default().tensor(8);
    let profile = Profile::open("nvidia-h100").unwrap();
    let mut both =
        [layout, layout.overlap(true)].map(|layout| on(&profile, &program, layout, Serving::default()));
    let mut shorter = 0;
    for case in 0..200 {
        let mut spans: Vec<_> = (0..below(64)).map(|_| (below(3000), 1)).collect();
        spans.extend((case % 2 == 0).then_some((below(3000), 2 + below(440))));
        let [plain, overlapped] = both.each_mut().map(|s| s.steps().seconds(&Step::of(&spans)).unwrap());
        assert!(overlapped <= plain && overlapped >= 0.45 * plain, "{spans:?}: {overlapped} {plain}");
        shorter += u32::from(overlapped < 0.999 * plain);
    }
    assert!((20..200).contains(&shorter), "{shorter}");
    let [plain, overlapped] = both.each_mut().map(|s| s.steps().seconds(&Step::of(&[(99, 1)])).unwrap());
    assert_eq!(plain, overlapped);
}

/// Chips that hold different positions have room for more of them, are all paid, and serve long prompts sooner.
#[test]
fn positions_are_divided_under_load() {
    let program = model("llama-3-8b", Format::BF16);
    let page = program.kv_bytes(|_| 1);
    let profile = maia(&program, 32 * page);
    let requests: Vec<Request> = (0..12).map(|i| Request::new(0.1 * f64::from(i), 1800, 100)).collect();
    let served = |layout: Layout, serving: Serving| {
        let outcome = on(&profile, &program, layout, serving).serve(&requests).unwrap();
        check(&requests, &outcome);
        outcome
    };
    let long = [Request::new(0.0, 3000, 10)];
    let error = on(&profile, &program, Layout::default(), Serving::default()).serve(&long).unwrap_err();
    assert!(error.to_string().contains("bytes of KV cache"), "{error}");
    on(&profile, &program, Layout::default().context(2), Serving::default()).serve(&long).unwrap();
    let [one, two, four] = [1, 2, 4].map(|n| served(Layout::default().context(n), Serving::default()));
    let all = [&one, &two, &four];
    assert_eq!(all.map(|outcome| outcome.chips), [1, 2, 4]);
    let first = all.map(|outcome| Summary::new(outcome, None).first_token_s.p50);
    assert!(first[0] > first[1] && first[1] > first[2], "{first:?}");
    let price = |outcome: &Outcome| outcome.usd.unwrap() / outcome.seconds();
    assert!((price(&four) / price(&one) - 4.0).abs() < 1e-9);
    // A chip of two has half of a sequence; together they hold more sequences at once.
    assert!(two.kv_peak_bytes <= two.kv_bytes && two.kv_bytes == one.kv_bytes);
    let texts = |outcome: &Outcome| Summary::new(outcome, None).batch;
    assert!(texts(&two) > 1.0 && texts(&one) == 1.0, "{} {}", texts(&one), texts(&two));
    for (layout, name) in [(Layout::default().pipeline(2), "pp 2"), (Layout::default().data(2), "dp 2")] {
        let choices = Choices::default().layout(layout);
        let error = Server::new(&profile, choices, &program, CONTEXT, Serving::default()).unwrap_err();
        assert!(error.to_string().contains("replicas instead of copies") && error.to_string().contains(name));
    }
    // Prompts on chips of their own send the cache of every chip that shares positions.
    let apart = served(Layout::default().tensor(2).context(2), Serving::default().prefill(1));
    assert_eq!(apart.chips, 8);
}

#[test]
fn everything_in_comes_out() {
    let program = model("llama-1.1b", Format::Q4_0);
    let page = program.kv_bytes(|_| 1);
    let draft = Draft { tokens: 3, accept: 0.7, cost: 0.1 };
    let mut preemptions = 0;
    // Ample memory, little of it, and as much as the longest request takes.
    for (pages, rate) in [(4096, 20.0), (200, 60.0), (64, 200.0)] {
        let profile = maia(&program, pages * page);
        for (i, serving) in [
            Serving::default(),
            Serving::default().sequences(8).chunk(64),
            Serving::default().draft(Some(draft)),
            Serving::default().replicas(3),
            Serving::default().prefill(1).replicas(2),
        ]
        .into_iter()
        .enumerate()
        {
            let mut draw = Draw::new(150, i as u64, chat(), CONTEXT);
            (draw.prefix, draw.groups) = (if i % 2 == 0 { 300 } else { 0 }, 5);
            let (requests, _) = draw.poisson(rate).unwrap();
            let outcome = server(&profile, &program, serving).serve(&requests).unwrap();
            check(&requests, &outcome);
            preemptions += Summary::new(&outcome, None).preemptions;
        }
    }
    assert!(preemptions > 0);
}

/// The places of numbers among those that differ.
fn places(numbers: &[f64]) -> Vec<usize> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.dedup();
    numbers.iter().map(|number| sorted.partition_point(|other| other < number)).collect()
}

/// Requests that are all there at the start, in the real engine on the CPU and in the simulation: the same steps, and everyone's first
/// and last token in the same ones.
#[test]
fn the_real_engine_takes_the_same_steps() {
    const ROOM: u32 = 512;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen/halite-austen.gguf");
    let model = Arc::new(Model::open(file).unwrap());
    let tokenizer = Arc::new(Tokenizer::from_gguf(model.gguf()).unwrap().unwrap());
    let program = model.program(Default::default(), ROOM).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    // No limit on the time of a step: the engine would measure it.
    let ever_s = 1e6;
    let mut lost = 0;
    // Room for all, then so little that requests lose theirs; then prompts that begin like others, with room to keep what they share.
    for (cache, slots, prefix) in [(8192, 24, 0), (1024, 12, 0), (ROOM, 6, 0), (8192, 24, 100)] {
        let mut random = SplitMix64::new(cache.into());
        let mut between = |from: u32, to: u32| from + (random.next() % u64::from(to - from)) as u32;
        let options = SessionOptions::default().context(ROOM).cache_positions(cache).batch(48);
        let session = Session::new(&model, &backend, &options.outputs(slots).sequences(slots)).unwrap();
        let mut engine = Batch::new(session, tokenizer.clone()).step_time(Duration::from_secs_f64(ever_s));
        let mut requests = Vec::new();
        let mut ids: HashMap<RequestId, usize> = HashMap::new();
        for i in 0..40u32 {
            let (prompt, generate) = (between(1, 250), between(1, 60));
            let group = i % 3;
            let shared = (0..prefix).map(|place| 5 + (place * 7 + group * 31) % 495);
            let tokens = shared.chain([5 + i]).chain((1..prompt).map(|_| between(5, 500))).collect();
            let options = GenerateOptions::default().max_tokens(generate).ignore_end(true);
            // Prompts of different tenants share nothing.
            let tenant = if prefix > 0 { 0 } else { i.into() };
            let id = engine.add(batch::Request::new(tokens).options(options).tenant(tenant)).unwrap();
            ids.insert(id, requests.len());
            let begins = (prefix > 0).then_some(Prefix { group, tokens: prefix });
            requests.push(Request::new(0.0, prefix + prompt, generate).prefix(begins));
        }
        let mut steps = 0u32;
        let (mut first, mut end) = (vec![f64::NAN; requests.len()], vec![f64::NAN; requests.len()]);
        loop {
            steps += 1;
            let goes_on = engine.step(&mut |id, event| match event {
                Event::Tokens { tokens, .. } if !tokens.is_empty() && first[ids[&id]].is_nan() => {
                    first[ids[&id]] = f64::from(steps);
                }
                Event::Done(_) => end[ids[&id]] = f64::from(steps),
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            });
            if !goes_on.unwrap() {
                break;
            }
        }
        let profile = maia(&program, u64::from(cache / PAGE_POSITIONS) * program.kv_bytes(|_| 1));
        let serving = Serving::default().sequences(slots).chunk(48).step_s(ever_s);
        let mut server = Server::new(&profile, Choices::default(), &program, ROOM, serving).unwrap();
        let outcome = server.serve(&requests).unwrap();
        assert_eq!(outcome.totals.steps, u64::from(steps), "{cache} {prefix}");
        first.extend(end);
        let served = outcome.served.iter();
        let times: Vec<f64> = served.clone().map(|of| of.first_s).chain(served.map(|of| of.end_s)).collect();
        assert_eq!(places(&times), places(&first), "{cache} {prefix}");
        lost += Summary::new(&outcome, None).preemptions;
    }
    assert!(lost > 0);
}

/// One sequence, requests of one token: a queue with Poisson arrivals and constant service (M/D/1).
#[test]
fn waiting_is_that_of_queueing_theory() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = Profile::open("maia-100").unwrap();
    let mut server = server(&profile, &program, Serving::default().sequences(1));
    let service_s = server.steps().direct_s(&[(0, 1)]).unwrap();
    for load in [0.3, 0.7] {
        let rate = load / service_s;
        let (requests, _) = Draw::new(200_000, 3, fixed(1, 1), CONTEXT).poisson(rate).unwrap();
        let outcome = server.serve(&requests).unwrap();
        let waited: f64 = outcome.served.iter().map(|served| served.began_s - served.request.arrival_s).sum();
        // Pollaczek and Khinchine.
        let expected = load * service_s / (2.0 * (1.0 - load));
        let mean = waited / requests.len() as f64;
        assert!((mean / expected - 1.0).abs() < 0.04, "{load}: {mean} {expected}");
        let summary = Summary::new(&outcome, None);
        assert!((summary.busy - load).abs() < 0.01 && summary.batch == 1.0, "{summary:?}");
        // Little: as many wait as arrive in the time that each waits.
        assert!((summary.queue.0 / (rate * expected) - 1.0).abs() < 0.04, "{summary:?}");
    }
}

#[test]
fn a_request_alone_takes_its_steps() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = maia(&program, 1 << 30);
    let mut server = server(&profile, &program, Serving::default());
    let outcome = server.serve(&[Request::new(2.0, 700, 3)]).unwrap();
    let served = outcome.served[0];
    let mut direct = |spans: &[(u32, u32)]| server.steps().direct_s(spans).unwrap();
    let first = direct(&[(0, 512)]) + direct(&[(512, 188)]);
    let others = direct(&[(700, 1)]) + direct(&[(701, 1)]);
    assert!((served.first_token_s() / first - 1.0).abs() < 0.02, "{served:?} {first}");
    assert!((2.0 * served.per_token_s() / others - 1.0).abs() < 0.02, "{served:?} {others}");
    let summary = Summary::new(&outcome, None);
    assert!((summary.between_s.p50 / (others / 2.0) - 1.0).abs() < 0.02);
    assert!((summary.busy - 1.0).abs() < 1e-9 && summary.queue == (0.0, 1));
    let usd = summary.usd_per_million_tokens.unwrap();
    assert!((usd / (1e6 * 0.001 * outcome.seconds() / 3.0) - 1.0).abs() < 1e-9);
    // 702 positions: the last token is never stored.
    assert_eq!(outcome.kv_peak_bytes, program.kv_bytes(|_| 702u64.div_ceil(64)));
}

#[test]
fn the_same_seed_gives_the_same_events() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = maia(&program, 200 * program.kv_bytes(|_| 1));
    let draft = Draft { tokens: 3, accept: 0.7, cost: 0.1 };
    let run = |seed: u64, guesses: u64| {
        let (requests, _) = Draw::new(100, seed, chat(), CONTEXT).poisson(60.0).unwrap();
        let serving = Serving::default().draft(Some(draft)).seed(guesses);
        server(&profile, &program, serving).serve(&requests).unwrap()
    };
    let (outcome, again) = (run(1, 2), run(1, 2));
    assert_eq!(outcome.served, again.served);
    assert_eq!(Summary::new(&outcome, None), Summary::new(&again, None));
    assert!(run(2, 2).served != outcome.served && run(1, 3).served != outcome.served);
}

#[test]
fn prefixes_are_computed_once() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = maia(&program, 1 << 32);
    let requests: Vec<Request> = (0..20)
        .map(|i| {
            let prefix = Prefix { group: i % 2, tokens: 1000 };
            Request::new(f64::from(i) * 1e-6, 1100, 2).prefix(Some(prefix))
        })
        .collect();
    let outcome = server(&profile, &program, Serving::default()).serve(&requests).unwrap();
    check(&requests, &outcome);
    // All arrive before the first prefix is there, and wait for it.
    assert_eq!(outcome.totals.prompt_tokens, 2 * 1100 + 18 * 100);
    let alone: Vec<Request> = requests.iter().map(|request| request.prefix(None)).collect();
    let without = server(&profile, &program, Serving::default()).serve(&alone).unwrap();
    assert_eq!(without.totals.prompt_tokens, 20 * 1100);
    assert!(outcome.seconds() < 0.5 * without.seconds());
    // Two texts at once share the 15 pages that the prefix fills, and have ten each at their end.
    let both = [Request::new(0.0, 1100, 500).prefix(requests[0].prefix); 2];
    let peak_bytes = |requests: &[Request]| {
        server(&profile, &program, Serving::default()).serve(requests).unwrap().kv_peak_bytes
    };
    assert_eq!(peak_bytes(&both), program.kv_bytes(|_| 35));
    assert_eq!(peak_bytes(&both.map(|request| request.prefix(None))), program.kv_bytes(|_| 50));
}

#[test]
fn guesses_save_steps() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = maia(&program, 1 << 32);
    let steps = |draft: Option<Draft>| {
        let requests = [Request::new(0.0, 64, 4001 - 64)];
        let serving = Serving::default().draft(draft);
        let outcome = server(&profile, &program, serving).serve(&requests).unwrap();
        check(&requests, &outcome);
        outcome.totals.text_steps as f64
    };
    let plain = steps(None);
    // Always right: five tokens a step. Right with 0.6: 1 + 0.6 + 0.36 + ... tokens (Leviathan et al. 2023, equation 1).
    let with = |accept| plain / steps(Some(Draft { tokens: 4, accept, cost: 0.0 }));
    assert!((with(1.0) / 5.0 - 1.0).abs() < 0.01 && with(0.0) == 1.0);
    let expected = (1.0 - 0.6f64.powi(5)) / (1.0 - 0.6);
    assert!((with(0.6) / expected - 1.0).abs() < 0.05, "{} {expected}", with(0.6));
}

#[test]
fn prompts_elsewhere_leave_text_alone() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = maia(&program, 1 << 32);
    let fabric = Fabric::new(&profile).unwrap();
    let serving = Serving::default().prefill(1);
    // Alone, the second token comes after the transfer and a step.
    let outcome = server(&profile, &program, serving).serve(&[Request::new(0.0, 1000, 2)]).unwrap();
    let mut both = server(&profile, &program, serving);
    let bytes = program.kv_bytes(|_| 16) as f64;
    let sent_s = fabric.send_s(bytes, 1);
    // Three of nine links go to the next chip, at 0.7 of their rate; a launch and a hop come first.
    assert!((sent_s / (bytes / (0.7 * 3.0 * 50e9) + 1e-6 + 2e-6) - 1.0).abs() < 1e-9);
    let step_s = both.steps().seconds(&Step::of(&[(1000, 1)])).unwrap();
    assert!((outcome.served[0].per_token_s() / (sent_s + step_s) - 1.0).abs() < 1e-6);
    let (requests, _) = Draw::new(500, 1, fixed(1000, 50), CONTEXT).poisson(40.0).unwrap();
    let apart = Summary::new(&both.serve(&requests).unwrap(), None);
    let serving = Serving::default().replicas(2);
    let mixed = Summary::new(&server(&profile, &program, serving).serve(&requests).unwrap(), None);
    assert!(apart.between_s.p99 < mixed.between_s.p99, "{apart:?} {mixed:?}");
    // Without links there is no way to send anything.
    let teaching = Profile::open("teaching-16x16").unwrap();
    let tiny = model("llama-1.1b", Format::Q4_0);
    let error = Server::new(&teaching, Choices::default(), &tiny, CONTEXT, serving.prefill(1))
        .and_then(|mut server| server.serve(&[Request::new(0.0, 10, 2)]))
        .map(|_| ());
    assert!(error.is_err(), "{error:?}");
}

#[test]
fn more_load_is_never_faster() {
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = Profile::open("maia-100").unwrap();
    let mut server = server(&profile, &program, Serving::default());
    let Source::Poisson(rates) = "poisson:1..256".parse().unwrap() else { panic!("rates") };
    assert_eq!(rates, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]);
    let slo = Slo::default().first_token_s(Some(0.5)).per_token_s(Some(0.05));
    let sweep: Vec<Summary> = rates
        .iter()
        .map(|&rate| {
            let (requests, _) = Draw::new(1000, 1, fixed(400, 60), CONTEXT).poisson(rate).unwrap();
            Summary::new(&server.serve(&requests).unwrap(), Some(slo))
        })
        .collect();
    for pair in sweep.windows(2) {
        // Batches may be luckier by a little.
        assert!(pair[1].first_token_s.p99 > 0.95 * pair[0].first_token_s.p99, "{pair:?}");
        assert!(pair[1].busy > 0.999 * pair[0].busy && pair[1].batch > 0.99 * pair[0].batch, "{pair:?}");
        assert!(pair[1].good <= pair[0].good.map(|good| good + 0.01), "{pair:?}");
    }
    let at = knee(&sweep).unwrap();
    assert!(at + 1 < sweep.len() && sweep[at].good.unwrap() >= 0.99 && sweep[at + 1].good.unwrap() < 0.99);
    // Nothing promised: the first token at most five times as late as at the lowest rate.
    let mut free = sweep.clone();
    free.iter_mut().for_each(|summary| summary.good = None);
    let at = knee(&free).unwrap();
    let late = |i: usize| free[i].first_token_s.p99 / free[0].first_token_s.p99;
    assert!(at + 1 < free.len() && late(at) <= 5.0 && late(at + 1) > 5.0);
    // Far beyond the knee, the rest waits.
    let (first, last) = (&sweep[0], &sweep[sweep.len() - 1]);
    assert!(first.requests_per_s > 0.9 && last.requests_per_s < 0.9 * 256.0 && last.busy > 0.99);
}

#[test]
fn lengths_have_their_percentiles() {
    let draw = Draw::new(40_000, 5, "lognormal:300,2000/uniform:10..20".parse().unwrap(), 1 << 20);
    let (requests, cut) = draw.poisson(10.0).unwrap();
    let mut prompts: Vec<f64> = requests.iter().map(|request| f64::from(request.prompt)).collect();
    prompts.sort_by(f64::total_cmp);
    assert!((prompts[20_000] / 300.0 - 1.0).abs() < 0.03 && (prompts[38_000] / 2000.0 - 1.0).abs() < 0.05);
    let answers: f64 = requests.iter().map(|request| f64::from(request.generate)).sum();
    assert!((answers / 40_000.0 / 15.0 - 1.0).abs() < 0.01 && cut == 0);
    assert!(requests.iter().all(|request| (10..=20).contains(&request.generate)));
    assert!((requests[39_999].arrival_s / 4000.0 - 1.0).abs() < 0.03);
    // Those without a bound are cut to the context, and counted.
    let (requests, cut) = draw.context(1000).poisson(10.0).unwrap();
    assert!(cut > 1000 && requests.iter().all(|request| request.prompt + request.generate <= 1000));
}

#[test]
fn traces_say_what_is_wrong_with_them() {
    let parse = |text: &str| read("t.csv", text.as_bytes(), 1000);
    let requests = parse(
        "prompt_tokens,arrival_s,generated_tokens,prefix_tokens,prefix_group\n# later\n20, 1.5,7,10,a\n9,0.5,3,,\n30,2,1,5,b\n",
    );
    let prefix = |group, tokens| Some(Prefix { group, tokens });
    let expected = [
        Request::new(0.5, 9, 3),
        Request::new(1.5, 20, 7).prefix(prefix(0, 10)),
        Request::new(2.0, 30, 1).prefix(prefix(1, 5)),
    ];
    assert_eq!(requests.unwrap(), expected);
    let names = "arrival_s,prompt_tokens,generated_tokens";
    for (text, words) in [
        (format!("{names}\n1,2\n"), &["t.csv, line 2", "fields"][..]),
        (format!("{names}\n0,1,1\n-1,2,3\n"), &["line 3, column arrival_s", "seconds from 0", "`-1`"]),
        (
            format!("{names}\n1,0,3\n"),
            &["line 2, column prompt_tokens", "from 1 to the context of 1000", "`0`"],
        ),
        (format!("{names}\n1,2,x\n"), &["line 2, column generated_tokens", "`x`"]),
        (format!("{names}\n1,990,11\n"), &["column generated_tokens", "at most 10", "`11`"]),
        (format!("{names},prefix_tokens\n1,9,1,10\n"), &["column prefix_tokens", "at most the prompt's 9"]),
        (format!("{names},cost\n"), &["line 1", "`cost`", "arrival_s, prompt_tokens"]),
        ("arrival_s,prompt_tokens\n1,2\n".into(), &["a column `generated_tokens`"]),
        (format!("{names}\n"), &["at least one request"]),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn impossible_loads_are_errors() {
    for text in ["poisson:", "poisson:0", "poisson:-1,2", "poisson:4..1", "poisson:nan", "poisson:1e-9..1e30"]
    {
        assert!(text.parse::<Source>().is_err(), "{text}");
    }
    assert_eq!("a.csv".parse::<Source>().unwrap(), Source::File("a.csv".into()));
    for text in
        ["", "chatty", "5", "0/5", "uniform:5..4/1", "lognormal:9,2/1", "lognormal:0.5,2/1", "1/uniform:3"]
    {
        assert!(text.parse::<Lengths>().is_err(), "{text}");
    }
    for text in ["", "ttft", "ttft=0", "ttft=1,ttft=2", "tpot=inf", "e2e=3"] {
        assert!(text.parse::<Slo>().is_err(), "{text}");
    }
    let program = model("llama-1.1b", Format::Q4_0);
    let profile = maia(&program, 40 * program.kv_bytes(|_| 1));
    let fails = |serving: Serving, requests: &[Request]| {
        let served = Server::new(&profile, Choices::default(), &program, CONTEXT, serving)
            .and_then(|mut server| server.serve(requests));
        served.map(|_| ()).unwrap_err().to_string()
    };
    let plain = Serving::default();
    let ask = |prompt, generate| Request::new(0.0, prompt, generate);
    assert!(fails(plain.sequences(0), &[]).contains("sequences: expected at least 1"));
    assert!(fails(plain, &[ask(4000, 97)]).contains("at most 4096 tokens, got 4097 in request 1"));
    assert!(fails(plain, &[ask(10, 1), ask(2561, 1)]).contains("bytes for 2562 tokens in request 2"));
    assert!(fails(plain, &[ask(0, 1)]).contains("at least one token"));
    assert!(fails(plain, &[Request::new(2.0, 1, 1), ask(1, 1)]).contains("arrival from 2 s"));
    let draft = Draft { tokens: 1, accept: 1.5, cost: 0.0 };
    assert!(fails(plain.draft(Some(draft)), &[]).contains("0 to 1"));
    let large = model("llama-2-7b", Format::F16);
    let error = Server::new(&profile, Choices::default(), &large, CONTEXT, plain).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("bytes of weights on maia"), "{error}");
    assert!(Draw::new(1, 0, fixed(4000, 97), CONTEXT).poisson(1.0).is_err());
}

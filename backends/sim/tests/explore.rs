//! Exploration of designs: points are the closed form's, the front and the values that reach a target are right.

use halite::backend::Cancel;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::program::Program;
use halite::synth::{Formats, Synth, shape};
use halite_profiles::profile::{Driver, Key, Profile, SHIPPED};
use halite_sim::estimate::device::Device;
use halite_sim::estimate::explore::{Outcome, Plan, Reason, Sampling, Vary, explore, front, reach};
use halite_sim::estimate::figures::Metric;
use halite_sim::estimate::system::{Layout, stages};
use halite_sim::estimate::workload::{Choices, Quick, Workload, candidates};

const GRID: Sampling = Sampling::Grid(10_000);

fn model(name: &str, format: Format) -> Program {
    let model = Synth::new(shape(name).unwrap(), Formats::of(format), 0).unwrap().model().unwrap();
    model.program(ProgramOptions::default(), 1024).unwrap()
}

fn profile(name: &str) -> Profile {
    Profile::open(name).unwrap()
}

fn plan(profile: &Profile, vary: &[&str], sampling: Sampling) -> halite::Result<Plan> {
    let vary = vary.iter().map(|text| text.parse()).collect::<halite::Result<Vec<Vary>>>()?;
    Plan::new(profile, &vary, sampling)
}

fn run(profile: &Profile, program: &Program, plan: &Plan) -> Vec<Outcome> {
    run_by(profile, program, plan, metric("seconds"))
}

fn run_by(profile: &Profile, program: &Program, plan: &Plan, best: &'static Metric) -> Vec<Outcome> {
    let (choices, workload) = (Choices::default(), Workload::default());
    let plan = plan.clone().layouts_by(best);
    explore(profile, choices, program, &workload, &plan, &Cancel::default(), &|_| {}).unwrap()
}

fn metric(name: &str) -> &'static Metric {
    Metric::all().iter().find(|metric| metric.name == name).unwrap()
}

#[test]
fn points_are_the_closed_forms() {
    let (profile, program) = (profile("maia-100"), model("llama-1.1b", Format::BF16));
    let vary = [
        "memory.hbm.read_bytes_per_s=1e12,2e12",
        "batch=1,3",
        "chip.clusters=4..16/3",
        "chips=1,2",
        "memory.hbm.capacity_bytes=1e9,64e9",
    ];
    let plan = plan(&profile, &vary, GRID).unwrap();
    let outcomes = run(&profile, &program, &plan);
    assert_eq!((plan.count(), outcomes.len()), (48, 48));
    let mut fitting = 0;
    for (point, outcome) in outcomes.iter().enumerate() {
        let [bandwidth, batch, clusters, chips, capacity] = plan.values(point)[..] else { panic!() };
        let chip = profile.with(plan.variables().next().unwrap().0, bandwidth).unwrap();
        let chip = chip
            .with("chip.clusters", clusters)
            .unwrap()
            .with("memory.hbm.capacity_bytes", capacity)
            .unwrap();
        // The memory of the clusters holds weights too.
        let room = (capacity + clusters * 15e6) as u64;
        let workload = Workload::default().batch(batch as u32);
        let free = Layout::default().tensor(0).expert(0).pipeline(0).data(0);
        let by = metric("seconds");
        let choices = Choices::default().layout(free);
        let best = &candidates(&chip, choices, &program, &workload, chips as u32, by).unwrap()[0];
        match outcome {
            Ok(figures) => {
                assert!(best.fits());
                assert_eq!(figures, best);
                assert_eq!(figures.have_bytes, room);
                fitting += 1;
            }
            Err(Reason::Memory { have_bytes, .. }) => assert!(!best.fits() && *have_bytes == room),
            Err(other) => panic!("{other}"),
        }
    }
    assert!(fitting > 24 && fitting < 48, "{fitting}");
}

/// A layout is the best by what was asked for, whichever point it is of.
#[test]
fn layouts_are_chosen_by_the_metric() {
    let (profile, program) = (profile("maia-100"), model("llama-1.1b", Format::BF16));
    let plan = plan(&profile, &["chips=4", "batch=8"], GRID).unwrap();
    let outcome = |name: &str| run_by(&profile, &program, &plan, metric(name)).remove(0).unwrap();
    let names = ["seconds", "tokens_per_s", "first_token_s", "need_bytes"];
    let all = names.map(outcome);
    for (best, name) in all.iter().zip(names) {
        let merit = |figures| {
            let figure = metric(name).of(figures).unwrap();
            if metric(name).is_more_better { figure } else { -figure }
        };
        assert!(all.iter().all(|other| merit(other) <= merit(best)), "{name}: {all:?}");
    }
    assert!(all[1].layout != all[2].layout, "{all:?}");
    let free = Layout::default().tensor(0).expert(0).pipeline(0).data(0);
    let experts = Choices::default().layout(free.expert(2));
    let error = candidates(&profile, experts, &program, &Workload::default(), 4, metric("seconds"));
    assert!(error.unwrap_err().to_string().contains("the model has no experts"));
}

#[test]
fn what_cannot_be_lowered_is_counted() {
    let (profile, program) = (profile("maia-100"), model("llama-1.1b", Format::Q8_0));
    let path =
        profile.quantities.iter().find(|(path, _)| path.ends_with("capacity_bytes")).unwrap().0.clone();
    let plan = plan(&profile, &[&format!("{path}=64,128,4e6")], GRID).unwrap();
    let outcomes = run(&profile, &program, &plan);
    let kinds: Vec<String> = outcomes.iter().filter_map(|o| o.as_ref().err()).map(Reason::kind).collect();
    assert!(kinds.len() == 2 && kinds[0] == kinds[1] && kinds[0].contains("of a scratchpad"), "{kinds:?}");
    assert!(outcomes[2].is_ok());
}

#[test]
fn no_point_beats_one_of_the_front() {
    let (profile, program) = (profile("maia-100"), model("llama-1.1b", Format::Q8_0));
    let vary = ["memory.hbm.read_bytes_per_s=5e11..8e12", "chip.clusters=2..16", "batch=1,4,16"];
    for sampling in [GRID, Sampling::Random(150, 7)] {
        let plan = plan(&profile, &vary, sampling).unwrap();
        let outcomes = run(&profile, &program, &plan);
        for names in [
            vec!["tokens_per_s", "chip.clusters"],
            vec!["first_token_s", "memory.hbm.read_bytes_per_s", "tokens_per_s"],
        ] {
            let objectives: Vec<_> = names.iter().map(|name| plan.objective(name).unwrap()).collect();
            let costs: Vec<Vec<f64>> = outcomes
                .iter()
                .enumerate()
                .map(|(point, outcome)| {
                    let (values, figures) = (plan.values(point), outcome.as_ref().unwrap());
                    let cost = |name: &&str| match *name {
                        "tokens_per_s" => -f64::from(figures.batch) / figures.step_s,
                        "first_token_s" => figures.first_token_s,
                        path => values[plan.variables().position(|(other, _)| other == path).unwrap()],
                    };
                    names.iter().map(cost).collect()
                })
                .collect();
            let beats = |a: usize, b: usize| {
                let no_worse = costs[a].iter().zip(&costs[b]).all(|(a, b)| a <= b);
                no_worse && (costs[a] != costs[b] || a < b)
            };
            let expected: Vec<usize> =
                (0..costs.len()).filter(|&b| !(0..costs.len()).any(|a| beats(a, b))).collect();
            let mut found = front(&plan, &outcomes, &objectives).unwrap();
            found.sort_unstable();
            assert_eq!(found, expected, "{names:?}");
            assert!(found.len() > 3, "{found:?}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_points_within_their_ranges() {
    let profile = profile("maia-100");
    let vary = ["memory.hbm.read_bytes_per_s=1e12..8e12", "chip.clusters=8..32", "tp=1,2"];
    let sample = |seed| {
        let plan = plan(&profile, &vary, Sampling::Random(200, seed)).unwrap();
        (0..plan.count()).map(|point| plan.values(point)).collect::<Vec<_>>()
    };
    let all = sample(1);
    assert!(all == sample(1) && all != sample(2));
    for values in &all {
        assert!(
            (1e12..=8e12).contains(&values[0])
                && (8.0..=32.0).contains(&values[1])
                && values[1].fract() == 0.0
        );
        assert!(values[2] == 1.0 || values[2] == 2.0);
    }
    // Equally likely logarithms: half of them are below the geometric mean.
    let below = all.iter().filter(|values| values[0] < 8f64.sqrt() * 1e12).count();
    assert!((70..130).contains(&below), "{below}");
}

/// A better number is never slower: more bandwidth, clock, units or memory, and fewer cycles or nanoseconds. More clusters can be, by
/// this share: products and ops on rows are divided between all tiles, and each tile loads what the others load too.
#[test]
fn better_is_never_slower() {
    let program = model("llama-1.1b", Format::Q8_0);
    let more = [
        "_per_s",
        "clock_hz",
        "clusters",
        "capacity_bytes",
        "_per_cycle",
        "units_per_tile",
        "queue_entries",
        "engines",
        "_fraction",
    ];
    let less = ["_ns", "_cycles", "half_rate_run_bytes"];
    let (mut compared, mut slower) = (0, Vec::new());
    for (name, _) in SHIPPED {
        let profile = profile(name);
        let stages = stages(&program, Layout::default()).unwrap();
        let quick = Quick::new(Choices::default(), &stages, &Workload::default().batch(3)).unwrap();
        if profile.driver != Driver::Sim || quick.times(&profile).is_err() {
            continue;
        }
        for (path, quantity) in &profile.quantities {
            let is_more = more.iter().any(|key| path.ends_with(key));
            if !is_more && !less.iter().any(|key| path.ends_with(key)) {
                continue;
            }
            let key = Key::of(path).unwrap();
            // From the worst to the best.
            let mut last = f64::INFINITY;
            for power in -4..=4 {
                let value = quantity.value * 2f64.powi(if is_more { power } else { -power });
                let value = if key.whole { value.round() } else { value };
                if value < key.min || value > key.max {
                    continue;
                }
                let changed = profile.with(path, value).unwrap();
                if changed.tiles() > 16_384.0 {
                    // More are not simulated.
                    continue;
                }
                // What does not fit is the slowest.
                let now = quick.times(&changed).map_or(f64::INFINITY, |times| times.seconds);
                // Tilings are chosen for an op by itself, not for what may be loaded before it.
                let ahead = if profile.launch.loads_ahead { 0.02 } else { 1e-9 };
                let slack = if path == "chip.clusters" { 0.15 } else { ahead };
                if now > last * (1.0 + slack) {
                    slower.push(format!("{name} {path} = {value}: {last} s, then {now} s"));
                }
                (last, compared) = (now, compared + 1);
            }
        }
    }
    assert!(slower.is_empty(), "{slower:#?}");
    assert!(compared > 1000, "{compared}");
}

#[test]
fn a_value_that_reaches_a_target_is_the_nearest() {
    let (profile, program) = (profile("maia-100"), model("llama-1.1b", Format::BF16));
    let (choices, workload) = (Choices::default(), Workload::default());
    let all = plan(&profile, &[], GRID).unwrap();
    let figure = |profile: &Profile, name: &str| {
        let stages = stages(&program, Layout::default()).unwrap();
        let times = Quick::new(choices, &stages, &workload).unwrap().times(profile).unwrap();
        if name == "first_token_s" { times.first_token_s } else { 1.0 / times.step_s }
    };
    for (name, change) in [("tokens_per_s", 1.2), ("first_token_s", 0.9)] {
        let target = change * figure(&profile, name);
        let found =
            reach(&profile, choices, &program, &workload, &all, (metric(name), target, 16.0)).unwrap();
        assert_eq!(found.before, Some(figure(&profile, name)));
        let reaches = |figure: f64| if change > 1.0 { figure >= target } else { figure <= target };
        let alone = found.levers.iter().filter(|lever| lever.reaches);
        assert!(alone.clone().count() > 0 && found.levers.iter().any(|lever| !lever.reaches), "{name}");
        assert!(
            found
                .levers
                .is_sorted_by_key(|lever| (!lever.reaches, if lever.reaches { lever.factor() } else { 0.0 }))
        );
        for lever in alone {
            let at = |value| figure(&profile.with(&lever.path, value).unwrap(), name);
            assert!(reaches(at(lever.value)) && lever.figure == Some(at(lever.value)), "{lever:?}");
            // A little nearer to the profile's is too little.
            let up = lever.value > lever.before;
            let whole = Key::of(&lever.path).is_some_and(|key| key.whole);
            let near = match (up, whole) {
                (true, true) => (lever.value / 1.0011).ceil() - 1.0,
                (false, true) => (lever.value * 1.0011).floor() + 1.0,
                (true, false) => lever.value / 1.0011,
                (false, false) => lever.value * 1.0011,
            };
            assert!(!reaches(at(near)), "{lever:?} {near}");
        }
        let (factor, then) = found.together.unwrap();
        assert!(factor < found.levers[0].factor() && reaches(then));
    }
    // Only what varies, in its range; and a target that is reached.
    let some = plan(&profile, &["memory.hbm.read_bytes_per_s=1.8e12..2e12"], GRID).unwrap();
    let target = 10.0 * figure(&profile, "tokens_per_s");
    let found =
        reach(&profile, choices, &program, &workload, &some, (metric("tokens_per_s"), target, 16.0)).unwrap();
    assert!(
        found.levers.len() == 1 && !found.levers[0].reaches && found.levers[0].value == 2e12,
        "{found:?}"
    );
    let found =
        reach(&profile, choices, &program, &workload, &all, (metric("tokens_per_s"), 1.0, 16.0)).unwrap();
    assert!(found.levers.is_empty() && found.before.unwrap() > 1.0);
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let profile = profile("maia-100");
    for (vary, expected) in [
        ("memory.hbm.read_bytes=1e12", "memory.hbm.read_bytes_per_s"),
        ("nothing=1", "batch, chips, tp, ep, cp, pp, dp"),
        ("chip.clusters", "PATH=A..B"),
        ("chip.clusters=", "numbers, separated by commas"),
        ("chip.clusters=4,x", "numbers, separated by commas"),
        ("chip.clusters=8..4", "to a larger one"),
        ("memory.hbm.latency_ns=0..4", "from a number above 0"),
        ("chip.clusters=4..8/0", "values after the /"),
        ("chip.clusters=4..8/1", "values after the /"),
        ("chip.clusters=4..nan", "two numbers"),
        ("chip.clusters=4.5", "a whole number"),
        ("chip.clusters=4..99999", "from 1 to 4096 clusters"),
        ("batch=0,1", "from 1 to 4096"),
        ("memory.hbm.read_bytes_per_s=1e12..2e12/20000", "at most 10000"),
    ] {
        let error = plan(&profile, &[vary], GRID).unwrap_err().to_string();
        assert!(error.contains(expected), "{vary}: {error}");
    }
    assert!(plan(&profile, &["batch=1", "batch=2"], GRID).unwrap_err().to_string().contains("twice"));
    let planned = plan(&profile, &["batch=1,2"], GRID).unwrap();
    assert!(planned.objective("speed").unwrap_err().to_string().contains("tokens_per_s, "));
    let program = model("llama-1.1b", Format::Q8_0);
    let ask = |target| reach(&profile, Choices::default(), &program, &Workload::default(), &planned, target);
    let tokens = metric("tokens_per_s");
    for (target, expected) in [
        ((tokens, 1e9, 16.0), "one value"),
        ((tokens, 0.0, 16.0), "above 0"),
        ((tokens, 1.0, 1.0), "above 1"),
    ] {
        assert!(ask(target).unwrap_err().to_string().contains(expected), "{expected}");
    }
    let none = plan(&profile, &[], GRID).unwrap();
    let usd = (metric("usd_per_million_tokens"), 1.0, 16.0);
    let unpriced = reach(&profile, Choices::default(), &program, &Workload::default(), &none, usd);
    assert!(unpriced.unwrap_err().to_string().contains("no [price]"));
    let cancel = Cancel::default();
    cancel.cancel();
    let (choices, workload) = (Choices::default(), Workload::default());
    let stopped = explore(&profile, choices, &program, &workload, &planned, &cancel, &|_| {});
    assert!(matches!(stopped, Err(halite::Error::Cancelled)));
}

#[test]
fn ranges_of_too_many_values_are_refused() {
    for steps in ["18446744073709551615", "99999999999", "1000001", "1", "x"] {
        let error = format!("chip.clock_hz=1e9..2e9/{steps}").parse::<Vary>().unwrap_err().to_string();
        assert!(error.contains("2 to 1000000 values after the /") && error.contains(steps), "{error}");
    }
}

/// Points of devices that are not simulated are the sums of their kernels.
#[test]
fn points_of_devices_are_the_sums_of_their_ops() {
    let workload = Workload::default();
    let positions = [(workload.prompt - workload.chunk.min(workload.prompt), workload.prompt)];
    let (prompt, text) = (&positions[..], &[(workload.prompt + workload.generate / 2, 1)][..]);
    for (name, format) in [
        ("nvidia-h100", Format::BF16),
        ("nvidia-h100", Format::Q4_0),
        ("nvidia-a100", Format::Q8_0),
        ("generic-x86-avx512", Format::Q8_0),
    ] {
        for shape in ["llama-1.1b", "moe-8x2"] {
            let (profile, program) = (profile(name), model(shape, format));
            let memory = |path: &&String| path.starts_with("memory.") && path.ends_with(".read_bytes_per_s");
            let path = profile.quantities.iter().map(|(path, _)| path).rfind(memory).unwrap().clone();
            let vary = [&format!("{path}=1e11,3e12")[..], "chip.clock_hz=5e8,1e9,3e9"];
            let plan = plan(&profile, &vary, GRID).unwrap();
            let fused = &stages(&program, Layout::default()).unwrap()[0].program;
            for (point, outcome) in run(&profile, &program, &plan).iter().enumerate() {
                let [bandwidth, clock] = plan.values(point)[..] else { panic!() };
                let chip = profile.with(&path, bandwidth).unwrap();
                let chip = chip.with("chip.clock_hz", clock).unwrap();
                let device = Device::new(&chip, None).unwrap();
                let sum = |spans| device.time(fused, spans).unwrap().total().seconds;
                let Ok(figures) = outcome else { panic!("{outcome:?}") };
                for (got, expected) in [(figures.first_token_s, sum(prompt)), (figures.step_s, sum(text))] {
                    assert!((got / expected - 1.0).abs() < 1e-12, "{name} {shape}: {got}, {expected}");
                }
            }
        }
    }
}

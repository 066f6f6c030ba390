//! The GPU backend against the reference and the CPU. Needs a device: see `tests/common/mod.rs`.

mod common;

use std::sync::Arc;

use common::{budgeted, gpu, open};
use halite::Model;
use halite::backend::cpu::Cpu;
use halite::backend::{Backend, Clock, Usage};
use halite::conformance::{Case, cases, check};
use halite::error::Error;
use halite::map::Source;
use halite::sampler::{Sampler, SamplerOptions};
use halite::session::{OutputKind, Run, SequenceId, Session, SessionOptions, footprint};
use halite_gpu::{Gpu, GpuOptions, adapters};

/// Every path conforms: each switched off, and all together.
#[test]
fn conforms() {
    let paths = [&[][..], &["integer", "f16"], &["subgroups"], &["integer", "subgroups", "f16"]];
    // At once: most of the time goes into compiling shaders, one by one.
    let failures = std::thread::scope(|scope| {
        let mut numbers = 0..;
        let threads = paths.map(|without| {
            let number = numbers.next().unwrap_or(0);
            scope.spawn(move || failures(number, without))
        });
        threads.map(|thread| thread.join().unwrap())
    });
    for (without, failures) in paths.iter().zip(failures) {
        assert!(failures.is_empty(), "without {without:?}:\n{}", failures.join("\n"));
    }
}

/// The cases that do not pass, gaps included. Where shaders run on the CPU, which takes minutes to compile them, each path has a
/// quarter of the cases, no two of them the same; `.ci/gpu` runs all on one device.
fn failures(path: usize, without: &[&str]) -> Vec<String> {
    let Some(backend) = gpu(without) else { return Vec::new() };
    let is_software = ["llvmpipe", "SwiftShader"].iter().any(|name| backend.caps().device.contains(name));
    let chosen = cases().into_iter().enumerate().filter(|(n, _)| !is_software || n % 4 == path);
    let outcomes = chosen.map(|(_, case)| (check(&*backend, &case), case.name));
    outcomes
        .filter(|(outcome, _)| !outcome.passed())
        .map(|(outcome, name)| format!("{name}: {outcome}"))
        .collect()
}

/// Matrix units conform, where there are some, in products with many activations.
#[test]
fn matrix_units_conform() {
    let Some(device) = open(&GpuOptions::default()) else { return };
    let adapters = adapters();
    let adapter = adapters.iter().find(|a| a.to_string() == device.caps().device).unwrap();
    let none = adapter.facts().iter().any(|(name, value)| *name == "matrix units" && value == "no");
    let asked = GpuOptions::default().cooperative(true);
    if none {
        let adapter = std::env::var("HALITE_GPU").ok().filter(|name| !name.is_empty());
        let refused = Gpu::new(&asked.adapter(adapter)).unwrap_err().to_string();
        assert!(refused.contains("no f16 matrix units"), "{refused}");
        return;
    }
    let device = open(&asked).unwrap();
    let many = |case: &Case| ["tokens=17", "tokens=67"].iter().any(|tokens| case.name.ends_with(tokens));
    for case in cases().into_iter().filter(many) {
        let outcome = check(&device, &case);
        assert!(outcome.passed(), "{}: {outcome}", case.name);
    }
}

/// Compiled shaders are kept, and what is damaged is as good as nothing.
#[test]
fn compiled_shaders_are_kept() {
    let folder = std::env::temp_dir().join(format!("halite-shaders-{}", std::process::id()));
    let options = GpuOptions::default().shader_cache(folder.clone());
    let case = cases().into_iter().find(|case| case.name.starts_with("Add")).unwrap();
    let kept = || {
        let device = open(&options)?;
        assert!(check(&device, &case).passed());
        let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        Some((std::fs::read(&file).unwrap(), file))
    };
    let Some((first, file)) = kept() else { return };
    assert!(first.len() > 8);
    for damaged in [&first[..first.len() - 1], b"", &[b'x'; 200]] {
        std::fs::write(&file, damaged).unwrap();
        assert_eq!(kept().unwrap().0.len(), first.len());
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Bytes come back as they were written, in pieces that share words.
#[test]
fn buffers_keep_bytes() {
    let Some(backend) = gpu(&[]) else { return };
    let buffer = backend.alloc(1003, Usage::Io).unwrap();
    let mut content = vec![0u8; 1003];
    backend.read(&buffer, 0, &mut content).unwrap();
    assert!(content.iter().all(|&b| b == 0), "new memory is zero");
    for (start, end) in [(0, 1003), (1, 2), (997, 1003), (3, 8), (4, 12), (500, 501), (1002, 1003), (7, 7)] {
        let fresh: Vec<u8> = (start..end).map(|i| (i * 7 + start + 1) as u8).collect();
        let mut rest = &fresh[..];
        backend
            .fill(&buffer, start as u64..end as u64, &mut |to| {
                let (now, later) = rest.split_at(to.len());
                to.copy_from_slice(now);
                rest = later;
            })
            .unwrap();
        assert!(rest.is_empty());
        content[start..end].copy_from_slice(&fresh);
        let mut got = vec![0; 1003];
        backend.read(&buffer, 0, &mut got).unwrap();
        assert_eq!(got, content, "{start}..{end}");
        let mut part = vec![0; end - start];
        backend.read(&buffer, start as u64, &mut part).unwrap();
        assert_eq!(part, content[start..end]);
    }
    assert!(matches!(backend.fill(&buffer, 1000..1004, &mut |_| {}), Err(Error::Argument { .. })));
    assert!(matches!(backend.read(&buffer, 1000, &mut [0; 4]), Err(Error::Argument { .. })));
}

/// What cannot be had is an error that says so, and the device goes on working.
#[test]
fn errors_are_values() {
    let Some(backend) = gpu(&[]) else { return };
    assert!(matches!(backend.alloc(1 << 50, Usage::Weight), Err(Error::OutOfMemory { .. })));
    let cpu = Cpu::with_threads(1).unwrap();
    let foreign = cpu.alloc(16, Usage::Io).unwrap();
    assert!(matches!(backend.read(&foreign, 0, &mut [0; 4]), Err(Error::Backend { .. })));
    let none = Gpu::new(&GpuOptions::default().adapter("no such thing".to_owned()));
    assert!(none.unwrap_err().to_string().contains("no such thing"));
    let path = Gpu::new(&GpuOptions::default().without(vec!["magic".into()]));
    assert!(path.unwrap_err().to_string().contains("magic"));
    assert!(backend.alloc(16, Usage::Io).is_ok());
}

fn austen() -> Arc<Model> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen/halite-austen.gguf");
    Arc::new(Model::from_source(Source::open(file.as_ref()).unwrap()).unwrap())
}

fn session(model: &Arc<Model>, backend: &Arc<dyn Backend>) -> Session {
    let options = SessionOptions::default().context(256).batch(64);
    Session::new(model, backend, &options).unwrap()
}

/// Feeds tokens and then says what is most likely, so many times.
fn continued(
    session: &mut Session,
    sequence: SequenceId,
    tokens: &[u32],
    count: usize,
) -> Result<Vec<u32>, Error> {
    let mut said: Vec<u32> = Vec::new();
    for tokens in tokens.chunks(64) {
        session.step(&[Run::new(sequence, tokens)], OutputKind::ArgMax)?;
    }
    while said.len() < count {
        said.extend(session.arg_max());
        session.step(&[Run::new(sequence, &said[said.len() - 1..])], OutputKind::ArgMax)?;
    }
    Ok(said)
}

/// The built-in model says the same as on the CPU, through a prefill and single steps.
#[test]
fn same_tokens_as_the_cpu() {
    let Some(gpu) = gpu(&[]) else { return };
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let prompt: Vec<u32> = (100..200).collect();
    let [ours, theirs] = [&gpu, &cpu].map(|backend| {
        let mut session = session(&austen(), backend);
        let sequence = session.add_sequence();
        continued(&mut session, sequence, &prompt, 40).unwrap()
    });
    assert_eq!(ours, theirs);
}

/// Where a device has timestamps, they are what times a step, in one submission or in several.
#[test]
fn steps_are_timed_by_the_device() {
    let Some(resident) = gpu(&[]) else { return };
    let model = austen();
    let options = SessionOptions::default().context(256).batch(64);
    let needed = footprint(&model, &*resident, &options).unwrap();
    let streamed = budgeted(needed.working_bytes() + needed.weight_bytes / 2).unwrap();
    let adapters = adapters();
    let adapter = adapters.iter().find(|a| a.to_string() == resident.caps().device).unwrap();
    let offered = adapter.facts().iter().any(|(name, value)| *name == "timestamps" && value == "yes");
    for backend in [resident, streamed] {
        let mut session = session(&model, &backend);
        let sequence = session.add_sequence();
        for tokens in [&[1, 2, 3][..], &[4]] {
            session.step(&[Run::new(sequence, tokens)], OutputKind::ArgMax).unwrap();
            let timing = session.last_timing().unwrap();
            assert_eq!(timing.clock, if offered { Clock::Device } else { Clock::Host });
            assert!(!timing.elapsed.is_zero());
        }
    }
}

/// Weights that do not fit are streamed, with the same logits; what cannot run even so is an error.
#[test]
fn streamed_weights_give_the_same_logits() {
    let Some(resident) = gpu(&[]) else { return };
    let model = austen();
    let needed = footprint(&model, &*resident, &SessionOptions::default().context(256).batch(64)).unwrap();
    let logits = |backend: &Arc<dyn Backend>| {
        let mut session = session(&model, backend);
        let sequence = session.add_sequence();
        let streamed = session.weights().streamed_bytes;
        let tokens: Vec<u32> = (100..130).collect();
        let mut all = Vec::new();
        for tokens in [&tokens[..20], &tokens[20..21], &tokens[21..]] {
            session.step(&[Run::new(sequence, tokens)], OutputKind::Logits).unwrap();
            all.extend_from_slice(session.logits());
        }
        (all, streamed)
    };
    let (want, streamed) = logits(&resident);
    assert_eq!(streamed, 0);
    let mut most = 0;
    for share in [4, 5, 7] {
        let budget = needed.working_bytes() + needed.weight_bytes * share / 8;
        let Some(backend) = budgeted(budget) else { return };
        let (got, streamed) = logits(&backend);
        assert!(streamed > 0 && got == want, "{share} / 8");
        most = most.max(streamed);
    }
    assert!(most > needed.weight_bytes / 2);
    let backend = budgeted(needed.working_bytes() + 1000).unwrap();
    let options = SessionOptions::default().context(256).batch(64);
    let error = Session::new(&model, &backend, &options).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
}

/// A lost device is an error, and the session goes on elsewhere from its tokens.
#[test]
fn a_lost_device_is_survived() {
    let Some(gpu) = open(&GpuOptions::default()) else { return };
    let gpu = Arc::new(gpu);
    let backend: Arc<dyn Backend> = gpu.clone();
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::with_threads(1).unwrap());
    let (model, prompt) = (austen(), (100..200).collect::<Vec<u32>>());
    let mut on_cpu = session(&model, &cpu);
    let whole = on_cpu.add_sequence();
    let want = continued(&mut on_cpu, whole, &prompt, 30).unwrap();
    let mut on_gpu = session(&model, &backend);
    let sequence = on_gpu.add_sequence();
    let got = continued(&mut on_gpu, sequence, &prompt, 10).unwrap();
    let other = on_gpu.fork(sequence).unwrap();
    on_gpu.truncate(other, 50).unwrap();
    assert!(gpu.lose());
    assert!(matches!(continued(&mut on_gpu, sequence, &got[9..], 1), Err(Error::Backend { .. })));
    let mut moved = on_gpu.moved_to(&cpu).unwrap();
    assert_eq!(moved.tokens(sequence).unwrap(), [&prompt[..], &got].concat());
    assert_eq!(moved.tokens(other).unwrap(), &prompt[..50]);
    moved.truncate(sequence, 109).unwrap();
    assert_eq!(continued(&mut moved, sequence, &got[9..], 20).unwrap(), want[10..]);
}

/// What is sampled from the most likely tokens, found by the device, is what is sampled from all logits.
#[test]
fn the_most_likely_tokens_are_enough_to_sample() {
    let Some(gpu) = gpu(&[]) else { return };
    let options = SamplerOptions::default().temperature(1.5).top_k(100).top_p(1.0).min_p(0.0).seed(9);
    let model = austen();
    let [by_top_k, by_logits] = [OutputKind::TopK, OutputKind::Logits].map(|head| {
        let mut session = session(&model, &gpu);
        let mut sampler = Sampler::new(options.clone(), model.hparams().vocab_size as usize).unwrap();
        let sequence = session.add_sequence();
        let mut said = vec![100];
        while said.len() < 30 {
            let tokens = &said[said.len() - 1..];
            session.step(&[Run::new(sequence, tokens)], head).unwrap();
            let token = match head {
                OutputKind::TopK => {
                    let (ids, logits) = session.top_k();
                    assert_eq!((ids.len(), logits.len()), (256, 256));
                    sampler.sample_of(ids, logits).unwrap()
                }
                _ => sampler.sample(session.logits()).unwrap(),
            };
            said.push(token);
        }
        said
    });
    assert_eq!(by_top_k, by_logits);
}

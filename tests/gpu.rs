//! The GPU backend against the reference and the CPU. Needs a device: see `tests/common/gpu.rs`.
#![cfg(feature = "gpu")]

#[path = "common/gpu.rs"]
mod common;

use std::sync::Arc;

use common::gpu;
use halite::Model;
use halite::backend::cpu::Cpu;
use halite::backend::gpu::{Gpu, GpuOptions};
use halite::backend::{Backend, Usage};
use halite::conformance::{Report, cases, check};
use halite::error::Error;
use halite::map::Source;
use halite::session::{Head, Run, Session, SessionOptions, Wanted};

/// Every path conforms: each switched off alone, and all together.
#[test]
fn conforms() {
    for without in [&[][..], &["integer"], &["subgroups"], &["integer", "subgroups"]] {
        let Some(backend) = gpu(without) else { return };
        let mut report = Report::default();
        let mut failures = Vec::new();
        for case in cases() {
            let outcome = check(&*backend, &case);
            report.add(&outcome);
            if !outcome.passed() {
                failures.push(format!("{}: {outcome}", case.name));
            }
        }
        assert!(failures.is_empty(), "without {without:?}:\n{}", failures.join("\n"));
        assert_eq!(report.passed, cases().len());
    }
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
    let cpu = Cpu::new(1).unwrap();
    let foreign = cpu.alloc(16, Usage::Io).unwrap();
    assert!(matches!(backend.read(&foreign, 0, &mut [0; 4]), Err(Error::Backend { .. })));
    let none = Gpu::new(&GpuOptions { adapter: Some("no such thing".into()), ..Default::default() });
    assert!(none.unwrap_err().to_string().contains("no such thing"));
    let path = Gpu::new(&GpuOptions { without: vec!["magic".into()], ..Default::default() });
    assert!(path.unwrap_err().to_string().contains("magic"));
    assert!(backend.alloc(16, Usage::Io).is_ok());
}

/// The built-in model says the same as on the CPU, token by token, through a prefill and single steps.
#[test]
fn same_tokens_as_the_cpu() {
    let Some(backend) = gpu(&[]) else { return };
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf");
    let model = Arc::new(Model::from_source(Source::open(file.as_ref()).unwrap()).unwrap());
    let generate = |backend: &Arc<dyn Backend>| {
        let options = SessionOptions { context: 256, ..Default::default() };
        let mut session = Session::new(&model, backend, &options, &mut |_| {}).unwrap();
        let sequence = session.add_sequence();
        let mut tokens: Vec<u32> = (100..180).collect();
        let mut said: Vec<u32> = Vec::new();
        for _ in 0..40 {
            session.step(&[Run { sequence, tokens: &tokens, wanted: Wanted::Last }], Head::ArgMax).unwrap();
            tokens = session.arg_max().to_vec();
            said.extend(&tokens);
        }
        said
    };
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::new(2).unwrap());
    assert_eq!(generate(&backend), generate(&cpu));
}

//! The numeric contract, as bits: logits do not depend on the instruction set, the number of threads, the batch, how a prompt
//! is cut into steps, who else is in a step, or on fusion; and they are the reference's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use halite::backend::cpu::{Cpu, Executor};
use halite::backend::reference::Reference;
use halite::backend::{Backend, Bindings, Cancel, Fusions, Limits, Rows, Span, Step, Usage};
use halite::gguf::TensorInfo;
use halite::kernels::formats::{Format, Layout};
use halite::kernels::isa::Cpu as Isa;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::passes;
use halite::program::{Builder, Dim, Gating, Index, Op, Program, State, WeightInfo};
use halite::session::{OutputKind, OutputTokens, Run, SequenceId, Session, SessionOptions};
use halite::weights::{Budget, Weights};
use halite::{Error, Model};

use halite_testing::golden;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Small models of several formats; more of them where the golden set lies beside the checkout.
fn models() -> Vec<Arc<Model>> {
    let mut paths: Vec<PathBuf> = [
        "llama-Q4_K_M",
        "llama-Q4_0",
        "llama-TQ1_0",
        "families/lfm2",
        "families/qwen35",
        "families/kimi-linear",
        "families/mamba",
        "families/deepseek2-v3",
    ]
    .map(|f| repository().join(format!("tests/data/golden/{f}.gguf")))
    .into();
    if let Some(golden) = golden::folder() {
        paths.extend(
            ["Q5_0", "Q6_K", "Q8_0", "F16", "MXFP4-raw", "IQ2_XS-raw"]
                .map(|f| golden.join(format!("quants/llama-{f}.gguf"))),
        );
        paths.extend(
            ["gemma3", "mixtral", "gpt2", "phi3-longrope", "gpt-oss", "cohere2"]
                .map(|f| golden.join(format!("families/{f}.gguf"))),
        );
    }
    paths.iter().map(|path| Arc::new(Model::open(path).unwrap())).collect()
}

/// Some tokens: enough to pass a page's end and a window of 16.
fn tokens(model: &Model) -> Vec<u32> {
    let vocab = model.hparams().vocab_size;
    (0..83u32).map(|i| (i * i * 7 + 3 * i + 1) % vocab).collect()
}

fn session(model: &Arc<Model>, backend: &Arc<dyn Backend>, taps: &[&str]) -> Session {
    session_in(Format::F16, model, backend, taps)
}

/// A session with its KV cache in a format.
fn session_in(kv_format: Format, model: &Arc<Model>, backend: &Arc<dyn Backend>, taps: &[&str]) -> Session {
    let options = SessionOptions::default()
        .program(ProgramOptions::default().kv_format(kv_format))
        .context(256)
        .batch(128)
        .outputs(128)
        .taps(taps.iter().map(|t| t.to_string()).collect());
    Session::new(model, backend, &options).unwrap()
}

/// The same model with its rows interleaved.
fn packed(model: &Model) -> Arc<Model> {
    let mut file = Vec::new();
    halite::pack::pack(model.gguf(), &mut file, &mut |_| {}).unwrap();
    Arc::new(Model::from_source(Source::from_bytes("packed", &file)).unwrap())
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Logits of every position, fed in steps of at most `chunk` tokens.
fn logits(model: &Arc<Model>, backend: &Arc<dyn Backend>, tokens: &[u32], chunk: usize) -> Vec<u32> {
    logits_in(Format::F16, model, backend, tokens, chunk)
}

/// [`logits`] with the KV cache in a format.
fn logits_in(
    kv_format: Format,
    model: &Arc<Model>,
    backend: &Arc<dyn Backend>,
    tokens: &[u32],
    chunk: usize,
) -> Vec<u32> {
    let mut session = session_in(kv_format, model, backend, &[]);
    let sequence = session.add_sequence();
    let mut out = Vec::new();
    for tokens in tokens.chunks(chunk) {
        session.step(&[Run::new(sequence, tokens).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
        out.extend(bits(session.logits()));
    }
    out
}

fn cpu(threads: usize, isa: &str) -> Arc<dyn Backend> {
    Arc::new(Cpu::with_isa(threads, isa).unwrap())
}

fn best() -> Arc<dyn Backend> {
    cpu(2, Isa::detect().name())
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for model in models() {
        let tokens = tokens(&model);
        let want = logits(&model, &best(), &tokens, 128);
        assert!(want.iter().all(|&b| f32::from_bits(b).is_finite()));
        for isa in Isa::NAMES.iter().filter(|isa| Isa::from_name(isa).is_some()) {
            let backend = cpu(1, isa);
            // Prefill and decode use different kernels: both are held to it.
            assert_eq!(
                logits(&model, &backend, &tokens, 128),
                want,
                "{} {isa}",
                model.gguf().path().display()
            );
            let head = &tokens[..5];
            assert_eq!(logits(&model, &backend, head, 1), want[..logits_of(&model, 5)], "{isa} decode");
        }
    }
}

/// How many logits the first `n` positions have.
fn logits_of(model: &Model, n: usize) -> usize {
    n * model.hparams().vocab_size as usize
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for model in models() {
        let tokens = tokens(&model);
        let want = logits(&model, &cpu(1, Isa::detect().name()), &tokens, 128);
        for threads in [2, 3, 7] {
            assert_eq!(
                logits(&model, &cpu(threads, Isa::detect().name()), &tokens, 128),
                want,
                "{threads} threads"
            );
        }
    }
}

/// Threads of the host, started for each op.
struct Scoped(usize);

impl Executor for Scoped {
    fn threads(&self) -> usize {
        self.0
    }

    fn broadcast(&self, work: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| (0..self.0).for_each(|i| drop(scope.spawn(move || work(i)))));
    }
}

#[test]
fn threads_of_the_host_give_the_same_bits() {
    let model = &models()[0];
    let tokens = &tokens(model)[..20];
    let want = logits(model, &best(), tokens, 16);
    for threads in [1, 3] {
        let backend: Arc<dyn Backend> = Arc::new(Cpu::with_executor(Arc::new(Scoped(threads))));
        assert_eq!(logits(model, &backend, tokens, 16), want, "{threads} threads");
    }
}

#[test]
fn prefill_and_decode_and_all_between_give_the_same_bits() {
    for model in models() {
        let tokens = tokens(&model);
        let want = logits(&model, &best(), &tokens, 128);
        for chunk in [1, 2, 5, 64] {
            assert_eq!(logits(&model, &best(), &tokens, chunk), want, "steps of {chunk}");
        }
    }
}

#[test]
fn packed_weights_give_the_same_bits() {
    for model in models() {
        let (tokens, packed) = (tokens(&model), packed(&model));
        let interleaved = |t: TensorInfo<'_>| t.record.layout == Layout::Interleaved;
        let can = |t: TensorInfo<'_>| t.record.format.interleaves() && t.record.dims.len() > 1;
        assert_eq!(packed.gguf().tensors().any(interleaved), model.gguf().tensors().any(can));
        let want = logits(&model, &best(), &tokens, 128);
        for isa in Isa::NAMES.iter().filter(|isa| Isa::from_name(isa).is_some()) {
            for chunk in [1, 128] {
                assert_eq!(logits(&packed, &cpu(3, isa), &tokens, chunk), want, "{isa}, steps of {chunk}");
            }
        }
        // A backend that reads plain rows only gets them.
        let reference: Arc<dyn Backend> = Arc::new(Reference::new());
        assert_eq!(
            logits(&packed, &reference, &tokens[..3], 128),
            logits(&model, &best(), &tokens[..3], 128)
        );
        // Packing what is packed changes nothing, and the way back is exact.
        let again = self::packed(&packed);
        for ((a, b), original) in
            packed.gguf().tensors().zip(again.gguf().tensors()).zip(model.gguf().tensors())
        {
            assert_eq!(a.region().unwrap().mapped().unwrap(), b.region().unwrap().mapped().unwrap());
            assert_eq!(a.rows().unwrap(), original.rows().unwrap());
        }
        assert_eq!(packed.gguf().metadata().len(), again.gguf().metadata().len());
    }
}

#[test]
fn strangers_in_a_step_change_nothing() {
    for model in models() {
        let tokens = tokens(&model);
        let want = logits(&model, &best(), &tokens, 128);
        let mut session = session(&model, &best(), &[]);
        let (ours, a, b) = (session.add_sequence(), session.add_sequence(), session.add_sequence());
        let strangers: Vec<u32> = tokens.iter().rev().copied().collect();
        let mut got = Vec::new();
        for (i, step) in tokens.chunks(9).enumerate() {
            let runs = [
                Run::new(a, &strangers[i..i + 1]),
                Run::new(ours, step).outputs(OutputTokens::All),
                Run::new(b, &strangers[..4 + i % 3]).outputs(OutputTokens::None),
            ];
            session.step(&runs, OutputKind::Logits).unwrap();
            got.extend(bits(&session.logits()[logits_of(&model, 1)..]));
        }
        assert_eq!(got, want);
    }
}

#[test]
fn the_cpu_gives_the_bits_of_the_reference() {
    for model in models() {
        let tokens = &tokens(&model)[..7];
        let reference: Arc<dyn Backend> = Arc::new(Reference::new());
        assert_eq!(logits(&model, &best(), tokens, 7), logits(&model, &reference, tokens, 7));
    }
}

#[test]
fn a_cache_of_any_format_gives_the_same_bits_and_stays_close_to_single_precision() {
    let model = Arc::new(Model::open(repository().join("models/austen/halite-austen.gguf")).unwrap());
    let tokens = tokens(&model);
    let reference: Arc<dyn Backend> = Arc::new(Reference::new());
    let exact = logits_in(Format::F32, &model, &best(), &tokens, 128);
    let formats = [(Format::F32, 0.0), (Format::F16, 1e-4), (Format::Q8_0, 3e-4), (Format::Q4_0, 1e-2)];
    for (format, bound) in formats {
        let want = logits_in(format, &model, &best(), &tokens, 128);
        for isa in Isa::NAMES.iter().filter(|isa| Isa::from_name(isa).is_some()) {
            for (threads, chunk) in [(1, 128), (1, 5), (3, 1), (3, 20)] {
                let got = logits_in(format, &model, &cpu(threads, isa), &tokens, chunk);
                assert_eq!(got, want, "{} {isa}, steps of {chunk}", format.name());
            }
        }
        let few = logits_in(format, &model, &reference, &tokens[..3], 3);
        assert_eq!(few, want[..few.len()], "{} on the reference", format.name());
        let (mut error, mut power) = (0.0, 0.0);
        for (a, b) in want.iter().zip(&exact) {
            let (a, b) = (f64::from(f32::from_bits(*a)), f64::from(f32::from_bits(*b)));
            error += (a - b).powi(2);
            power += b.powi(2);
        }
        let nmse = error / power;
        eprintln!("{}: {nmse:.2e} (bound {bound:.0e})", format.name());
        assert!(nmse <= bound, "{}: {nmse:.2e} > {bound:.0e}", format.name());
        // A cache that is not in the format would be too close.
        assert!(nmse >= bound / 1e3, "{}: {nmse:.2e}", format.name());
    }
}

#[test]
fn a_cache_of_codes_needs_whole_blocks() {
    for format in [Format::Q8_0, Format::Q4_0] {
        let lookup = |_: &str| None;
        let mut builder = Builder::new("odd heads", &lookup);
        builder.state(State::new("kv.0", 1, 80, 64, format));
        let error = builder.finish().and_then(|p| p.validate()).unwrap_err().to_string();
        assert!(error.contains("kv.0") && error.contains("blocks of 32") && error.contains("80"), "{error}");
    }
}

#[test]
fn parts_of_a_tensor_are_the_rows_that_they_name() {
    let plain = Model::open(repository().join("tests/data/golden/llama-Q4_0.gguf")).unwrap();
    let name = "blk.0.ffn_up.weight";
    for model in [packed(&plain), Arc::new(plain)] {
        let lookup = |name: &str| {
            let record = model.gguf().tensor(name)?.record;
            Some(WeightInfo::new(record.dims.clone(), record.format).layout(record.layout))
        };
        let info = lookup(name).unwrap();
        let (cols, rows) = (info.dims[0] as u32, info.dims[1] as u32);
        // Between groups of 16 rows, inside of them, and to the end.
        let ranges = [0..rows, 0..16, 16..64, 32..41, 41..70, rows - 32..rows, rows - 20..rows];
        let mut b = Builder::new("parts", &lookup);
        let table = b.weight("token_embd.weight", model.hparams().vocab_size, cols);
        let x = b.embed(table, Index::Token, 1.0);
        for range in ranges.clone() {
            let weight = b.weight_rows(name, rows, range, cols);
            let y = b.linear("y", x, weight, None);
            b.output(y);
        }
        let program = b.finish().unwrap();
        for (rows_as, backend) in [
            (Rows::Plain, Arc::new(Reference::new()) as Arc<dyn Backend>),
            (Rows::AsStored, best()),
            (Rows::Interleaved, best()),
        ] {
            let mut program = program.clone();
            passes::lay_out(&mut program, &backend.caps().clone().rows(rows_as));
            let out = run(&*backend, &model, program, &[1, 2, 3]);
            let whole: Vec<&[u8]> = out[0].chunks_exact(4 * rows as usize).collect();
            for (range, got) in ranges.iter().zip(&out) {
                let (start, end) = (4 * range.start as usize, 4 * range.end as usize);
                let want: Vec<u8> = whole.iter().flat_map(|y| y[start..end].to_vec()).collect();
                assert_eq!(*got, want, "{rows_as:?} {range:?}");
            }
        }
    }
}

#[test]
fn forks_and_truncation_give_the_same_bits() {
    let model = &models()[0];
    let tokens = tokens(model);
    let want = logits(model, &best(), &tokens, 128);
    let vocab = logits_of(model, 1);
    let mut session = session(model, &best(), &[]);
    let first = session.add_sequence();
    session.step(&[Run::new(first, &tokens[..70]).outputs(OutputTokens::None)], OutputKind::Logits).unwrap();
    let fork = session.fork(first).unwrap();
    // The first one goes elsewhere on the page that both share; the fork must not notice.
    session.step(&[Run::new(first, &[1, 2, 3]).outputs(OutputTokens::None)], OutputKind::Logits).unwrap();
    let rest = Run::new(fork, &tokens[70..]);
    session.step(&[rest], OutputKind::Logits).unwrap();
    assert_eq!(bits(session.logits()), want[want.len() - vocab..]);
    // Back to where they were the same, and on as the fork did.
    session.truncate(first, 70).unwrap();
    session.step(&[Run::new(first, rest.tokens)], OutputKind::Logits).unwrap();
    assert_eq!(bits(session.logits()), want[want.len() - vocab..]);
    session.step(&[Run::new(fork, &tokens[..1])], OutputKind::ArgMax).unwrap();
    let arg_max = session.arg_max()[0];
    session.truncate(fork, 83).unwrap();
    session.step(&[Run::new(fork, &tokens[..1])], OutputKind::Logits).unwrap();
    let best = session
        .logits()
        .iter()
        .enumerate()
        .fold((0, f32::MIN), |b, (i, &l)| if l > b.1 { (i, l) } else { b });
    assert_eq!(best.0 as u32, arg_max);
}

/// Runs a program's whole step and returns its outputs.
fn run(backend: &dyn Backend, model: &Model, program: Program, tokens: &[u32]) -> Vec<Vec<u8>> {
    let program = Arc::new(program);
    let n = tokens.len() as u32;
    let mut plan = backend.prepare(&program, Limits { tokens: n, outputs: n }).unwrap();
    let weights =
        Weights::load(model.gguf(), &program, backend, Budget::Copies(u64::MAX), &mut |_| {}).unwrap();
    let alloc = |bytes, usage| backend.alloc(bytes, usage).unwrap();
    let states: Vec<_> = program.states.iter().map(|s| alloc(2 * s.page_bytes(), Usage::State)).collect();
    let bytes = |t: &halite::program::Tensor| 4 * u64::from(n) * u64::from(t.cols);
    let io: Vec<_> = program.io.iter().map(|&id| alloc(bytes(program.tensor(id)), Usage::Io)).collect();
    let tables = vec![vec![1, 0]; program.windows.len()];
    let spans = [Span { tables: &tables, start: 0, len: n }];
    let outputs: Vec<u32> = (0..n).collect();
    let cancel = Cancel::default();
    let step = Step { spans: &spans, tokens, outputs: &outputs, cancel: &cancel };
    let bindings = Bindings { weights: &weights.buffers, states: &states, io: &io };
    let ticket = plan.submit(&step, 0..program.segments.len(), &bindings).unwrap();
    plan.wait(ticket).unwrap();
    io.iter()
        .map(|buffer| {
            let mut out = vec![0; buffer.bytes() as usize];
            backend.read(buffer, 0, &mut out).unwrap();
            out
        })
        .collect()
}

#[test]
fn fusion_never_changes_a_bit_and_can_be_undone() {
    for model in models() {
        let plain = model.program(ProgramOptions::default().kv_format(Format::F16), 256).unwrap();
        let fused = passes::fuse(&plain, Fusions::ALL);
        fused.validate().unwrap();
        let undone = passes::decompose(&fused);
        undone.validate().unwrap();
        let count = |p: &Program| p.ops().count();
        assert!(count(&fused) < count(&plain), "nothing was fused");
        assert_eq!(count(&undone), count(&plain));
        let again = passes::fuse(&undone, Fusions::ALL);
        assert_eq!(count(&again), count(&fused));
        let tokens = &tokens(&model)[..3];
        let want = run(&Reference::new(), &model, plain, tokens);
        assert_eq!(run(&Reference::new(), &model, fused, tokens), want);
        assert_eq!(run(&Reference::new(), &model, undone, tokens), want);
    }
}

#[test]
fn fusion_makes_the_forms_it_is_asked_for() {
    let model = &models()[0];
    let plain = model.program(ProgramOptions::default(), 256).unwrap();
    let ops = |fusions| {
        let fused = passes::fuse(&plain, fusions);
        fused.segments[1].ops.iter().map(|op| op.name()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        ops(Fusions::default()),
        "Norm MatMul MatMul MatMul Rope Rope KvWrite Attend MatMul Add Norm MatMul MatMul Glu MatMul Add"
    );
    assert_eq!(
        ops(Fusions::default().shared_input(true).add_norm(true)),
        "Norm MatMul Rope Rope KvWrite Attend MatMul Norm MatMul Glu MatMul Add"
    );
    assert_eq!(ops(Fusions::ALL), "Norm MatMul RopeKv Attend MatMul Norm MatMul MatMul");
}

#[test]
fn a_tap_reads_any_result_and_changes_none() {
    let model = &models()[0];
    let tokens = tokens(model);
    let want = logits(model, &best(), &tokens, 128);
    let names = ["blk.0.attn_norm", "blk.1.glu", "blk.1.attn_residual", "output.norm"];
    let mut tapped = session(model, &best(), &names);
    let sequence = tapped.add_sequence();
    tapped.step(&[Run::new(sequence, &tokens).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
    assert_eq!(bits(tapped.logits()), want);
    let width = model.hparams().embedding_length as usize;
    let norm = tapped.tap(0).unwrap();
    assert_eq!(norm.len(), tokens.len() * width);
    // A normalised row has a mean square of about one, times its weights.
    assert!(norm.iter().all(|x| x.is_finite()) && norm.iter().any(|x| *x != 0.0));
    let reference: Arc<dyn Backend> = Arc::new(Reference::new());
    let mut other = session(model, &reference, &names);
    let sequence = other.add_sequence();
    other.step(&[Run::new(sequence, &tokens[..3]).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
    for (tap, name) in names.iter().enumerate() {
        let (got, want) = (tapped.tap(tap).unwrap(), other.tap(tap).unwrap());
        assert_eq!(bits(&got[..want.len()]), bits(&want), "{name}");
    }
    let options = SessionOptions::default().taps(vec!["blk.9.nothing".into()]);
    assert!(matches!(Session::new(model, &best(), &options), Err(Error::Argument { .. })));
}

#[test]
fn steps_that_do_not_fit_are_errors_and_change_nothing() {
    let model = &models()[0];
    let vocab = model.hparams().vocab_size;
    let mut session = session(model, &best(), &[]);
    let sequence = session.add_sequence();
    let other = session.add_sequence();
    session.remove(other).unwrap();
    let many = vec![1; 129];
    fn run(sequence: SequenceId, tokens: &[u32]) -> Run<'_> {
        Run::new(sequence, tokens)
    }
    let beyond = [vocab];
    let cases: [&[Run<'_>]; 6] = [
        &[],
        &[run(sequence, &[])],
        &[run(sequence, &many)],
        &[run(sequence, &beyond)],
        &[run(other, &[1])],
        &[run(sequence, &[1]), run(sequence, &[1])],
    ];
    for runs in cases {
        assert!(matches!(session.step(runs, OutputKind::Logits), Err(Error::Argument { .. })), "{runs:?}");
    }
    for _ in 0..2 {
        session.step(&[run(sequence, &many[..128])], OutputKind::Logits).unwrap();
    }
    let error = session.step(&[run(sequence, &[1])], OutputKind::Logits).unwrap_err();
    assert!(matches!(error, Error::ContextFull { need: 257, have: 256 }), "{error}");
    assert_eq!(session.len(sequence).unwrap(), 256);
    session.truncate(sequence, 3).unwrap();
    let cancel = session.cancel_handle();
    cancel.cancel();
    assert!(matches!(session.step(&[run(sequence, &[1])], OutputKind::Logits), Err(Error::Cancelled)));
    assert_eq!(session.len(sequence).unwrap(), 3);
    cancel.reset();
    session.step(&[run(sequence, &[1])], OutputKind::Logits).unwrap();
    assert_eq!(session.len(sequence).unwrap(), 4);
}

#[test]
fn scratch_memory_is_shared_but_never_between_inputs_and_outputs() {
    for model in models() {
        let program = passes::fuse(&model.program(ProgramOptions::default(), 256).unwrap(), Fusions::ALL);
        let layout = passes::liveness(&program);
        assert!(layout.places.len() < 14, "{} places", layout.places.len());
        for (_, op) in program.ops() {
            let mut inputs = Vec::new();
            op.inputs(&mut |id| inputs.extend(layout.place[id.0 as usize]));
            op.outputs(&mut |id| {
                let place = layout.place[id.0 as usize];
                assert!(place.is_none_or(|p| !inputs.contains(&p)), "{}", op.name());
                let dim = program.tensor(id).rows;
                assert!(place.is_none_or(|p| layout.places[p].0 == dim && dim != Dim::Fixed(0)));
            });
            if let Op::Experts { x, out, .. } = op {
                assert_ne!(layout.place[x.0 as usize], layout.place[out.0 as usize]);
            }
        }
    }
}

#[test]
fn a_router_over_too_many_experts_is_an_error() {
    let none = |_: &str| None;
    let mut builder = Builder::new("router", &none);
    let logits = builder.input("logits", Dim::Tokens, 1025);
    builder.route(logits, 2, Gating::Softmax, true, 1.0);
    let error = builder.finish().unwrap_err();
    assert!(
        matches!(&error, Error::Program(message) if message.contains("1025 experts: at most 1024")),
        "{error}"
    );
}

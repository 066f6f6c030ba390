//! Two devices as one give the bits of one, wherever the border between them is.

use std::ops::Range;
use std::sync::Arc;

use halite::Result;
use halite::backend::cpu::Cpu;
use halite::backend::hybrid::Hybrid;
use halite::backend::reference::Reference;
use halite::backend::{Backend, Buffer, Caps, Gap, Limits, OpSig, Plan, Support, Usage};
use halite::conformance::{cases, check};
use halite::error::Error;
use halite::map::Region;
use halite::model::Model;
use halite::program::Program;
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};

/// The reference without some ops, and with memory that no other backend can use.
struct Only {
    reference: Reference,
    caps: Caps,
    ops: &'static [&'static str],
}

/// The memory of [`Only`].
struct Own(Buffer);

impl Only {
    fn new(ops: &'static [&'static str]) -> Only {
        let caps = Caps::new("only", "some ops").contract(halite::backend::Contract::Exact);
        Only { reference: Reference::new(), caps, ops }
    }

    fn own<'a>(&self, buffer: &'a Buffer) -> Result<&'a Buffer> {
        let wrong = || Error::argument("buffer", "one of this device", "another");
        Ok(&buffer.memory::<Own>().ok_or_else(wrong)?.0)
    }
}

/// A plan that unwraps buffers.
struct OnlyPlan(Box<dyn Plan>);

impl Plan for OnlyPlan {
    fn submit(
        &mut self,
        step: &halite::backend::Step<'_>,
        segments: Range<usize>,
        bindings: &halite::backend::Bindings<'_>,
    ) -> Result<halite::backend::Ticket> {
        let own = |buffers: &[Buffer]| -> Vec<Buffer> {
            buffers.iter().map(|b| b.memory::<Own>().expect("a buffer of this device").0.clone()).collect()
        };
        let (weights, states, io) = (own(bindings.weights), own(bindings.states), own(bindings.io));
        let bindings = halite::backend::Bindings { weights: &weights, states: &states, io: &io };
        self.0.submit(step, segments, &bindings)
    }

    fn wait(&mut self, ticket: halite::backend::Ticket) -> Result<halite::backend::Timing> {
        self.0.wait(ticket)
    }
}

impl Backend for Only {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        match self.ops.contains(&sig.op.name()) {
            true => Support::Native,
            false => Support::Unsupported(Gap::NotYet("one of the others".into())),
        }
    }

    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer> {
        Ok(Buffer::new(bytes, Own(self.reference.alloc(bytes, usage)?)))
    }

    fn import(&self, _: &Region) -> Result<Option<Buffer>> {
        Ok(None)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.reference.fill(self.own(dst)?, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.reference.read(self.own(src)?, offset, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        for (_, op) in program.ops() {
            assert!(self.ops.contains(&op.name()), "{} reached a device without it", op.name());
        }
        Ok(Box::new(OnlyPlan(self.reference.prepare(program, limits)?)))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        self.reference.scratch_bytes(program, limits)
    }
}

/// Sets of ops that cut programs in different places: none, products, writes to the cache apart from its reads.
const SETS: [&[&str]; 4] =
    [&[], &["MatMul"], &["KvWrite", "Rope", "Norm", "Unary"], &["Attend", "Add", "Route", "Gather"]];

/// One format of each op: the others take the same way.
fn chosen(case: &str) -> bool {
    let of = |op, format| case.starts_with(op) && !case.starts_with(&format!("{op} {format}"));
    !of("MatMul", "Q8_0") && !of("Attend", "F16 1/1") && !of("Embed", "F32") && !of("Experts", "Q4_0")
}

#[test]
fn every_case_has_the_bits_of_the_reference() {
    for set in SETS {
        let hybrid = Hybrid::new(Arc::new(Only::new(set)), Arc::new(Cpu::with_threads(1).unwrap()));
        for case in cases().iter().filter(|case| chosen(&case.name)) {
            let outcome = check(&hybrid, case);
            assert!(outcome.same_bits(), "{} with {set:?}: {outcome}", case.name);
        }
    }
}

/// Steps of two sequences, a page that both share and one of them writes, and taken-back positions.
#[test]
fn a_model_has_the_bits_of_one_device() {
    let model = Arc::new(Model::open("models/austen/halite-austen.gguf").unwrap());
    let logits = |backend: Arc<dyn Backend>| {
        let options = SessionOptions::default().context(256).batch(80).outputs(4);
        let mut session = Session::new(&model, &backend, &options).unwrap();
        let a = session.add_sequence();
        let prompt: Vec<u32> = (3..73).collect();
        session.prefill(a, &prompt, OutputKind::Logits).unwrap();
        let b = session.fork(a).unwrap();
        let runs = [Run::new(a, &[5, 6]), Run::new(b, &[9]).outputs(OutputTokens::All)];
        session.step(&runs, OutputKind::Logits).unwrap();
        let mut all = session.logits().to_vec();
        session.truncate(a, 40).unwrap();
        session.step(&[Run::new(a, &[7]), Run::new(b, &[8])], OutputKind::Logits).unwrap();
        all.extend(session.logits());
        all
    };
    let want = logits(Arc::new(Cpu::with_threads(1).unwrap()));
    for set in SETS {
        let hybrid = Hybrid::new(Arc::new(Only::new(set)), Arc::new(Cpu::with_threads(1).unwrap()));
        let got = logits(Arc::new(hybrid));
        assert!(want.iter().map(|x| x.to_bits()).eq(got.iter().map(|x| x.to_bits())), "{set:?}");
    }
}

#[test]
fn placement_names_each_op_its_gap_and_what_crosses() {
    let model = Model::open("models/austen/halite-austen.gguf").unwrap();
    let hybrid = Hybrid::new(Arc::new(Only::new(&["MatMul"])), Arc::new(Reference::new()));
    let program = model.program(Default::default(), 64).unwrap();
    let program = halite::passes::for_backend(&program, hybrid.caps());
    let placed = hybrid.placement(&program);
    assert_eq!(placed.len(), program.ops().count());
    for p in &placed {
        assert_eq!(p.device, if p.op == "MatMul" { "only" } else { "reference" });
        assert_eq!(p.gap.is_some(), p.op != "MatMul");
    }
    let norm = placed.iter().find(|p| p.op == "Norm").unwrap();
    // Only products read it.
    assert_eq!(norm.copied_bytes_per_token, 4 * u64::from(model.hparams().embedding_length));
    let attended = placed.iter().find(|p| p.op == "KvWrite").unwrap();
    assert_eq!(attended.copied_bytes_per_token, 0, "the cache is used on one device");
}

//! Conformance fails what it must fail: a wrong bit, memory that is not written, and a declared gap that is none.

use std::ops::Range;
use std::sync::Arc;

use halite::Result;
use halite::backend::cpu::Cpu;
use halite::backend::template::Template;
use halite::backend::{Backend, Buffer, Caps, Gap, Limits, OpSig, Plan, Support, Usage};
use halite::conformance::{Case, Failure, Outcome, cases, check};
use halite::map::Region;
use halite::program::Program;

/// The CPU with a fault.
struct Faulty {
    cpu: Cpu,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Declares additions a gap.
    DeclaredGap,
    /// Reads the lowest bit of a buffer wrong.
    FlippedBit,
    /// Reads memory behind what was written as if it was.
    LostGuard,
    /// Reads inputs as if a step had changed them.
    ChangedInput,
}

impl Backend for Faulty {
    fn caps(&self) -> &Caps {
        self.cpu.caps()
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        match sig.op.name() {
            "Add" if self.fault == Fault::DeclaredGap => {
                Support::Unsupported(Gap::NotYet("additions".into()))
            }
            _ => Support::Native,
        }
    }

    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer> {
        self.cpu.alloc(bytes, usage)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        self.cpu.import(region)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.cpu.fill(dst, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.cpu.read(src, offset, dst)?;
        // Outputs are read with the guard bytes behind them, inputs without.
        let output = dst.len() as u64 == src.bytes();
        match (self.fault, dst) {
            (Fault::FlippedBit, [first, ..]) if output => *first ^= 1,
            (Fault::LostGuard, [.., last]) if output => *last ^= 1,
            (Fault::ChangedInput, [first, ..]) if !output => *first ^= 1,
            _ => {}
        }
        Ok(())
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        self.cpu.prepare(program, limits)
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        self.cpu.scratch_bytes(program, limits)
    }
}

fn outcomes(fault: Fault, name: &str) -> Vec<Outcome> {
    let backend = Faulty { cpu: Cpu::with_threads(1).unwrap(), fault };
    let cases: Vec<Case> = cases().into_iter().filter(|case| case.name.starts_with(name)).collect();
    assert!(!cases.is_empty(), "no case `{name}`");
    cases.iter().map(|case| check(&backend, case)).collect()
}

#[test]
fn a_declared_gap_that_is_none_fails() {
    for outcome in outcomes(Fault::DeclaredGap, "Add ") {
        assert!(matches!(outcome, Outcome::UnexpectedPass(_)), "{outcome}");
        assert!(!outcome.passed());
    }
}

#[test]
fn a_real_gap_is_a_gap() {
    let gaps = cases().into_iter().take(20).map(|case| check(&Template::new(), &case));
    gaps.for_each(|outcome| assert!(matches!(outcome, Outcome::Gap(Gap::NotYet(_))), "{outcome}"));
}

#[test]
fn a_wrong_bit_is_named() {
    for outcome in outcomes(Fault::FlippedBit, "Norm Rms ") {
        let Outcome::Fail(why) = outcome else { panic!("{outcome}") };
        let why = why.to_string();
        assert!(why.starts_with("step 0, y[0, 0]: expected") && why.contains("1 ulp apart"), "{why}");
    }
}

#[test]
fn a_changed_input_is_named() {
    for outcome in outcomes(Fault::ChangedInput, "Norm Rms ") {
        let Outcome::Fail(why) = outcome else { panic!("{outcome}") };
        assert!(matches!(&why, Failure::InputChanged { step: 0, input } if input == "x"), "{why}");
    }
}

#[test]
fn memory_behind_an_output_is_watched() {
    for outcome in outcomes(Fault::LostGuard, "Norm Rms ") {
        let Outcome::Fail(why) = outcome else { panic!("{outcome}") };
        assert!(matches!(why, Failure::Overrun { step: 0, .. }), "{why}");
    }
}

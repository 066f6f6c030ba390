//! Conformance tests: small programs (op × format × shape) that run on a backend and on the reference.
//! Results must have the same bits if the backend guarantees them, and otherwise stay within an error bound.
//!
//! Output buffers are poisoned before every step and have guard bytes behind them. This detects elements that
//! a step does not write, and writes beyond the end.
//!
//! [`check_all`] runs every case on a backend, and [`conformance_tests!`](crate::conformance_tests) makes tests of
//! them. [`behaviour`] checks what single cases do not show: determinism, stale memory, cancellation, errors. A
//! [`Recording`] is a case with all its data, so it can be stored, shrunk and run again.

pub mod behaviour;
mod cases;
mod compare;
#[cfg(feature = "replay")]
mod file;
mod recording;

use std::fmt;
use std::sync::Arc;

pub(crate) use cases::PROBE_BOUND;
pub use cases::{cases, larger, op_bound, representative};
pub(crate) use compare::compare;
pub use compare::{Comparison, Mismatch};
pub use recording::{Output, Recording, SpanData, StepData, random_weight};
pub(crate) use recording::{PROBES, probe};

use crate::backend::reference::Reference;
use crate::backend::{Backend, Gap, OpSig, Support};
use crate::program::Program;

/// One program, its steps and the kind of its inputs.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name: op, format, shape, tokens.
    pub name: String,
    /// The program, or an error in the case itself, which then fails on every backend.
    program: Result<Arc<Program>, String>,
    /// For each step and each sequence: first position and tokens.
    steps: Vec<Vec<(u32, u32)>>,
    /// Bound of the normalised mean squared error of a backend that is not exact.
    bound: f64,
    inputs: Inputs,
}

/// The inputs of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Inputs {
    /// Random numbers of variance 1.
    Random,
    /// Rows of zeros with one element that is not zero, at the ends of the row, of blocks and in between. A product then is
    /// one element of each weight row, so an element that a kernel skips or mistakes shows in full.
    Probes,
}

impl Case {
    /// A case with random inputs. `steps` has for each step and each sequence the first position and the number of
    /// tokens. `bound` is that of the normalised mean squared error of a backend that is not exact.
    pub fn new(
        name: impl Into<String>,
        program: Arc<Program>,
        steps: Vec<Vec<(u32, u32)>>,
        bound: f64,
    ) -> Case {
        Case { name: name.into(), program: Ok(program), steps, bound, inputs: Inputs::Random }
    }

    /// The program.
    ///
    /// # Errors
    /// A fault of the case itself.
    pub fn program(&self) -> Result<&Arc<Program>, String> {
        match self.program.as_ref().map(|program| (program, program.validate())) {
            Ok((program, Ok(()))) => Ok(program),
            Ok((_, Err(fault))) => Err(fault.to_string()),
            Err(fault) => Err(fault.clone()),
        }
    }

    /// For each step and each sequence: first position and tokens.
    pub fn steps(&self) -> &[Vec<(u32, u32)>] {
        &self.steps
    }

    /// Bound of the normalised mean squared error of a backend that is not exact.
    pub fn bound(&self) -> f64 {
        self.bound
    }

    /// Describes the kernels that a backend runs for the case; see [`Backend::explain`].
    pub fn explain(&self, backend: &dyn Backend) -> String {
        let tokens = self.steps.iter().map(|s| s.iter().map(|&(_, n)| n).sum()).max().unwrap_or(1);
        let (Ok(program), None) = (&self.program, self.gap(backend)) else { return String::new() };
        let sig = |op| OpSig { program, op };
        let mut lines: Vec<_> = program.ops().map(|(_, op)| backend.explain(&sig(op), tokens)).collect();
        lines.dedup();
        lines.join(" | ")
    }

    /// Why a backend does not run the case; `None` if it does.
    pub fn gap(&self, backend: &dyn Backend) -> Option<Gap> {
        let program = self.program.as_ref().ok()?;
        gap(backend, program)
    }

    /// The case with all its data. Other seeds give other data.
    ///
    /// # Errors
    /// A fault of the case itself.
    pub fn record(&self, seed: u64) -> Result<Recording, String> {
        let name = self.name.bytes().fold(1, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Ok(Recording::random(self.program()?, &self.steps, self.bound, self.inputs, name ^ seed))
    }
}

fn gap(backend: &dyn Backend, program: &Program) -> Option<Gap> {
    program.ops().find_map(|(_, op)| match backend.supports(&OpSig { program, op }) {
        Support::Native => None,
        Support::Unsupported(gap) => Some(gap),
    })
}

/// The outcome of a case.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// The backend kept its contract.
    Pass(Comparison),
    /// It did not.
    Fail(Failure),
    /// The backend declares that it lacks the op.
    Gap(Gap),
    /// The backend declares a gap, but passes.
    UnexpectedPass(Gap),
}

/// Why a case failed.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Failure {
    /// The case is no valid program.
    Case(String),
    /// A call of the backend failed.
    Error(String),
    /// An element of an output was not written.
    NotWritten {
        /// The step, from 0.
        step: usize,
        /// The output.
        output: String,
        /// The first such element.
        index: usize,
    },
    /// Memory behind an output was written.
    Overrun {
        /// The step, from 0.
        step: usize,
        /// The output.
        output: String,
    },
    /// An input was overwritten.
    InputChanged {
        /// The step, from 0.
        step: usize,
        /// The input.
        input: String,
    },
    /// The results differ more than the contract allows.
    Different(Box<Comparison>),
}

impl Outcome {
    /// Whether the case passed.
    pub fn passed(&self) -> bool {
        matches!(self, Outcome::Pass(_))
    }

    /// Whether the case passed with the bits of the reference.
    pub fn same_bits(&self) -> bool {
        matches!(self, Outcome::Pass(comparison) if comparison.different == 0)
    }

    /// Whether the case failed: an unexpected pass counts as a failure.
    pub fn failed(&self) -> bool {
        matches!(self, Outcome::Fail(_) | Outcome::UnexpectedPass(_))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Case(why) => write!(f, "the case itself: {why}"),
            Failure::Error(why) => f.write_str(why),
            Failure::NotWritten { step, output, index } => {
                write!(f, "step {step}: `{output}`[{index}] was not written")
            }
            Failure::Overrun { step, output } => {
                write!(f, "step {step}: memory behind `{output}` was written")
            }
            Failure::InputChanged { step, input } => {
                write!(f, "step {step}: the input `{input}` was overwritten")
            }
            Failure::Different(comparison) => comparison.fmt(f),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Pass(c) if c.different == 0 => write!(f, "pass, same bits"),
            Outcome::Pass(c) => write!(f, "pass, error {:.1e}", c.nmse),
            Outcome::Fail(why) => write!(f, "FAIL {why}"),
            Outcome::Gap(Gap::Never(why)) => write!(f, "gap (never): {why}"),
            Outcome::Gap(Gap::NotYet(why)) => write!(f, "gap (not yet): {why}"),
            Outcome::UnexpectedPass(gap) => write!(f, "FAIL passes, but is declared as a gap ({gap})"),
        }
    }
}

/// Counts of outcomes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Passed cases.
    pub passed: usize,
    /// Failed cases, unexpected passes included.
    pub failed: usize,
    /// Declared gaps.
    pub gaps: usize,
}

impl Report {
    /// Counts an outcome.
    pub fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Pass(_) => self.passed += 1,
            Outcome::Gap(_) => self.gaps += 1,
            Outcome::Fail(_) | Outcome::UnexpectedPass(_) => self.failed += 1,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} declared gaps", self.passed, self.failed, self.gaps)
    }
}

/// Runs a case on a backend and on the reference.
pub fn check(backend: &dyn Backend, case: &Case) -> Outcome {
    match case.record(0) {
        Ok(recording) => check_recording(backend, &recording),
        Err(fault) => Outcome::Fail(Failure::Case(fault)),
    }
}

/// Runs a recording on a backend, and compares the results with those expected, or with the reference's.
pub fn check_recording(backend: &dyn Backend, recording: &Recording) -> Outcome {
    let gap = gap(backend, &recording.program);
    let want = match &recording.expected {
        Some(expected) => Ok(expected.clone()),
        None => {
            recording.run(&Reference::new()).map_err(|why| Failure::Error(format!("the reference: {why}")))
        }
    };
    let contract = backend.caps().contract;
    let outcome = match (recording.run(backend), want) {
        (Err(why), _) | (_, Err(why)) => Outcome::Fail(why),
        (Ok(got), Ok(want)) => match compare::compare(&got, &want, contract, recording.bound) {
            (comparison, true) => Outcome::Pass(comparison),
            (comparison, false) => Outcome::Fail(Failure::Different(Box::new(comparison))),
        },
    };
    match gap {
        None => outcome,
        // Declared gaps run too, to find those that should no longer be declared.
        Some(gap) if outcome.passed() => Outcome::UnexpectedPass(gap),
        Some(gap) => Outcome::Gap(gap),
    }
}

/// Runs every case on a backend, in order. Calls `done` with each outcome.
pub fn check_all(backend: &dyn Backend, mut done: impl FnMut(&Case, &Outcome)) -> Report {
    let mut report = Report::default();
    for case in cases() {
        let outcome = check(backend, &case);
        report.add(&outcome);
        done(&case, &outcome);
    }
    report
}

/// Checks the cases of one op, for [`conformance_tests!`](crate::conformance_tests).
///
/// # Errors
/// A line for each case that failed.
pub fn check_op(backend: &dyn Backend, op: &str) -> Result<Report, String> {
    let (mut report, mut failures) = (Report::default(), Vec::new());
    for case in cases().iter().filter(|case| case.name.split(' ').next() == Some(op)) {
        let outcome = check(backend, case);
        report.add(&outcome);
        if outcome.failed() {
            failures.push(format!("{}: {outcome}", case.name));
        }
    }
    if failures.is_empty() { Ok(report) } else { Err(failures.join("\n")) }
}

/// Makes a test for each op, which runs the conformance cases of the op on a backend. A declared gap is no failure.
///
/// ```
/// halite::conformance_tests!(halite::backend::cpu::Cpu::with_threads(1).unwrap());
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! conformance_tests {
    ($backend:expr) => {
        $crate::conformance_tests! { $backend;
            embed "Embed", gather "Gather", norm "Norm", matmul "MatMul", rope "Rope", rope_kv "RopeKv",
            attend "Attend", glu "Glu", add "Add", unary "Unary", route "Route", experts "Experts",
            arg_max "ArgMax", top_k "TopK"
        }
    };
    ($backend:expr; $($name:ident $op:literal),+) => {
        /// The conformance cases of each op.
        mod conformance_of {
            #[allow(unused_imports)]
            use super::*;
            $(
                #[test]
                fn $name() {
                    let backend = $backend;
                    if let Err(failures) = $crate::conformance::check_op(&backend, $op) {
                        panic!("{failures}");
                    }
                }
            )+
        }
    };
}

#[cfg(test)]
mod tests {
    use halite_kernels::formats::Format;

    use super::compare::compare;
    use super::*;
    use crate::backend::Contract;
    use crate::backend::template::Template;
    use crate::program::{Builder, Dim, NOT_FINITE};

    #[test]
    fn every_op_and_format_has_cases() {
        let cases = cases();
        for op in [
            "Embed",
            "Gather",
            "Norm",
            "MatMul",
            "Rope",
            "RopeKv",
            "Attend",
            "Glu",
            "Add",
            "Unary",
            "Route",
            "Experts",
            "ArgMax",
            "TopK",
            "Conv",
            "Recur",
            "Slice",
            "Mul",
            "Join",
            "BlockMatMul",
        ] {
            assert!(cases.iter().any(|c| c.name.starts_with(op)), "{op}");
        }
        for format in Format::ALL {
            let of_format =
                cases.iter().filter(|c| c.name.starts_with(&format!("MatMul {} ", format.name())));
            let packed = if format.interleaves() { 4 } else { 0 };
            assert!(of_format.count() >= 7 + packed, "{}", format.name());
        }
        let mut names: Vec<_> = cases.iter().map(|c| &c.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        assert!(cases.len() > 450, "{}", cases.len());
        assert!(cases.iter().all(|c| c.program.is_ok()), "some case is not a valid program");
    }

    /// A case that is no valid program fails, whatever the backend.
    #[test]
    fn a_mistake_in_a_case_is_a_failure() {
        let no_weights = |_: &str| None;
        let mut b = Builder::new("sums", &no_weights);
        let (x, y) = (b.input("x", Dim::Tokens, 3), b.input("y", Dim::Tokens, 3));
        let sum = b.add("sum", x, y);
        b.output(sum);
        let mut program = b.finish().unwrap();
        program.tensors[1].cols = 4;
        let case = Case::new("Add of other lengths", Arc::new(program), vec![vec![(0, 1)]], 0.0);
        for backend in [&Reference::new() as &dyn Backend, &Template::new()] {
            let outcome = check(backend, &case);
            assert!(matches!(&outcome, Outcome::Fail(Failure::Case(_))), "{outcome}");
        }
    }

    #[test]
    fn the_representative_cases_have_every_op_and_format() {
        let all = representative();
        assert!((80..200).contains(&all.len()), "{}", all.len());
        for case in cases() {
            let kind: Vec<&str> = case.name.split(' ').take(2).collect();
            let kind = kind.join(" ");
            assert!(all.iter().any(|c| c.name.starts_with(&kind)), "{kind}");
        }
        assert!(larger().iter().all(|case| case.program().is_ok()));
    }

    #[test]
    fn the_template_lists_every_op_as_a_gap() {
        let mut report = Report::default();
        cases().iter().for_each(|case| report.add(&check(&Template::new(), case)));
        assert_eq!((report.passed, report.failed, report.gaps), (0, 0, cases().len()));
    }

    /// Cases of what is not finite hold something to be seen, and are refused where it is lost.
    #[test]
    fn what_is_not_finite_comes_out() {
        let mut seen = 0;
        for case in cases()
            .iter()
            .filter(|c| c.name.contains(" of NaN") || c.name.contains("of infinities negative=false"))
        {
            let want = case.record(0).unwrap().run(&Reference::new()).unwrap();
            let of = |integers: bool, word: u32| match integers {
                true => word == NOT_FINITE as u32,
                false => f32::from_bits(word).is_nan(),
            };
            let mut got = want.clone();
            let Some(output) = got.iter_mut().find(|o| o.words.iter().any(|&w| of(o.integers, w))) else {
                panic!("{}: all finite", case.name);
            };
            let integers = output.integers;
            output.words.iter_mut().filter(|w| of(integers, **w)).for_each(|w| *w = 0);
            assert!(!compare(&got, &want, Contract::Close, 1.0).1, "{}", case.name);
            seen += 1;
        }
        assert!(seen > 25, "{seen}");
    }

    #[test]
    fn a_difference_of_one_bit_fails_an_exact_backend() {
        let one = |bits: u32| {
            let words = vec![1f32.to_bits(), bits];
            vec![Output { step: 0, name: "y".into(), integers: false, cols: 2, words }]
        };
        let (want, got) = (one(2f32.to_bits()), one(2f32.to_bits() + 1));
        assert!(compare(&want, &want, Contract::Exact, 0.0).1);
        let (comparison, same) = compare(&got, &want, Contract::Exact, 1.0);
        assert!(!same);
        assert_eq!(
            comparison.to_string(),
            "step 0, y[0, 1]: expected 2e0 (0x40000000), got 2.0000002e0 (0x40000001), 1 ulp apart; 1 of 2 elements \
             differ"
        );
        assert!(compare(&got, &want, Contract::Close, 1e-6).1);
        let (comparison, close) = compare(&one(4f32.to_bits()), &want, Contract::Close, 1e-6);
        assert!(!close);
        let text = comparison.to_string();
        assert!(text.contains("error 8.0e-1 > 1e-6") && text.contains("y[0, 1]: expected 2e0"), "{text}");
    }

    /// A product of a probe is an element of the weight, so a kernel that skips the last element of rows is far beyond the
    /// bound.
    #[test]
    fn probes_show_single_elements() {
        let cases: Vec<_> = cases().into_iter().filter(|case| case.name.contains("probes")).collect();
        assert!(cases.len() >= 2 * 30, "{}", cases.len());
        for case in cases {
            let want = case.record(0).unwrap().run(&Reference::new()).unwrap();
            let mut got = want.clone();
            let cols = got[0].cols;
            got[0].words[..cols].fill(0);
            assert!(!compare(&got, &want, Contract::Close, 100.0 * case.bound).1, "{}", case.name);
        }
    }
}

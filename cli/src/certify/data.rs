//! A certificate as data. `docs/certificate.schema.json` is generated from these structs.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use halite::backend::{Caps, Gap};
use halite::conformance::behaviour::Finding;
use halite::conformance::{Case, Comparison, Failure as Fault, Mismatch, Outcome};
use halite::kernels::formats::Format;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::machine::Machine;

/// Version of the format of certificates.
pub const VERSION: u32 = 1;

/// What a backend was checked for, and what was found.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Certificate {
    /// Version of this format: 1.
    pub version: u32,
    /// Version of Halite.
    pub halite: String,
    /// The day of the checks in UTC, as in 2026-08-31.
    pub date: String,
    /// How much was checked: smoke, full or soak.
    pub level: String,
    /// The backend.
    pub device: Device,
    /// The machine that ran the checks.
    pub machine: Machine,
    /// Time that the checks took.
    pub seconds: f64,
    /// Counts.
    pub summary: Summary,
    /// Every case.
    pub cases: Vec<CaseRow>,
    /// What single cases do not show.
    pub behaviours: Vec<BehaviourRow>,
    /// Whole models against the CPU, which has the bits of the reference.
    pub models: Vec<ModelRow>,
    /// Memory as the backend reports it, and as measured.
    pub memory: MemoryRow,
}

/// A backend's properties.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// Its name.
    pub backend: String,
    /// Its description.
    pub description: String,
    /// What it promises about results: exact, close or native.
    pub contract: String,
    /// Bytes of memory; null: without limit.
    pub memory_bytes: Option<u64>,
}

impl Device {
    pub fn of(caps: &Caps) -> Device {
        Device {
            backend: caps.name.clone(),
            description: caps.device.clone(),
            contract: caps.contract.name().into(),
            memory_bytes: (caps.memory_bytes != u64::MAX).then_some(caps.memory_bytes),
        }
    }
}

/// Counts of outcomes.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Cases that passed.
    pub passed: usize,
    /// Cases that failed.
    pub failed: usize,
    /// Cases that the backend declares as gaps.
    pub gaps: usize,
    /// Checks of behaviour that held.
    pub held: usize,
    /// Checks that did not hold, as the contract allows.
    pub allowed: usize,
    /// Checks that did not hold.
    pub broken: usize,
    /// Models that ran as expected.
    pub models_passed: usize,
    /// Models that did not.
    pub models_failed: usize,
}

impl Summary {
    pub fn of(cases: &[CaseRow], behaviours: &[BehaviourRow], models: &[ModelRow]) -> Summary {
        let outcome = |name: &str| cases.iter().filter(|row| row.outcome == name).count();
        let verdict = |name: &str| behaviours.iter().filter(|row| row.verdict == name).count();
        let of_models = |name: &str| models.iter().filter(|row| row.outcome == name).count();
        Summary {
            passed: outcome("pass"),
            failed: outcome("fail") + outcome("unexpected pass"),
            gaps: outcome("gap"),
            held: verdict("held"),
            allowed: verdict("allowed"),
            broken: verdict("broken"),
            models_passed: of_models("pass"),
            models_failed: of_models("fail"),
        }
    }

    /// Whether anything is wrong. Gaps are not wrong.
    pub fn broken(&self) -> bool {
        self.failed + self.broken + self.models_failed > 0
    }
}

/// A case and its outcome.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct CaseRow {
    /// Op, format, shape, tokens.
    pub name: String,
    /// The op.
    pub op: String,
    /// The format of weights or of the cache, if the case is about one.
    pub format: Option<String>,
    /// pass, fail, gap, or unexpected pass (of a declared gap).
    pub outcome: String,
    /// Why it failed, or why there is a gap.
    pub reason: Option<String>,
    /// The kernel that ran, as the backend describes it.
    pub kernel: String,
    /// Time of the case on the backend and on the reference.
    pub seconds: f64,
    /// How far the results are from those of the reference, if there are results.
    pub difference: Option<Difference>,
}

/// How far results are from those expected.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// Elements of all outputs.
    pub elements: usize,
    /// Elements that do not have the expected bits.
    pub different: usize,
    /// Normalised mean squared error; null if it is not finite.
    pub nmse: Option<f64>,
    /// The largest allowed one; null: bits must be the same.
    pub bound: Option<f64>,
    /// Elements by their error relative to the root mean square of the expected values: at least 1, at least 0.1, and so on;
    /// the last number counts the rest.
    pub histogram: Vec<usize>,
    /// The worst elements.
    pub worst: Vec<Element>,
}

/// An element with its neighbours in the row.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Element {
    /// The step, from 0.
    pub step: usize,
    /// The output's name.
    pub output: String,
    /// The row.
    pub row: usize,
    /// The element in the row.
    pub column: usize,
    /// Expected value, as text, because it may not be finite.
    pub expected: String,
    /// Value found.
    pub got: String,
    /// Expected bits, in hexadecimal.
    pub expected_bits: String,
    /// Bits found.
    pub got_bits: String,
    /// Representable numbers apart.
    pub ulps: u64,
    /// Columns around it: number, expected value, value found.
    pub neighbours: Vec<(usize, String, String)>,
}

fn number(integers: bool, word: u32) -> String {
    if integers { (word as i32).to_string() } else { f32::from_bits(word).to_string() }
}

impl Element {
    fn of(m: &Mismatch) -> Element {
        let value = |word| number(m.integers, word);
        Element {
            step: m.step,
            output: m.output.clone(),
            row: m.row,
            column: m.column,
            expected: value(m.expected),
            got: value(m.got),
            expected_bits: format!("{:#010x}", m.expected),
            got_bits: format!("{:#010x}", m.got),
            ulps: m.ulps,
            neighbours: m.neighbours.iter().map(|&(at, want, got)| (at, value(want), value(got))).collect(),
        }
    }
}

impl Difference {
    fn of(c: &Comparison) -> Difference {
        Difference {
            elements: c.elements,
            different: c.different,
            nmse: c.nmse.is_finite().then_some(c.nmse),
            bound: c.bound,
            histogram: c.histogram.to_vec(),
            worst: c.worst.iter().map(Element::of).collect(),
        }
    }
}

impl CaseRow {
    pub fn of(case: &Case, outcome: &Outcome, kernel: String, time: Duration) -> CaseRow {
        let (name, reason, difference) = match outcome {
            Outcome::Pass(comparison) => ("pass", None, Some(Difference::of(comparison))),
            Outcome::Gap(gap) => ("gap", Some(reason(gap)), None),
            Outcome::UnexpectedPass(gap) => ("unexpected pass", Some(reason(gap)), None),
            Outcome::Fail(fault) => {
                let difference = match fault {
                    Fault::Different(comparison) => Some(Difference::of(comparison)),
                    _ => None,
                };
                ("fail", Some(fault.to_string()), difference)
            }
            _ => ("fail", Some("an unknown outcome".into()), None),
        };
        let mut words = case.name.split(' ');
        let op = words.next().unwrap_or_default().to_owned();
        let format = words.next().filter(|word| Format::from_name(word).is_some()).map(str::to_owned);
        CaseRow {
            name: case.name.clone(),
            op,
            format,
            outcome: name.into(),
            reason,
            kernel,
            seconds: time.as_secs_f64(),
            difference,
        }
    }
}

fn reason(gap: &Gap) -> String {
    gap.to_string()
}

/// A check of behaviour.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct BehaviourRow {
    /// What was checked.
    pub behaviour: String,
    /// With which case or call.
    pub with: String,
    /// held, allowed (not held, as the contract allows) or broken.
    pub verdict: String,
    /// Numbers or the error. May be empty.
    pub detail: String,
}

impl BehaviourRow {
    pub fn of(finding: &Finding) -> BehaviourRow {
        BehaviourRow {
            behaviour: finding.behaviour.into(),
            with: finding.with.clone(),
            verdict: finding.verdict.name().into(),
            detail: finding.detail.clone(),
        }
    }
}

/// A model end to end.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ModelRow {
    /// The model's name.
    pub name: String,
    /// pass, fail, or gap.
    pub outcome: String,
    /// Why it failed, or what is missing.
    pub reason: Option<String>,
    /// Tokens of the prompt and generated tokens.
    pub tokens: Option<(usize, usize)>,
    /// Generated tokens that are equal, from the first on.
    pub same_tokens: Option<usize>,
    /// Normalised mean squared error of the logits of all tokens, given the same tokens.
    pub nmse: Option<f64>,
    /// The largest allowed one; null: bits must be the same.
    pub bound: Option<f64>,
}

/// Memory of a plan.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct MemoryRow {
    /// Bytes that the backend reports for the plan of the built-in model with steps of 512 tokens.
    pub reported_bytes: Option<u64>,
    /// Bytes by which this process grew when the plan was prepared and ran; null if unknown. A device's own memory does not
    /// show here.
    pub grown_bytes: Option<u64>,
}

impl Certificate {
    /// Reads a certificate.
    pub fn read(path: &Path) -> Result<Certificate, Failure> {
        let text = crate::read_text(path)?;
        let read: Result<Certificate, _> = serde_json::from_str(&text);
        let read = read.map_err(|e| format!("{}: not a certificate: {e}", path.display()))?;
        match read.version {
            VERSION => Ok(read),
            other => {
                Err(format!("{}: a certificate of version {other}, expected {VERSION}", path.display())
                    .into())
            }
        }
    }

    /// What passed in an older certificate and does not pass in this one. What was not checked this time is no
    /// regression.
    pub fn regressions(&self, old: &Certificate) -> Vec<String> {
        let mut found = Vec::new();
        let cases: HashMap<&str, &CaseRow> = self.cases.iter().map(|row| (&row.name[..], row)).collect();
        for row in old.cases.iter().filter(|row| row.outcome == "pass") {
            let Some(now) = cases.get(&row.name[..]) else { continue };
            if now.outcome != "pass" {
                let reason = now.reason.as_deref().unwrap_or("");
                found.push(format!("{}: passed, now {}: {reason}", row.name, now.outcome));
            }
        }
        let behaviours: HashMap<_, _> =
            self.behaviours.iter().map(|row| ((&row.behaviour[..], &row.with[..]), row)).collect();
        for row in old.behaviours.iter().filter(|row| row.verdict == "held") {
            let Some(now) = behaviours.get(&(&row.behaviour[..], &row.with[..])) else { continue };
            if now.verdict != "held" {
                found.push(format!(
                    "{}, {}: held, now {}: {}",
                    row.behaviour, row.with, now.verdict, now.detail
                ));
            }
        }
        for row in old.models.iter().filter(|row| row.outcome == "pass") {
            let Some(now) = self.models.iter().find(|now| now.name == row.name) else { continue };
            if now.outcome != "pass" {
                let reason = now.reason.as_deref().unwrap_or("");
                found.push(format!("{}: passed, now {}: {reason}", row.name, now.outcome));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halite::backend::cpu::Cpu;
    use halite::backend::template::Template;
    use halite::conformance::{check, representative};

    fn certificate(rows: Vec<CaseRow>) -> Certificate {
        Certificate {
            version: VERSION,
            halite: String::new(),
            date: String::new(),
            level: "smoke".into(),
            device: Device::of(halite::Backend::caps(&Template::new())),
            machine: crate::machine::machine(),
            seconds: 0.0,
            summary: Summary::of(&rows, &[], &[]),
            cases: rows,
            behaviours: Vec::new(),
            models: Vec::new(),
            memory: MemoryRow::default(),
        }
    }

    #[test]
    fn a_gap_that_came_back_is_a_regression() {
        let case = &representative()[0];
        let row = |outcome| CaseRow::of(case, &outcome, String::new(), Duration::ZERO);
        let good = certificate(vec![row(check(&Cpu::with_threads(1).unwrap(), case))]);
        let bad = certificate(vec![row(check(&Template::new(), case))]);
        assert!(good.regressions(&good).is_empty() && good.regressions(&bad).is_empty());
        let found = bad.regressions(&good);
        assert!(found.len() == 1 && found[0].contains(": passed, now gap: not yet"), "{found:?}");
        assert!(certificate(Vec::new()).regressions(&good).is_empty(), "not checked is no regression");
        let text = serde_json::to_string(&good).unwrap();
        let read: Certificate = serde_json::from_str(&text).unwrap();
        assert!(read.regressions(&good).is_empty() && read.summary.passed == 1);
    }

    #[test]
    fn the_schema_is_that_of_the_structs() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/certificate.schema.json");
        let committed: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap_or_default()).unwrap_or_default();
        let schema = schemars::schema_for!(Certificate);
        assert!(
            *schema.as_value() == committed,
            "run `halite certify --schema > docs/certificate.schema.json`"
        );
    }
}

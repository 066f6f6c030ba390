//! Conformance of a backend with the reference.

use halite::backend::Cancel;
use halite::conformance::{self, Outcome as Checked};
use pyo3::prelude::*;

use crate::backend::BackendArgument;
use crate::error::{Failure, Kind};
use crate::work::work;

/// The outcome of a case.
#[pyclass(module = "halite", frozen, get_all)]
pub struct Outcome {
    /// The case: op, format, shape, tokens.
    case: String,
    /// "pass", "fail" or "gap": the backend declares that it lacks the op.
    result: &'static str,
    /// Whether the results are those of the reference, bit for bit.
    same_bits: bool,
    /// What happened, for people.
    detail: String,
}

#[pymethods]
impl Outcome {
    fn __repr__(&self) -> String {
        format!("Outcome(case={:?}, detail={:?})", self.case, self.detail)
    }
}

/// Compares a backend with the reference over all cases, or those whose name contains `filter`.
#[pyfunction]
#[pyo3(
    signature = (backend = BackendArgument::Name("cpu".into()), *, filter = ""),
    text_signature = "(backend='cpu', *, filter='')"
)]
pub fn conform(py: Python<'_>, backend: BackendArgument<'_>, filter: &str) -> PyResult<Vec<Outcome>> {
    let backend = backend.open(py)?;
    let cancel = Cancel::default();
    work(py, Some(&cancel), || {
        let mut outcomes = Vec::new();
        for case in conformance::cases().into_iter().filter(|case| case.name.contains(filter)) {
            if cancel.is_cancelled() {
                return Err(Failure::new(Kind::Cancelled, "cancelled"));
            }
            let outcome = conformance::check(&*backend, &case);
            outcomes.push(Outcome {
                result: match &outcome {
                    Checked::Gap(_) => "gap",
                    outcome if outcome.passed() => "pass",
                    _ => "fail",
                },
                same_bits: outcome.same_bits(),
                detail: outcome.to_string(),
                case: case.name,
            });
        }
        Ok(outcomes)
    })
}

//! Estimates of chips.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::shard::Sums;
use halite::synth::{self, Formats, Synth};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::Profile;
use halite_sim::estimate::system::Layout;
use halite_sim::estimate::workload::{self, Choices, Workload};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{Failure, Fallible};
use crate::model::Model;
use crate::work::work;

/// A model, or a name of a known shape or the path of a file.
#[derive(FromPyObject)]
pub enum ModelArgument<'py> {
    Open(Bound<'py, Model>),
    Path(PathBuf),
}

impl ModelArgument<'_> {
    /// Opens it; a shape has no weights.
    fn open(self, format: &str) -> Fallible<Arc<halite::Model>> {
        let path = match self {
            ModelArgument::Open(model) => return Ok(model.get().model.clone()),
            ModelArgument::Path(path) => path,
        };
        let Some(shape) = path.to_str().and_then(synth::shape) else {
            return Ok(Arc::new(halite::Model::open(path)?));
        };
        let unknown =
            || Failure::argument("format", "a weight format, as in q4_0", halite::error::escaped(format));
        let format = Format::from_name(&format.to_uppercase()).ok_or_else(unknown)?;
        Ok(Arc::new(Synth::new(shape, Formats::of(format), 0)?.model()?))
    }
}

/// Predicts time, energy and cost of serving a model on a chip, from shapes alone. `profile` is the name of a
/// profile or the path of one; `model` is a model, a path, or a known shape such as "llama-3-8b", whose
/// weights are of `format`.
#[pyfunction]
#[pyo3(signature = (
    profile, model, *, batch = 1, prompt = 512, generate = 128, chunk = 512, format = "q4_0", products = None,
    activations = "fp32", chips = None, tp = None, ep = None, cp = None, pp = None, dp = None, sums = "divided", stored = None,
    overlap = false, kv_stored = None, sparse = false
))]
#[allow(clippy::too_many_arguments, reason = "they are keywords")]
pub fn estimate<'py>(
    py: Python<'py>,
    profile: &str,
    model: ModelArgument<'py>,
    batch: u32,
    prompt: u32,
    generate: u32,
    chunk: u32,
    format: &str,
    products: Option<&str>,
    activations: &str,
    chips: Option<u32>,
    tp: Option<u32>,
    ep: Option<u32>,
    cp: Option<u32>,
    pp: Option<u32>,
    dp: Option<u32>,
    sums: &str,
    stored: Option<&str>,
    overlap: bool,
    kv_stored: Option<&str>,
    sparse: bool,
) -> PyResult<Bound<'py, PyDict>> {
    for (name, value) in [("batch", batch), ("prompt", prompt), ("generate", generate), ("chunk", chunk)] {
        if value == 0 || value > 1_000_000 {
            return Err(Failure::argument(name, "1 to 1000000", value).into());
        }
    }
    for (name, value) in [("chips", chips), ("tp", tp), ("ep", ep), ("cp", cp), ("pp", pp), ("dp", dp)] {
        if let Some(value) = value.filter(|n| !(1..=65_536).contains(n)) {
            return Err(Failure::argument(name, "1 to 65536", value).into());
        }
    }
    let sums = match sums {
        "divided" => Sums::Divided,
        "in-order" => Sums::InOrder,
        other => return Err(Failure::argument("sums", "divided or in-order", other).into()),
    };
    let layout = Layout::asked(chips, [tp, ep, cp, pp, dp], sums).overlap(overlap);
    let model = model.open(format)?;
    let (profile, e) = work(py, None, || {
        let workload = Workload::default().batch(batch).prompt(prompt).generate(generate).chunk(chunk);
        let positions = workload.positions(model.hparams().context_length)?;
        let program = model.program(ProgramOptions::default(), positions)?;
        let products = products.map(Dtype::named).transpose()?;
        let choices = Choices::default().products(products).activations(Dtype::named(activations)?);
        let stored = stored.map(Dtype::named).transpose()?;
        let cache = kv_stored.map(Dtype::named).transpose()?;
        let choices = choices.layout(layout).stored(stored).cache(cache).sparse(sparse);
        let profile = Profile::open(profile)?;
        let (estimate, _) =
            workload::estimate_best(&profile, choices, &program, &workload, chips, Default::default())?;
        Ok((profile.name, estimate))
    })?;
    let dict = PyDict::new(py);
    dict.set_item("profile", profile)?;
    dict.set_item("first_token_s", e.first_token_s)?;
    dict.set_item("step_s", e.step_s)?;
    dict.set_item("step_interval_s", e.step_interval_s.map(|[low, high]| (low, high)))?;
    let l = e.layout;
    let layout = PyDict::new(py);
    for (name, number) in l.ways() {
        layout.set_item(name, number)?;
    }
    dict.set_item("chips", l.chips())?;
    dict.set_item("layout", layout)?;
    dict.set_item("exchange_fraction", e.exchange_fraction)?;
    dict.set_item("repeated", &e.repeated)?;
    dict.set_item("seconds", e.seconds)?;
    dict.set_item("tokens_per_s", e.tokens_per_s)?;
    dict.set_item("joules_per_token", e.joules_per_token.map(|joules| joules.total()))?;
    let by = e.joules_per_token.map(|joules| joules.named().into_iter().collect::<BTreeMap<_, _>>());
    dict.set_item("joules_per_token_by", by)?;
    dict.set_item("usd_per_million_tokens", e.usd_per_million_tokens)?;
    dict.set_item("need_bytes", e.need_bytes)?;
    dict.set_item("have_bytes", e.have_bytes)?;
    dict.set_item("fits", e.fits())?;
    dict.set_item("error", e.error)?;
    dict.set_item("unmeasured", &e.unmeasured)?;
    let (busy, rests_on, sensitivities) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
    e.shares.iter().try_for_each(|(bound, share)| busy.set_item(bound.name(), share))?;
    e.rests_on().iter().try_for_each(|(basis, share)| rests_on.set_item(basis.name(), share))?;
    e.sensitivities.iter().try_for_each(|s| sensitivities.set_item(&s.path, s.exponent))?;
    dict.set_item("busy", busy)?;
    dict.set_item("rests_on", rests_on)?;
    dict.set_item("sensitivities", sensitivities)?;
    Ok(dict)
}

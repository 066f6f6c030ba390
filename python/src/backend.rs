//! Backends by name.

use std::sync::Arc;

use halite::Backend;
use halite::backend::Contract;
use halite::backend::driver::{self, Driver, Options};
use halite::backend::hybrid::Hybrid;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};

use crate::error::{Failure, Fallible, named};
use crate::work::work;

/// All backends of this build.
const DRIVERS: &[Driver] = &[
    halite::backend::cpu::DRIVER,
    halite::backend::reference::DRIVER,
    #[cfg(feature = "gpu")]
    halite_gpu::DRIVER,
    #[cfg(feature = "plugin")]
    halite_plugin::DRIVER,
    #[cfg(feature = "sim")]
    halite_sim::DRIVER,
];

/// A device that runs models, opened by its name, as in "cpu", "cpu:threads=2", "sim:maia-100" and
/// "plugin:FILE". Options are keywords, with underscores for dashes. What the device lacks runs on the one
/// named by `fill_gaps`.
#[pyclass(name = "Backend", module = "halite", frozen)]
pub struct OpenBackend(pub Arc<dyn Backend>);

/// A backend or its name.
#[derive(FromPyObject)]
pub enum BackendArgument<'py> {
    Name(String),
    Open(Bound<'py, OpenBackend>),
}

impl BackendArgument<'_> {
    /// Opens it.
    pub fn open(self, py: Python<'_>) -> PyResult<Arc<dyn Backend>> {
        match self {
            BackendArgument::Open(backend) => Ok(backend.get().0.clone()),
            BackendArgument::Name(name) => work(py, None, || open_named(&name, Options::default())),
        }
    }
}

/// Opens a backend by name. The options of a driver without an argument may follow its name.
fn open_named(name: &str, mut options: Options) -> Fallible<Arc<dyn Backend>> {
    let (name, in_name) = driver::split_options(DRIVERS, name);
    options.set_list(in_name);
    Ok(driver::open(DRIVERS, name, &options)?)
}

#[pymethods]
impl OpenBackend {
    #[new]
    #[pyo3(signature = (name = "cpu", *, fill_gaps = None, **options))]
    fn new(
        py: Python<'_>,
        name: &str,
        fill_gaps: Option<&str>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<OpenBackend> {
        let mut given = Options::default();
        for (key, value) in options.into_iter().flatten() {
            let key = key.extract::<String>()?.replace('_', "-");
            match value.cast::<PyBool>() {
                Ok(flag) if flag.is_true() => given.set(&key, ""),
                Ok(_) => {}
                Err(_) => given.set(&key, value.str()?.extract::<String>().map_err(|e| named(py, &key, e))?),
            }
        }
        let open = || {
            let first = open_named(name, given)?;
            let Some(second) = fill_gaps else { return Ok(first) };
            let both = Hybrid::new(first, open_named(second, Options::default())?);
            Ok(Arc::new(both) as Arc<dyn Backend>)
        };
        work(py, None, open).map(OpenBackend)
    }

    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        &self.0.caps().name
    }

    /// Its device, for people.
    #[getter]
    fn device(&self) -> &str {
        &self.0.caps().device
    }

    /// What it promises about results: "exact", the same bits as the reference, or less.
    #[getter]
    fn contract(&self) -> &'static str {
        self.0.caps().contract.name()
    }

    /// Bytes of memory for weights and caches; None: no limit.
    #[getter]
    fn memory_bytes(&self) -> Option<u64> {
        Some(self.0.caps().memory_bytes).filter(|&bytes| bytes != u64::MAX)
    }

    fn __repr__(&self) -> String {
        format!("Backend({:?}, device={:?})", self.name(), self.device())
    }
}

/// A device of this machine that a backend can open.
#[pyclass(module = "halite", frozen, get_all)]
pub struct Device {
    /// The name that opens it.
    name: String,
    /// Its description, for people.
    device: String,
    /// Bytes of its memory, if they are known and limited.
    memory_bytes: Option<u64>,
    /// What it promises about results, if that does not depend on options.
    contract: Option<&'static str>,
    /// More facts, for people.
    facts: Vec<(String, String)>,
}

#[pymethods]
impl Device {
    fn __repr__(&self) -> String {
        format!("Device(name={:?}, device={:?})", self.name, self.device)
    }
}

/// Lists the devices of this machine that this build can open, simulated chips included.
#[pyfunction]
pub fn devices(py: Python<'_>) -> PyResult<Vec<Device>> {
    work(py, None, || {
        let mut all = Vec::new();
        for driver in DRIVERS {
            all.extend((driver.list)()?.into_iter().map(|listed| Device {
                name: listed.name,
                device: listed.device,
                memory_bytes: listed.memory_bytes.filter(|&bytes| bytes != u64::MAX),
                contract: listed.contract.map(Contract::name),
                facts: listed.facts,
            }));
        }
        Ok::<_, Failure>(all)
    })
}

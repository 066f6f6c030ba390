//! Custom accelerators, simulated from their profiles. `lower` turns ops into commands for the chip's tiles.
//! `execute` runs the commands for their results, through scratchpads of the chip's size. `engine` runs them
//! as events, for their time.
//!
//! With [`Numerics::Exact`], results are the bits of the numeric contract; with [`Numerics::Native`],
//! products use the chip's formats. [`estimate`] predicts times from a profile without running anything.
#![deny(unsafe_code)]

mod chip;
mod engine;
pub mod estimate;
mod execute;
pub mod faults;
mod kernels;
mod lower;
mod machine;
pub mod matrix;
mod measured;
mod native;
mod norm;
mod places;
mod shape;
pub mod step;
mod tile;
mod unused;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use halite_kernels::isa::Cpu as Isa;

use estimate::collective::Fabric;
use faults::Injector;
use halite::backend::driver::{Argument, Driver, DriverOption, Listed, Value};
use halite::backend::host::{self, HostPlan, memory};
use halite::backend::sharded::Sharded;
use halite::backend::{
    Backend, Buffer, Caps, Contract, Fusions, Gap, Limits, OpSig, Plan, Step as ProgramStep, Support, Usage,
};
use halite::error::{Error, Result};
use halite::map::Region;
use halite::program::{Op, Program};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{self, Profile, SHIPPED};
use kernels::SimKernels;

pub use chip::{Chip, Numerics};
pub use engine::{Bound, Busy, Joules, OpTime};
pub use execute::Order;
pub use faults::{Fault, FaultCount, Faults};
pub use places::{Amounts, Data};
pub use tile::Queue;

/// The driver: `sim:NAME` for a shipped profile, or `sim:FILE`.
pub const DRIVER: Driver = Driver::new("sim", |profile, options| {
    let numerics = match options.text("numerics")? {
        None | Some("exact") => Numerics::Exact,
        Some("native") => Numerics::Native,
        Some(other) => return Err(Error::argument("numerics", "exact or native", format!("`{other}`"))),
    };
    let products = options.text("products")?.map(Dtype::named).transpose()?;
    let inject = options.text("inject")?.map_or(Ok(Vec::new()), Fault::list)?;
    let sim = SimOptions::default().numerics(numerics).products(products).inject(inject);
    let profile = Profile::open(profile)?;
    match options.number("chips")?.unwrap_or(1) {
        1 => Ok(Arc::new(Sim::new(profile, &sim)?)),
        chips @ 2..=MOST_CHIPS => Ok(Arc::new(system(&profile, &sim, chips as u32)?)),
        other => Err(Error::argument("chips", format!("1 to {MOST_CHIPS}"), other)),
    }
})
.argument(Some(Argument::required("PROFILE").is_file(true)))
.help("a simulated chip, one of `halite profile` or a TOML file")
.options(&[
    DriverOption::new(
        "numerics",
        Value::OneOf("MODE", &["exact", "native"]),
        "Numerics of a simulated chip: `exact` follows the numeric contract, `native` uses the chip's formats",
    ),
    DriverOption::new(
        "products",
        Value::Text("FORMAT"),
        "Number format of the simulated chip's products [default: nearest to each weight's format]",
    ),
    DriverOption::new(
        "chips",
        Value::Number("N"),
        "Number of simulated chips that share each layer, with the bits of one [default: 1]",
    ),
    DriverOption::new(
        "inject",
        Value::Text("FAULTS"),
        "Faults of a simulated chip, such as `bitflip:rate=1e-9,where=dram,seed=1`; \
         see docs/simulator.md",
    ),
])
.list(|| {
    let profiles = SHIPPED.iter().map(|(name, text)| Profile::parse(name, text));
    let simulated = profiles.filter(|p| !matches!(p, Ok(p) if p.driver != profile::Driver::Sim));
    let listed = |profile: Profile| Listed::new(format!("sim:{}", profile.name), profile.summary);
    simulated.map(|profile| profile.map(listed)).collect()
});

/// Maximum chips of a simulated system.
pub const MOST_CHIPS: u64 = 64;

/// Joins simulated chips that share each layer.
///
/// # Errors
/// As [`Sim::new`]; [`Error::Argument`] if the profile has no links, or joins fewer chips.
pub fn system(profile: &Profile, options: &SimOptions, chips: u32) -> Result<Sharded> {
    let fabric = Fabric::new(profile)?;
    if let Some(most) = fabric.most_chips().filter(|most| chips > *most) {
        return Err(Error::argument(
            "chips",
            format!("at most the {most} that {} joins", profile.name),
            chips,
        ));
    }
    let chip = |number: u32| {
        let sim = Sim::new(profile.clone(), options)?;
        // Faults of each chip have random numbers of their own.
        sim.plans.store(u64::from(number) << 32, Ordering::Relaxed);
        Ok(Arc::new(sim) as Arc<dyn Backend>)
    };
    Sharded::new((0..chips).map(chip).collect::<Result<_>>()?, Some(Arc::new(fabric)))
}

/// The fusions that simulated chips ask for.
pub const FUSIONS: Fusions = Fusions::ALL.rope_kv(false);

/// Options of a simulation.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct SimOptions {
    /// Numerics of results.
    pub numerics: Numerics,
    /// Format of products, one of the profile's; `None`: the nearest to each weight's.
    pub products: Option<Dtype>,
    /// The order in which queues take turns.
    pub order: Order,
    /// Faults to inject.
    pub inject: Vec<Fault>,
}

halite::setters!(SimOptions {
    numerics: Numerics,
    products: impl Into<Option<Dtype>>,
    order: Order,
    inject: Vec<Fault>,
});

/// A simulated accelerator.
#[derive(Debug)]
pub struct Sim {
    caps: Caps,
    chip: Arc<Chip>,
    order: Order,
    isa: Isa,
    report: Arc<Mutex<Report>>,
    faults: Faults,
    /// Plans prepared so far: each has random numbers of its own.
    plans: AtomicU64,
}

/// Report of a simulated chip's work, by op.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// Count and total time by op.
    pub ops: Vec<OpReport>,
    /// Faults that were injected since the chip was opened.
    pub faults: Vec<FaultCount>,
}

/// The total of the ops of one name.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct OpReport {
    /// The op's name, and its weight's for products.
    pub name: String,
    /// Number of runs.
    pub count: u64,
    /// Total time.
    pub time: OpTime,
}

impl Report {
    /// Returns the total of all ops.
    pub fn total(&self) -> OpTime {
        self.ops.iter().fold(OpTime::none(), |sum, op| sum.then(op.time))
    }

    /// Adds all runs of an op.
    pub fn add_all(&mut self, more: &OpReport) {
        match self.ops.iter_mut().find(|op| op.name == more.name) {
            Some(op) => {
                op.count += more.count;
                op.time = op.time.then(more.time);
            }
            None => self.ops.push(more.clone()),
        }
    }

    /// Adds an op.
    pub fn add(&mut self, name: &str, time: OpTime) {
        self.add_all(&OpReport { name: name.into(), count: 1, time });
    }
}

impl Sim {
    /// Creates the chip of a profile.
    ///
    /// # Errors
    /// [`Error::Argument`] if the profile cannot be simulated with these options, or has no such lane or tile
    /// for a fault.
    pub fn new(profile: Profile, options: &SimOptions) -> Result<Sim> {
        let chip = Chip::new(profile, options.numerics, options.products)?;
        if options.numerics == Numerics::Native {
            chip.check_native()?;
        }
        options.inject.iter().try_for_each(|fault| fault.check(&chip))?;
        let exact = options.numerics == Numerics::Exact;
        let faults: Vec<String> = options.inject.iter().map(Fault::to_string).collect();
        let caps = Caps::new(
            format!("sim:{}", chip.profile.name),
            format!(
                "{} tile{} of {} KiB, simulated, {} numerics{}",
                chip.tiles,
                if chip.tiles == 1 { "" } else { "s" },
                chip.scratch_bytes / 1024,
                if exact { "exact" } else { "native" },
                if faults.is_empty() {
                    String::new()
                } else {
                    format!(", with injected faults: {}", faults.join("; "))
                },
            ),
        )
        .memory_bytes(chip.profile.holding_bytes())
        .fusions(FUSIONS)
        .contract(if exact { Contract::Exact } else { Contract::Native });
        Ok(Sim {
            caps,
            chip: Arc::new(chip),
            order: options.order,
            isa: Isa::detect(),
            report: Arc::default(),
            faults: Faults::new(&options.inject),
            plans: AtomicU64::new(0),
        })
    }

    /// Returns the report since the last call.
    pub fn take_report(&self) -> Report {
        let report = std::mem::take(&mut *self.report.lock().unwrap_or_else(PoisonError::into_inner));
        Report { faults: self.faults.counts(), ..report }
    }

    /// The faults that this chip injects, and their counts.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The injector of the next plan.
    fn injector(&self) -> Option<Injector> {
        Injector::new(&self.faults, &self.chip, self.plans.fetch_add(1, Ordering::Relaxed))
    }

    /// The chip.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }
}

impl Backend for Sim {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Supports every op whose smallest part fits the scratchpad.
    fn supports(&self, sig: &OpSig<'_>) -> Support {
        let cancel = halite::backend::Cancel::default();
        let tables = vec![vec![0]; sig.program.windows.len()];
        let spans = [halite::backend::Span { tables: &tables, start: 0, len: 1 }];
        let step = ProgramStep { spans: &spans, tokens: &[0], outputs: &[0], cancel: &cancel };
        let fits = shape::shape(sig.program, sig.op, &step, None).and_then(|s| lower::closed(&self.chip, &s));
        match fits {
            Ok(_) => Support::Native,
            Err(error) => Support::Unsupported(Gap::NotYet(error.to_string())),
        }
    }

    fn alloc(&self, bytes: u64, _: Usage) -> Result<Buffer> {
        memory::alloc(&self.caps.name, bytes, self.caps.memory_bytes)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        Ok(memory::import(region))
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        memory::fill(&self.caps.name, dst, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        memory::read(&self.caps.name, src, offset, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let kernels = SimKernels::new(self, host::scratch_bytes(program, limits))?;
        Ok(Box::new(HostPlan::new(&self.caps.name, program, limits, kernels)?))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        host::scratch_bytes(program, limits)
    }

    fn report(&self) -> Vec<String> {
        self.faults.counts().iter().map(FaultCount::to_string).collect()
    }
}

/// Names an op for reports: the op, and for products the weight, without the layer.
fn name(program: &Program, op: &Op) -> String {
    let weight = match op {
        Op::MatMul { parts, .. } => parts.first().map(|p| p.weight),
        Op::Experts { gate: weight, .. } | Op::BlockMatMul { weight, .. } => Some(*weight),
        _ => None,
    };
    match weight {
        None => op.name().to_owned(),
        Some(weight) => format!("{} {}", op.name(), program.tensor(weight).name_in_layer()),
    }
}

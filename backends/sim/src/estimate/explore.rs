//! Explores designs: a workload on many variants of a chip and many layouts, by the closed form.
//!
//! A [`Plan`] says which numbers vary, and numbers its points. [`explore`] times all of them; [`front`] keeps those that no other
//! point beats. [`reach`] asks the other way round: which value of a number reaches a target.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::figures::{Figures, Metric};
use super::system::{Layout, Stage, WAYS, layouts, stages};
use super::workload::{Choices, Quick, Workload};
use halite::backend::Cancel;
use halite::error::{Error, Result};
use halite::program::Program;
use halite_profiles::profile::{Key, Profile};

/// What a variable changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A number of the profile.
    Number,
    Batch,
    Chips,
    /// A way to divide the model, by its place in [`WAYS`].
    Way(usize),
}

/// Variables of the workload and the layout: name, target, largest value.
const NOT_OF_PROFILE: [(&str, Target, f64); 2 + WAYS.len()] = [
    ("batch", Target::Batch, 4096.0),
    ("chips", Target::Chips, 65_536.0),
    (WAYS[0], Target::Way(0), 4096.0),
    (WAYS[1], Target::Way(1), 4096.0),
    (WAYS[2], Target::Way(2), 4096.0),
    (WAYS[3], Target::Way(3), 4096.0),
    (WAYS[4], Target::Way(4), 4096.0),
];

/// Values of a range without a number of values.
const STEPS: usize = 8;
/// Maximum values of a range.
const MOST_STEPS: usize = 1_000_000;

/// A number that varies: `PATH=a,b,c`, or `PATH=A..B` or `PATH=A..B/N` for `N` values whose logarithms are equally far apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Vary {
    path: String,
    values: Values,
}

#[derive(Debug, Clone, PartialEq)]
enum Values {
    List(Vec<f64>),
    Range { from: f64, to: f64, steps: usize },
}

impl FromStr for Vary {
    type Err = Error;

    fn from_str(text: &str) -> Result<Vary> {
        let wrong = |expected: &str| Error::argument("number to vary", expected, format!("`{text}`"));
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|n| n.is_finite());
        let (path, values) = text.split_once('=').ok_or_else(|| wrong("PATH=A..B or PATH=a,b,c"))?;
        let values = match values.split_once("..") {
            Some((from, rest)) => {
                let (to, steps) = match rest.split_once('/') {
                    Some((to, steps)) => (to, steps.trim().parse().ok()),
                    None => (rest, Some(STEPS)),
                };
                let steps = steps.filter(|n| (2..=MOST_STEPS).contains(n));
                let steps = steps.ok_or_else(|| wrong(&format!("2 to {MOST_STEPS} values after the /")))?;
                let (from, to) =
                    number(from).zip(number(to)).ok_or_else(|| wrong("two numbers around the .."))?;
                if from <= 0.0 || to <= from {
                    return Err(wrong("a range from a number above 0 to a larger one (a list may have any)"));
                }
                Values::Range { from, to, steps }
            }
            None => {
                let all: Option<Vec<f64>> = values.split(',').map(number).collect();
                Values::List(all.ok_or_else(|| wrong("numbers, separated by commas"))?)
            }
        };
        Ok(Vary { path: path.trim().to_owned(), values })
    }
}

/// A variable of a plan.
#[derive(Debug, Clone)]
struct Variable {
    path: String,
    target: Target,
    unit: &'static str,
    is_whole: bool,
    values: Values,
    /// The values of a grid.
    grid: Vec<f64>,
}

impl Variable {
    fn new(profile: &Profile, vary: &Vary) -> Result<Variable> {
        let path = &vary.path;
        let of_layout = NOT_OF_PROFILE.iter().find(|(name, ..)| name == path);
        let (target, unit, range, is_whole) = match of_layout {
            Some((name, target, most)) => {
                let unit = if *name == "batch" { "sequences" } else { "chips" };
                (*target, unit, [1.0, *most], true)
            }
            None => {
                // Names near paths if there is none.
                profile.clone().set(path, 0.0).map_err(|error| known(path, error))?;
                let key = Key::of(path);
                let range = key.map_or([f64::MIN, f64::MAX], |key| [key.min, key.max]);
                (Target::Number, key.map_or("", |key| key.unit), range, key.is_some_and(|key| key.whole))
            }
        };
        let check = |value: f64| {
            let [min, max] = range;
            let kind = if is_whole { "a whole number " } else { "" };
            let fits = value >= min && value <= max && (!is_whole || value.fract() == 0.0);
            let expected = || format!("{kind}from {min} to {max} {unit} for {path}");
            if fits { Ok(value) } else { Err(Error::argument("number to vary", expected(), value)) }
        };
        let grid = match &vary.values {
            Values::List(list) => list.iter().map(|value| check(*value)).collect::<Result<Vec<f64>>>()?,
            Values::Range { from, to, steps } => {
                check(*from)?;
                check(*to)?;
                let last = (*steps - 1) as f64;
                let mut all: Vec<f64> = (0..*steps)
                    .map(|i| if i + 1 == *steps { *to } else { between(*from, *to, i as f64 / last) })
                    .map(|value| if is_whole { value.round() } else { value })
                    .collect();
                all.dedup();
                all
            }
        };
        Ok(Variable { path: path.clone(), target, unit, is_whole, values: vary.values.clone(), grid })
    }

    /// Returns the value at a place from 0 to 1.
    fn at(&self, place: f64) -> f64 {
        match &self.values {
            Values::List(list) => {
                let index = (place * list.len() as f64) as usize;
                list.get(index).or(list.last()).copied().unwrap_or(0.0)
            }
            Values::Range { from, to, .. } => {
                let value = between(*from, *to, place);
                if self.is_whole { value.round() } else { value }
            }
        }
    }
}

/// Adds the variables that are not of the profile to an error on a path.
fn known(path: &str, error: Error) -> Error {
    let Error::Argument { expected, .. } = error else { return error };
    let names = NOT_OF_PROFILE.map(|(name, ..)| name).join(", ");
    Error::argument("number to vary", format!("{names}, or {expected}"), format!("`{path}`"))
}

/// Returns the number at a place from 0 to 1 between two numbers, by logarithms.
fn between(from: f64, to: f64, place: f64) -> f64 {
    from * (to / from).powf(place)
}

/// Which points of a space to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sampling {
    /// Every combination, if there are at most so many.
    Grid(u64),
    /// So many points by chance, from a seed: equally likely logarithms in ranges, equally likely numbers of lists.
    Random(u64, u64),
}

/// The points of a space of designs.
#[derive(Debug, Clone)]
pub struct Plan {
    variables: Vec<Variable>,
    sampling: Sampling,
    count: usize,
    /// What the layout of a point is chosen by.
    best: &'static Metric,
}

impl Plan {
    /// Plans the points of numbers that vary.
    ///
    /// # Errors
    /// [`Error::Argument`] for a number that does not exist or is given twice, for values beyond its limits, for no points, and for
    /// more than the sampling allows.
    pub fn new(profile: &Profile, vary: &[Vary], sampling: Sampling) -> Result<Plan> {
        let variables = vary.iter().map(|vary| Variable::new(profile, vary)).collect::<Result<Vec<_>>>()?;
        for (i, variable) in variables.iter().enumerate() {
            if variables[..i].iter().any(|before| before.path == variable.path) {
                return Err(Error::argument(
                    "number to vary",
                    "each once",
                    format!("`{}` twice", variable.path),
                ));
            }
        }
        let all = variables.iter().fold(1u64, |all, v| all.saturating_mul(v.grid.len() as u64));
        let (count, most) = match sampling {
            Sampling::Grid(most) => (all, most),
            Sampling::Random(count, _) => (count, u64::MAX),
        };
        if count > most {
            let expected = format!("at most {most}; sample some by chance, or allow more");
            return Err(Error::argument("points of the grid", expected, count));
        }
        let count = usize::try_from(count).ok().filter(|count| *count > 0);
        let count = count.ok_or_else(|| Error::argument("points", "at least 1", 0))?;
        Ok(Plan { variables, sampling, count, best: Default::default() })
    }

    /// Chooses the layout of each point by a metric [default: the total time].
    pub fn layouts_by(self, best: &'static Metric) -> Plan {
        Plan { best, ..self }
    }

    /// Returns the number of points.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the path and the unit of each number that varies.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.variables.iter().map(|v| (v.path.as_str(), v.unit))
    }

    /// Returns the values of a point.
    pub fn values(&self, point: usize) -> Vec<f64> {
        match self.sampling {
            Sampling::Grid(_) => {
                // The last variable changes first.
                let mut rest = point;
                let mut values: Vec<f64> = (self.variables.iter().rev())
                    .map(|v| {
                        let digit = rest % v.grid.len().max(1);
                        rest /= v.grid.len().max(1);
                        v.grid.get(digit).copied().unwrap_or(0.0)
                    })
                    .collect();
                values.reverse();
                values
            }
            Sampling::Random(_, seed) => {
                let start = mixed(seed ^ mixed(point as u64));
                (1..).zip(&self.variables).map(|(n, v)| v.at(uniform(mixed(start ^ mixed(n))))).collect()
            }
        }
    }

    /// Returns an objective by its name: that of a figure, or the path of a number that varies.
    ///
    /// # Errors
    /// [`Error::Argument`] with the names that there are.
    pub fn objective(&self, name: &str) -> Result<Objective> {
        if let Some(metric) = Metric::named(name) {
            return Ok(Objective {
                name: name.into(),
                unit: metric.unit,
                is_more_better: metric.is_more_better,
                of: Of::Metric(metric),
            });
        }
        let names = || {
            let metrics = Metric::all().iter().map(|metric| metric.name);
            metrics.chain(self.variables.iter().map(|v| &v.path[..])).collect::<Vec<_>>().join(", ")
        };
        let found = self.variables.iter().enumerate().find(|(_, v)| v.path == name);
        let (i, v) = found.ok_or_else(|| Error::argument("objective", names(), format!("`{name}`")))?;
        Ok(Objective { name: name.into(), unit: v.unit, is_more_better: false, of: Of::Variable(i) })
    }

    /// Returns what a point asks besides numbers of the profile.
    fn asked(&self, base: Asked, values: &[f64]) -> Asked {
        let mut asked = base;
        let mut given = [None; WAYS.len()];
        for (v, value) in self.variables.iter().zip(values) {
            let value = *value as u32;
            match v.target {
                Target::Number => {}
                Target::Batch => asked.workload.batch = value,
                Target::Chips => asked.chips = Some(value),
                Target::Way(way) => given[way] = Some(value),
            }
        }
        let Layout { sums, overlap, .. } = base.layout;
        asked.layout = Layout::asked(asked.chips, given, sums).overlap(overlap);
        asked
    }
}

/// Mixes the bits of a number (Steele et al. 2014).
fn mixed(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// A number from 0 to 1, from mixed bits.
fn uniform(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A workload and the layouts that it may have; 0 where any number will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Asked {
    workload: Workload,
    layout: Layout,
    chips: Option<u32>,
}

/// Why a point has no figures.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// Weights and cache do not fit a chip's memory.
    Memory {
        /// Bytes that the fullest chip needs, of the layout that needs the least.
        need_bytes: u64,
        /// Bytes of a chip's memory.
        have_bytes: u64,
    },
    /// It cannot be lowered, or has no such layout.
    Failed(String),
}

impl Reason {
    /// Returns the reason without the numbers of the point, to count points of the same kind.
    pub fn kind(&self) -> String {
        match self {
            Reason::Memory { .. } => "weights and cache do not fit the memory".into(),
            Reason::Failed(message) => {
                let mut kind = String::new();
                for c in message.chars().map(|c| if c.is_ascii_digit() { 'N' } else { c }) {
                    if c != 'N' || !kind.ends_with('N') {
                        kind.push(c);
                    }
                }
                kind
            }
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Memory { need_bytes, have_bytes } => {
                write!(f, "weights and cache need {need_bytes} bytes of a chip's memory, it has {have_bytes}")
            }
            Reason::Failed(message) => f.write_str(message),
        }
    }
}

/// The figures of a point, or why there are none.
pub type Outcome = std::result::Result<Figures, Reason>;

/// What is best or least in a front.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Objective {
    /// Its name.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// Whether more is better.
    pub is_more_better: bool,
    of: Of,
}

#[derive(Debug, Clone, Copy)]
enum Of {
    Metric(&'static Metric),
    Variable(usize),
}

impl Objective {
    /// Returns the metric, if it is one.
    pub fn metric(&self) -> Option<&'static Metric> {
        match self.of {
            Of::Metric(metric) => Some(metric),
            Of::Variable(_) => None,
        }
    }

    /// Returns its value at a point; absent if the profile lacks the numbers.
    pub fn of(&self, values: &[f64], figures: &Figures) -> Option<f64> {
        match self.of {
            Of::Metric(metric) => metric.of(figures),
            Of::Variable(i) => values.get(i).copied(),
        }
    }
}

/// Returns the points that no other beats: none is at least as good by all objectives and better by one. Of points that are equal by
/// all, the first counts.
///
/// # Errors
/// [`Error::Argument`] if an objective has no value at a point that has figures.
pub fn front(plan: &Plan, outcomes: &[Outcome], objectives: &[Objective]) -> Result<Vec<usize>> {
    let mut costs: Vec<(Vec<f64>, usize)> = Vec::new();
    for (point, outcome) in outcomes.iter().enumerate() {
        let Ok(figures) = outcome else { continue };
        let values = plan.values(point);
        let cost = |objective: &Objective| {
            let missing =
                || Error::argument("objective", "one whose numbers the profile has", &objective.name);
            let value = objective.of(&values, figures).ok_or_else(missing)?;
            Ok(if objective.is_more_better { -value } else { value })
        };
        costs.push((objectives.iter().map(cost).collect::<Result<_>>()?, point));
    }
    let order = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| a.total_cmp(b))
            .find(|order| order.is_ne())
            .unwrap_or(std::cmp::Ordering::Equal)
    };
    costs.sort_by(|a, b| order(&a.0, &b.0).then(a.1.cmp(&b.1)));
    // In this order, no point beats one before it.
    let mut kept: Vec<(Vec<f64>, usize)> = Vec::new();
    for (cost, point) in costs {
        // The nearest by the first objective is the most likely to beat it.
        if !kept.iter().rev().any(|(other, _)| other.iter().zip(&cost).all(|(other, cost)| other <= cost)) {
            kept.push((cost, point));
        }
    }
    Ok(kept.into_iter().map(|(_, point)| point).collect())
}

/// The workloads and layouts of a plan, ready to be timed.
struct Bench<'a> {
    plan: &'a Plan,
    base: Asked,
    /// What layouts are chosen by.
    best: &'static Metric,
    ways: HashMap<Asked, Vec<std::result::Result<Quick<'a>, String>>>,
}

/// The program on the chips of each layout.
type Divided = HashMap<Layout, std::result::Result<Vec<Stage>, String>>;

impl Asked {
    fn layouts(&self, program: &Program) -> Vec<Layout> {
        match self.chips {
            Some(chips) => layouts(program, chips, self.layout),
            None => vec![self.layout],
        }
    }
}

/// What `plan` asks of a program: each once.
fn all_asked(plan: &Plan, base: Asked) -> Vec<Asked> {
    let mut all = Vec::new();
    if plan.variables.iter().all(|v| v.target == Target::Number) {
        return vec![plan.asked(base, &vec![0.0; plan.variables.len()])];
    }
    let mut known = std::collections::HashSet::new();
    for point in 0..plan.count {
        let asked = plan.asked(base, &plan.values(point));
        if known.insert(asked) {
            all.push(asked);
        }
    }
    all
}

fn divide(program: &Program, asked: &[Asked]) -> Divided {
    let mut divided = HashMap::new();
    for layout in asked.iter().flat_map(|asked| asked.layouts(program)) {
        divided.entry(layout).or_insert_with(|| stages(program, layout).map_err(|error| error.to_string()));
    }
    divided
}

impl<'a> Bench<'a> {
    fn new(
        plan: &'a Plan,
        (base, choices, best): (Asked, Choices, &'static Metric),
        program: &Program,
        all: &[Asked],
        divided: &'a Divided,
    ) -> Bench<'a> {
        let way = |asked: &Asked, layout: Layout| {
            let stages = match divided.get(&layout) {
                Some(Ok(stages)) => stages,
                Some(Err(error)) => return Err(error.clone()),
                None => return Err("a layout was not divided".into()),
            };
            Quick::new(choices.layout(layout), stages, &asked.workload).map_err(|e| e.to_string())
        };
        let ways =
            |asked: &Asked| asked.layouts(program).into_iter().map(|layout| way(asked, layout)).collect();
        let ways = all.iter().map(|asked| (*asked, ways(asked))).collect();
        Bench { plan, base, best, ways }
    }

    /// Returns the figures of a point with these values. `profile` is any variant of the plan's, and becomes that of the point.
    fn outcome(&self, profile: &mut Arc<Profile>, values: &[f64]) -> Outcome {
        let failed = |error: Error| Reason::Failed(error.to_string());
        for (v, value) in self.plan.variables.iter().zip(values).filter(|(v, _)| v.target == Target::Number) {
            Arc::make_mut(profile).set(&v.path, *value).map_err(failed)?;
        }
        self.figures(profile, self.plan.asked(self.base, values))
    }

    /// Returns the figures of the best layout that fits.
    fn figures(&self, profile: &Arc<Profile>, asked: Asked) -> Outcome {
        let mut best: Option<Figures> = None;
        let mut reason: Option<Reason> = None;
        for way in self.ways.get(&asked).into_iter().flatten() {
            let quick = match way {
                Ok(quick) => quick,
                Err(error) => {
                    reason.get_or_insert_with(|| Reason::Failed(error.clone()));
                    continue;
                }
            };
            let (need_bytes, have_bytes) = (quick.need_bytes(), profile.holding_bytes());
            if need_bytes > have_bytes {
                match &mut reason {
                    Some(Reason::Memory { need_bytes: least, .. }) => *least = need_bytes.min(*least),
                    _ => reason = Some(Reason::Memory { need_bytes, have_bytes }),
                }
                continue;
            }
            match quick.figures(profile) {
                Ok(figures) if best.is_none_or(|best| self.best.order(&figures, &best).is_lt()) => {
                    best = Some(figures);
                }
                Ok(_) => {}
                Err(error) => _ = reason.get_or_insert_with(|| Reason::Failed(error.to_string())),
            }
        }
        best.ok_or_else(|| reason.unwrap_or_else(|| Reason::Failed("no layout has that many chips".into())))
    }
}

/// Points that a thread takes at a time.
const TAKEN: usize = 64;

/// Returns the outcome of every point of a plan, on all cores. `choices.layout` has the order of sums; its numbers of chips count as 1
/// unless they vary. `progress` receives the number of points that are done, from any thread.
///
/// # Errors
/// [`Error::Cancelled`].
pub fn explore(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
    plan: &Plan,
    cancel: &Cancel,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Outcome>> {
    let base = Asked { workload: *workload, layout: choices.layout, chips: None };
    let all = all_asked(plan, base);
    let divided = divide(program, &all);
    let bench = Bench::new(plan, (base, choices, plan.best), program, &all, &divided);
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let mut mine = Vec::new();
        let mut variant = Arc::new(profile.clone());
        loop {
            let from = next.fetch_add(TAKEN, Ordering::Relaxed);
            if from >= plan.count || cancel.is_cancelled() {
                return mine;
            }
            let points = from..(from + TAKEN).min(plan.count);
            let outcomes: Vec<_> =
                points.clone().map(|point| bench.outcome(&mut variant, &plan.values(point))).collect();
            mine.push((from, outcomes));
            progress((done.fetch_add(points.len(), Ordering::Relaxed) + points.len()) as u64);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(plan.count.div_ceil(TAKEN));
    let mut parts = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut parts = work();
        for other in others {
            parts.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        parts
    });
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    parts.sort_by_key(|(from, _)| *from);
    Ok(parts.into_iter().flat_map(|(_, outcomes)| outcomes).collect())
}

/// What a number of the profile does for a target.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Lever {
    /// The number's path.
    pub path: String,
    /// Its unit.
    pub unit: &'static str,
    /// Its value in the profile.
    pub before: f64,
    /// The nearest value that reaches the target, to a thousandth; or the last one that was tried.
    pub value: f64,
    /// The figure at that value.
    pub figure: Option<f64>,
    /// Whether it reaches the target.
    pub reaches: bool,
}

impl Lever {
    /// Returns the factor by which the number changes, at least 1.
    pub fn factor(&self) -> f64 {
        (self.value / self.before).max(self.before / self.value)
    }
}

/// The answer to which numbers reach a target.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Reach {
    /// The figure without changes; absent if the workload does not fit.
    pub before: Option<f64>,
    /// Numbers that reach it alone, by the smallest factor; then those that do not, the best first.
    pub levers: Vec<Lever>,
    /// The common factor by which all of them together reach it, and the figure then.
    pub together: Option<(f64, f64)>,
}

/// Why a metric may be absent.
const NO_PRICE: &str = "its profile has no [price]";

/// How near a value is to the least that reaches a target.
const NEAR: f64 = 1.001;

/// Searches for the value of each number of a profile that alone makes a metric at least as good as `target`: up to `factor` times
/// more or less, or in the range that `plan` gives. With numbers of the profile in the plan only those count. Variables of the
/// workload need one value each.
///
/// The metric is taken to improve with the number, or with its inverse, all the way. Numbers are not checked against each other.
///
/// # Errors
/// [`Error::Argument`] for a target or a factor that cannot be, and for several workloads.
pub fn reach(
    profile: &Profile,
    choices: Choices,
    program: &Program,
    workload: &Workload,
    plan: &Plan,
    (metric, target, factor): (&'static Metric, f64, f64),
) -> Result<Reach> {
    if !(target > 0.0 && target.is_finite()) {
        return Err(Error::argument("target", "a number above 0", target));
    }
    if !(factor > 1.0 && factor.is_finite()) {
        return Err(Error::argument("factor", "a number above 1", factor));
    }
    let base = Asked { workload: *workload, layout: choices.layout, chips: None };
    let fixed: Vec<f64> = plan.variables.iter().map(|v| v.grid.first().copied().unwrap_or(0.0)).collect();
    let several = |v: &&Variable| v.target != Target::Number && v.grid.len() > 1;
    if let Some(v) = plan.variables.iter().find(several) {
        let got = format!("{} of {}", v.grid.len(), v.path);
        return Err(Error::argument("workload of a target", "one value", got));
    }
    let asked = plan.asked(base, &fixed);
    let divided = divide(program, &[asked]);
    let bench = Bench::new(plan, (base, choices, metric), program, &[asked], &divided);
    let sign = if metric.is_more_better { 1.0 } else { -1.0 };
    let figure = |profile: &Arc<Profile>| bench.figures(profile, asked).ok().and_then(|f| metric.of(&f));
    let profile = &Arc::new(profile.clone());
    if bench.figures(profile, asked).is_ok_and(|figures| metric.of(&figures).is_none()) {
        let expected = format!("a metric of {}, such as tokens_per_s; {}", profile.name, NO_PRICE);
        return Err(Error::argument("target", expected, metric.name));
    }
    // More is better; without a figure nothing is worse.
    let merit = |figure: Option<f64>| figure.map_or(f64::NEG_INFINITY, |figure| sign * figure);
    let reaches = |figure: Option<f64>| merit(figure) >= sign * target;
    let before = figure(profile);
    if reaches(before) {
        return Ok(Reach { before, levers: Vec::new(), together: None });
    }
    let named: Vec<&Variable> = plan.variables.iter().filter(|v| v.target == Target::Number).collect();
    let mut levers: Vec<Lever> = Vec::new();
    for (path, quantity) in &profile.quantities {
        let range = named.iter().find(|v| &v.path == path).map(|v| &v.grid);
        if quantity.value <= 0.0 || (range.is_none() && !named.is_empty()) {
            continue;
        }
        let key = Key::of(path);
        let [min, max] = key.map_or([f64::MIN_POSITIVE, f64::MAX], |key| [key.min, key.max]);
        let (from, to) = match range {
            Some(grid) => {
                let ends =
                    grid.iter().fold((f64::MAX, f64::MIN), |(a, b), value| (value.min(a), value.max(b)));
                (ends.0.min(quantity.value), ends.1.max(quantity.value))
            }
            None => ((quantity.value / factor).max(min), (quantity.value * factor).min(max)),
        };
        let is_whole = key.is_some_and(|key| key.whole);
        let rounded = |value: f64| if is_whole { value.round().max(min) } else { value };
        let mut variant = profile.clone();
        let mut with = |value: f64| {
            Arc::make_mut(&mut variant).set(path, value)?;
            Ok::<_, Error>(figure(&variant))
        };
        let mut ends = Vec::new();
        for value in [rounded(from), rounded(to)] {
            ends.push((value, with(value)?));
        }
        ends.sort_by(|a, b| merit(b.1).total_cmp(&merit(a.1)));
        let Some(&(mut end, mut best)) = ends.first() else { continue };
        if merit(best) <= merit(before) || end <= 0.0 {
            continue;
        }
        if reaches(best) {
            // `near` does not reach it, `end` does.
            let mut near = quantity.value;
            while (end / near).max(near / end) > NEAR {
                let middle = rounded((end * near).sqrt());
                if middle == end || middle == near {
                    break;
                }
                let figure = with(middle)?;
                if reaches(figure) { (end, best) = (middle, figure) } else { near = middle }
            }
        }
        levers.push(Lever {
            path: path.clone(),
            unit: key.map_or("", |key| key.unit),
            before: quantity.value,
            value: end,
            figure: best,
            reaches: reaches(best),
        });
    }
    levers.sort_by(|a, b| {
        let alone = b.reaches.cmp(&a.reaches);
        let nearest = if a.reaches {
            a.factor().total_cmp(&b.factor())
        } else {
            merit(b.figure).total_cmp(&merit(a.figure))
        };
        alone.then(nearest)
    });
    let together = |factor: f64| {
        let mut variant = profile.clone();
        for lever in &levers {
            let key = Key::of(&lever.path);
            let value =
                if lever.value > lever.before { lever.before * factor } else { lever.before / factor };
            let value = key.map_or(value, |key| {
                let value = if key.whole { value.round() } else { value };
                value.clamp(key.min, key.max)
            });
            Arc::make_mut(&mut variant).set(&lever.path, value)?;
        }
        Ok::<_, Error>(figure(&variant))
    };
    let (mut near, mut end) = (1.0, factor);
    let mut best = together(end)?;
    if reaches(best) {
        while end / near > NEAR {
            let middle = f64::sqrt(end * near);
            let figure = together(middle)?;
            if reaches(figure) { (end, best) = (middle, figure) } else { near = middle }
        }
    }
    let together = best.filter(|_| reaches(best) && !levers.is_empty()).map(|figure| (end, figure));
    Ok(Reach { before, levers, together })
}

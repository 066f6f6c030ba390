//! `halite explore`: varies the numbers of a chip and its layouts, and finds the best designs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use halite::backend::Cancel;
use halite::output::{self, Replace};
use halite::program::Program;
use halite::{Error, Model};
use halite_profiles::profile::Profile;
use halite_sim::estimate::explore::{
    Lever, Objective, Outcome, Plan, Reach, Sampling, Vary, explore, front, reach,
};
use halite_sim::estimate::figures::{Figures, Metric};
use halite_sim::estimate::system::WAYS;
use serde_json::{Map, Value, json};

use super::estimate::{WorkArgs, layout, number, seconds, ways};
use super::plot::{self, Axis};
use super::profile::scaled;
use super::{Failure, bytes, interrupt, plain, plain_json, print, progress};

/// Times every point by the closed form of `halite estimate`, and prints the points that no other beats. No weights are read.
#[derive(Args)]
pub struct ExploreArgs {
    #[command(flatten)]
    work: WorkArgs,
    /// Chip profile to start from: a name or a TOML file.
    #[arg(short, long, value_name = "FILE|NAME")]
    profile: String,
    /// Number to vary; may be repeated. PATH is a number of `halite profile NAME --numbers`, or batch, chips, tp, ep, cp, pp, dp.
    /// VALUES are a,b,c or A..B or A..B/N, for N values with the same ratio from each to the next [default: 8].
    #[arg(long, value_name = "PATH=VALUES", required_unless_present = "reach")]
    vary: Vec<Vary>,
    /// Refuse grids of more points.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    points: u64,
    /// Try N points by chance instead of the grid.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    random: Option<u64>,
    /// Seed of --random.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "random")]
    seed: u64,
    /// What to compare designs by, two or three, comma-separated: tokens_per_s, tokens_per_s_per_user, first_token_s, step_s, seconds,
    /// usd_per_million_tokens, need_bytes, or numbers that vary, of which less is better [default: tokens_per_s and the first number].
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    pareto: Vec<String>,
    /// Find the value of each number that alone reaches this, such as tokens_per_s=100. With --vary, only of those, in their ranges.
    #[arg(long, value_name = "NAME=TARGET", value_parser = target, conflicts_with_all = ["random", "pareto", "csv", "html"])]
    reach: Option<Target>,
    /// Change numbers by at most this factor for --reach.
    #[arg(long, value_name = "F", default_value_t = 16.0, requires = "reach")]
    factor: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write all points to this file.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a page with a plot and the table to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl ExploreArgs {
    /// Says what is explored: the model and the workload.
    fn heading(&self, model: &Model, program: &Program, plan: &Plan) -> String {
        match plan.variables().any(|(path, _)| path == "batch") {
            true => self.work.heading(model, program, "batch"),
            false => self.work.heading(model, program, self.work.workload().batch),
        }
    }
}

/// A figure to reach.
#[derive(Clone, Copy)]
struct Target {
    metric: &'static Metric,
    value: f64,
}

fn target(text: &str) -> Result<Target, String> {
    let named = text.split_once('=').and_then(|(name, value)| {
        let metric = Metric::all().iter().find(|metric| metric.name == name)?;
        Some(Target { metric, value: value.parse().ok()? })
    });
    let names = || Metric::all().iter().map(|metric| metric.name).collect::<Vec<_>>().join(", ");
    named.ok_or_else(|| format!("expected NAME=NUMBER with a name of {}", names()))
}

const CSV: Replace = Replace::StartingWith(b"point,", "a table of points");
const HTML: Replace = Replace::StartingWith(b"<!DOCTYPE html>", "an HTML page");

pub fn run(args: &ExploreArgs) -> Result<(), Failure> {
    let model = args.work.open()?;
    let program = args.work.program(&model)?;
    let profile = Profile::open(&args.profile)?;
    let sampling = match args.random {
        Some(count) => Sampling::Random(count, args.seed),
        None => Sampling::Grid(args.points),
    };
    let plan = Plan::new(&profile, &args.vary, sampling)?;
    if args.work.batch.is_some() && plan.variables().any(|(path, _)| path == "batch") {
        return Err("--batch and --vary batch: expected one of them, got both".into());
    }
    if let Some(target) = args.reach {
        return print_reach(args, &model, &program, &profile, &plan, target);
    }
    let names = match (&args.pareto[..], plan.variables().next()) {
        ([], Some((first, _))) => vec!["tokens_per_s".to_owned(), first.to_owned()],
        (names, _) => names.to_vec(),
    };
    let objectives = names.iter().map(|name| plan.objective(name)).collect::<Result<Vec<_>, Error>>()?;
    if !matches!(objectives.len(), 2 | 3) {
        return Err(format!("--pareto: expected two or three names, got {}", objectives.len()).into());
    }
    let inputs = [Path::new(&args.profile), args.work.model()];
    for (path, replace) in [(&args.csv, CSV), (&args.html, HTML)] {
        path.iter().try_for_each(|path| output::check(path, replace, &inputs))?;
    }
    if args.csv.is_some() && args.csv == args.html {
        return Err("--csv and --html: expected two files, got the same name".into());
    }
    let best = objectives.iter().find_map(Objective::metric);
    let best = best.unwrap_or_default();
    let plan = plan.layouts_by(best);
    let cancel = Cancel::default();
    let bar = progress(plan.count() as u64, "exploring");
    let outcomes = {
        let _work = interrupt::Work::new(cancel.clone());
        let advance = |done| bar.set_position(done);
        let (choices, workload) = (args.work.choices()?, args.work.workload());
        explore(&profile, choices, &program, &workload, &plan, &cancel, &advance)?
    };
    bar.finish_and_clear();
    let explored = Explored {
        profile: &profile,
        plan: &plan,
        outcomes: &outcomes,
        objectives: &objectives,
        best,
        front: front(&plan, &outcomes, &objectives)?,
    };
    let heading = args.heading(&model, &program, &plan);
    if let Some(path) = &args.csv {
        interrupt::write(path, CSV, &inputs, &explored.csv()?)?;
    }
    if let Some(path) = &args.html {
        interrupt::write(path, HTML, &inputs, explored.page(heading.trim())?.as_bytes())?;
    }
    if args.json {
        print(&plain_json(&explored.json()))?;
    } else {
        print(&plain(&(heading + &explored.text())))?;
    }
    match explored.failed_count() == outcomes.len() {
        true => Err("no point has figures".into()),
        false => Ok(()),
    }
}

/// The outcomes of a plan, and the best of them.
struct Explored<'a> {
    profile: &'a Profile,
    plan: &'a Plan,
    outcomes: &'a [Outcome],
    objectives: &'a [Objective],
    /// What layouts are chosen by.
    best: &'static Metric,
    front: Vec<usize>,
}

/// Maximum rows to print.
const LISTED: usize = 40;

/// Formats a number in its unit.
fn shown(value: f64, unit: &str) -> String {
    match unit {
        "s" => seconds(value),
        "US$" => number(value, 2),
        "bytes" => bytes(value as u64),
        "tokens/s" => number(value, 1),
        _ if value != 0.0 && value.abs() < 0.01 => format!("{value:.2e}"),
        _ => scaled(value).trim().to_owned(),
    }
}

impl Explored<'_> {
    /// Returns a point of the front with its figures.
    fn front(&self) -> impl Iterator<Item = (usize, Vec<f64>, &Figures)> {
        self.front.iter().filter_map(|&point| {
            let figures = self.outcomes.get(point)?.as_ref().ok()?;
            Some((point, self.plan.values(point), figures))
        })
    }

    /// Counts the points without figures by reason, the most first, each with an example.
    fn failed(&self) -> Vec<(usize, String)> {
        let mut kinds: BTreeMap<String, (usize, String)> = BTreeMap::new();
        for reason in self.outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            let kind = reason.kind();
            let (count, _) = kinds.entry(kind).or_insert_with(|| (0, reason.to_string()));
            *count += 1;
        }
        let mut kinds: Vec<_> = kinds.into_values().collect();
        kinds.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
        kinds
    }

    fn failed_count(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.is_err()).count()
    }

    /// The names of the table's columns, and the cells of each point of the front.
    fn table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let divided = self.front().any(|(_, _, figures)| figures.layout.chips() > 1);
        let priced = self.front().any(|(_, _, figures)| figures.usd_per_million_tokens.is_some());
        let mut names = vec!["#".to_owned()];
        names.extend(self.plan.variables().map(|(path, _)| path.to_owned()));
        names.extend(divided.then(|| "layout".to_owned()));
        let metrics = [
            ("tokens/s", "tokens_per_s"),
            ("per user", "tokens_per_s_per_user"),
            ("first token", "first_token_s"),
            ("decode step", "step_s"),
            ("USD/million tokens", "usd_per_million_tokens"),
            ("memory per chip", "need_bytes"),
        ];
        let metrics = metrics.into_iter().filter(|(_, name)| priced || *name != "usd_per_million_tokens");
        let metrics: Vec<(&str, &Metric)> = metrics
            .filter_map(|(title, name)| {
                Some((title, Metric::all().iter().find(|metric| metric.name == name)?))
            })
            .collect();
        names.extend(metrics.iter().map(|(title, _)| (*title).to_owned()));
        let rows = (1..).zip(self.front()).map(|(number, (_, values, figures)): (usize, _)| {
            let mut cells = vec![number.to_string()];
            cells.extend(
                values.iter().zip(self.plan.variables()).map(|(value, (_, unit))| shown(*value, unit)),
            );
            cells.extend(divided.then(|| layout(&figures.layout)));
            let figure =
                |metric: &Metric| metric.of(figures).map_or("-".into(), |value| shown(value, metric.unit));
            cells.extend(metrics.iter().map(|(_, metric)| figure(metric)));
            cells
        });
        (names, rows.collect())
    }

    /// Says what the front is best by.
    fn aims(&self) -> String {
        let aim = |o: &Objective| format!("{} {}", if o.is_more_better { "more" } else { "less" }, o.name);
        self.objectives.iter().map(aim).collect::<Vec<_>>().join(", ")
    }

    fn text(&self) -> String {
        let failed = self.failed_count();
        let mut text = format!(
            "{}: {} points, {} have figures\n",
            self.profile.name,
            self.outcomes.len(),
            self.outcomes.len() - failed
        );
        for (count, example) in self.failed() {
            text += &format!("  {count} do not: {example}\n");
        }
        let (names, rows) = self.table();
        if names.iter().any(|name| name == "layout") {
            let most = if self.best.is_more_better { "most" } else { "least" };
            text +=
                &format!("of the layouts of a point, the one with the {most} {} counts\n", self.best.name);
        }
        text += &format!("\n{} that no other beats: {}\n", rows.len(), self.aims());
        let more = rows.len().saturating_sub(LISTED);
        let lines: Vec<Vec<String>> = std::iter::once(names).chain(rows.into_iter().take(LISTED)).collect();
        text += &columns(&lines);
        if more > 0 {
            text += &format!("and {more} more: --json, --csv and --html have all\n");
        }
        text
    }

    fn json(&self) -> Value {
        let point = |(point, values, figures): (usize, Vec<f64>, &Figures)| {
            let values: Map<String, Value> = self
                .plan
                .variables()
                .zip(values)
                .map(|((path, _), value)| (path.to_owned(), json!(value)))
                .collect();
            let l = figures.layout;
            let mut all = Map::from_iter([
                ("point".to_owned(), json!(point)),
                ("values".to_owned(), Value::from(values)),
                ("layout".to_owned(), Value::Object(ways(&l))),
            ]);
            all.extend(
                Metric::all().iter().map(|metric| (metric.name.to_owned(), json!(metric.of(figures)))),
            );
            all.insert("have_bytes".into(), json!(figures.have_bytes));
            Value::from(all)
        };
        json!({
            "profile": self.profile.name,
            "points": self.outcomes.len(),
            "failed": self.failed().into_iter().map(|(count, example)| json!({ "points": count, "example": example })).collect::<Vec<_>>(),
            "layouts_by": self.best.name,
            "objectives": self.objectives.iter().map(|o| json!({ "name": o.name, "unit": o.unit, "is_more_better": o.is_more_better })).collect::<Vec<_>>(),
            "front": self.front().map(point).collect::<Vec<_>>(),
        })
    }

    /// The table of all points.
    fn csv(&self) -> Result<Vec<u8>, Failure> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        let mut in_front = vec![false; self.outcomes.len()];
        for &point in &self.front {
            if let Some(is_in) = in_front.get_mut(point) {
                *is_in = true;
            }
        }
        let of_layout = WAYS.map(|way| format!("layout.{way}"));
        let metrics = Metric::all().iter().map(|metric| metric.name);
        let names = std::iter::once("point").chain(self.plan.variables().map(|(path, _)| path));
        csv.write_record(names.chain(of_layout.iter().map(String::as_str)).chain(metrics).chain([
            "have_bytes",
            "front",
            "reason",
        ]))?;
        for (point, outcome) in self.outcomes.iter().enumerate() {
            let mut cells = vec![point.to_string()];
            cells.extend(self.plan.values(point).iter().map(f64::to_string));
            match outcome {
                Ok(figures) => {
                    let l = figures.layout;
                    cells.extend(l.ways().map(|(_, n)| n.to_string()));
                    let metrics = Metric::all().iter().map(|metric| metric.of(figures));
                    cells.extend(metrics.map(|value| value.map_or(String::new(), |value| value.to_string())));
                    cells.extend([
                        figures.have_bytes.to_string(),
                        u8::from(in_front[point]).to_string(),
                        String::new(),
                    ]);
                }
                Err(reason) => {
                    cells.extend(std::iter::repeat_n(
                        String::new(),
                        of_layout.len() + Metric::all().len() + 1,
                    ));
                    cells.extend(["0".to_owned(), reason.to_string()]);
                }
            }
            csv.write_record(cells)?;
        }
        Ok(csv.into_inner().map_err(|e| e.to_string())?)
    }

    /// The page with the plot and the table.
    fn page(&self, heading: &str) -> Result<String, Failure> {
        let [y, x, ..] = self.objectives else { return Ok(String::new()) };
        let place =
            |(values, figures): (&[f64], &Figures)| Some((x.of(values, figures)?, y.of(values, figures)?));
        let all = self
            .outcomes
            .iter()
            .enumerate()
            .filter_map(|(point, outcome)| place((&self.plan.values(point), outcome.as_ref().ok()?)));
        let best: Vec<(f64, f64)> =
            self.front().filter_map(|(_, values, figures)| place((&values, figures))).collect();
        fn axis(o: &Objective) -> Axis<'_> {
            Axis { name: &o.name, unit: o.unit, shown: &|value, unit| shown(value, unit) }
        }
        let svg = match best.is_empty() {
            true => String::new(),
            false => plot::pareto([axis(x), axis(y)], all.collect(), &best, self.objectives.len() == 2)?,
        };
        let (names, rows) = self.table();
        let mut environment = minijinja::Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.add_template("explore.html", include_str!("../templates/explore.html"))?;
        Ok(environment.get_template("explore.html")?.render(minijinja::context! {
            profile => self.profile.name, summary => self.profile.summary, heading, aims => self.aims(),
            points => self.outcomes.len(), ran => self.outcomes.len() - self.failed_count(), failed => self.failed(),
            third => self.objectives.get(2).map(|o| &o.name), svg, names, rows,
            halite => env!("CARGO_PKG_VERSION"),
        })?)
    }
}

/// Lays lines of cells out in columns as wide as they need, numbers to the right.
fn columns(lines: &[Vec<String>]) -> String {
    let count = lines.first().map_or(0, Vec::len);
    let width =
        |i: usize| lines.iter().filter_map(|line| Some(line.get(i)?.chars().count())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let line = |cells: &Vec<String>| {
        let cells: Vec<_> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    lines.iter().map(line).collect()
}

/// Prints which value of each number reaches a target.
fn print_reach(
    args: &ExploreArgs,
    model: &Model,
    program: &Program,
    profile: &Profile,
    plan: &Plan,
    Target { metric, value }: Target,
) -> Result<(), Failure> {
    let target = (metric, value, args.factor);
    let found = reach(profile, args.work.choices()?, program, &args.work.workload(), plan, target)?;
    let Reach { before, levers, together, .. } = &found;
    if args.json {
        let lever = |l: &Lever| {
            json!({
                "path": l.path, "unit": l.unit, "before": l.before, "value": l.value, "factor": l.factor(),
                "figure": l.figure, "reaches": l.reaches,
            })
        };
        return print(&plain_json(&json!({
            "profile": profile.name,
            "metric": metric.name,
            "unit": metric.unit,
            "target": value,
            "before": before,
            "levers": levers.iter().map(lever).collect::<Vec<_>>(),
            "together": together.map(|(factor, figure)| json!({ "factor": factor, "figure": figure })),
        })));
    }
    let figure = |figure: Option<f64>| figure.map_or("no figure".into(), |figure| shown(figure, metric.unit));
    let mut text = args.heading(model, program, plan);
    text += &format!(
        "{}: {} is {}, target {}\n",
        profile.name,
        metric.name,
        figure(*before),
        shown(value, metric.unit)
    );
    if levers.is_empty() {
        let is_reached = before
            .is_some_and(|before| if metric.is_more_better { before >= value } else { before <= value });
        text += if is_reached {
            "it is reached without a change\n"
        } else {
            "no number that was tried improves it\n"
        };
        return print(&plain(&text));
    }
    text += "\nby one number alone\n";
    let lines: Vec<Vec<String>> = levers
        .iter()
        .map(|l| {
            let change = format!("{} -> {}", shown(l.before, l.unit), shown(l.value, l.unit));
            let verdict = match l.reaches {
                true => format!("x {:.3}", if l.value > l.before { l.factor() } else { 1.0 / l.factor() }),
                false => format!("not by this number alone: at best {}", figure(l.figure)),
            };
            vec![l.path.clone(), change, l.unit.to_owned(), verdict]
        })
        .collect();
    let width = |i: usize| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2].map(width);
    for line in &lines {
        let [path, change, unit] = widths;
        text += &format!("  {:path$}  {:change$}  {:unit$}  {}\n", line[0], line[1], line[2], line[3]);
    }
    text += &match together {
        Some((factor, found)) => {
            format!("\nby all of them together: each by {factor:.3}, then {}\n", shown(*found, metric.unit))
        }
        None => format!("\nnot by all of them together, each by {}\n", args.factor),
    };
    print(&plain(&text))
}

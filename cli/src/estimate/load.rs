//! `halite estimate --load`: predicts serving under load.

use std::path::{Path, PathBuf};

use clap::Args;
use halite::Model;
use halite::model::ProgramOptions;
use halite::output::{self, Replace};
use halite_profiles::profile::Profile;
use halite_sim::estimate::load::requests::{self, Draw, Length, Lengths, Request, Source};
use halite_sim::estimate::load::summary::{GOOD, Percentiles, SLOWER, Slo, Summary, knee, write_csv};
use halite_sim::estimate::load::{Draft, Outcome, Server, Serving};
use halite_sim::estimate::workload::Choices;
use serde_json::{Value, json};

use super::super::{Failure, bytes, interrupt, plain, plain_json, print};
use super::{EstimateArgs, energy, seconds};

/// Maximum bytes of a trace.
const MAX_TRACE_BYTES: u64 = 1 << 30;

/// Options of a load.
#[derive(Args)]
#[command(next_help_heading = "Serving under load")]
pub struct LoadArgs {
    /// Serve requests that arrive over time: `poisson:RATE,…` in requests/s (`A..B` doubles from A to B), or a trace, a CSV file with the
    /// columns arrival_s, prompt_tokens, generated_tokens and, if prompts begin alike, prefix_tokens, prefix_group.
    #[arg(long, value_name = "poisson:RATE|FILE", conflicts_with_all = ["batch", "ops", "trace", "roofline", "html", "best"])]
    load: Option<Source>,
    /// Number of requests with Poisson arrivals [default: 1000].
    #[arg(long, value_name = "N", requires = "load", value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    requests: Option<u32>,
    /// Seed of arrivals, lengths and right guesses.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "load")]
    seed: u64,
    /// Lengths of prompts and answers: `chat`, `summarise` or `code`, which are made up, or `PROMPT/ANSWER`, each a number, `uniform:A..B` or
    /// `lognormal:MEDIAN,P95` [default: those of --prompt and --generate].
    #[arg(long, value_name = "NAME|PROMPT/ANSWER", requires = "load", conflicts_with_all = ["prompt", "generate"])]
    lengths: Option<Lengths>,
    /// Tokens that each prompt begins with in addition to its length, the same within each of so many groups [default: 1 group].
    #[arg(long, value_name = "TOKENS[:GROUPS]", requires = "load", value_parser = prefix)]
    prefix: Option<(u32, u32)>,
    /// Maximum tokens of a prompt and its answer [default: the model's context].
    #[arg(long, value_name = "N", requires = "load", value_parser = clap::value_parser!(u32).range(2..=10_000_000))]
    context: Option<u32>,
    /// Requests that a chip runs at once. The server has at most 64.
    #[arg(long, value_name = "N", default_value_t = 64, requires = "load", value_parser = clap::value_parser!(u32).range(1..=4096))]
    sequences: u32,
    /// Time that a step may take in which prompts run beside text.
    #[arg(long, value_name = "MS", default_value_t = 100.0, requires = "load")]
    step_ms: f64,
    /// Chips that serve. A request goes to the one with the fewest.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "load", value_parser = clap::value_parser!(u32).range(1..=1024))]
    replicas: u32,
    /// Run prompts on P chips, which send their KV caches to D chips that generate.
    #[arg(long, value_name = "P:D", requires = "load", conflicts_with = "replicas", value_parser = disaggregate)]
    disaggregate: Option<(u32, u32)>,
    /// Guess so many tokens of each text in a step.
    #[arg(long, value_name = "N", requires_all = ["load", "accept"], value_parser = clap::value_parser!(u32).range(1..=64))]
    draft: Option<u32>,
    /// Probability that a guess is right if those before it are.
    #[arg(long, value_name = "SHARE", requires = "draft")]
    accept: Option<f64>,
    /// Time of a guess for all texts, as a share of a step that generates one token of each.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, requires = "draft")]
    draft_cost: f64,
    /// Count the requests whose first token comes within so many seconds, and whose others are so many seconds apart on average.
    #[arg(long, value_name = "ttft=S,tpot=S", requires = "load")]
    slo: Option<Slo>,
    /// Write the requests as CSV, for one rate on one profile.
    #[arg(long, value_name = "FILE", requires = "load")]
    csv: Option<PathBuf>,
}

/// Parses two numbers from 1 with a colon between them.
fn pair(text: &str) -> Option<(u32, u32)> {
    let (a, b) = text.split_once(':')?;
    let number = |text: &str| text.parse().ok().filter(|n| (1..=1_000_000).contains(n));
    Some((number(a)?, number(b)?))
}

fn prefix(text: &str) -> Result<(u32, u32), String> {
    pair(text)
        .or_else(|| pair(&format!("{text}:1")))
        .ok_or_else(|| format!("expected TOKENS or TOKENS:GROUPS, such as 500:8, got `{text}`"))
}

fn disaggregate(text: &str) -> Result<(u32, u32), String> {
    let few = pair(text).filter(|(p, d)| p.max(d) <= &1024);
    few.ok_or_else(|| format!("expected two numbers from 1 to 1024, such as 2:6, got `{text}`"))
}

impl LoadArgs {
    /// Where requests come from, if this estimate is of a load.
    pub fn source(&self) -> Option<&Source> {
        self.load.as_ref()
    }

    fn serving(&self, chunk: u32) -> Serving {
        let (prefill, replicas) = self.disaggregate.unwrap_or((0, self.replicas));
        let draft = self.draft.zip(self.accept);
        let draft = draft.map(|(tokens, accept)| Draft { tokens, accept, cost: self.draft_cost });
        Serving::default()
            .sequences(self.sequences)
            .chunk(chunk)
            .step_s(1e-3 * self.step_ms)
            .replicas(replicas)
            .prefill(prefill)
            .draft(draft)
            .seed(self.seed)
    }
}

/// Requests, and the rate of those that were drawn.
struct Load {
    rate: Option<f64>,
    requests: Vec<Request>,
    /// Requests that were cut to the context.
    cut: u32,
}

fn loads(args: &EstimateArgs, source: &Source, context: u32) -> Result<Vec<Load>, Failure> {
    let load = &args.load;
    match source {
        Source::File(path) => {
            let given = [
                ("--lengths", load.lengths.is_some()),
                ("--prefix", load.prefix.is_some()),
                ("--requests", load.requests.is_some()),
                ("--prompt", args.work.prompt.is_some()),
                ("--generate", args.work.generate.is_some()),
            ];
            if let Some((name, _)) = given.iter().find(|(_, is_given)| *is_given) {
                let got = format!("the trace {path}, which has its own requests and lengths");
                return Err(format!("{name}: expected --load poisson:RATE, got {got}").into());
            }
            let bytes = halite::map::read(Path::new(path), MAX_TRACE_BYTES)?;
            let requests = requests::read(path, &bytes[..], context)?;
            Ok(vec![Load { rate: None, requests, cut: 0 }])
        }
        Source::Poisson(rates) => {
            let fixed = Lengths {
                prompt: Length::Fixed(args.work.workload().prompt),
                generate: Length::Fixed(args.work.workload().generate),
            };
            let lengths = load.lengths.unwrap_or(fixed);
            let mut draw = Draw::new(load.requests.unwrap_or(1000), load.seed, lengths, context);
            (draw.prefix, draw.groups) = load.prefix.unwrap_or((0, 1));
            let mut loads = Vec::new();
            for &rate in rates {
                let (requests, cut) = draw.poisson(rate)?;
                loads.push(Load { rate: Some(rate), requests, cut });
            }
            Ok(loads)
        }
    }
}

/// The loads on the chips of a profile, or why they cannot be served.
struct Answer {
    profile: Profile,
    /// What every chip does alike because it cannot be divided.
    repeated: Vec<String>,
    summaries: Result<Vec<Summary>, halite::Error>,
}

/// Estimates a load on each profile.
pub fn run(args: &EstimateArgs, source: &Source, model: &Model, choices: Choices) -> Result<(), Failure> {
    let load = &args.load;
    if args.chips.is_some() || args.pp.is_some() || args.dp.is_some() {
        return Err(
            "--load: expected --tp and --cp chips for each of --replicas, got --chips, --pp or --dp".into()
        );
    }
    let known = model.hparams().context_length;
    let context = load.context.unwrap_or(known);
    if context > known {
        return Err(format!("--context: expected at most the model's {known} tokens, got {context}").into());
    }
    let program = model.program(ProgramOptions::default().kv_format(args.work.kv), context)?;
    let loads = loads(args, source, context)?;
    if let Some(csv) = &load.csv {
        if loads.len() != 1 || args.profile.len() != 1 {
            return Err("--csv: expected one rate and one profile".into());
        }
        output::check(csv, CSV, &inputs(args, source))?;
    }
    let mut answers = Vec::new();
    for name in &args.profile {
        let profile = Profile::open(name)?;
        let mut repeated = Vec::new();
        let mut serve = || -> Result<Vec<Outcome>, halite::Error> {
            let mut server =
                Server::new(&profile, choices, &program, context, load.serving(args.work.chunk))?;
            repeated = server.repeated().to_vec();
            loads.iter().map(|load| server.serve(&load.requests)).collect()
        };
        let outcomes = serve();
        if let (Some(csv), Ok([outcome])) = (&load.csv, outcomes.as_deref()) {
            let mut text = Vec::new();
            write_csv(&outcome.served, &mut text)?;
            interrupt::write(csv, CSV, &inputs(args, source), &text)?;
        }
        let sum = |outcomes: Vec<Outcome>| outcomes.iter().map(|of| Summary::new(of, load.slo)).collect();
        answers.push(Answer { summaries: outcomes.map(sum), repeated, profile });
    }
    // Of several chips, one that cannot serve does not hide the others.
    if answers.iter().all(|answer| answer.summaries.is_err())
        && let Some(Answer { summaries: Err(error), .. }) = answers.pop()
    {
        return Err(error.into());
    }
    if args.json {
        let values: Vec<Value> = answers.iter().map(|answer| as_json(answer, &loads)).collect();
        return print(&plain_json(&Value::from(values)));
    }
    let mut text = heading(args, source, model, program.weight_bytes(), &loads);
    if loads.len() == 1 {
        text += &table(&answers);
    } else {
        answers.iter().for_each(|answer| text += &sweep(answer, &loads, load.slo));
    }
    for Answer { profile, repeated, summaries } in &answers {
        if !repeated.is_empty() {
            let lines = repeated.iter().map(|what| format!("  not divided, every chip does it: {what}\n"));
            text += &format!("\n{}\n{}", profile.name, lines.collect::<String>());
        }
        if let Err(error) = summaries {
            text += &format!("\n{}\n  {error}\n", profile.name);
        }
    }
    print(&plain(&text))
}

/// The table of requests, which may replace one.
const CSV: Replace = Replace::StartingWith(b"arrival_s,", "a table of requests");

fn inputs<'a>(args: &'a EstimateArgs, source: &'a Source) -> Vec<&'a Path> {
    let trace = match source {
        Source::File(path) => Some(Path::new(path)),
        Source::Poisson(_) => None,
    };
    args.profile.iter().map(Path::new).chain([args.work.model()]).chain(trace).collect()
}

fn heading(args: &EstimateArgs, source: &Source, model: &Model, weights: u64, loads: &[Load]) -> String {
    let load = &args.load;
    let from = match source {
        Source::File(path) => format!("of {path}"),
        Source::Poisson(_) => format!("with Poisson arrivals, seed {}", load.seed),
    };
    let count = match load.disaggregate {
        Some((prefill, decode)) => format!("{prefill} + {decode}"),
        None => load.replicas.to_string(),
    };
    let on = match args.tp.unwrap_or(1) * args.cp.unwrap_or(1) {
        1 if count == "1" => "1 chip".into(),
        1 => format!("{count} chips"),
        each => format!("{count} x {each} chips"),
    };
    let requests = loads.first().map_or(&[][..], |load| &load.requests);
    let mean = |number: fn(&Request) -> u32| {
        requests.iter().map(|request| f64::from(number(request))).sum::<f64>() / requests.len().max(1) as f64
    };
    let cut = loads.first().map_or(0, |load| load.cut);
    let cut = if cut > 0 { format!("; {cut} cut to the context") } else { String::new() };
    format!(
        "{}, {} of weights on {on}; {} requests {from}; on average {:.0} prompt + {:.0} generated tokens{cut}\n\n",
        model.name(),
        bytes(weights),
        requests.len(),
        mean(|request| request.prompt),
        mean(|request| request.generate)
    )
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn three(p: Percentiles) -> String {
    format!("{} / {} / {}", seconds(p.p50), seconds(p.p90), seconds(p.p99))
}

/// The rows of a load: names and values.
fn rows(summary: &Summary) -> [(&'static str, String); 16] {
    let s = summary;
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    let (peak, have) = s.kv_bytes;
    [
        ("to first token", three(s.first_token_s)),
        ("between tokens", three(s.between_s)),
        ("to last token", three(s.total_s)),
        ("requests/s", format!("{:.3}", s.requests_per_s)),
        ("output tokens/s", format!("{:.1}", s.tokens_per_s)),
        ("within SLO", s.good.map_or("-".into(), percent)),
        ("goodput, requests/s", number(s.good.map(|good| good * s.requests_per_s), 3)),
        ("busy", percent(s.busy)),
        ("mean batch", format!("{:.1}", s.batch)),
        ("waiting, mean / most", format!("{:.1} / {}", s.queue.0, s.queue.1)),
        ("preemptions", s.preemptions.to_string()),
        ("prompt tokens reused", percent(s.reused)),
        ("right guesses", s.accepted.map_or("-".into(), percent)),
        ("KV cache, most", format!("{} of {}", bytes(peak), bytes(have))),
        ("J/token, uncalibrated", number(s.joules_per_token.map(|j| j.total()), 3)),
        ("USD/million tokens", number(s.usd_per_million_tokens, 2)),
    ]
}

/// One column per profile.
fn table(answers: &[Answer]) -> String {
    let mut columns: Vec<Vec<(&str, String)>> = Vec::new();
    for Answer { profile, summaries, .. } in answers {
        if let Ok([summary]) = summaries.as_deref() {
            columns
                .push([("p50 / p90 / p99", profile.name.clone())].into_iter().chain(rows(summary)).collect());
        }
    }
    aligned(
        &(0..columns[0].len())
            .map(|row| {
                let name = columns[0][row].0.to_owned();
                [name].into_iter().chain(columns.iter().map(|column| column[row].1.clone())).collect()
            })
            .collect::<Vec<_>>(),
    )
}

/// Lines of cells: the first of each line to the left, the others to the right.
fn aligned(lines: &[Vec<String>]) -> String {
    let count = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| lines.iter().filter_map(|line| line.get(i)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|i| width(i).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let mut out = String::new();
        for (i, (cell, width)) in line.iter().zip(&widths).enumerate() {
            out += &if i == 0 { format!("{cell:width$}") } else { format!("  {cell:>width$}") };
        }
        text += &(out + "\n");
    }
    text
}

/// One line per rate, and the knee.
fn sweep(answer: &Answer, loads: &[Load], slo: Option<Slo>) -> String {
    let Answer { profile, summaries, .. } = answer;
    let Ok(summaries) = summaries else { return String::new() };
    let names = [
        "requests/s",
        "served/s",
        "tokens/s",
        "first p50",
        "first p99",
        "between p50",
        "between p99",
        "busy",
        "batch",
        "waiting",
        "preempted",
        "SLO",
        "USD/M tokens",
    ];
    let mut lines = vec![names.map(String::from).to_vec()];
    for (load, s) in loads.iter().zip(summaries) {
        lines.push(vec![
            load.rate.map_or("-".into(), |rate| rate.to_string()),
            format!("{:.3}", s.requests_per_s),
            format!("{:.1}", s.tokens_per_s),
            seconds(s.first_token_s.p50),
            seconds(s.first_token_s.p99),
            seconds(s.between_s.p50),
            seconds(s.between_s.p99),
            percent(s.busy),
            format!("{:.1}", s.batch),
            format!("{:.1}", s.queue.0),
            s.preemptions.to_string(),
            s.good.map_or("-".into(), percent),
            s.usd_per_million_tokens.map_or("-".into(), |usd| format!("{usd:.2}")),
        ]);
    }
    let rule = match slo {
        Some(_) => format!("{:.0} % of requests are within the SLO", 100.0 * GOOD),
        None => format!("99 % of first tokens come within {SLOWER} times those at the lowest rate"),
    };
    let found = match knee(summaries) {
        None => "below these rates".into(),
        Some(i) if i + 1 == summaries.len() => "at or above the highest of these rates".into(),
        Some(i) => format!("at {} requests/s", loads[i].rate.unwrap_or_default()),
    };
    format!("{}\n{}knee {found}: up to it, {rule}\n\n", profile.name, aligned(&lines))
}

fn as_json(answer: &Answer, loads: &[Load]) -> Value {
    let Answer { profile, summaries, .. } = answer;
    let summaries = match summaries {
        Ok(summaries) => summaries,
        Err(error) => return json!({ "profile": profile.name, "error": error.to_string() }),
    };
    let percentiles = |p: Percentiles| json!({ "p50": p.p50, "p90": p.p90, "p99": p.p99 });
    let one = |(load, s): (&Load, &Summary)| {
        json!({
            "rate_per_s": load.rate,
            "requests": s.requests,
            "cut_to_context": load.cut,
            "seconds": s.seconds,
            "first_token_s": percentiles(s.first_token_s),
            "between_tokens_s": percentiles(s.between_s),
            "total_s": percentiles(s.total_s),
            "requests_per_s": s.requests_per_s,
            "tokens_per_s": s.tokens_per_s,
            "good_fraction": s.good,
            "good_requests_per_s": s.good.map(|good| good * s.requests_per_s),
            "busy_fraction": s.busy,
            "mean_batch": s.batch,
            "mean_waiting": s.queue.0,
            "max_waiting": s.queue.1,
            "preemptions": s.preemptions,
            "reused_fraction": s.reused,
            "right_guesses_fraction": s.accepted,
            "kv_peak_bytes": s.kv_bytes.0,
            "kv_bytes": s.kv_bytes.1,
            "joules_per_token": s.joules_per_token.map(|j| j.total()),
            "joules_per_token_by": s.joules_per_token.map(energy),
            "usd_per_million_tokens": s.usd_per_million_tokens,
        })
    };
    let values: Vec<Value> = loads.iter().zip(summaries).map(one).collect();
    let found = knee(summaries).filter(|_| loads.len() > 1).and_then(|i| loads[i].rate);
    json!({ "profile": profile.name, "repeated": answer.repeated, "loads": values, "knee_per_s": found })
}

//! The page of an estimate: chips side by side, their ops, rooflines, and a layer on the units of a tile.

use std::collections::BTreeMap;

use halite::passes;
use halite::program::Program;
use halite_profiles::profile::Driver;
use halite_sim::estimate::workload::{Choices, Estimate, Workload};
use halite_sim::step::{self, Traced};
use halite_sim::{Busy, Queue, Report};
use serde::Serialize;

use super::{Asked, column, decode_spans, explain, known, number, ops_by_time, seconds};
use crate::{Failure, bytes, plot};

/// Ops of a step that are listed.
const LISTED: usize = 12;
/// Intervals of a queue that are closer than this part of the picture are drawn as one.
const NEAR: f64 = 0.0005;

/// A figure of all chips, as bars.
#[derive(Serialize)]
struct Figure {
    name: &'static str,
    /// Whether longer bars are better.
    is_more_better: bool,
    bars: Vec<Bar>,
}

#[derive(Serialize)]
struct Bar {
    chip: String,
    value: String,
    /// Per cent of the longest bar.
    length: f64,
    /// Where 8 of 10 values lie, in per cent of the longest bar.
    interval: Option<[f64; 2]>,
}

#[derive(Serialize)]
struct Section {
    chip: String,
    summary: String,
    /// What the command prints below its table.
    notes: String,
    prefill: Vec<[String; 8]>,
    decode: Vec<[String; 8]>,
    roofline: String,
    timeline: Option<Timeline>,
}

/// A layer of a decode step on the units of a tile.
#[derive(Serialize)]
struct Timeline {
    segment: String,
    tile: u32,
    ticks: Vec<(f64, String)>,
    ops: Vec<Drawn>,
    lanes: Vec<Lane>,
    /// Per cent of the time in which no unit of the tile works.
    stalled: String,
    whats: Vec<&'static str>,
}

#[derive(Serialize)]
struct Lane {
    name: &'static str,
    /// Per cent of the time in which the tile's unit works, and the mean of all tiles.
    busy: String,
    mean: String,
    drawn: Vec<Drawn>,
}

/// A rectangle: from and length in per cent.
#[derive(Serialize)]
struct Drawn {
    x: f64,
    width: f64,
    /// Number of its colour.
    class: usize,
    title: String,
}

/// Draws the page.
pub fn page(
    heading: &str,
    all: &[Asked],
    (choices, workload, program): (Choices, &Workload, &Program),
) -> Result<String, Failure> {
    let sections = all.iter().map(|asked| section(asked, (choices, workload, program)));
    let sections = sections.collect::<Result<Vec<_>, _>>()?;
    let rows: Vec<Vec<String>> = {
        let columns: Vec<_> = all.iter().map(column).collect();
        let count = columns.first().map_or(0, |column| column.len());
        // Rows that no chip has anything for are left out.
        let says = |row: &usize| columns.iter().any(|column| !matches!(&*column[*row].1, "-" | "0 %" | "1"));
        (1..count)
            .filter(says)
            .map(|row| {
                let name = columns[0][row].0.trim().to_owned();
                std::iter::once(name).chain(columns.iter().map(|column| column[row].1.clone())).collect()
            })
            .collect()
    };
    let names: Vec<&str> = all.iter().map(|asked| &*asked.profile.name).collect();
    let mut environment = minijinja::Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_template("estimate.html", include_str!("../../templates/estimate.html"))?;
    Ok(environment.get_template("estimate.html")?.render(minijinja::context! {
        heading => heading.trim(), names, rows, figures => figures(all), sections,
        bounds => plot::BOUNDS.map(|bound| bound.name()), halite => env!("CARGO_PKG_VERSION"),
    })?)
}

/// What all chips have in common, as bars.
fn figures(all: &[Asked]) -> Vec<Figure> {
    // Its name, whether more is better, the figure, and how it is shown.
    type Kind = (&'static str, bool, fn(&Estimate) -> Option<f64>, fn(f64) -> String);
    let kinds: [Kind; 5] = [
        ("time to first token", false, |e| Some(e.first_token_s), seconds),
        ("decode step", false, |e| Some(e.step_s), seconds),
        ("tokens/s", true, |e| Some(e.tokens_per_s), |v| number(v, 1)),
        ("J/token, uncalibrated", false, |e| Some(e.joules_per_token?.total()), |v| number(v, 3)),
        ("USD/million tokens", false, |e| e.usd_per_million_tokens, |v| number(v, 2)),
    ];
    let running: Vec<(&str, &Estimate)> = all
        .iter()
        .filter_map(|asked| Some((&*asked.profile.name, asked.estimate.as_ref().ok().filter(|e| e.fits())?)))
        .collect();
    let figure = |(name, is_more_better, of, shown): Kind| {
        let interval = |e: &Estimate| e.step_interval_s.filter(|_| name == "decode step");
        let values: Vec<_> =
            running.iter().filter_map(|(chip, e)| Some((chip, of(e)?, interval(e)))).collect();
        let ends =
            values.iter().map(|(_, value, interval)| interval.map_or(*value, |[_, high]| high.max(*value)));
        let longest = ends.fold(f64::MIN_POSITIVE, f64::max);
        let percent = |value: f64| 100.0 * value / longest;
        let bar = |(chip, value, interval): (&&str, f64, Option<[f64; 2]>)| Bar {
            chip: chip.to_string(),
            value: shown(value),
            length: percent(value),
            interval: interval.map(|ends| ends.map(percent)),
        };
        Figure { name, is_more_better, bars: values.into_iter().map(bar).collect() }
    };
    kinds.into_iter().map(figure).filter(|figure| !figure.bars.is_empty()).collect()
}

fn section(
    asked: &Asked,
    (choices, workload, program): (Choices, &Workload, &Program),
) -> Result<Section, Failure> {
    let profile = &asked.profile;
    let estimate = asked.estimate.as_ref().ok();
    let chip = match estimate.filter(|_| profile.driver == Driver::Sim) {
        Some(estimate) => {
            let choices = choices.layout(estimate.layout);
            Some((estimate, workload.chip(choices, profile, program)?))
        }
        None => None,
    };
    let roofline = chip.as_ref().map(|(estimate, chip)| plot::roofline(chip, estimate)).transpose()?;
    let timeline = match &chip {
        // The ops of one chip of several are not those of the program.
        Some((estimate, chip)) if estimate.layout.chips() == 1 => {
            let program = passes::fuse(program, halite_sim::FUSIONS);
            timeline(&step::trace(chip, &program, &decode_spans(workload), true)?)
        }
        _ => None,
    };
    Ok(Section {
        chip: profile.name.clone(),
        summary: profile.summary.clone(),
        // Without the chip's name, which is the heading.
        notes: explain(asked).trim().split_once('\n').map_or(String::new(), |(_, notes)| notes.to_owned()),
        prefill: estimate.map_or_else(Vec::new, |e| rows(&e.prefill)),
        decode: estimate.map_or_else(Vec::new, |e| rows(&e.decode)),
        roofline: roofline.unwrap_or_default(),
        timeline,
    })
}

/// The longest ops of a step.
fn rows(report: &Report) -> Vec<[String; 8]> {
    let total_s = report.total().seconds;
    let row = |op: &&halite_sim::OpReport| {
        let time = &op.time;
        [
            op.name.clone(),
            op.count.to_string(),
            seconds(time.seconds),
            format!("{:.1} %", 100.0 * time.seconds / total_s),
            time.bound().name().to_owned(),
            bytes(time.read_bytes as u64),
            number(time.matrix_ops / 1e9, 3),
            known(time).map_or_else(|| "-".into(), |joules| number(1e3 * joules, 3)),
        ]
    };
    ops_by_time(report).iter().take(LISTED).map(row).collect()
}

/// Draws the segment in the middle of a step: a layer.
fn timeline(traced: &[Traced]) -> Option<Timeline> {
    let segment = traced.get(traced.len() / 2)?.segment.clone();
    let ops: Vec<&Traced> = traced.iter().filter(|op| op.segment == segment).collect();
    let (first_s, last_s) =
        (ops.first()?.start_s, ops.iter().map(|op| op.start_s + op.time.seconds).fold(0.0, f64::max));
    let all_s = last_s - first_s;
    let place =
        |start_s: f64, end_s: f64| (100.0 * (start_s - first_s) / all_s, 100.0 * (end_s - start_s) / all_s);
    let busy: Vec<Busy> = ops
        .iter()
        .flat_map(|op| {
            let shift = |busy: &Busy| Busy {
                start_s: op.start_s + busy.start_s,
                end_s: op.start_s + busy.end_s,
                ..*busy
            };
            op.busy.iter().map(shift)
        })
        .collect();
    // The tile that works longest.
    let mut of_tiles: BTreeMap<u32, [f64; 4]> = BTreeMap::new();
    for busy in &busy {
        of_tiles.entry(busy.tile).or_default()[busy.queue as usize] += busy.end_s - busy.start_s;
    }
    let sum = |each: &[f64; 4]| each.iter().sum::<f64>();
    let (tile, own) = of_tiles.iter().max_by(|a, b| sum(a.1).total_cmp(&sum(b.1)))?;
    let mut whats: Vec<&'static str> = busy.iter().filter(|b| b.tile == *tile).map(|b| b.what).collect();
    whats.sort_unstable();
    whats.dedup();
    let percent = |of_s: f64| format!("{:.0} %", 100.0 * of_s / all_s);
    let lane = |queue: Queue| {
        let at = queue as usize;
        let mean_s = of_tiles.values().map(|each| each[at]).sum::<f64>() / of_tiles.len() as f64;
        let mine = busy.iter().filter(|b| b.tile == *tile && b.queue == queue);
        let mut intervals: Vec<(f64, f64, &'static str)> =
            mine.map(|b| (b.start_s, b.end_s, b.what)).collect();
        intervals.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut drawn: Vec<(f64, f64, &'static str)> = Vec::new();
        for (start_s, end_s, what) in intervals {
            match drawn.last_mut().filter(|last| last.2 == what && start_s - last.1 < NEAR * all_s) {
                Some(last) => last.1 = last.1.max(end_s),
                None => drawn.push((start_s, end_s, what)),
            }
        }
        let draw = |(start_s, end_s, what): (f64, f64, &'static str)| {
            let (x, width) = place(start_s, end_s);
            let class = whats.iter().position(|known| *known == what).unwrap_or(0);
            Drawn { x, width, class, title: format!("{what}, {}", seconds(end_s - start_s)) }
        };
        Lane {
            name: queue.name(),
            busy: percent(own[at]),
            mean: percent(mean_s),
            drawn: drawn.into_iter().map(draw).collect(),
        }
    };
    let lanes = Queue::ALL.map(lane).into();
    let drawn_ops = ops.iter().map(|op| {
        let (x, width) = place(op.start_s, op.start_s + op.time.seconds);
        let bound = op.time.bound();
        let class = plot::BOUNDS.iter().position(|known| *known == bound).unwrap_or(0);
        Drawn {
            x,
            width,
            class,
            title: format!("{}, {}, limited by {}", op.name, seconds(op.time.seconds), bound.name()),
        }
    });
    let tenth = |i: u32| match i {
        0 => (0.0, "0".to_owned()),
        _ => (10.0 * f64::from(i), seconds(all_s * f64::from(i) / 10.0)),
    };
    Some(Timeline {
        segment,
        tile: *tile,
        ticks: (0..=10).step_by(2).map(tenth).collect(),
        ops: drawn_ops.collect(),
        stalled: percent(all_s - union_s(busy.iter().filter(|b| b.tile == *tile))),
        lanes,
        whats,
    })
}

/// Seconds in which at least one interval runs.
fn union_s<'a>(busy: impl Iterator<Item = &'a Busy>) -> f64 {
    let mut intervals: Vec<(f64, f64)> = busy.map(|b| (b.start_s, b.end_s)).collect();
    intervals.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut all_s, mut until_s) = (0.0, f64::NEG_INFINITY);
    for (start_s, end_s) in intervals {
        all_s += (end_s - start_s.max(until_s)).max(0.0);
        until_s = until_s.max(end_s);
    }
    all_s
}

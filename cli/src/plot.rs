//! Plots, as SVG.

use halite_sim::estimate::workload::Estimate;
use halite_sim::{Bound, Chip, Report};
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;

use super::Failure;
use super::profile::scaled;

/// What limits the ops of a chip.
pub const BOUNDS: [Bound; 6] =
    [Bound::Matrix, Bound::Vector, Bound::Memory, Bound::Dma, Bound::Launch, Bound::Latency];

/// Colours of bounds, distinguishable for colour-blind people (Okabe & Ito 2008).
fn colour(bound: Bound) -> RGBColor {
    match bound {
        Bound::Matrix => RGBColor(0, 114, 178),
        Bound::Vector => RGBColor(230, 159, 0),
        Bound::Memory => RGBColor(0, 158, 115),
        Bound::Dma => RGBColor(204, 121, 167),
        Bound::Launch => RGBColor(213, 94, 0),
        Bound::Links => RGBColor(86, 180, 233),
        Bound::Latency => RGBColor(120, 120, 120),
    }
}

/// Draws a roofline plot: the chip's peaks, and the ops of an estimate that multiply, by operations per byte
/// and operations per second. Circles are prefill, squares are decode; the colour shows what limits an op.
pub fn roofline(chip: &Chip, estimate: &Estimate) -> Result<String, Failure> {
    let profile = chip.profile();
    let bandwidth = chip.weights_bytes_per_s();
    let peaks: Vec<(String, f64)> = profile.peaks();
    let best = peaks.iter().map(|(_, peak)| *peak).fold(0.0, f64::max);
    let points = |report: &Report| -> Vec<Point> {
        let total_s = report.total().seconds;
        let multiplies = report.ops.iter().filter(|op| op.time.matrix_ops > 0.0);
        let point = |op: &halite_sim::OpReport| {
            let moved = op.time.read_bytes + op.time.written_bytes;
            let at = (op.time.matrix_ops / moved, op.time.matrix_ops / op.time.seconds);
            // The area is the share of the step's time.
            let radius = 3.0 + 14.0 * (op.time.seconds / total_s).sqrt();
            Point { name: op.name.clone(), at, radius: radius as i32, bound: op.time.bound() }
        };
        multiplies.map(point).collect()
    };
    let (prefill, decode) = (points(&estimate.prefill), points(&estimate.decode));
    let all = || prefill.iter().chain(&decode);
    let least = all().map(|p| p.at.1).fold(best, f64::min) / 3.0;
    let (left, right) = (0.25, 10.0 * best / bandwidth);
    let (width, height) = (1100, 720);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{}: ops under its roofline", profile.name), ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(90)
        .build_cartesian_2d((left..right).log_scale(), (least..2.0 * best).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("operations per byte outside of the tiles")
        .y_desc("operations per second")
        .x_label_formatter(&|x| format!("{x}"))
        .y_label_formatter(&|y| scaled(*y))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    let steps = 200;
    let at = |i: i32| left * (right / left).powf(f64::from(i) / f64::from(steps));
    for (_, peak) in &peaks {
        let line = (0..=steps).map(|i| (at(i), (at(i) * bandwidth).min(*peak)));
        chart.draw_series(LineSeries::new(line, BLACK.mix(0.5)))?;
    }
    chart.draw_series(
        prefill.iter().map(|p| Circle::new(p.at, p.radius, colour(p.bound).mix(0.8).filled())),
    )?;
    let squares = decode.iter().map(|p| {
        let side = [(-p.radius, -p.radius), (p.radius, p.radius)];
        EmptyElement::at(p.at) + Rectangle::new(side, colour(p.bound).mix(0.8).filled())
    });
    chart.draw_series(squares)?;
    let dots: Vec<((i32, i32), &Point)> = all().map(|p| (chart.backend_coord(&p.at), p)).collect();
    let area = [108, 50, width as i32 - 20, height as i32 - 66];
    let mut taken = Taken::new(area, dots.iter().map(|(dot, p)| (*dot, p.radius)));
    for (i, bound) in BOUNDS.into_iter().enumerate() {
        let y = 60 + 18 * i as i32;
        root.draw(&Circle::new((120, y), 5, colour(bound).filled()))?;
        root.draw(&Text::new(bound.name(), (132, y - 7), ("sans-serif", 14)))?;
    }
    let what = "circles: prefill, squares: decode; the area is the share of the time";
    let key_height = 18 * BOUNDS.len() as i32;
    root.draw(&Text::new(what, (120, 60 + key_height), ("sans-serif", 14)))?;
    taken.boxes.push([110, 50, 560, 80 + key_height]);
    let size = |text: &str, pixels: i32| (text.chars().count() as i32 * pixels * 11 / 20, pixels);
    for (name, peak) in &peaks {
        let text = format!("{name}, {}/s", scaled(*peak));
        let (w, h) = size(&text, 13);
        // Along the line, from its right end.
        let (x, y) = chart.backend_coord(&(right, *peak));
        let along = (0..12).flat_map(|i| [-h - 3, 4].map(|dy| (x - w - 8 - 40 * i, y + dy)));
        if let Some(corner) = taken.place(along, (w, h)) {
            root.draw(&Text::new(text, corner, ("sans-serif", 13)))?;
        }
    }
    for (dot, point) in &dots {
        let (w, h) = size(&point.name, 12);
        let Some((x, y)) = taken.place(around(*dot, (w, h)), (w, h)) else { continue };
        // A line to labels that are not beside their point.
        let near = ((x + w / 2 - dot.0).abs() - w / 2).max((y + h / 2 - dot.1).abs() - h / 2);
        if near > point.radius + 10 {
            let end = (dot.0.clamp(x, x + w), dot.1.clamp(y, y + h));
            root.draw(&PathElement::new(vec![*dot, end], BLACK.mix(0.4)))?;
        }
        root.draw(&Text::new(point.name.clone(), (x, y), ("sans-serif", 12)))?;
    }
    root.present()?;
    // The text is complete once the drawing area is dropped.
    drop((chart, root));
    Ok(svg)
}

/// An op in a roofline plot.
struct Point {
    name: String,
    /// Operations per byte, and per second.
    at: (f64, f64),
    /// In pixels.
    radius: i32,
    bound: Bound,
}

/// What an axis shows.
pub struct Axis<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its unit.
    pub unit: &'a str,
    /// Formats a number in its unit.
    pub shown: &'a dyn Fn(f64, &str) -> String,
}

/// The scale of an axis: logarithms if the largest number is many times the smallest.
struct Scale {
    is_log: bool,
    /// Ends, as logarithms if it has them.
    ends: (f64, f64),
    ticks: Vec<f64>,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>) -> Scale {
        let (min, max) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        let is_log = min > 0.0 && max > 5.0 * min;
        let (low, high) = if is_log { (min.log10(), max.log10()) } else { (min, max) };
        let margin = if high > low { 0.06 * (high - low) } else { (0.1 * high.abs()).max(1e-3) };
        let mut scale = Scale { is_log, ends: (low - margin, high + margin), ticks: Vec::new() };
        let (low, high) = scale.ends;
        let ticks: Vec<f64> = if is_log {
            let steps: &[u32] = if high - low > 3.0 { &[1] } else { &[1, 2, 5] };
            // Read from text, so that a tick is the nearest number to a round one.
            let tick = |decade: i32, step: &u32| format!("{step}e{decade}").parse().unwrap_or(f64::NAN);
            let decades = low.floor() as i32..=high.ceil() as i32;
            decades.flat_map(|decade| steps.iter().map(move |step| tick(decade, step))).collect()
        } else {
            let rough = (high - low) / 5.0;
            let decade = 10f64.powf(rough.log10().floor());
            let steps = [1.0, 2.0, 5.0, 10.0].map(|n| n * decade);
            let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(rough);
            (0..8).map(|i| ((low / step).ceil() + f64::from(i)) * step).collect()
        };
        scale.ticks = ticks.into_iter().filter(|tick| (0.0..=1.0).contains(&scale.place(*tick))).collect();
        scale
    }

    /// Returns the place of a number between the ends, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let (low, high) = self.ends;
        ((if self.is_log { value.log10() } else { value }) - low) / (high - low)
    }
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        first + (self.place(*value) * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        let (low, high) = self.ends;
        if self.is_log { 10f64.powf(low)..10f64.powf(high) } else { low..high }
    }
}

impl ValueFormatter<f64> for Scale {}

/// A rectangle in pixels: left, top, right, bottom.
type Box4 = [i32; 4];

/// What labels must not cover, in pixels: points, and the labels before.
struct Taken {
    /// The area of the plot.
    area: Box4,
    boxes: Vec<Box4>,
}

impl Taken {
    /// The area, and points with a radius.
    fn new(area: Box4, points: impl Iterator<Item = ((i32, i32), i32)>) -> Taken {
        Taken { area, boxes: points.map(|((x, y), r)| [x - r, y - r, x + r, y + r]).collect() }
    }

    /// Finds a free place for a text of a size, with its left upper corner at one of `corners`, and takes it.
    fn place(&mut self, corners: impl Iterator<Item = (i32, i32)>, (w, h): (i32, i32)) -> Option<(i32, i32)> {
        let [left, top, right, bottom] = self.area;
        let is_free = |&(x, y): &(i32, i32)| {
            let inside = x > left && y > top && x + w < right && y + h < bottom;
            inside && self.boxes.iter().all(|b| x + w < b[0] || x > b[2] || y + h < b[1] || y > b[3])
        };
        let free = corners.into_iter().find(is_free)?;
        self.boxes.push([free.0, free.1, free.0 + w, free.1 + h]);
        Some(free)
    }
}

/// Places around a point for a text of a size, the nearest first.
fn around((x, y): (i32, i32), (w, h): (i32, i32)) -> impl Iterator<Item = (i32, i32)> {
    [8, 20, 36, 56, 80, 110].into_iter().flat_map(move |gap| {
        let beside =
            [(x + gap, y - h / 2), (x - gap - w, y - h / 2), (x - w / 2, y - gap - h), (x - w / 2, y + gap)];
        let corners =
            [(x + gap, y - gap - h), (x + gap, y + gap), (x - gap - w, y - gap - h), (x - gap - w, y + gap)];
        corners.into_iter().chain(beside)
    })
}

/// Draws a plot of all points, and of the best with their numbers. Numbers without room are left out. `is_joined`: whether a line
/// joins the best.
pub fn pareto(
    axes: [Axis<'_>; 2],
    all: Vec<(f64, f64)>,
    best: &[(f64, f64)],
    is_joined: bool,
) -> Result<String, Failure> {
    const CLOUD: RGBColor = RGBColor(0xb9, 0xc1, 0xca);
    const FRONT: RGBColor = RGBColor(0, 114, 178);
    const LINE: RGBColor = RGBColor(0xd5, 0xda, 0xe0);
    const SOFT: RGBColor = RGBColor(0x5b, 0x65, 0x70);
    // Pixels of a cell of the cloud: points in one look the same.
    const CELL: i32 = 4;
    let [x, y] = axes;
    let (xs, ys) = (Scale::of(all.iter().map(|p| p.0)), Scale::of(all.iter().map(|p| p.1)));
    let (width, height) = (800u32, 480u32);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(96)
        .build_cartesian_2d(xs, ys)?;
    let named = |axis: &Axis<'_>| {
        if axis.unit.is_empty() { axis.name.to_owned() } else { format!("{} [{}]", axis.name, axis.unit) }
    };
    chart
        .configure_mesh()
        .x_desc(named(&x))
        .y_desc(named(&y))
        .x_label_formatter(&|value| (x.shown)(*value, x.unit))
        .y_label_formatter(&|value| (y.shown)(*value, y.unit))
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 15))
        .bold_line_style(LINE)
        .light_line_style(TRANSPARENT)
        .axis_style(SOFT)
        .draw()?;
    let mut seen = std::collections::HashSet::new();
    let cloud = all.iter().filter(|p| {
        let (px, py) = chart.backend_coord(p);
        seen.insert((px / CELL, py / CELL))
    });
    let cloud: Vec<_> = cloud.map(|p| Circle::new(*p, 2, CLOUD.filled())).collect();
    chart.draw_series(cloud)?;
    if is_joined {
        let mut line = best.to_vec();
        line.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(line, FRONT.stroke_width(2)))?;
    }
    chart.draw_series(best.iter().map(|p| Circle::new(*p, 5, FRONT.filled())))?;
    let dots: Vec<(i32, i32)> = best.iter().map(|p| chart.backend_coord(p)).collect();
    let area = [110, 14, width as i32 - 14, height as i32 - 62];
    let mut taken = Taken::new(area, dots.iter().map(|&dot| (dot, 5)));
    for (number, &(px, py)) in (1..).zip(&dots) {
        let text: String = i32::to_string(&number);
        let (w, h) = (9 * text.len() as i32, 14);
        let corners = [(7, -7 - h), (7, 7), (-7 - w, -7 - h), (-7 - w, 7)];
        if let Some(corner) = taken.place(corners.into_iter().map(|(dx, dy)| (px + dx, py + dy)), (w, h)) {
            root.draw(&Text::new(text, corner, ("sans-serif", 14)))?;
        }
    }
    root.present()?;
    // The text is complete once the drawing area is dropped.
    drop((chart, root));
    Ok(svg)
}

//! Plots, as SVG.

use halite_sim::estimate::workload::Estimate;
use halite_sim::{Bound, Chip, Report};
use plotters::prelude::*;

use super::Failure;

/// Colours of bounds, distinguishable for colour-blind people (Okabe & Ito 2008).
fn colour(bound: Bound) -> RGBColor {
    match bound {
        Bound::Matrix => RGBColor(0, 114, 178),
        Bound::Vector => RGBColor(230, 159, 0),
        Bound::Memory => RGBColor(0, 158, 115),
        Bound::Dma => RGBColor(204, 121, 167),
        Bound::Launch => RGBColor(213, 94, 0),
        Bound::Latency => RGBColor(120, 120, 120),
    }
}

/// Draws a roofline plot: the chip's peaks, and the ops of an estimate that multiply, by operations per byte
/// and operations per second. Circles are prefill, squares are decode; the colour shows what limits an op.
pub fn roofline(chip: &Chip, estimate: &Estimate) -> Result<String, Failure> {
    let profile = &chip.profile;
    let bandwidth = chip.device_bytes_per_s();
    let peaks: Vec<(String, f64)> = profile.peaks();
    let best = peaks.iter().map(|(_, peak)| *peak).fold(0.0, f64::max);
    let points = |report: &Report| -> Vec<(String, f64, f64, Bound)> {
        let multiplies = report.ops.iter().filter(|op| op.time.matrix_ops > 0.0);
        let point = |op: &halite_sim::OpReport| {
            let moved = op.time.read_bytes + op.time.written_bytes;
            let (intensity, rate) = (op.time.matrix_ops / moved, op.time.matrix_ops / op.time.seconds);
            (op.name.clone(), intensity, rate, op.time.bound())
        };
        multiplies.map(point).collect()
    };
    let (prefill, decode) = (points(&estimate.prefill), points(&estimate.decode));
    let all = || prefill.iter().chain(&decode);
    let least = all().map(|p| p.2).fold(best, f64::min) / 3.0;
    let (left, right) = (0.25, 10.0 * best / bandwidth);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (1100, 720)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{}: operations per second", profile.name), ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(90)
        .build_cartesian_2d((left..right).log_scale(), (least..2.0 * best).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("operations per byte of device memory")
        .y_desc("operations / s")
        .x_label_formatter(&|x| format!("{x}"))
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    let steps = 200;
    let at = |i: i32| left * (right / left).powf(f64::from(i) / f64::from(steps));
    for (name, peak) in &peaks {
        let line = (0..=steps).map(|i| (at(i), (at(i) * bandwidth).min(*peak)));
        chart.draw_series(LineSeries::new(line, BLACK.mix(0.5)))?;
        let label = Text::new(format!("{name} {peak:.2e}"), (right / 5.0, *peak * 1.2), ("sans-serif", 13));
        chart.draw_series(std::iter::once(label))?;
    }
    chart.draw_series(prefill.iter().map(|p| Circle::new((p.1, p.2), 6, colour(p.3).filled())))?;
    let squares = decode
        .iter()
        .map(|p| EmptyElement::at((p.1, p.2)) + Rectangle::new([(-5, -5), (5, 5)], colour(p.3).filled()));
    chart.draw_series(squares)?;
    let names = all().map(|p| Text::new(p.0.clone(), (p.1 * 1.08, p.2 * 1.04), ("sans-serif", 12)));
    chart.draw_series(names)?;
    let bounds = [Bound::Matrix, Bound::Vector, Bound::Memory, Bound::Dma, Bound::Launch, Bound::Latency];
    for (i, bound) in bounds.into_iter().enumerate() {
        let y = 60 + 18 * i as i32;
        root.draw(&Circle::new((120, y), 5, colour(bound).filled()))?;
        root.draw(&Text::new(bound.name(), (132, y - 7), ("sans-serif", 14)))?;
    }
    let what = "circles: prefill, squares: decode";
    root.draw(&Text::new(what, (120, 60 + 18 * bounds.len() as i32), ("sans-serif", 14)))?;
    root.present()?;
    // The text is complete once the drawing area is dropped.
    drop((chart, root));
    Ok(svg)
}

//! `halite calibrate`: measures a profile of this machine, or fits a chip's profile to measured kernels.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use halite::kernels::formats::Format;
use halite::output::{self, Replace};
use halite_profiles::profile::{Profile, SHIPPED};
use halite_sim::estimate::fit::{self, Fit, Regime, Validation};
use halite_sim::estimate::links::{self, LinkFit};
use halite_sim::estimate::measure::{self, Level, Rates, Sizes};
use halite_sim::estimate::points;

use super::{Failure, interrupt, print, read_text};

#[derive(Args)]
pub struct CalibrateArgs {
    /// Fit a chip's timing model to measured kernels in this CSV instead of measuring this machine. Columns:
    /// `op,activations,weights,seconds`, and `m,n,k` for op `matmul`, `batch,heads,kv_heads,head_dim,kv_len` for
    /// op `attention`, these and `tokens,seen` for op `prefill`, `experts,rows,columns,hidden` for op `experts`. A CSV with
    /// `op,chips,bytes,seconds` has exchanges between chips: op `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, or
    /// `direct_all_reduce` for kernels that may send everything to all.
    #[arg(long, value_name = "CSV", requires = "profile")]
    fit: Vec<PathBuf>,
    /// Profile of the measured chip: a name or a TOML file.
    #[arg(long, value_name = "FILE|NAME", requires = "fit")]
    profile: Option<String>,
    /// Write the profile to this file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Seconds to measure kernels; loading and memory measurement are extra.
    #[arg(long, value_name = "S", default_value_t = 60)]
    seconds: u64,
    /// Thread counts to measure; 0: all cores.
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "1,0")]
    threads: Vec<usize>,
    /// Weight formats to measure.
    #[arg(long, value_name = "FORMAT,…", value_delimiter = ',', default_value = "Q4_0,Q8_0,Q4_K,Q6_K,F16")]
    formats: Vec<String>,
}

pub fn calibrate(args: &CalibrateArgs) -> Result<(), Failure> {
    if let Some(output) = &args.output {
        check(args, output)?;
    }
    let text = match &args.profile {
        Some(profile) => fit_profile(args, profile)?,
        None => measure_machine(args)?,
    };
    let Some(output) = &args.output else { return Ok(()) };
    // Check that the new profile can be read.
    Profile::parse(&output.display().to_string(), &text)?;
    interrupt::write(output, Replace::Unmarked, &inputs(args), text.as_bytes())?;
    print(&format!("wrote {}\n", output.display()))
}

/// The input files.
fn inputs(args: &CalibrateArgs) -> Vec<&Path> {
    args.fit.iter().map(PathBuf::as_path).chain(args.profile.iter().map(Path::new)).collect()
}

/// Checks, before anything is measured, that the output is a new file or a profile.
fn check(args: &CalibrateArgs, output: &Path) -> Result<(), Failure> {
    output::check(output, Replace::Unmarked, &inputs(args))?;
    if output.is_file() && output.metadata().is_ok_and(|m| m.len() > 0) {
        Profile::parse(&output.display().to_string(), &read_text(output)?).map_err(|e| {
            format!("{}: not overwritten: the file exists and is not a profile: {e}", output.display())
        })?;
    }
    Ok(())
}

fn measure_machine(args: &CalibrateArgs) -> Result<String, Failure> {
    let format = |name: &String| {
        let known = || Format::ALL.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
        Format::from_name(name).ok_or_else(|| format!("format `{name}`: expected one of {}", known()))
    };
    let formats = args.formats.iter().map(format).collect::<Result<Vec<_>, _>>()?;
    let levels = measure::levels()?;
    let mut threads: Vec<usize> = Vec::new();
    for &n in &args.threads {
        let n = if n == 0 { halite::kernels::cores::usable() } else { n };
        if !threads.contains(&n) {
            threads.push(n);
        }
    }
    let time = Duration::from_secs(args.seconds);
    let all = measure::measure(&threads, &formats, &levels, &Sizes::default(), time)?;
    for rates in &all {
        print(&machine_report(&levels, rates))?;
    }
    Ok(measure::to_profile("this-machine", &levels, &all)?)
}

fn machine_report(levels: &[Level], rates: &Rates) -> String {
    let mut text =
        format!("{} on {} thread{}\n", rates.isa, rates.threads, if rates.threads == 1 { "" } else { "s" });
    text += "  memory            bytes    latency ns   read GB/s   copy GB/s\n";
    for (level, (read, copy)) in levels.iter().zip(&rates.levels) {
        let (name, bytes, latency) = (&level.name, level.bytes, level.latency_s * 1e9);
        text += &format!("  {name:10} {bytes:12} {latency:13.1} {:11.1} {:11.1}\n", read / 1e9, copy / 1e9);
    }
    text += &format!("  integer dots {:.1} GOP/s", rates.integer_ops_per_s / 1e9);
    text += &format!(", multiply-adds {:.1} GFLOP/s\n", rates.float_ops_per_s / 1e9);
    text += &format!("  an op and its barrier {:.2} us", rates.op_s * 1e6);
    text += &format!(", row ops {:.1} GB/s\n", rates.row_bytes_per_s / 1e9);
    text += &format!("  attention: one token {:.1} GB/s", rates.attend_bytes_per_s / 1e9);
    text += &format!(", 512 tokens {:.1} GFLOP/s\n", rates.attend_ops_per_s / 1e9);
    text += "  products     one token GB/s   512 tokens GOP/s\n";
    for (format, one, many) in &rates.products {
        text += &format!("  {:10} {:16.1} {:18.1}\n", format.name(), one / 1e9, many / 1e9);
    }
    text
}

fn fit_profile(args: &CalibrateArgs, name: &str) -> Result<String, Failure> {
    let profile = Profile::open(name)?;
    let shipped = SHIPPED.iter().find(|(n, _)| *n == name);
    let text = shipped.map_or_else(|| read_text(Path::new(name)), |(_, text)| Ok((*text).to_owned()))?;
    let (mut measured, mut exchanges) = (Vec::new(), Vec::new());
    for path in &args.fit {
        let (origin, text) = (path.display().to_string(), read_text(path)?);
        match links::parse(&origin, &text)? {
            Some(points) => exchanges.extend(points),
            None => measured.extend(points::parse(&origin, &text)?),
        }
    }
    if measured.is_empty() && exchanges.is_empty() {
        return Err("--fit: expected measurements, got none".into());
    }
    let fits = fit::fit(&profile, &measured)?;
    for fit in &fits {
        print(&report(fit))?;
    }
    let links = if exchanges.is_empty() { None } else { Some(links::fit(&profile, &exchanges)?) };
    if let Some(links) = &links {
        print(&links_report(links))?;
    }
    let names: Vec<_> = args.fit.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy()).collect();
    Ok(fit::with_calibration(&text, &fits, links.as_ref(), &names.join(", ")))
}

fn links_report(fit: &LinkFit) -> String {
    let mut text =
        format!("exchanges: fitted to {} points; errors of the numbers of chips in between\n", fit.fitted);
    for (key, value) in &fit.constants {
        text += &format!("  {key:18} {value:.4}\n");
    }
    let (points, mean, worst) = fit.errors();
    text + &format!("  {points} points, mean error {:.1} %, worst {:.1} %\n", 100.0 * mean, 100.0 * worst)
}

fn report(fit: &Fit) -> String {
    let held = match fit.validation {
        Validation::HeldOut => "errors for the third of the shapes that was held out",
        Validation::LeaveOneShapeOut => "errors for each shape, fitted to the others",
    };
    let (op, formats) = (fit.op.name(), fit.formats);
    let mut text = format!(
        "{op}, {} x {}: fitted to {} points; {held}\n",
        formats.activations, formats.weights, fit.fitted
    );
    for (key, value) in &fit.constants {
        text += &format!("  {key:20} {value:.4e}\n");
    }
    text += "  regime      points   mean %   worst %\n";
    for regime in [None].into_iter().chain(Regime::ALL.map(Some)) {
        let (points, mean, worst) = fit.errors(regime);
        let name = regime.map_or("all", Regime::name);
        text += &format!("  {name:10} {points:7} {:8.2} {:9.1}\n", 100.0 * mean, 100.0 * worst);
    }
    let mut worst: Vec<_> = fit.residuals.iter().collect();
    worst.sort_by(|a, b| b.error.abs().total_cmp(&a.error.abs()));
    for residual in worst.iter().take(3) {
        let (point, error) = (residual.point, 100.0 * residual.error);
        text += &format!("  worst: {:?}, {:.4e} s, predicted {error:+.1} %\n", point.kernel, point.seconds);
    }
    text
}

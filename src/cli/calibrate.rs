//! `halite calibrate`.

use std::path::{Path, PathBuf};

use clap::Args;
use halite::estimate::fit::{self, Fit, Regime, Validation};
use halite::estimate::points;
use halite::profile::{Profile, SHIPPED};

use super::{Failure, print, read_text};

#[derive(Args)]
pub struct CalibrateArgs {
    /// Measured kernels, as CSV: `op,m,n,k,activations,weights,seconds` with op `matmul`, or
    /// `op,batch,heads,kv_heads,head_dim,kv_len,activations,weights,seconds` with op `attention`.
    #[arg(long, value_name = "CSV", required = true)]
    fit: Vec<PathBuf>,
    /// The chip that they were measured on: a shipped profile, or a TOML file.
    #[arg(long, value_name = "FILE|NAME", required = true)]
    profile: String,
    /// Where the profile with its constants is written.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub fn calibrate(args: &CalibrateArgs) -> Result<(), Failure> {
    let profile = Profile::open(&args.profile)?;
    let shipped = SHIPPED.iter().find(|(name, _)| *name == args.profile);
    let text =
        shipped.map_or_else(|| read_text(Path::new(&args.profile)), |(_, text)| Ok((*text).to_owned()))?;
    let mut measured = Vec::new();
    for path in &args.fit {
        measured.extend(points::parse(&path.display().to_string(), &read_text(path)?)?);
    }
    let fits = fit::fit(&profile, &measured)?;
    for fit in &fits {
        print(&report(fit))?;
    }
    let Some(output) = &args.output else { return Ok(()) };
    let names: Vec<_> = args.fit.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy()).collect();
    let text = fit::with_calibration(&text, &fits, &names.join(", "));
    // What is written can be read.
    Profile::parse(&output.display().to_string(), &text)?;
    std::fs::write(output, text).map_err(|e| format!("{}: {e}", output.display()))?;
    print(&format!("wrote {}\n", output.display()))
}

fn report(fit: &Fit) -> String {
    let held = match fit.validation {
        Validation::HeldOut => "a third of the shapes held out",
        Validation::LeaveOneShapeOut => "each shape by a fit to the others",
    };
    let (op, formats) = (fit.op.name(), fit.formats);
    let mut text = format!(
        "{op}, {} x {}: fitted to {} points; errors with {held}\n",
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

//! `halite certify`: conformance as an artefact, in JSON, as JUnit XML and as a page.

mod data;
mod models;
mod render;

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use halite::backend::Backend;
use halite::conformance::{self, Case, behaviour};
use halite::output::Replace;

use self::data::{BehaviourRow, CaseRow, Certificate, Device, Summary};
use super::device::DeviceArgs;
use super::machine::{machine, today};
use super::{Failure, interrupt, open_model, print, progress};

#[derive(Args)]
pub struct CertifyArgs {
    #[command(flatten)]
    device: DeviceArgs,
    /// How much to check.
    #[arg(long, value_name = "LEVEL", default_value = "full")]
    level: Level,
    /// Folder for certificate.json, certificate.xml (JUnit) and certificate.html.
    #[arg(short, long, value_name = "FOLDER", default_value = "certificate")]
    out: PathBuf,
    /// Also run this model end to end; may be repeated. The built-in model always runs, except at level smoke.
    #[arg(short, long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// Fail if something passes in this certificate and does not pass now.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Print the JSON schema of certificates, and nothing else.
    #[arg(long, conflicts_with_all = ["level", "out", "model", "compare"])]
    schema: bool,
}

/// How much a certificate covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
    /// One case of each op and format.
    Smoke,
    /// All cases, behaviour, and models end to end.
    Full,
    /// All of that with other data, larger sizes and many repetitions.
    Soak,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Smoke => "smoke",
            Level::Full => "full",
            Level::Soak => "soak",
        }
    }

    fn cases(self) -> Vec<Case> {
        match self {
            Level::Smoke => conformance::representative(),
            Level::Full => conformance::cases(),
            Level::Soak => conformance::cases().into_iter().chain(conformance::larger()).collect(),
        }
    }

    /// Sets of data for each case.
    fn seeds(self) -> u64 {
        if self == Level::Soak { 4 } else { 1 }
    }

    /// Runs of a case that must give the same bits.
    fn repetitions(self) -> usize {
        match self {
            Level::Smoke => 1,
            Level::Full => 5,
            Level::Soak => 50,
        }
    }

    /// The cases with which behaviour is checked.
    fn behaviour_cases(self) -> Vec<Case> {
        match self {
            Level::Smoke => conformance::representative().into_iter().step_by(9).collect(),
            Level::Full => conformance::representative(),
            Level::Soak => conformance::cases(),
        }
    }
}

pub fn certify(args: &CertifyArgs) -> Result<(), Failure> {
    if args.schema {
        return print(&format!("{:#}\n", schemars::schema_for!(Certificate).as_value()));
    }
    let start = Instant::now();
    let backend = args.device.open()?;
    let old = args.compare.as_deref().map(Certificate::read).transpose()?;
    let cases = case_rows(&*backend, args.level);
    let mut behaviours = behaviour_rows(&*backend, args.level);
    let mut models = Vec::new();
    if args.level != Level::Smoke {
        for file in std::iter::once(None).chain(args.model.iter().map(Some)) {
            let model = open_model(file.map(PathBuf::as_path))?;
            models.push(models::check(&model, &backend));
        }
    }
    let memory = models::memory(&open_model(None)?, &backend);
    // Nothing can run afterwards.
    behaviour::check_lost(&*backend, &mut |finding| behaviours.push(BehaviourRow::of(&finding)));
    let certificate = Certificate {
        version: data::VERSION,
        halite: env!("CARGO_PKG_VERSION").into(),
        date: today(),
        level: args.level.name().into(),
        device: Device::of(backend.caps()),
        machine: machine(),
        seconds: start.elapsed().as_secs_f64(),
        summary: Summary::of(&cases, &behaviours, &models),
        cases,
        behaviours,
        models,
        memory,
    };
    write(&certificate, args)?;
    print(&render::text(&certificate))?;
    let regressions = old.map(|old| certificate.regressions(&old)).unwrap_or_default();
    for regression in &regressions {
        print(&format!("REGRESSION {regression}\n"))?;
    }
    match () {
        () if !regressions.is_empty() => Err(format!("{} regressions", regressions.len()).into()),
        () if certificate.summary.broken() => Err("not certified".into()),
        () => Ok(()),
    }
}

fn write(certificate: &Certificate, args: &CertifyArgs) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    let json = serde_json::to_string_pretty(certificate)? + "\n";
    let files = [
        ("certificate.json", json),
        ("certificate.xml", render::junit(certificate)?),
        ("certificate.html", render::html(certificate)?),
    ];
    for (name, text) in files {
        let path = args.out.join(name);
        interrupt::write(&path, Replace::Unmarked, &[], text.as_bytes())?;
    }
    Ok(())
}

/// Runs the cases of a level.
fn case_rows(backend: &dyn Backend, level: Level) -> Vec<CaseRow> {
    let cases = level.cases();
    let bar = progress(cases.len() as u64, "cases");
    let rows = cases.iter().map(|case| {
        let start = Instant::now();
        let mut outcome = conformance::check(backend, case);
        // Other data only where the first passed.
        for seed in 1..level.seeds() {
            let Ok(recording) = case.record(seed) else { break };
            if outcome.passed() {
                outcome = conformance::check_recording(backend, &recording);
            }
        }
        bar.inc(1);
        CaseRow::of(case, &outcome, case.explain(backend), start.elapsed())
    });
    let rows = rows.collect();
    bar.finish_and_clear();
    rows
}

fn behaviour_rows(backend: &dyn Backend, level: Level) -> Vec<BehaviourRow> {
    let mut rows = Vec::new();
    let bar = progress(0, "behaviour");
    behaviour::check_all(backend, &level.behaviour_cases(), level.repetitions(), &mut |finding| {
        bar.tick();
        rows.push(BehaviourRow::of(&finding));
    });
    bar.finish_and_clear();
    rows
}

//! `halite bisect`: finds the op at which two backends part.

use std::path::{Path, PathBuf};

use clap::Args;
use halite::bisect::{self, BisectOptions, Bisection, DumpReport, OpReport};
use halite::output::Replace;
use halite::tokenizer::EncodeOptions;
use serde_json::json;

use super::device::DeviceArgs;
use super::{Failure, ModelArgs, interrupt, plain, plain_json, print, tokenizer};

#[derive(Args)]
pub struct BisectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The backend to compare with.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    against: String,
    /// Compare with what another program, such as llama.cpp, wrote for the same tokens (tests/scripts/llama_dump.cpp).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["against", "prompt", "tokens", "decode", "out", "verbose"])]
    dump: Option<PathBuf>,
    /// Prompt of the first step.
    #[arg(
        short,
        long,
        value_name = "TEXT",
        default_value = "It was the best of times, it was the worst of times"
    )]
    prompt: String,
    /// Token ids of the first step instead of a prompt, comma-separated.
    #[arg(long, value_name = "IDS", conflicts_with = "prompt")]
    tokens: Option<String>,
    /// Steps of one token after the first.
    #[arg(long, value_name = "N", default_value_t = 2)]
    decode: u32,
    /// Write the smallest case that still fails, for `halite conform --replay`.
    #[arg(short, long, value_name = "FILE", default_value = "reproducer.safetensors")]
    out: PathBuf,
    /// Print every op, not only a line per segment.
    #[arg(short, long)]
    verbose: bool,
    /// Print JSON.
    #[arg(long, conflicts_with = "verbose")]
    json: bool,
}

/// Compares with another program's results.
fn against_dump(args: &BisectArgs, file: &Path) -> Result<(), Failure> {
    let model = args.model.open()?;
    let backend = args.model.device.open()?;
    let bytes = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let reports = bisect::against_dump(&model, &backend, &bytes, args.model.program())?;
    let parted = reports.iter().position(|report| report.nmse.is_nan() || report.nmse > report.bound);
    let parted = parted.and_then(|at| Some((at, reports.get(at)?)));
    if args.json {
        let row = |r: &DumpReport| json!({"result": r.result, "dumped": r.dumped, "error": r.nmse, "bound": r.bound, "worst": r.worst});
        let rows: Vec<_> = reports.iter().map(row).collect();
        let part = parted.map(|(_, report)| &report.result);
        print(&plain_json(&json!({"results": rows, "part_at": part})))?;
    } else {
        for r in &reports {
            let worst = format!("[{}, {}]", r.worst[0], r.worst[1]);
            let line = format!("{:28} {:24} error {:>9}, worst {worst}\n", r.result, r.dumped, error(r.nmse));
            print(&plain(&line))?;
        }
    }
    let Some((at, report)) = parted else {
        return print(&format!(
            "the results agree up to rounding (bound {:.0e})\n",
            reports.first().map_or(0.0, |r| r.bound)
        ));
    };
    let before = at.checked_sub(1).and_then(|before| reports.get(before));
    let after = before.map_or("at the first result".into(), |before| format!("after `{}`", before.result));
    Err(format!(
        "the two part {after}: `{}` has an error of {} (bound {:.0e})",
        report.result,
        error(report.nmse),
        report.bound
    )
    .into())
}

pub fn bisect(args: &BisectArgs) -> Result<(), Failure> {
    if args.model.memory.bytes().is_some() {
        return Err("--memory: bisect has no limit on memory; it keeps a model on two backends".into());
    }
    if let Some(file) = &args.dump {
        return against_dump(args, file);
    }
    let model = args.model.open()?;
    let tokens = match &args.tokens {
        Some(ids) => super::tools::parse_ids(ids)?,
        None => tokenizer(model.gguf())?.encode(&args.prompt, EncodeOptions::default()),
    };
    let first = args.model.device.open()?;
    let second = DeviceArgs::named(&args.against).open()?;
    let options = BisectOptions::new(tokens).decode(args.decode).program(args.model.program());
    let mut failed = Ok(());
    let found = bisect::bisect(&model, &first, &second, &options, &mut |op| {
        if args.verbose && failed.is_ok() {
            failed = print(&plain(&line(op)));
        }
    })?;
    failed?;
    if let Some(fault) = &found.fault {
        interrupt::write(&args.out, Replace::Unmarked, &args.model.inputs(), &fault.recording.to_bytes()?)?;
    }
    let names = [&first.caps().name, &second.caps().name].map(String::as_str);
    match args.json {
        true => print(&plain_json(&report(&found, names, args)))?,
        false => print(&plain(&text(&found, names, args)))?,
    }
    match &found.fault {
        Some(fault) => Err(format!("{} in `{}` is wrong", fault.at.op, fault.at.segment).into()),
        None => Ok(()),
    }
}

/// An error for people: bits that are the same have none.
fn error(nmse: f64) -> String {
    if nmse == 0.0 { "same bits".into() } else { format!("{nmse:.1e}") }
}

fn line(op: &OpReport) -> String {
    let bound = op.bound.map_or("same bits".into(), |bound| format!("{bound:.0e}"));
    format!(
        "step {:2} {:12} {:8} {:32} in the run {:>9}, own {:>9}, bound {bound}\n",
        op.step,
        op.segment,
        op.op,
        op.result,
        error(op.in_the_run),
        error(op.own)
    )
}

fn text(found: &Bisection, [first, second]: [&str; 2], args: &BisectArgs) -> String {
    let mut text = String::new();
    if !args.verbose {
        text += &format!("{:8} {:16} {:>14} {:>14}\n", "step", "segment", "in the run", "own, at most");
        let alike = |a: &OpReport, b: &OpReport| (a.step, &a.segment) == (b.step, &b.segment);
        for ops in found.ops.chunk_by(alike) {
            let most = |of: fn(&OpReport) -> f64| ops.iter().map(of).fold(0.0, f64::max);
            let Some(op) = ops.first() else { continue };
            text += &format!(
                "{:<8} {:16} {:>14} {:>14}\n",
                op.step,
                op.segment,
                error(most(|op| op.in_the_run)),
                error(most(|op| op.own))
            );
        }
    }
    let Some(fault) = &found.fault else {
        let largest = found.ops.iter().max_by(|a, b| a.own.total_cmp(&b.own));
        // The logits of the last step.
        let last = found.ops.iter().rfind(|op| op.op == "MatMul");
        let shares = largest.map(|op| {
            format!(
                "the largest error of an op alone is {} ({} of `{}`, bound {})",
                error(op.own),
                op.op,
                op.segment,
                op.bound.map_or("same bits".into(), |bound| format!("{bound:.0e}"))
            )
        });
        text += &format!(
            "{first} and {second} agree op by op: {}.\n",
            shares.unwrap_or_else(|| "nothing was compared".into())
        );
        if let Some(last) = last.filter(|last| last.in_the_run > 0.0) {
            text += &format!(
                "The difference at the end, {} in {}, is explained by rounding: each op, given the inputs of {second}, \
                 stays within its bound, and passes on what its inputs bring.\n",
                error(last.in_the_run),
                last.result
            );
        }
        return text;
    };
    let at = &fault.at;
    text += &format!(
        "\n{} in segment `{}`, step {}, result `{}`, is the first op beyond its bound.\n",
        at.op, at.segment, at.step, at.result
    );
    if let Some(comparison) = &fault.comparison {
        text += &format!("  {first} against {second}, from the same inputs: {comparison}\n");
    }
    if let Some(error) = &fault.error {
        text += &format!("  {first}: {error}\n");
    }
    text += &format!(
        "  By the reference's definition, {} of {first} and {second} is wrong.\n",
        fault.wrong.name()
    );
    if !fault.alone {
        text += "  Alone, from the same inputs, the op is right: in the program, its memory is shared wrongly, or ops run in \
                 the wrong order.\n";
    }
    for line in &fault.shrunk {
        text += &format!("  shrunk to {line}\n");
    }
    text + &format!("  reproducer: {} (halite conform --backend … --replay FILE)\n", args.out.display())
}

fn report(found: &Bisection, [first, second]: [&str; 2], args: &BisectArgs) -> serde_json::Value {
    let op = |op: &OpReport| {
        json!({
            "step": op.step, "segment": op.segment, "op": op.op, "result": op.result,
            "error_in_the_run": op.in_the_run, "own_error": op.own, "bound": op.bound,
        })
    };
    let fault = found.fault.as_ref().map(|fault| {
        json!({
            "at": op(&fault.at),
            "difference": fault.comparison.as_ref().map(ToString::to_string),
            "error": fault.error,
            "alone": fault.alone,
            "wrong": fault.wrong.name(),
            "shrunk": fault.shrunk,
            "reproducer": args.out.display().to_string(),
        })
    });
    json!({
        "first": first, "second": second, "fault": fault,
        "ops": found.ops.iter().map(op).collect::<Vec<_>>(),
    })
}

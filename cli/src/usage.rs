//! `halite usage` and `halite ledger`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use halite_server::ledger::{Amount, By, Durability, Ledger, Usage};
use jiff::civil::Date;

use super::{Failure, plain, plain_json, print};

#[derive(Args)]
pub struct UsageArgs {
    /// The server's ledger.
    #[arg(long, value_name = "FILE")]
    ledger: PathBuf,
    /// Group by these, separated by commas: client, model, day, endpoint, outcome.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "client", value_parser = by)]
    by: Vec<By>,
    /// First day, in UTC [default: the ledger's].
    #[arg(long, value_name = "YYYY-MM-DD")]
    since: Option<Date>,
    /// The day after the last, in UTC [default: the ledger's].
    #[arg(long, value_name = "YYYY-MM-DD")]
    until: Option<Date>,
    /// Print CSV. Times are in microseconds, energy in microjoules, costs in billionths.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Print JSON, in the units of --csv.
    #[arg(long)]
    json: bool,
}

fn by(text: &str) -> Result<By, String> {
    let found = By::ALL.into_iter().find(|by| by.name() == text);
    found.ok_or_else(|| format!("expected one of {}", By::ALL.map(By::name).join(", ")))
}

pub fn usage(args: &UsageArgs) -> Result<(), Failure> {
    let rows = Ledger::open_read_only(&args.ledger)?.usage(&args.by, args.since, args.until)?;
    if args.json {
        return print(&plain_json(&serde_json::to_value(rows)?));
    }
    if args.csv {
        let mut csv = csv::Writer::from_writer(Vec::new());
        for row in &rows {
            csv.serialize(row)?;
        }
        let bytes = csv.into_inner().map_err(|e| e.to_string())?;
        return print(&String::from_utf8(bytes)?);
    }
    print(&table(&rows)?)
}

/// The sums for people, in columns as wide as they need.
fn table(rows: &[Usage]) -> Result<String, Failure> {
    let groups = |row: &Usage| {
        let all = [&row.client, &row.model, &row.day, &row.endpoint, &row.outcome];
        By::ALL
            .map(By::name)
            .into_iter()
            .zip(all.map(Clone::clone))
            .filter_map(|(name, text)| Some((name, text?)))
    };
    let cells = |row: &Usage| {
        let mut cells: Vec<(&str, String)> = groups(row).map(|(name, text)| (name, plain(&text))).collect();
        cells.extend([
            ("requests", row.requests.to_string()),
            ("prompt", row.prompt_tokens.to_string()),
            ("cached", row.cached_tokens.to_string()),
            ("completion", row.completion_tokens.to_string()),
            ("device s", format!("{:.3}", row.device_us as f64 / 1e6)),
            ("energy J", format!("{:.3}", row.energy_uj as f64 / 1e6)),
            ("cost", format!("{} {}", Amount { nano: row.cost_nano }, plain(&row.currency))),
        ]);
        cells
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    let Some(first) = rows.first() else { return Ok("no receipts\n".into()) };
    let names: Vec<String> = first.iter().map(|(name, _)| (*name).to_owned()).collect();
    let texts = rows.iter().map(|row| row.iter().map(|(_, text)| text.clone()).collect());
    let lines: Vec<Vec<String>> = std::iter::once(names).chain(texts).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..first.len()).map(width).collect();
    let mut table = String::new();
    for line in &lines {
        let mut shown = String::new();
        for (text, width) in line.iter().zip(&widths) {
            write!(shown, "{text:<width$}  ")?;
        }
        writeln!(table, "{}", shown.trim_end())?;
    }
    Ok(table)
}

#[derive(Args)]
pub struct LedgerArgs {
    #[command(subcommand)]
    command: LedgerCommand,
}

#[derive(Subcommand)]
enum LedgerCommand {
    /// Check that no entry was changed, and print the last entry's hash.
    Verify {
        /// The server's ledger.
        file: PathBuf,
        /// A hash that this command printed before: an entry must still have it.
        #[arg(long, value_name = "HASH")]
        head: Option<String>,
    },
    /// Remove old entries. Their sums and their last hash remain; their audit events do not.
    Retain {
        /// The server's ledger.
        file: PathBuf,
        /// Whole days to keep.
        #[arg(long, value_name = "N")]
        days: u32,
    },
}

pub fn ledger(args: &LedgerArgs) -> Result<(), Failure> {
    match &args.command {
        LedgerCommand::Verify { file, head } => {
            let verified = Ledger::open_read_only(file)?.verify(head.as_deref())?;
            print(&format!(
                "{} entries, {} to {}, are as they were written\nhead {}\n",
                verified.entries, verified.first_seq, verified.last_seq, verified.head
            ))
        }
        LedgerCommand::Retain { file, days } => {
            // Not a new one where the name is wrong.
            drop(Ledger::open_read_only(file)?);
            let removed = Ledger::open(file, Durability::Full)?.retain(*days)?;
            print(&format!("{removed} entries removed\n"))
        }
    }
}

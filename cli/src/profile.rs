//! `halite profile`.

use std::collections::BTreeMap;

use clap::Args;
use halite_profiles::profile::{Basis, Driver, Profile, SHIPPED};
use halite_sim::{Chip, Numerics};

use super::{Failure, plain, print};

#[derive(Args)]
pub struct ProfileArgs {
    /// Profile name or TOML file [default: list all profiles].
    #[arg(value_name = "FILE|NAME")]
    profile: Option<String>,
    /// List every number with its basis and source.
    #[arg(long)]
    numbers: bool,
    /// Print the JSON Schema of profiles, for editors.
    #[arg(long, conflicts_with_all = ["profile", "numbers"])]
    schema: bool,
}

pub fn profile(args: &ProfileArgs) -> Result<(), Failure> {
    if args.schema {
        return print(&format!("{:#}\n", halite_profiles::profile::schema().as_value()));
    }
    let Some(name) = &args.profile else {
        let mut text = String::new();
        for (name, _) in SHIPPED {
            text += &format!("{name:24} {}\n", Profile::open(name)?.summary);
        }
        return print(&text);
    };
    let profile = Profile::open(name)?;
    let chip = match profile.driver {
        Driver::Sim => Some(Chip::new(profile.clone(), Numerics::Exact, None)?),
        Driver::Cpu | Driver::Gpu => None,
    };
    let unused: BTreeMap<&str, &str> = chip.iter().flat_map(Chip::without_effect).collect();
    let mut text = format!("{} ({})\n{}\n", profile.name, profile.vendor, profile.summary);
    text += &format!(
        "\n{} tile{} in {} cluster{} at {}Hz, driver {}\n",
        profile.tiles(),
        plural(profile.tiles()),
        profile.chip.clusters.value,
        plural(profile.chip.clusters.value),
        scaled(profile.chip.clock_hz.value),
        profile.driver.name()
    );
    text += "\nmemory                capacity     total read rate\n";
    for memory in &profile.memory {
        text += &format!(
            "  {:14} {:>12}B {:>16}B/s\n",
            memory.name,
            scaled(memory.capacity_bytes.value),
            scaled(profile.read_bytes_per_s(memory))
        );
    }
    text += &format!("\n{:30} {:>14}", "peak", "ops/s");
    for memory in &profile.memory {
        text += &format!(" {:>14}", memory.name);
    }
    text += "   (ridge points, ops/byte)\n";
    for (name, ops_per_s) in profile.peaks() {
        text += &format!("  {name:28} {:>14}", scaled(ops_per_s));
        for memory in &profile.memory {
            text += &format!(" {:>14.2}", ops_per_s / profile.read_bytes_per_s(memory));
        }
        text += "\n";
    }
    let total = profile.quantities.len().max(1);
    let shares = Basis::ALL.map(|basis| {
        let count = profile.quantities.iter().filter(|(_, q)| q.basis == basis).count();
        format!("{count} {} ({:.0} %)", basis.name(), 100.0 * count as f64 / total as f64)
    });
    text += &format!("\n{total} numbers: {}\n", shares.join(", "));
    if chip.is_some() {
        text += &format!("{} of them change no time and no energy; --numbers says why\n", unused.len());
    }
    if args.numbers {
        text += "\n";
        for (path, quantity) in &profile.quantities {
            let source = profile.sources.get(&quantity.source).unwrap_or(&quantity.source);
            let unused = unused.get(&**path).map_or(String::new(), |why| format!(", no effect: {why}"));
            text += &format!("{path} = {:?} [{}: {source}]{unused}\n", quantity.value, quantity.basis.name());
        }
    }
    print(&plain(&text))
}

/// The ending of a noun after a number.
fn plural(n: f64) -> &'static str {
    if n == 1.0 { "" } else { "s" }
}

/// Formats a number with at most three decimals and a decimal prefix.
pub fn scaled(value: f64) -> String {
    let (divisor, prefix) = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]
        .into_iter()
        .find(|(divisor, _)| value >= *divisor)
        .unwrap_or((1.0, ""));
    // At most three decimals, so that 0.512 and 1.43 are printed as the profile has them.
    let digits = format!("{:.3}", value / divisor);
    format!("{} {prefix}", digits.trim_end_matches('0').trim_end_matches('.'))
}

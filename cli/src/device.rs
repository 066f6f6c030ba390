//! The arguments `--backend` and the options of backends, from the table of drivers.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use halite::backend::Backend;
use halite::backend::driver::{self, Driver, DriverOption, Options, Value};
use halite::backend::hybrid::{Hybrid, Placement};
use halite::program::Program;

use super::{Failure, say};

/// The table of drivers that was passed to [`super::main`].
static DRIVERS: OnceLock<Vec<Driver>> = OnceLock::new();

/// The open backends that report at the end of the command.
static REPORTING: Mutex<Vec<Arc<dyn Backend>>> = Mutex::new(Vec::new());

/// Says what backends report at the end of a command.
pub fn say_reports() {
    let backends = std::mem::take(&mut *REPORTING.lock().unwrap_or_else(PoisonError::into_inner));
    backends.iter().flat_map(|backend| backend.report()).for_each(|line| say(&line));
}

/// Sets the table of drivers, once.
pub fn set_drivers(drivers: &[Driver]) {
    DRIVERS.get_or_init(|| drivers.to_vec());
}

/// The table of drivers.
pub fn drivers() -> &'static [Driver] {
    DRIVERS.get().map_or(&[], Vec::as_slice)
}

/// A backend and its options.
#[derive(Clone, Default)]
pub struct DeviceArgs {
    backend: String,
    options: Options,
    /// The backend that runs what the first one lacks.
    fill_gaps: Option<String>,
    /// Both, once they are open.
    hybrid: OnceLock<Arc<Hybrid>>,
}

impl DeviceArgs {
    /// A backend by name, without options.
    pub fn named(name: &str) -> DeviceArgs {
        DeviceArgs { backend: name.into(), ..DeviceArgs::default() }
    }

    /// The same with `threads` threads; 0 leaves the choice to the backend.
    pub fn on_threads(&self, threads: usize) -> DeviceArgs {
        let mut args = self.clone();
        if threads > 0 {
            args.options.set("threads", threads.to_string());
        }
        args
    }

    pub fn open(&self) -> Result<Arc<dyn Backend>, Failure> {
        let backend = self.open_quietly()?;
        // Keep only those with a report: others free their threads and memory when they are dropped.
        if !backend.report().is_empty() {
            REPORTING.lock().unwrap_or_else(PoisonError::into_inner).push(backend.clone());
        }
        Ok(backend)
    }

    fn open_quietly(&self) -> Result<Arc<dyn Backend>, Failure> {
        let Some(other) = &self.fill_gaps else {
            return Ok(driver::open(drivers(), &self.backend, &self.options)?);
        };
        // Each takes the options that it has.
        let [mine, others] = [&self.backend, other].map(|name| {
            let driver = driver::find(drivers(), name).map(|(driver, _)| driver);
            self.options.only(|option| driver.as_ref().is_ok_and(|driver| driver.has_option(option)))
        });
        let mine = driver::open(drivers(), &self.backend, &mine)?;
        let hybrid = Arc::new(Hybrid::new(mine, driver::open(drivers(), other, &others)?));
        Ok(self.hybrid.get_or_init(|| hybrid).clone())
    }

    /// Under `--fill-gaps`, says which op of a program runs where.
    pub fn report_placement(&self, program: &Program) {
        let Some(hybrid) = self.hybrid.get() else { return };
        placements(program, &hybrid.placement(program)).iter().for_each(|line| say(line));
    }

    /// The backend's name on the command line.
    pub fn name(&self) -> &str {
        &self.backend
    }

    /// The file in the backend's name, if there is one.
    pub fn file(&self) -> Option<&Path> {
        let (driver, argument) = driver::find(drivers(), &self.backend).ok()?;
        driver.argument.filter(|it| it.is_file && !argument.is_empty()).map(|_| Path::new(argument))
    }
}

/// Describes where ops run: a line for each op, and consecutive segments whose ops are alike once.
fn placements(program: &Program, placed: &[Placement]) -> Vec<String> {
    let name = |segment: usize| program.segments.get(segment).map_or("", |s| &s.name).to_owned();
    let segments: Vec<&[Placement]> = placed.chunk_by(|a, b| a.segment == b.segment).collect();
    let line = |p: &Placement| {
        let gap = p.gap.as_ref().map(|gap| format!(" ({gap})")).unwrap_or_default();
        let copied = match p.copied_bytes_per_token {
            0 => String::new(),
            bytes => format!("; {bytes} bytes per token cross"),
        };
        format!("{} on {}{gap}{copied}", p.op, p.device)
    };
    let mut lines = vec!["placement:".to_owned()];
    for alike in segments.chunk_by(|a, b| a.iter().map(line).eq(b.iter().map(line))) {
        let ends = [alike.first(), alike.last()].map(|s| s.and_then(|s| s.first()).map_or(0, |p| p.segment));
        let [first, last] = ends.map(name);
        lines.push(match alike.len() {
            1 => format!("  {first}"),
            n => format!("  {first} to {last} ({n} alike)"),
        });
        lines.extend(alike.first().into_iter().flat_map(|s| s.iter()).map(|p| format!("    {}", line(p))));
    }
    let all: u64 = placed.iter().map(|p| p.copied_bytes_per_token).sum();
    let filled = placed.iter().filter(|p| p.gap.is_some()).count();
    lines.push(format!("  {filled} of {} ops fill gaps; {all} bytes per token cross", placed.len()));
    lines
}

/// The options of all drivers, without duplicates.
fn options() -> Vec<DriverOption> {
    let mut all: Vec<DriverOption> = Vec::new();
    for option in drivers().iter().flat_map(|driver| driver.options) {
        if !all.iter().any(|known| known.name == option.name) {
            all.push(*option);
        }
    }
    all
}

/// The id of a driver's option among all arguments of a command.
fn id(option: &DriverOption) -> String {
    format!("backend.{}", option.name)
}

fn argument(option: &DriverOption) -> Arg {
    let arg = Arg::new(id(option)).long(option.name).help(option.help);
    match option.value {
        Value::Flag => arg.action(ArgAction::SetTrue),
        Value::Number(name) => arg.value_name(name).value_parser(clap::value_parser!(u64)),
        Value::Path(name) => arg.value_name(name).value_parser(clap::value_parser!(PathBuf)),
        Value::OneOf(name, values) => {
            let arg = arg.value_name(name).value_parser(values.to_vec());
            match values.first() {
                Some(first) => arg.default_value(first),
                None => arg,
            }
        }
        Value::Text(name) => arg.value_name(name),
        // A type that this command does not know is a text for it.
        _ => arg,
    }
}

impl Args for DeviceArgs {
    fn augment_args(command: Command) -> Command {
        let described = |driver: &Driver| match driver.help {
            "" => driver.spelling(),
            help => format!("{} ({help})", driver.spelling()),
        };
        let backend = Arg::new("backend")
            .long("backend")
            .value_name("NAME")
            .help(driver::or(drivers().iter().map(described)));
        let backend = match drivers().first() {
            Some(first) => backend.default_value(first.name),
            None => backend.required(true),
        };
        let fill_gaps = Arg::new("fill-gaps")
            .long("fill-gaps")
            .value_name("NAME")
            .help("Run ops that the backend lacks on this one, and say which (for bring-up)");
        let command = command.arg(backend).arg(fill_gaps);
        // Skip options whose name the command uses itself.
        let taken = |command: &Command, name| command.get_arguments().any(|a| a.get_long() == Some(name));
        options().iter().fold(command, |command, option| match taken(&command, option.name) {
            true => command,
            false => command.arg(argument(option)),
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        DeviceArgs::augment_args(command)
    }
}

impl FromArgMatches for DeviceArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<DeviceArgs, clap::Error> {
        let mut args = DeviceArgs::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        if let Some(name) = matches.get_one::<String>("backend") {
            self.backend.clone_from(name);
        }
        if let Some(name) = matches.get_one::<String>("fill-gaps") {
            self.fill_gaps = Some(name.clone());
        }
        for option in options() {
            let id = id(&option);
            // The option is unknown if the command has one of the same name.
            let Ok(Some(mut raw)) = matches.try_get_raw(&id) else { continue };
            if matches.value_source(&id) == Some(ValueSource::CommandLine) {
                self.options.set(option.name, raw.next().unwrap_or_default());
            }
        }
        Ok(())
    }
}

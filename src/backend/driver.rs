//! Backends by name, so that a program can offer backends that it does not know.
//!
//! A [`Driver`] describes a backend as data: its name, its options, and how to open it. A program has one
//! table of drivers; its help texts, its list of devices and its error messages come from that table.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use super::{Backend, Caps, Contract};
use crate::error::{Error, Result};

/// A backend that can be opened by name.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Driver {
    /// Name. A colon and an argument may follow it, as in `gpu:1`.
    pub name: &'static str,
    /// The argument, if the driver takes one.
    pub argument: Option<Argument>,
    /// A line for help texts: the devices and their names. May be empty.
    pub help: &'static str,
    /// The options that [`Driver::open`] reads.
    pub options: &'static [DriverOption],
    /// Opens the backend; `argument` is the text after the colon, or empty.
    pub open: Open,
    /// Lists the devices of this machine that the backend can open.
    pub list: List,
}

/// The argument of a driver's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Argument {
    /// Placeholder in help texts, as in `sim:PROFILE`.
    pub name: &'static str,
    /// Whether the argument is required.
    pub required: bool,
    /// Whether the argument may be the path of a file that the backend reads.
    pub is_file: bool,
}

/// An option of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DriverOption {
    /// Name, in lower case, with dashes between words.
    pub name: &'static str,
    /// Type of its value.
    pub value: Value,
    /// A line for help texts, without a full stop.
    pub help: &'static str,
}

/// How a driver opens a backend; see [`Driver::open`].
pub type Open = fn(argument: &str, options: &Options) -> Result<Arc<dyn Backend>>;

/// How a driver lists the devices of this machine.
pub type List = fn() -> Result<Vec<Listed>>;

impl Argument {
    /// An argument that a name may have, as in `gpu` and `gpu:NAME`.
    pub const fn optional(name: &'static str) -> Argument {
        Argument { name, required: false, is_file: false }
    }

    /// An argument that a name must have, as in `sim:PROFILE`.
    pub const fn required(name: &'static str) -> Argument {
        Argument { name, required: true, is_file: false }
    }
}

crate::setters!(const Argument { is_file: bool });

impl DriverOption {
    /// An option with a line for help texts.
    pub const fn new(name: &'static str, value: Value, help: &'static str) -> DriverOption {
        DriverOption { name, value, help }
    }
}

/// The type of an option's value, with its placeholder in help texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// No value: the option is given or not.
    Flag,
    /// A whole number.
    Number(&'static str),
    /// Any text.
    Text(&'static str),
    /// A path.
    Path(&'static str),
    /// One of these texts; the first is the default.
    OneOf(&'static str, &'static [&'static str]),
}

/// Given options, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    given: Vec<(String, OsString)>,
}

impl Options {
    /// Sets an option; the value of a flag is ignored.
    pub fn set(&mut self, name: &str, value: impl Into<OsString>) {
        let value = value.into();
        match self.given.iter_mut().find(|(given, _)| given == name) {
            Some((_, old)) => *old = value,
            None => self.given.push((name.into(), value)),
        }
    }

    /// Sets the options of a list, as in `threads=2,exact`; a flag has no value.
    pub fn set_list(&mut self, list: &str) {
        for option in list.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            self.set(name, value);
        }
    }

    /// Whether an option was given.
    pub fn is_set(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// Returns the value of an option, if given.
    pub fn value(&self, name: &str) -> Option<&OsStr> {
        self.given.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_os_str())
    }

    /// Returns the value of an option as a path.
    pub fn path(&self, name: &str) -> Option<&Path> {
        self.value(name).map(Path::new)
    }

    /// Returns the value of an option as text.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not Unicode.
    pub fn text(&self, name: &str) -> Result<Option<&str>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let text = value.to_str().ok_or_else(|| wrong(name, "Unicode", value))?;
        Ok(Some(text))
    }

    /// Returns the value of an option as a number.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not a number.
    pub fn number(&self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let number = value.to_str().and_then(|text| text.parse().ok());
        number.map(Some).ok_or_else(|| wrong(name, "a whole number", value))
    }

    /// Returns the options whose name is accepted.
    pub fn only(&self, accept: impl Fn(&str) -> bool) -> Options {
        Options { given: self.given.iter().filter(|(name, _)| accept(name)).cloned().collect() }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.given.iter().map(|(name, _)| name.as_str())
    }
}

fn wrong(name: &str, expected: &str, got: &OsStr) -> Error {
    Error::argument("backend option", format!("{expected} for --{name}"), format!("`{}`", got.display()))
}

/// A device that a driver can open.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// Name that opens it: the driver's name, with an argument if needed.
    pub name: String,
    /// Description, for people.
    pub device: String,
    /// Bytes of memory available to buffers, if known; `u64::MAX`: no limit.
    pub memory_bytes: Option<u64>,
    /// Guarantee about results, if it does not depend on options.
    pub contract: Option<Contract>,
    /// More facts for people: names and values.
    pub facts: Vec<(String, String)>,
}

impl Listed {
    /// A device by name and description.
    pub fn new(name: impl Into<String>, device: impl Into<String>) -> Listed {
        Listed {
            name: name.into(),
            device: device.into(),
            memory_bytes: None,
            contract: None,
            facts: Vec::new(),
        }
    }

    /// Describes a device that the driver's name alone opens.
    pub fn of(caps: &Caps) -> Listed {
        Listed::new(&caps.name, &caps.device).memory_bytes(caps.memory_bytes).contract(caps.contract)
    }
}

crate::setters!(Listed {
    memory_bytes: impl Into<Option<u64>>,
    contract: impl Into<Option<Contract>>,
    facts: Vec<(String, String)>,
});

crate::setters!(const Driver {
    argument: Option<Argument>,
    help: &'static str,
    options: &'static [DriverOption],
    list: List,
});

impl Driver {
    /// A driver that takes no argument and no options, and lists no devices.
    pub const fn new(name: &'static str, open: Open) -> Driver {
        Driver { name, argument: None, help: "", options: &[], open, list: || Ok(Vec::new()) }
    }

    /// Returns the name with a required argument, for lists of choices: `gpu` or `sim:PROFILE`.
    pub fn spelling(&self) -> String {
        match self.argument {
            Some(Argument { name, required: true, .. }) => format!("{}:{name}", self.name),
            _ => self.name.into(),
        }
    }

    /// Returns the argument in `name`, or `None` if `name` is another driver's.
    pub fn argument_in<'a>(&self, name: &'a str) -> Option<&'a str> {
        let rest = name.strip_prefix(self.name)?;
        match (rest.strip_prefix(':'), self.argument) {
            (None, Some(Argument { required: true, .. })) => None,
            (None, _) if rest.is_empty() => Some(rest),
            (Some(argument), Some(_)) => Some(argument),
            _ => None,
        }
    }

    /// Whether the driver has an option.
    pub fn has_option(&self, name: &str) -> bool {
        self.options.iter().any(|option| option.name == name)
    }
}

/// Finds the driver of a name, and returns it with the argument in the name.
///
/// # Errors
/// [`Error::Backend`] with a list of all drivers, if none has that name.
pub fn find<'d, 'n>(drivers: &'d [Driver], name: &'n str) -> Result<(&'d Driver, &'n str)> {
    let found = drivers.iter().find_map(|driver| Some((driver, driver.argument_in(name)?)));
    found.ok_or_else(|| Error::Backend {
        backend: name.into(),
        message: format!(
            "no such backend; expected {}, of which `halite devices` lists those of this machine",
            or(drivers.iter().map(Driver::spelling))
        ),
    })
}

/// Splits `cpu:threads=2` into a name and a list of options, for [`Options::set_list`]. The list is empty
/// unless the driver takes no argument, which would have that place.
pub fn split_options<'n>(drivers: &[Driver], name: &'n str) -> (&'n str, &'n str) {
    let (driver_name, list) = name.split_once(':').unwrap_or((name, ""));
    let is_plain = drivers.iter().any(|driver| driver.name == driver_name && driver.argument.is_none());
    if is_plain && !list.is_empty() { (driver_name, list) } else { (name, "") }
}

/// Checks a name and options as far as that goes without opening the backend. Whether its device is there now, only [`open`] knows.
///
/// # Errors
/// As [`find`]; [`Error::Backend`] for an option that the driver does not have, and for an argument that is neither a name that the
/// driver lists nor a file; [`Error::Argument`] for a value of the wrong type.
pub fn check(drivers: &[Driver], name: &str, options: &Options) -> Result<()> {
    let (driver, argument) = check_options(drivers, name, options)?;
    for option in driver.options {
        match (option.value, options.value(option.name)) {
            (Value::Number(_), Some(_)) => options.number(option.name).map(drop)?,
            (Value::OneOf(_, known), Some(value)) if !known.iter().any(|known| *known == value) => {
                return Err(wrong(option.name, &or(known.iter().map(|known| (*known).into())), value));
            }
            _ => {}
        }
    }
    // Names that must be given are the driver's own. Others may be those of devices that are not there now.
    if let Some(Argument { required: true, is_file: true, .. }) = driver.argument
        && !Path::new(argument).exists()
    {
        let listed: Vec<String> = (driver.list)()?.into_iter().map(|listed| listed.name).collect();
        if !listed.is_empty() && !listed.iter().any(|listed| listed == name) {
            let message = format!("expected a file after the colon, or one of {}", listed.join(", "));
            return Err(Error::Backend { backend: name.into(), message });
        }
    }
    Ok(())
}

/// Opens the backend of a name, as in `gpu:1`.
///
/// # Errors
/// As [`find`]; [`Error::Backend`] for an option that the driver does not have; errors of opening it.
pub fn open(drivers: &[Driver], name: &str, options: &Options) -> Result<Arc<dyn Backend>> {
    let (driver, argument) = check_options(drivers, name, options)?;
    (driver.open)(argument, options)
}

/// As [`find`], and checks the names of options.
fn check_options<'d, 'n>(
    drivers: &'d [Driver],
    name: &'n str,
    options: &Options,
) -> Result<(&'d Driver, &'n str)> {
    let (driver, argument) = find(drivers, name)?;
    if let Some(unknown) = options.names().find(|option| !driver.has_option(option)) {
        let others = drivers.iter().filter(|driver| driver.has_option(unknown));
        let others: Vec<_> = others.map(|driver| driver.name).collect();
        let own: Vec<_> = driver.options.iter().map(|option| format!("--{}", option.name)).collect();
        let hint = match (others.as_slice(), own.as_slice()) {
            ([], []) => "; it has none".into(),
            ([], own) => format!("; it has {}", own.join(", ")),
            (others, _) => format!("; it is an option of {}", others.join(", ")),
        };
        return Err(Error::Backend {
            backend: name.into(),
            message: format!("has no option --{unknown}{hint}"),
        });
    }
    Ok((driver, argument))
}

/// Joins choices, as in `a, b or c`.
pub fn or(choices: impl Iterator<Item = String>) -> String {
    let choices: Vec<String> = choices.collect();
    match choices.as_slice() {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => choices.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{cpu, reference, template};

    /// Options may follow the name of a driver whose name has no argument; those that are set later count.
    #[test]
    fn options_in_a_name() {
        assert_eq!(split_options(DRIVERS, "cpu:threads=2,x"), ("cpu", "threads=2,x"));
        for name in ["cpu", "cpu:", "chip:2", "file:a,b=c", "unknown:x=1"] {
            assert_eq!(split_options(DRIVERS, name), (name, ""));
        }
        let mut options = Options::default();
        options.set_list("threads=2,,exact,");
        options.set_list("threads=3");
        assert_eq!(options.number("threads").unwrap(), Some(3));
        assert!(options.is_set("exact") && !options.is_set(""));
    }

    const DRIVERS: &[Driver] = &[
        cpu::DRIVER,
        reference::DRIVER,
        Driver::new("chip", template::DRIVER.open).argument(Some(Argument::optional("SLOT"))),
        Driver::new("file", template::DRIVER.open).argument(Some(Argument::required("FILE").is_file(true))),
    ];

    #[test]
    fn names_and_arguments_are_found() {
        let found = |name| find(DRIVERS, name).map(|(driver, argument)| (driver.name, argument));
        assert_eq!(found("cpu").unwrap(), ("cpu", ""));
        assert_eq!(found("chip").unwrap(), ("chip", ""));
        assert_eq!(found("chip:a:b").unwrap(), ("chip", "a:b"));
        assert_eq!(found("file:").unwrap(), ("file", ""));
        for name in ["", "cpu:1", "chips", "file", "tpu"] {
            let error = found(name).unwrap_err().to_string();
            assert_eq!(
                error,
                format!(
                    "backend `{name}`: no such backend; expected cpu, reference, chip or file:FILE, \
                     of which `halite devices` lists those of this machine"
                )
            );
        }
    }

    #[test]
    fn an_option_of_another_backend_is_an_error_that_names_both() {
        let mut options = Options::default();
        options.set("threads", "1");
        assert_eq!(open(DRIVERS, "cpu", &options).unwrap().caps().name, "cpu");
        let error = open(DRIVERS, "chip", &options).err().unwrap().to_string();
        assert_eq!(error, "backend `chip`: has no option --threads; it is an option of cpu");
        options.set("threads", "many");
        let error = open(DRIVERS, "cpu", &options).err().unwrap().to_string();
        assert_eq!(error, "backend option: expected a whole number for --threads, got `many`");
    }

    /// Names are checked without opening anything.
    #[test]
    fn what_is_misspelt_is_found_before_it_is_opened() {
        const DRIVERS: &[Driver] = &[
            Driver::new("cpu", |_, _| panic!("opened")).options(cpu::DRIVER.options),
            Driver::new("gpu", |_, _| panic!("opened")).argument(Some(Argument::optional("NAME"))),
            Driver::new("sim", |_, _| panic!("opened"))
                .argument(Some(Argument::required("PROFILE").is_file(true)))
                .options(&[DriverOption::new("mode", Value::OneOf("MODE", &["exact", "native"]), "")])
                .list(|| Ok(vec![Listed::new("sim:a", ""), Listed::new("sim:b", "")])),
            Driver::new("plugin", |_, _| panic!("opened"))
                .argument(Some(Argument::required("FILE").is_file(true))),
        ];
        let checked = |name: &str, options: &str| {
            let mut given = Options::default();
            given.set_list(options);
            check(DRIVERS, name, &given).map_err(|error| error.to_string())
        };
        for (name, options) in [
            ("cpu", "threads=4"),
            // It may be plugged in later.
            ("gpu:7", ""),
            ("sim:a", "mode=native"),
            (concat!("sim:", env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), ""),
            ("plugin:libchip.so:x", ""),
        ] {
            assert_eq!(checked(name, options), Ok(()), "{name} {options}");
        }
        for (name, options, want) in [
            ("spu", "", "no such backend; expected cpu, gpu, sim:PROFILE or plugin:FILE"),
            ("sim:c", "", "expected a file after the colon, or one of sim:a, sim:b"),
            ("cpu", "thread=4", "has no option --thread; it has --threads"),
            ("gpu", "thread=4", "has no option --thread; it has none"),
            ("cpu", "threads=four", "expected a whole number for --threads, got `four`"),
            ("sim:a", "mode=exactly", "expected exact or native for --mode, got `exactly`"),
        ] {
            let error = checked(name, options).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}

//! `halite keys`.

use clap::{Args, Subcommand};
use halite_server::access::{ClientConfig, Key};

use super::{Failure, print, say};

#[derive(Args)]
pub struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Subcommand)]
enum KeysCommand {
    /// Make a key for a client of `halite serve`. It is shown once, on stderr; the lines on stdout, for the file of clients, have its
    /// SHA-256.
    New {
        /// The client's name.
        #[arg(long, value_name = "NAME")]
        client: String,
    },
}

pub fn keys(args: &KeysArgs) -> Result<(), Failure> {
    let KeysCommand::New { client } = &args.command;
    ClientConfig { name: client.clone(), ..ClientConfig::default() }.check()?;
    let key = Key::new()?;
    // Apart from the lines for the file, which has no place for it.
    say("The key, for the client:");
    say(&key.secret);
    // A text of JSON is one of TOML, too.
    let name = serde_json::to_string(client)?;
    print(&format!("[[client]]\nname = {name}\nkey_sha256 = [\"{}\"]\n", key.sha256))
}

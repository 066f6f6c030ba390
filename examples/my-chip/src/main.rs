//! The command `halite` with one more backend.

fn main() -> std::process::ExitCode {
    halite_cli::main(&[halite::backend::cpu::DRIVER, my_chip::DRIVER])
}

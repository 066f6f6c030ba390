//! The `halite` command.

fn main() -> std::process::ExitCode {
    halite_cli::main(&[
        halite::backend::cpu::DRIVER,
        halite::backend::reference::DRIVER,
        halite::backend::template::DRIVER,
        #[cfg(feature = "gpu")]
        halite_gpu::DRIVER,
        #[cfg(feature = "plugin")]
        halite_plugin::DRIVER,
        #[cfg(feature = "sim")]
        halite_sim::DRIVER,
    ])
}

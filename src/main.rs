//! The binary: arguments to one subcommand to one message and exit code.

fn main() -> std::process::ExitCode {
    preface::cli::main()
}

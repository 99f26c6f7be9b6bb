//! The binary: arguments to one subcommand to one message and exit code.

fn main() -> std::process::ExitCode {
    let path = std::env::args().skip_while(|argument| argument != "--config").nth(1);
    let path = path.unwrap_or_else(|| "/etc/preface/preface.toml".to_owned());
    match preface::server::run(path.into()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

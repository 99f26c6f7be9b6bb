//! `preface schema`: the JSON Schema of the configuration, for editors.

use std::io::Write;

/// Print the JSON Schema of the configuration file, for editors
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  preface schema > preface.schema.json
and as the first line of preface.toml (Even Better TOML, taplo):
  #:schema ./preface.schema.json")]
pub struct Args {}

/// The schema as text, with a final line break.
pub fn text() -> String {
    format!("{:#}\n", crate::config::schema::schema())
}

/// Prints it.
pub fn run(_args: Args) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text().as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

//! `preface man`: manual pages out of the definition that parses the arguments.

use anyhow::{Context as _, anyhow};
use clap::CommandFactory;
use clap_mangen::Man;

/// Print a manual page
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  preface man | man -l -
  preface man       > /usr/local/share/man/man1/preface.1
  preface man drain > /usr/local/share/man/man1/preface-drain.1")]
pub struct Args {
    /// The page of this subcommand instead of the main one
    pub subcommand: Option<String>,
}

/// Prints it.
pub fn run(args: Args) -> anyhow::Result<()> {
    super::print(&page(args.subcommand.as_deref())?)
}

fn page(subcommand: Option<&str>) -> anyhow::Result<String> {
    let mut main = super::Cli::command().disable_help_subcommand(true);
    // Gives subcommands their full names.
    main.build();
    let command = match subcommand {
        None => main,
        Some(name) => {
            let found = main.get_subcommands().find(|subcommand| subcommand.get_name() == name).cloned();
            found.ok_or_else(|| anyhow!("no subcommand {name:?}; `preface --help` lists them"))?
        }
    };
    let mut page = Vec::new();
    let source = concat!("preface ", env!("CARGO_PKG_VERSION"));
    Man::new(command).source(source).render(&mut page).context("cannot render the page")?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_has_a_page() {
        let main = page(None).unwrap();
        for subcommand in super::super::Cli::command().get_subcommands() {
            let name = subcommand.get_name();
            assert!(main.contains(&format!("preface\\-{name}(1)")), "{name} in {main}");
            assert!(page(Some(name)).unwrap().contains(&format!(".TH preface-{name} 1")), "{name}");
        }
        assert_eq!(page(Some("dran")).unwrap_err().to_string(), "no subcommand \"dran\"; `preface --help` lists them");
    }
}

//! `preface completions`: shell completions out of the definition that parses the arguments.

use clap::CommandFactory;
use clap_complete::Shell;

/// Print completions for a shell
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  preface completions bash > /usr/share/bash-completion/completions/preface
  preface completions zsh  > /usr/local/share/zsh/site-functions/_preface
  preface completions fish > ~/.config/fish/completions/preface.fish")]
pub struct Args {
    /// Which shell
    pub shell: Shell,
}

/// Prints them.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "preface", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_shell_is_told_of_every_subcommand() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut super::super::Cli::command(), "preface", &mut script);
            let script = String::from_utf8(script).unwrap();
            for subcommand in super::super::Cli::command().get_subcommands() {
                assert!(script.contains(subcommand.get_name()), "{shell}: {}", subcommand.get_name());
            }
        }
    }
}

//! `hopline completions` and `hopline man`: generated from the commands themselves.

use std::io::{self, Write as _};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::failed::Failed;

/// Print the completions of a shell
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline completions bash > ~/.local/share/bash-completion/completions/hopline\n  hopline completions zsh > \"${fpath[1]}/_hopline\"\n  hopline completions fish > ~/.config/fish/completions/hopline.fish"
)]
pub(crate) struct Completions {
    shell: Shell,
}

/// Print the manual, of all commands or of one, for man(1)
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline man > ~/.local/share/man/man1/hopline.1\n  hopline man context add | man -l -"
)]
pub(crate) struct Manual {
    /// The command, such as call or context add
    #[arg(value_name = "COMMAND")]
    words: Vec<String>,
}

impl Completions {
    pub(crate) fn run(self, mut command: Command) -> Result<(), Failed> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "hopline", &mut script);
        written(&script)
    }
}

impl Manual {
    pub(crate) fn run(self, mut command: Command) -> Result<(), Failed> {
        command.build();
        let mut shown = command;
        for word in &self.words {
            let inner = shown.find_subcommand(word).cloned();
            shown = inner
                .ok_or_else(|| Failed::usage(format!("there is no command `hopline {}`", self.words.join(" "))))?;
        }
        let mut page = Vec::new();
        let title = shown.get_display_name().unwrap_or("hopline").to_owned();
        Man::new(shown).title(title).render(&mut page).map_err(|error| Failed::at("the manual", error))?;
        written(&page)
    }
}

fn written(bytes: &[u8]) -> Result<(), Failed> {
    io::stdout().write_all(bytes).map_err(|error| Failed::at("nobody reads what this prints", error))
}

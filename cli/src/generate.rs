//! `hopline generate`: code for a service, from its schema.

mod contract;
mod names;
mod python;
mod rust;
mod typescript;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hopline::ServiceSchema;

use self::contract::Contract;
use crate::asking::{Questions, service};
use crate::failed::Failed;
use crate::printed::print;

/// Print code for a service, from its schema: a trait with its types in Rust, a client in Python or TypeScript.
///
/// Methods whose types have no schema are left out, and a comment names them. Exits with 0 when the code has been printed,
/// with 1 and an error on stderr when it cannot be made, and with 2 on wrong usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline generate rust demo > demo.rs\n  hopline generate python --from demo.json > demo.py"
)]
pub(crate) struct Generate {
    /// In which language
    #[arg(value_enum)]
    language: Language,
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1; one of its instances is asked
    #[arg(value_parser = service, required_unless_present = "from", conflicts_with = "from")]
    service: Option<String>,
    /// The file with the schema, as `hopline schema` prints it, or - for stdin
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    #[command(flatten)]
    questions: Questions,
}

#[derive(Clone, Copy, ValueEnum)]
enum Language {
    Rust,
    Python,
    Typescript,
}

impl Generate {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        match (&self.from, &self.service) {
            (Some(file), _) => {
                let shown = file.display();
                let text = match file.as_os_str() == "-" {
                    true => std::io::read_to_string(std::io::stdin()),
                    false => std::fs::read_to_string(file),
                };
                let text = text.map_err(|error| Failed::usage(format!("`{shown}` cannot be read: {error}")))?;
                let schema = serde_json::from_str(&text)
                    .map_err(|error| Failed::usage(format!("`{shown}` is no schema: {error}")))?;
                self.generated(&schema)
            }
            (None, Some(service)) => {
                self.questions.ask(async |registry| self.generated(&registry.schema(service).await?)).await
            }
            (None, None) => Err(Failed::run("give a service, or a schema by --from".to_owned())),
        }
    }

    fn generated(&self, schema: &ServiceSchema) -> Result<(), Failed> {
        let contract = Contract::read(schema)?;
        let code = match self.language {
            Language::Rust => rust::code(&contract),
            Language::Python => python::code(&contract),
            Language::Typescript => typescript::code(&contract),
        };
        Ok(print(code.trim_end())?)
    }
}

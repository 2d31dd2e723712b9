//! The contexts that are kept in a file of the user's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use etcetera::BaseStrategy as _;
use hopline::environment;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::failed::Failed;

/// The settings of a context. Each is what an option and a variable of the environment set, too.
#[derive(Clone, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// The broker's address, or - to read it from stdin, since others can see the arguments of a process
    #[arg(long, value_parser = address)]
    pub(crate) url: String,
    /// The prefix of every name on the broker
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    /// How long each address may take until its connection can be used, such as 500ms or 5s
    #[arg(long, value_name = "TIME", value_parser = time)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) connect_timeout: Option<String>,
    /// The name of this command's connections on the broker and in its log
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// The CAs to trust for amqps:// in place of the system's, in PEM
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ca: Option<PathBuf>,
    /// The certificate to show for amqps://, and those that lead to its CA, in PEM
    #[arg(long, value_name = "FILE", requires = "key")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "cert")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<PathBuf>,
}

fn address(text: &str) -> Result<String, String> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let read = io::read_to_string(io::stdin()).map_err(|error| format!("stdin cannot be read: {error}"))?;
    Ok(read.trim().to_owned())
}

fn time(text: &str) -> Result<String, String> {
    environment::duration(text).map(|_| text.to_owned())
}

impl Settings {
    /// What it sets in place of a variable of the environment.
    pub(crate) fn value(&self, variable: &str) -> Option<OsString> {
        match variable {
            environment::URL => Some(self.url.clone().into()),
            environment::NAMESPACE => self.namespace.clone().map(Into::into),
            environment::CONNECT_TIMEOUT => self.connect_timeout.clone().map(Into::into),
            environment::NAME => self.name.clone().map(Into::into),
            environment::CA => self.ca.clone().map(Into::into),
            environment::CERT => self.cert.clone().map(Into::into),
            environment::KEY => self.key.clone().map(Into::into),
            _ => None,
        }
    }

    /// The same, with files that are found from every folder.
    pub(super) fn anywhere(mut self) -> io::Result<Self> {
        for file in [&mut self.ca, &mut self.cert, &mut self.key].into_iter().flatten() {
            *file = std::path::absolute(&file)?;
        }
        Ok(self)
    }

    /// The same, without the password, for people to see.
    pub(super) fn shown(&self) -> Self {
        Self { url: without_password(&self.url), ..self.clone() }
    }
}

fn without_password(url: &str) -> String {
    let hidden = || {
        let (scheme, rest) = url.split_once("://")?;
        let (user, hosts) = rest.rsplit_once('@')?;
        let (user, _) = user.split_once(':')?;
        Some(format!("{scheme}://{user}:***@{hosts}"))
    };
    hidden().unwrap_or_else(|| url.to_owned())
}

/// All contexts, and which of them is used where nothing else is said.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contexts {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) selected: Option<String>,
    #[serde(default)]
    pub(super) contexts: BTreeMap<String, Settings>,
}

impl Contexts {
    /// Reads the file. Without one there are none.
    pub(crate) fn read() -> Result<Self, Failed> {
        let file = file()?;
        let unreadable = |error: String| Failed::run(format!("the contexts in `{}`: {error}", file.display()));
        match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(unreadable(error.to_string())),
        }
    }

    /// Writes the file: all of it or nothing, and only for its owner, since there may be passwords in it.
    pub(super) fn write(&self) -> Result<(), Failed> {
        let file = file()?;
        let text = serde_json::to_string_pretty(self).expect("texts and paths, which came from texts, can be JSON");
        self::write(&file, &text).map_err(|error| Failed::at(format!("`{}` cannot be written", file.display()), error))
    }

    /// The context of this name.
    ///
    /// # Errors
    /// Wrong usage, if there is none.
    pub(crate) fn named(&self, name: &str) -> Result<&Settings, Failed> {
        let absent = || Failed::usage(format!("there is no context `{name}`: `hopline context ls` lists them"));
        self.contexts.get(name).ok_or_else(absent)
    }

    /// The context of this name, or else the one that is selected.
    pub(crate) fn in_use<'a>(&'a self, name: Option<&'a str>) -> Result<Option<(&'a str, &'a Settings)>, Failed> {
        let Some(name) = name.or(self.selected.as_deref()) else { return Ok(None) };
        Ok(Some((name, self.named(name)?)))
    }
}

fn file() -> Result<PathBuf, Failed> {
    let folders =
        etcetera::choose_base_strategy().map_err(|error| Failed::at("there is no folder for settings", error))?;
    Ok(folders.config_dir().join("hopline").join("contexts.json"))
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().expect("it is in a folder");
    fs::create_dir_all(folder)?;
    // It is made for its owner alone.
    let mut new = NamedTempFile::new_in(folder)?;
    writeln!(new, "{text}")?;
    new.as_file().sync_all()?;
    new.persist(file)?;
    // What is in a folder is written only then.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown() {
        for (url, shown) in [
            ("amqp://me:s3c@ret@host:5672/v?heartbeat=9", "amqp://me:***@host:5672/v?heartbeat=9"),
            ("amqps://me:a/b@one,two", "amqps://me:***@one,two"),
            ("amqp://me@host", "amqp://me@host"),
            ("amqp://host:5672", "amqp://host:5672"),
        ] {
            assert_eq!(without_password(url), shown);
        }
    }
}

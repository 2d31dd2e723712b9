//! Where and with what was measured, in a sentence each.

use std::fs;
use std::path::Path;
use std::process;

use anyhow::{Context, ensure};

use crate::Command;
use crate::wrap::wrap;

const LOCK: &str = include_str!("../../../Cargo.lock");
const REQUIREMENTS: &str = include_str!("../../../aio-pika/requirements.txt");
const PACKAGE: &str = include_str!("../../../amqplib/package.json");

/// The date, the machine and the versions, as Markdown.
pub(crate) fn describe(command: &Command) -> anyhow::Result<String> {
    let cores = std::thread::available_parallelism()?;
    let memory: f64 = field("/proc/meminfo", "MemTotal")?.trim_end_matches(" kB").parse()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut versions =
        vec![output(&command.hopline, &["--version"])?, format!("RabbitMQ {}", command.rabbitmq_version)];
    if let Some(nats_server) = &command.nats_server {
        versions.push(output(nats_server, &["--version"])?.replace(": v", " "));
    }
    for (name, release) in [("lapin", "4."), ("amqprs", ""), ("async-nats", ""), ("tonic", ""), ("tarpc", "")] {
        versions.push(format!("{name} {}", locked(name, release)?));
    }
    if let Some(python) = &command.python {
        versions.push(format!(
            "aio-pika {} on {}",
            pinned("aio-pika==", REQUIREMENTS)?,
            output(python, &["--version"])?
        ));
    }
    if command.node_modules.is_some() {
        let node = output(Path::new("node"), &["--version"])?;
        versions.push(format!(
            "amqplib {} on Node {}",
            pinned("\"amqplib\": \"", PACKAGE)?,
            node.trim_start_matches('v')
        ));
    }
    let measured = format!(
        "Measured on {date} on {cpu}, {cores} cores, {memory:.0} GiB of memory, Linux {kernel}; clients, servers and \
         brokers all on this one machine. The figures are medians of {rounds} × {seconds} s, each after 1 s of \
         warm-up, with the quartiles of calls/s. In each round every contender runs once, and every second round goes \
         the other way round. Nothing is pinned to a processor; RabbitMQ has two scheduler threads. CPU time is that \
         of the process with all of its threads, in the measured time only.",
        date = output(Path::new("date"), &["-u", "+%Y-%m-%d"])?,
        cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(|_| format!("an {} CPU", std::env::consts::ARCH)),
        memory = memory / 1024.0 / 1024.0,
        // What follows the number is its builder's.
        kernel = kernel.split(['-', '+']).next().unwrap_or_default().trim(),
        rounds = command.rounds,
        seconds = command.seconds,
    );
    versions.push(format!("kanin {} on lapin {}", locked("kanin", "")?, locked("lapin", "2.")?));
    Ok(format!("{}\n\n{}\n", wrap(&measured, 0), wrap(&format!("{}.", versions.join(", ")), 0)))
}

/// The value in the first line `name: value` of a file.
fn field(file: &str, name: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(file)?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(key, _)| key.trim() == name).with_context(|| format!("{file} has no {name}"))?;
    Ok(value.trim().to_owned())
}

/// The version of a crate that begins with `release`.
fn locked(name: &str, release: &str) -> anyhow::Result<&'static str> {
    let begin = format!("name = \"{name}\"\nversion = \"{release}");
    let at = LOCK.find(&begin).with_context(|| format!("Cargo.lock has no {name} {release}"))?;
    let version = &LOCK[at + begin.len() - release.len()..];
    version.split('"').next().context("Cargo.lock ends in a version")
}

/// The version that follows a name in a list of dependencies.
fn pinned(name: &str, list: &'static str) -> anyhow::Result<&'static str> {
    let (_, version) = list.split_once(name).with_context(|| format!("no list of dependencies has {name}"))?;
    version.split(['"', '\n']).next().context("the list ends in a version")
}

fn output(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(output.status.success(), "{} {} ended with {}", program.display(), arguments.join(" "), output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

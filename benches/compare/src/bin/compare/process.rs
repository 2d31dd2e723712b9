//! The contenders' servers and clients. None outlives its owner here.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use hopline_compare::{MEASURED, MEASURING, SERVING, Style};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{sleep, timeout};

use crate::cpu::Reading;
use crate::nats::Nats;
use crate::results::Run;
use crate::scenario::{Contender, Scenario};

pub(crate) const STARTS_WITHIN: Duration = Duration::from_secs(30);
const STOPS_WITHIN: Duration = Duration::from_secs(10);
/// What a client may take beyond the time it measures: its warm-up, and calls that it still waits for.
const SLACK: Duration = Duration::from_secs(60);

const AIO_PIKA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/aio-pika/rpc.py");
const AMQPLIB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/amqplib/rpc.cjs");

/// What contenders need in order to start.
pub(crate) struct Servers<'a> {
    pub(crate) rabbitmq: &'a str,
    pub(crate) rabbitmq_pid: u32,
    pub(crate) nats: Option<&'a Nats>,
    pub(crate) hopline: &'a Path,
    /// A Python with aio-pika.
    pub(crate) python: Option<&'a Path>,
    /// A folder with amqplib, for Node.
    pub(crate) node_modules: Option<&'a Path>,
}

impl Servers<'_> {
    /// Whether there is all that the contender needs.
    pub(crate) fn can_start(&self, contender: Contender) -> bool {
        match contender {
            Contender::Nats => self.nats.is_some(),
            Contender::AioPika => self.python.is_some(),
            Contender::Amqplib => self.node_modules.is_some(),
            _ => true,
        }
    }

    /// Starts the contender's server, and returns as soon as it can be called.
    pub(crate) async fn start(&self, contender: Contender) -> anyhow::Result<Server<'_>> {
        let (url, broker) = match contender {
            Contender::Nats => {
                let nats = self.nats.context("there is no NATS server")?;
                (nats.url(), Some(nats.pid()?))
            }
            Contender::Tonic => (format!("http://127.0.0.1:{}", free_port()?), None),
            Contender::Tarpc => (format!("tcp://127.0.0.1:{}", free_port()?), None),
            _ => (self.rabbitmq.to_owned(), Some(self.rabbitmq_pid)),
        };
        let mut command = self.program(contender)?;
        command.args(["serve", "--url", &url]);
        let (process, mut lines) = spawn(command)?;
        timeout(STARTS_WITHIN, line(&mut lines, SERVING)).await.context("it does not say `serving`")??;
        // Whatever else it prints must not find a closed pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Server { servers: self, contender, url, broker, process })
    }

    /// What is run both as server and as client.
    fn program(&self, contender: Contender) -> anyhow::Result<Command> {
        let with = |program: &Path, argument| {
            let mut command = Command::new(program);
            command.arg(argument);
            command
        };
        Ok(match contender {
            Contender::Hopline | Contender::HoplineOff => with(self.hopline, "bench"),
            Contender::AioPika => with(self.python.context("there is no Python with aio-pika")?, AIO_PIKA),
            Contender::Amqplib => {
                let mut command = with(Path::new("node"), AMQPLIB);
                command.env("NODE_PATH", self.node_modules.context("there is no amqplib")?);
                command
            }
            Contender::Lapin => Command::new(beside_this("plain-lapin")?),
            Contender::Amqprs => Command::new(beside_this("plain-amqprs")?),
            Contender::Kanin => Command::new(beside_this("kanin")?),
            Contender::Nats => Command::new(beside_this("nats")?),
            Contender::Tonic => Command::new(beside_this("tonic")?),
            Contender::Tarpc => Command::new(beside_this("tarpc")?),
        })
    }
}

/// A contender's server.
pub(crate) struct Server<'a> {
    servers: &'a Servers<'a>,
    contender: Contender,
    url: String,
    /// The broker's process, if there is one.
    broker: Option<u32>,
    process: Child,
}

impl Server<'_> {
    /// Runs the contender's client.
    pub(crate) async fn call(&self, scenario: &Scenario, seconds: f64) -> anyhow::Result<Run> {
        let mut command = self.servers.program(self.contender)?;
        command.args(["call", "--url", &self.url, "--concurrency", &scenario.concurrency.to_string()]);
        command.args(["--seconds", &seconds.to_string(), "--size", &scenario.size.to_string()]);
        if scenario.style == Style::Oneway {
            command.args(["--style", "oneway"]);
        }
        if self.contender == Contender::HoplineOff {
            command.args(["--coalesce", "off"]);
        }
        if self.contender.is_hopline() {
            command.arg("--json");
        }
        let within = Duration::from_secs_f64(seconds) + SLACK;
        timeout(within, self.watch(command, seconds)).await.context("its client does not end")?
    }

    async fn watch(&self, command: Command, seconds: f64) -> anyhow::Result<Run> {
        let (mut client, mut lines) = spawn(command)?;
        let before = self.at_the_begin(&mut lines, seconds).await?;
        let after = self.at_the_end(&mut lines, seconds).await?;
        let mut report = None;
        while let Some(line) = lines.next_line().await? {
            report = Some(line);
        }
        let status = client.wait().await?;
        ensure!(status.success(), "its client ended with {status}");
        let report = report.context("its client printed no report")?;
        let report =
            serde_json::from_str(&report).with_context(|| format!("its client's report cannot be read: {report}"))?;
        Ok(Run { report, used: before.until(&after) })
    }

    /// Reads the CPU time of server and broker when the measured time begins.
    async fn at_the_begin(&self, lines: &mut Lines<BufReader<ChildStdout>>, seconds: f64) -> anyhow::Result<Reading> {
        if self.contender.is_hopline() {
            // `hopline bench call` does not tell. It warms up for a fifth of the time and at most 1 s.
            sleep(Duration::from_secs_f64((seconds / 5.0).min(1.0)) + starting(seconds)).await;
        } else {
            line(lines, MEASURING).await?;
        }
        self.reading()
    }

    /// Reads them again when it ends.
    async fn at_the_end(&self, lines: &mut Lines<BufReader<ChildStdout>>, seconds: f64) -> anyhow::Result<Reading> {
        if self.contender.is_hopline() {
            sleep(Duration::from_secs_f64(seconds) - starting(seconds)).await;
        } else {
            line(lines, MEASURED).await?;
        }
        self.reading()
    }

    fn reading(&self) -> anyhow::Result<Reading> {
        Reading::take(self.process.id().context("its server has ended")?, self.broker)
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        stop(self.process).await.with_context(|| format!("the server of {} cannot be stopped", self.contender))
    }
}

/// More than `hopline bench call` takes to connect. So long the CPU time is not looked at: what is left of the measured
/// time says as much, since all of it is the same.
fn starting(seconds: f64) -> Duration {
    Duration::from_secs_f64((seconds / 5.0).min(0.2))
}

/// Runs a program whose output is read here.
fn spawn(mut command: Command) -> anyhow::Result<(Child, Lines<BufReader<ChildStdout>>)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let program = command.as_std().get_program().to_owned();
    let mut process = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let lines = BufReader::new(process.stdout.take().context("its output is not piped")?).lines();
    Ok((process, lines))
}

/// Waits for a program to print this line.
async fn line(lines: &mut Lines<BufReader<ChildStdout>>, wanted: &str) -> anyhow::Result<()> {
    while let Some(line) = lines.next_line().await? {
        if line == wanted {
            return Ok(());
        }
    }
    bail!("it ended before it said `{wanted}`")
}

/// Lets a process end by itself, but not for ever.
pub(crate) async fn stop(mut process: Child) -> anyhow::Result<()> {
    // It has no id any more when it has ended already.
    if let Some(pid) = process.id().and_then(|id| Pid::from_raw(id as i32)) {
        kill_process(pid, Signal::TERM)?;
    }
    if timeout(STOPS_WITHIN, process.wait()).await.is_err() {
        process.kill().await?;
    }
    Ok(())
}

/// A port that nobody listened on just now.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A program that was built with this one.
fn beside_this(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name(name);
    ensure!(program.exists(), "{} is missing: build all of this package", program.display());
    Ok(program)
}

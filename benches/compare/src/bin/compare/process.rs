//! The processes of a run: the contenders' servers and clients, and the NATS server. None outlives its owner here.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use hopline_compare::{Report, Style};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::scenario::{Contender, Scenario};

const STARTS_WITHIN: Duration = Duration::from_secs(30);
const STOPS_WITHIN: Duration = Duration::from_secs(10);
/// What a client may take beyond the time it measures: its warm-up, and calls that it still waits for.
const SLACK: Duration = Duration::from_secs(60);

/// What contenders need in order to start.
pub(crate) struct Servers<'a> {
    pub(crate) rabbitmq: &'a str,
    pub(crate) nats: Option<&'a Nats>,
    pub(crate) hopline: &'a Path,
}

impl Servers<'_> {
    /// Starts the contender's server, and returns as soon as it can be called.
    pub(crate) async fn start(&self, contender: Contender) -> anyhow::Result<Server> {
        let url = match contender {
            Contender::Nats => self.nats.context("there is no NATS server")?.url(),
            Contender::Tonic => format!("http://127.0.0.1:{}", free_port()?),
            _ => self.rabbitmq.to_owned(),
        };
        let (program, prefix) = match contender {
            Contender::Hopline | Contender::HoplineUncoalesced => (self.hopline.to_owned(), Some("bench")),
            Contender::Lapin => (beside_this("plain-lapin")?, None),
            Contender::Amqprs => (beside_this("plain-amqprs")?, None),
            Contender::Nats => (beside_this("nats")?, None),
            Contender::Tonic => (beside_this("tonic")?, None),
            Contender::Kanin => (beside_this("kanin")?, None),
        };
        let mut command = Command::new(&program);
        command.args(prefix).args(["serve", "--url", &url]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let mut lines = BufReader::new(process.stdout.take().context("its output is not piped")?).lines();
        loop {
            let line = timeout(STARTS_WITHIN, lines.next_line()).await.context("it does not say `serving`")??;
            let Some(line) = line else { bail!("it ended before it said `serving`") };
            if line == "serving" {
                break;
            }
        }
        // Whatever else it prints must not find a closed pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Server { contender, program, prefix, url, process })
    }
}

/// A contender's server.
pub(crate) struct Server {
    contender: Contender,
    program: PathBuf,
    prefix: Option<&'static str>,
    url: String,
    process: Child,
}

impl Server {
    /// Runs the contender's client.
    pub(crate) async fn call(&self, scenario: &Scenario, seconds: f64) -> anyhow::Result<Report> {
        let mut command = Command::new(&self.program);
        command.args(self.prefix).args(["call", "--url", &self.url]);
        command.args(["--concurrency", &scenario.concurrency.to_string()]);
        command.args(["--seconds", &seconds.to_string(), "--size", &scenario.size.to_string()]);
        if scenario.style == Style::Oneway {
            command.args(["--style", "oneway"]);
        }
        if self.contender == Contender::HoplineUncoalesced {
            command.args(["--coalesce", "off"]);
        }
        if self.prefix.is_some() {
            command.arg("--json");
        }
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
        let within = Duration::from_secs_f64(seconds) + SLACK;
        let output = timeout(within, command.output()).await.context("its client does not end")??;
        ensure!(output.status.success(), "its client ended with {}", output.status);
        let report = String::from_utf8(output.stdout).context("its client's output is not text")?;
        let report = report.lines().last().context("its client printed nothing")?;
        serde_json::from_str(report).with_context(|| format!("its client's report cannot be read: {report}"))
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        stop(self.process).await.with_context(|| format!("the server of {} cannot be stopped", self.contender))
    }
}

/// A NATS server of this run's own.
pub(crate) struct Nats {
    address: SocketAddr,
    process: Child,
}

impl Nats {
    /// Starts it on a free port, and returns as soon as it accepts connections.
    pub(crate) async fn start(program: &Path) -> anyhow::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let mut command = Command::new(program);
        command.args(["-a", "127.0.0.1", "-p", &address.port().to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let mut process = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let accepts = async {
            while TcpStream::connect(address).await.is_err() {
                if let Some(status) = process.try_wait()? {
                    bail!("nats-server ended with {status}");
                }
                sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        timeout(STARTS_WITHIN, accepts).await.context("nats-server accepts no connection")??;
        Ok(Self { address, process })
    }

    fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        stop(self.process).await.context("nats-server cannot be stopped")
    }
}

/// Lets a process end by itself, but not for ever.
async fn stop(mut process: Child) -> anyhow::Result<()> {
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
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A program that was built with this one.
fn beside_this(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name(name);
    ensure!(program.exists(), "{} is missing: build all of this package", program.display());
    Ok(program)
}

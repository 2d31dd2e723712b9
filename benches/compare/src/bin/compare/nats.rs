//! A NATS server of this run's own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::process::{STARTS_WITHIN, free_port, stop};

/// It ends with its owner here.
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

    pub(crate) fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.process.id().context("nats-server has ended")
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        stop(self.process).await.context("nats-server cannot be stopped")
    }
}

//! The processes that serve and call. Each connects through proxies of its own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::proxy::Proxy;
use crate::{Broker, Queues};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Server,
    Client,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// A process that is started again after it has ended, each time with a new number.
#[derive(Debug)]
pub(crate) struct Process {
    role: Role,
    number: u32,
    /// By how much the number grows.
    step: u32,
    seed: u64,
    url: String,
    queues: Queues,
    folder: PathBuf,
    child: Child,
    input: Option<ChildStdin>,
    printed: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(role: Role, number: u32, step: u32, url: String, queues: Queues, seed: u64, folder: &Path) -> Self {
        let (child, input, printed) = spawn(role, number, &url, queues, seed, folder);
        Self { role, number, step, seed, url, queues, folder: folder.to_owned(), child, input: Some(input), printed }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn name(&self) -> String {
        format!("{}-{}", self.role.name(), self.number)
    }

    /// How it has ended, if it has.
    pub(crate) fn ended_by_itself(&mut self) -> Option<String> {
        let status = self.child.try_wait().expect("it is our child")?;
        Some(format!("{}: {status}", self.name()))
    }

    /// Kills it as `kill -9` does.
    pub(crate) async fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill().await;
    }

    /// Tells it to end. Returns how long that took, or `None` if it did not end in time.
    pub(crate) async fn terminate(&mut self, patience: Duration) -> Option<Duration> {
        let since = Instant::now();
        if let Some(id) = self.child.id() {
            let sent = Command::new("kill").args(["-TERM", &id.to_string()]).status().await.expect("kill can be run");
            assert!(sent.success(), "a child that was not waited for can be signalled");
        }
        let ended = timeout(patience, self.child.wait()).await.is_ok();
        if !ended {
            self.kill().await;
        }
        ended.then(|| since.elapsed())
    }

    /// Starts the next process after this one has ended.
    pub(crate) fn start_again(&mut self) {
        self.number += self.step;
        let (child, input, printed) = spawn(self.role, self.number, &self.url, self.queues, self.seed, &self.folder);
        (self.child, self.input, self.printed) = (child, Some(input), printed);
    }

    /// The next line that it prints, if that comes in time.
    pub(crate) async fn says(&mut self, patience: Duration) -> Option<String> {
        timeout(patience, self.printed.next_line()).await.ok()?.ok()?
    }

    pub(crate) async fn tell(&mut self, order: &str) {
        if let Some(input) = &mut self.input {
            // It may have ended, which is noticed elsewhere.
            let _ = input.write_all(format!("{order}\n").as_bytes()).await;
        }
    }

    /// Ends it by closing its input.
    pub(crate) async fn dismiss(&mut self, patience: Duration) -> bool {
        self.input = None;
        let ended = timeout(patience, self.child.wait()).await.is_ok();
        if !ended {
            self.kill().await;
        }
        ended
    }
}

/// All of them, and their proxies: first the servers, then the clients.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) processes: Vec<tokio::sync::Mutex<Process>>,
    /// The proxies of each process: one to each node.
    pub(crate) proxies: Vec<Vec<Proxy>>,
    pub(crate) servers: usize,
}

impl Crew {
    pub(crate) async fn start(each: usize, broker: &Broker, seed: u64, folder: &Path) -> Self {
        let (mut processes, mut proxies) = (Vec::new(), Vec::new());
        let step = u32::try_from(each).expect("a few");
        for role in [Role::Server, Role::Client] {
            for number in 1..=step {
                let own = join_all(broker.nodes().iter().map(|node| Proxy::to(node.address()))).await;
                let addresses: Vec<_> = own.iter().map(|proxy| proxy.address().to_string()).collect();
                let url = format!("amqp://guest:guest@{}?heartbeat=2", addresses.join(","));
                let mut process = Process::start(role, number, step, url, broker.queues(), seed, folder);
                // The clients start after the servers. Otherwise their first calls would find nobody.
                if role == Role::Server {
                    let said = process.says(Duration::from_secs(30)).await;
                    assert_eq!(said.as_deref(), Some("ready"), "{} begins to serve", process.name());
                }
                processes.push(tokio::sync::Mutex::new(process));
                proxies.push(own);
            }
        }
        Self { processes, proxies, servers: each }
    }

    pub(crate) fn server(&self, slot: usize) -> &tokio::sync::Mutex<Process> {
        &self.processes[slot]
    }

    pub(crate) fn client(&self, slot: usize) -> &tokio::sync::Mutex<Process> {
        &self.processes[self.servers + slot]
    }
}

fn spawn(
    role: Role,
    number: u32,
    url: &str,
    queues: Queues,
    seed: u64,
    folder: &Path,
) -> (Child, ChildStdin, Lines<BufReader<ChildStdout>>) {
    let log = File::create(folder.join(format!("{}-{number}.log", role.name()))).expect("the folder is there");
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg(role.name()).args([&number.to_string(), url, &seed.to_string(), queues.name()]).arg(folder);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true).process_group(0);
    let mut child = command.spawn().expect("this program can be run");
    let input = child.stdin.take().expect("it is piped");
    let printed = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    (child, input, printed)
}

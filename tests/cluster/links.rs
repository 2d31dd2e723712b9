//! The links between the nodes of a cluster. Each goes through a proxy, so that a test can cut a node off from the
//! others.
//!
//! Erlang nodes ask a daemon, epmd, at which port another node listens. Here each node has an epmd of its own, which
//! answers with the port of a proxy.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

use crate::proxy::Proxy;

/// The first byte of a message in epmd's protocol: questions of a node, and answers.
const REGISTER: u8 = 120;
const REGISTERED: u8 = 118;
const LOOK_UP: u8 = 122;
const LOOKED_UP: u8 = 119;
const NAMES: u8 = 110;
const ORDINARY_NODE: u8 = 77;

/// One epmd for each node. All of them end when this is dropped.
#[derive(Debug)]
pub(super) struct Links {
    ports: Vec<u16>,
    known: Arc<Mutex<Known>>,
    /// They have threads of their own, since nodes still talk to each other while the test's thread waits for them to
    /// end.
    runtime: Option<Runtime>,
}

#[derive(Debug, Default)]
struct Known {
    /// Where each node listens, by its name.
    nodes: HashMap<String, Listening>,
    /// The proxy from the node with this epmd to the node with this name.
    links: HashMap<(usize, String), Arc<Proxy>>,
    cut: Option<usize>,
    lives: u32,
}

#[derive(Debug)]
struct Listening {
    port: u16,
    epmd: usize,
    life: u32,
}

impl Links {
    pub(super) fn between(nodes: usize) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("there is a thread");
        let known = Arc::new(Mutex::new(Known::default()));
        let ports = (0..nodes).map(|epmd| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
            let port = listener.local_addr().expect("it is bound").port();
            runtime.spawn(listen(epmd, listener, known.clone()));
            port
        });
        Self { ports: ports.collect(), known, runtime: Some(runtime) }
    }

    /// The port of a node's epmd.
    pub(super) fn epmd(&self, node: usize) -> u16 {
        self.ports[node]
    }

    /// Cuts a node off: nothing passes between it and the others, and no connection is closed. `None` heals everything.
    pub(super) fn cut(&self, node: Option<usize>) {
        let mut known = locked(&self.known);
        known.cut = node;
        for ((from, to), link) in &known.links {
            if known.is_cut(*from, to) { link.stall() } else { link.resume() }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Known {
    fn is_cut(&self, from: usize, to: &str) -> bool {
        let to = self.nodes.get(to).map(|node| node.epmd);
        self.cut.is_some_and(|cut| cut == from || Some(cut) == to)
    }
}

fn locked(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().expect("no panic while holding it")
}

/// Runs the epmd of a node.
async fn listen(epmd: usize, listener: std::net::TcpListener, known: Arc<Mutex<Known>>) {
    listener.set_nonblocking(true).expect("it is a socket");
    let listener = TcpListener::from_std(listener).expect("it is a socket");
    loop {
        let (asker, _) = listener.accept().await.expect("the process may open as many");
        // An error only means that the node has broken its question off.
        tokio::spawn(answer(epmd, asker, known.clone()));
    }
}

/// Answers one question to the epmd of a node.
async fn answer(epmd: usize, mut asker: TcpStream, known: Arc<Mutex<Known>>) -> io::Result<()> {
    let mut question = vec![0; asker.read_u16().await?.into()];
    asker.read_exact(&mut question).await?;
    match question[0] {
        REGISTER => {
            let port = u16::from_be_bytes([question[1], question[2]]);
            let length = usize::from(u16::from_be_bytes([question[9], question[10]]));
            let name = text(&question[11..11 + length]);
            let life = {
                let mut known = locked(&known);
                known.lives += 1;
                let life = known.lives;
                known.nodes.insert(name.clone(), Listening { port, epmd, life });
                life
            };
            asker.write_all(&[&[REGISTERED, 0][..], &life.to_be_bytes()].concat()).await?;
            // The node is registered for as long as it keeps this connection open.
            while asker.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
            let mut known = locked(&known);
            if known.nodes.get(&name).is_some_and(|node| node.life == life) {
                known.nodes.remove(&name);
            }
            Ok(())
        }
        LOOK_UP => {
            let name = text(&question[1..]);
            let Some(port) = port(epmd, &name, &known).await else {
                return asker.write_all(&[LOOKED_UP, 1]).await;
            };
            let length = u16::try_from(name.len()).expect("a short one");
            // The highest and the lowest version of the distribution protocol. All nodes here speak both.
            let versions = [0, 6, 0, 5];
            let parts = [&[LOOKED_UP, 0][..], &port.to_be_bytes(), &[ORDINARY_NODE, 0], &versions];
            asker.write_all(&[&parts.concat(), &length.to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat()).await
        }
        NAMES => {
            let names: String = {
                let known = locked(&known);
                known.nodes.iter().map(|(name, node)| format!("name {name} at port {}\n", node.port)).collect()
            };
            let own = u32::from(asker.local_addr()?.port());
            asker.write_all(&[&own.to_be_bytes()[..], names.as_bytes()].concat()).await
        }
        other => panic!("epmd is asked for {other}"),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("names are text")
}

/// The port at which the node with the epmd `from` reaches the node `to`. It reaches itself directly, as do the
/// commands that use its epmd, and others through a proxy.
async fn port(from: usize, to: &str, known: &Mutex<Known>) -> Option<u16> {
    let port = {
        let known = locked(known);
        let Listening { port, epmd, .. } = known.nodes.get(to)?;
        if *epmd == from {
            return Some(*port);
        }
        if let Some(link) = known.links.get(&(from, to.to_owned())) {
            return Some(link.address().port());
        }
        *port
    };
    let link = Arc::new(Proxy::to(SocketAddr::from(([127, 0, 0, 1], port))).await);
    let mut known = locked(known);
    if known.is_cut(from, to) {
        link.stall();
    }
    Some(known.links.entry((from, to.to_owned())).or_insert(link).address().port())
}

//! Metrics over HTTP: a responder that knows one path, for programs that have no HTTP server of their own.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, warn};

use super::{CONTENT_TYPE, Metrics, PLAIN_CONTENT_TYPE};

/// How large the head of a request may be, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// How long a connection may take from its first byte to its last.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many connections are served at once. More wait until the system refuses them.
const MAX_CONNECTIONS: usize = 32;

/// Where metrics are served, from [`Metrics::serve`]. Dropping it ends that.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// let endpoint = hopline::metrics::Metrics::new().serve("127.0.0.1:0").await?;
/// println!("curl http://{}/metrics", endpoint.address());
/// endpoint.close().await;
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends it"]
pub struct MetricsEndpoint {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl MetricsEndpoint {
    pub(super) async fn open(metrics: Metrics, address: &str) -> io::Result<Self> {
        let listener = match address.parse::<u16>() {
            Ok(port) => TcpListener::bind(("127.0.0.1", port)).await?,
            Err(_) => TcpListener::bind(address).await?,
        };
        let address = listener.local_addr()?;
        debug!(%address, "metrics are served");
        Ok(Self { address, task: tokio::spawn(accept(listener, metrics)) })
    }

    /// The address, with the port that was chosen if it was to be any.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops serving. When this returns, the port is free.
    pub async fn close(mut self) {
        self.task.abort();
        // It was aborted, which is no news.
        let _ = (&mut self.task).await;
    }
}

impl Drop for MetricsEndpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, metrics: Metrics) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                let metrics = metrics.clone();
                connections.spawn(async move {
                    match tokio::time::timeout(PATIENCE, answer(stream, &metrics)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => debug!(%peer, %error, "metrics were not read to their end"),
                        Err(_) => debug!(%peer, "who asked for metrics was too slow"),
                    }
                });
            }
            Err(error) => {
                // Such as too many open files: that takes a while to pass.
                warn!(%error, "no connection for metrics can be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Answers the one request of a connection.
async fn answer(mut stream: TcpStream, metrics: &Metrics) -> io::Result<()> {
    let Some(head) = read_head(&mut stream).await? else { return Ok(()) };
    let response = Response::to(&head, metrics);
    stream.write_all(response.text(head.starts_with("HEAD ")).as_bytes()).await?;
    stream.shutdown().await
}

/// The head of a request. `None` if the connection ends before it.
async fn read_head(stream: &mut TcpStream) -> io::Result<Option<String>> {
    let (mut head, mut part) = (Vec::new(), [0; 1024]);
    while head.len() < MAX_HEAD {
        let read = stream.read(&mut part).await?;
        if read == 0 {
            return Ok(None);
        }
        // The end may begin in the part before.
        let looked_at = head.len().saturating_sub(3);
        head.extend_from_slice(&part[..read]);
        if head[looked_at..].windows(4).any(|end| end == b"\r\n\r\n") {
            break;
        }
    }
    Ok(Some(String::from_utf8_lossy(&head).into_owned()))
}

/// A response of HTTP/1.1, after which the connection ends.
#[derive(Debug, PartialEq)]
struct Response {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

impl Response {
    fn to(head: &str, metrics: &Metrics) -> Self {
        let plain =
            |status, body: &str| Self { status, content_type: "text/plain; charset=utf-8", body: body.to_owned() };
        let mut lines = head.split("\r\n");
        let mut request = lines.next().unwrap_or_default().split(' ');
        let (method, target, version) = (request.next(), request.next(), request.next());
        let is_whole = head.contains("\r\n\r\n") && version.is_some_and(|version| version.starts_with("HTTP/1."));
        let Some(target) = target.filter(|_| is_whole) else { return plain("400 Bad Request", "no request\n") };
        if !matches!(method, Some("GET" | "HEAD")) {
            return plain("405 Method Not Allowed", "only GET\n");
        }
        if target.split('?').next() != Some("/metrics") {
            return plain("404 Not Found", "only /metrics is here\n");
        }
        let accepted = lines.filter_map(|line| line.split_once(':'));
        let mut accepted = accepted.filter(|(name, _)| name.eq_ignore_ascii_case("accept"));
        if accepted.any(|(_, types)| types.contains("application/openmetrics-text")) {
            Self { status: "200 OK", content_type: CONTENT_TYPE, body: metrics.render() }
        } else {
            Self { status: "200 OK", content_type: PLAIN_CONTENT_TYPE, body: metrics.render_plain() }
        }
    }

    fn text(&self, head_only: bool) -> String {
        let Self { status, content_type, body } = self;
        let length = body.len();
        let shown = if head_only { "" } else { body };
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{shown}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(head: &str) -> Response {
        Response::to(head, &Metrics::new())
    }

    #[test]
    fn open_metrics_goes_to_whoever_asks_for_it() {
        let told = |accept: &str| response(&format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{accept}\r\n")).content_type;
        assert_eq!(
            told("Accept: application/openmetrics-text;version=1.0.0;q=0.75,text/plain;q=0.5\r\n"),
            CONTENT_TYPE
        );
        assert_eq!(told("accept: */*\r\n"), PLAIN_CONTENT_TYPE);
        assert_eq!(told(""), PLAIN_CONTENT_TYPE);
        assert_eq!(told("X-Accept: application/openmetrics-text\r\n"), PLAIN_CONTENT_TYPE);
    }

    #[test]
    fn everything_else_is_refused() {
        let status = |head: &str| response(head).status;
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(status("GET /metrics?name=x HTTP/1.1\r\n\r\n"), "200 OK");
        assert_eq!(status("GET /metrics/ HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(status("POST /metrics HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
        for head in ["", "GET\r\n\r\n", "GET /metrics\r\n\r\n", "GET /metrics HTTP/1.1\r\nAccept: x", "\r\n\r\n"] {
            assert_eq!(status(head), "400 Bad Request", "{head:?}");
        }
    }

    #[test]
    fn a_head_without_its_body_tells_how_long_that_is() {
        let response = Response { status: "200 OK", content_type: CONTENT_TYPE, body: "# EOF\n".to_owned() };
        assert!(response.text(true).ends_with("Content-Length: 6\r\nConnection: close\r\n\r\n"));
        assert!(response.text(false).ends_with("\r\n\r\n# EOF\n"));
    }
}

//! What clients and servers count, as Prometheus takes it: `promtool` finds nothing wrong with it, and a Prometheus that
//! scrapes a server and a client answers what an operator asks.
//!
//! It needs the RabbitMQ that `HOPLINE_TEST_URL` names, and in `HOPLINE_TEST_PROMETHEUS` the folder of the programs
//! `prometheus` and `promtool`, which `scripts/prometheus` prints. `scripts/test metrics-4.3` has both.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use hopline::metrics::{Metrics, MetricsEndpoint};
use hopline::{Absent, Client, Code, Context, Fault, Method, Running, Server, Service};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is set"))
}

/// A server and a client on RabbitMQ, each with an endpoint of its own.
struct Scene {
    server: Running,
    client: Client,
    at_server: MetricsEndpoint,
    at_client: MetricsEndpoint,
}

impl Scene {
    async fn new() -> Self {
        let (url, namespace) = (variable("HOPLINE_TEST_URL"), format!("metrics-{}", uuid::Uuid::new_v4().simple()));
        let client = Client::builder().namespace(&namespace).timeout(PATIENCE).breaker().connect(&url).await;
        let client = client.expect("it is there");
        let asked = client.clone();
        let service = Service::new("shop", 1)
            .method("price", |_: Context, (item,): (u32,)| async move {
                if item % 4 == 0 { Err(Fault::new(Code::NotFound, "no such item")) } else { Ok(u64::from(item) * 100) }
            })
            .method("own", |_: Context, _: [(); 0]| async { Err::<(), _>("sold out".to_owned()) })
            .method("away", |_: Context, _: [(); 0]| async { Err::<(), _>(Fault::new(Code::Unavailable, "not now")) })
            .method("slow", |_: Context, _: [(); 0]| std::future::pending::<Result<(), Fault>>())
            // It calls another method, in the trace of its own call.
            .method("total", move |_: Context, _: [(); 0]| {
                let asked = asked.clone();
                async move {
                    asked.call::<u64>("shop", "price", (7,)).await.map_err(|e| Fault::new(e.code(), e.to_string()))
                }
            })
            .method(Method::new("audit").oneway().attempts(1), |_: Context, _: [(); 0]| async {
                Err::<(), _>(Fault::new(Code::Internal, "the disk is \"full\"\n"))
            });
        let server = Server::builder().namespace(&namespace).connect(&url).await.expect("it is there");
        let server = server.serve(service).start().await.expect("it can be served");
        let at_server = Metrics::new().server(&server).queues(&client).serve("0").await.expect("a port is free");
        let at_client = Metrics::new().client(&client).serve("0").await.expect("a port is free");
        Self { server, client, at_server, at_client }
    }

    /// Makes calls that end in many ways.
    async fn calls(&self) {
        let client = &self.client;
        for item in 1..=8 {
            let _ = soon(async { client.call::<u64>("shop", "price", (item,)).await }).await;
        }
        let _ = soon(async { client.call::<u64>("shop", "total", [(); 0]).await }).await;
        let _ = soon(async { client.call::<()>("shop", "own", [(); 0]).await }).await;
        let _ = soon(async { client.call::<()>("shop", "away", [(); 0]).idempotent().retry(1).await }).await;
        let _ = soon(async { client.call::<u64>("shop", "price", (1,)).idempotent().cache(PATIENCE).await }).await;
        let _ = soon(async { client.call::<()>("shop", "absent", [(); 0]).await }).await;
        let _ = soon(async { client.call::<()>("nobody", "x", [(); 0]).absent(Absent::Fail).await }).await;
        let _ =
            soon(async { client.call::<()>("shop", "slow", [(); 0]).timeout(Duration::from_millis(50)).await }).await;
        soon(client.oneway("shop", "audit", [(); 0]).send()).await.expect("the broker has it");
    }

    async fn ends(self) {
        self.client.close().await;
        soon(self.server.drain()).await;
    }
}

/// The body of what an HTTP server answers.
async fn get(address: SocketAddr, path: &str, accept: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let head = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("it reads");
    let mut told = String::new();
    stream.read_to_string(&mut told).await.expect("it answers");
    told.split_once("\r\n\r\n").expect("a body").1.to_owned()
}

async fn promtool(text: &str) -> Output {
    let mut command = Command::new(Path::new(&variable("HOPLINE_TEST_PROMETHEUS")).join("promtool"));
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = command.kill_on_drop(true).spawn().expect("it can be run");
    let mut input = running.stdin.take().expect("it is piped");
    input.write_all(text.as_bytes()).await.expect("it reads");
    drop(input);
    soon(running.wait_with_output()).await.expect("it ends")
}

#[tokio::test]
#[ignore = "needs HOPLINE_TEST_URL and HOPLINE_TEST_PROMETHEUS"]
async fn promtool_finds_nothing_wrong() {
    let scene = Scene::new().await;
    scene.calls().await;
    let at_server = ["rpc_server_call", "hopline_server_rejected_total"];
    let at_client = [
        "rpc_client_call",
        "hopline_client_call_retries_bucket",
        "hopline_client_call_retry_delay_seconds_bucket",
        "hopline_client_cache_total",
        "hopline_breaker_state",
    ];
    for (endpoint, names) in [(&scene.at_server, &at_server[..]), (&scene.at_client, &at_client)] {
        // The last call is oneway, and its dead letter may take a while.
        let text = soon(get(endpoint.address(), "/metrics", "text/plain")).await;
        assert!(names.iter().all(|name| text.contains(name)), "{text}");
        let said = promtool(&text).await;
        assert!(said.status.success(), "{}\n{text}", String::from_utf8_lossy(&said.stderr));
        let said = [said.stdout, said.stderr].concat();
        assert!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
    }
    // It would have found something.
    assert!(!promtool("some_calls 1\n").await.stderr.is_empty());
    scene.ends().await;
}

/// A Prometheus with a folder and a port of its own. It ends, and its folder goes, when this is dropped.
struct Prometheus {
    folder: PathBuf,
    address: SocketAddr,
    process: Child,
}

impl Prometheus {
    /// Starts one that scrapes these endpoints, each as a job of its name.
    async fn scraping(endpoints: &[(&str, SocketAddr)]) -> Self {
        let folder = std::env::temp_dir().join(format!("prometheus-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&folder).expect("there is room for it");
        let jobs = endpoints
            .iter()
            .map(|(job, address)| format!("- job_name: {job}\n  static_configs:\n  - targets: ['{address}']\n"));
        let jobs: String = jobs.collect();
        let settings = format!("global:\n  scrape_interval: 250ms\n  scrape_timeout: 250ms\nscrape_configs:\n{jobs}");
        std::fs::write(folder.join("prometheus.yml"), settings).expect("there is room for it");
        let free = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = free.local_addr().expect("it is bound");
        drop(free);
        let mut command = Command::new(Path::new(&variable("HOPLINE_TEST_PROMETHEUS")).join("prometheus"));
        command.arg("--config.file=prometheus.yml").arg("--storage.tsdb.path=data").arg("--log.level=warn");
        command.arg(format!("--web.listen-address={address}")).arg("--enable-feature=exemplar-storage");
        let log = std::fs::File::create(folder.join("log")).expect("there is room for it");
        command.current_dir(&folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = command.kill_on_drop(true).spawn().expect("it can be run");
        let mut prometheus = Self { folder, address, process };
        soon(async {
            while TcpStream::connect(prometheus.address).await.is_err() {
                assert!(prometheus.process.try_wait().expect("it is ours").is_none(), "{}", prometheus.log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        prometheus
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    async fn asked(&self, path: &str, parameters: &str) -> Value {
        let body = get(self.address, &format!("/api/v1/{path}?{parameters}"), "application/json").await;
        // A long answer comes in pieces, each with its length before it. A JSON text has no line breaks of its own.
        let json: String =
            body.split("\r\n").filter(|line| line.starts_with(['{', '"', '[']) || line.len() > 8).collect();
        serde_json::from_str(&json).unwrap_or(Value::Null)
    }

    /// The values of a query, each with the value of a label.
    async fn query(&self, query: &str, label: &str) -> Vec<(String, f64)> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let told = self.asked("query", &format!("query={encoded}")).await;
        let series = told["data"]["result"].as_array().cloned().unwrap_or_default();
        let value = |series: &Value| series["value"][1].as_str().and_then(|text| text.parse().ok());
        let name = |series: &Value| series["metric"][label].as_str().unwrap_or_default().to_owned();
        series.iter().filter_map(|series| Some((name(series), value(series)?))).collect()
    }

    /// Asks until the answer is as it should be.
    async fn until(&self, query: &str, label: &str, is_good: impl Fn(&[(String, f64)]) -> bool) -> Vec<(String, f64)> {
        let mut last = Vec::new();
        let asking = async {
            loop {
                last = self.query(query, label).await;
                if is_good(&last) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let answered = tokio::time::timeout(PATIENCE, asking).await;
        assert!(answered.is_ok(), "`{query}` gives {last:?}\n{}", self.log());
        last
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It is ours, by its number.
        let _ = self.process.start_kill();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs HOPLINE_TEST_URL and HOPLINE_TEST_PROMETHEUS"]
async fn prometheus_scrapes_both_and_tells_the_99th_percentile_and_the_success_rate() {
    let scene = Scene::new().await;
    let endpoints = [("server", scene.at_server.address()), ("client", scene.at_client.address())];
    let mut prometheus = Prometheus::scraping(&endpoints).await;
    let client = scene.client.clone();
    // One call in four fails.
    let calls = tokio::spawn(async move {
        for item in 0_u32.. {
            let _ = client.call::<u64>("shop", "price", (item,)).await;
            let _ = client.call::<u64>("shop", "total", [(); 0]).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    prometheus.until("up", "job", |jobs| jobs.len() == 2 && jobs.iter().all(|(_, up)| *up == 1.0)).await;
    for side in ["client", "server"] {
        let (buckets, count) =
            (format!("rpc_{side}_call_duration_seconds_bucket"), format!("rpc_{side}_call_duration_seconds_count"));
        let p99 = format!("histogram_quantile(0.99, sum by (le, rpc_method) (rate({buckets}[20s])))");
        let is_time = |time: f64| time.is_finite() && time > 0.0 && time < 30.0;
        let told = prometheus.until(&p99, "rpc_method", |told| {
            told.iter().any(|(method, time)| method == "shop.v1/total" && is_time(*time))
        });
        println!("99 % of the calls, at the {side}: {:?}", told.await);
        let fails = |errors: &str| format!("sum(rate({count}{{rpc_method=\"shop.v1/price\"{errors}}}[20s]))");
        // `total` asks for the price of what there is, as often: one in eight fails.
        let rate = format!("{} / {}", fails(",error_type=\"\""), fails(""));
        let told = prometheus.until(&rate, "job", |told| told.len() == 1 && (0.8..0.95).contains(&told[0].1)).await;
        println!("success, at the {side}: {told:?}");
    }
    let closed = "sum by (state) (hopline_breaker_state{rpc_method=\"shop.v1/price\"})";
    let is_closed = |told: &[(String, f64)]| told.contains(&("closed".to_owned(), 1.0)) && told.len() == 3;
    prometheus.until(closed, "state", is_closed).await;
    // It comes with a second scrape.
    let consumers = "max by (kind) (hopline_queue_consumers{rpc_service=\"shop.v1\"})";
    let has_all = |told: &[(String, f64)]| told.len() == 3 && told.contains(&("work".to_owned(), 1.0));
    prometheus.until(consumers, "kind", has_all).await;
    // The calls of `total` have traces, and Prometheus keeps some of them.
    let exemplars = soon(async {
        loop {
            let told = prometheus
                .asked("query_exemplars", "query=rpc_client_call_duration_seconds_bucket&start=0&end=9999999999");
            let told = told.await["data"].as_array().cloned().unwrap_or_default();
            if !told.is_empty() {
                return told;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let trace = exemplars.await[0]["exemplars"][0]["labels"]["trace_id"].as_str().expect("a trace").to_owned();
    assert_eq!(trace.len(), 32);
    calls.abort();
    prometheus.process.kill().await.expect("it is ours");
    scene.ends().await;
}

//! `amqps://`: with a CA of one's own, with a certificate instead of a password, and with errors that say what is
//! wrong.
//!
//! This needs a RabbitMQ node of the version that `HOPLINE_TEST_NODE` names. `scripts/test users-3.10 users-4.3` runs
//! it with both versions. Otherwise the tests that need one are ignored.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::LazyLock;

use hopline::{Client, Context, DeadLetters, Error, Fault, Method, Running, Server, Service, Tls};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};

mod node;
mod proxy;

use node::Node;
use proxy::Proxy;
use tokio::sync::{OnceCell, RwLock};

/// A node that speaks TLS, and certificates for several clients.
struct Scene {
    node: Node,
    ca: String,
    other_ca: String,
    /// The certificate and key of the user `billing`; then those of somebody unknown, and those of another CA.
    billing: (String, String),
    nobody: (String, String),
    stranger: (String, String),
    /// Takes who has a certificate, and who has none.
    port: u16,
    /// Accepts only clients with a certificate.
    strict_port: u16,
    /// Shows a certificate that has expired.
    expired_port: u16,
    /// Shows a certificate for this machine's IP addresses only.
    ip_port: u16,
}

/// Tests that log in with a certificate hold this for reading. A test that forbids such logins for a moment holds it
/// for writing.
static BY_CERTIFICATE: RwLock<()> = RwLock::const_new(());

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(parameters, KeyPair::generate().expect("a key")).expect("it can be signed")
}

/// A certificate by `ca` with this common name, for these hosts, and its key.
fn issued(ca: &Ca, name: &str, hosts: &[&str], change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
    let mut parameters = CertificateParams::new(hosts).expect("good names");
    parameters.distinguished_name.push(DnType::CommonName, name);
    change(&mut parameters);
    (parameters.signed_by(&key, ca).expect("it can be signed").pem(), key.serialize_pem())
}

/// Ports that nobody uses, outside of the range from which the system takes ports.
fn free_ports<const N: usize>() -> [u16; N] {
    let any = || 10_000 + (uuid::Uuid::new_v4().as_u128() % 10_000) as u16;
    let free = || std::iter::repeat_with(any).find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok());
    let taken = [(); N].map(|()| free().expect("there is a free port"));
    taken.map(|listener| listener.local_addr().expect("it is bound").port())
}

impl Scene {
    async fn start(version: &str) -> Self {
        let (ca, other_ca) = (ca(), ca());
        let server = issued(&ca, "broker", &["localhost"], |_| {});
        let expired = issued(&ca, "broker", &["localhost"], |parameters| {
            (parameters.not_before, parameters.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        });
        let by_ip = issued(&ca, "broker", &["127.0.0.1", "::1"], |_| {});
        let [port, strict_port, expired_port, ip_port] = free_ports();
        let conf = format!(
            "listeners.ssl.1 = 127.0.0.1:{port}\n\
             ssl_options.cacertfile = @conf@/ca.pem\n\
             ssl_options.certfile = @conf@/server.pem\n\
             ssl_options.keyfile = @conf@/server.key\n\
             ssl_options.verify = verify_peer\n\
             ssl_options.fail_if_no_peer_cert = false\n\
             auth_mechanisms.1 = PLAIN\n\
             auth_mechanisms.2 = EXTERNAL\n\
             ssl_cert_login_from = common_name\n"
        );
        let (ca_pem, other_ca_pem) = (ca.pem(), other_ca.pem());
        let files = [
            ("ca.pem", &*ca_pem),
            ("server.pem", &server.0),
            ("server.key", &server.1),
            ("expired.pem", &expired.0),
            ("expired.key", &expired.1),
            ("ip.pem", &by_ip.0),
            ("ip.key", &by_ip.1),
        ];
        let node = Node::with(version, &conf, &files, &["rabbitmq_auth_mechanism_ssl"]).await;
        for (port, certificate, strict) in
            [(strict_port, "server", true), (expired_port, "expired", false), (ip_port, "ip", false)]
        {
            let folder = node.folder().await;
            let [ca, pem, key] = ["ca.pem", &format!("{certificate}.pem"), &format!("{certificate}.key")]
                .map(|file| format!("{folder}/{file}"));
            let options = format!(
                "[{{cacertfile, \"{ca}\"}}, {{certfile, \"{pem}\"}}, {{keyfile, \"{key}\"}}, \
                 {{verify, verify_peer}}, {{fail_if_no_peer_cert, {strict}}}]"
            );
            let listener = format!("rabbit_networking:start_ssl_listener({{\"127.0.0.1\", {port}}}, {options}, 2).");
            node.eval(&listener).await;
        }
        // The user has no usable password, so only its certificate can log it in.
        node.ctl(&["add_user", "billing", "x"]).await;
        node.ctl(&["clear_password", "billing"]).await;
        node.ctl(&["set_permissions", "billing", ".*", ".*", ".*"]).await;
        let billing = issued(&ca, "billing", &[], |_| {});
        let nobody = issued(&ca, "nobody", &[], |_| {});
        let stranger = issued(&other_ca, "billing", &[], |_| {});
        let (ca, other_ca) = (ca_pem, other_ca_pem);
        Self { node, ca, other_ca, billing, nobody, stranger, port, strict_port, expired_port, ip_port }
    }

    /// The one scene that all tests share. It ends with the process.
    async fn get() -> &'static Self {
        static SCENE: OnceCell<Scene> = OnceCell::const_new();
        SCENE.get_or_init(async || Self::start(&node::version()).await).await
    }

    fn trusting(&self) -> Tls {
        Tls::new().ca(self.ca.as_str())
    }

    fn known_by(&self, (certificate, key): &(String, String)) -> Tls {
        self.trusting().identity(certificate.as_str(), key.as_str())
    }
}

/// A calculator that can be called, in a namespace of its own.
async fn calculator(namespace: &str, tls: Tls, url: &str) -> Running {
    let server = Server::builder().namespace(namespace).tls(tls).connect(url).await.expect("it is trusted");
    let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
    server.serve(Service::new("calculator", 1).method(Method::new("add").oneway(), add)).start().await.expect("served")
}

async fn connected(tls: Tls, url: &str) -> Result<Client, Error> {
    Client::builder().tls(tls).connect(url).await
}

/// The error of an attempt to connect.
async fn refusal(tls: Tls, url: &str) -> String {
    match connected(tls, url).await {
        Err(Error::Connect { reason, .. }) => reason,
        other => panic!("expected no connection, not {other:?}"),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_ca_of_ones_own_is_trusted_and_no_other() {
    let scene = Scene::get().await;
    let url = format!("amqps://guest:guest@localhost:{}", scene.port);
    let _server = calculator("trusted", scene.trusting(), &url).await;
    let client = Client::builder().namespace("trusted").tls(scene.trusting()).connect(&url).await;
    let client = client.expect("it is trusted");
    assert_eq!(client.call::<i64>("calculator", "add", (2, 3)).await.expect("answered"), 5);

    for tls in [Tls::new().ca(scene.other_ca.as_str()), Tls::new()] {
        let reason = refusal(tls, &url).await;
        assert!(reason.contains("unknown CA"), "{reason}");
    }
    // Without settings, the system's CAs are used.
    match Client::connect(&url).await {
        Err(Error::Connect { reason, .. }) => assert!(reason.contains("unknown CA"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_certificate_has_to_be_valid_and_for_the_host() {
    let scene = Scene::get().await;
    let reason = refusal(scene.trusting(), &format!("amqps://127.0.0.1:{}", scene.port)).await;
    assert!(reason.contains("another host name") && reason.contains("localhost"), "{reason}");
    let reason = refusal(scene.trusting(), &format!("amqps://localhost:{}", scene.expired_port)).await;
    assert!(reason.contains("has expired"), "{reason}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn an_ip_address_has_to_be_in_the_certificate() {
    let scene = Scene::get().await;
    let on_ipv6 = |port| Proxy::at("[::1]:0", SocketAddr::from(([127, 0, 0, 1], port)));
    let (right, wrong) = (on_ipv6(scene.ip_port).await, on_ipv6(scene.port).await);
    for address in [format!("127.0.0.1:{}", scene.ip_port), right.address().to_string()] {
        let url = format!("amqps://guest:guest@{address}");
        connected(scene.trusting(), &url).await.unwrap_or_else(|error| panic!("{url}: {error}")).close().await;
    }
    let reason = refusal(scene.trusting(), &format!("amqps://guest:guest@{}", wrong.address())).await;
    assert!(reason.contains("another host name") && reason.contains("localhost"), "{reason}");
    let reason = refusal(scene.trusting(), &format!("amqps://guest:guest@localhost:{}", scene.ip_port)).await;
    assert!(reason.contains("another host name"), "{reason}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_port_for_tls_alone_is_named_as_such() {
    let scene = Scene::get().await;
    match Client::connect(&format!("amqp://guest:guest@localhost:{}", scene.port)).await {
        Err(Error::Connect { reason, .. }) => assert!(reason.contains("use amqps://"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_broker_that_asks_for_a_certificate_says_so() {
    let scene = Scene::get().await;
    let url = format!("amqps://guest:guest@localhost:{}", scene.strict_port);
    let reason = refusal(scene.trusting(), &url).await;
    assert!(reason.contains("client certificate") && reason.contains("Tls::identity"), "{reason}");
    let reason = refusal(scene.known_by(&scene.stranger), &url).await;
    assert!(reason.contains("client certificate"), "{reason}");
    // A user in the address is used instead of the certificate.
    connected(scene.known_by(&scene.nobody), &url).await.expect("the password does");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn who_has_a_certificate_needs_no_password() {
    let scene = Scene::get().await;
    let _alone = BY_CERTIFICATE.write().await;
    let url = format!("amqps://localhost:{}", scene.strict_port);
    let server = Server::builder().tls(scene.known_by(&scene.billing)).connect(&url).await.expect("it may log in");
    let who = |context: Context, (_,): (u8,)| async move { Ok::<_, Fault>(context.user().map(str::to_owned)) };
    let _server = server.serve(Service::new("reception", 1).method("who", who)).start().await.expect("served");
    let client = connected(scene.known_by(&scene.billing), &url).await.expect("it may log in");
    let user = client.call::<Option<String>>("reception", "who", (1,)).await.expect("answered");
    assert_eq!(user.as_deref(), Some("billing"));

    let reason = refusal(scene.known_by(&scene.nobody), &url).await;
    assert!(reason.contains("the name in the client certificate has to be a user's"), "{reason}");
    let mechanisms = |names: &str| format!("application:set_env(rabbit, auth_mechanisms, {names}).");
    scene.node.eval(&mechanisms("['PLAIN']")).await;
    let reason = refusal(scene.known_by(&scene.billing), &url).await;
    scene.node.eval(&mechanisms("['PLAIN', 'EXTERNAL']")).await;
    assert!(reason.contains("does not offer EXTERNAL"), "{reason}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn of_several_addresses_each_is_connected_to_as_it_says() {
    let scene = Scene::get().await;
    // The first node's certificate is not trusted, and the other node has no TLS.
    let url = format!("amqps://localhost:{}?order=given,{}", scene.port, scene.node.url());
    Client::connect(&url).await.expect("the second one is there").close().await;
}

#[tokio::test]
async fn settings_for_tls_are_for_amqps_alone() {
    for url in ["amqp://localhost", "memory://", "amqps://localhost,amqp://localhost"] {
        match connected(Tls::new(), url).await {
            Err(Error::Invalid(why)) => assert!(why.contains("use amqps://"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_broker_without_tls_is_named_as_such() {
    let scene = Scene::get().await;
    let url = scene.node.url().replace("amqp://", "amqps://").replace("127.0.0.1", "localhost");
    let reason = refusal(scene.trusting(), &url).await;
    assert!(reason.contains("does not speak TLS"), "{reason}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn dead_letters_are_looked_at_by_tls() {
    let scene = Scene::get().await;
    let _may = BY_CERTIFICATE.read().await;
    let url = format!("amqps://localhost:{}", scene.strict_port);
    let _server = calculator("dead", scene.known_by(&scene.billing), &url).await;
    let builder = DeadLetters::builder().namespace("dead").tls(scene.known_by(&scene.billing));
    let dead = builder.connect(&url, "calculator").await.expect("it may log in");
    assert_eq!(dead.count().await.expect("its server has made its queue"), 0);
    dead.close().await;
    match DeadLetters::builder().tls(Tls::new()).connect(&url, "calculator").await {
        Err(Error::Connect { reason, .. }) => assert!(reason.contains("unknown CA"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

/// The command `hopline`, after cargo has built it.
static HOPLINE: LazyLock<PathBuf> = LazyLock::new(|| {
    let mut build = std::process::Command::new(env!("CARGO"));
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    build.args(["build", "--quiet", "--package", "hopline-cli", "--message-format=json"]);
    let built = build.stderr(Stdio::inherit()).output().expect("cargo can be run");
    assert!(built.status.success(), "the command is built");
    let told = built.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let mut programs = told.filter_map(|line| {
        let told: serde_json::Value = serde_json::from_slice(line).expect("cargo tells it in JSON");
        told["executable"].as_str().map(PathBuf::from)
    });
    programs.next().expect("it is a program")
});

async fn hopline(arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(&*HOPLINE);
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
        command.env_remove(variable);
    }
    command
        .env_remove("RUST_LOG")
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .expect("it can be run")
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn the_command_has_options_for_tls() {
    let scene = Scene::get().await;
    // The command is built before a server runs on this thread, which would miss its heartbeats for a minute.
    tokio::task::spawn_blocking(|| LazyLock::force(&HOPLINE)).await.expect("it is built");
    let _may = BY_CERTIFICATE.read().await;
    let url = format!("amqps://localhost:{}", scene.strict_port);
    let _server = calculator("command", scene.known_by(&scene.billing), &url).await;
    let folder = std::env::temp_dir().join(format!("hopline-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("there is room for it");
    let file = |name: &str, text: &str| {
        std::fs::write(folder.join(name), text).expect("there is room for it");
        folder.join(name).to_str().expect("it is text").to_owned()
    };
    let (ca, cert, key) =
        (file("ca.pem", &scene.ca), file("billing.pem", &scene.billing.0), file("billing.key", &scene.billing.1));
    let by_tls = ["--url", &url, "--ca", &ca, "--cert", &cert, "--key", &key, "--namespace", "command"];
    let run = async |command: &[&str], options: &[&str]| {
        let output = hopline(&[command, options].concat()).await;
        let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (output.status.code(), printed, said)
    };
    let called = run(&["call", "calculator.add", "[2, 3]"], &by_tls).await;
    assert_eq!(called, (Some(0), "5\n".to_owned(), String::new()));
    let listed = run(&["dead", "ls", "calculator", "--json"], &by_tls).await;
    assert_eq!(listed, (Some(0), "[]\n".to_owned(), String::new()));
    // The command has connected: it says that nobody serves the benchmark.
    let (code, _, said) = run(&["bench", "call", "--seconds", "0.1"], &by_tls).await;
    assert!(code == Some(1) && said.contains("nobody serves `bench.v1`"), "{said}");

    let (code, _, said) = run(&["call", "calculator.add"], &["--url", &url]).await;
    assert!(code == Some(1) && said.contains("unknown CA: give its CA with `--ca`"), "{said}");
    let (code, _, said) = run(&["call", "calculator.add"], &["--url", &url, "--ca", &ca]).await;
    assert!(code == Some(1) && said.contains("`--cert` and `--key`"), "{said}");
    let (code, _, said) = run(&["call", "calculator.add"], &["--url", &url, "--ca", "/no/such/file"]).await;
    assert!(code == Some(2) && said.contains("`--ca /no/such/file` cannot be read"), "{said}");
    let (code, _, said) = run(&["call", "calculator.add"], &["--url", "amqp://localhost", "--ca", &ca]).await;
    assert!(code == Some(2) && said.contains("use amqps://"), "{said}");
    std::fs::remove_dir_all(folder).expect("it is ours");
}

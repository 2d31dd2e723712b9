//! What takes a process of its own to be tested: its environment, and the signals that end it.
//!
//! Each test starts this very program again, as the process that it is about.

#![cfg(unix)]

use std::process::Stdio;
use std::time::Duration;

use hopline::{Client, Context, DeadLetters, Error, Fault, Method, Server, Service};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// How long a test waits for what has to come, before it fails.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(3600);
/// Says what the process is to do.
const PART: &str = "HOPLINE_PART";

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

// ------------------------------------------------------------------------------- the process

#[tokio::test]
#[ignore = "the other tests start it, as a process of its own"]
async fn process() {
    match std::env::var(PART).as_deref() {
        Ok("serve") => serve().await,
        Ok("call") => call().await,
        Ok("connect") => connect().await,
        Ok("hasty") => hasty().await,
        Ok("asked") => asked().await,
        _ => {}
    }
}

/// Calls a method of its own that takes for ever unless SIGUSR1 comes, and serves until a signal.
async fn serve() {
    let log = tracing_subscriber::fmt().with_env_filter("hopline=info").with_ansi(false);
    log.with_writer(std::io::stdout).init();
    let work = |_: Context, (): ()| async {
        println!("it works");
        let user_signal = tokio::signal::unix::SignalKind::user_defined1();
        tokio::signal::unix::signal(user_signal).expect("it can be heard").recv().await;
        Ok::<_, Fault>(7)
    };
    let service = Service::new("alone", 1).method(Method::new("work").finishes(), work);
    let server = Server::connect("memory://").await.expect("in memory").serve(service);
    let running = server.start().await.expect("it can be served");
    let client = Client::builder().timeout(LONG).connect("memory://").await.expect("in memory");
    // The test sends a signal as soon as the handler says that it works.
    let ended = running.run_until_signal();
    let call = tokio::spawn(async move {
        let answer = client.call::<u8>("alone", "work", ()).await;
        println!("answered {answer:?}");
    });
    ended.await;
    println!("it has ended");
    if std::env::var_os("AWAIT_REPLY").is_some() {
        call.await.expect("no panic");
    }
}

/// Gets a signal after it has said that it serves, and before it waits for one.
async fn hasty() {
    let server = Server::connect("memory://").await.expect("in memory").serve(Service::new("alone", 1));
    let ended = server.start().await.expect("it can be served").run_until_signal();
    let id = std::process::id().to_string();
    let told = Command::new("sh").args(["-c", "kill -s TERM \"$0\"", &id]).status().await;
    assert!(told.expect("there is a shell").success());
    ended.await;
    println!("it has ended");
}

/// Has itself drained as an operator does, while a call of its own runs until SIGUSR1 comes.
async fn asked() {
    let log = tracing_subscriber::fmt().with_env_filter("hopline=info").with_ansi(false);
    log.with_writer(std::io::stdout).init();
    let work = |_: Context, (): ()| async {
        println!("it works");
        let user_signal = tokio::signal::unix::SignalKind::user_defined1();
        tokio::signal::unix::signal(user_signal).expect("it can be heard").recv().await;
        Ok::<_, Fault>(7)
    };
    let service = Service::new("alone", 1).method("work", work);
    let server = Server::connect("memory://").await.expect("in memory").serve(service).allow_drain(|_| true);
    let running = server.start().await.expect("it can be served");
    let client = Client::builder().timeout(LONG).connect("memory://").await.expect("in memory");
    let instance = running.instance().to_owned();
    let ended = running.run_until_signal();
    let call = client.call::<u8>("alone", "work", ()).start().await.expect("on its way");
    tokio::spawn(async move { client.registry().drain("alone", &instance).await.expect("it is allowed") });
    ended.await;
    println!("answered {:?}, and it has ended", call.await);
}

/// Serves and calls as the environment says.
async fn call() {
    let service = Service::new("alone", 1)
        .method("caller", |context: Context, (): ()| async move { Ok::<_, Fault>(context.caller().map(str::to_owned)) })
        .method("never", |_: Context, (): ()| std::future::pending::<Result<(), Fault>>());
    let _running = Server::connect_env().await.expect("as the environment says").serve(service).start().await;
    let client = Client::connect_env().await.expect("as the environment says");
    let caller = client.call::<String>("alone", "caller", ()).await.expect("answered");
    println!("{}", caller.strip_suffix(client.instance()).expect("the id is at its end"));
    let late = client.call::<()>("alone", "never", ()).await.expect_err("nobody answers");
    println!("{late}");
    let url = hopline::environment::url().expect("it is set");
    // What the code says wins.
    let elsewhere = Client::builder().namespace("elsewhere").with_env().connect(&url).await.expect("in memory");
    println!("{}", elsewhere.call::<()>("alone", "caller", ()).await.expect_err("nobody is there"));
    let here = Client::builder().namespace("shop").connect(&url).await.expect("in memory");
    here.call::<String>("alone", "caller", ()).await.expect("that is where it is served");
    println!("served in shop");
}

/// Tells why the environment cannot be used.
async fn connect() {
    let outcomes: [Result<(), Error>; 3] = [
        Client::connect_env().await.map(drop),
        Server::connect_env().await.map(drop),
        DeadLetters::connect_env("mail").await.map(drop),
    ];
    for outcome in outcomes {
        println!("{}", outcome.expect_err("it cannot be used"));
    }
}

// --------------------------------------------------------------------------------- its tests

/// The process, and what it prints.
struct Process {
    child: Child,
    printed: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(part: &str, environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
        command.args(["--exact", "process", "--ignored", "--nocapture"]);
        for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
            command.env_remove(variable);
        }
        command.env(PART, part).envs(environment.iter().copied());
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("it can be run");
        let printed = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Self { child, printed }
    }

    /// The next line that has this in it.
    async fn line(&mut self, part: &str) -> String {
        loop {
            let line = soon(self.printed.next_line()).await.expect("it prints text");
            let line = line.unwrap_or_else(|| panic!("it has ended, and has not printed `{part}`"));
            if line.contains(part) {
                return line;
            }
        }
    }

    async fn signal(&self, name: &str) {
        let id = self.child.id().expect("it has not ended").to_string();
        // A shell has `kill` built in.
        let told = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &id]).status().await;
        assert!(told.expect("there is a shell").success());
    }

    async fn ends_well(mut self) {
        while soon(self.printed.next_line()).await.expect("it prints text").is_some() {}
        assert!(soon(self.child.wait()).await.expect("it can be waited for").success());
    }
}

#[tokio::test]
async fn a_signal_ends_a_server_once_what_runs_has_been_answered() {
    for signal in ["TERM", "INT"] {
        let mut process = Process::start("serve", &[("AWAIT_REPLY", "yes")]);
        process.line("it works").await;
        process.signal(signal).await;
        process.line("draining").await;
        process.signal("USR1").await;
        let rest = [process.line("answered").await, process.line("it has ended").await];
        assert!(rest[0].contains("answered Ok(7)"), "{rest:?}");
        process.ends_well().await;
    }
}

#[tokio::test]
async fn a_signal_before_it_is_awaited_is_heard() {
    let mut process = Process::start("hasty", &[]);
    process.line("it has ended").await;
    process.ends_well().await;
}

#[tokio::test]
async fn a_drain_from_afar_ends_it_as_a_signal_does_and_a_first_signal_after_it_breaks_off_nothing() {
    let mut process = Process::start("asked", &[]);
    process.line("it works").await;
    process.line("draining").await;
    process.signal("TERM").await;
    process.signal("USR1").await;
    process.line("answered Ok(7), and it has ended").await;
    process.ends_well().await;
}

#[tokio::test]
async fn a_second_signal_breaks_off_the_drain() {
    let mut process = Process::start("serve", &[]);
    process.line("it works").await;
    process.signal("TERM").await;
    process.line("draining").await;
    process.signal("INT").await;
    process.line("a second signal").await;
    process.line("it has ended").await;
    process.ends_well().await;
}

#[tokio::test]
async fn the_environment_says_where_as_whom_and_for_how_long() {
    let environment = [
        ("HOPLINE_URL", "memory://alone"),
        ("HOPLINE_NAMESPACE", "shop"),
        ("HOPLINE_NAME", "billing-web"),
        ("HOPLINE_TIMEOUT", "50ms"),
        ("HOPLINE_CONNECT_TIMEOUT", "5s"),
    ];
    let mut process = Process::start("call", &environment);
    process.line("billing-web ").await;
    process.line("gave no reply within 50ms").await;
    process.line("nobody serves `alone.v1`").await;
    process.line("served in shop").await;
    process.ends_well().await;
}

#[tokio::test]
async fn an_environment_that_cannot_be_used_is_told_by_variable() {
    let cases: [(&[(&str, &str)], &str); 3] = [
        (&[], "HOPLINE_URL is not set: it names the broker"),
        (&[("HOPLINE_URL", "memory://"), ("HOPLINE_TIMEOUT", "2")], "HOPLINE_TIMEOUT is \"2\": write a whole number"),
        (&[("HOPLINE_URL", "memory://"), ("HOPLINE_NAMESPACE", "a b")], "HOPLINE_NAMESPACE is \"a b\": the namespace"),
    ];
    for (environment, said) in cases {
        let mut process = Process::start("connect", environment);
        for _ in ["client", "server", "dead letters"] {
            process.line(said).await;
        }
        process.ends_well().await;
    }
}

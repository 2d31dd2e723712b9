//! Runs every example as a user would, and checks what it prints, on the broker that `HOPLINE_TEST_URL` names, or in
//! memory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Output;

use tokio::process::Command;

mod programs;

use programs::{DEMO, Server, example, soon};

fn url() -> String {
    std::env::var("HOPLINE_TEST_URL").unwrap_or_else(|_| "memory://".to_owned())
}

fn in_memory() -> bool {
    url().starts_with("memory:")
}

async fn output(mut command: Command) -> Output {
    soon(command.output()).await.expect("it can be run")
}

/// The lines that the program prints. It has to end well.
async fn lines(command: Command) -> Vec<String> {
    let output = output(command).await;
    assert!(output.status.success(), "it ended with {}: {output:?}", output.status);
    let noise = String::from_utf8_lossy(&output.stderr);
    assert!(noise.is_empty() || noise.contains("a bug"), "only the panic that `errors` shows is told: {noise}");
    String::from_utf8(output.stdout).expect("it prints text").lines().map(str::to_owned).collect()
}

/// What an example prints for each way of telling it the broker's address.
async fn every_way(name: &str) -> Vec<Vec<String>> {
    let mut by_argument = example(name);
    by_argument.arg(url());
    let mut by_environment = example(name);
    by_environment.env("HOPLINE_URL", url());
    let mut printed = vec![lines(by_argument).await, lines(by_environment).await];
    if in_memory() {
        printed.push(lines(example(name)).await);
    }
    printed
}

fn sorted<'a>(lines: impl IntoIterator<Item = &'a String>) -> Vec<&'a str> {
    let mut lines: Vec<&str> = lines.into_iter().map(String::as_str).collect();
    lines.sort_unstable();
    lines
}

/// The instances in the lines `instance ID says …`, each of which says its own id.
fn instances(lines: &[String]) -> BTreeSet<&str> {
    let said = lines.iter().filter_map(|line| line.trim_start().strip_prefix("instance "));
    said.map(|said| {
        let (instance, answer) = said.split_once(" says ").expect("what it says");
        assert!(answer.contains(instance), "an instance says its id: {said}");
        instance
    })
    .collect()
}

/// Runs an example until this many instances answer it. On a busy machine one may take longer than the example waits.
async fn once_all_answer(count: usize, run: impl AsyncFn() -> Vec<Vec<String>>) -> Vec<Vec<String>> {
    for _ in 0..20 {
        let printed = run().await;
        if printed.iter().all(|lines| instances(lines).len() == count) {
            return printed;
        }
    }
    panic!("{count} instances have never answered together");
}

#[test]
fn every_example_has_a_test_that_begins_with_its_name() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let files = std::fs::read_dir(folder).expect("the examples are there");
    let examples: Vec<PathBuf> = files.map(|file| file.expect("it can be read").path()).collect();
    let is_example =
        |path: &&PathBuf| path.extension().is_some_and(|end| end == "rs") || path.join("main.rs").is_file();
    let examples: Vec<_> = examples.iter().filter(is_example).collect();
    assert!(!examples.is_empty());
    for path in examples {
        let name = path.file_stem().and_then(|name| name.to_str()).expect("a plain name");
        assert!(include_str!("examples.rs").contains(&format!("\nasync fn {name}_")), "the example `{name}` has none");
    }
}

#[tokio::test]
async fn rules_hold_calls_back_and_let_them_go() {
    for lines in every_way("rules").await {
        let [with, without] = &lines[..] else { panic!("two lines: {lines:?}") };
        assert!(with.starts_with("with the rule: ") && with.contains("example-of-rules.v1.order"), "{with}");
        assert!(without.starts_with("without it: nobody serves `example-of-rules.v1`"), "{without}");
    }
}

#[tokio::test]
async fn quickstart_calls_in_every_style() {
    for lines in once_all_answer(2, async || every_way("quickstart").await).await {
        let mut lines = lines.into_iter();
        let mut next = || lines.next().expect("there is more to come");
        let (mut this, mut following) = (1_u64, 1_u64);
        for n in 0..20 {
            assert_eq!(next(), format!("fib({n}) = {this}"));
            assert!(n != 10 || this == 89);
            (this, following) = (following, this + following);
        }
        for n in 0..20 {
            let line = next();
            let cost =
                line.strip_prefix(&format!("exp2({n}) = {} cost=", 1 << n)).and_then(|cost| cost.strip_suffix("ns"));
            let cost = cost.unwrap_or_else(|| panic!("not the power and its cost: {line}"));
            cost.parse::<u64>().expect("the cost is a number");
        }
        let rest: Vec<String> = lines.collect();
        let styles = [
            "sync: fib(30) = 1346269",
            "future: fib(40) = 165580141",
            "callback: fib(50) = Ok(20365011074)",
            "the server logs: a oneway call",
            "broadcast: 2 instances answered",
        ];
        for style in styles {
            assert!(rest.iter().any(|line| line == style), "no `{style}` in {rest:?}");
        }
        assert_eq!(instances(&rest).len(), 2, "{rest:?}");
    }
}

#[tokio::test]
async fn blocking_waits_for_one_call_and_for_several() {
    for lines in every_way("blocking").await {
        assert_eq!(lines, ["add(2, 3) = 5", "one of several = 2", "one of several = 4", "one of several = 6"]);
    }
}

#[tokio::test]
async fn callbacks_get_every_outcome() {
    for lines in every_way("callbacks").await {
        let squares = ["square(1) = 1", "square(2) = 4", "square(3) = 9", "square(4) = 16", "square(5) = 25"];
        assert_eq!(sorted(&lines), squares);
    }
}

#[tokio::test]
async fn errors_are_sentences_that_say_what_to_do() {
    for lines in every_way("errors").await {
        let sentences = [
            ("overdrawn by 50 cents", ""),
            ("a panic: INTERNAL: `errors.v1.crash` panicked: the log of instance ", " says why"),
            ("a deadline: `errors.v1.never` gave no reply within 100ms", "allow more time with `.timeout()`"),
            (
                "a method that is not there: UNIMPLEMENTED: `errors.v1` has no method `withdrew`",
                "crash, never, withdraw",
            ),
            ("arguments that do not fit: INVALID_ARGUMENT: the arguments of `withdraw(cents: u64)", "expected u64"),
            ("a service that is not there: nobody serves `nobody.v1`", "on the same namespace?"),
            ("a name that cannot be: the service `no body` has a ' ' in it", "use letters, digits, `_` and `-`"),
            ("too much: the request takes 20000", "raise `max_message_size` on both sides"),
        ];
        assert_eq!(lines.len(), sentences.len(), "{lines:?}");
        for (line, (start, end)) in lines.iter().zip(sentences) {
            assert!(line.starts_with(start) && line.ends_with(end), "`{line}` is not `{start}…{end}`");
        }
    }
}

#[tokio::test]
async fn custom_middleware_logs_each_call_and_checks_its_token() {
    for lines in every_way("custom_middleware").await {
        let (logged, told): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.starts_with("ledger.v1."));
        assert_eq!(told[0], "clerk: Ok(4200)");
        assert_eq!(told[1], "guest: Err(Fault: PERMISSION_DENIED: a guest may not call `balance`)");
        assert_eq!(told[2], "nobody: Err(Fault: UNAUTHENTICATED: a call needs a token)");
        assert_eq!(told.len(), 3, "{lines:?}");
        // The oneway call may run at any time.
        let user = logged[0].split(' ').find_map(|word| word.strip_prefix("user=")).expect("a user");
        let mut calls: Vec<_> = logged
            .iter()
            .map(|line| line.replace(&format!("user={user} "), ""))
            .map(|line| line.split_once(" queued=").map(|(call, times)| (call.to_owned(), times.to_owned())))
            .map(|line| line.expect("it tells how long it waited"))
            .collect();
        calls.sort();
        let methods: Vec<_> = calls.iter().map(|(call, _)| call.as_str()).collect();
        let expected = [
            "ledger.v1.audit caller=clerk OK",
            "ledger.v1.balance caller=clerk OK",
            "ledger.v1.balance caller=guest PERMISSION_DENIED",
            "ledger.v1.balance caller=nobody UNAUTHENTICATED",
        ];
        assert_eq!(methods, expected, "{lines:?}");
        for (call, times) in &calls {
            let did_run = call.ends_with("OK");
            assert_eq!(times == "- handled=-", !did_run, "{call}: {times}");
            assert_eq!(times.matches("us").count(), if did_run { 2 } else { 0 }, "{call}: {times}");
        }
    }
}

#[cfg(feature = "metrics")]
#[tokio::test]
async fn metrics_tell_how_calls_have_ended() {
    for lines in every_way("metrics").await {
        assert_eq!(lines[0], "served on this machine: true");
        let of_method = |method: &str| lines.iter().filter(|line| line.contains(method)).collect::<Vec<_>>();
        let (taken, refilled) = (of_method("\"stock.v1/take\""), of_method("\"stock.v1/refill\""));
        assert!(taken[0].contains("\"OK\"") && taken[0].ends_with(" 2"), "{taken:?}");
        assert!(taken[1].contains("error_type=\"service_error\"") && taken[1].ends_with(" 1"), "{taken:?}");
        assert!(refilled[0].contains("\"OK\"") && refilled[0].ends_with(" 1"), "{refilled:?}");
        assert_eq!((taken.len(), refilled.len(), lines.len()), (2, 1, 4), "{lines:?}");
    }
}

#[cfg(feature = "metrics")]
#[tokio::test]
async fn opentelemetry_has_both_sides_of_a_call_in_one_trace() {
    for lines in every_way("opentelemetry").await {
        let expected = [
            "checkout (Internal)",
            "  traced-shop.v1/order (Client)",
            "    hopline.attempt (Internal)",
            "    traced-shop.v1/order (Server)",
            "      traced-shop.v1/take (Client)",
            "        hopline.attempt (Internal)",
            "        traced-shop.v1/take (Server)",
            "  traced-shop.v1/note (Producer)",
            "    hopline.attempt (Internal)",
            "traced-shop.v1/note (Consumer, linked)",
        ];
        assert_eq!(lines, expected);
    }
}

#[tokio::test]
async fn retry_tries_again_what_may_be_tried_again() {
    for lines in every_way("retry").await {
        let expected = [
            "count: 17 after 3 runs",
            "take: UNAVAILABLE: the database is away after 1 runs",
            "check: UNAVAILABLE: the shelf is gone for good after 1 runs",
            "count once: UNAVAILABLE: the database is away after 1 runs",
            "2 attempts were not the first",
        ];
        assert_eq!(lines, expected);
    }
}

#[tokio::test]
async fn breaker_sends_nothing_while_it_is_open() {
    for lines in every_way("breaker").await {
        let expected = ["20 calls have failed", "100 more were not sent, and 0 ran", "fragile.v1.work is open: true"];
        assert_eq!(lines[..3], expected);
        assert_eq!(lines[3..], ["run 21 went well"]);
    }
}

#[tokio::test]
async fn cache_keeps_results_and_shares_calls() {
    for lines in every_way("cache").await {
        let expected = [
            "100 answers at once, 1 run",
            "Rome: sunny, 0 runs",
            "Oslo: sunny, 1 run",
            "Rome: sonnig, 1 run",
            "Rome: sunny, 1 run",
            "Rome: sunny, 1 run",
            "100 from the cache, 4 not",
        ];
        assert_eq!(lines, expected);
    }
}

#[tokio::test]
async fn smoothing_takes_what_can_be_done_and_refuses_the_rest_at_once() {
    let path = std::env::temp_dir().join(format!("hopline-smoothing-{}.svg", std::process::id()));
    let mut command = example("smoothing");
    command.arg(url()).arg(&path);
    let lines = lines(command).await;
    let numbers = |line: &str| -> Vec<f64> {
        let words = line.split(|c: char| !c.is_ascii_digit() && c != '.');
        words.filter_map(|word| word.parse().ok()).collect()
    };
    let [offered, done, refused, runs] = numbers(&lines[0])[..] else { panic!("{lines:?}") };
    assert!(offered == 2075.0 && done + refused == offered && runs == done, "each call has one end: {lines:?}");
    assert!(done >= 25.0 && refused > 0.0, "{lines:?}");
    // Half of the calls may be tried again once, and a fifth of these and some are within the budget.
    let [further, over] = numbers(&lines[1])[..] else { panic!("{lines:?}") };
    assert!(further > 0.0 && further <= 1038.0 && further + over <= 1038.0, "{lines:?}");
    assert!(numbers(&lines[2])[0] <= 25.0, "no more wait than may: {lines:?}");
    assert!(numbers(&lines[3])[0] <= 50.0, "no more is done than can be: {lines:?}");
    let chart = std::fs::read_to_string(&path).expect("it was drawn");
    std::fs::remove_file(&path).expect("it is there");
    assert!(chart.starts_with("<svg") && chart.matches("<polyline").count() == 5, "{chart}");
}

#[tokio::test]
async fn events_reach_every_subscription_that_matches() {
    for lines in every_way("events").await {
        // The two subscriptions do not wait for each other. Each gets its events in order.
        let (every, shipped): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.starts_with("order.* "));
        let order = "Order { id: 1, total_cents: 4200 }";
        let heard = ["created", "shipped"].map(|what| format!("order.* heard order.{what}: {order}"));
        assert_eq!(every, heard.iter().collect::<Vec<_>>());
        assert_eq!(shipped, ["order.shipped heard of order 1"]);
    }
}

#[tokio::test]
async fn groups_share_events_and_keep_what_fails() {
    for lines in every_way("groups").await {
        let (handled, of_umbrella) = lines.split_at(7);
        // Which instance handles an event is up to the broker, and so is the order.
        let handled: Vec<_> = handled.iter().map(|line| line.split(" by the ").next().unwrap_or_default()).collect();
        let expected = ["invoices: order 1", "invoices: order 2", "invoices: order 3"].into_iter();
        let counted = ["statistics: order 1", "statistics: order 2", "statistics: order 3", "statistics: order 4"];
        let all = BTreeSet::from_iter(handled.iter().copied());
        assert_eq!((handled.len(), all), (7, expected.chain(counted).collect()), "each once");
        let [dead, replayed] = of_umbrella else { panic!("two lines: {of_umbrella:?}") };
        assert_eq!(dead, r#"dead letter: the method returned its own error: "there is no price of umbrella""#);
        assert!(replayed.starts_with("replayed: invoices: order 4 by the "), "{replayed}");
    }
}

#[tokio::test]
async fn replay_tells_what_was_published_before_and_goes_on() {
    for lines in every_way("replay").await {
        let expected = [
            "the group hears of order 1",
            "the group hears of order 2",
            "orders 3 and 4 were published while nobody was there",
            "the group goes on with order 3",
            "the group goes on with order 4",
            "a newcomer hears of order 1",
            "a newcomer hears of order 2",
            "a newcomer hears of order 3",
            "a newcomer hears of order 4",
        ];
        assert_eq!(lines, expected);
    }
}

#[tokio::test]
async fn outbox_publishes_what_was_committed_and_its_subscriber_drops_copies() {
    for lines in every_way("outbox").await {
        let expected = [
            "tea: committed",
            "coffee: rolled back",
            "cake: committed",
            "never published: the event key `order.*` has a wildcard in it: those are for the patterns of subscribers",
            "an invoice for tea",
            "tea came again, and is dropped",
            "an invoice for cake",
        ];
        assert_eq!(lines, expected);
    }
}

#[tokio::test]
async fn oneway_calls_wait_for_the_next_server() {
    for lines in every_way("oneway").await {
        let (sent, printed) = lines.split_at(3);
        assert_eq!(sent, ["the broker has line 1", "the broker has line 2", "the broker has line 3"]);
        // Several calls run at once, in any order.
        assert_eq!(sorted(printed), ["a server prints line 1", "a server prints line 2", "a server prints line 3"]);
    }
}

#[tokio::test]
async fn broadcast_starts_three_servers_where_there_is_none() {
    let _demo = DEMO.lock().await;
    for lines in once_all_answer(3, async || every_way("broadcast").await).await {
        assert_eq!(lines.len(), 5, "{lines:?}");
        assert_eq!(lines[0], "3 replies");
        let instances = instances(&lines);
        assert_eq!(instances.len(), 3);
        let first = lines[4].strip_prefix("first: ").expect("the first of the stream");
        assert!(instances.contains(first), "{lines:?}");
    }
}

#[tokio::test]
async fn server_serves_until_it_is_told_to_stop() {
    let _demo = DEMO.lock().await;
    let server = Server::start(&url()).await;
    server.signal("TERM").await;
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn client_calls_the_server_of_another_process() {
    let _demo = DEMO.lock().await;
    let mut client = example("client");
    client.arg(url());
    if in_memory() {
        let output = output(client).await;
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, "client: nobody serves `demo.v1`: is a server running, and on the same namespace?\n");
        return;
    }
    let mut server = Server::start(&url()).await;
    let answers = [
        format!("answered by {}", server.instance),
        "fib(10) = 89".to_owned(),
        "exp(2, 10) = 1024".to_owned(),
        "add(2, 3) = 5".to_owned(),
        "echo of 1024 bytes".to_owned(),
        "div(1, 0): division by zero".to_owned(),
    ];
    assert_eq!(lines(client).await, answers);
    assert_eq!(server.line().await, "note: hello from a client");

    let broadcast = once_all_answer(1, async || {
        let mut broadcast = example("broadcast");
        broadcast.arg(url());
        vec![lines(broadcast).await]
    });
    let broadcast = broadcast.await.remove(0);
    assert_eq!(broadcast[0], "1 replies", "those who serve are asked, and no others started");
    assert_eq!(instances(&broadcast), BTreeSet::from([server.instance.as_str()]));
    server.signal("TERM").await;
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn hedging_makes_second_attempts_of_calls_that_hang() {
    for lines in every_way("hedging").await {
        let number = |line: &str, sign: &str| -> usize {
            let (before, _) = line.split_once(sign).unwrap_or_else(|| panic!("no `{sign}` in {line}"));
            before.rsplit(' ').next().expect("a number").parse().expect("a number")
        };
        let usual = number(&lines[0], " of 300");
        assert!(lines[0].starts_with("as usual: ") && usual >= 6, "{lines:?}");
        // The first calls are not hedged, until it is known what is late.
        let hedged = number(&lines[1], " of 300");
        assert!(lines[1].starts_with("hedged: ") && hedged < usual, "{lines:?}");
        assert!(number(&lines[2], " were quicker") > 0, "{lines:?}");
    }
}

//! `hopline rules` as a shell sees it.
//!
//! The tests need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

use serde_json::{Value, json};

mod command;

use command::{Place, hopline, is_refused, printed, said, soon};

#[test]
fn what_cannot_be_a_rule_is_wrong_usage() {
    for command in ["set", "get", "unset", "history"] {
        let help = printed(hopline(&["rules", command, "--help"]).output().expect("it can be run"));
        assert!(help.contains(&format!("  hopline rules {command}")), "{help}");
    }
    for (arguments, told) in [
        (&["rules", "set", "demo.add"][..], "<SETTING=VALUE>"),
        (&["rules", "set", "demo.add", "timeout=2"], "`timeout=2`: write a whole number above 0 and a unit"),
        (&["rules", "set", "demo.add", "breaker=shut"], "`breaker=shut`: write `open` or `auto`"),
        (&["rules", "set", "demo.add", "speed=1"], "`speed` is no setting of a rule"),
    ] {
        is_refused(arguments, told);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_rule_is_set_shown_changed_and_taken_away() {
    let scene = Place::new("rules");
    let none = scene.run_here(&["rules", "get"]).await;
    assert_eq!(
        (none.status.code(), said(&none)),
        (Some(0), format!("no rule is set in the namespace `{}`", scene.namespace))
    );
    let builder = hopline::Client::builder().namespace(&scene.namespace).rules();
    let client = builder.connect(&scene.url).await.expect("the broker is there");
    let table = printed(scene.run_here(&["rules", "set", "demo.add", "timeout=2s", "retry=1", "--name", "me"]).await);
    assert!(table.contains("demo.v1.add  timeout=2s retry=1  guest"), "{table}");
    soon(async {
        while client.rules().heeded().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    printed(scene.run_here(&["rules", "set", "demo", "breaker=open"]).await);
    printed(scene.run_here(&["rules", "unset", "demo.add", "timeout"]).await);
    let get: Value =
        serde_json::from_str(&printed(scene.run_here(&["rules", "get", "demo", "--json"]).await)).expect("JSON");
    let told: Vec<_> = get
        .as_array()
        .expect("a list")
        .iter()
        .map(|set| json!([set["target"], set["timeout_ms"], set["retry"], set["breaker"], set["user"]]))
        .collect();
    assert_eq!(told, [json!(["demo.v1", null, null, "open", "guest"]), json!(["demo.v1.add", null, 1, null, "guest"])]);
    printed(scene.run_here(&["rules", "unset", "demo.add"]).await);
    let history = printed(scene.run_here(&["rules", "history", "demo.add"]).await);
    let rules: Vec<_> = history.lines().skip(1).map(|line| line.split("  ").nth(1).expect("a rule").trim()).collect();
    assert_eq!(rules, ["timeout=2s retry=1", "retry=1", "-"], "{history}");
    let wrong = scene.run_here(&["rules", "set", "a b", "retry=1"]).await;
    assert!(
        wrong.status.code() == Some(2) && said(&wrong).contains("`a b`: write SERVICE or SERVICE.METHOD"),
        "{wrong:?}"
    );
}

//! `hopline context` as a shell sees it, and which settings the other commands use.
//!
//! They need no broker: `ls` tells the namespace that it has looked in, also in memory.

use std::path::PathBuf;
use std::process::Output;

use serde_json::{Value, json};

mod command;

use command::{hopline, printed, said};

/// A folder of its own for the settings of a user.
struct User(PathBuf);

impl User {
    fn new(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("user-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        Self(folder)
    }

    fn run_with(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = hopline(arguments);
        command.env("XDG_CONFIG_HOME", &self.0).envs(variables.iter().copied()).output().expect("it can be run")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(&[], arguments)
    }

    fn add(&self, name: &str, namespace: &str) {
        let added = self.run(&["context", "add", name, "--url", "memory://", "--namespace", namespace]);
        assert_eq!(printed(added), format!("added {name}"));
    }

    /// The namespace that `ls` has looked in.
    #[track_caller]
    fn used(&self, variables: &[(&str, &str)], arguments: &[&str]) -> String {
        let output = self.run_with(variables, &[&["ls", "--json"], arguments].concat());
        let said = said(&output);
        let named = said.strip_prefix("no instance replies in the namespace `").and_then(|said| said.strip_suffix('`'));
        named.unwrap_or_else(|| panic!("{said}")).to_owned()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn contexts_are_kept_listed_shown_and_removed_and_no_password_is_shown() {
    let user = User::new("kept");
    let url = "amqp://me:s3cret@broker.example.com";
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    user.add("local", "shop");
    let mut command = hopline(&["context", "add", "prod", "--url", "-", "--connect-timeout", "2s"]);
    let added =
        command.env("XDG_CONFIG_HOME", &user.0).write_stdin(format!("{url}\n")).output().expect("it can be run");
    assert_eq!(printed(added), "added prod");
    let listed = printed(user.run(&["context", "ls"]));
    let lines: Vec<Vec<_>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    let expected = [
        &["NAME", "URL", "NAMESPACE"],
        &["local", "memory://", "shop"],
        &["prod", "amqp://me:***@broker.example.com", "-"],
    ];
    assert_eq!(lines, expected, "{listed}");
    assert_eq!(
        said(&user.run(&["context", "show"])),
        "no context is selected: `hopline context select NAME` selects one"
    );
    assert_eq!(printed(user.run(&["context", "select", "prod"])), "selected prod");
    let shown: Value = serde_json::from_str(&printed(user.run(&["context", "show", "--json"]))).expect("it is JSON");
    let expected = json!({
        "context": "prod", "selected": true, "url": "amqp://me:***@broker.example.com", "connect_timeout": "2s",
    });
    assert_eq!(shown, expected);
    let named = printed(user.run_with(&[("HOPLINE_CONTEXT", "local")], &["context", "show"]));
    assert!(named.contains("\nnamespace        shop\n"), "{named}");
    let help = printed(user.run(&["ls", "--help"]));
    assert!(!help.contains("s3cret"), "{help}");

    let file = user.0.join("hopline/contexts.json");
    assert!(std::fs::read_to_string(&file).expect("it is there").contains("s3cret"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&file).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let files = std::fs::read_dir(user.0.join("hopline")).expect("it is there").count();
    assert_eq!(files, 1, "what was written on the way is gone");

    for (arguments, code, told) in [
        (&["add", "prod", "--url", "memory://"][..], 1, "the context `prod` is there: `--replace` replaces it"),
        (&["add", "a", "--url", "http://me:s3cret@x"], 2, "the broker's address has an unknown scheme"),
        (&["add", "a", "--url", "memory://", "--namespace", "a.b"], 2, "the namespace `a.b` has a '.' in it"),
        (&["add", "a", "--url", "amqps://localhost", "--ca", here], 2, "the CA has no certificate in PEM"),
        (&["select", "b"], 2, "there is no context `b`: `hopline context ls` lists them"),
        (&["rm", "b"], 2, "there is no context `b`"),
    ] {
        let output = user.run(&[&["context"], arguments].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(said(&output).starts_with(told) && !said(&output).contains("s3cret"), "{arguments:?}: {output:?}");
    }
    assert_eq!(printed(user.run(&["context", "rm", "prod"])), "removed prod");
    assert_eq!(printed(user.run(&["context", "ls", "--json"])).matches("context").count(), 1);
    // With it goes that it was selected.
    assert_eq!(user.run(&["context", "show"]).status.code(), Some(1));
    std::fs::write(&file, "{").expect("it can be written");
    let broken = user.run(&["ls"]);
    assert!(said(&broken).contains("contexts.json`: EOF while parsing"), "{broken:?}");
}

#[test]
fn an_option_goes_before_a_variable_before_a_context_before_the_default() {
    let user = User::new("order");
    user.add("one", "first");
    user.add("two", "second");
    let memory = ("HOPLINE_URL", "memory://");
    assert_eq!(user.used(&[memory], &[]), "hopline");
    printed(user.run(&["context", "select", "one"]));
    assert_eq!(user.used(&[], &[]), "first");
    assert_eq!(user.used(&[("HOPLINE_CONTEXT", "two")], &[]), "second");
    assert_eq!(user.used(&[("HOPLINE_CONTEXT", "two")], &["--context", "one"]), "first");
    assert_eq!(user.used(&[("HOPLINE_NAMESPACE", "third"), ("HOPLINE_CONTEXT", "")], &["--context", "two"]), "third");
    assert_eq!(user.used(&[("HOPLINE_NAMESPACE", "third")], &["--namespace", "fourth"]), "fourth");
    assert_eq!(printed(user.run(&["context", "select"])), "selected none");
    let output = user.run(&["ls", "--context", "none"]);
    assert_eq!((output.status.code(), said(&output).starts_with("there is no context `none`")), (Some(2), true));
}

#[test]
fn an_address_is_used_without_any_context() {
    let user = User::new("address");
    user.add("one", "first");
    printed(user.run(&["context", "select", "one"]));
    // Neither with the namespace of a context nor with anything else of it.
    assert_eq!(user.used(&[], &["--url", "memory://"]), "hopline");
    assert_eq!(user.used(&[("HOPLINE_URL", "memory://"), ("HOPLINE_CONTEXT", "one")], &[]), "hopline");
    // Which one is meant cannot be known.
    for (variables, arguments, told) in [
        (&[][..], &["--url", "memory://"][..], "a context has an address: say `--context` or `--url`"),
        (&[("HOPLINE_URL", "memory://")], &[], "HOPLINE_URL goes before a context: unset it, or leave out `--context`"),
    ] {
        let output = user.run_with(variables, &[&["ls", "--context", "one"], arguments].concat());
        assert_eq!((output.status.code(), said(&output).as_str()), (Some(2), told));
    }
}

//! `hopline top` where there is no terminal. What it draws is tested beside the code that draws it.

mod command;

use command::{hopline, said};

#[test]
fn without_a_terminal_it_says_what_to_use_instead() {
    let output = hopline(&["top", "--url", "amqp://127.0.0.1:1"]).output().expect("it can be run");
    assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(2), true), "{output:?}");
    let other = "`hopline top` needs a terminal: elsewhere use `hopline stats SERVICE --watch` or `hopline ls --json`";
    assert_eq!(said(&output), other);
    let output = hopline(&["top", "--json"]).output().expect("it can be run");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

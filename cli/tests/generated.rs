//! `hopline completions` and `hopline man` as a shell sees them.

use std::process::{Command, Stdio};

mod command;

use command::{hopline, printed, said};

#[test]
fn each_shell_accepts_its_completions() {
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(hopline(&["completions", shell]).output().expect("it can be run"));
        assert!(script.contains("subscribe") && script.contains("namespace"), "{script}");
        let file = format!("{}/completions.{shell}", env!("CARGO_TARGET_TMPDIR"));
        std::fs::write(&file, script).expect("it can be written");
        let checked = Command::new(shell).arg("-n").arg(&file).stdin(Stdio::null()).output();
        match checked {
            Ok(output) => assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}"),
            // This shell is not here.
            Err(error) => assert!(shell != "bash" && error.kind() == std::io::ErrorKind::NotFound, "{shell}: {error}"),
        }
    }
    let output = hopline(&["completions", "tcl"]).output().expect("it can be run");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn there_is_a_manual_of_all_commands_and_of_each() {
    for words in [&[][..], &["call"], &["dead", "replay"], &["context", "add"], &["bench", "call"]] {
        let page = printed(hopline(&[&["man"], words].concat()).output().expect("it can be run"));
        let name = ["hopline"].iter().chain(words).copied().collect::<Vec<_>>().join("\\-");
        assert!(page.contains(&format!("\n.TH {} 1 ", name.replace("\\-", "-"))), "{page}");
        assert!(page.contains(&format!(".SH NAME\n{name} \\- ")) && page.contains("Example"), "{page}");
    }
    let output = hopline(&["man", "context", "none"]).output().expect("it can be run");
    assert_eq!(
        (output.status.code(), said(&output)),
        (Some(2), "there is no command `hopline context none`".to_owned())
    );
}

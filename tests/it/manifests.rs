//! The files for systemd and Kubernetes in the guide's page Operating can be used as they stand there.

use std::process::Command;

use yaml_rust2::{Yaml, YamlLoader};

use crate::sources::text;

const PAGE: &str = "docs/guide/src/operations.md";

/// The first code block of the page in this language.
fn block(language: &str) -> String {
    let page = text(PAGE);
    let (_, rest) = page.split_once(&format!("```{language}\n")).expect("the page has one");
    rest.split_once("```").expect("it ends").0.to_owned()
}

#[test]
fn the_manifests_are_yaml_and_their_parts_agree() {
    let all = YamlLoader::load_from_str(&block("yaml")).expect("it is YAML");
    let [deployment, budget] = &all[..] else { panic!("a Deployment and a PodDisruptionBudget: {all:?}") };
    assert_eq!((&deployment["apiVersion"], &deployment["kind"]), (&yaml("apps/v1"), &yaml("Deployment")));
    assert_eq!((&budget["apiVersion"], &budget["kind"]), (&yaml("policy/v1"), &yaml("PodDisruptionBudget")));
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    assert!(!labels.is_badvalue());
    for of in [deployment, budget] {
        assert_eq!(&of["spec"]["selector"]["matchLabels"], labels);
    }
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let code = block("rust");
    for (probe, path) in [("startupProbe", "/alive"), ("readinessProbe", "/ready"), ("livenessProbe", "/alive")] {
        let asked = &container[probe]["httpGet"];
        assert_eq!((&asked["path"], &asked["port"]), (&yaml(path), &container["ports"][0]["name"]), "{probe}");
        assert!(code.contains(path), "the program on the page does not answer `{path}`");
    }
    let port = container["ports"][0]["containerPort"].as_i64().expect("a number");
    assert!(code.contains(&format!(":{port}\"")), "the program on the page listens at another port");
    // As the unit for systemd.
    let grace = pod["terminationGracePeriodSeconds"].as_i64().expect("a number");
    assert!(block("ini").contains(&format!("\nTimeoutStopSec={grace}\n")));
}

fn yaml(text: &str) -> Yaml {
    Yaml::String(text.to_owned())
}

#[test]
fn systemd_accepts_the_unit() {
    let folder = std::env::temp_dir().join(format!("unit-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir(&folder).expect("there is room for it");
    let unit = folder.join("orders.service");
    // The program has to be there.
    let text = block("ini").replace("/usr/local/bin/orders", "/bin/true");
    std::fs::write(&unit, text).expect("there is room for it");
    let verified = Command::new("systemd-analyze").arg("verify").arg(&unit).output();
    std::fs::remove_dir_all(folder).expect("it is ours");
    // A machine without systemd cannot tell.
    let Ok(verified) = verified else { return };
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && !said.contains("orders.service"), "{said}");
}
